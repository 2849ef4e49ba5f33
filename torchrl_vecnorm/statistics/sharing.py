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

import json
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Sequence
from multiprocessing import synchronize
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from tensordict import MemoryMappedTensor, TensorDict, TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from torchrl.data.tensor_specs import Composite, TensorSpec

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.names import StateNames, as_path

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

#: The entry of a shared tensordict that holds its lock and its journal.
CONTROL = "_vecnorm_control"

#: Seconds after which a lock that nobody gives back is reported.
LOCK_TIMEOUT = 60.0

#: Why CUDA statistics are one process's own.
CUDA_OF_OTHERS = (
    "expected CPU tensors for statistics that several processes share, got a CUDA "
    "tensor: a GPU has no lock that outlives a process that is killed. Keep shared "
    "statistics on the CPU (`td.cpu().share_memory_()`): values may be on any GPU, only "
    "their moments travel. For statistics of this process alone, pass a copy "
    "(`td.clone()`)"
)


# ---------------------------------------------------------------------------- leaves


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


def _note(leaves: dict[str, Tensor]) -> str:
    """What the entries were, for whoever attaches to a file."""
    return json.dumps(
        {name: [str(v.dtype), list(v.shape)] for name, v in leaves.items()}
    )


# ------------------------------------------------------------------------------ locks


def _control(leaves: dict[str, Tensor], note: str = "") -> Tensor:
    size = _C.SharedState.size_for(list(leaves), list(leaves.values()), note)
    return torch.zeros(size, dtype=torch.uint8, device="cpu")


def _read_note(control: Tensor) -> tuple[str, dict[str, list]]:
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


def _check_block(control: Tensor, note: str, leaves: dict[str, Tensor]) -> None:
    """Refuses a control block that is not as this package leaves it.

    What is in it is used to find places in memory.

    Raises:
        RuntimeError: what was expected, and what is there.
    """

    def expect(good: bool, what: str, expected: Any, got: Any) -> None:
        if not good:
            raise RuntimeError(f"expected {what} {expected}, got {got}")

    fresh, another = (_control(leaves, note) for _ in range(2))
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
    expect(state in ((0, 1) if used else (0,)), "a state of", "0 or 1", state)
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
        self.control = _control(leaves).share_memory_()
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
        self.built = _read_note(control)[1]
        wanted = self.built or {"/".join(as_path(name)) for name in names}
        self.leaves = {
            name: leaf
            for name, leaf in leaves_of(td).items()
            if name in wanted and in_shared_memory(leaf)
        }
        names = list(self.leaves)
        self.state = _C.SharedState(control, names, list(self.leaves.values()))
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
        note, built = _read_note(control)
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
        _check_block(control, note, {name: leaves[name] for name in built})
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


# --------------------------------------------------------------------------- building


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
    env: EnvBase, keys: Sequence[NestedKey] | None, memmap: bool | str | os.PathLike
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
            names,
            Moments.zeros(_features(env, key, spec[key]), device="cpu"),
            strict=True,
        ):
            td.set(name, leaf)
    leaves = leaves_of(td)
    note = _note(leaves)
    td.set(CONTROL, _control(leaves, note))
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
