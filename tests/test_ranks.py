# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics of several ranks, against one process that has the joined batch."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranked import run
from tensordict import TensorDict
from torch import nn

from torchrl_vecnorm import Moments, RunningNorm, VecNorm, VecNormV2
from torchrl_vecnorm import functional as F

NAN = float("nan")


# ------------------------------------------------------------------------- the judges


def bits(state: dict) -> dict[str, bytes]:
    """A state_dict, to be compared bit by bit."""
    return {
        name: leaf.numpy().tobytes() for name, leaf in state.items() if leaf is not None
    }


def exact(chunks: list[np.ndarray], decay: float) -> tuple[np.ndarray, ...]:
    """Mean and variance after calls with these batches, in long double.

    A variance of joined batches is that of their values: around a value among them no
    digit is lost.
    """
    shift = next(c[0] for c in chunks if len(c)).astype(np.longdouble)
    n = total = squares = np.longdouble(0)
    for chunk in chunks:
        if not len(chunk):
            continue
        x = chunk.astype(np.longdouble) - shift
        keep = np.longdouble(decay)
        n = keep * n + len(x)
        total = keep * total + x.sum(0)
        squares = keep * squares + (x * x).sum(0)
    mean = total / n
    return shift + mean, squares / n - mean * mean, n


def agree(found: Moments, expected: Moments, slack: float = 1e-12, far: float = 0.0):
    """Within 1e-12, of which ``far = |mean| / std`` takes the digits that sums have."""
    for name, x, y in zip(found._fields, found, expected, strict=True):
        size = y.abs()
        if name == "sum":  # around zero it is a difference of large numbers
            size = (expected.ssq * expected.samples()).sqrt()
        more = 3e-16 * far if name == "central" else 0.0
        assert ((x - y).abs() <= (slack + more) * size).all(), (name, x, y)


class Draw:
    """What a rank has at a call: who needs that of one does not draw that of all."""

    def __init__(self, seed: int, rank: int, i: int) -> None:
        self.g = torch.Generator().manual_seed((seed * 2000 + i) * 16 + rank)

    def rows(self, most: int) -> int:
        return int(torch.randint(0, most, (), generator=self.g))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.g, dtype=torch.float64)

    def mask(self, n: int) -> torch.Tensor:
        return torch.rand(n, generator=self.g) < 0.8


def batch(seed: int, rank: int, i: int, far: float):
    """Uneven over ranks and calls, some of it empty, some of it NaN; and a mask or none."""
    draw = Draw(seed, rank, i)
    n = draw.rows(6)
    x = draw.normal(n, 3) + far
    if i % 5 == 2:
        x[1:2, 0] = NAN
    return x, draw.mask(n) if i % 3 == 0 else None


def together(parts: list[tuple]) -> list:
    """The joined batch: of each of the tensors that ranks have, or None."""
    return [
        None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True)
    ]


def is_judged(rank: int, i: int, calls: int) -> bool:
    """One rank compares; the others have the same bits."""
    return rank == 0 and (calls <= 100 or i % 10 == 9)


# --------------------------------------------------------- every call, against one process


def _running_norm(rank, size, calls, far):
    options = [{"decay": decay} for decay in (0.9, 0.9999, 1.0)]
    ranks = [RunningNorm({"a": 3, "b": 3}, **one, group="world") for one in options]
    alone = [RunningNorm({"a": 3, "b": 3}, **one) for one in options]
    for i in range(calls):
        mine, mask = batch(1, rank, i, far)
        x = {"a": mine, "b": 2 * mine}
        outputs = [norm(x, mask) for norm in ranks]
        if rank == 0:
            all_, everyone = together([batch(1, r, i, far) for r in range(size)])
            for norm in alone:
                norm.update({"a": all_, "b": 2 * all_}, everyone)
        if is_judged(rank, i, calls):
            for y, norm, one in zip(outputs, ranks, alone, strict=True):
                again = F.normalize(mine, norm.stats["a"].moments())
                assert torch.allclose(y["a"], again, 0, 0, equal_nan=True)
                for name in "ab":
                    expected = one.stats[name].moments()
                    agree(norm.stats[name].moments(), expected, far=far)
    return [bits(norm.state_dict()) for norm in ranks]


def test_running_norm_is_one_process():
    for size, far in ((1, 0.0), (2, 0.0), (2, 1e6)):
        found = run(size, _running_norm, 60, far)
        assert all(one == found[0] for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 8])
def test_running_norm_is_one_process_over_many_calls(request, size):
    calls = 1000 if size == 2 else request.config.getoption("--calls")
    found = run(size, _running_norm, calls, 100.0)
    assert all(one == found[0] for one in found)


