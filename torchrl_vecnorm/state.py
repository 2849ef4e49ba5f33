# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The statistics of all keys, in a tensordict: finding, checking and copying them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vecnorm import functional
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.names import StateNames, as_path


def get_entry(td: TensorDictBase, key: NestedKey) -> Any:
    """An entry of a tensordict, or None."""
    # The public `get` spends a microsecond on what is already known here: that the key
    # is in its canonical form.
    if type(td) is TensorDict and not torch.compiler.is_compiling():
        if type(key) is str:
            return td._get_str(key, None)
        return td._get_tuple(key, None)
    return td.get(key, None)


def set_entry(td: TensorDictBase, key: NestedKey, value: Tensor) -> None:
    """Sets an entry that has the shape and device of one that is in the tensordict."""
    if (
        type(td) is TensorDict
        and type(key) is str
        and not td.is_locked
        and not torch.compiler.is_compiling()
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


def copy_moments(target: Moments, source: Moments) -> None:
    """Writes moments in place, with or without the counter of missing values."""
    for old, new in zip(target[:3], source[:3], strict=True):
        old.copy_(new)
    if target.nonfinite is not None:
        if source.nonfinite is not None:
            target.nonfinite.copy_(source.nonfinite)
        else:
            target.nonfinite.zero_()


def check_moments(
    names: Sequence[str], moments: Moments, features: torch.Size | None
) -> Moments:
    """Refuses moments that no data can have given.

    Args:
        names: of the entries, for the message.
        moments: what was loaded.
        features: their shape, where it is known.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """

    def expect(good: bool, name: str, expected: str, got: Any) -> None:
        if not good:
            raise ValueError(f"VecNorm: entry {name!r}: expected {expected}, got {got}")

    shape = tuple(moments.sum.shape if features is None else features)
    shapes = (shape, shape, (1,), (2, *shape))
    for name, leaf, wanted in zip(names, moments, shapes, strict=True):
        if leaf is not None:
            got = tuple(leaf.shape)
            expect(got == wanted, name, f"shape {wanted}", got)
    for name, leaf in ((names[2], moments.count), (names[3], moments.nonfinite)):
        if leaf is not None:
            good = bool((leaf >= 0).all())
            expect(good, name, "counts that are not negative and not NaN", leaf)
    return moments


def bind(
    td: TensorDictBase | None,
    keys: Sequence[tuple[NestedKey, NestedKey, StateNames, int | None, torch.dtype]],
    moments: Sequence[Moments],
    shared: _C.SharedState | None,
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

    Returns:
        None where the entries are not plain, or lie on several devices.
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
    return _C.Binding(
        td,
        parts,
        TensorDict,
        [as_path(key) for key in in_keys],
        [as_path(key) for key in out_keys],
        list(ndims),
        list(dtypes),
        *functional.columns(moments),
        shared,
    )
