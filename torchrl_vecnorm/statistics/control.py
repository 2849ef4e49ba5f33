# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The control block of shared statistics: their lock and their journal, one tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.names import StateNames, as_path
from torchrl_vecnorm.statistics.sharing import in_shared_memory, is_mapped, leaves_of


def note_of(leaves: dict[str, Tensor]) -> str:
    """What the entries were, for whoever attaches to a file."""
    return json.dumps(
        {name: [str(v.dtype), list(v.shape)] for name, v in leaves.items()}
    )


def new_control(leaves: dict[str, Tensor], note: str = "") -> Tensor:
    """Memory for one with a journal of these leaves; ``SharedState.init`` makes it one."""
    size = _C.SharedState.size_for(list(leaves), list(leaves.values()), note)
    return torch.zeros(size, dtype=torch.uint8, device="cpu")


def read_note(control: Tensor) -> tuple[str, dict[str, list]]:
    """The note, and what it says.

    Raises:
        RuntimeError: there is no control block, or its note makes no sense.
    """
    state = _C.SharedState(control, [], [])
    try:
        note = state.note
        built = json.loads(note) if note else {}
        good = isinstance(built, dict) and all(
            isinstance(dtype, str) and isinstance(shape, list)
            for dtype, shape in built.values()
        )
    except (ValueError, TypeError):  # also UnicodeDecodeError
        good = False
    if not good:
        raise RuntimeError("expected the names, dtypes and shapes of the entries in it")
    return note, built


#: Of ``Control::Header`` (csrc/shared/control.cpp): words of 8 bytes, then the lock.
_CONSTANT = {
    "magic": 0,
    "byte order": 1,
    "kind of lock": 2,
    "length of the note": 4,
    "begin of the journal": 5,
    "length of the journal": 6,
}
_USED, _STATE, _LOCK = 7, 8, 10


def _hash(name: str) -> int:
    """FNV-1a, as the names of entries are in the journal."""
    value = 14695981039346656037
    for byte in name.encode():
        value = (value ^ byte) * 1099511628211 % 2**64
    return value - 2**64 if value >= 2**63 else value


def check_block(control: Tensor, note: str, leaves: dict[str, Tensor]) -> None:
    """Refuses a control block that is not as this package leaves it.

    What is in it is used to find places in memory.

    Raises:
        RuntimeError: what was expected, and what is there.
    """

    def expect(good: bool, what: str, expected: Any, got: Any) -> None:
        if not good:
            raise RuntimeError(f"expected {what} {expected}, got {got}")

    fresh, another = (new_control(leaves, note) for _ in range(2))
    expect(len(control) == len(fresh), "a size of", len(fresh), len(control))
    words = control.view(torch.int64)
    for new in (fresh, another):
        _C.SharedState.init(new, note)
    fresh, another = fresh.view(torch.int64), another.view(torch.int64)
    for what, at in _CONSTANT.items():
        expect(words[at] == fresh[at], f"the {what} to be", fresh[at], words[at])
    length = int(words[_CONSTANT["length of the journal"]])
    # In this order: another process may be in its first update.
    state, used = int(words[_STATE]), int(words[_USED])
    expect(used in (0, length), "a journal of length", f"0 or {length}", used)
    expect(state in ((0, 1, 2) if used else (0,)), "a state of", "0, 1 or 2", state)
    begin = int(words[_CONSTANT["begin of the journal"]]) // 8
    # Of the lock, what no owner changes: its kind.
    lock, kind, same = (
        block[_LOCK : begin - (len(note.encode()) + 7) // 8].view(torch.int32)
        for block in (words, fresh, another)
    )
    is_kind = (kind == same) & (kind != 0)
    got, kind = lock[is_kind].tolist(), kind[is_kind].tolist()
    expect(got == kind, "a lock of kind", kind, got)
    for name, leaf in leaves.items() if used else ():
        record = [_hash(name), leaf.nbytes]
        expect(
            words[begin : begin + 2].tolist() == record,
            f"the journal's record of {name!r} to be",
            record,
            words[begin : begin + 2].tolist(),
        )
        begin += 2 + (leaf.nbytes + 7) // 8


class Attached:
    """The statistics of a tensordict behind a control block.

    Args:
        control: the control block.
        td: the statistics.
        names: the entries that belong to ``control``, where it does not say so itself.
            Those that are not in shared memory are this process's own and stay out.

    Raises:
        RuntimeError: ``control`` is not a control block of this kind of machine.
    """

    def __init__(
        self, control: Tensor, td: TensorDictBase, names: Iterable[NestedKey] = ()
    ) -> None:
        self.control = control
        #: The entries that the tensordict was built with: dtype and shape of each.
        self.built = read_note(control)[1]
        wanted = self.built or {"/".join(as_path(name)) for name in names}
        self.leaves = {
            name: leaf
            for name, leaf in leaves_of(td).items()
            if name in wanted and in_shared_memory(leaf)
        }
        names = list(self.leaves)
        self.state = _C.SharedState(control, names, list(self.leaves.values()))
        #: A file's journal says what was last written to it.
        self.updates_in_place = not is_mapped(control)
        self._copies = dict(zip(names, self.state.copies, strict=True))

    def warn_without_journal(self) -> None:
        """Says that a process that is killed in an update may leave half of it."""
        if not self.state.has_journal:
            warnings.warn(
                "VecNorm: the journal of shared statistics has no room for "
                f"{list(self.leaves)}: their lock was sent to other processes before all "
                "of them were there. A process that is killed in an update may leave "
                "half of it. Call the transform on all of its keys before it is shared.",
                RuntimeWarning,
                stacklevel=2,
            )

    def is_of(self, control: Tensor, td: TensorDictBase) -> bool:
        """Whether nothing was replaced since."""
        leaves = leaves_of(td)
        return control is self.control and all(
            leaves.get(name) is leaf for name, leaf in self.leaves.items()
        )

    def copy_of(self, moments: Moments, names: StateNames) -> Moments:
        """The private copies of a key's moments; what is not shared stays as it is."""
        found = []
        for name, leaf in zip(names, moments, strict=True):
            flat = "/".join(as_path(name))
            # A leaf that has moved meanwhile is not shared any more.
            is_ours = leaf is not None and self.leaves.get(flat) is leaf
            found.append(self._copies[flat] if is_ours else leaf)
        return Moments(*found)
