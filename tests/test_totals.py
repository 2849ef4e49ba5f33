# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Batches as numbers that add up: compiled and in plain torch, against the joined batch."""

from __future__ import annotations

import pytest
import torch

from torchrl_vecnorm import Moments
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.totals import HEADER, LIMIT, Batches

CPU = torch.device("cpu")
NAN = float("nan")
FEATURES = [torch.Size(shape) for shape in ((3,), (), (2, 2), (0,), (5,))]


def made(shifts, features=FEATURES, name=12345.0) -> tuple[Batches, Batches]:
    """The compiled halves, and those in plain torch."""
    both = [Batches(features, shifts, CPU, name) for _ in range(2)]
    assert both[0].compiled
    both[1].compiled = False
    return tuple(both)


def values(features, rank: int, i: int, far: float) -> torch.Tensor | None:
    """Of a rank at a call: uneven, some of it empty, missing or NaN."""
    g = torch.Generator().manual_seed(100 * i + 10 * rank + len(features))
    n = int(torch.randint(0, 6, (), generator=g))
    x = torch.randn(n, *features, generator=g, dtype=torch.float64) + far
    if i % 3 == 1 and n > 1:
        x[-1:].view(-1)[:1] = NAN
    return None if (i + rank) % 4 == 3 else x


def add_up(batches: Batches, parts: list[list]) -> list[Moments]:
    """What each of some ranks would read."""
    total = torch.zeros_like(batches.buffer)
    number = batches.expected.clone()
    for part in parts:
        batches.expected.copy_(number)  # each rank counts for itself
        batches.write(part)
        total += batches.buffer
    batches.buffer.copy_(total)
    assert batches.header.equal(batches.expected * len(parts))
    if batches.moves():
        return add_up(batches, parts)
    return batches.read()


def near(x: torch.Tensor, y: torch.Tensor, slack: float, size=None) -> None:
    assert x.shape == y.shape and x.dtype == y.dtype
    assert ((x - y).abs() <= slack * (y.abs() if size is None else size)).all(), (x, y)


@pytest.mark.parametrize("far", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("known", [True, False])
def test_totals_are_the_moments_of_the_joined_batch(far, known):
    shifts = [torch.full(f, far) if known else None for f in FEATURES]
    shifts[1] = torch.tensor(NAN)
    both = made(shifts)
    for i in range(20):
        x = [[values(f, rank, i, far) for f in FEATURES] for rank in range(3)]
        parts = [
            [None if v is None else F.moments(v, v.ndim - 1) for v in one] for one in x
        ]
        found, plain = (add_up(batches, parts) for batches in both)
        near(both[0].buffer, both[1].buffer, 1e-13, far + 10)
        assert both[0].header.equal(both[1].header)
        near(both[0].shift, both[1].shift, 1e-15, far + 10)
        for k, features in enumerate(FEATURES):
            mine = [v[k] for v in x if v[k] is not None]
            joined = torch.cat(mine) if mine else torch.zeros(0, *features).double()
            expected = F.moments(joined, len(features)).with_extras()
            for got in (found[k], plain[k]):
                assert got.count.equal(expected.count)
                assert got.nonfinite.equal(expected.nonfinite)
                size = (expected.ssq * expected.count).sqrt()
                near(got.sum, expected.sum, 1e-14, size)
                near(got.ssq, expected.ssq, 1e-14)
                size = expected.central + 1  # of one value the variance is 0
                near(got.central, expected.central, 1e-12 + 1e-15 * far, size)
                assert all(leaf.is_contiguous() for leaf in got)
    assert not any(
        leaf.data_ptr() == b.d1.data_ptr() for b in both for leaf in found[0]
    )


def test_a_header_counts_on_and_begins_again():
    both = made([None], FEATURES[:1], name=LIMIT - 1.0)
    for batches in both:
        batches.expected[0] = LIMIT - 2
    for number, asks, refused in ((LIMIT - 1, True, False), (0, False, True)):
        last = float(LIMIT - 1)
        said = [number, number**2, last, last**2, asks, refused]
        for batches in both:
            batches.write([None], asks, refused)
            assert batches.header.tolist() == said
            assert batches.expected.tolist() == [*said[:4], 0, 0]
    for batches in both:
        batches.name(7.0)
        batches.write([None])
        assert batches.header.tolist() == [1, 1, 7, 49, 0, 0]


def test_a_call_that_not_all_have_made_is_an_empty_one():
    for batches in made([torch.zeros(3)], FEATURES[:1]):
        batches.write([F.moments(torch.ones(2, 3))])
        batches.empty_unless_agreed(1)
        assert batches.counts.item() == 2
        batches.empty_unless_agreed(2)
        assert not batches.buffer[HEADER:].any()
        assert batches.read()[0].count.item() == 0


def test_no_keys():
    for batches in made([], []):
        batches.write([])
        assert batches.header.tolist()[:2] == [1, 1]
        assert batches.read() == []


def test_batches_of_any_form():
    """Leaves as users give them; and samples that weigh less than one all together."""
    x = torch.randn(2, 4, 3, dtype=torch.float64) * torch.tensor([1.0, 2, 3]) + 5
    states = [Moments.zeros([3]) for _ in x]
    for state, rows in zip(states, x, strict=True):
        F.update_(rows + 3 * rows[0], state, weight=0.05)
    expected = Moments(*(leaf.clone() for leaf in states[0]))
    F.merge_(expected, states[1])
    odd = [Moments(*(leaf.float() for leaf in states[0]))]
    wide = torch.stack([states[1].sum, states[1].sum], -1)
    strided = [states[1]._replace(sum=wide[:, 0])]
    assert not strided[0].sum.is_contiguous()
    for batches in made([torch.full([3], 4.0)], FEATURES[:1]):
        (found,) = add_up(batches, [odd, strided])
        for got, leaf in zip(found, expected, strict=True):
            near(got, leaf, 1e-6)
        (found,) = add_up(batches, [[state] for state in states])
        for got, leaf in zip(found, expected, strict=True):
            near(got, leaf, 1e-14)


def test_batches_of_other_features_are_refused_before_anything_is_written():
    batches, _ = made([None], FEATURES[:1])
    before = batches.buffer.clone(), batches.expected.clone()
    for features in (2, 4):
        with pytest.raises(ValueError, match="features"):
            batches.write([F.moments(torch.ones(2, features))])
    assert batches.expected.equal(before[1]) and batches.header.equal(before[0][:6])
