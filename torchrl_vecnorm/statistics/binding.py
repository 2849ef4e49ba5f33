# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The short way of a common call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict

from torchrl_vecnorm import functional
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.statistics.compute import Entry
from torchrl_vecnorm.statistics.keys import Keys
from torchrl_vecnorm.statistics.names import as_path
from torchrl_vecnorm.statistics.store import Store

#: What a common call is made by, the lock that statistics had then, the user's, and how
#: many dimensions the features of each key have.
Bound = tuple[_C.Binding, Any, Any, list[int]]


def bind(
    store: Store,
    found: Keys,
    known: Sequence[Entry],
    batch_dims: int,
    now: Sequence[Any],
) -> Bound | None:
    """The live leaves of all keys, with what a call has to look like to use them.

    Finding them costs more than a small call computes, so it is done once and checked
    on every call: loading, moving and sharing replace the leaves or the tensordict.

    Args:
        store: the statistics.
        found: the keys.
        known: a common call.
        batch_dims: of its tensordict.
        now: the lists that ``found`` was made of, which may be changed in place: what
            they were has to be equal at each call.

    Returns:
        None where keys share statistics, the entries are not plain, or lie on several
        devices, or an output goes to a tensordict that the value is not in.
    """
    if len(found.sets) < len(known):
        return None
    users_lock, shared = store.protection()
    moments = [store.moments(e.key.names) for e in known]
    if None in moments:  # of a trace with fake tensors
        return None
    entries = []
    if store.attached is not None:
        if store.attached.updates_in_place:
            entries = functional.leaves_of(moments)
        moments = [
            store.attached.copy_of(one, e.key.names)
            for one, e in zip(moments, known, strict=True)
        ]
    td = store.td
    if type(td) is not TensorDict or len({m.sum.device for m in moments}) != 1:
        return None
    # Every step down to every leaf: (dict, name, what has to be there).
    parts: list[tuple[dict, str, Any]] = []
    for path in (as_path(name) for e in known for name in e.key.names):
        node = td
        for part in path:
            if type(node) is not TensorDict:
                return None
            child = node._tensordict.get(part)
            parts.append((node._tensordict, part, child))
            node = child
    in_keys = [as_path(e.key.in_key) for e in known]
    out_keys = [as_path(e.key.out_key) for e in known]
    for source, target in zip(in_keys, out_keys, strict=True):
        # Other tensordicts may have more batch dimensions than the value, and refuse it.
        if target[:-1] != source[:-1][: len(target) - 1]:
            return None
    binding = _C.Binding(
        td,
        parts,
        TensorDict,
        in_keys,
        out_keys,
        # By `shapes` a value may have any number of dimensions.
        [None if e.key.shape is not None else e.value.ndim - batch_dims for e in known],
        [e.value.dtype for e in known],
        functional.leaves_of(moments),
        shared,
        entries,
        [pair for pair in zip(now, found.given, strict=True) if pair[0] is not None],
    )
    return binding, store.lock, users_lock, [m.sum.ndim for m in moments]
