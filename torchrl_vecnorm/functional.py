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
from typing import Literal, overload

import torch
from torch import Tensor

from torchrl_vecnorm import _ops, _return_ops, oracle
from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.ranks import reduced
from torchrl_vecnorm.rule import EpsMode, RuleArgs, eps_mode_of

#: When an episode's end clears its return.
Clear = Literal["after", "before"]

__all__ = [
    "Moments",
    "all_reduce",
    "denormalize",
    "loc_scale",
    "merge_",
    "moments",
    "normalize",
    "scale_returns_",
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


def _expect_one(name: str, value, of: type) -> None:
    if not isinstance(value, of):
        raise TypeError(f"expected {name} as {of.__name__}, got {_describe(value)}")


def _describe(value) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {[type(v).__name__ for v in value]}"
    return type(value).__name__


def number(name: str, value) -> float:
    """What a user gives as a number, as a float; ``name`` is for the error."""
    if type(value) is float:
        return value
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )
    if not is_number:
        raise TypeError(f"expected {name} as a number, got {_describe(value)}")
    return float(value)


def rule_of(eps, eps_mode: str, clip, center: bool) -> RuleArgs:
    """What a user says about eps, a clip and centring, as the operators take it."""
    return (
        eps if type(eps) is float else number("eps", eps),
        eps_mode_of(eps_mode),
        clip if clip is None or type(clip) is float else number("clip", clip),
        True if center is True else bool(center),
    )


def leaves_of(states: Sequence[Moments]) -> list[Tensor]:
    """The states as the operators take them: leaf after leaf, none with no elements."""
    leaves = []
    for state in states:
        total, _, _, nonfinite, central = state
        if nonfinite is None or central is None:
            none = total.new_empty(0)
            leaves += [none if leaf is None else leaf for leaf in state]
        else:
            leaves += state
    return leaves


def masks_of(mask, x: list[Tensor]) -> list[Tensor]:
    """A user's masks as the operators take them."""
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


def clears_before(clear: str) -> bool:
    """Whether returns are cleared before an episode's last reward, or after it."""
    if clear not in _return_ops.CLEARS:
        raise ValueError(
            f"expected clear as one of {', '.join(_return_ops.CLEARS)}, got {clear!r}"
        )
    return clear == "before"


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
    eps_mode: EpsMode = ...,
    clip: float | None = ...,
    center: bool = ...,
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
    eps_mode: EpsMode = ...,
    clip: float | None = ...,
    center: bool = ...,
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
    eps_mode: EpsMode = "std_floor",
    clip: float | None = None,
    center: bool = True,
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
        eps_mode: where eps stands instead: ``"std_floor"`` is ``max(std, eps)``,
            ``"std_add"`` is ``std + eps``, ``"var_add"`` is ``sqrt(var + eps)`` and
            ``"var_floor"`` is ``sqrt(max(var, eps))``; libraries differ in it.
        clip: the result is within ``[-clip, clip]``; its gradient is 0 outside.
        center: whether ``loc`` is taken away; without it ``x / scale``.
        mask: bool, one element a sample: which samples count for the statistics. All
            samples are normalised.
        out: where to write the result; may be ``x``.

    Returns:
        ``(x - loc) / scale`` in the shape and dtype of ``x`` (the default dtype for
        integers). Differentiable in ``x``, with the statistics as constants.

    Values that are NaN or infinite, or float64 values beyond 1e145, whose squares no sum
    could hold, are left out of the statistics and counted in ``state.nonfinite[1]``. An
    empty batch changes nothing. Under ``torch.vmap`` every element updates statistics of
    its own.

    Raises:
        ValueError: the trailing shape of ``x`` is not that of the state; elements of
            ``torch.vmap`` that have one state.
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
        masks_of(mask, xs),
        number("decay", decay),
        number("weight", weight),
        rule_of(eps, eps_mode, clip, center),
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
    batch = _ops.moments(xs, feature_ndim, masks_of(mask, xs))
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
        number("decay", decay),
        number("weight", weight),
    )


@overload
def all_reduce(
    batch: Moments, *, near: Moments | None = ..., group: Group = ...
) -> Moments: ...


@overload
def all_reduce(
    batch: Sequence[Moments],
    *,
    near: Sequence[Moments] | None = ...,
    group: Group = ...,
) -> list[Moments]: ...


