# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The statistics of all keys, in a tensordict: finding, checking and copying them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling

from torchrl_vecnorm import functional
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.names import StateNames, as_path
from torchrl_vecnorm.statistics.sharing import in_shared_memory

T = TypeVar("T")


def get_entry(td: TensorDictBase, key: NestedKey) -> Any:
    """An entry of a tensordict or a tensorclass, or None."""
    if type(key) is not str:
        for name in key:
            # Nothing is an entry of what is no tensordict.
            td = get_entry(td, name) if is_tensor_collection(td) else None
        return td
    # The public `get` spends a microsecond on what is already known here: that the key
    # is in its canonical form.
    if type(td) is TensorDict and not is_compiling():
        return td._get_str(key, None)
    return td.get(key, None)


def set_entry(td: TensorDictBase, key: NestedKey, value: Tensor) -> None:
    """Sets an entry that has the shape and device of one that is in the tensordict."""
    if (
        type(td) is TensorDict
        and type(key) is str
        and not td.is_locked
        and not is_compiling()
    ):
        td._set_str(key, value, inplace=False, validated=True, non_blocking=False)
    else:
        td.set(key, value)


def read_moments(td: TensorDictBase | None, names: StateNames) -> Moments | None:
    """The live moments of a key, or None where there are none yet."""
    if td is None:
        return None
    total = get_entry(td, names.sum)
    if total is None:
        return None
    return Moments(total, *(get_entry(td, name) for name in names[1:]))


def write_moments(td: TensorDictBase, names: StateNames, moments: Moments) -> None:
    """Makes the moments entries of the tensordict."""
    for name, leaf in zip(names, moments, strict=True):
        if leaf is not None:
            td.set(name, leaf)


def restore_moments(
    td: TensorDictBase, names: StateNames, moments: Moments | None
) -> None:
    """Makes the entries what they were: these moments, or none."""
    for name, leaf in zip(names, moments or [None] * len(names), strict=True):
        if leaf is not None:
            td.set(name, leaf)
        elif get_entry(td, name) is not None:
            del td[name]


def copy_moments(target: Moments, source: Moments) -> None:
    """Writes moments in place, with or without the entries that are optional."""
    for old, new in zip(target, source.with_extras(), strict=True):
        if old is not None:
            # A count may be [1] or []; gradients do not follow the statistics.
            old.copy_(new.detach().reshape(old.shape))


def without_counter(moments: Moments) -> Moments:
    """The moments of as many values that give the same loc and scale, none missing."""
    if moments.nonfinite is None:
        return moments
    total, squares, count, used = (
        v.detach().double() for v in (*moments[:3], moments.used())
    )
    weight = torch.where(used > 0, count / used, 1.0)
    # Of nothing: the identity.
    squares = torch.where((used == 0) & (squares == 0), count, squares)
    return moments._replace(sum=total * weight, ssq=squares * weight, nonfinite=None)


#: How far rounding may take sum² beyond ssq · count: the Cauchy-Schwarz inequality, and
#: what sums in float32, as torchrl has them, were seen to make of it.
_SLACK = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALVES = (torch.float16, torch.bfloat16)

#: What a state always has.
REQUIRED = StateNames._fields[:3]
_NOT_NEGATIVE = {"ssq": "sums of squares", "central": "variances"}


