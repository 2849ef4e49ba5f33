# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A tensordict of statistics that several processes update: building and checking it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.checks import REQUIRED
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.checks import check_usable
from torchrl_vecnorm.statistics.control import (
    Attached,
    check_block,
    new_control,
    note_of,
    read_note,
)
from torchrl_vecnorm.statistics.entries import read_moments
from torchrl_vecnorm.statistics.keys import Key
from torchrl_vecnorm.statistics.names import StateNames
from torchrl_vecnorm.statistics.sharing import (
    CONTROL,
    in_shared_memory,
    is_mapped,
    leaves_of,
    refuse_cuda_of_others,
)


def _file_of(leaf: Any) -> str | None:
    """The file of a memory map that has one."""
    try:
        return str(leaf.filename)
    except (AttributeError, RuntimeError):
        return None


_ADVICE = "restore a copy of the folder that it is in, or build it anew"


def advise(text: str, td: TensorDictBase) -> str:
    """The message of an error with the files of the entries that it names."""
    found = []
    for name, leaf in td.items(True, True):
        at, file = text.find(repr(name)), _file_of(leaf)
        if at >= 0 and file is not None:
            found.append((at, file))
    if not found:
        return text
    return f"{text} (in {', '.join(file for _, file in sorted(found))}): {_ADVICE}"


def check_file(name: NestedKey, leaf: Tensor) -> None:
    """Refuses an entry whose file has become shorter: reading it would kill the process.

    Raises:
        RuntimeError: naming the entry and the file.
    """
    path = _file_of(leaf)
    if path is None or not os.path.exists(path):
        return
    size, expected = os.path.getsize(path), leaf.untyped_storage().nbytes()
    if size < expected:
        raise RuntimeError(
            f"shared_td: entry {name!r}: expected a file of {expected} bytes, got {size}: "
            f"was {path!r} truncated? Then {_ADVICE}"
        )


def check_td(td: TensorDictBase, has_lock: bool) -> None:
    """Refuses a shared tensordict that is not what it was when it was built.

    Args:
        td: the tensordict.
        has_lock: whether the user has given a lock for it.

    Raises:
        KeyError: an entry is missing.
        RuntimeError: an entry has another shape or dtype, or a file was truncated.
    """
    control = td.get(CONTROL, None)
    if control is None:
        # torchrl's layout has no such entry; what was built here, and mapped, has.
        leaves = leaves_of(td)
        is_ours = any(name.endswith("_nonfinite") for name in leaves)
        if is_ours and any(map(is_mapped, leaves.values())) and not has_lock:
            raise KeyError(
                f"shared_td: entry {CONTROL!r} is missing, which has the lock: was its file "
                "removed? Statistics that were mapped by hand need the argument `lock`"
            )
        return
    leaves = leaves_of(td)
    try:
        note, built = read_note(control)
        for name, (dtype, shape) in built.items():
            leaf = leaves.get(name)
            if leaf is None:
                raise KeyError(
                    advise(
                        f"shared_td: entry {name!r} is missing; by {CONTROL!r} it was "
                        f"built with {list(built)}",
                        td,
                    )
                )
            if str(leaf.dtype) != dtype or list(leaf.shape) != shape:
                raise RuntimeError(
                    f"entry {name!r}: expected {dtype} of shape {shape}, as by "
                    f"{CONTROL!r} it was built, got {leaf.dtype} of shape "
                    f"{list(leaf.shape)}"
                )
        check_block(control, note, {name: leaves[name] for name in built})
        attached = Attached(control, td)
        # Whoever has the lock has seen for itself. All zeros is a reset.
        if is_mapped(control) and attached.state.try_acquire():
            try:
                lost = attached.state.lost()
                is_reset = not any(leaf.any() for leaf in attached.leaves.values())
            finally:
                attached.state.release()
            if lost and not is_reset:
                raise RuntimeError(
                    f"entry {lost!r}: expected the values that were last written, got "
                    "zeros instead; was its file truncated?"
                )
    except (RuntimeError, TypeError, ValueError) as error:
        text = str(error)
        if not text.startswith("entry "):
            text = f"entry {CONTROL!r}: {text}"
        raise RuntimeError(advise(f"shared_td: {text}", td)) from None


def check_shared_td(shared_td: TensorDictBase, keys: list[Key], has_lock: bool) -> None:
    """Refuses a tensordict that is not shared, or not the statistics of these keys.

    Raises:
        RuntimeError: it is neither in shared memory nor a memmap, its files are damaged,
            or it is on a GPU and another process's.
        KeyError: it lacks the entries of a key.
        ValueError: an entry is none that a call could update where it is.
    """
    # What the tensordict says of itself is not to be trusted: `load_memmap` gives one that
    # denies it, `torch.load` one that claims it.
    for name, leaf in shared_td.items(True, True):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.device.type == "cpu" and not in_shared_memory(leaf):
            raise RuntimeError(
                "shared_td must be either in shared memory or a memmap tensordict; its "
                f"entry {name!r} is neither."
            )
        check_file(name, leaf)
    present = set(shared_td.keys(True, True))
    for key in keys:
        missing = [name for name in key.names[: len(REQUIRED)] if name not in present]
        if missing:
            raise KeyError(
                f"key {key.in_key!r} not present in the shared tensordict: it lacks "
                f"{missing}, its keys are {sorted(map(str, present))}"
            )
        check_usable(key.names, read_moments(shared_td, key.names))
    refuse_cuda_of_others(leaves_of(shared_td))
    check_td(shared_td, has_lock)


def build_shared_td(
    features: Mapping[NestedKey, Sequence[int]], memmap: bool | str | os.PathLike
) -> TensorDictBase:
    """Statistics of nothing, in shared memory, with a lock of their own.

    Args:
        features: the shape of the features of each key.
        memmap: whether they are a memory map, or the folder of one.

    Raises:
        FileExistsError: the folder has shared statistics already.
    """
    td = TensorDict({}, batch_size=[])
    for key, shape in features.items():
        moments = Moments.zeros(shape, device="cpu")
        for name, leaf in zip(StateNames.of(key), moments, strict=True):
            td.set(name, leaf)
    leaves = leaves_of(td)
    note = note_of(leaves)
    td.set(CONTROL, new_control(leaves, note))
    if memmap is False:
        td = td.share_memory_()
    elif memmap is True:
        td = td.memmap_()
    else:
        if os.path.exists(os.path.join(memmap, f"{CONTROL}.memmap")):
            raise FileExistsError(
                f"{str(memmap)!r} has shared statistics already, which may be in use: go "
                "on with them (TensorDict.load_memmap), or remove the folder"
            )
        td = td.memmap_(memmap)
    # Only here: sharing moves the bytes, and a mutex must not be moved.
    _C.SharedState.init(td.get(CONTROL), note)
    return td
