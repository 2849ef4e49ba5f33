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

from collections.abc import Sequence

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


def _listed(value) -> list | None:
    if value is None:
        return None
    if isinstance(value, (Tensor, Moments)):
        return [value]
    return list(value)


def columns(states: list[Moments]) -> tuple[list, list, list, list]:
    """The states as the operators take them: one list for each kind of leaf."""
    if len(states) == 1:  # as below, in a quarter of the time
        sum, ssq, count, missing = states[0]
        return [sum], [ssq], [count], [] if missing is None else [missing]
    nonfinite: list[Tensor] = []
    if any(s.nonfinite is not None for s in states):
        nonfinite = [
            s.sum.new_empty(0) if s.nonfinite is None else s.nonfinite for s in states
        ]
    return (
        [s.sum for s in states],
        [s.ssq for s in states],
        [s.count for s in states],
        nonfinite,
    )


def mask_column(masks: list[Tensor | None], x: list[Tensor]) -> list[Tensor]:
    """The masks as the operators take them: no elements where every sample counts."""
    return [
        v.new_empty(0, dtype=torch.bool) if m is None else m.reshape(-1)
        for v, m in zip(x, masks, strict=True)
    ]


def _masks(mask, x: list[Tensor]) -> list[Tensor]:
    return [] if mask is None else mask_column(_listed(mask), x)


def _like(first, values: list[Tensor]):
    return values[0] if isinstance(first, Tensor) else values


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
    xs = _listed(x)
    y = _ops.update(
        xs,
        *columns(_listed(state)),
        _masks(mask, xs),
        float(decay),
        float(weight),
        float(eps),
        _listed(out),
    )
    return _like(x, y)


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
    xs = _listed(x)
    for v in xs:
        if not 0 <= feature_ndim <= v.ndim:
            raise ValueError(
                f"expected feature_ndim from 0 to {v.ndim} for values of shape "
                f"{tuple(v.shape)}, got {feature_ndim}"
            )
    batch = [
        Moments.zeros(v.shape[v.ndim - feature_ndim :], device=v.device) for v in xs
    ]
    torch.ops.torchrl_vecnorm.update(
        [v.detach() for v in xs],
        *columns(batch),
        [],
        _masks(mask, xs),
        1.0,
        1.0,
        1.0,
    )
    return batch[0] if isinstance(x, Tensor) else batch


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
    torch.ops.torchrl_vecnorm.merge(
        *columns(_listed(state)),
        *columns(_listed(other)),
        float(decay),
        float(weight),
    )


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
    y = _ops.normalize(_listed(x), *columns(_listed(state)), float(eps), _listed(out))
    return _like(x, y)


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
    ys, states = _listed(y), _listed(state)
    if _ops.needs_plain_torch():
        plain = zip(ys, states, strict=True)
        return _like(y, [oracle.denormalize(v, s, eps) for v, s in plain])
    x = [torch.empty_like(v) for v in ys]
    torch.ops.torchrl_vecnorm.denormalize(ys, *columns(states), x, float(eps))
    return _like(y, x)


def loc_scale(state: Moments, *, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation that the state stands for.

    Both are ``[*features]`` and float64; 0 and 1 where nothing was seen.

    Equivalent to::

        loc = state.sum / state.count
        scale = (state.ssq / state.count - loc**2).clamp_min(0).sqrt().clamp_min(eps)
    """
    return oracle.loc_scale(state, eps)
