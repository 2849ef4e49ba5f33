# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The state of one key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """The running moments of one key, or the moments of one batch of it.

    A batch's moments and a state have the same form: merging is adding, and what
    travels between devices and processes is this.

    Attributes:
        sum: ``[*features]``, Σ x over the samples, decayed.
        ssq: ``[*features]``, Σ x², decayed.
        count: ``[1]``, the number of samples, decayed.
        nonfinite: ``[2, *features]``, float64. ``nonfinite[0]`` is how many of the
            samples in ``count`` are missing from ``sum`` and ``ssq``, because their
            value was NaN, infinite or beyond 1e145, and decays as ``count`` does;
            ``nonfinite[1]`` is how many values were left out so far, and does not
            decay. ``None`` in the layout of ``torchrl.envs.VecNorm``, which has no such
            counter: there a value that cannot be used counts as one at the running mean.

    A state is kept in float64. float32 is accepted and updated in its own precision.
    """

    sum: Tensor
    ssq: Tensor
    count: Tensor
    nonfinite: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        features: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Moments:
        """The moments of nothing, for values whose features have the given shape."""
        features = tuple(features)
        dtype = dtype or state_dtype(device)
        return cls(
            torch.zeros(features, dtype=dtype, device=device),
            torch.zeros(features, dtype=dtype, device=device),
            torch.zeros(1, dtype=dtype, device=device),
            torch.zeros((2, *features), dtype=dtype, device=device),
        )

    def used(self) -> Tensor:
        """The number of values behind each feature, to divide ``sum`` and ``ssq`` by.

        More values missing than there are samples says that somebody has updated the
        others without knowing of ``nonfinite``: then it is ``count``.
        """
        count = self.count.reshape(())
        if self.nonfinite is None:
            return count
        used = count - self.nonfinite[0]
        rounding = 1e-9 * count
        zero = torch.zeros_like(used)
        known = torch.where(used <= rounding, zero, used)
        return torch.where(used < -rounding, count.expand_as(used), known)

    def to(self, device: torch.device, copy: bool = False) -> Moments:
        """The same moments on another device."""
        return Moments(*(None if t is None else t.to(device, copy=copy) for t in self))


def state_dtype(device: torch.device | str | None) -> torch.dtype:
    """float64, or float32 on the devices that have nothing better."""
    if device is not None and torch.device(device).type == "mps":
        return torch.float32
    return torch.float64
