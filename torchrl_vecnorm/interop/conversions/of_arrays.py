# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics in the attributes of an object, as numpy, jax or torch arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from torchrl_vecnorm.interop.conversions.buffers import mean_var_count
from torchrl_vecnorm.interop.conversions.carried import (
    Carried,
    count_of,
    of_sums,
    same_shape,
    tensor,
    whole,
    wrong,
)
from torchrl_vecnorm.interop.conversions.places import (
    Format,
    Options,
    Place,
    is_of,
    joined,
)
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.rule import EpsMode


class Attributes(Format):
    """``mean``, ``var`` and ``count`` of an object, which others hold and apply.

    Args:
        library: its name, and that of its package.
        holders: classes of what holds it, and by which attributes; ``ret…`` are returns,
            whose mean is not taken away.
        eps: the default, and the name of the attribute of who applies it.
        clip: the default for observations and for returns, and the names.
        first: the count that it begins with, beside mean 0 and variance 1.
    """

    classes = ("RunningMeanStd",)
    required = names = ("mean", "var", "count")
    eps_mode: EpsMode = "var_add"

    def __init__(
        self,
        library: str,
        holders: Mapping[str, tuple[str, ...]],
        *,
        eps: tuple[float, str],
        clip: tuple[float | None, str, str] = (None, "", ""),
        first: float,
    ) -> None:
        self.library, self.packages = library, (library,)
        self.holders, self.eps, self.clip, self.first = holders, eps, clip, first

    def in_object(self, obj: Any, path: str) -> Iterator[Place]:
        """As in :class:`Format`; in what holds it, too."""
        yield from super().in_object(obj, path)
        for name, attributes in self.holders.items():
            if not is_of(obj, self.packages, (name,)):
                continue
            for attribute in attributes:
                # Not getattr: wrappers that hold no environment look for it for ever.
                held = vars(obj).get(attribute)
                children = held if isinstance(held, Mapping) else {"": held}
                for key, child in children.items():
                    where = joined(path, attribute, str(key))
                    for place in super().in_object(child, where):
                        yield place._replace(holder=obj, leaf=(attribute,))

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        applied = None if place is None else place.holder or place.owner
        returns = place is not None and place.leaf and place.leaf[0].startswith("ret")
        default, *names = self.clip
        eps = getattr_of(applied, self.eps[1], self.eps[0])
        clip = getattr_of(applied, names[bool(returns)], default)
        none = not clip or clip == math.inf
        return {
            "eps": float(eps),
            "eps_mode": self.eps_mode,
            "clip": None if none else float(clip),
            "center": not returns,
        }

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        values = [place.entries[name] for name in self.names]
        moments = mean_var_count(self.library, self.names, *values)
        return Carried(moments, **self.rule(place))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        mean, var = moments.mean_var()
        count = moments.samples().item()
        if count == 0:
            var, count = torch.ones_like(var), self.first
        if isinstance(self.first, int):
            count = int(whole(self.library, "count", count, torch.int64))
        # float64, whatever it has: numpy goes on in that.
        made: dict[str, Any] = {"mean": mean.numpy(), "var": var.numpy()}
        for name, value in made.items() if place is not None else ():
            old = torch.Size(np.shape(place.entries[name]))
            if old:  # tianshou begins with numbers, whatever the shape will be
                same_shape(self.library, name, torch.from_numpy(value), old)
        return {**made, "count": count}


def getattr_of(obj: Any, name: str, default: Any) -> Any:
    """An attribute that is in the object itself."""
    return default if obj is None else vars(obj).get(name, default)


