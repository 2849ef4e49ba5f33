# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics in the buffers of a module: a mean, a variance and a count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchrl_vecnorm.interop.conversions.carried import (
    Carried,
    count_of,
    of_mean_var,
    same_shape,
    tensor,
    whole,
    wrong,
)
from torchrl_vecnorm.interop.conversions.places import Format, Options, Place
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.rule import EpsMode


class InModule(Format):
    """What is in a module's buffers is what is in its state dict."""

    def entries_of(self, obj: Any) -> Mapping[str, Any]:
        """The buffers themselves."""
        return dict(obj.named_buffers(recurse=False))

    def put(self, place: Place, entries: Mapping[str, Any]) -> Any:
        """In place."""
        for name, value in entries.items():
            old = place.entries[name]
            # Rollouts are in inference mode, and so is what was made there.
            with torch.no_grad(), torch.inference_mode(old.is_inference()):
                old.copy_(value)
        return place.owner


class Buffers(InModule):
    """A mean, a variance and a count.

    Args:
        library: as in :class:`Format`, as are packages and classes.
        packages: of the library; what stands for it here is known, too.
        classes: their names.
        names: of the mean, the variance and the count.
        eps: the default, and the name of the attribute.
        eps_mode: where it stands.
        clip: the default, and the name of the attribute.
        dtypes: of the mean, and of the count.
        first: the count that the library begins with, beside mean 0 and variance 1.
        count_shape: of the count.
        axis: whether the mean and the variance have an axis of 1 in front.
    """

    def __init__(
        self,
        library: str,
        packages: tuple[str, ...],
        classes: tuple[str, ...],
        names: tuple[str, str, str],
        *,
        eps: tuple[float, str],
        eps_mode: EpsMode,
        clip: tuple[float | None, str] = (None, ""),
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64),
        first: float = 0.0,
        count_shape: tuple[int, ...] = (),
        axis: bool = False,
    ) -> None:
        self.library = library
        self.packages = (*packages, f"torchrl_vecnorm.interop.{library}")
        self.classes = classes
        self.required = self.names = names
        self.eps, self.eps_mode, self.clip = eps, eps_mode, clip
        self.dtypes, self.first = dtypes, first
        self.count_shape, self.axis = count_shape, axis

    def recognises(self, entries: Mapping[str, Any]) -> bool:
        """Whether the names are there; of those with the same names, by the count."""
        if not super().recognises(entries):
            return False
        dtype = getattr(entries[self.names[2]], "dtype", None)
        if not isinstance(dtype, torch.dtype):
            return True
        # imitation's count is int32, and no other's is.
        return (dtype == torch.int32) == (self.dtypes[1] == torch.int32)

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        owner = place.owner if place is not None else None
        eps, clip = (getattr(owner, n, v) for v, n in (self.eps, self.clip))
        scales_only = bool(getattr(owner, "norm_only", False))
        no_clip = clip is None or scales_only or clip == math.inf
        return {
            "eps": float(eps),
            "eps_mode": self.eps_mode,
            "clip": None if no_clip else float(clip),
            "center": not scales_only,
        }

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        values = [place.entries[name] for name in self.names]
        moments = mean_var_count(self.library, self.names, *values, self._axis(place))
        return Carried(moments, **self.rule(place))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        mean, var = moments.mean_var()
        count = moments.samples().item()
        if count == 0:
            var, count = torch.ones_like(var), self.first
        axis = self._axis(place)
        if axis is not None:
            mean, var = mean.unsqueeze(axis), var.unsqueeze(axis)
        name = self.names[2]
        old = place.entries[name] if place is not None else None
        dtype, shape = (self.dtypes[1], self.count_shape) if old is None else (
            old.dtype, old.shape)  # fmt: skip
        last = whole(self.library, name, count, dtype).reshape(shape)
        return alike(self, (mean, var, last), place, self.dtypes[0])

    def _axis(self, place: Place | None) -> int | None:
        owner = place.owner if place is not None else None
        return getattr(owner, "batch_axis", 0) if self.axis else None


def mean_var_count(
    owner: str,
    names: tuple[str, ...],
    mean: Any,
    var: Any,
    count: Any,
    axis: int | None = None,
) -> Moments:
    """The moments of a mean, a variance (of n) and a count of any library.

    Args:
        owner: the library, for messages.
        names: of the three, for messages.
        mean: ``[*features]``.
        var: ``[*features]``.
        count: one number.
        axis: where they have a dimension more, of 1.

    Raises:
        ValueError: no data can have given them.
    """
    mean, var = tensor(owner, names[0], mean), tensor(owner, names[1], var)
    count = count_of(owner, names[2], count)
    same_shape(owner, names[1], var, mean.shape)
    if (var < 0).any():
        expected = "variances that are not negative"
        raise ValueError(wrong(owner, names[1], expected, var[var < 0][0]))
    if axis is not None:
        if mean.ndim <= axis or mean.shape[axis] != 1:
            got = f"shape {tuple(mean.shape)}"
            expected = f"1 element along dimension {axis}"
            raise ValueError(wrong(owner, names[0], expected, got))
        mean, var = mean.squeeze(axis), var.squeeze(axis)
    return of_mean_var(mean, var, count)


