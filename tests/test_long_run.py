# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A million calls: nothing piles up in memory, and nothing drifts."""

from __future__ import annotations

import gc
import os
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from common import IntegerEnv, leaf
from tensordict import TensorDict

from torchrl_vecnorm import VecNorm

CALLS = 1_000_000
WARM_UP = 20_000
#: Integers, so that sums without decay are exact; [call, sample, feature].
VALUES = torch.tensor([[[1, -2]], [[3, 5]], [[-4, 2]], [[2, 7]]], dtype=torch.float32)
MIB = 1 << 20

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs /proc"
)


def resident() -> int:
    """Bytes of memory that this process occupies."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def call(transform, tds, calls: int) -> None:
    for td in islice(cycle(tds), calls):
        transform._call(td)


def grown(transform, tds, calls: int) -> int:
    """What ``calls`` calls add to the resident memory once the first ones are made."""
    call(transform, tds, WARM_UP)
    before = resident()
    call(transform, tds, calls - WARM_UP)
    return resident() - before


def tensordicts(requires_grad: bool = False) -> list[TensorDict]:
    return [
        TensorDict({"observation": x.clone().requires_grad_(requires_grad)}, [1])
        for x in VALUES
    ]


def exact_sums(power: int, decay: float) -> list[Fraction]:
    """Σ x^power of each feature after CALLS calls, a multiple of the cycle's length."""
    d, period = Fraction(decay), len(VALUES)
    # What a whole cycle leaves at its end, and how many cycles that makes. What decay
    # leaves of the first calls is less than 1e-43 and not counted.
    rounds = Fraction(CALLS, period) if d == 1 else 1 / (1 - d**period)
    return [
        rounds
        * sum(
            Fraction(x) ** power * d ** (period - 1 - i) for i, x in enumerate(column)
        )
        for column in VALUES[:, 0].T.tolist()
    ]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    "decay,requires_grad,calls",
    [(1.0, False, CALLS), (0.9999, False, CALLS), (0.999, True, CALLS // 10)],
)
def test_a_million_calls(decay, requires_grad, calls):
    """With gradients, which take two minutes for as many, a tenth of them."""
    transform = VecNorm(["observation"], ["normalized"], decay=decay)
    tds = tensordicts(requires_grad)
    assert grown(transform, tds, calls) <= MIB
    assert tds[0]["normalized"].requires_grad == requires_grad

    # An update rounds twice, by 2^-53 at most, and forgets old rounding as it forgets
    # old values. Sums of integers round nothing without decay.
    bound = 0.0 if decay == 1 else 2 * 2**-53 / (1 - decay)
    want = {
        f"observation_{f}": exact_sums(p, decay) for f, p in [("sum", 1), ("ssq", 2)]
    }
    want["observation_count"] = exact_sums(0, decay)[:1]
    for name, values in want.items():
        for got, value in zip(transform._td[name].tolist(), values, strict=True):
            assert abs(Fraction(got) - value) <= bound * abs(value), name
    for f, (s, q) in enumerate(zip(*list(want.values())[:2], strict=True)):
        loc = s / want["observation_count"][0]
        var = q / want["observation_count"][0] - loc**2
        # Given in float32.
        assert transform.loc["observation"][f].item() == pytest.approx(float(loc), 1e-6)
        scale = transform.scale["observation"][f].item()
        assert scale == pytest.approx(float(var) ** 0.5, 1e-6)


@needs_proc
@pytest.mark.parametrize("memmap", [False, True])
def test_shared_statistics(memmap, tmp_path):
    calls = 200_000
    td = VecNorm.build_td_for_shared_vecnorm(
        IntegerEnv(),
        ["observation"],
        memmap=tmp_path / "statistics" if memmap else False,
    )
    transform = VecNorm(["observation"], ["normalized"], shared_td=td, decay=1.0)
    assert grown(transform, tensordicts(), calls) <= MIB
    assert leaf(transform).item() == calls
    assert leaf(transform, field="sum").tolist() == [
        calls / len(VALUES) * x for x in VALUES.sum((0, 1)).tolist()
    ]
