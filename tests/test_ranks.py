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


def batches(seed: int, size: int, calls: int, far: float):
    """What each rank has at each call: uneven, some of it empty, some of it NaN."""
    g = torch.Generator().manual_seed(seed)
    for i in range(calls):
        counts = torch.randint(0, 6, (size,), generator=g).tolist()
        parts = [
            torch.randn(n, 3, generator=g, dtype=torch.float64) + far for n in counts
        ]
        masks = [torch.rand(n, generator=g) < 0.8 for n in counts]
        if i % 5 == 2:
            for part in parts:
                part[:1, 0] = NAN
        yield parts, masks if i % 3 == 0 else None


# --------------------------------------------------------- every call, against one process


def _running_norm(rank, size, calls, decay, far):
    ranks = RunningNorm({"a": 3, "b": 3}, decay=decay, group="world")
    alone = RunningNorm({"a": 3, "b": 3}, decay=decay)
    for parts, masks in batches(1, size, calls, far):
        mine, all_ = parts[rank], torch.cat(parts)
        mask = None if masks is None else masks[rank]
        everyone = None if masks is None else torch.cat(masks)
        y = ranks({"a": mine, "b": 2 * mine}, mask)
        alone({"a": all_, "b": 2 * all_}, everyone)
        assert (
            y["a"].equal(F.normalize(mine, ranks.stats["a"].moments()))
            or mine.isnan().any()
        )
        for name in "ab":
            agree(ranks.stats[name].moments(), alone.stats[name].moments(), far=far)
    return bits(ranks.state_dict())


@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
def test_running_norm_is_one_process(decay):
    for far in (0.0, 1e6):
        found = run(2, _running_norm, 100, decay, far)
        assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
def test_running_norm_is_one_process_over_1000_calls(size, decay):
    found = run(size, _running_norm, 1000, decay, 100.0)
    assert all(one == found[0] for one in found)


def _against_fractions(rank, size, far):
    norm, chunks = RunningNorm(3, decay=0.9, group="world"), []
    for parts, _ in batches(2, size, 60, far):
        clean = [torch.where(p.isnan(), far + 0.5, p) for p in parts]
        norm(clean[rank])
        chunks.append(torch.cat(clean).numpy())
    mean, var, _ = exact(chunks, 0.9)
    assert np.abs(norm.mean.numpy() / mean - 1).max() < 1e-14 if far else True
    return float(np.abs(norm.var.numpy() / var - 1).max())


@pytest.mark.parametrize("far", [0.0, 1e3, 1e6])
def test_variance_keeps_its_digits_far_from_zero(far):
    assert max(run(2, _against_fractions, far)) < 1e-12 + 1e-15 * far


def tensordicts(seed, size, calls, far=3.0):
    """What each rank has: uneven; ``reward`` is missing on some, as at a reset."""
    g = torch.Generator().manual_seed(seed)
    for i in range(calls):
        made = []
        for rank in range(size):
            n = int(torch.randint(0, 5, (), generator=g))
            obs = torch.randn(n, 3, generator=g, dtype=torch.float64) + far
            reward = torch.randn(n, 1, generator=g, dtype=torch.float64)
            td = TensorDict({"obs": obs, "reward": reward}, [n])
            if (i + rank) % 4 == 3:
                del td["reward"]
            made.append(td)
        yield made


def _vecnorm(rank, size, kind, calls, decay):
    keys = ["obs", "reward"]
    options = {"reduce_batch_dims": True} if kind is VecNormV2 else {}
    ranks = kind(keys, decay=decay, group="world", **options).train()
    alone = kind(keys, decay=decay, **options).train()
    for made in tensordicts(3, size, calls):
        joined = {
            key: torch.cat([td[key] for td in made if key in td.keys()])
            for key in keys
            if any(key in td.keys() for td in made)
        }
        td = ranks._reset(None, made[rank].clone())
        # The keys have different numbers of samples: a call of one process for each.
        for key, value in joined.items():
            alone._reset(None, TensorDict({key: value}, value.shape[:1]))
        for (_, x), (_, y) in zip(
            ranks._statistics.seen(), alone._statistics.seen(), strict=True
        ):
            agree(x, y)
        again = ranks.frozen_copy()._reset(None, made[rank].clone())
        for key in td.keys():
            assert torch.equal(td[key], again[key])
    return bits(ranks.state_dict()["_extra_state"])


@pytest.mark.parametrize("kind", [VecNorm, VecNormV2])
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
def test_vecnorm_is_one_process(kind, decay):
    found = run(2, _vecnorm, kind, 40, decay)
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [VecNorm, VecNormV2])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_vecnorm_is_one_process_over_1000_calls(kind, size):
    found = run(size, _vecnorm, kind, 1000, 0.9999)
    assert all(one == found[0] for one in found)