def alike(
    of: Any, values: tuple[Tensor, ...], place: Place | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Entries for these values, in the dtypes of those that are there.

    Raises:
        ValueError: those that are there have other shapes.
    """
    made = {}
    for name, value in zip(of.names, values, strict=True):
        old = place.entries.get(name) if place is not None else None
        if isinstance(old, Tensor):
            same_shape(of.library, name, value, old.shape)
            value = value.to(old.dtype)
        elif name != of.names[-1]:
            value = value.to(dtype)
        made[name] = value
    return made


class UnbiasedBatches(Buffers):
    """Of libraries whose batches have the variance of n - 1."""

    def doubts(self, place: Place, carried: Carried) -> list[str]:
        """As in :class:`Format`."""
        return [
            f"{self.library} gives each batch the variance of n - 1, and adds them up as "
            "those of n: its outputs are carried, but its variance is above that of the "
            "data by one part in the size of a batch, which its state does not say"
        ]


class RslRl(Buffers):
    """A deviation beside the variance: what rsl_rl divides by."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.required = (*self.names, "_std")

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        carried = super().read(place, options)
        root = tensor(self.library, "_var", place.entries["_var"]).sqrt()
        std = tensor(self.library, "_std", place.entries["_std"])
        same_shape(self.library, "_std", std, root.shape)
        far = ~torch.isclose(std, root, rtol=1e-5, atol=1e-12)
        if far.any():
            expected = (
                f"the root of '_var', {root[far][0].item():.6g}, as it divides by it"
            )
            raise ValueError(wrong(self.library, "_std", expected, std[far][0]))
        return carried

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        made = super().make(moments, place, options)
        count = made.pop("count")
        return {**made, "_std": made["_var"].sqrt(), "count": count}


class Pfrl(Buffers):
    """rsl_rl's names without the deviation; an inverse of it that is kept in the object."""

    def recognises(self, entries: Mapping[str, Any]) -> bool:
        """Not what is rsl_rl's."""
        return super().recognises(entries) and "_std" not in entries

    def put(self, place: Place, entries: Mapping[str, Any]) -> Any:
        """As in :class:`Format`."""
        place.owner._cached_std_inverse = None
        return super().put(place, entries)


class RunningNormOfImitation(Buffers):
    """All samples weigh the same."""

    def recognises(self, entries: Mapping[str, Any]) -> bool:
        """Not the other class's."""
        return super().recognises(entries) and "inv_learning_rate" not in entries


class EMANorm(Buffers):
    """Averages over batches, which forget: their weight is ``inv_learning_rate``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.required = (*self.names, "inv_learning_rate", "num_batches")

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        carried = super().read(place, options)
        weight, batches = (
            count_of(self.library, name, place.entries[name])
            for name in self.required[3:]
        )
        seen = carried.moments.count
        if not (weight > 0) == (seen > 0) == (batches > 0):
            expected = f"one above 0 where {self.names[2]!r} is"
            raise ValueError(wrong(self.library, self.required[3], expected, weight))
        mean, var = carried.moments.mean_var()
        return carried._replace(moments=of_mean_var(mean, var, weight, seen))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        decay = decay_of(self, place, options)
        made = super().make(moments, place, options)
        name, rows = self.names[2], moments.seen().item()
        made[name] = whole(self.library, name, rows, torch.int32)
        weight, batches = batches_of(moments.samples().item(), decay)
        made["inv_learning_rate"] = torch.tensor(weight, dtype=torch.float32)
        made["num_batches"] = whole(self.library, "num_batches", batches, torch.int32)
        return made


def decay_of(of: Format, place: Place | None, options: Options) -> float:
    """The decay, which an object has and a state dict has not.

    Raises:
        ValueError: nobody says, or it is none.
    """
    decay = getattr(place.owner, "decay", None) if place is not None else None
    decay = options.decay if decay is None else decay
    if decay is None:
        raise ValueError(
            f"{of.library}: a state dict does not have it: pass decay= too"
        )
    decay = float(decay)
    if not 0 < decay <= 1:
        raise ValueError(f"{of.library}: expected decay in (0, 1], got {decay}")
    return decay


def batches_of(weight: float, decay: float) -> tuple[float, int]:
    """The weight that averages can have, and after how many updates they have it.

    ``1 + decay + decay² + …`` is ``(1 - decay^n) / (1 - decay)``, which has an end.
    """
    if decay < 1:
        weight = min(weight, 1 / (1 - decay))
        left = max(1 - weight * (1 - decay), 2.0**-54)  # nothing beside 1
        n = math.log(left) / math.log(decay)
    else:
        n = weight
    return weight, max(round(n), 1) if weight > 0 else 0
