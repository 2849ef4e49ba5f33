# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics that several processes update.

Two ways lead to them. ``EnvCreator`` carries the state's tensors and the transform's
``lock`` to its workers. ``VecNorm.build_td_for_shared_vecnorm`` makes a tensordict that
carries its own lock, so that whoever has the tensordict can update it safely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.tensor_specs import Composite, TensorSpec

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.names import StateNames

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

#: The entry of a shared tensordict that holds its lock.
MUTEX = "_vecnorm_mutex"

#: Seconds after which a lock that nobody gives back is reported.
LOCK_TIMEOUT = 60.0


class StateLock:
    """Holds the transform's lock and, where there is one, the tensordict's own.

    Args:
        lock: a ``multiprocessing`` lock, or None.
        mutex: the uint8 tensor of a shared tensordict that holds its lock, or None.
    """

    __slots__ = ("lock", "mutex")

    def __init__(self, lock, mutex: Tensor | None) -> None:
        self.lock = lock
        self.mutex = mutex

    def __enter__(self) -> None:
        if self.lock is not None:
            self.lock.acquire()
        if self.mutex is not None:
            try:
                taken = _C.mutex_acquire(self.mutex, LOCK_TIMEOUT)
                if not taken:
                    raise TimeoutError(
                        "the lock of the shared statistics was not given back for "
                        f"{LOCK_TIMEOUT:.0f} s; is the process that holds it stopped?"
                    )
            except BaseException:
                if self.lock is not None:
                    self.lock.release()
                raise

    def __exit__(self, *_) -> None:
        if self.mutex is not None:
            _C.mutex_release(self.mutex)
        if self.lock is not None:
            self.lock.release()


def _step_keys(spec: Composite, keys: Sequence[NestedKey]) -> list[NestedKey]:
    """``keys`` with "next" resolved, each relative to the step's output."""
    selected: list[NestedKey] = []
    for key in keys:
        key = unravel_key(key)
        if key == "next":
            selected += [
                leaf
                for leaf, leaf_spec in spec.items(True, True)
                if leaf_spec.dtype.is_floating_point
            ]
            continue
        if isinstance(key, tuple) and key[0] == "next":
            key = unravel_key(key[1:])
        if key not in spec.keys(True, True):
            raise KeyError(
                f"key {key!r} is not an entry of the step's output; "
                f"it has {list(spec.keys(True, True))}"
            )
        selected.append(key)
    return list(dict.fromkeys(selected))


def _features(env: EnvBase, key: NestedKey, spec: TensorSpec) -> torch.Size:
    features = spec.shape[len(env.batch_size) :]
    if -1 in features:
        raise ValueError(
            f"key {key!r}: expected features of one shape, got {tuple(features)}: entries "
            "of different shapes are stacked there"
        )
    return features


def build_td(
    env: EnvBase, keys: Sequence[NestedKey] | None, memmap: bool
) -> TensorDictBase:
    """See :meth:`VecNorm.build_td_for_shared_vecnorm`."""
    keys = ["next"] if keys is None else keys
    keys = [keys] if isinstance(keys, (str, tuple)) else keys
    spec = env.full_observation_spec.clone()
    spec.update(env.full_reward_spec.clone())
    td = TensorDict({}, batch_size=[])
    for key in _step_keys(spec, keys):
        names = StateNames.of(key)
        for name, leaf in zip(
            names, Moments.zeros(_features(env, key, spec[key])), strict=True
        ):
            td.set(name, leaf)
    td.set(MUTEX, torch.zeros(_C.mutex_size(), dtype=torch.uint8))
    td = td.memmap_() if memmap else td.share_memory_()
    # Only here: sharing moves the bytes, and a mutex must not be moved.
    _C.mutex_init(td.get(MUTEX))
    return td
