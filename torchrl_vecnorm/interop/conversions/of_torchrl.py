# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""torchrl's classes: the two transforms, and two normalisers of values. And our own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchrl_vecnorm.checks import check_moments
from torchrl_vecnorm.interop.conversions.buffers import (
    InModule,
    alike,
    batches_of,
    decay_of,
)
from torchrl_vecnorm.interop.conversions.carried import (
    Carried,
    count_of,
    of_mean_var,
    of_sums,
    same_shape,
    tensor,
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
from torchrl_vecnorm.rule import EPS_MODES

_PACKAGES = ("torchrl", "torchrl_vecnorm")
_FLOORED = {"eps": 1e-5, "eps_mode": "var_floor", "clip": None, "center": True}


def is_ours(place: Place | None) -> bool:
    """Whether an object is of this package."""
    owner = place.owner if place is not None else None
    return type(owner).__module__.startswith("torchrl_vecnorm.")


class Transform(Format):
    """A transform whose state is a flat dict, with the key in the names of the entries."""

    packages = _PACKAGES
    #: What joins the parts of a nested key in a name.
    separator: str

    def name(self, field: str, key: str) -> str:
        """The name of an entry."""
        raise NotImplementedError

    def keys_of(self, state: Mapping) -> list[str]:
        """The keys that have statistics in a state."""
        raise NotImplementedError

    def entries_in(self, state: Mapping, key: str) -> dict[str, str]:
        """The names of the entries of a key that are there, by field."""
        raise NotImplementedError

    def in_mapping(self, mapping: Mapping, path: str) -> Iterator[Place]:
        """As in :class:`Format`."""
        for key in self.keys_of(mapping):
            names = self.entries_in(mapping, key)
            entries = {field: mapping[name] for field, name in names.items()}
            trails = {field: (name,) for field, name in names.items()}
            where = joined(path, key.replace(self.separator, "."))
            yield Place(where, self, entries, names=trails, leaf=(key,))

    def in_object(self, obj: Any, path: str) -> Iterator[Place]:
        """As in :class:`Format`."""
        if not is_of(obj, self.packages, self.classes):
            return
        state = state_of(obj)
        if state:
            for place in self.in_mapping(state, path):
                yield place._replace(owner=obj, names=None)
            return
        for key in obj.in_keys:
            parts = (key,) if isinstance(key, str) else tuple(key)
            leaf = (self.separator.join(parts),)
            yield Place(joined(path, *parts), self, {}, obj, leaf=leaf)

    def found(self, place: Place) -> tuple[Mapping[str, Any], str]:
        """The entries of a key, and the key.

        Raises:
            ValueError: there are none.
        """
        (key,) = place.leaf
        if not place.entries:
            raise ValueError(
                f"{self.library}: expected statistics of {key!r}, got none"
            )
        return place.entries, key

    def fitted(self, made: dict[str, Any], place: Place | None) -> dict[str, Any]:
        """New entries, in the dtypes of those that are there.

        Raises:
            ValueError: those that are there have other shapes.
        """
        for field, value in made.items():
            old = place.entries.get(field) if place is not None else None
            if old is not None:
                name = self.name(field, *place.leaf)
                same_shape(self.library, name, value, old.shape)
                made[field] = value.to(old.dtype)
        return made

    def put(self, place: Place, entries: Mapping[str, Any]) -> Any:
        """By the transform's own loading, which is all or nothing."""
        owner, (key,) = place.owner, place.leaf
        state = state_of(owner)
        if not state and len(owner.in_keys) > 1:
            raise ValueError(
                f"{self.library}: expected a transform that has seen data, as one of "
                f"{list(owner.in_keys)} cannot be loaded without the others"
            )
        new = {self.name(field, key): value for field, value in entries.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will be no more shared than it is
            owner.set_extra_state({**state, **new})
        return owner


def state_of(transform: Any) -> dict[str, Any]:
    """The statistics of a transform, live; empty before data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are none
        return dict(transform.get_extra_state() or {})


class V1(Transform):
    """``torchrl.envs.VecNorm``, and ours: sums."""

    library = "torchrl.VecNorm"
    classes = ("VecNorm",)
    required = ()
    separator = "-<.>-"

    def name(self, field: str, key: str) -> str:
        """As in :class:`Transform`."""
        return f"{key}_{field}"

    def keys_of(self, state: Mapping) -> list[str]:
        """As in :class:`Transform`."""
        found = [k[: -len("_sum")] for k in state if str(k).endswith("_sum")]
        return [k for k in found if f"{k}_ssq" in state and f"{k}_count" in state]

    def entries_in(self, state: Mapping, key: str) -> dict[str, str]:
        """As in :class:`Transform`."""
        names = {field: self.name(field, key) for field in Moments._fields}
        return {field: name for field, name in names.items() if name in state}

    def rule(self, place: Place | None) -> dict[str, Any]:
        """A floor of the variance; of the deviation where the state is ours."""
        eps = float(getattr(place.owner, "eps", 1e-4)) if place is not None else 1e-4
        ours = is_ours(place) or (place is not None and "central" in place.entries)
        # torchrl has it in both places.
        return {**_FLOORED, "eps": eps, "eps_mode": (
            "std_floor" if ours or eps > 1 else "var_floor")}  # fmt: skip

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        entries, key = self.found(place)
        names = [self.name(field, key) for field in Moments._fields]
        count = count_of(self.library, names[2], entries["count"])
        moments = of_sums(
            self.library, (names[0], names[1]), entries["sum"], entries["ssq"], count
        )
        extra = {
            field: tensor(self.library, self.name(field, key), entries[field])
            for field in ("nonfinite", "central")
            if field in entries
        }
        moments = moments._replace(**extra)
        check_moments(names, moments, None, owner=self.library)
        return Carried(moments, **self.rule(place))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        made = {
            "sum": moments.sum,
            "ssq": moments.ssq,
            "count": moments.samples().reshape(1),
        }
        if place is None:
            return made
        if is_ours(place) or "central" in place.entries:
            made["nonfinite"], made["central"] = moments.nonfinite, moments.central
        fitted = self.fitted(made, place)
        return {field: value.clone() for field, value in fitted.items()}


class V2(Transform):
    """``torchrl.envs.VecNormV2``, and ours: averages of x and x² that begin at 0.

    Theirs are ``loc``, ``var`` (which is the mean of squares) and ``count``, ours ``sum``,
    ``ssq`` and ``weight``, which with torchrl's count would be ``1 - decay^count``.
    """

    library = "torchrl.VecNormV2"
    classes = ("VecNormV2",)
    required = ()
    separator = ".-|-."
    ours = ("sum", "ssq", "weight")
    theirs = ("loc", "var", "count")

    def name(self, field: str, key: str) -> str:
        """As in :class:`Transform`."""
        return f"{field}{self.separator}{key}"

    def keys_of(self, state: Mapping) -> list[str]:
        """As in :class:`Transform`."""
        heads = [self.name(fields[0], "") for fields in (self.ours, self.theirs)]
        found = [str(k)[len(h) :] for k in state for h in heads if str(k).startswith(h)]
        return [key for key in dict.fromkeys(found) if self.entries_in(state, key)]

    def entries_in(self, state: Mapping, key: str) -> dict[str, str]:
        """As in :class:`Transform`; ours has torchrl's beside its own."""
        fields = (*self.ours, "nonfinite", "central", *self.theirs)
        names = {field: self.name(field, key) for field in fields}
        names = {field: name for field, name in names.items() if name in state}
        whole = any(all(f in names for f in of) for of in (self.ours, self.theirs))
        return names if whole else {}

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        eps = float(getattr(place.owner, "eps", 1e-4)) if place is not None else 1e-4
        return {**_FLOORED, "eps": eps, "eps_mode": "std_floor"}

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        entries, key = self.found(place)
        decay = decay_of(self, place, options)
        fields = self.ours if all(f in entries for f in self.ours) else self.theirs
        names = [self.name(field, key) for field in fields]
        mean, squares, last = (entries[field] for field in fields)
        if fields == self.ours:
            mass = last = tensor(self.library, names[2], last).flatten()[:1]
        else:
            last = count_of(self.library, names[2], last)
            mass = -torch.expm1(last * math.log(decay)) if decay < 1 else last.sign()
        weight = mass / (1 - decay) if decay < 1 else last
        averages = of_sums(self.library, (names[0], names[1]), mean, squares, mass)
        moments = of_mean_var(*averages.mean_var(), weight)
        return Carried(moments, **self.rule(place))

    def doubts(self, place: Place, carried: Carried) -> list[str]:
        """That torchrl takes the mean's square away before it divides by the weight."""
        if is_ours(place) or "loc" not in place.entries:
            return []
        moments = carried.moments
        _, var = moments.mean_var()
        count = float(place.entries["count"])
        return self._far(var, place.entries["loc"], place.entries["var"], count, place)

    def _far(self, var, loc, squares, count, place) -> list[str]:
        decay = getattr(place.owner, "decay", None) if place is not None else None
        if decay is None or decay == 1 or count == 0:
            return []
        mass = -math.expm1(count * math.log(decay))
        loc, squares = torch.as_tensor(loc).double(), torch.as_tensor(squares).double()
        theirs = (squares - loc * loc) / mass
        ratio = (theirs / var.clamp_min(1e-300)).sqrt()
        if (ratio - 1).abs().max() < 1e-3:
            return []
        return [
            f"{self.library}: what it divides by is up to {ratio.max().item():.3g} times the "
            f"deviation, after {count:.0f} updates at decay {decay}: it takes the mean's "
            "square away before it divides by the weight"
        ]

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`, in the names that are there."""
        decay = decay_of(self, place, options)
        mean, var = moments.mean_var()
        weight, n = batches_of(moments.samples().item(), decay)
        squares = var + mean * mean
        mass = 1.0 if decay == 1 else -math.expm1(n * math.log(decay))
        mass = mass if n else 0.0
        values = (mean * mass, squares * mass, torch.tensor(n))
        made = dict(zip(self.theirs, values, strict=True))
        if is_ours(place) or (place is not None and "central" in place.entries):
            mass = weight if decay == 1 else weight * (1 - decay)
            both = torch.tensor([mass, max(moments.seen().item(), n)], dtype=mean.dtype)
            values = (mean * mass, squares * mass, both)
            extra = {"nonfinite": moments.nonfinite, "central": var}
            made = {**dict(zip(self.ours, values, strict=True)), **extra, **made}
        return self.fitted(made, place)


class PopArt(InModule):
    """``PopArtValueNorm``: averages, and what their weights add up to."""

    library = "torchrl.PopArtValueNorm"
    packages = ("torchrl",)
    classes = ("PopArtValueNorm",)
    required = names = ("running_mean", "running_mean_sq", "debiasing_term")

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        owner = place.owner if place is not None else None
        return {**_FLOORED, "eps": float(getattr(owner, "epsilon", 1e-5))}

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        decay = self._beta(place, options)
        mean, squares, weight = (place.entries[name] for name in self.names)
        count = count_of(self.library, self.names[2], weight)
        if count > 1 + 1e-6:
            raise ValueError(
                wrong(self.library, self.names[2], "no more than 1", count)
            )
        names = (self.names[0], self.names[1])
        averages = of_sums(self.library, names, mean, squares, count)
        weight = count if decay == 1 else count / (1 - decay)
        moments = of_mean_var(*averages.mean_var(), weight)
        return Carried(moments, **self.rule(place))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        decay = self._beta(place, options)
        mean, var = moments.mean_var()
        weight = min(moments.samples().item() * (1 - decay), 1.0)
        if weight > 0:  # it divides by eps where that is more
            weight = max(weight, self.rule(place)["eps"])
        old = place.entries[self.names[2]] if place is not None else None
        total = torch.tensor(weight, dtype=torch.float32 if old is None else old.dtype)
        weight = total.double()
        values = (mean * weight, (var + mean * mean) * weight, total)
        return alike(self, values, place, torch.float32)

    def _beta(self, place: Place | None, options: Options) -> float:
        owner = place.owner if place is not None else None
        beta = getattr(owner, "beta", options.decay)
        return decay_of(self, None, options._replace(decay=beta))


class RunningValue(InModule):
    """``RunningValueNorm``: squared deviations, added up."""

    library = "torchrl.RunningValueNorm"
    packages = ("torchrl",)
    classes = ("RunningValueNorm",)
    required = names = ("mean", "m2", "count")
    rule = PopArt.rule

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        mean, m2 = (tensor(self.library, n, place.entries[n]) for n in ("mean", "m2"))
        count = count_of(self.library, "count", place.entries["count"])
        same_shape(self.library, "m2", m2, mean.shape)
        if (m2 < 0).any():
            raise ValueError(wrong(self.library, "m2", "none below 0", m2[m2 < 0][0]))
        moments = of_mean_var(mean, m2 / count.clamp_min(1), count)
        return Carried(moments, **self.rule(place))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        mean, var = moments.mean_var()
        count = moments.samples().clamp_max(2**24)  # where its float32 stops counting
        values = (mean, var * count, count.to(torch.float32))
        return alike(self, values, place, torch.float32)


class Ours(InModule):
    """:class:`~torchrl_vecnorm.RunningNorm`."""

    library = "torchrl_vecnorm.RunningNorm"
    packages = ("torchrl_vecnorm",)
    classes = ("RunningNorm",)
    required = names = Moments._fields

    def in_object(self, obj: Any, path: str) -> Iterator[Place]:
        """As in :class:`Format`: one for each tensor."""
        if is_of(obj, self.packages, self.classes):
            for name, module in obj.named_modules():
                if module._buffers:
                    entries = dict(module._buffers)
                    yield Place(joined(path, name), self, entries, obj)

    def rule(self, place: Place | None) -> dict[str, Any]:
        """As in :class:`Format`."""
        owner = place.owner if place is not None else None
        eps, mode, clip, center = getattr(owner, "rule", (1e-4, 0, None, True))
        return {"eps": eps, "eps_mode": EPS_MODES[mode], "clip": clip, "center": center}

    def read(self, place: Place, options: Options) -> Carried:
        """As in :class:`Format`."""
        values = {n: tensor(self.library, n, place.entries[n]) for n in self.names}
        moments = Moments(**values)
        check_moments(self.names, moments, None, counts=2, owner=self.library)
        return Carried(moments, **self.rule(place))

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """As in :class:`Format`."""
        both = torch.stack([moments.samples(), moments.seen()])
        values = tuple(moments._replace(count=both))
        return alike(self, values, place, torch.float64)
