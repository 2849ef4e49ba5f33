# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Loading statistics: what a state_dict has, and how it becomes ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.checks import check_moments
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics import sharing
from torchrl_vecnorm.statistics.checks import (
    check_apart,
    check_usable,
    patiently,
    settled,
)
from torchrl_vecnorm.statistics.control import Attached
from torchrl_vecnorm.statistics.entries import (
    copy_moments,
    without_counter,
    write_moments,
)
from torchrl_vecnorm.statistics.keys import Key
from torchrl_vecnorm.statistics.layouts import kept_names
from torchrl_vecnorm.statistics.locks import Session
from torchrl_vecnorm.statistics.store import COPIED

if TYPE_CHECKING:
    from torchrl_vecnorm.statistics.engine import Statistics

#: Of each key in a state_dict: the names of its entries, and its moments.
Found = Mapping[NestedKey, tuple[Sequence[str], Moments]]


def find_statistics(statistics: Statistics, state: Mapping[str, Tensor]) -> Found:
    """The entries of each of our keys in a state_dict.

    Raises:
        KeyError: an entry is missing.
        ValueError: it is none, or an entry of V2's makes no sense.
    """
    if not isinstance(state, Mapping | TensorDictBase):
        raise ValueError(
            "VecNorm: expected a dict of tensors as state, as `state_dict()` gives "
            f"it, got {type(state).__name__}"
        )
    if isinstance(state, TensorDictBase):
        state = {
            statistics.flat_name(name): leaf
            for name, leaf in state.items(True, True)
            if name != sharing.CONTROL
        }
    found = {}
    rest = set(state)
    in_keys = statistics.in_keys
    for key in statistics.keys:
        layouts = statistics.layouts(key)
        layout = next((one for one in layouts if rest.intersection(one.present)), None)
        if layout is None:
            continue
        for name in layout.required:
            if name not in rest:
                raise KeyError(
                    f"VecNorm: the state_dict has no entry {name!r}; "
                    f"it has {sorted(map(str, state))}"
                )
        for other in layouts:
            rest = rest.difference(other.present)
        rest = rest.difference(kept_names(key.in_key))
        found[key.in_key] = layout.names, layout.read(*map(state.get, layout.present))
    if state and not found:
        raise KeyError(
            f"VecNorm: the state_dict has no statistics of any of the keys "
            f"{in_keys}; it has {sorted(map(str, state))}"
        )
    lacking = [key.in_key for key in statistics.keys if key.in_key not in found]
    for key, _ in statistics.seen():
        if key.in_key in lacking:
            raise KeyError(
                f"VecNorm: the state_dict has no statistics of key "
                f"{key.in_key!r}; it has {sorted(map(str, state))}"
            )
    if lacking:
        warnings.warn(
            f"VecNorm: the state_dict has no statistics of {lacking}: they begin "
            f"with the first values. It has {sorted(map(str, state))}",
            stacklevel=4,
        )
    if rest:
        warnings.warn(
            f"VecNorm: the state_dict has entries {sorted(map(str, rest))}, which are "
            f"of no key of this transform, {in_keys}: they are ignored.",
            stacklevel=4,
        )
    return found


# ------------------------------------------------------- the three ways of loading


def is_shared_with_us(statistics: Statistics, found: Found) -> bool:
    """Whether these are statistics that all update under the lock that we have.

    So does EnvCreator share: it sets the lock of a new transform, then has it load
    the tensors. Before, the transform may have loaded a checkpoint.
    """
    store = statistics.store
    if store.others_update or not (store.td is None or store.lock_was_set):
        return False
    leaves = [v for _, moments in found.values() for v in moments if v is not None]
    if not leaves:
        return False
    if not store.lock_is_own and all(
        sharing.is_under(leaf, store.lock, store.lock_was_set) for leaf in leaves
    ):
        return True
    if store.lock_was_set or any(map(sharing.in_shared_memory, leaves)):
        warnings.warn(f"VecNorm: {COPIED}", stacklevel=4)
    return False


