# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where statistics live, and what protects them there."""

from __future__ import annotations

import multiprocessing.context
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch.compiler import is_compiling

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics import sharing
from torchrl_vecnorm.statistics.checks import settled
from torchrl_vecnorm.statistics.control import Attached
from torchrl_vecnorm.statistics.entries import get_entry, read_moments, write_moments
from torchrl_vecnorm.statistics.locks import Lock, Session
from torchrl_vecnorm.statistics.modes import is_stale, outside
from torchrl_vecnorm.statistics.names import StateNames
from torchrl_vecnorm.syncing import Since

#: Why statistics that were shared elsewhere are not shared here.
COPIED = (
    "the statistics are copied, so that updates of whoever else has them are not seen "
    "here, and the other way round. They are not shared: this transform was not given the "
    "lock that they are updated under, or they were not in shared memory when this process "
    "was started. Share them through EnvCreator (call it once before processes are forked) "
    "or VecNorm.build_td_for_shared_vecnorm; where a copy is what you want, load "
    "`consistent_state_dict()`."
)


class Store:
    """The moments of some keys in a tensordict: private, shared, mapped or adopted.

    Attributes:
        td: the moments, None before any data came.
        names: of the entries of each set of moments, those that are not there yet too.
        lock: what updates are made under, ours or the user's.
        timeout: seconds to wait for it.
        others_update: whether the statistics came from elsewhere, in shared memory:
            others may update them, so they stay where they are. The leaves cannot tell:
            CUDA tensors always say that they are shared, memory maps never do.
        attached: the leaves behind a control block, where there is one.
        lock_is_own: whether nobody else can have the lock.
        lock_was_set: whether it was set since the construction.
        since: of each set of moments what it was when several had the same, and how much of
            that is left; see :mod:`torchrl_vecnorm.syncing`. Empty where nothing was
            loaded, and nothing joined.
    """

    def __init__(
        self, td: TensorDictBase | None, lock: Any, names: Sequence[StateNames]
    ) -> None:
        self.td = td
        self.names = names
        self.lock = Lock() if lock is None else lock
        self.timeout = 0.0
        self.others_update = td is not None
        self.attached: Attached | None = None
        self.lock_is_own = lock is None
        self.lock_was_set = False
        self.since: dict[StateNames, Since] = {}

    # ----------------------------------------------------------------- the moments

    def moments(self, names: StateNames) -> Moments | None:
        """The live moments of a key, or None where there are none yet."""
        return read_moments(self.td, names)

    def seen(self) -> Iterator[tuple[StateNames, Moments]]:
        """What there is."""
        for names in self.names:
            moments = self.moments(names)
            if moments is not None:
                yield names, moments

    def rebase(self) -> None:
        """Notes that others go on from these statistics too, as they are."""
        # Clones have the same dictionary, as they have the same statistics.
        self.since.clear()
        self.since.update({names: Since(moments) for names, moments in self.seen()})

    def in_shared_memory(self) -> bool:
        """Whether other processes may see the statistics."""
        return self.td is not None and any(
            sharing.in_shared_memory(get_entry(self.td, names.sum))
            for names in self.names
        )

    def add(self, new: dict[StateNames, Moments]) -> None:
        """Makes new and moved moments those of the tensordict."""
        # What was there before may be others' already, with the lock as it is.
        was_shared = not is_compiling() and self.in_shared_memory()
        td = TensorDict({}, batch_size=[]) if self.td is None else self.td
        for names, moments in new.items():
            write_moments(td, names, moments)
        self.td = td
        if is_compiling() or self.others_update:
            return
        if not was_shared or not self.in_shared_memory():
            self.reserve()

    def check_room(self, key: NestedKey) -> None:
        """Refuses a new key where the tensordict takes none."""
        if self.td is not None and self.td.is_locked:
            raise KeyError(
                f"VecNorm: the statistics have no entries for key {key!r} and are "
                f"locked, they have {sorted(map(str, self.td.keys(True, True)))}"
            )

    def follow(self, moments: Moments, device: torch.device) -> Moments:
        """Moments where they can be updated with values of a device, or a copy."""
        if moments.sum.device != device or is_stale(moments.sum):
            return moments.to(device, copy=True)
        return moments

    def move(
        self, names: StateNames, moments: Moments, device: torch.device
    ) -> Moments:
        """Brings the moments of a key to a device, for all that have this tensordict."""
        moved = self.follow(moments, device)
        if moved is not moments:
            write_moments(self.td, names, moved)
            if not is_compiling() and not self.in_shared_memory():
                self.reserve()
        return moved

    # --------------------------------------------------------------------- locking

    def set_lock(self, lock: Any) -> None:
        """Takes a lock that others have.

        That says that others update, under this lock, the statistics that are loaded
        next: so does EnvCreator.
        """
        self.lock = lock
        self.lock_is_own, self.lock_was_set = False, True

    def reserve(self) -> None:
        """Makes our lock's journal long enough, while nobody else can have it yet."""
        if isinstance(self.lock, Lock) and self.td is not None:
            leaves = sharing.leaves_of(self.td)
            if all(leaf.device.type == "cpu" for leaf in leaves.values()):
                with outside():
                    self.lock.reserve(leaves)

    def protection(self) -> tuple[Any, _C.SharedState | None]:
        """The user's lock and the statistics' own, None where there is none.

        Brings ``attached`` up to date: what others may see is only changed through it.
        """
        ours = self.lock if isinstance(self.lock, Lock) else None
        users = self.lock if ours is None else None
        control = None if self.td is None else get_entry(self.td, sharing.CONTROL)
        if control is None and ours is not None and self.in_shared_memory():
            control = ours.control
        if control is None:
            self.attached = None
            return users, None if ours is None else ours.state
        if self.attached is None or not self.attached.is_of(control, self.td):
            names = [name for entries in self.names for name in entries]
            self.attached = Attached(control, self.td, names)
            if ours is not None and ours.is_carried:
                self.attached.warn_without_journal()
        return users, self.attached.state

    @contextmanager
    def session(self) -> Iterator[Session | None]:
        """Holds the locks; None in a compiled graph, where they mean nothing."""
        if is_compiling():
            yield None
            return
        _C.leave_the_pool_after_fork()  # a session may run torch's own operators
        while True:
            users, shared = self.protection()
            with Session(users, shared, self.timeout) as session:
                # Another thread may have replaced the statistics while this one waited.
                if self.protection() == (users, shared):
                    yield session
                    return

    # ---------------------------------------------------------- copies and pickles

    def __copy__(self) -> Store:
        # Of the same statistics, so under the same lock.
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["attached"] = None
        state["others_update"] = True  # if it is the same memory there
        if any(sharing.is_mapped(moments.sum) for _, moments in self.seen()):
            state["td"] = self.td.apply(sharing.portable)
        # A multiprocessing lock can only be handed to a process that is being started.
        if multiprocessing.context.get_spawning_popen() is not None:
            if any(moments.sum.is_cuda for _, moments in self.seen()):
                if self.others_update:
                    raise RuntimeError(f"VecNorm: shared_td: {sharing.CUDA_OF_OTHERS}")
                # A copy: no GPU has a lock that outlives a process that is killed.
                state["td"] = self.td.apply(lambda leaf: leaf.cpu())
                state["others_update"] = False
        else:
            lock = state.pop("lock")
            state["control"] = lock.control if isinstance(lock, Lock) else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        control = state.pop("control", None)
        self.since = {}  # of a pickle that is older
        self.__dict__.update(state)
        # To a process that is started, and through a queue, the statistics come as the
        # same memory, and so does our lock. Copies, and those from a file, are alone.
        self.others_update &= self.in_shared_memory()
        self.lock_is_own = False
        self.lock_was_set = False
        if "lock" not in state:
            has_lock = self.others_update and control is not None
            if has_lock and control.is_shared():
                self.lock = Lock.of(control)
            else:
                self.lock = Lock()
                self.lock_is_own = True
                if self.others_update and sharing.CONTROL not in self.td.keys():
                    self._leave_alone()
        if not self.others_update:
            if self.td is not None and sharing.CONTROL in self.td.keys():
                self.td = self.td.exclude(sharing.CONTROL)  # of the original
            self.reserve()  # EnvCreator may share the copy next

    def _leave_alone(self) -> None:
        """Makes a copy of shared statistics, whose lock could not be sent here."""
        warnings.warn(
            f"VecNorm: {COPIED} A lock of multiprocessing comes to a process only when "
            "that is started.",
            stacklevel=3,
        )
        td = TensorDict({}, batch_size=[])
        for names, moments in self.seen():
            entries = [str(name) for name in names]
            write_moments(
                td,
                names,
                settled(entries, moments, moments.sum.shape, moments.count.numel()),
            )
        self.td = td
        self.others_update = False