def _against_fractions(rank, size, far):
    norm, chunks = RunningNorm(3, decay=0.9, group="world"), []
    for i in range(60):
        parts = [batch(2, r, i, far)[0] for r in range(size)]
        clean = [torch.where(p.isnan(), far + 0.5, p) for p in parts]
        norm(clean[rank])
        chunks.append(torch.cat(clean).numpy())
    mean, var, _ = exact(chunks, 0.9)
    assert np.abs(norm.mean.numpy() / mean - 1).max() < 1e-14 if far else True
    return float(np.abs(norm.var.numpy() / var - 1).max())


@pytest.mark.parametrize("far", [0.0, 1e3, 1e6])
def test_variance_keeps_its_digits_far_from_zero(far):
    assert max(run(2, _against_fractions, far)) < 1e-12 + 1e-15 * far


def tensordict(rank, i, far=3.0):
    """Uneven; ``reward`` is missing on some ranks, as at a reset."""
    draw = Draw(3, rank, i)
    n = draw.rows(5)
    td = TensorDict({"obs": draw.normal(n, 3) + far, "reward": draw.normal(n, 1)}, [n])
    return td.exclude("reward") if (i + rank) % 4 == 3 else td


def _vecnorm(rank, size, kind, calls):
    keys = ["obs", "reward"]
    options = {"reduce_batch_dims": True} if kind is VecNormV2 else {}
    decays = (0.9, 0.9999, 1.0)
    ranks = [kind(keys, decay=d, group="world", **options).train() for d in decays]
    alone = [kind(keys, decay=d, **options).train() for d in decays]
    for i in range(calls):
        mine = tensordict(rank, i)
        outputs = [norm._reset(None, mine.clone()) for norm in ranks]
        if rank == 0:
            made = [tensordict(r, i) for r in range(size)]
            for key in keys:
                parts = [td[key] for td in made if key in td.keys()]
                if not parts:
                    continue
                # The keys have different numbers of samples: a call for each.
                joined = TensorDict({key: torch.cat(parts)}, [sum(map(len, parts))])
                for norm in alone:
                    norm._reset(None, joined.clone())
        if is_judged(rank, i, calls):
            for td, norm, one in zip(outputs, ranks, alone, strict=True):
                found, expected = norm._statistics.seen(), one._statistics.seen()
                for (_, x), (_, y) in zip(found, expected, strict=True):
                    agree(x, y)
                again = norm.frozen_copy()._reset(None, mine.clone())
                for key in td.keys():
                    assert torch.equal(td[key], again[key])
    return [bits(norm.state_dict()["_extra_state"]) for norm in ranks]


