# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The locks that statistics are updated under."""

from __future__ import annotations

import multiprocessing
from multiprocessing import synchronize
from typing import Any

from torch import Tensor

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.statistics.control import new_control

#: Seconds after which a lock that nobody gives back is reported.
LOCK_TIMEOUT = 60.0


class Lock(synchronize.Lock):
    """A ``multiprocessing`` lock that outlives whoever holds it.

    ``EnvCreator`` carries it to its workers, as any ``Lock`` that a transform has, and
    with it the journal of the statistics (``csrc/shared/control.h``): a worker that is
    killed blocks nobody and leaves no update half done.
    """

    def __init__(self) -> None:
        super().__init__(ctx=multiprocessing.get_context())
        self.is_carried = False  # to another process
        self.reserve({})

    def reserve(self, leaves: dict[str, Tensor]) -> None:
        """Makes the journal long enough for these tensors.

        Only before anybody else has the lock: whoever has it would keep the old one.
        """
        if self.is_carried:
            return
        self.control = new_control(leaves).share_memory_()
        _C.SharedState.init(self.control, "")
        self._attach()

    @classmethod
    def of(cls, control: Tensor) -> Lock:
        """The lock whose memory this is, in a process that got it some other way."""
        lock = cls.__new__(cls)
        synchronize.Lock.__init__(lock, ctx=multiprocessing.get_context())
        lock.is_carried = True
        lock.control = control
        lock._attach()
        return lock

    def _attach(self) -> None:
        self.state = _C.SharedState(self.control, [], [])
        self.acquire = self._acquire
        self.release = self.state.release

    def _acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """As ``multiprocessing.Lock.acquire``."""
        if not block:
            return self.state.try_acquire()
        try:
            self.state.acquire(1e9 if timeout is None else max(timeout, 0.0))
        except TimeoutError:
            return False
        return True

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_) -> None:
        self.release()

    def __getstate__(self) -> tuple:
        state = super().__getstate__(), self.control
        self.is_carried = True
        return state

    def __setstate__(self, state: tuple) -> None:
        base, self.control = state
        self.is_carried = True
        super().__setstate__(base)
        self._attach()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of shared statistics>"


def _acquire(lock: Any, timeout: float) -> None:
    """Takes a user's lock, which nobody can take from a process that died with it."""
    try:
        taken = lock.acquire(timeout=timeout)
    except TypeError:  # of a kind that waits for ever
        taken = lock.acquire()
    if taken is False:
        raise TimeoutError(
            f"VecNorm: the lock that was passed, {lock!r}, was not given back for "
            f"{timeout:g} s: was a process stopped or killed while it had it? The lock "
            "that a transform has by itself outlives that"
        )


class Session:
    """Holds what protects the statistics: a user's lock and their own.

    Args:
        lock: a ``multiprocessing`` lock, or None.
        shared: the statistics in shared memory, or a lock alone, or None.
        timeout: seconds to wait for each.

    Raises:
        TimeoutError: one of them was not given back in time.
    """

    __slots__ = ("lock", "shared", "timeout")

    def __init__(self, lock, shared: _C.SharedState | None, timeout: float) -> None:
        self.lock = lock
        self.shared = shared
        self.timeout = timeout

    def __enter__(self) -> Session:
        if self.lock is not None:
            _acquire(self.lock, self.timeout)
        if self.shared is not None:
            try:
                self.shared.acquire(self.timeout)
            except BaseException:
                if self.lock is not None:
                    self.lock.release()
                raise
        return self

    def __exit__(self, *_) -> None:
        if self.shared is not None:
            self.shared.release()
        if self.lock is not None:
            self.lock.release()

    def try_enter(self) -> bool:
        """Without waiting: False where somebody has one of them."""
        try:
            if self.lock is not None and self.lock.acquire(False) is False:
                return False
        except TypeError:  # of a kind that waits for ever
            return False
        taken = False
        try:
            taken = self.shared is None or self.shared.try_acquire()
        finally:
            if self.lock is not None and not taken:
                self.lock.release()
        return taken
