# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics that several ranks have in common: at every call, or now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_vecnorm import functional
from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.ranks import Key as RankKey
from torchrl_vecnorm.ranks import plainly
from torchrl_vecnorm.statistics.checkpoints import write
from torchrl_vecnorm.statistics.compute import (
    Entry,
    MaskOf,
    called,
    compute,
    find_entries,
)
from torchrl_vecnorm.statistics.entries import copy_moments
from torchrl_vecnorm.statistics.modes import new_moments
from torchrl_vecnorm.statistics.names import StateNames
from torchrl_vecnorm.syncing import Part, synced
from torchrl_vecnorm.totals import around, decays, from_around

if TYPE_CHECKING:
    from torchrl_vecnorm.statistics.engine import Statistics

#: Why shared statistics are not those of a group too.
NOT_SHARED = (
    "expected statistics of this process alone with a group, got some that other processes "
    "update: ranks could not keep them the same at every call. Join them now and then, with "
    "sync_()"
)


def normalize(
    statistics: Statistics,
    td: TensorDictBase,
    tolerant: bool,
    mask_of: MaskOf | None,
) -> TensorDictBase:
    """As :meth:`Statistics.normalize`, with the batches of all ranks: a call of all of them.

    What one of them refuses is refused by all, before any has changed.
    """
    store, ranks = statistics.store, statistics.ranks
    if store.others_update:
        raise RuntimeError(f"VecNorm: {NOT_SHARED}")
    with store.session():
        sets = statistics.look_up().sets
        entries: list[Entry] = []
        batches: dict[StateNames, Moments] = {}
        features: dict[StateNames, torch.Size] = {}
        refusal = None
        try:
            plainly()
            values = statistics.values_of(td, tolerant)
            dims = statistics._batch_dims(td)
            counts_all = statistics.counts == 2
            entries = find_entries(store, values, dims, True, mask_of, counts_all)
            for e in entries:
                ndim = len(e.key.shape) if e.key.shape is not None else None
                ndim = e.value.ndim - dims if ndim is None else ndim
                features[e.key.names] = e.value.shape[e.value.ndim - ndim :]
            batches = _batches(entries, features)
        except Exception as error:  # the others have to know
            refusal = error
        states = {e.key.names: e.state for e in entries if e.state is not None}
        for key in sets:
            state = states.get(key.names)
            if state is None:
                state = store.moments(key.names)
            if state is not None:
                states[key.names] = state
                features.setdefault(key.names, state.sum.shape)
            elif key.shape is not None:
                features.setdefault(key.names, key.shape)
        asked = [
            RankKey(
                repr(key.in_key),
                features.get(key.names),
                states.get(key.names),
                batches.get(key.names),
            )
            for key in sets
        ]
        device = _device(list(states.values()), entries)
        try:
            joined = ranks.join(
                asked, _options(statistics), device, refusal is not None
            )
        except RuntimeError:
            if refusal is not None:
                raise refusal from None
            raise
        # The others have them: what fails from here on does not take them back.
        known, totals, new = [], [], {e.key.names: e.state for e in entries if e.is_new}
        for key, one in zip(sets, joined, strict=True):
            if one.total is None:
                continue
            state = states.get(key.names)
            if state is None:
                where = device if one.state is None else one.total.sum.device
                state = new_moments(one.total.sum.shape, where, statistics.counts == 2)
                states[key.names] = new[key.names] = state
            if one.state is not None and one.state is not state:
                copy_moments(state, one.state)
            known.append(key)
            totals.append(one.total.to(state.sum.device))
        statistics.fold(known, [states[key.names] for key in known], totals)
        if new:
            store.add(new)
        for key, total in zip(known, totals, strict=True):
            since = store.since.get(key.names)
            if since is not None and statistics.weights.keep < 1:
                since.note(statistics.weights.keep, total.samples())
        for e in entries:
            e.state = states.get(e.key.names)
        here = [_beside(e) for e in entries]
        normalized = compute(here, False, statistics.weights, statistics.eps)
        statistics._write_outputs(td, [e.key for e in entries], normalized)
        statistics._after_update()
    return td


def _options(statistics: Statistics) -> str:
    return f"{type(statistics).__name__} with decay {statistics.decay}"


def _device(states: list[Moments], entries: list[Entry]) -> torch.device:
    """Where the ranks add up: with the statistics, or the values."""
    for state in states:
        return state.sum.device
    for e in entries:
        return e.value.device
    return torch.device("cpu")


def _beside(e: Entry) -> Entry:
    if e.state is None or e.state.sum.device == e.value.device:
        return e
    return Entry(e.key, e.value, e.state.to(e.value.device), None)


