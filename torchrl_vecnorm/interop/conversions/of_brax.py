# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""brax's running statistics, in either mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_vecnorm.interop.conversions.buffers import mean_var_count
from torchrl_vecnorm.interop.conversions.carried import (
    Carried,
    count_of,
    same_shape,
    tensor,
    whole,
    wrong,
)
from torchrl_vecnorm.interop.conversions.places import (
    Format,
    Options,
    Place,
    at_leaf,
    is_of,
    joined,
    leaves,
    replaced,
)
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.rule import EpsMode


class Brax(Format):
    """``brax.training.acme.running_statistics``: a nest of arrays, in either mode.

    The mode is in no checkpoint: that mode is read in which mean, variance and count give
    the deviation that is kept beside them.
    """

    library = "brax"
    packages = ("brax",)
    classes = ("RunningStatisticsState",)
    required = ("mean", "std", "summed_variance", "count")
    bounds = (1e-6, 1e6)

    def recognises(self, entries: Mapping[str, Any]) -> bool:
        """As in :class:`Format`."""
        return all(name in entries for name in self.required)

    def in_mapping(self, mapping: Mapping, path: str) -> Iterator[Place]:
        """As in :class:`Format`: one for each array."""
        if self.recognises(mapping):
            for place in self._places(mapping, path):
                heads = {name: (name,) for name in ("count",)}
                nests = {n: (n, *place.leaf) for n in self.required[:3]}
                yield place._replace(names={**nests, **heads})

    def in_object(self, obj: Any, path: str) -> Iterator[Place]:
        """As in :class:`Format`: one for each array."""
        if is_of(obj, self.packages, self.classes):
            names = (*self.required, "std_eps", "mode")
            state = {name: getattr(obj, name) for name in names if hasattr(obj, name)}
            for place in self._places(state, path):
                yield place._replace(owner=obj)

    def _places(self, state: Mapping, path: str) -> Iterator[Place]:
        for leaf in leaves(state["mean"]):
            nests = {name: at_leaf(state[name], leaf) for name in self.required[:3]}
            entries = {**state, **nests}
            yield Place(joined(path, *map(str, leaf)), self, entries, leaf=leaf)

    def rule(self, place: Place | None) -> dict[str, Any]:
        """``sqrt(var + std_eps)``, or a floor without that; the upper bound is not carried."""
        eps = self._eps(place.entries) if place is not None else 0.0
        least = self.bounds[0]
        mode: EpsMode = "var_add" if eps >= least**2 else "std_floor"
        eps = eps if mode == "var_add" else least
        return {"eps": eps, "eps_mode": mode, "clip": None, "center": True}

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        names = ("mean", "summed_variance", "std")
        mean, squares, std = (tensor(self.library, n, place.entries[n]) for n in names)
        same_shape(self.library, names[1], squares, mean.shape)
        same_shape(self.library, names[2], std, mean.shape)
        count = self._count(place.entries["count"])
        if count == 0:
            zeros = torch.zeros_like(mean)
            moments = mean_var_count(self.library, names, zeros, zeros, count)
            return Carried(moments, **self.rule(place))
        given = place.entries.get("mode")
        modes = [int(given), 1 - int(given)] if given is not None else [0, 1]
        good = [m for m in modes if self._fits(place, squares, std, count, m)]
        if not good:
            n = int(count)
            expected = f"what 'summed_variance' of {n} samples makes in either mode"
            raise ValueError(wrong(self.library, "std", expected, std))
        var = squares.clamp_min(0) / (1 if good[0] else count)
        moments = mean_var_count(self.library, names, mean, var, count)
        return Carried(moments, **self.rule(place))

    def doubts(self, place: Place, carried: Carried) -> list[str]:
        """As in :class:`Format`."""
        doubts = []
        std = tensor(self.library, "std", place.entries["std"])
        squares = tensor(self.library, "", place.entries["summed_variance"])
        if (squares < 0).any():
            doubts.append(
                f"{self.library}: a 'summed_variance' is {squares.min().item():.3g}, by the "
                "rounding of float32 far from zero; it was read as 0, as it is used"
            )
        if (std >= self.bounds[1]).any() and carried.moments.count > 0:
            doubts.append(
                f"{self.library}: a deviation that it bounds at 1e6 is not here"
            )
        if carried.moments.count > 1 and place.entries.get("mode") is not None:
            mode = int(place.entries["mode"])
            if not self._fits(place, squares, std, carried.moments.count, mode):
                doubts.append(
                    f"{self.library}: the state says mode {mode}, and its 'std' is that of "
                    "the other mode, which was read: a checkpoint does not keep the mode"
                )
        return doubts

    def _fits(
        self, place: Place, squares: Tensor, std: Tensor, count: Tensor, mode: int
    ) -> bool:
        # Of a constant, rounding may leave less than 0.
        var = squares.clamp_min(0) / (1 if mode else count)
        made = self._std(var, self._eps(place.entries))
        return bool(torch.allclose(made, std, rtol=1e-4, atol=0))

    def _eps(self, entries: Mapping[str, Any]) -> float:
        return count_of(self.library, "std_eps", entries.get("std_eps", 0.0)).item()

    def _std(self, var: Tensor, eps: float) -> Tensor:
        return (var + eps).sqrt().clamp(*self.bounds)

    def _count(self, value: Any) -> Tensor:
        parts = value if isinstance(value, Mapping) else {
            n: getattr(value, n) for n in ("hi", "lo") if hasattr(value, n)}  # fmt: skip
        if "hi" in parts and "lo" in parts:
            high, low = (count_of(self.library, f"count.{n}", parts[n]) for n in parts)
            return high * 2**32 + low
        return count_of(self.library, "count", value)

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        mean, var = moments.mean_var()
        n = int(whole(self.library, "count", moments.samples().item(), torch.int64))
        entries = place.entries if place is not None else {}
        mode = int(entries.get("mode", 0)) if n else 0
        std = self._std(var, self._eps(entries))
        values = {
            "mean": mean,
            "summed_variance": var if mode else var * n,
            "std": std if n else torch.ones_like(std),
        }
        made: dict[str, Any] = {}
        for name, value in values.items():
            old = entries.get(name)
            made[name] = value.numpy().astype(np.float32)
            if old is not None:
                shape = torch.Size(np.shape(old))
                same_shape(self.library, name, value, shape)
                # An array of jax, made without importing it.
                at = getattr(old, "at", None)
                new = made[name] = value.numpy().astype(np.asarray(old).dtype)
                made[name] = new if at is None else at[...].set(new)
        made["count"] = {"hi": n >> 32, "lo": n & 0xFFFFFFFF}
        old = entries.get("count")
        if old is not None and not isinstance(old, Mapping):
            made["count"] = type(old)(**made["count"]) if hasattr(old, "hi") else n
        return made

    def put(self, place: Place, entries: Mapping[str, Any]) -> Any:
        """A new state, as those of jax do not change."""
        owner = place.owner
        nests = {
            name: replaced(getattr(owner, name), place.leaf, entries[name])
            for name in self.required[:3]
        }
        return owner.replace(count=entries["count"], **nests)
