# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What statistics of others have to be like."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.names import StateNames
from torchrl_vecnorm.statistics.sharing import in_shared_memory

T = TypeVar("T")

#: How far rounding may take sum² beyond ssq · count: the Cauchy-Schwarz inequality, and
#: what sums in float32, as torchrl has them, were seen to make of it.
SLACK = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALVES = (torch.float16, torch.bfloat16)

#: What a state always has.
REQUIRED = StateNames._fields[:3]
_NOT_NEGATIVE = {"ssq": "sums of squares", "central": "variances"}


def check_moments(
    names: Sequence[str],
    moments: Moments,
    features: torch.Size | None,
    is_live: bool = False,
    counts: int = 1,
) -> Moments:
    """Refuses moments that no data can have given.

    Args:
        names: of the entries, for the message.
        moments: what was loaded.
        features: their shape, where it is known.
        is_live: others may be in the middle of an update of them, so that entries need
            not fit together.
        counts: elements of the entry of the count.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """

    def expect(good: bool, name: str, expected: str, got: Any) -> None:
        if not good:
            raise ValueError(f"VecNorm: entry {name!r}: expected {expected}, got {got}")

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


def patiently(check: Callable[[], T]) -> T:
    """Calls a check of what others may be in the middle of an update of, until it passes.

    Raises:
        ValueError: of the last attempt.
    """
    for milliseconds in (1, 2, 4, 8, 16):
        with suppress(ValueError):
            return check()
        time.sleep(milliseconds / 1000)
    return check()


def settled(
    names: Sequence[str],
    moments: Moments,
    features: torch.Size | None,
    counts: int = 1,
) -> Moments:
    """Moments that were checked, as :func:`check_moments` does.

    In shared memory others may update them: then it is a copy of between two updates.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """
    if not any(map(in_shared_memory, moments)):
        return check_moments(names, moments, features, counts=counts)
    check_moments(names, moments, features, True, counts)

    def take() -> Moments:
        copied = (None if leaf is None else leaf.detach().clone() for leaf in moments)
        return check_moments(names, Moments(*copied), features, counts=counts)

    return patiently(take)


def check_usable(names: Sequence[str], moments: Moments) -> None:
    """Refuses moments of others that no call could update where they are.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """
    for name, leaf in zip(names, moments, strict=True):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
            raise ValueError(
                f"VecNorm: entry {name!r}: expected a dense tensor, got "
                f"{getattr(leaf, 'layout', type(leaf).__name__)}"
            )
        wanted = (torch.float64, torch.float32)
        if leaf.dtype not in wanted or not leaf.is_contiguous() or leaf.requires_grad:
            raise ValueError(
                f"VecNorm: entry {name!r}: expected contiguous statistics of dtype "
                f"{' or '.join(map(str, wanted))} that need no gradient, got {leaf.dtype} "
                f"of strides {leaf.stride()}"
                + (" that needs a gradient" if leaf.requires_grad else "")
            )


def check_apart(loaded: Iterable[Moments]) -> None:
    """Refuses leaves that share memory: an update of one would change the other.

    Raises:
        ValueError: two leaves overlap.
    """
    leaves = [
        leaf
        for moments in loaded
        for leaf in moments
        if isinstance(leaf, Tensor)
        and leaf.layout is torch.strided
        and leaf.numel()
        and leaf.is_contiguous()
    ]
    begins = sorted((leaf.data_ptr(), leaf.nbytes) for leaf in leaves)
    for (begin, size), (following, _) in pairwise(begins):
        if following < begin + size:
            raise ValueError(
                "VecNorm: expected a tensor of its own for each entry of the state_dict, "
                "got one piece of memory for several of them"
            )
