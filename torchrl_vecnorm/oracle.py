# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The arithmetic of the running normaliser in plain torch.

This is what the compiled kernels compute, written to be read: it is their
documentation, their judge in the tests, and what runs on devices that have no kernel
of ours. Everything is float64, nothing is mutated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_vecnorm.moments import Moments, state_dtype


def batch_moments(x: Tensor, feature_ndim: int, mask: Tensor | None = None) -> Moments:
    """The moments of the samples in ``x``.

    Args:
        x: ``[*samples, *features]``, any real dtype.
        feature_ndim: how many trailing dimensions are features.
        mask: bool with one element a sample: which samples count. All by default.

    A value is left out where it is not finite, or beyond 1e145: sums of its square would
    not be.
    """
    features = x.shape[x.ndim - feature_ndim :]
    dtype = state_dtype(x.device)
    samples = x.numel() // max(features.numel(), 1)
    x = x.reshape(samples, *features).to(dtype)
    if mask is None:
        mask = torch.ones(samples, dtype=torch.bool, device=x.device)
    mask = mask.reshape(samples, *(1 for _ in features)).to(x.device)
    used = mask & (x * x <= (1e290 if dtype == torch.float64 else 1e37))
    left_out = mask & ~used
    x = torch.where(used, x, 0.0)
    return Moments(
        sum=x.sum(0),
        ssq=(x * x).sum(0),
        count=mask.sum().to(dtype).reshape(1),
        nonfinite=torch.stack([left_out.sum(0)] * 2).to(dtype),
    )


def impute(batch: Moments, state: Moments) -> Moments:
    """Values that were left out, taken to have been at the running mean.

    For states without the counter of missing values. While there is no running mean the
    mean of the batch stands in for it.
    """
    missing = batch.nonfinite[0]
    batch_mean = batch.sum / batch.used().clamp_min(1)
    count = state.count.reshape(())
    at = torch.where(count > 0, state.sum.to(batch.sum.dtype) / count, batch_mean)
    at = torch.where(missing > 0, at, 0.0)
    return Moments(batch.sum + missing * at, batch.ssq + missing * at * at, batch.count)


def fold(state: Moments, batch: Moments, keep: float, weight: float = 1.0) -> Moments:
    """``keep * state + weight * batch``; an empty batch changes nothing.

    The result has the dtypes of the state, as rounding goes with each update.
    """
    if state.nonfinite is None and batch.nonfinite is not None:
        batch = impute(batch, state)
    some = batch.count.reshape(()) > 0

    def add(old: Tensor, new: Tensor) -> Tensor:
        folded = keep * old.to(new.dtype) + weight * new
        return torch.where(some, folded.to(old.dtype), old)

    nonfinite = state.nonfinite
    if nonfinite is not None:
        new = batch.nonfinite
        if new is None:
            new = torch.zeros_like(nonfinite)
        nonfinite = torch.stack([add(nonfinite[0], new[0]), nonfinite[1] + new[1]])
    return Moments(
        add(state.sum, batch.sum),
        add(state.ssq, batch.ssq),
        add(state.count, batch.count),
        nonfinite,
    )


def loc_scale(state: Moments, eps: float) -> tuple[Tensor, Tensor]:
    """``loc = sum / n`` and ``scale = max(sqrt(max(ssq / n - loc², 0)), eps)``.

    0 and 1 where nothing was seen yet, so that normalising is the identity there.
    """
    dtype = state_dtype(state.sum.device)
    n = state.used().to(dtype)
    loc = state.sum.to(dtype) / n
    var = (state.ssq.to(dtype) / n - loc * loc).clamp_min(0)
    scale = var.sqrt().clamp_min(eps)
    seen = n > 0
    return torch.where(seen, loc, 0.0), torch.where(seen, scale, 1.0)


def normalize(x: Tensor, state: Moments, eps: float) -> Tensor:
    """``(x - loc) / scale`` in the dtype of x, the default dtype for integers."""
    loc, scale = loc_scale(state, eps)
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return ((x.to(loc.dtype) - loc) / scale).to(dtype)


def denormalize(y: Tensor, state: Moments, eps: float) -> Tensor:
    """``y * scale + loc``, the inverse of :func:`normalize`."""
    loc, scale = loc_scale(state, eps)
    return (y.to(loc.dtype) * scale + loc).to(y.dtype)


def update(
    x: Tensor,
    state: Moments,
    *,
    keep: float,
    weight: float = 1.0,
    eps: float = 1e-4,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """One call: the batch is folded into the state, x normalised with the result.

    Returns:
        y, and the new state.
    """
    state = fold(state, batch_moments(x, state.sum.ndim, mask), keep, weight)
    return normalize(x, state, eps), state
