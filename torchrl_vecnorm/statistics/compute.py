# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What one call computes: values of some keys, normalised with their statistics."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_compiling

from torchrl_vecnorm import functional, oracle
from torchrl_vecnorm.moments import Moments, moved
from torchrl_vecnorm.statistics.entries import copy_moments
from torchrl_vecnorm.statistics.keys import Key
from torchrl_vecnorm.statistics.modes import new_moments
from torchrl_vecnorm.statistics.names import StateNames
from torchrl_vecnorm.statistics.store import Store
from torchrl_vecnorm.statistics.values import features_of, identity

#: Which samples of a key count, for a key and the shape of its samples: bool, or None
#: where all do.
MaskOf = Callable[[NestedKey, torch.Size], Tensor | None]


class Weights(NamedTuple):
    """What an update multiplies the old moments by, and what a new sample weighs."""

    keep: float
    weight: float = 1.0


@dataclass
class Entry:
    """One key of one call."""

    key: Key
    value: Tensor
    state: Moments | None  # None: nothing was seen, and nothing is learned now
    mask: Tensor | None  # bool [samples]: which samples count
    is_new: bool = False  # the state is not in the tensordict of the statistics yet


def find_entries(
    store: Store,
    values: list[tuple[Key, Tensor]],
    batch_dims: int,
    updating: bool,
    mask_of: MaskOf | None,
    counts_all: bool = False,
) -> list[Entry]:
    """Checks the shapes of all values and finds their states."""
    entries = []
    found: dict[StateNames, tuple[Moments, bool]] = {}
    shapes: dict[StateNames, torch.Size] = {}
    for key, value in values:
        state = store.moments(key.names)
        features = features_of(key, value, batch_dims, state, shapes.get(key.names))
        shapes[key.names] = features
        samples = value.shape[: value.ndim - len(features)]
        mask = None if mask_of is None else mask_of(key.in_key, samples)
        entries.append(Entry(key, value, None, mask))
        if key.names in found:
            continue
        if state is None and updating and samples.numel() > 0:
            store.check_room(key.in_key)
            found[key.names] = new_moments(features, value.device, counts_all), True
        elif state is not None:
            # A private state follows the values; where nothing is updated, a copy.
            here = state
            if not store.others_update:
                here = store.follow(state, value.device)
            found[key.names] = here, here is not state
    for e in entries:
        e.state, e.is_new = found.get(e.key.names, (None, False))
    return entries


def compute(
    entries: list[Entry], updating: bool, weights: Weights, eps: float
) -> list[Tensor]:
    """The normalised values: one call of the operator for all keys that have a state.

    Args:
        entries: the keys.
        updating: whether their states take in the values first.
        weights: of an update.
        eps: the lower bound of the standard deviation.
    """
    known = [e for e in entries if e.state is not None]
    is_apart = len({e.key.names for e in known}) == len(known)
    if (
        updating
        and is_compiling()
        and any(e.is_new and e.value.requires_grad for e in known)
    ):
        results = _compute_plain(known, weights, eps)
    elif (updating and not is_apart) or any(
        e.state.sum.device != e.value.device for e in known
    ):
        results = _compute_from_moments(known, updating, weights, eps)
    else:
        results = _compute_here(known, updating, weights, eps)
    results = iter(results)
    return [
        next(results) if e.state is not None else identity(e.value) for e in entries
    ]


def _compute_here(
    known: list[Entry], updating: bool, weights: Weights, eps: float
) -> list[Tensor]:
    """With the statistics on the devices of the values."""
    if not known:
        return []
    devices = {e.value.device for e in known}
    if len(devices) > 1:
        results = {}
        for device in devices:
            part = [e for e in known if e.value.device == device]
            computed = _compute_here(part, updating, weights, eps)
            results.update(zip(map(id, part), computed, strict=True))
        return [results[id(e)] for e in known]
    keys = [e.key for e in known]
    values = [e.value for e in known]
    states = [e.state for e in known]
    if not updating:
        return called(keys, functional.normalize, values, states, eps=eps)
    masks = [e.mask for e in known]
    return called(
        keys,
        functional.update_,
        values,
        states,
        decay=weights.keep,
        weight=weights.weight,
        eps=eps,
        mask=masks if any(m is not None for m in masks) else None,
    )


def _compute_plain(known: list[Entry], weights: Weights, eps: float) -> list[Tensor]:
    """The first call, compiled and with gradients, in plain torch.

    Inductor (torch 2.13) gives the backward pass the zeros that a state begins with
    where the same graph makes the state, updates it in place and reads it.
    """
    batches: dict[StateNames, Moments] = {}
    for e in known:
        batch = oracle.batch_moments(e.value.detach(), e.state.sum.ndim, e.mask)
        if e.key.names in batches:
            batch = oracle.fold(batches[e.key.names], batch, 1.0)
        batches[e.key.names] = batch
    states: dict[StateNames, Moments] = {}
    for e in known:
        if e.key.names not in states:
            state = oracle.fold(
                e.state, batches[e.key.names], weights.keep, weights.weight
            )
            if not e.is_new:
                copy_moments(e.state, state)
            states[e.key.names] = state
        e.state = states[e.key.names] if e.is_new else e.state
    return [oracle.normalize(e.value, states[e.key.names], float(eps)) for e in known]


def _compute_from_moments(
    known: list[Entry], updating: bool, weights: Weights, eps: float
) -> list[Tensor]:
    """With the moments of the batch, where it is not one tensor beside the statistics.

    Shared statistics stay where they are, while the values may be elsewhere: the
    batch is reduced on its own device, its moments travel, and so do the statistics
    that it is normalised with. Keys that share statistics are folded in at once.
    """
    if updating:
        states = {e.key.names: e.state for e in known}
        batches: dict[StateNames, Moments] = {}
        found = [
            called(
                [e.key],
                functional.moments,
                e.value,
                e.state.sum.ndim,
                mask=e.mask,
            )
            for e in known
        ]
        found = moved(found, [e.state.sum.device for e in known])
        for e, batch in zip(known, found, strict=True):
            if e.key.names in batches:
                functional.merge_(batches[e.key.names], batch)
            else:
                batches[e.key.names] = batch
        functional.merge_(
            list(states.values()),
            list(batches.values()),
            decay=weights.keep,
            weight=weights.weight,
        )
    near = moved([e.state for e in known], [e.value.device for e in known])
    here = [replace(e, state=state) for e, state in zip(known, near, strict=True)]
    return _compute_here(here, False, weights, eps)


def keep_new(store: Store, known: list[Entry]) -> None:
    """Makes new and moved states those of the tensordict of the statistics."""
    new = {e.key.names: e.state for e in known if e.is_new}
    # Who traces with fake tensors gets a graph, and no statistics.
    is_export = not torch.compiler.is_dynamo_compiling() and any(
        is_fake(state.sum) for state in new.values()
    )
    if new and not is_export:
        store.add(new)


def called(keys: Sequence[Key], operator: Callable, *args, **kwargs) -> Any:
    """Calls an operator, whose errors have the number of a key, for users of names."""
    if is_compiling():
        return operator(*args, **kwargs)
    try:
        return operator(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        text = with_names(error, [key.in_key for key in keys])
        if text == str(error):
            raise
        raise type(error)(f"VecNorm: {text}") from None


def with_names(error: Exception, keys: Sequence[NestedKey]) -> str:
    """An operator's error in words for users of names."""
    return re.sub(r"\bkey (\d+)\b", lambda m: f"key {keys[int(m[1])]!r}", str(error))
