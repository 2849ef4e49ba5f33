# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics that are joined as state_dicts: by whoever carries these from place to place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_vecnorm.checks import REQUIRED, check_moments
from torchrl_vecnorm.groups import first_known, is_empty, mean_of
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.syncing import Part, joined, seen_alone

#: What the names of VecNormV2's entries begin with and end with, between them this.
_V2 = ".-|-."
_V2_FIELDS = ("sum", "ssq", "weight", "nonfinite", "central")


class _Entries(NamedTuple):
    """The names of the entries of one key in a state_dict."""

    moments: tuple[str, ...]
    kept: str
    averages: tuple[str, ...] = ()  # what torchrl's VecNormV2 has, beside ours

    @classmethod
    def find(cls, state: Mapping[str, Any]) -> Iterator[_Entries]:
        """Those of each key: of VecNorm, RunningNorm or VecNormV2."""
        for name in state:
            for stem in (name[:-3],) if name.endswith(("_sum", ".sum")) else ():
                found = cls(
                    tuple(stem + field for field in Moments._fields), stem + "kept"
                )
                if all(other in state for other in found.moments[: len(REQUIRED)]):
                    yield found
            if name.startswith("sum" + _V2):
                end = name[len("sum") :]
                yield cls(
                    tuple(field + end for field in _V2_FIELDS),
                    "kept" + end,
                    tuple(field + end for field in ("loc", "var", "count")),
                )


