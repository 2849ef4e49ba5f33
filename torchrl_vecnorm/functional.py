# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The running normaliser for tensors, without environments and tensordicts.

Every function takes one key, or a list with one entry for each key: all keys go in one
call of a compiled operator. ``x`` is ``[*samples, *features]``; the features are those
of the state, everything before them is samples.

    >>> import torch
    >>> from torchrl_vecnorm import functional as F
    >>> state = F.Moments.zeros([3])
    >>> y = F.update_(torch.randn(128, 3), state, decay=0.99)
    >>> loc, scale = F.loc_scale(state)
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from types import NoneType
from typing import overload

import torch
from torch import Tensor

from torchrl_vecnorm import _ops, oracle
from torchrl_vecnorm.moments import Moments

__all__ = [
    "Moments",
    "denormalize",
    "loc_scale",
    "merge_",
    "moments",
    "normalize",
    "update_",
]


def _listed(name: str, value, of: type) -> list:
    """One of something, or a sequence of them, as a list."""
    if isinstance(value, of):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(v, of) for v in value
    ):
        raise TypeError(
            f"expected {name} as {of.__name__} or a list of them, got {_describe(value)}"
        )
    return list(value)


def _describe(value) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {[type(v).__name__ for v in value]}"
    return type(value).__name__


def _number(name: str, value) -> float:
    if type(value) is float:
        return value
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )
    if not is_number:
        raise TypeError(f"expected {name} as a number, got {_describe(value)}")
    return float(value)


def leaves_of(states: Sequence[Moments]) -> list[Tensor]:
    """The states as the operators take them: leaf after leaf, none with no elements."""
    return [
        state.sum.new_empty(0) if leaf is None else leaf
        for state in states
        for leaf in state
    ]


def _masks(mask, x: list[Tensor]) -> list[Tensor]:
    if mask is None:
        return []
    masks = mask if isinstance(mask, (list, tuple)) else [mask]
    if len(masks) != len(x) or not all(
        isinstance(m, (Tensor, NoneType)) for m in masks
    ):
        raise TypeError(
            f"expected mask as a tensor, or one or None for each of {len(x)} keys, got "
            f"{_describe(mask)}"
        )
    # No elements where every sample counts.
    return [
        v.new_empty(0, dtype=torch.bool) if m is None else m
        for v, m in zip(x, masks, strict=True)
    ]


def _like(first, values: list[Tensor]):
    return values[0] if isinstance(first, Tensor) else values


