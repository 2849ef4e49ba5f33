# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The state of one key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rounding(NamedTuple):
    """What rounding leaves of statistics far from zero; as in ``csrc/moments.h``.

    Attributes:
        var: relative to mean², how far the sums may be off the variance that is kept
            beside them.
        scale: relative to the mean, below which a scale is nothing but rounding.
    """

    var: float
    scale: float


class Moments(NamedTuple):
    """The running moments of one key, or the moments of one batch of it.

    A batch's moments and a state have the same form: merging is adding, and what
    travels between devices and processes is this.

    Attributes:
        sum: ``[*features]``, Σ x over the samples, decayed.
        ssq: ``[*features]``, Σ x², decayed.
        count: ``[1]``, the number of samples, decayed; or ``[2]``, with the number of
            samples that were ever seen, which does not decay.
        nonfinite: ``[2, *features]``, float64. ``nonfinite[0]`` is how many of the
            samples in ``count`` are missing from ``sum`` and ``ssq``, because their
            value was NaN, infinite or beyond 1e145, and decays as ``count`` does;
            ``nonfinite[1]`` is how many values were left out so far, and does not
            decay. ``None`` in the layout of ``torchrl.envs.VecNorm``, which has no such
            counter: there a value that cannot be used counts as one at the running mean.
        central: ``[*features]``, the variance: ``ssq / n - (sum / n)²`` with the digits
            that this difference has lost where the mean is far from zero, up to
            ``|mean| / std`` of 1e12. Where the sums contradict it beyond their rounding
            (somebody has updated them alone), they are right. ``None`` in the layout of
            ``torchrl.envs.VecNorm``, where the difference is all there is.

    A state is kept in float64. float32 is accepted and updated in its own precision.

    To keep one in a file, ``torch.save(state, file)`` and ``torch.load(file)``, where this
    package is imported; or ``torch.save(state._asdict(), file)`` and
    ``Moments(**torch.load(file))``, for whoever has to read it without.
    """

    sum: Tensor
    ssq: Tensor
    count: Tensor
    nonfinite: Tensor | None = None
    central: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        features: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        counts_all: bool = False,
    ) -> Moments:
        """The moments of nothing, for values whose features have the given shape.

        ``counts_all`` makes ``count`` a ``[2]``.
        """
        features = tuple(features)
        dtype = dtype or state_dtype(device)
        return cls(
            torch.zeros(features, dtype=dtype, device=device),
            torch.zeros(features, dtype=dtype, device=device),
            torch.zeros(1 + counts_all, dtype=dtype, device=device),
            torch.zeros((2, *features), dtype=dtype, device=device),
            torch.zeros(features, dtype=dtype, device=device),
        )

    def with_extras(self) -> Moments:
        """The same moments in our own layout: what others do without is made for it."""
        nonfinite, central = self.nonfinite, self.central
        if nonfinite is None:
            nonfinite = self.sum.new_zeros((2, *self.sum.shape))
        if central is None:
            central = self.mean_var()[1].to(self.sum.dtype)
        return self._replace(nonfinite=nonfinite, central=central)

    def samples(self) -> Tensor:
        """The number of samples, decayed, as one number."""
        return self.count.flatten()[0]

    def seen(self) -> Tensor:
        """The number of samples that were ever seen; of a batch, that it has."""
        return self.count.flatten()[-1]

    def used(self) -> Tensor:
        """The number of values behind each feature, to divide ``sum`` and ``ssq`` by.

        More values missing than there are samples says that somebody has updated the
        others without knowing of ``nonfinite``: then it is ``count``.
        """
        count = self.samples()
        if self.nonfinite is None:
            return count
        used = count - self.nonfinite[0]
        rounding = 1e-9 * count
        zero = torch.zeros_like(used)
        known = torch.where(used <= rounding, zero, used)
        return torch.where(used < -rounding, count.expand_as(used), known)

    def mean_var(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance of each feature, 0 where nothing was seen.

        In the best that the device has: float64, or float32.
        """
        dtype = state_dtype(self.sum.device)
        n = self.used().to(dtype)
        seen = n > 0
        mean = torch.where(seen, self.sum.to(dtype) / n, 0.0)
        var = self.ssq.to(dtype) / n - mean * mean
        var = torch.where(seen, var.clamp_min(0), 0.0)
        if self.central is not None:
            kept = self.central.to(dtype)
            slack = 1e-6 * (kept + var) + self.rounding().var * mean * mean
            var = torch.where((kept - var).abs() <= slack, kept, var)
        return mean, var

    def rounding(self) -> Rounding:
        """What rounding leaves of statistics that are far from zero."""
        in_double = self.sum.dtype == self.ssq.dtype == torch.float64
        if self.central is not None:
            return Rounding(1e-9, 7e-15) if in_double else Rounding(1e-3, 3e-5)
        return Rounding(0.0, 3e-8) if in_double else Rounding(0.0, 7e-4)

    def to(self, device: torch.device, copy: bool = False) -> Moments:
        """The same moments on another device, in the best dtype that it has.

        float32 in the layout of ``torchrl.envs.VecNorm`` stays that.
        """
        if not copy and device == self.sum.device:
            return self
        best = state_dtype(device)
        is_ours = self.central is not None and torch.device(device) != self.sum.device

        def move(leaf: Tensor | None) -> Tensor | None:
            if leaf is None:
                return None
            dtype = best if is_ours or leaf.dtype == torch.float64 else leaf.dtype
            return leaf.to(device, dtype, copy=copy)

        return Moments(*map(move, self))


def moved(moments: Sequence[Moments], devices: Sequence[torch.device]) -> list[Moments]:
    """Each of the moments on the device beside it: with one copy for all, if it can be."""
    leaves = [leaf for m in moments for leaf in m if leaf is not None]
    if (
        leaves
        and leaves[0].device != devices[0]
        and all(leaf.device == leaves[0].device for leaf in leaves)
        and all(device == devices[0] for device in devices)
        # What `to()` leaves as it is.
        and all(leaf.dtype == torch.float64 for leaf in leaves)
        and state_dtype(devices[0]) == torch.float64
    ):
        return packed(moments, lambda numbers: numbers.to(devices[0]))
    return [m.to(device) for m, device in zip(moments, devices, strict=True)]


def packed(moments: Sequence[Moments], f: Callable[[Tensor], Tensor]) -> list[Moments]:
    """What a function makes of the numbers of all moments, which it gets in one tensor."""
    leaves = [leaf for m in moments for leaf in m if leaf is not None]
    numbers = f(torch.cat([leaf.reshape(-1) for leaf in leaves]))
    pieces = iter(numbers.split([leaf.numel() for leaf in leaves]))
    return [
        Moments(
            *(None if leaf is None else next(pieces).view(leaf.shape) for leaf in m)
        )
        for m in moments
    ]


def state_dtype(device: torch.device | str | None) -> torch.dtype:
    """float64, or float32 on the devices that have nothing better."""
    if device is not None and torch.device(device).type == "mps":
        return torch.float32
    return torch.float64


def largest_square(dtype: torch.dtype) -> float:
    """Of a value that counts: sums of larger ones would not be finite.

    ``usable`` of ``csrc/moments.h`` has that of float64.
    """
    return 1e290 if dtype == torch.float64 else 1e37


# So that `torch.load` takes them with `weights_only=True`, its default.
torch.serialization.add_safe_globals([Moments])