def all_reduce(
    batch: Moments | Sequence[Moments],
    *,
    near: Moments | Sequence[Moments] | None = None,
    group: Group = None,
) -> Moments | list[Moments]:
    """The moments of the batches of all ranks, of which each has one.

    All keys go in one all-reduce of ``torch.distributed``; every rank gets the same bits::

        total = all_reduce(moments(x), near=state)
        merge_(state, total, decay=0.99)
        y = normalize(x, state)

    is :func:`update_` with the joined batch, on every rank.

    Args:
        batch: as :func:`moments` gives it; of no samples where a rank has none.
        near: statistics whose mean is near to the values, the same on all ranks: those
            that the result is for. Without it, and while they have seen nothing, a second
            all-reduce keeps the digits of the variance where the mean is far from zero (on
            a GPU there is none, and the variance has an error of
            ``1e-16 * (mean / std)**2`` of it then).
        group: a process group, a ``DeviceMesh`` of one dimension or ``"world"``; by default
            all ranks.

    Raises:
        RuntimeError: a rank has died, did not come within the group's timeout, or has
            features of another shape (this is left to the device on a GPU: then the total
            is one of no samples).

    Equivalent to::

        moments(torch.cat([x of each rank]))
    """
    batches = _listed("batch", batch, Moments)
    states = [None] * len(batches) if near is None else _listed("near", near, Moments)
    if len(states) != len(batches):
        raise ValueError(
            f"expected as many near as batches, {len(batches)}, got {len(states)}"
        )
    total = reduced(batches, states, group, "torchrl_vecnorm")
    return total[0] if isinstance(batch, Moments) else total


