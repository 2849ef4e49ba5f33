# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What stands for skrl's preprocessor, as of skrl 2.1.1."""

from __future__ import annotations

import math

import torch
from skrl import config
from skrl.utils.spaces.torch import compute_space_size
from torch import Tensor

from torchrl_vecnorm import _ops
from torchrl_vecnorm.interop._buffers import (
    Statistics,
    check_tensor,
    learn,
    moments_at_one,
)
from torchrl_vecnorm.rule import EPS_MODES, Rule

__all__ = ["RunningStandardScaler"]


class RunningStandardScaler(Statistics):
    """For ``skrl.resources.preprocessors.torch.RunningStandardScaler`` of skrl 2.1.1.

    Args:
        size: of a sample: an int, a list of them or a space.
        epsilon: is added to the standard deviation.
        clip_threshold: outputs are within ``[-clip_threshold, clip_threshold]``.
        device: of the statistics; skrl's default if there is none.

    An agent's configuration takes it as it takes skrl's own:
    ``cfg["observation_preprocessor"] = RunningStandardScaler``.

    Its buffers are ``running_mean`` and ``running_variance`` (``[size]``) and
    ``current_count`` (``[]``), all float64; before any data they stand for one sample of
    mean 0 and variance 1. Checkpoints are those of skrl, in both directions.

    What differs: the variance of a batch is that of its n samples, not of n - 1, so that it
    does not depend on how samples are cut into batches, and a batch of one sample is no
    NaN for ever; NaN and infinite values count as values at the running mean; buffers are
    written in place, and stay float64 under ``.half()``; statistics are constants to
    autograd.
    """

    _required = ("running_mean", "running_variance", "current_count")

    def __init__(
        self,
        size,
        *,
        epsilon: float = 1e-8,
        clip_threshold: float = 5.0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.clip_threshold = clip_threshold
        self.device = config.torch.parse_device(device)
        _ops.check_numbers(rule=self._rule())
        size = compute_space_size(size, occupied_size=True)
        as_state = {"dtype": torch.float64, "device": self.device}
        self.register_buffer("running_mean", torch.zeros(size, **as_state))
        self.register_buffer("running_variance", torch.ones(size, **as_state))
        self.register_buffer("current_count", torch.ones((), **as_state))

    def forward(
        self,
        x: Tensor | None,
        *,
        train: bool = False,
        inverse: bool = False,
        no_grad: bool = True,
    ) -> Tensor | None:
        """Standardises x, or undoes it.

        Args:
            x: ``[*samples, size]``, any real dtype, or None, which comes back.
            train: whether the statistics take x in first.
            inverse: ``x * std + mean``, with x clipped.
            no_grad: whether the result is apart from x in autograd.

        Raises:
            TypeError: not a tensor.
            ValueError: another size.
        """
        if x is None:
            return None
        check_tensor("RunningStandardScaler", "x", x)
        if no_grad and x.requires_grad:
            x = x.detach()
        buffers = self._buffers
        mean, var = buffers["running_mean"], buffers["running_variance"]
        if not train:
            state, rule = moments_at_one(mean, var), self._rule()
            call = _ops.denormalize if inverse else _ops.normalize
            return call([x], state, rule)[0]
        y = learn(x, mean, var, buffers["current_count"], self._rule())
        if inverse:
            y = _ops.denormalize([x], moments_at_one(mean, var), self._rule())[0]
        return y

    def _rule(self) -> Rule:
        clip = self.clip_threshold
        return Rule(
            self.epsilon, _STD_ADD, None if clip is None or clip == math.inf else clip
        )


_STD_ADD = EPS_MODES.index("std_add")
