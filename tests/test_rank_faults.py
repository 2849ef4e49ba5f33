# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Ranks that die, do not come, or call something else: an error, and nothing has changed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranked import KILLED, run, start
from tensordict import TensorDict

from torchrl_vecnorm import RunningNorm, VecNorm, VecNormV2

#: Seconds until a rank that is waited for is given up.
SOON = 3.0


def values(rank, i, n=3):
    g = torch.Generator().manual_seed(1000 * rank + i)
    return torch.randn(n, 2, generator=g, dtype=torch.float64)


def call(norm, x):
    if isinstance(norm, RunningNorm):
        return norm(x)
    return norm(TensorDict({"a": x}, [len(x)]))


def bits(norm):
    state = norm.state_dict()
    state = state.get("_extra_state", state)
    return {k: v.numpy().tobytes() for k, v in (state or {}).items()}


def make(kind):
    options = {"reduce_batch_dims": True} if kind is VecNormV2 else {}
    first = 2 if kind is RunningNorm else ["a"]
    return kind(first, decay=0.9, group="world", **options)


# -------------------------------------------------------------------------- the killed


def _killed(rank, size, kind, seed, kills, folder):
    """Calls until the last rank is killed, at any moment; then the others go on without it.

    The processes of ranks that are killed stay dead: each kill leaves a smaller group.
    """
    timeout = 20.0
    start(rank, size, folder, f"{seed}-0", timeout)
    norm, i = make(kind), 0
    for kill in range(kills):
        last = size - kill - 1
        if rank == last:
            delay = random.Random(seed + kill).random() * 0.02
            for _ in range(2):
                call(norm, values(rank, i))
                i += 1
            me = os.getpid()
            timer = threading.Timer(delay, os.kill, (me, signal.SIGKILL))
            timer.start()
        before = None
        try:
            while True:
                before = bits(norm)
                call(norm, values(rank, i))
                i += 1
        except RuntimeError as error:
            text = str(error)
            assert f"of {last + 1})" in text and "call" in text, text
            assert "has died" in text, text
        assert bits(norm) == before
        dist.destroy_process_group()
        start(rank, last, folder, f"{seed}-{kill + 1}", timeout)
        # A rank that was killed in a call may have left it to some of the others only.
        counts = [None] * last
        dist.all_gather_object(counts, (i, before))
        newest = max(counts, key=lambda one: one[0])
        if len({one[0] for one in counts}) > 1:
            load = {k: None for k in newest[1]}
            assert load
            sent = [norm.state_dict() if i == newest[0] else None]
            source = next(r for r, one in enumerate(counts) if one[0] == newest[0])
            dist.broadcast_object_list(sent, source)
            norm.load_state_dict(sent[0])
        i = newest[0]
        call(norm, values(rank, i))
        i += 1
    return bits(norm), i


@pytest.mark.parametrize("kind", [RunningNorm, VecNorm])
def test_others_go_on_when_a_rank_is_killed(kind, tmp_path):
    found = run(4, _killed, kind, 1, 2, str(tmp_path), timeout=0)
    assert found[2:] == [KILLED, KILLED]
    assert found[0] == found[1]


@pytest.mark.slow
def test_kills(request, tmp_path):
    for seed in range(request.config.getoption("--kills")):
        kind = (RunningNorm, VecNorm, VecNormV2)[seed % 3]
        found = run(2, _killed, kind, 10 + seed, 1, str(tmp_path), timeout=0)
        assert found[1] == KILLED


# ---------------------------------------------------------------------- the absent


def _absent(rank, size):
    norm, t = make(RunningNorm), VecNorm(["a"], decay=0.9)
    call(norm, values(rank, 0))
    before = bits(norm), bits(t)
    begun = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"call 2 in group .*\(rank 0 of 2\)"):
            call(norm, values(rank, 1))
        assert time.monotonic() - begun < 4 * SOON
    else:
        time.sleep(1.5 * SOON)
        with pytest.raises(RuntimeError, match=r"sync_\(\) in group .*\(rank 1 of 2\)"):
            t.sync_()
    assert before == (bits(norm), bits(t))
    return True


def test_a_rank_that_never_comes():
    run(2, _absent, timeout=SOON)


# --------------------------------------------------------------------- another order


def _other_order(rank, size):
    keys = ["a"], ["b"]
    norms = [VecNorm(k, decay=0.9, group="world") for k in keys]
    td = TensorDict({"a": values(rank, 0), "b": values(rank, 1)}, [3])
    for norm in norms:
        norm(td.clone())
    before = [bits(norm) for norm in norms]
    for norm in norms if rank else norms[::-1]:
        with pytest.raises(RuntimeError, match=r"call 2 in group.*another order"):
            norm(td.clone())
    assert before == [bits(norm) for norm in norms]
    # One has called more often.
    for norm in norms:
        norm(td.clone())
    # Another decay is another call.
    norms[0].decay = 0.9 if rank else 0.5
    before = bits(norms[0])
    with pytest.raises(RuntimeError, match="same keys and options"):
        norms[0](td.clone())
    assert before == bits(norms[0])
    norms[0].decay = 0.5
    norms[0](td.clone())
    # The first call of all is another one.
    fresh = VecNorm(["a" if rank else "b"], group="world")
    with pytest.raises(
        RuntimeError, match=r"agreement before call 1.*\['\"a\"'\]|\"'a'\""
    ):
        fresh(td.clone())
    assert fresh._td is None
    return [bits(norm) for norm in norms]


def test_ranks_that_call_in_another_order():
    found = run(2, _other_order)
    assert found[0] == found[1]


def _more_often(rank, size):
    norm = make(RunningNorm)
    for i in range(3):
        call(norm, values(rank, i))
    if (
        rank == 0
    ):  # a call that the other does not make, beside an all-reduce of its own
        before = bits(norm)
        with pytest.raises(RuntimeError, match="call 4 in group"):
            call(norm, values(rank, 3))
        assert before == bits(norm)
    else:
        dist.all_reduce(torch.ones(len(norm._ranks._batches.buffer)).double())
    return True


def test_a_call_that_others_do_not_make():
    run(2, _more_often, timeout=SOON)


# --------------------------------------------- errors that only the device knows (CUDA)


def _deferred(rank, size):
    norm = make(RunningNorm)
    norm._ranks.defers = True
    for i in range(3):
        call(norm, values(rank, i))
    before = bits(norm)
    bad = torch.zeros(3, 9) if rank else values(rank, 3)
    if rank:
        with pytest.raises(ValueError):
            call(norm, bad)
    else:
        call(norm, bad)
    assert bits(norm) == before
    with pytest.raises(RuntimeError, match=r"call 4 in group.*refused"):
        call(norm, values(rank, 4))
    assert bits(norm) == before
    call(norm, values(rank, 5))
    assert bits(norm) != before
    t = VecNorm(["a", "b"], decay=0.9, group="world")
    t._statistics.ranks.defers = True
    td = TensorDict({"a": torch.ones(2, 1)}, [2])
    t._reset(None, td.clone())
    late = TensorDict({"b": torch.ones(2, 1)}, [2])
    t._reset(None, late.clone() if rank else td.clone())  # nobody knows yet
    t._reset(None, late.clone())
    return bits(norm), t._td["a_count"].item(), t._td["b_count"].item()


def test_errors_that_are_told_a_call_later():
    found = run(2, _deferred)
    assert found[0] == found[1]
    assert found[0][1:] == (4, 4)