@overload
def normalize(
    x: Tensor,
    state: Moments,
    *,
    eps: float = ...,
    eps_mode: EpsMode = ...,
    clip: float | None = ...,
    center: bool = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def normalize(
    x: Sequence[Tensor],
    state: Sequence[Moments],
    *,
    eps: float = ...,
    eps_mode: EpsMode = ...,
    clip: float | None = ...,
    center: bool = ...,
    out: Sequence[Tensor] | None = ...,
) -> list[Tensor]: ...


def normalize(
    x: Tensor | Sequence[Tensor],
    state: Moments | Sequence[Moments],
    *,
    eps: float = 1e-4,
    eps_mode: EpsMode = "std_floor",
    clip: float | None = None,
    center: bool = True,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Normalises with the statistics as they are.

    ``x`` itself where the state has seen nothing (and eps is not added). Differentiable
    in ``x``. The options are those of :func:`update_`.

    Equivalent to::

        loc, scale = loc_scale(state, eps=eps)
        y = ((x - loc) / scale).to(x.dtype)
    """
    y = _ops.normalize(
        _listed("x", x, Tensor),
        leaves_of(_listed("state", state, Moments)),
        rule_of(eps, eps_mode, clip, center),
        None if out is None else _listed("out", out, Tensor),
    )
    return _like(x, y)


@overload
def denormalize(
    y: Tensor,
    state: Moments,
    *,
    eps: float = ...,
    eps_mode: EpsMode = ...,
    clip: float | None = ...,
    center: bool = ...,
) -> Tensor: ...


@overload
def denormalize(
    y: Sequence[Tensor],
    state: Sequence[Moments],
    *,
    eps: float = ...,
    eps_mode: EpsMode = ...,
    clip: float | None = ...,
    center: bool = ...,
) -> list[Tensor]: ...


def denormalize(
    y: Tensor | Sequence[Tensor],
    state: Moments | Sequence[Moments],
    *,
    eps: float = 1e-4,
    eps_mode: EpsMode = "std_floor",
    clip: float | None = None,
    center: bool = True,
) -> Tensor | list[Tensor]:
    """The inverse of :func:`normalize`. Differentiable in ``y``.

    With a clip, of ``y`` clipped to what :func:`normalize` can have given.

    Equivalent to::

        loc, scale = loc_scale(state, eps=eps)
        x = (y * scale + loc).to(y.dtype)
    """
    x = _ops.denormalize(
        _listed("y", y, Tensor),
        leaves_of(_listed("state", state, Moments)),
        rule_of(eps, eps_mode, clip, center),
    )
    return _like(y, x)


def loc_scale(
    state: Moments,
    *,
    eps: float = 1e-4,
    eps_mode: EpsMode = "std_floor",
    center: bool = True,
) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation that the state stands for.

    Both are ``[*features]`` and float64; 0 and 1 where nothing was seen (and eps is not
    added). ``loc`` is 0 without ``center``.

    Equivalent to::

        loc = state.sum / state.count
        scale = (state.ssq / state.count - loc**2).clamp_min(0).sqrt().clamp_min(eps)
    """
    (one,) = _listed("state", state, Moments)
    rule = rule_of(eps, eps_mode, None, center)
    _ops.check_numbers(rule=rule)
    return oracle.loc_scale(one, rule)


def scale_returns_(
    reward: Tensor,
    done: Tensor,
    returns: Tensor,
    state: Moments,
    *,
    gamma: float = 0.99,
    clear: Clear = "after",
    decay: float = 1.0,
    eps: float = 1e-8,
    eps_mode: EpsMode = "var_add",
    clip: float | None = 10.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Divides rewards by the running deviation of discounted returns.

    The rewards of one step of many environments: their returns go on by that step, the
    state takes these in, and the rewards are divided by its deviation. One key only.

    Args:
        reward: ``[*envs, *features]``, any real dtype, any strides; the features are
            those of the state, ``()`` in most cases.
        done: bool, one element an environment: whose episode ends with this reward.
        returns: like ``reward``, float64 (or float32), contiguous, mutated: the
            discounted return of each environment so far, zeros at first.
        state: the running moments of the returns, mutated.
        gamma: the discount, in [0, 1].
        clear: when an episode's end clears its return. ``"after"`` the statistics have
            taken in the last reward with all that came before it, as Stable-Baselines3
            does; ``done`` is then ``terminated | truncated``. ``"before"`` the last
            reward is added, which then is where the next episode's return begins, as in
            Gymnasium, which gives ``terminated`` as ``done``.
        decay: what the old moments are multiplied by, once a call. 1 never forgets.
        eps: is added to the variance, or stands where ``eps_mode`` says, as in
            :func:`update_`.
        clip: the result is within ``[-clip, clip]``; its gradient is 0 outside.
        mask: bool, one element an environment: whose returns go on, and count. The
            others stay as they are; all rewards are scaled.

    Returns:
        ``reward / scale`` in the shape and dtype of ``reward`` (the default dtype for
        integers). Differentiable in ``reward``, with ``scale`` as a constant.

    A reward that is NaN or infinite, or makes a return that is beyond 1e145, comes out as
    IEEE gives it, is left out of the statistics, counted in ``state.nonfinite[1]``, and
    counts as 0 in what is left of the return.

    Raises:
        ValueError: shapes that do not match; memory that is shared; ``gamma``, ``decay``,
            ``eps`` or ``clip`` out of range. Nothing has changed then.
        TypeError: complex or sparse rewards, returns that are no floating-point numbers.

    Equivalent to::

        returns.mul_(gamma)  # and .mul_(~done) with clear="before"
        returns.add_(reward)
        state.sum.mul_(decay).add_(returns.sum(0))
        state.ssq.mul_(decay).add_(returns.pow(2).sum(0))
        state.count.mul_(decay).add_(returns.shape[0])
        returns.mul_(~done)  # with clear="after"
        var = state.ssq / state.count - (state.sum / state.count).pow(2)
        y = (reward / (var + eps).sqrt()).clamp(-clip, clip).to(reward.dtype)
    """
    if type(state) is not Moments:
        _expect_one("state", state, Moments)
    is_whole = state.nonfinite is not None and state.central is not None
    return scale_returns_with(
        reward,
        done,
        returns,
        state if is_whole else leaves_of([state]),
        mask,
        gamma if type(gamma) is float else number("gamma", gamma),
        clears_before(clear),
        decay if type(decay) is float else number("decay", decay),
        rule_of(eps, eps_mode, clip, False),
    )


def scale_returns_with(
    reward: Tensor,
    done: Tensor | None,
    returns: Tensor,
    state: Sequence[Tensor],
    mask: Tensor | None,
    gamma: float,
    clears_before: bool,
    decay: float,
    rule: RuleArgs,
) -> Tensor:
    """:func:`scale_returns_` with options as the operator takes them."""
    masks = [] if mask is None else masks_of(mask, [reward])
    try:
        if not torch.compiler.is_compiling():
            # As the call below, without lists: they take a tenth of the time.
            y = _return_ops.scale_returns_of_one(
                reward, done, returns, state, masks, gamma, clears_before, decay, rule
            )
            if y is not None:
                return y
        (y,) = _return_ops.scale_returns(
            [reward], [done], [returns], state, masks, gamma, clears_before, decay, rule
        )
    except (AttributeError, TypeError):
        # Asked only now: it takes as long as all else that Python does here.
        _expect_one("reward", reward, Tensor)
        _expect_one("done", done, Tensor)
        _expect_one("returns", returns, Tensor)
        raise
    return y