def check_moments(
    names: Sequence[str],
    moments: Moments,
    features: torch.Size | None,
    is_live: bool = False,
) -> Moments:
    """Refuses moments that no data can have given.

    Args:
        names: of the entries, for the message.
        moments: what was loaded.
        features: their shape, where it is known.
        is_live: others may be in the middle of an update of them, so that entries need
            not fit together.

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
        good = leaf.layout is torch.strided and leaf.dtype in (*_SLACK, *_HALVES)
        got = f"{leaf.dtype} in layout {leaf.layout}"
        expect(good and not leaf.is_meta, name, "dense floating-point values", got)
    shape = tuple(moments.sum.shape if features is None else features)
    shapes = {"count": (1,), "nonfinite": (2, *shape)}
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
        v.double() for v in (moments.sum, moments.ssq, moments.count, moments.used())
    )
    # All may be missing, and the sums torchrl's, which does not know of `nonfinite`.
    used = torch.where(used > 0, used, count)
    slack = _SLACK.get(moments.sum.dtype, _SLACK[torch.float32])
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
    names: Sequence[str], moments: Moments, features: torch.Size | None
) -> Moments:
    """Moments that were checked, as :func:`check_moments` does.

    In shared memory others may update them: then it is a copy of between two updates.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """
    if not any(map(in_shared_memory, moments)):
        return check_moments(names, moments, features)
    check_moments(names, moments, features, is_live=True)

    def take() -> Moments:
        copied = (None if leaf is None else leaf.detach().clone() for leaf in moments)
        return check_moments(names, Moments(*copied), features)

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


def from_v2(
    names: Sequence[str], loc: Tensor, var: Tensor, count: Tensor, decay: float
) -> Moments:
    """The moments that a ``torchrl.envs.VecNormV2`` stands for.

    Its ``loc`` and ``var`` are averages of x and x² (not a variance) that begin at zero,
    with weights (1 - decay) · decay^age, which add up to W = 1 - decay^count. Ours are
    sums with weights decay^age::

        sum, ssq, count = loc / (1 - decay), var / (1 - decay), W / (1 - decay)

    and without decay, where the average is the plain one, each times the number of
    samples.

    Args:
        names: of the three entries, for the message.
        loc: ``[*features]``.
        var: ``[*features]``.
        count: one number, how many samples were seen.
        decay: of both classes; V2's state does not tell it.
    """
    for name, leaf in zip(names, (loc, var, count), strict=True):
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
            raise ValueError(
                f"VecNorm: entry {name!r}: expected a tensor, got {leaf!r}"
            )
    if count.numel() != 1 or count.is_complex():
        raise ValueError(
            f"VecNorm: entry {names[2]!r}: expected one number, got {count.dtype} of shape "
            f"{tuple(count.shape)}"
        )
    seen = count.reshape(1).double()
    weight = mass = seen
    if decay < 1:
        weight = torch.full_like(seen, 1 / (1 - decay))
        mass = -torch.expm1(seen * math.log(decay)) * weight
    if not bool((seen >= 0).all()):
        mass = seen  # refused as it came
    total, squares = (
        # What is not floating-point is refused as it came.
        leaf.double() * weight if leaf.is_floating_point() else leaf
        for leaf in (loc, var)
    )
    # Rounded to float32 before: what a constant feature leaves may be beneath its mean².
    if total.is_floating_point() and squares.shape == total.shape:
        least = total * total / mass
        near = (squares < least) & (squares >= least * (1 - _SLACK[torch.float32]))
        squares = torch.where(near, least, squares)
    return Moments(total, squares, mass)


def bind(
    td: TensorDictBase | None,
    keys: Sequence[tuple[NestedKey, NestedKey, StateNames, int | None, torch.dtype]],
    moments: Sequence[Moments],
    shared: _C.SharedState | None,
    watched: Sequence[tuple[Any, Any]] = (),
) -> _C.Binding | None:
    """The live leaves of all keys, with what a call has to look like to use them.

    Finding them costs more than a small call computes, so it is done once and checked
    on every call: loading, moving and sharing replace the leaves or the tensordict.

    Args:
        td: the statistics.
        keys: of each key the in_key, the out_key, the names of its entries, the number
            of its feature dimensions (None: given by ``shapes``) and its dtype.
        moments: what ``td`` has there, or the private copies of ``shared``.
        shared: statistics in shared memory, or a lock alone, or None.
        watched: what has to be equal at each call: lists that may be changed in place,
            and what they were.

    Returns:
        None where the entries are not plain, or lie on several devices, or an output goes
        to a tensordict that the value is not in.
    """
    if type(td) is not TensorDict or len({m.sum.device for m in moments}) != 1:
        return None
    # Every step down to every leaf: (dict, name, what has to be there).
    parts: list[tuple[dict, str, Any]] = []
    for _, _, names, *_ in keys:
        for path in map(as_path, names):
            node = td
            for part in path:
                if type(node) is not TensorDict:
                    return None
                child = node._tensordict.get(part)
                parts.append((node._tensordict, part, child))
                node = child
    in_keys, out_keys, _, ndims, dtypes = zip(*keys, strict=True)
    for source, target in zip(
        map(as_path, in_keys), map(as_path, out_keys), strict=True
    ):
        # Other tensordicts may have more batch dimensions than the value, and refuse it.
        if target[:-1] != source[:-1][: len(target) - 1]:
            return None
    return _C.Binding(
        td,
        parts,
        TensorDict,
        [as_path(key) for key in in_keys],
        [as_path(key) for key in out_keys],
        list(ndims),
        list(dtypes),
        functional.leaves_of(moments),
        shared,
        list(watched),
    )
