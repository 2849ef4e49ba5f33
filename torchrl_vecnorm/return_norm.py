# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Rewards over the deviation of discounted returns as a module, for whoever trains on
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_vecnorm import _ops, _return_ops, functional, oracle
from torchrl_vecnorm.checks import check_moments
from torchrl_vecnorm.moments import Moments, state_dtype
from torchrl_vecnorm.rule import EPS_MODES, EpsMode
from torchrl_vecnorm.running_norm import _Key, keeping_dtypes

__all__ = ["ReturnNorm"]


class ReturnNorm(nn.Module):
    """Divides rewards by the running deviation of discounted returns.

    Args:
        envs: the shape of the environments: an int, or a sequence of them. Rewards are
            ``[*envs, *shape]``.
        shape: of the features of a reward, each with a deviation of its own: ``()`` for
            rewards ``[*envs]``, ``1`` for rewards ``[*envs, 1]``.
        gamma: the discount, in [0, 1].
        clear: when an episode's end clears the return: ``"after"`` its last reward has
            been taken in with all that came before it (Stable-Baselines3), or
            ``"before"`` it is added, to be where the next episode begins (Gymnasium).
        decay: what the old moments are multiplied by, once a step. 1 never forgets.
        eps: bounds the scale away from 0; where it stands, ``eps_mode`` says. By default
            ``sqrt(var + eps)``.
        eps_mode: as in :class:`~torchrl_vecnorm.RunningNorm`.
        clip: outputs are within ``[-clip, clip]``; their gradient is 0 outside.
        dtype: of the statistics and returns: float64, or float32.
        device: of both.

    The statistics are buffers, ``stats.…`` in a ``state_dict()``, and so are the returns
    of the environments so far, ``returns``: float64 whatever the module's own dtype
    becomes. Other environments than those of a checkpoint take its statistics with zeros in
    the place of its ``returns``. Works in ``torch.compile`` without a graph break, and in CUDA
    graphs.

        >>> norm = ReturnNorm(4096, gamma=0.99)
        >>> y = norm(reward, terminated | truncated)  # a step of each environment
        >>> z = norm.eval()(reward)  # scales only

    Equivalent to, in training mode::

        self.returns = gamma * self.returns + reward
        self.update(self.returns)
        self.returns[done] = 0
        y = (reward / (self.var + eps).sqrt()).clamp(-clip, clip)
    """

    is_of_a_rank = True  # what keep_from_ddp asks for

    returns: Tensor
    stats: _Key

    def __init__(
        self,
        envs: int | Sequence[int],
        *,
        shape: int | Sequence[int] = (),
        gamma: float = 0.99,
        clear: functional.Clear = "after",
        decay: float = 1.0,
        eps: float = 1e-8,
        eps_mode: EpsMode = "var_add",
        clip: float | None = 10.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gamma = functional.number("gamma", gamma)
        self.clears_before = functional.clears_before(clear)
        self.decay = functional.number("decay", decay)
        self.rule = functional.rule_of(eps, eps_mode, clip, center=False)
        _return_ops.check_gamma(self.gamma)
        _ops.check_numbers(keep=self.decay, rule=self.rule)
        features = (shape,) if isinstance(shape, int) else tuple(shape)
        envs = (envs,) if isinstance(envs, int) else tuple(envs)
        dtype = dtype or state_dtype(device)
        self.stats = _Key(features, dtype, device)
        returns = torch.zeros(*envs, *features, dtype=dtype, device=device)
        self.register_buffer("returns", returns)

    # ------------------------------------------------------------------------ calls

    def forward(
        self, reward: Tensor, done: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Scales rewards; in training mode the returns go on by a step first.

        In eval mode rewards are scaled and nothing changes, the returns neither: rewards
        may be of other environments then.

        Args:
            reward: ``[*envs, *shape]``, any real dtype; in eval mode ``[*any, *shape]``.
            done: bool, one element an environment: whose episode ends with this reward,
                ``terminated | truncated`` with ``clear="after"``. Not used in eval mode.
            mask: bool, one element an environment: whose returns go on, and count.

        Returns:
            As reward, in its dtype (the default dtype for integers). Differentiable in
            reward, with the statistics as constants.

        Raises:
            TypeError: no tensor, a complex or sparse one; no ``done`` in training mode.
            ValueError: other shapes than those of the environments.
        """
        if not self.training:
            return self.normalize(reward)
        return functional.scale_returns_with(
            reward,
            done,
            self._buffers["returns"],  # as self.returns, in a tenth of the time
            self._leaves(),
            mask,
            self.gamma,
            self.clears_before,
            self.decay,
            self.rule,
        )

    def normalize(self, reward: Tensor) -> Tensor:
        """Scales with the statistics as they are, in any mode."""
        (y,) = _ops.normalize([reward], self._leaves(), self.rule)
        return y

    def inverse(self, y: Tensor) -> Tensor:
        """``y * scale``: what was scaled, or, with a clip, what was left of it."""
        (reward,) = _ops.denormalize([y], self._leaves(), self.rule)
        return reward

    @torch.no_grad()
    def reset(self, which: Tensor | None = None) -> None:
        """Returns begin anew, of all environments or of those in ``which``.

        An episode that is given up before its end, as by a reset of the environments, is
        nothing that :meth:`forward` knows of. The statistics stay.

        Args:
            which: bool, one element an environment.
        """
        if which is None:
            self.returns.zero_()
            return
        envs = self.returns.shape[: self.returns.ndim - self.stats.sum.ndim]
        if which.dtype is not torch.bool or which.numel() != envs.numel():
            raise ValueError(
                f"expected which as bool of shape {tuple(envs)}, got {which.dtype} "
                f"{tuple(which.shape)}"
            )
        which = which.reshape(*envs, *(1 for _ in self.stats.sum.shape))
        self.returns.masked_fill_(which, 0.0)

    # ------------------------------------------------------------------- statistics

    @property
    def scale(self) -> Tensor:
        """What rewards are divided by, ``[*shape]``; of a deviation of 1 before data."""
        return oracle.loc_scale(self.stats.moments(), self.rule)[1]

    @property
    def count(self) -> Tensor:
        """How many returns were taken in so far, without decay; float64, ``[]``."""
        return self.stats.moments().seen().clone()

    # ------------------------------------------------------------------- state_dicts

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        names = [f"{prefix}stats.{name}" for name in Moments._fields]
        returns_name = f"{prefix}returns"
        absent = [name for name in (*names, returns_name) if name not in state_dict]
        if strict:
            mine = (name for name in state_dict if name.startswith(prefix))
            unexpected += sorted(set(mine).difference((*names, returns_name)))
        missing += absent
        if absent:
            return
        try:
            loaded = check_moments(
                names,
                Moments(*map(state_dict.__getitem__, names)),
                self.stats.sum.shape,
                counts=2,
                owner="ReturnNorm",
            )
            returns = state_dict[returns_name]
            check_returns(returns_name, returns, self.returns.shape)
        except ValueError as err:
            errors.append(str(err))
            return
        buffers = dict(zip(self.stats._buffers, loaded, strict=True))
        with torch.no_grad():
            for module, new in ((self.stats, buffers), (self, {"returns": returns})):
                for name, value in new.items():
                    old = module._buffers[name]
                    if old.is_meta:
                        module._buffers[name] = value.to(old.dtype, copy=True)
                    else:
                        old.copy_(value)

    def _leaves(self) -> list[Tensor]:
        return list(self._modules["stats"]._buffers.values())

    def _apply(self, fn, recurse=True):
        return super()._apply(keeping_dtypes(fn), recurse)

    def extra_repr(self) -> str:
        """The options."""
        eps, mode, clip, _ = self.rule
        return (
            f"envs={tuple(self.returns.shape)}, gamma={self.gamma}, "
            f"clear={_return_ops.CLEARS[self.clears_before]!r}, decay={self.decay}, "
            f"eps={eps}, eps_mode={EPS_MODES[mode]!r}, clip={clip}"
        )


def check_returns(
    name: str, returns: Any, shape: Sequence[int] | None, owner: str = "ReturnNorm"
) -> Tensor:
    """Refuses returns that no rewards can have given; of any shape where it is None."""
    expected, got = "a dense floating-point tensor", type(returns).__name__
    good = isinstance(returns, Tensor)
    if good:
        good = returns.is_floating_point() and returns.layout is torch.strided
        got = f"{returns.dtype} in layout {returns.layout}"
    if good and shape is not None:
        good, expected = returns.shape == torch.Size(shape), f"shape {tuple(shape)}"
        got = str(tuple(returns.shape))
    if good:
        good, expected = bool(returns.isfinite().all()), "finite returns"
        got = "others"
    if not good:
        raise ValueError(f"{owner}: entry {name!r}: expected {expected}, got {got}")
    return returns
