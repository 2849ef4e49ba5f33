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

from torchrl_vecnorm.moments import Moments, largest_square, state_dtype
from torchrl_vecnorm.rule import Rule, RuleArgs


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
    used = mask & (x * x <= largest_square(dtype))
    left_out = mask & ~used
    x = torch.where(used, x, 0.0)
    n = used.sum(0).clamp_min(1).to(dtype)
    apart = torch.where(used, x - x.sum(0) / n, 0.0)
    return Moments(
        sum=x.sum(0),
        ssq=(x * x).sum(0),
        count=mask.sum().to(dtype).reshape(1),
        nonfinite=torch.stack([left_out.sum(0)] * 2).to(dtype),
        central=(apart * apart).sum(0) / n,
    )


def impute(batch: Moments, state: Moments) -> Moments:
    """Values that were left out, taken to have been at the running mean.

    For states without the counter of missing values. While there is no running mean the
    mean of the batch stands in for it.
    """
    missing = batch.nonfinite[0]
    count = state.samples()
    mean = batch.mean_var()[0]
    at = torch.where(count > 0, state.sum.to(mean.dtype) / count, mean)
    at = torch.where(missing > 0, at, 0.0)
    return Moments(
        batch.sum + missing * at,
        batch.ssq + missing * at * at,
        batch.count,
        central=joint_var(batch.used(), *batch.mean_var(), missing, at, 0 * at),
    )


def joint_var(
    n: Tensor, mean: Tensor, var: Tensor, m: Tensor, mean_m: Tensor, var_m: Tensor
) -> Tensor:
    """The variance of n and m values together (Chan, Golub & LeVeque)."""
    share = torch.where(n + m > 0, m / (n + m), 0.0)
    apart = torch.where((n > 0) & (m > 0), mean_m - mean, 0.0)
    return var + share * (var_m - var + (1 - share) * apart * apart)


def fold(
    state: Moments,
    batch: Moments,
    keep: float | Tensor,
    weight: float | Tensor = 1.0,
) -> Moments:
    """``keep * state + weight * batch``; an empty batch changes nothing.

    The result has the dtypes of the state, as rounding goes with each update.
    """
    if state.nonfinite is None and batch.nonfinite is not None:
        batch = impute(batch, state)
    some = batch.samples() > 0

    def add(old: Tensor, new: Tensor) -> Tensor:
        folded = keep * old.to(new.dtype) + weight * new
        return torch.where(some, folded.to(old.dtype), old)

    central = state.central
    if central is not None:
        var = joint_var(
            keep * state.used().to(batch.sum.dtype),
            *state.mean_var(),
            weight * batch.used(),
            *batch.mean_var(),
        )
        central = torch.where(some, var.to(central.dtype), central)
    nonfinite = state.nonfinite
    if nonfinite is not None:
        new = batch.nonfinite
        if new is None:
            new = torch.zeros_like(nonfinite)
        nonfinite = torch.stack([add(nonfinite[0], new[0]), nonfinite[1] + new[1]])
    count = add(state.samples(), batch.samples())
    if state.count.numel() == 2:
        count = torch.stack([count, state.seen() + batch.seen()])
    return Moments(
        add(state.sum, batch.sum),
        add(state.ssq, batch.ssq),
        count.reshape(state.count.shape),
        nonfinite,
        central,
    )


def loc_scale(state: Moments, rule: RuleArgs | float) -> tuple[Tensor, Tensor]:
    """``loc = sum / n`` and ``scale = max(sqrt(max(ssq / n - loc², 0)), eps)``.

    0 and 1 where nothing was seen yet, so that normalising is the identity there. A scale
    that is less than the rounding of ``loc`` would show nothing but that: it is bounded
    too. ``rule`` is eps alone, or says where else eps stands, and that ``loc`` is 0 where
    values are only scaled.
    """
    rule = rule_of(rule)
    loc, var = state.mean_var()
    least = loc.abs() * state.rounding().scale
    scale = rule.scale(var, least, state.used() > 0)
    return loc if rule.center else torch.zeros_like(loc), scale


def rule_of(rule: RuleArgs | float) -> Rule:
    """A rule, or one of eps alone."""
    return Rule(*rule) if isinstance(rule, tuple) else Rule(rule)


def normalize(x: Tensor, state: Moments, rule: RuleArgs | float) -> Tensor:
    """``(x - loc) / scale``, clipped, in the dtype of x, the default dtype for integers."""
    loc, scale = loc_scale(state, rule)
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return rule_of(rule).limit((x.to(loc.dtype) - loc) / scale).to(dtype)


def denormalize(y: Tensor, state: Moments, rule: RuleArgs | float) -> Tensor:
    """``y * scale + loc``, y clipped: the inverse of :func:`normalize`."""
    loc, scale = loc_scale(state, rule)
    return (rule_of(rule).limit(y.to(loc.dtype)) * scale + loc).to(y.dtype)


def update(
    x: Tensor,
    state: Moments,
    *,
    keep: float,
    weight: float = 1.0,
    eps: RuleArgs | float = 1e-4,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """One call: the batch is folded into the state, x normalised with the result.

    Returns:
        y, and the new state.
    """
    state = fold(state, batch_moments(x, state.sum.ndim, mask), keep, weight)
    return normalize(x, state, eps), state


def scale_returns(
    reward: Tensor,
    done: Tensor,
    returns: Tensor,
    state: Moments,
    *,
    gamma: float | Tensor,
    clears_before: bool = False,
    keep: float = 1.0,
    rule: RuleArgs | float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Moments]:
    """One step of the discounted returns, whose moments scale the rewards.

    Args:
        reward: ``[*samples, *features]``, any real dtype.
        done: bool with one element a sample: whose episode ends with this reward.
        returns: like ``reward``, in the dtype that they are kept in.
        state: the moments of the returns.
        gamma: the discount.
        clears_before: whether an end clears a return before its reward is added, or
            after the statistics have seen it.
        keep: what the old moments are multiplied by.
        rule: how rewards are normalised; they are not centred.
        mask: as ``done``: whose returns go on, and count.

    A reward that is not finite is left out of the statistics, and counts as 0 in what is
    left of its return.

    Returns:
        The scaled rewards, the new returns, the new state.
    """
    samples = reward.shape[: reward.ndim - state.sum.ndim]
    wide = state_dtype(reward.device)
    most = largest_square(wide)

    def of_samples(flags: Tensor) -> Tensor:
        return flags.reshape(*samples, *(1 for _ in state.sum.shape)).expand_as(reward)

    ends = of_samples(done)
    past = gamma * returns.to(wide)
    if clears_before:
        past = torch.where(ends, 0.0, past)
    past = torch.where(past * past <= most, past, 0.0)
    seen = (past + reward.to(wide)).to(returns.dtype).to(wide)
    left = torch.where(seen * seen <= most, seen, past)
    if not clears_before:
        left = torch.where(ends, 0.0, left)
    left = left.to(returns.dtype)
    if mask is not None:
        left = torch.where(of_samples(mask), left, returns)
    batch = batch_moments(seen, state.sum.ndim, mask)
    state = fold(state, batch, keep)
    rule = rule_of(rule)._replace(center=False)
    return normalize(reward, state, rule), left, state