@pytest.mark.parametrize("kind", [VecNorm, VecNormV2])
def test_vecnorm_is_one_process(kind):
    for size in (1, 2):
        found = run(size, _vecnorm, kind, 30)
        assert all(one == found[0] for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("kind", [VecNorm, VecNormV2])
def test_vecnorm_is_one_process_over_many_calls(request, kind, size):
    found = run(size, _vecnorm, kind, request.config.getoption("--calls"))
    assert all(one == found[0] for one in found)


# ----------------------------------------------- what is missing on some ranks, or is new


def _late_keys(rank, size):
    t = VecNorm(["a", "b"], decay=0.9, group="world")
    alone = VecNorm(["a", "b"], decay=0.9)
    torch.manual_seed(0)
    a, b = torch.randn(size, 4, 2), torch.randn(size, 4, 5) + 1e4
    calls = [{"a": a}, {"a": a, "b": b}, {"b": b}, {}, {"a": a}]
    for i, call in enumerate(calls):
        # Nobody else has b when it is first there; the last call rank 0 has nothing of.
        mine = {
            key: v[rank]
            for key, v in call.items()
            if not (i == 1 and key == "b" and rank != size - 1)
            and not (i == 4 and rank == 0)
        }
        t._reset(None, TensorDict(mine, [4] if mine else []))
        for key, v in call.items():
            rows = v[-1:] if i == 1 and key == "b" else v[1:] if i == 4 else v
            alone._reset(None, TensorDict({key: rows.flatten(0, 1)}, [len(rows) * 4]))
    for (_, x), (_, y) in zip(
        t._statistics.seen(), alone._statistics.seen(), strict=True
    ):
        agree(x, y, far=1e4)
    return bits(t.get_extra_state())


def test_keys_that_some_ranks_have_later_or_never():
    found = run(3, _late_keys)
    assert found[0] == found[1] == found[2]


def _nothing_at_first(rank, size):
    t = VecNorm(["a"], decay=0.5, group="world")
    t._reset(None, TensorDict({}, []))
    t._reset(None, TensorDict({"a": torch.ones(1, 1)}, [1]))
    t._reset(None, TensorDict({}, []))
    norm = RunningNorm({"a": 1, "b": 0}, group="world")  # and a key of no features
    norm({"a": torch.ones(1, 1), "b": torch.ones(1, 0)})
    assert norm.count == {"a": size, "b": 0}  # as one process has it
    return t._td["a_count"].item()


def test_a_first_call_of_nothing():
    assert run(2, _nothing_at_first) == [2, 2]


def _partial_resets(rank, size):
    t = VecNorm(["a"], group="world")
    x = torch.arange(8.0).reshape(size, 4, 1)
    t._step(TensorDict(batch_size=[4]), TensorDict({"a": x[rank]}, [4]))
    which = torch.zeros(4, 1, dtype=torch.bool)
    which[:rank] = True  # rank 0 resets nothing
    t._reset(TensorDict({"_reset": which}, [4]), TensorDict({"a": x[rank]}, [4]))
    return t._td["a_count"].item(), t._td["a_sum"].item()


def test_only_rows_that_are_reset_count():
    assert run(2, _partial_resets) == [(8 * 0.9999 + 1, 28 * 0.9999 + 4)] * 2


def _joins_with_nothing(rank, size):
    state = VecNorm(["a"], decay=0.5)
    state(TensorDict({"a": torch.ones(4, 1) * 7}, [4]))
    t = VecNorm(["a"], decay=0.5, group="world")
    if rank != 1:
        t.load_state_dict(state.state_dict())
    t(TensorDict({"a": torch.zeros(1, 1)}, [1]))
    return t._td["a_count"].item(), t._td["a_sum"].item()


def test_a_rank_with_nothing_takes_what_the_others_have():
    assert run(3, _joins_with_nothing) == [(2 + 3, 14)] * 3


def _different(rank, size):
    norm = RunningNorm(1)
    norm(torch.ones(rank + 1, 1))
    before = bits(norm.state_dict())
    norm.group = "world"
    with pytest.raises(
        RuntimeError, match=r"call 1 in group .* of 2.*key stats: .*same"
    ):
        norm(torch.ones(1, 1))
    assert bits(norm.state_dict()) == before
    norm.group = None
    norm.sync_()  # from nothing: what both have seen
    assert norm.count.item() == 3
    norm.group = "world"
    norm(torch.ones(1, 1))
    # A rank alone loads something else.
    if rank == 0:
        norm.load_state_dict(RunningNorm(1).state_dict())
    norm(torch.ones(1, 1))
    return norm.count.item()


def test_ranks_that_differ_are_told_and_can_be_joined():
    assert run(2, _different) == [7, 7]


def _refused(rank, size):
    t = VecNorm(["a", "b"], decay=0.9, group="world")
    good = TensorDict({"a": torch.randn(3, 2), "b": torch.randn(3)}, [3])
    t(good.clone())
    before = bits(t.get_extra_state())
    for error, text, bad in (
        (ValueError, "key 'a'.*features", {"a": torch.randn(3, 9), "b": good["b"]}),
        (KeyError, "'b' is not", {"a": good["a"]}),
        (TypeError, "'a'.*complex", {**good, "a": good["a"] * 1j}),
    ):
        td = TensorDict(bad, [3]) if rank == 1 else good.clone()
        with pytest.raises(
            error if rank == 1 else RuntimeError,
            match=text if rank == 1 else r"call \d in group.*1 of the ranks refused",
        ):
            t(td)
        assert bits(t.get_extra_state()) == before
    t(good.clone())
    return bits(t.get_extra_state())


def test_what_one_rank_refuses_all_refuse():
    run(2, _refused)


def _first_refused(rank, size):
    t = VecNorm(["a"], group="world")
    bad = torch.zeros(2, 1, dtype=torch.complex64 if rank else torch.float32)
    with pytest.raises(TypeError if rank else RuntimeError):
        t(TensorDict({"a": bad}, [2]))
    assert t._td is None
    x = torch.zeros(2, 1 + rank)
    with pytest.raises(ValueError, match=r"key 'a'.*one shape.*\(1,\), \(2,\)"):
        t(TensorDict({"a": x}, [2]))
    assert t._td is None
    t(TensorDict({"a": torch.zeros(2, 1)}, [2]))
    return t._td["a_count"].item()


def test_first_calls_that_are_refused():
    assert run(2, _first_refused) == [4, 4]


# ------------------------------------------------------------ V2, functional, options, copies


def _functional(rank, size):
    state, one = F.Moments.zeros([3]), F.Moments.zeros([3])
    for i in range(30):
        parts = [batch(4, r, i, 1e3)[0] for r in range(size)]
        total = F.all_reduce(F.moments(parts[rank]), near=state)
        F.merge_(state, total, decay=0.9)
        F.update_(torch.cat(parts), one, decay=0.9)
        agree(state, one, far=1e3)
    with pytest.raises(RuntimeError, match="same call of all ranks"):
        F.all_reduce(F.moments(torch.zeros(1, 1 + rank)))
    both = F.all_reduce([F.moments(torch.ones(2, 1)), F.moments(torch.ones(1, 2))])
    norm = RunningNorm(2)  # statistics as a batch: they have a second count
    norm(torch.ones(3, 2))
    total = F.all_reduce([norm.stats.moments(), F.moments(torch.ones(1, 1))])
    assert [m.count.tolist() for m in total] == [[6], [2]]
    assert total[0].sum.tolist() == [6, 6]
    return [int(m.count) for m in both]


def test_functional():
    assert run(2, _functional) == [[4, 2]] * 2


def _groups(rank, size):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    inside = VecNorm(["a"], group=mesh["gpu"])
    inside(TensorDict({"a": torch.ones(1, 1) * rank}, [1]))
    pairs = inside._td["a_sum"].item()
    # Every call on a machine, now and then between machines.
    inside.sync_(mesh["node"])
    both = inside._td["a_sum"].item()
    with pytest.raises(RuntimeError, match="another group"):
        inside.sync_()
    inside(TensorDict({"a": torch.zeros(1, 1)}, [1]))
    with pytest.raises(ValueError, match=r"one dimension.*mesh\['dp'\]"):
        VecNorm(["a"], group=mesh)
    mine = dist.new_group([0, 1])
    if rank < 2:
        norm = RunningNorm(1, group=mine)
        norm(torch.ones(1, 1))
        assert norm.count.item() == 2
    else:
        with pytest.raises(ValueError, match="a rank of"):
            RunningNorm(1, group=mine)
    assert RunningNorm(1, group=dist.group.WORLD).group == "world"
    return pairs, both, inside._td["a_count"].item()


def test_groups_and_meshes():
    found = run(4, _groups)
    count = 4 * 0.9999 + 2
    assert found == [(1, 6, count), (1, 6, count), (5, 6, count), (5, 6, count)]


def test_options_that_are_refused():
    for bad in (3, "gpu", object()):
        with pytest.raises(TypeError, match="expected group as a process group"):
            VecNorm(group=bad)
    with pytest.raises(ValueError, match="reduce_batch_dims"):
        VecNormV2(["a"], group="world")
    with pytest.raises(RuntimeError, match="reduce_batch_dims"):
        VecNormV2(["a"]).sync_()
    with pytest.raises(ValueError, match="until"):
        RunningNorm(1, until=3, group="world")
    td = TensorDict(
        {f"a_{f}": torch.zeros(1) for f in ("sum", "ssq", "count")}
    ).share_memory_()
    with pytest.raises(ValueError, match="other processes"):
        VecNorm(["a"], shared_td=td, group="world")
    for call in (
        lambda: VecNorm(["a"], group="world")(TensorDict({"a": torch.ones(1)}, [1])),
        lambda: RunningNorm(1, group="world")(torch.ones(1, 1)),
        VecNorm(["a"]).sync_,
        RunningNorm(1).sync_,
        lambda: F.all_reduce(F.moments(torch.ones(1, 1))),
    ):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call()


def test_a_group_is_not_pickled_but_copied():
    for one in (VecNorm(["a"], group="world"), RunningNorm(1, group="world")):
        with pytest.raises(TypeError, match="process group is of its process"):
            pickle.dumps(one)
        with pytest.raises(TypeError, match="process group is of its process"):
            torch.save(one, io.BytesIO())
        assert copy.deepcopy(one).group == "world"
        one.group = None
        pickle.loads(pickle.dumps(one))
    clone = VecNorm(["a"], group="world").clone()
    assert clone.group == "world"


def _compiled(rank, size):
    from torch._dynamo.utils import counters

    norm = RunningNorm(2, group="world")
    net = nn.Sequential(nn.Linear(2, 2), norm)
    x = torch.randn(4, 2, requires_grad=True)
    y = torch.compile(net, backend="eager")(x)
    y.sum().backward()
    t = VecNorm(["a"], group="world")

    @torch.compile(backend="eager")
    def step(td):
        return t(td)["a"] * 2

    step(TensorDict({"a": torch.ones(3, 1)}, [3]))
    # One reason each, whatever the number of frames it is found in.
    assert len(counters["graph_break"]) == 2
    assert all("ranks meet" in reason for reason in counters["graph_break"])
    eager = t(TensorDict({"a": torch.ones(3, 1)}, [3]))
    assert torch.equal(eager["a"], torch.zeros(3, 1))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda v: norm(v).sum())(torch.zeros(1, 2))
    return norm.count.item(), t._td["a_count"].item()


def test_compiled_with_a_graph_break():
    assert run(2, _compiled) == [(8, 6 * 0.9999 + 6)] * 2