@overload
def update_(
    x: Tensor,
    state: Moments,
    *,
    decay: float = ...,
    weight: float = ...,
    eps: float = ...,
    mask: Tensor | None = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def update_(
    x: Sequence[Tensor],
    state: Sequence[Moments],
    *,
    decay: float = ...,
    weight: float = ...,
    eps: float = ...,
    mask: Sequence[Tensor | None] | None = ...,
    out: Sequence[Tensor] | None = ...,
) -> list[Tensor]: ...


def update_(
    x: Tensor | Sequence[Tensor],
    state: Moments | Sequence[Moments],
    *,
    decay: float = 0.9999,
    weight: float = 1.0,
    eps: float = 1e-4,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Updates the state with a batch and normalises the batch with the result.

    Args:
        x: ``[*samples, *features]``, any real dtype, any strides.
        state: the running moments, mutated.
        decay: what the old moments are multiplied by, once a call. 1 never forgets.
        weight: what a new sample weighs.
        eps: lower bound of ``scale``, in the units of ``x``.
        mask: bool, one element a sample: which samples count for the statistics. All
            samples are normalised.
        out: where to write the result; may be ``x``.

    Returns:
        ``(x - loc) / scale`` in the shape and dtype of ``x`` (the default dtype for
        integers). Differentiable in ``x``, with the statistics as constants.

    Values that are NaN or infinite, or float64 values beyond 1e145, whose squares no sum
    could hold, are left out of the statistics and counted in ``state.nonfinite[1]``. An
    empty batch changes nothing.

    Raises:
        ValueError: the trailing shape of ``x`` is not that of the state.
        TypeError: complex or sparse values.

    Equivalent to::

        n = x.shape[0]
        state.sum.mul_(decay).add_(x.double().sum(0))
        state.ssq.mul_(decay).add_(x.double().pow(2).sum(0))
        state.count.mul_(decay).add_(n)
        loc = state.sum / state.count
        var = state.ssq / state.count - loc.pow(2)
        scale = var.clamp_min(0).sqrt().clamp_min(eps)
        y = ((x - loc) / scale).to(x.dtype)
    """
    xs = _listed("x", x, Tensor)
    y = _ops.update(
        xs,
        leaves_of(_listed("state", state, Moments)),
        _masks(mask, xs),
        _number("decay", decay),
        _number("weight", weight),
        _number("eps", eps),
        None if out is None else _listed("out", out, Tensor),
    )
    return _like(x, y)


@overload
def moments(
    x: Tensor, feature_ndim: int = ..., *, mask: Tensor | None = ...
) -> Moments: ...


@overload
def moments(
    x: Sequence[Tensor],
    feature_ndim: int = ...,
    *,
    mask: Sequence[Tensor | None] | None = ...,
) -> list[Moments]: ...


def moments(
    x: Tensor | Sequence[Tensor],
    feature_ndim: int = 1,
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
) -> Moments | list[Moments]:
    """The moments of a batch, in the form of a state.

    Args:
        x: ``[*samples, *features]``, any real dtype.
        feature_ndim: how many trailing dimensions are features.
        mask: bool, one element a sample: which samples count.

    Equivalent to::

        Moments(x.double().sum(0), x.double().pow(2).sum(0), torch.tensor([x.shape[0]]))
    """
    xs = _listed("x", x, Tensor)
    batch = _ops.moments(xs, feature_ndim, _masks(mask, xs))
    return batch[0] if isinstance(x, Tensor) else batch


@overload
def merge_(
    state: Moments, other: Moments, *, decay: float = ..., weight: float = ...
) -> None: ...


@overload
def merge_(
    state: Sequence[Moments],
    other: Sequence[Moments],
    *,
    decay: float = ...,
    weight: float = ...,
) -> None: ...


def merge_(
    state: Moments | Sequence[Moments],
    other: Moments | Sequence[Moments],
    *,
    decay: float = 1.0,
    weight: float = 1.0,
) -> None:
    """Merges moments, of a batch or of another state, into a state.

    Equivalent to::

        state.sum.mul_(decay).add_(other.sum, alpha=weight)
        state.ssq.mul_(decay).add_(other.ssq, alpha=weight)
        state.count.mul_(decay).add_(other.count, alpha=weight)

    ``merge_(state, moments(x), decay=d)`` does to the state what
    ``update_(x, state, decay=d)`` does.
    """
    _ops.merge(
        leaves_of(_listed("state", state, Moments)),
        leaves_of(_listed("other", other, Moments)),
        _number("decay", decay),
        _number("weight", weight),
    )


@overload
def normalize(
    x: Tensor, state: Moments, *, eps: float = ..., out: Tensor | None = ...
) -> Tensor: ...


@overload
def normalize(
    x: Sequence[Tensor],
    state: Sequence[Moments],
    *,
    eps: float = ...,
    out: Sequence[Tensor] | None = ...,
) -> list[Tensor]: ...


def normalize(
    x: Tensor | Sequence[Tensor],
    state: Moments | Sequence[Moments],
    *,
    eps: float = 1e-4,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Normalises with the statistics as they are.

    ``x`` itself where the state has seen nothing. Differentiable in ``x``.

    Equivalent to::

        loc, scale = loc_scale(state, eps=eps)
        y = ((x - loc) / scale).to(x.dtype)
    """
    y = _ops.normalize(
        _listed("x", x, Tensor),
        leaves_of(_listed("state", state, Moments)),
        _number("eps", eps),
        None if out is None else _listed("out", out, Tensor),
    )
    return _like(x, y)


@overload
def denormalize(y: Tensor, state: Moments, *, eps: float = ...) -> Tensor: ...


@overload
def denormalize(
    y: Sequence[Tensor], state: Sequence[Moments], *, eps: float = ...
) -> list[Tensor]: ...


def denormalize(
    y: Tensor | Sequence[Tensor],
    state: Moments | Sequence[Moments],
    *,
    eps: float = 1e-4,
) -> Tensor | list[Tensor]:
    """The inverse of :func:`normalize`. Differentiable in ``y``.

    Equivalent to::

        loc, scale = loc_scale(state, eps=eps)
        x = (y * scale + loc).to(y.dtype)
    """
    x = _ops.denormalize(
        _listed("y", y, Tensor),
        leaves_of(_listed("state", state, Moments)),
        _number("eps", eps),
    )
    return _like(y, x)


def loc_scale(state: Moments, *, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation that the state stands for.

    Both are ``[*features]`` and float64; 0 and 1 where nothing was seen.

    Equivalent to::

        loc = state.sum / state.count
        scale = (state.ssq / state.count - loc**2).clamp_min(0).sqrt().clamp_min(eps)
    """
    (one,) = _listed("state", state, Moments)
    eps = _number("eps", eps)
    _ops.check_numbers(eps=eps)
    return oracle.loc_scale(one, eps)
