# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RLlib's running statistics, in a filter of either API stack."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

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
)
from torchrl_vecnorm.moments import Moments


class RLlib(Format):
    """RLlib's ``RunningStat``, in a ``MeanStdFilter`` of either API stack."""

    library = "rllib"
    packages = ("ray",)
    classes = ("RunningStat",)
    required = ("num_pushes", "mean_array", "sum_sq_diff_array")
    deltas = ("num_pushes_delta", "mean_delta_array", "sum_sq_diff_delta_array")

    def in_mapping(self, mapping: Mapping, path: str) -> Iterator[Place]:
        """What ``get_state()`` of a connector has of an agent."""
        stats = mapping.get("running_stats")
        if not isinstance(stats, (list, tuple)):
            return
        for i, stat in enumerate(stats):
            if isinstance(stat, Mapping) and super().recognises(stat):
                where = joined(path, "" if len(stats) == 1 else str(i))
                names = {name: ("running_stats", i, name) for name in stat}
                yield Place(where, self, stat, holder=mapping, names=names)

    def in_object(self, obj: Any, path: str) -> Iterator[Place]:
        """As in :class:`Format`; in a filter and in a connector, too."""
        yield from super().in_object(obj, path)
        if is_of(obj, self.packages, ("MeanStdFilter",)):
            filters = vars(obj).get("_filters") or {}
            for agent, child in filters.items():
                yield from self.in_object(child, joined(path, str(agent)))
            nest = vars(obj).get("running_stats")
            for leaf in leaves(nest) if nest is not None else ():
                where = joined(path, *map(str, leaf))
                for place in super().in_object(at_leaf(nest, leaf), where):
                    yield place._replace(holder=obj)

    def entries_of(self, obj: Any) -> Mapping[str, Any]:
        """As in :class:`Format`."""
        names = (*self.required, *self.deltas)
        return {name: getattr(obj, name) for name in names if hasattr(obj, name)}

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        holder = place.holder if place is not None else None
        found = holder if isinstance(holder, Mapping) else {
            "clip_by_value": getattr(holder, "clip", 10.0),
            "de_mean_to_zero": getattr(holder, "demean", True),
            "de_std_to_one": getattr(holder, "destd", True),
        }  # fmt: skip
        if not found.get("de_std_to_one", True):
            raise ValueError(
                f"{self.library}: expected a filter that divides, got none"
            )
        clip = found.get("clip_by_value", 10.0)
        return {
            "eps": 1e-6,
            "eps_mode": "std_add",
            "clip": float(clip) if clip else None,
            "center": bool(found.get("de_mean_to_zero", True)),
        }

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        n, mean, squares = (self._array(place, name) for name in self.required)
        count = count_of(self.library, "num_pushes", n)
        names = ("mean_array", "sum_sq_diff_array", "num_pushes")
        squares = tensor(self.library, names[1], squares)
        # Differences of what is nearly the same may be below 0.
        var = squares / count.clamp_min(1)
        moments = mean_var_count(self.library, names, mean, var, count)
        return Carried(moments, **self.rule(place))

    def doubts(self, place: Place, carried: Carried) -> list[str]:
        """As in :class:`Format`."""
        pushed, own = (
            int(place.entries.get(n, 0)) for n in ("num_pushes", *self.deltas[:1])
        )
        doubts = []
        if own < pushed:
            doubts.append(
                f"{self.library}: {pushed - own} of {pushed} samples came by a merge or from "
                "a file: after a second merge of env runners its mean and its variance are "
                "wrong, which nothing there tells from the first"
            )
        return doubts

    def _array(self, place: Place, name: str) -> Any:
        value = place.entries[name]
        if not isinstance(value, str):
            return value
        try:
            file = io.BytesIO(zlib.decompress(base64.b64decode(value, validate=True)))
            return np.load(file, allow_pickle=False)
        except Exception as err:  # of three libraries
            expected = "an array in base64"
            raise ValueError(wrong(self.library, name, expected, err)) from None

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`: at least two samples, as one has no variance there."""
        mean, var = moments.mean_var()
        n = int(
            whole(self.library, "num_pushes", moments.samples().item(), torch.int64)
        )
        n = max(n, 2) if n else 0
        if place is not None:
            shape = torch.Size(np.shape(self._array(place, "mean_array")))
            same_shape(self.library, "mean_array", mean, shape)
        zeros = np.zeros(tuple(mean.shape))
        made = {
            "num_pushes": n,
            "num_pushes_delta": 0,
            "mean_array": mean.numpy().copy(),
            "mean_delta_array": zeros,
            "sum_sq_diff_array": (var * n).numpy(),
            "sum_sq_diff_delta_array": zeros.copy(),
        }
        if place is not None and place.owner is not None:
            return made
        return {name: _packed(value) for name, value in made.items()}


def _packed(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    file = io.BytesIO()
    np.save(file, value)
    return base64.b64encode(zlib.compress(file.getvalue())).decode("ascii")