def merge_states(
    states: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Joins statistics that went on alone from the same ones, as state_dicts.

    The same as ``sync_()``, as a pure function: for what carries state_dicts between
    processes that are no ranks of ``torch.distributed``, as Ray does, or files. The result
    goes to all of them, and is the ``base`` of the next time.

    Args:
        states: of :class:`~torchrl_vecnorm.VecNorm`, :class:`~torchrl_vecnorm.VecNormV2` with
            ``reduce_batch_dims`` or :class:`~torchrl_vecnorm.RunningNorm`: as
            ``get_extra_state()`` or ``state_dict()`` gives them, also those of a module or an
            environment that has some in it; what else is in there is the first one's.
        base: what they have loaded, and gone on from: what this has given the time before,
            or has made of a checkpoint, ``merge_states([checkpoint])``; None where all have
            begun with nothing. Who has joined them with nothing may be among ``states``.

    Returns:
        A new state_dict, of copies. It has one entry more for each key, ``kept``: who loads
        it says in that entry of its own how much is left of what was loaded. States of
        torchrl's own class have none: all are taken to have loaded ``base``, and nothing to
        have decayed since.

    Raises:
        ValueError: an entry makes no sense, has another shape in another state, or was not
            gone on to from ``base``; no states; a base that does not say ``kept``.

    Equivalent to, for each key, with ``k`` calls since (``VecNormV2``: samples)::

        decay**k.max() * base + sum(state - decay**k_r * base for each state)
    """
    states = list(states)
    if not states:
        raise ValueError("expected at least one state, got none")
    for state in (*states, base):
        if state is not None and not isinstance(state, Mapping):
            raise ValueError(
                f"expected state_dicts as states and base, got {type(state).__name__}"
            )
    return _merge([state or {} for state in states], base or {}, "")


def _merge(
    states: list[Mapping[str, Any]], base: Mapping[str, Any], path: str
) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            if merged.get(name) is None:
                merged[name] = value
    found = {entries.moments[0]: entries for entries in _Entries.find(merged)}
    for name, value in list(merged.items()):
        if isinstance(value, Mapping):
            inner = [state.get(name) or {} for state in states]
            merged[name] = _merge(inner, base.get(name) or {}, f"{path}{name}: ")
        elif isinstance(value, Tensor):
            merged[name] = value.detach().clone()
    for entries in found.values():
        first = next(state for state in states if entries.moments[0] in state)
        new = _joined(states, base, entries, path)
        for name, leaf in zip(entries.moments, new, strict=True):
            if name in first:
                merged[name] = leaf.to(first[name].dtype).view_as(first[name])
        if entries.moments[-1] in first:  # not in the layout of torchrl's VecNorm
            merged[entries.kept] = torch.ones((), dtype=torch.float64)
        for name, leaf in zip(entries.averages, _averages(new), strict=False):
            if name in first:
                merged[name] = leaf.to(first[name].dtype).view_as(first[name])
    return merged


def _read(state: Mapping[str, Any], entries: _Entries, path: str) -> Moments | None:
    """What a state has of a key, checked; None where it has not met it."""
    if entries.moments[0] not in state:
        return None
    names = [path + name for name in entries.moments]
    moments = Moments(*(state.get(name) for name in entries.moments))
    counts = getattr(moments.count, "numel", lambda: 1)()
    check_moments(names, moments, None, counts=counts, owner="merge_states")
    return None if is_empty(moments) else moments


def _joined(
    states: list[Mapping[str, Any]],
    base: Mapping[str, Any],
    entries: _Entries,
    path: str,
) -> Moments:
    begun = _read(base, entries, path + "base: ")
    tells = entries.moments[-1] in base  # all but torchrl's VecNorm
    if begun is not None and tells and entries.kept not in base:
        raise ValueError(
            f"merge_states: expected base with an entry {path + entries.kept!r}, as "
            "merge_states gives it, got none: let all load merge_states([checkpoint]), and "
            "take that for base"
        )
    parts = [
        Part(
            _read(state, entries, path),
            None if tells and entries.kept not in state else begun,
            float(state.get(entries.kept, 1.0)),
        )
        for state in states
    ]
    known = [part.state for part in parts if part.state is not None]
    if not known:
        first = next(state for state in states if entries.moments[0] in state)
        found = Moments(*(first.get(name) for name in entries.moments))
        return found.with_extras()
    counts = known[0].count.numel()
    is_average = bool(entries.averages) and any(
        bool(m.samples() != m.seen()) for m in known
    )
    shape = known[0].sum.shape
    for part in parts:
        if part.state is not None and part.state.sum.shape != shape:
            raise ValueError(
                f"merge_states: entry {path + entries.moments[0]!r}: expected shape "
                f"{tuple(shape)} in all states, got {tuple(part.state.sum.shape)}"
            )
    if begun is not None and begun.sum.shape != shape:
        raise ValueError(
            f"merge_states: entry {path + entries.moments[0]!r}: expected shape "
            f"{tuple(shape)} as in the states in base, got {tuple(begun.sum.shape)}"
        )
    mean = first_known([mean_of(begun, *known)])
    shift = mean.nan_to_num(0.0)
    alone = torch.zeros(2 + 4 * shape.numel(), dtype=torch.float64)
    for part in parts:
        numbers = seen_alone(part, shift)
        if part.state is not None and numbers[0] < -1e-9 * part.state.samples().cpu():
            raise ValueError(
                f"merge_states: entry {path + entries.moments[2]!r}: expected a state that "
                f"went on from base, whose count is {begun.samples().item():.9g}, got a "
                f"count of {part.state.samples().item():.9g}"
            )
        alone += numbers
    kept = [part.kept for part in parts if part.base is not None]
    left = [
        part.kept if part.base is not None else 1 - part.state.samples().item()
        for part in parts
        if part.state is not None
    ]
    return joined(begun, kept or [1.0], left, alone, shift, counts, is_average)


def _averages(moments: Moments) -> tuple[Tensor, ...]:
    """What torchrl's VecNormV2 has of a key: decayed means of x and x², and the count."""
    mean, var = moments.mean_var()
    square = var + mean * mean
    weight, seen = moments.samples(), moments.seen()
    if bool(weight != seen):
        mean, square = mean * weight, square * weight
    return mean, square, seen.round()
