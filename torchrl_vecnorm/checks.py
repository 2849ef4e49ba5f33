# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What moments from elsewhere have to be like: those that no data can have given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrl_vecnorm.moments import Moments

#: How far rounding may take sum² beyond ssq · count: the Cauchy-Schwarz inequality, and
#: what sums in float32, as torchrl has them, were seen to make of it.
SLACK = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALVES = (torch.float16, torch.bfloat16)

#: What a state always has.
REQUIRED = Moments._fields[:3]
_NOT_NEGATIVE = {"ssq": "sums of squares", "central": "variances"}


def check_moments(
    names: Sequence[str],
    moments: Moments,
    features: torch.Size | None,
    is_live: bool = False,
    counts: int = 1,
    owner: str = "VecNorm",
) -> Moments:
    """Refuses moments that no data can have given.

    Args:
        names: of the entries, for the message.
        moments: what was loaded.
        features: their shape, where it is known.
        is_live: others may be in the middle of an update of them, so that entries need
            not fit together.
        counts: elements of the entry of the count.
        owner: whose they are, for the message.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """

    def expect(good: bool, name: str, expected: str, got: Any) -> None:
        if not good:
            raise ValueError(f"{owner}: entry {name!r}: expected {expected}, got {got}")

    given = [
        (field, name, leaf)
        for field, name, leaf in zip(Moments._fields, names, moments, strict=True)
        if leaf is not None or field in REQUIRED
    ]
    for _, name, leaf in given:
        is_tensor = isinstance(leaf, Tensor)
        expect(is_tensor, name, "a tensor", type(leaf).__name__)
        good = leaf.layout is torch.strided and leaf.dtype in (*SLACK, *_HALVES)
        got = f"{leaf.dtype} in layout {leaf.layout}"
        expect(good and not leaf.is_meta, name, "dense floating-point values", got)
    shape = tuple(moments.sum.shape if features is None else features)
    shapes = {"count": (counts,), "nonfinite": (2, *shape)}
    for field, name, leaf in given:
        wanted = shapes.get(field, shape)
        got = tuple(leaf.shape)
        expect(got == wanted, name, f"shape {wanted}", got)

    def expect_all(good: Tensor, name: str, expected: str, leaf: Tensor) -> None:
        if not good.all():
            expect(False, name, expected, leaf[~good].flatten()[0].item())

    for field, name, leaf in given:
        if field == "sum":
            expect_all(leaf.isfinite(), name, "finite sums", leaf)
        else:
            # NaN is not below anything, nor above.
            good = (leaf >= 0) & leaf.isfinite()
            what = _NOT_NEGATIVE.get(field, "counts")
            expect_all(good, name, f"{what} that are finite and not negative", leaf)
    if moments.nonfinite is not None:
        total = moments.nonfinite[1]
        expect_all(total == total.floor(), names[3], "whole numbers", total)
    if is_live:
        return moments
    if moments.nonfinite is not None:
        missing = moments.nonfinite[0]
        what = "no more values missing than were ever left out"
        expect_all(missing <= total * (1 + 1e-6), names[3], what, missing)
    total, squares, count, used = (
        v.double()
        for v in (moments.sum, moments.ssq, moments.samples(), moments.used())
    )
    # All may be missing, and the sums torchrl's, which does not know of `nonfinite`.
    used = torch.where(used > 0, used, count)
    slack = SLACK.get(moments.sum.dtype, SLACK[torch.float32])
    # Where nearly all are missing, the difference has lost its digits.
    slack = slack + 1e-10 * count / used
    # Of means, as the square of a sum may overflow.
    mean, square = total / used, squares / used
    good = torch.where(
        used > 0, mean * mean <= square * (1 + slack), (total == 0) & (squares == 0)
    )
    expected = f"ssq · count ≥ sum² beside {names[0]!r} and {names[2]!r}"
    expect_all(good, names[1], expected, squares)
    return moments
