# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics as entries of a tensordict: finding, writing and copying them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling

from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.names import StateNames


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
        return td._tensordict.get(key)
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
    _, *others = names  # Dynamo of torch 2.7 fails at a slice of a NamedTuple
    return Moments(total, *(get_entry(td, name) for name in others))


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
        v.detach().double()
        for v in (moments.sum, moments.ssq, moments.samples(), moments.used())
    )
    weight = torch.where(used > 0, count / used, 1.0)
    # Of nothing: the identity.
    squares = torch.where((used == 0) & (squares == 0), count, squares)
    return moments._replace(sum=total * weight, ssq=squares * weight, nonfinite=None)
