# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What comes in: numbers, and the values of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.entries import get_entry
from torchrl_vecnorm.statistics.keys import Key
from torchrl_vecnorm.statistics.names import as_path


def number(
    name: str, value: Any, is_good: Callable[[float], bool], expected: str
) -> float:
    """``value`` as a float, if it is a number that can be used for ``name``."""
    is_scalar = isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta
    if not isinstance(value, Real) and not (is_scalar and not value.is_complex()):
        raise TypeError(
            f"VecNorm: expected {name} to be a number that is {expected}, got "
            f"{type(value).__name__} {value!r}"
        )
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not is_good(found):  # False for NaN too
        raise ValueError(f"VecNorm: expected {name} {expected}, got {value}")
    return found


def check_writable(td: TensorDictBase, key: NestedKey) -> None:
    """What is known before the update is said before it."""
    node, path = td, as_path(key)
    for depth in range(len(path)):
        if not is_tensor_collection(node):
            raise KeyError(
                f"VecNorm: out_key {key!r}: expected a tensordict at {path[:depth]}, got "
                f"{type(node).__name__}"
            )
        if node.is_locked:
            raise RuntimeError(
                "VecNorm: the tensordict is locked, so the normalised values cannot be "
                f"written to {key!r}; unlock it with `tensordict.unlock_()`, or pass a copy"
            )
        node = get_entry(node, path[depth])
        if node is None:
            return


def check_value(key: NestedKey, value: Any) -> None:
    """Refuses what is no tensor that can be normalised."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"VecNorm: key {key!r}: expected a tensor, got {type(value).__name__}"
        )
    if value.is_nested or value.is_quantized:
        kind = "a nested tensor" if value.is_nested else f"quantized {value.dtype}"
        raise TypeError(f"VecNorm: key {key!r}: expected dense real values, got {kind}")
    if value.is_complex() or value.layout is not torch.strided or value.is_meta:
        raise TypeError(
            f"VecNorm: key {key!r}: expected dense real values, got "
            f"{value.dtype} in layout {value.layout} on {value.device}"
        )


def features_of(
    key: Key,
    value: Tensor,
    batch_dims: int,
    state: Moments | None,
    beside: torch.Size | None = None,
) -> torch.Size:
    """The shape of the features of a value, checked against what is known of it.

    Args:
        key: the key.
        value: its value.
        batch_dims: of the tensordict.
        state: the statistics, if there are any.
        beside: the features of a key that shares the statistics, if there is one.
    """
    if key.shape is not None:
        expected, source = key.shape, "shapes"
        features = value.shape[max(value.ndim - len(expected), 0) :]
    else:
        features = value.shape[batch_dims:]
        expected, source = features, ""
    if features == expected and (state is not None or beside is not None):
        expected = beside if state is None else state.sum.shape
        source = "the statistics"
        if key.others:
            source += f" that it shares with {', '.join(map(repr, key.others))}"
    if features != expected:
        raise ValueError(
            f"VecNorm: key {key.in_key!r}: expected features of shape "
            f"{tuple(expected)} (from {source}), got {tuple(features)}: the value has "
            f"shape {tuple(value.shape)} and the tensordict {batch_dims} batch "
            "dimension(s)"
        )
    return features


def identity(value: Tensor) -> Tensor:
    """What comes out where nothing was seen: the value, integers in the default dtype."""
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return value.to(dtype, copy=True)