class EvoTorch(Format):
    """``evotorch.neuroevolution.net.RunningNorm``: sums, in the dtype of the data."""

    library = "evotorch"
    packages = ("evotorch",)
    classes = ("RunningNorm",)
    required = ("_sum", "_sum_of_squares", "_count")

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`; bounds that are not each other's opposite are refused."""
        owner = place.owner if place is not None else None
        low, high = (getattr_of(owner, name, None) for name in ("_lb", "_ub"))
        if (low, high) != (None, None) and (
            low is None or high is None or low != -high
        ):
            raise ValueError(f"evotorch: expected clip as (-c, c), got ({low}, {high})")
        eps = float(getattr_of(owner, "_min_variance", 1e-2))
        return {"eps": eps, "eps_mode": "var_floor", "clip": high, "center": True}

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        total, squares, count = (place.entries[name] for name in self.required)
        count = count_of(self.library, "_count", count)
        if total is None and squares is None and place.owner is not None:
            total = squares = torch.zeros(
                tuple(place.owner._shape), dtype=torch.float64
            )
        names = (self.required[0], self.required[1])
        moments = of_sums(self.library, names, total, squares, count)
        return Carried(moments, **self.rule(place))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`: copies, as it writes to what it is given."""
        n = int(whole(self.library, "_count", moments.samples().item(), torch.int64))
        owner = place.owner if place is not None else None
        if owner is not None:
            same_shape(self.library, "_sum", moments.sum, torch.Size(owner._shape))
        if n == 0:
            return dict.fromkeys(self.required[:2]) | {"_count": 0}
        like = {"dtype": getattr_of(owner, "_dtype", torch.float64),
                "device": getattr_of(owner, "_device", "cpu")}  # fmt: skip
        # As the count is a whole number, the sums are made to fit.
        mean, var = moments.mean_var()
        sums = (mean * n, (var + mean * mean) * n)
        made = (value.to(**like, copy=True) for value in sums)
        return dict(zip(self.required, (*made, n), strict=True))


class MeanStd(Format):
    """A mean and a deviation, whose count may have to be given."""

    names = ("mean", "std")

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        mean, std = (tensor(self.library, n, place.entries[n]) for n in self.names)
        if (std < 0).any():
            bad = std[std < 0][0]
            raise ValueError(wrong(self.library, "std", "none below 0", bad))
        count = place.entries.get("count", options.count)
        if count is None:
            raise ValueError(
                f"{self.library}: expected entry 'count', which is not there: pass count="
            )
        names = (*self.names, "count")
        moments = mean_var_count(self.library, names, mean, std * std, count)
        return Carried(moments, **self.rule(place))


class LeRobot(MeanStd):
    """Statistics of a dataset's features in lerobot: ``mean``, ``std``, ``count``."""

    library = "lerobot"
    packages = ("lerobot",)
    classes = ("NormalizerProcessorStep", "UnnormalizerProcessorStep")
    required = ()
    others = ("var", "summed_variance", "m2", "running_stats", "eps")

    def recognises(self, entries: Mapping[str, Any]) -> bool:
        """Not what other libraries have under these names among others."""
        return all(name in entries for name in self.names) and not any(
            name in entries for name in self.others
        )

    def in_object(self, obj: Any, path: str) -> Iterator[Place]:
        """As in :class:`Format`: one for each feature."""
        if is_of(obj, self.packages, self.classes):
            for feature in dict.fromkeys((*obj.features, *obj._tensor_stats)):
                entries = obj._tensor_stats.get(feature, {})
                where = joined(path, feature)
                yield Place(where, self, entries, obj, leaf=(feature,))

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        owner = place.owner if place is not None else None
        if owner is not None:
            (feature,) = place.leaf
            modes = {str(_value(k)): _value(m) for k, m in owner.norm_map.items()}
            known = owner.features.get(feature)
            mode = modes.get(str(_value(known.type))) if known is not None else None
            if mode not in (None, "MEAN_STD"):
                expected = "normalisation by mean and deviation"
                raise ValueError(wrong(self.library, feature, expected, mode))
        eps = float(getattr(owner, "eps", 1e-8))
        return {"eps": eps, "eps_mode": "std_add", "clip": None, "center": True}

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        absent = [name for name in self.names if name not in place.entries]
        if absent:
            raise ValueError(
                f"{self.library}: expected {absent} of {place.path!r}, got none"
            )
        return super().read(place, options)

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        mean, var = moments.mean_var()
        n = whole(self.library, "count", moments.samples().item(), torch.int64)
        if n == 0:
            var = torch.ones_like(var)
        made = {"mean": mean, "std": var.sqrt(), "count": n.reshape(1)}
        shapes = {} if place is None else place.entries
        for name in self.names:
            if name in shapes:
                shape = torch.Size(np.shape(shapes[name]))
                same_shape(self.library, name, made[name], shape)
        return {name: value.float() for name, value in made.items()}

    def put(self, place: Place, entries: Mapping[str, Any]) -> Any:
        """Into both of the places where it keeps them."""
        step, (feature,) = place.owner, place.leaf
        like = {"device": step.device, "dtype": step.dtype}
        old = step._tensor_stats.setdefault(feature, {})
        old.update({n: v.to(**like) for n, v in entries.items()})
        arrays = {n: v.numpy() for n, v in entries.items()}
        step.stats.setdefault(feature, {}).update(arrays)
        return step


class D3rlpy(MeanStd):
    """d3rlpy's ``StandardObservationScaler``: fitted once, and of how many is not kept."""

    library = "d3rlpy"
    packages = ("d3rlpy",)
    classes = ("StandardObservationScaler", "StandardRewardScaler")
    required = (*MeanStd.names, "eps")

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        given = 1e-3 if place is None else place.entries["eps"]
        eps = count_of(self.library, "eps", given).item()
        return {"eps": eps, "eps_mode": "std_add", "clip": None, "center": True}

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`; eps stays as it is."""
        mean, var = moments.mean_var()
        if moments.samples() == 0:
            raise ValueError(
                f"{self.library}: expected moments of samples, got of none"
            )
        made = {"mean": mean, "std": var.sqrt()}
        for name, value in made.items() if place is not None else ():
            old = place.entries[name]
            if old is not None:  # as it is before it was fitted
                same_shape(self.library, name, value, torch.Size(np.shape(old)))
        eps = self.rule(place)["eps"]
        return {**{n: v.numpy().copy() for n, v in made.items()}, "eps": eps}

    def put(self, place: Place, entries: Mapping[str, Any]) -> Any:
        """With the tensors gone that it keeps of them."""
        place.owner._torch_mean = place.owner._torch_std = None
        return super().put(place, entries)


def _value(mode: Any) -> Any:
    return getattr(mode, "value", mode)