def _batches(
    entries: list[Entry], features: dict[StateNames, torch.Size]
) -> dict[StateNames, Moments]:
    """The moments of the batch of each set of statistics: one operator where it can be."""
    alike: dict[tuple[int, torch.device], list[Entry]] = {}
    for e in entries:
        of = len(features[e.key.names]), e.value.device
        alike.setdefault(of, []).append(e)
    batches: dict[StateNames, Moments] = {}
    for (ndim, _), some in alike.items():
        masks: list[Tensor | None] = [e.mask for e in some]
        found = called(
            [e.key for e in some],
            functional.moments,
            [e.value for e in some],
            ndim,
            mask=masks if any(m is not None for m in masks) else None,
        )
        for e, batch in zip(some, found, strict=True):
            if e.state is not None:
                batch = batch.to(e.state.sum.device)
            if e.key.names in batches:
                functional.merge_(batches[e.key.names], batch)
            else:
                batches[e.key.names] = batch
    return batches


# -------------------------------------------------------------------------- now and then


def sync_(statistics: Statistics, group: Group) -> None:
    """Joins what ranks have seen since they had the same statistics."""
    store, ranks = statistics.store, statistics.ranks
    if ranks is not None and group in (None, ranks.group):
        raise RuntimeError(
            "VecNorm: expected another group for sync_() than that whose batches are joined "
            "at every call"
        )
    with torch.inference_mode(False):
        if not store.in_shared_memory():
            with statistics.session():
                parts = _parts(statistics)
                _write(statistics, parts, _joined(statistics, group, parts))
        else:
            # Others go on meanwhile: what they add is added to what comes of it.
            with statistics.session():
                parts = _parts(statistics, copy=True)
            new = _joined(statistics, group, parts)
            with statistics.session():
                _write(statistics, parts, new)
        if ranks is not None:
            ranks.asks = True


def _parts(statistics: Statistics, copy: bool = False) -> list[Part]:
    store, parts = statistics.store, []
    for key in statistics.keys:
        state, since = store.moments(key.names), store.since.get(key.names)
        if state is None:
            parts.append(Part(None, None, 1.0))
            continue
        if since is not None and statistics.counts == 1 and statistics.decay < 1:
            since.check(state, f"VecNorm: sync_() of key {key.in_key!r}")
        kept = statistics.kept(key, state)
        if copy:
            state = state.to(state.sum.device, copy=True)
        parts.append(Part(state, None if since is None else since.base, kept))
    return parts


def _joined(
    statistics: Statistics, group: Group, parts: list[Part]
) -> list[Moments | None]:
    names = [repr(key.in_key) for key in statistics.keys]
    averages = statistics.counts == 2 and statistics.decay < 1
    what = _options(statistics)
    return synced(group, "VecNorm", what, names, parts, statistics.counts, averages)


def _write(
    statistics: Statistics, parts: list[Part], new: list[Moments | None]
) -> None:
    """Makes what all go on with the statistics; with the lock held."""
    store, keys = statistics.store, statistics.keys
    attached = store.attached
    if attached is not None:
        attached.state.load()
    elif store.td is None and any(one is not None for one in new):
        store.add(
            {
                key.names: new_moments(
                    one.sum.shape, one.sum.device, statistics.counts == 2
                )
                for key, one in zip(keys, new, strict=True)
                if one is not None
            }
        )
    kept = [1.0] * len(keys)
    for k, (key, part, one) in enumerate(zip(keys, parts, new, strict=True)):
        if one is None:
            continue
        store.check_room(key.in_key)
        now, moved = store.moments(key.names), one
        if now is not None and part.state is not None and _differ(now, part.state):
            moved, kept[k] = _gone_on(statistics, now, part.state, one)
        write(statistics, key, moved, attached)
    if attached is not None:
        attached.state.commit()
    statistics.binding = None
    store.rebase()
    for k, (key, one) in enumerate(zip(keys, new, strict=True)):
        if one is not None:
            store.since[key.names].base = one.to(one.sum.device, copy=True)
            store.since[key.names].kept.fill_(kept[k])
    statistics._after_update()


def _differ(now: Moments, before: Moments) -> bool:
    return bool((now.count != before.count).any())


def _gone_on(
    statistics: Statistics, now: Moments, before: Moments, new: Moments
) -> tuple[Moments, float]:
    """What others have added since, on top of what all have; what that has left of it."""
    kept = 1.0
    if statistics.counts == 2 and statistics.decay < 1:
        kept = statistics.decay ** (now.seen() - before.seen()).item()
    elif statistics.decay < 1:
        raise RuntimeError(
            "VecNorm: sync_(): others have updated the statistics meanwhile, and how often "
            "they have decayed is not known. Join them with decay=1, or in VecNormV2"
        )
    shift = new.mean_var()[0].cpu()
    gain = around(new, shift) - around(before, shift)
    gain = torch.where(decays(shift.shape), gain * kept, gain)
    return from_around(around(now, shift) + gain, shift, statistics.counts), kept