def adopt(statistics: Statistics, found: Found) -> None:
    """Makes statistics that others update ours, as they are."""
    store = statistics.store
    check_apart(moments for _, moments in found.values())
    td = TensorDict({}, batch_size=[])
    is_new = False
    for key in statistics.keys:
        if key.in_key not in found:
            continue
        names, moments = found[key.in_key]
        check_usable(names, moments)
        sharing.refuse_cuda_of_others({str(key.in_key): moments.sum})
        write_moments(td, key.names, moments)
    before = store.td, store.attached
    store.td = td
    try:
        check_live(statistics, {k: names for k, (names, _) in found.items()})
    except BaseException:
        store.td, store.attached = before
        raise
    for leaf in td.values(True, True):
        if leaf.device.type == "cpu" and not sharing.in_shared_memory(leaf):
            leaf.share_memory_()
            is_new = True
    statistics.binding = None
    store.since = {}
    store.others_update = store.in_shared_memory()
    if is_new:  # or others have the lock already
        store.reserve()


def load_new(statistics: Statistics, found: Found) -> None:
    """Makes statistics of our own, with the values that were loaded."""
    if not found:
        return
    td = TensorDict({}, batch_size=[])
    for key in statistics.keys:
        if key.in_key not in found:
            continue
        names, moments = found[key.in_key]
        moments = settled(names, moments, key.shape, statistics.counts)
        sharing.refuse_cuda_of_others({str(key.in_key): moments.sum})
        ours = statistics.zeros(moments.sum.shape, moments.sum.device)
        copy_moments(ours, moments)
        # EnvCreator may share them next.
        for leaf in ours:
            if leaf is not None:
                leaf.share_memory_()  # of a CUDA tensor: nothing to do
        write_moments(td, key.names, ours)
    statistics.store.td = td
    statistics.store.reserve()


def load_in_place(statistics: Statistics, found: Found) -> None:
    """Writes the values that were loaded into the statistics that are there."""
    with statistics.session():
        attached = statistics.store.attached
        if attached is not None:
            attached.state.load()
        # Under the lock: what is loaded may be these very statistics.
        loaded = [
            (key, _fit(statistics, key, *found[key.in_key]))
            for key in statistics.keys
            if key.in_key in found
        ]
        for key, moments in loaded:
            write(statistics, key, moments, attached)
        if attached is not None:
            attached.state.commit()


def _fit(
    statistics: Statistics, key: Key, names: Sequence[str], moments: Moments
) -> Moments:
    """The values as the statistics that are there can hold them."""
    current = statistics.store.moments(key.names)
    if current is None:
        return settled(names, moments, key.shape, statistics.counts)
    features = current.sum.shape
    moments = settled(names, moments, features, statistics.counts)
    is_counted = current.nonfinite is not None
    if not is_counted:
        moments = without_counter(moments)
    if not is_counted or current.sum.dtype != moments.sum.dtype:
        # In float32 large statistics may be infinite.
        as_here = (
            None if new is None else new.to((new if old is None else old).dtype)
            for new, old in zip(moments, current, strict=True)
        )
        check_moments(names, Moments(*as_here), features, counts=statistics.counts)
    return moments


def write(
    statistics: Statistics, key: Key, moments: Moments, attached: Attached | None
) -> None:
    """Makes the values those of the statistics; with the lock held."""
    store = statistics.store
    state = store.moments(key.names)
    if state is None:
        # Seen where the state_dict comes from, not here yet.
        state = statistics.zeros(moments.sum.shape, moments.sum.device)
        write_moments(store.td, key.names, state)
    elif not store.others_update:
        # Where it is, as something that can be written to.
        state = store.move(key.names, state, state.sum.device)
    if attached is not None:
        state = attached.copy_of(state, key.names)
    copy_moments(state, moments)


def check_live(
    statistics: Statistics, names: Mapping[NestedKey, Sequence[str]]
) -> None:
    """Refuses shared statistics that no data can have given.

    Under their lock; where somebody has that, they may be in an update.

    Args:
        statistics: what has them.
        names: of the entries of each key, for the message.
    """
    _C.leave_the_pool_after_fork()
    session = Session(*statistics.store.protection(), statistics.lock_timeout)
    is_held = session.try_enter()

    counts = statistics.counts

    def check() -> None:
        for key, state in statistics.seen():
            # A count made by hand may be [].
            state = state._replace(count=torch.atleast_1d(state.count))
            check_moments(names[key.in_key], state, key.shape, not is_held, counts)

    try:
        # A process of torchrl's class may know of another lock, or of none.
        patiently(check)
        if is_held:  # else there are updates already, which are not those of others
            statistics.store.rebase()
    finally:
        if is_held:
            session.__exit__()
