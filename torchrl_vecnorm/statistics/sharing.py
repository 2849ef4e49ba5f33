# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Tensors that several processes see.

Two ways lead to shared statistics. ``EnvCreator`` carries the state's tensors and the
transform's ``lock`` to its workers. ``VecNorm.build_td_for_shared_vecnorm`` makes a
tensordict that carries its own lock, so that whoever has the tensordict can update it
safely.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from tensordict import MemoryMappedTensor, TensorDictBase
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.statistics.names import as_path

#: The entry of a shared tensordict that holds its lock and its journal.
CONTROL = "_vecnorm_control"

#: Why CUDA statistics are one process's own.
CUDA_OF_OTHERS = (
    "expected CPU tensors for statistics that several processes share, got a CUDA "
    "tensor: a GPU has no lock that outlives a process that is killed. Keep shared "
    "statistics on the CPU (`td.cpu().share_memory_()`): values may be on any GPU, only "
    "their moments travel. For statistics of this process alone, pass a copy "
    "(`td.clone()`)"
)


def in_shared_memory(leaf: Any) -> bool:
    """Whether it is a tensor and other processes may see what is written to it."""
    return (
        isinstance(leaf, Tensor)
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and (leaf.is_shared() or isinstance(leaf, MemoryMappedTensor))
    )


def is_mapped(leaf: Tensor) -> bool:
    """Whether it is a memory map."""
    return isinstance(leaf, MemoryMappedTensor)


class _Portable(MemoryMappedTensor):
    """A memory map that is sent to processes as such, and saved and copied by value.

    Others are saved as the name of their file, or not at all.
    """

    def _copy(self) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: int):
        return self._copy().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self._copy())


def _send(leaf: _Portable):
    rebuild, arguments = leaf.__reduce__()
    return getattr(MemoryMappedTensor, rebuild.__name__), arguments


# What multiprocessing sends is pickled by this, before `__reduce_ex__` is asked.
ForkingPickler.register(_Portable, _send)


def portable(leaf: Tensor) -> Tensor:
    """The same memory, as something that can be saved: see :class:`_Portable`."""
    if not is_mapped(leaf):
        return leaf
    alias = leaf.as_subclass(_Portable)
    alias.__dict__.update(leaf.__dict__)
    return alias


#: Which lock the statistics of a state_dict are updated under, and in which process.
_locks = WeakTensorKeyDictionary()


def note_lock(leaves: Iterable[Tensor], lock: Any) -> None:
    """Remembers the lock of statistics that are given away."""
    for leaf in leaves:
        _locks[leaf] = lock, os.getpid()


def is_under(leaf: Any, lock: Any, private_too: bool) -> bool:
    """Whether a tensor may be updated by all that have this lock.

    In shared memory, and if known here then with this lock; ``private_too``: or the
    statistics of another transform of this process with this lock.
    """
    if not isinstance(leaf, Tensor):
        return False
    its_lock, process = _locks.get(leaf, (lock, None))
    if its_lock is not lock:
        return False
    return in_shared_memory(leaf) or (private_too and process == os.getpid())


def leaves_of(td: TensorDictBase) -> dict[str, Tensor]:
    """The entries that belong to the statistics, in an order that all agree on."""
    found = {
        "/".join(as_path(key)): leaf
        for key, leaf in td.items(True, True)
        if key != CONTROL
    }
    return dict(sorted(found.items()))


def refuse_cuda_of_others(leaves: dict[str, Tensor]) -> None:
    """Refuses statistics on a GPU that another process has sent.

    Raises:
        RuntimeError: naming the entry and the reason.
    """
    for name, leaf in leaves.items():
        if _C.came_from_another_process(leaf):
            raise RuntimeError(f"VecNorm: entry {name!r}: {CUDA_OF_OTHERS}")
