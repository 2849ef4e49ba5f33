# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The transform."""

from __future__ import annotations

import inspect
import math
import multiprocessing.context
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from numbers import Real
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torch import multiprocessing as mp
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import VecNorm as _TorchRLVecNorm
from torchrl.envs import VecNormV2
from torchrl.envs.transforms import Compose, ObservationNorm, Transform

from torchrl_vecnorm import _ops, functional, oracle
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics import sharing
from torchrl_vecnorm.statistics.checks import (
    bind,
    check_apart,
    check_moments,
    check_usable,
    copy_moments,
    from_v2,
    get_entry,
    patiently,
    read_moments,
    restore_moments,
    set_entry,
    settled,
    without_counter,
    write_moments,
)
from torchrl_vecnorm.statistics.names import StateNames, as_path
from torchrl_vecnorm.transforms import specs

if TYPE_CHECKING:
    from torchrl.envs import EnvBase
    from typing_extensions import Self


@dataclass
class _Key:
    """One in_key, and where its things are."""

    in_key: NestedKey
    out_key: NestedKey
    names: StateNames
    shape: torch.Size | None  # of the features, where the user gave it
    others: list[NestedKey]  # in_keys that share the statistics


@dataclass
class _Keys:
    """All in_keys, as they were when they were looked up."""

    given: tuple  # in_keys, out_keys, shapes, names
    inputs: list[_Key]  # one for each in_key
    sets: list[
        _Key
    ]  # one for each set of statistics, with the key that it is kept under
    mask_names: list[tuple[str, ...]]  # where `_step` may be for nested in_keys


@dataclass
class _Entry:
    """One key of one call."""

    key: _Key
    value: Tensor
    state: Moments | None  # None: nothing was seen, and nothing is learned now
    mask: Tensor | None  # bool [samples]: which samples count
    is_new: bool = False  # the state is not in the tensordict of the statistics yet


class _SignatureOfInit:
    """The signature of a class, or of a subclass: ``inspect`` would take __new__'s."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:  # calling it is not constructing it
            raise AttributeError("__signature__")
        return inspect.signature(MethodType(owner.__init__, owner))


class VecNorm(Transform):
    """Moving average normalization layer for torchrl environments.

    VecNorm keeps track of the summary statistics of a dataset to standardize it
    on-the-fly: it is ``torchrl.envs.transforms.VecNorm`` with one compiled operator
    for all keys of a call. If the transform is in 'eval' mode, the running statistics
    are not updated.

    Each call computes, with ``N`` the number of samples::

        sum   <- decay * sum   + Σ x
        ssq   <- decay * ssq   + Σ x²
        count <- decay * count + N
        loc   =  sum / count
        scale =  max(sqrt(max(ssq / count - loc², 0)), eps)
        y     =  (x - loc) / scale

    The statistics are float64. Values that are NaN or infinite are left out of them
    and counted, see :attr:`nonfinite`. Values keep their dtype; integers and bools come
    out in the default dtype.

    If multiple processes are running a similar environment, one can pass a
    TensorDictBase instance that is placed in shared memory: if so, every time the
    normalization layer is queried it will update the values for all processes that
    share the same reference. See :meth:`build_td_for_shared_vecnorm`.

    To use VecNorm at inference time and avoid updating the values with the new
    observations, one should substitute this layer by :meth:`to_observation_norm`, which
    does not follow this transform, or by :meth:`frozen_copy`, which does.

    Args:
        in_keys (sequence of NestedKey, optional): keys to be updated.
            Default: ``["observation", "reward"]``.
        out_keys (sequence of NestedKey, optional): destination keys. Defaults to
            ``in_keys``.
        shared_td (TensorDictBase, optional): a shared tensordict containing the entries
            ``<key>_sum``, ``<key>_ssq`` and ``<key>_count`` of each key, updated in
            place and in its own dtype. One on a GPU is for several transforms of one
            process.
        lock (mp.Lock, optional): a lock to prevent race conditions between processes.
            Defaults to a lock of its own. A transform that is given one shares what it
            loads from shared memory, see :meth:`set_extra_state`.
        decay (number, optional): decay rate of the moving average, in (0, 1], applied
            once a call. 1 never forgets. Default: 0.9999.
        eps (number, optional): lower bound of the running standard deviation, in the
            units of the values. Default: 1e-4.
        shapes (list of torch.Size, optional): the shape of the features of each in_key:
            the trailing dimensions of the entry, all others being samples. If not
            given, the features are all dimensions that do not belong to the
            tensordict's batch size.
        new_api (bool, optional): if ``True``, an instance of
            :class:`torchrl.envs.VecNormV2` is returned.
        lock_timeout (float, optional): seconds to wait for the lock of shared statistics
            before a TimeoutError names the process that holds it. Default: 60.
        names (mapping of NestedKey to NestedKey, optional): the key under whose name the
            statistics of an in_key are kept; by default its own. in_keys of one name
            share one set of statistics: a call folds the samples of all of them into it
            in one update, and normalises all with the result.

    Raises:
        ValueError: ``decay`` is not in (0, 1], ``eps`` is not positive, ``shapes`` or
            ``out_keys`` do not match ``in_keys`` in length, a key is given twice or is
            the name of another's statistics, ``names`` has a key that is no in_key;
            ``shared_td`` has entries of other shapes, or values that no data can have
            given.
        TypeError: ``decay``, ``eps`` or ``lock_timeout`` is no number.
        RuntimeError: ``shared_td`` is neither in shared memory nor a memmap, its files
            are damaged, or it is on a GPU and another process's.
        KeyError: ``shared_td`` lacks the entries of a key.

    Placing a transform in an environment or a replay buffer, which TorchRL does with a
    call of ``eval()``, does not stop the updates; ``transform.eval()``, ``env.eval()``
    and :meth:`freeze` do. TorchRL does not pass ``env.eval()`` on to the environments
    inside a ``SerialEnv``, a ``ParallelEnv`` or another ``TransformedEnv``: put the
    transform around them, or give them a :meth:`frozen_copy`.

    ``in_keys``, ``out_keys``, ``shapes``, ``names``, ``decay``, ``eps`` and
    ``lock_timeout`` may be set later, and hold from the next call on.

    Examples:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> t = VecNorm(decay=0.9)
        >>> env = GymEnv("Pendulum-v1")
        >>> env = TransformedEnv(env, t)
        >>> _ = env.reset()
        >>> tds = []
        >>> for _ in range(1000):
        ...     td = env.rand_step()
        ...     if td.get("done"):
        ...         _ = env.reset()
        ...     tds += [td]
        >>> tds = torch.stack(tds, 0)
        >>> print((abs(tds.get(("next", "observation")).mean(0)) < 0.2).all())
        tensor(True)
        >>> print((abs(tds.get(("next", "observation")).std(0) - 1) < 0.2).all())
        tensor(True)
        >>> # In a replay buffer, both observations of a step with the same statistics:
        >>> t = VecNorm(
        ...     ["observation", ("next", "observation")],
        ...     names={("next", "observation"): "observation"},
        ... )

    """

    # The separator of flattened nested keys in a state_dict: keys may contain points.
    SEP = _TorchRLVecNorm.SEP

    __signature__ = _SignatureOfInit()

    # The parameters of a VecNorm, or of a subclass, are those of its __init__.
    @overload
    def __new__(
        cls, *args: Any, new_api: Literal[False] | None = None, **kwargs: Any
    ) -> Self: ...

    @overload
    def __new__(
        cls,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey] | None = None,
        *,
        new_api: Literal[True],
        lock: Any = None,
        stateful: bool = True,
        decay: float = 0.9999,
        eps: float = 1e-4,
        shared_data: TensorDictBase | None = None,
        reduce_batch_dims: bool = False,
    ) -> VecNormV2: ...

    def __new__(cls, *args, new_api: bool | None = None, **kwargs):
        """A VecNorm, or torchrl's VecNormV2 where ``new_api`` asks for that."""
        if new_api:
            return VecNormV2(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        shared_td: TensorDictBase | None = None,
        lock: mp.Lock = None,
        decay: float = 0.9999,
        eps: float = 1e-4,
        shapes: list[torch.Size] | None = None,
        new_api: bool | None = None,
        lock_timeout: float = sharing.LOCK_TIMEOUT,
        names: Mapping[NestedKey, NestedKey] | None = None,
    ) -> None:
        if in_keys is None:
            in_keys = ["observation", "reward"]
        if out_keys is None:
            out_keys = copy(in_keys)
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.decay = decay
        self.eps = eps
        self.lock_timeout = lock_timeout
        self.shapes = shapes
        self.names = names
        self.frozen = False
        self._binding: tuple | None = None
        self._attached: sharing.Attached | None = None
        self._found = _find_keys(self.in_keys, self.out_keys, shapes, names)
        self._td = shared_td
        if shared_td is not None:
            _check_shared_td(shared_td, self._keys, has_lock=lock is not None)
        self.__dict__["lock"] = sharing.Lock() if lock is None else lock
        self._lock_is_own = lock is None  # nobody else can have it
        self._lock_was_set = False  # since then
        # Whether the statistics came from elsewhere, in shared memory: others may update
        # them, so they stay where they are. The leaves cannot tell: CUDA tensors always
        # say that they are shared, memory maps never do.
        self._others_update = shared_td is not None
        # The dtype of the normalised values of each in_key, once one was seen.
        self._dtypes: dict[NestedKey, torch.dtype] = {}
        self._warned = False
        if shared_td is not None:
            if lock is None:
                self._reserve()
            self._protection()  # refuses a lock of another kind of machine
            if isinstance(lock, sharing.Lock) and self._attached is not None:
                self._attached.warn_without_journal()
            try:
                self._check_statistics({key.in_key: key.names for key in self._keys})
            except ValueError as error:
                raise ValueError(sharing.advise(str(error), shared_td)) from None

    @property
    def decay(self) -> float:
        """The decay rate, in (0, 1]."""
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        self._decay = _number("decay", value, lambda v: 0 < v <= 1, "in (0, 1]")

    @property
    def eps(self) -> float:
        """The lower bound of the standard deviation, positive and finite."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = _number(
            "eps", value, lambda v: 0 < v < math.inf, "positive and finite"
        )

    @property
    def lock_timeout(self) -> float:
        """Seconds to wait for the lock of shared statistics, positive."""
        return self._lock_timeout

    @lock_timeout.setter
    def lock_timeout(self, value: float) -> None:
        self._lock_timeout = _number("lock_timeout", value, lambda v: v > 0, "positive")

    def _look_up(self) -> _Keys:
        """The keys as they are now; the lists may have been changed in place."""
        given = self._in_keys, self._out_keys, self.shapes, self.names
        if self._found.given != given:
            self._found = _find_keys(*given)
            self._binding = self._attached = None
        return self._found

    @property
    def _keys(self) -> list[_Key]:
        """One for each set of statistics, with the key that they are kept under."""
        return self._look_up().sets

    # ------------------------------------------------------------ switching updates

    def freeze(self) -> VecNorm:
        """Freezes the VecNorm, avoiding the stats to be updated when called.

        See :meth:`unfreeze`.
        """
        self.frozen = True
        return self

    def unfreeze(self) -> VecNorm:
        """Unfreezes the VecNorm.

        See :meth:`freeze`.
        """
        self.frozen = False
        return self

    def frozen_copy(self) -> VecNorm:
        """Returns a copy that follows the statistics but does not update them.

        Raises:
            RuntimeError: no data was seen yet.
        """
        if self._td is None:
            raise RuntimeError(
                "Make sure the VecNorm has been initialized before creating a frozen copy."
            )
        return self.clone().freeze()

    def train(self, mode: bool = True) -> VecNorm:
        """Sets training mode (statistics are updated) or eval mode (they are not).

        TorchRL calls ``eval()`` on every transform that it puts into an environment or
        a replay buffer. That is not the user's wish, and is ignored.
        """
        if not mode and _called_by_torchrl():
            return self
        return super().train(mode)

    # -------------------------------------------------------------------- the call

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        if not is_compiling() and self._common_call(next_tensordict):
            return next_tensordict
        partial = _partial_call_of(self) or _Partial(self._missing_tolerance)
        return self._normalize_td(next_tensordict, partial)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Reads the input tensordict, and for the selected keys, applies the transform.

        Args:
            tensordict: entries ``in_keys``, each ``[*samples, *features]``.

        Returns:
            The same tensordict, with the normalised values in ``out_keys``. Those of fake
            tensors are fake, and leave the statistics as they are.

        Raises:
            KeyError: an in_key is missing.
            ValueError: the features of a value have another shape than ``shapes``, the
                statistics, or another in_key that shares them.
            TypeError: a value is complex, sparse, quantized or a nested tensor.

        After an error the statistics of all keys are what they were, also where it is the
        tensordict that refuses an output. Outputs before that one may have been written.
        """
        return self._call(tensordict)

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        # In a partial step, environments that stood still have nothing to say.
        found = self._found
        if found.given[0] != self._in_keys:
            found = self._look_up()
        names = found.mask_names
        if get_entry(tensordict, "_step") is None and not (
            names and any(get_entry(tensordict, name) is not None for name in names)
        ):
            return self._call(next_tensordict)
        return self._call_partially(
            next_tensordict, _Partial(self._missing_tolerance, tensordict, "_step")
        )

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        # Rewards and the like are not there at a reset; and of a batch of environments
        # only those that are being reset count.
        return self._call_partially(
            tensordict_reset, _Partial(True, tensordict, "_reset")
        )

    @property
    def missing_tolerance(self) -> bool:
        """Whether in_keys may be missing, as they may at a reset."""
        partial = _partial_call_of(self)
        return self._missing_tolerance or (partial is not None and partial.tolerant)

    def _is_extended(self) -> bool:
        """Whether a subclass has a ``_call`` of its own."""
        return type(self)._call is not VecNorm._call

    def _call_partially(self, td: TensorDictBase, partial: _Partial) -> TensorDictBase:
        if not self._is_extended():
            return self._normalize_td(td, partial)
        # The subclass calls ours with this tensordict, with another, or not at all.
        before = getattr(_this_thread, "partial", None)
        _this_thread.partial = (self, partial)
        try:
            return self._call(td)
        finally:
            _this_thread.partial = before

    def _normalize_td(self, td: TensorDictBase, partial: _Partial) -> TensorDictBase:
        """Normalises the in_keys of ``td`` into its out_keys."""
        if self._others_update and is_compiling():
            return self._outside_graph(td, partial)
        inputs = self._look_up().inputs
        values = []
        for key in inputs:
            value = get_entry(td, key.in_key)
            if value is not None:
                values.append((key, value))
            elif not partial.tolerant:
                raise KeyError(
                    f"VecNorm: key {key.in_key!r} is not in the tensordict, which has "
                    f"{sorted(map(str, td.keys(True, True)))}"
                )
        if not values:
            return td
        for key, value in values:
            _check_value(key.in_key, value)
            _check_writable(td, key.out_key)
        updating = self.training and not self.frozen
        if _are_fake(value for _, value in values):
            for key, value in values:
                _features(key, value, td.batch_dims, self._state(key))
                td.set(key.out_key, _identity(value))
            return td
        with self._session() as session:
            attached = self._attached if session is not None and updating else None
            if attached is not None:
                attached.state.load()
            entries = self._find_entries(td, values, updating, partial)
            known = [e for e in entries if e.state is not None]
            if attached is not None:
                for e in known:
                    e.state = attached.copy_of(e.state, e.key.names)
            with self._all_or_nothing(known if updating else []):
                normalized = self._compute(entries, known, updating)
                self._write_outputs(td, [e.key for e in entries], normalized)
                if updating:
                    self._keep_new(known)
                if attached is not None:
                    attached.state.commit()
            is_common = len(known) == len(inputs) and type(td) is TensorDict
            if is_common and (self._binding is None or partial.masks_td is None):
                self._bind(known)
        return td

    @contextmanager
    def _all_or_nothing(self, known: list[_Entry]) -> Iterator[None]:
        """Puts the statistics back if the call fails, whatever it was that failed."""
        if is_compiling():
            yield
            return
        td, dtypes = self._td, self._dtypes
        states = {e.key.names: e.state for e in known}
        new = {e.key.names: self._state(e.key) for e in known if e.is_new}
        with _without_functorch():
            copies = {
                names: state.to(state.sum.device, copy=True)
                for names, state in states.items()
                if names not in new
            }
        try:
            yield
        except BaseException:  # an interrupt too
            with _without_functorch():
                for names, copied in copies.items():
                    for leaf, value in zip(states[names], copied, strict=True):
                        if leaf is not None:
                            leaf.copy_(value)
            self._td, self._dtypes, self._binding = td, dtypes, None
            if td is not None:
                for names, old in new.items():
                    restore_moments(td, names, old)
            raise

    @torch.compiler.disable(
        reason="VecNorm: statistics that other processes update need their lock, and "
        "a compiled graph works on copies. Compile without fullgraph=True."
    )
    def _outside_graph(self, *args) -> TensorDictBase:
        return self._normalize_td(*args)

    def _common_call(self, td: TensorDictBase) -> bool:
        """A call with nothing special: every key there, its state known, no masks.

        False when there is something special, or wrong: nothing has happened then.
        """
        bound = self._binding  # another thread may take it away
        if bound is None:
            return False
        updating = self.training and not self.frozen
        if not updating and _ops.needs_plain_torch():
            return False
        binding, bound_lock, users_lock, is_extended = bound
        if self.lock is not bound_lock or (
            is_extended and _partial_call_of(self) is not None
        ):
            return False
        call = self._td, td, updating, self._decay, self._eps, self._lock_timeout
        try:
            if users_lock is None:
                return binding.call(*call)
            with sharing.Session(users_lock, None, self._lock_timeout):
                return binding.call(*call)
        except NotImplementedError:  # of a kind of tensor that no operator takes
            return False

    def _write_outputs(
        self, td: TensorDictBase, keys: list[_Key], normalized: list[Tensor]
    ) -> None:
        for key, y in zip(keys, normalized, strict=True):  # may fail
            set_entry(td, key.out_key, y)
        for key, y in zip(keys, normalized, strict=True):
            if self._dtypes.get(key.in_key) is not y.dtype:
                # Clones were given the dictionary as it was.
                self._dtypes = {**self._dtypes, key.in_key: y.dtype}
                self._binding = None  # of other dtypes, which it would not say

    # ------------------------------------------------------------------------- locking

    def __setattr__(self, name: str, value: Any) -> None:
        # To set the lock says that others update, under that lock, the statistics that
        # are loaded next: so does EnvCreator. No property: every call reads it.
        if name == "lock":
            self.__dict__.update(_lock_is_own=False, _lock_was_set=True)
        elif name in ("_in_keys", "_out_keys", "shapes", "names"):
            self.__dict__["_binding"] = None  # it watches the lists that were there
        super().__setattr__(name, value)

    def _protection(self) -> tuple[Any, _C.SharedState | None]:
        """The user's lock and the statistics' own, None where there is none.

        Brings ``_attached`` up to date: what others may see is only changed through it.
        """
        ours = self.lock if isinstance(self.lock, sharing.Lock) else None
        users = self.lock if ours is None else None
        control = None if self._td is None else get_entry(self._td, sharing.CONTROL)
        if control is None and ours is not None and self._in_shared_memory():
            control = ours.control
        if control is None:
            self._attached = None
            return users, None if ours is None else ours.state
        if self._attached is None or not self._attached.is_of(control, self._td):
            names = [name for key in self._keys for name in key.names]
            self._attached = sharing.Attached(control, self._td, names)
            if ours is not None and ours.is_carried:
                self._attached.warn_without_journal()
        return users, self._attached.state

    def _in_shared_memory(self) -> bool:
        return self._td is not None and any(
            sharing.in_shared_memory(state.sum) for _, state in self._seen()
        )

    @contextmanager
    def _session(self) -> Iterator[sharing.Session | None]:
        """Holds the locks; None in a compiled graph, where they mean nothing."""
        if is_compiling():
            yield None
            return
        _C.leave_the_pool_after_fork()  # a session may run torch's own operators
        while True:
            users, shared = self._protection()
            with sharing.Session(users, shared, self.lock_timeout) as session:
                # Another thread may have replaced the statistics while this one waited.
                if self._protection() == (users, shared):
                    yield session
                    return

    def _find_entries(
        self,
        td: TensorDictBase,
        values: list[tuple[_Key, Tensor]],
        updating: bool,
        partial: _Partial,
    ) -> list[_Entry]:
        """Checks the shapes of all values and finds their states."""
        entries = []
        found: dict[StateNames, tuple[Moments, bool]] = {}
        shapes: dict[StateNames, torch.Size] = {}
        for key, value in values:
            state = self._state(key)
            features = _features(
                key, value, td.batch_dims, state, shapes.get(key.names)
            )
            shapes[key.names] = features
            samples = value.shape[: value.ndim - len(features)]
            mask = None
            if partial.masks_td is not None:
                mask = _find_mask(partial, key.in_key, samples)
            entries.append(_Entry(key, value, None, mask))
            if key.names in found:
                continue
            if state is None and updating and samples.numel() > 0:
                self._check_room(key)
                found[key.names] = _new_moments(features, value.device), True
            elif state is not None:
                # A private state follows the values; where nothing is updated, a copy.
                here = state
                if not self._others_update:
                    here = self._follow(state, value.device)
                found[key.names] = here, here is not state
        for e in entries:
            e.state, e.is_new = found.get(e.key.names, (None, False))
            if e.state is None:
                self._warn_identity()
            elif not updating and e.state.sum.device.type == "cpu":
                self._warn_identity(e.state.count)
        return entries

    def _check_room(self, key: _Key) -> None:
        if self._td is not None and self._td.is_locked:
            raise KeyError(
                f"VecNorm: the statistics have no entries for key {key.in_key!r} and are "
                f"locked, they have {sorted(map(str, self._td.keys(True, True)))}"
            )

    def _state(self, key: _Key) -> Moments | None:
        return read_moments(self._td, key.names)

    def _follow(self, state: Moments, device: torch.device) -> Moments:
        """The statistics where they can be updated with values of a device, or a copy."""
        if state.sum.device != device or _is_stale(state.sum):
            return state.to(device, copy=True)
        return state

    def _move(self, key: _Key, state: Moments, device: torch.device) -> Moments:
        """Brings the statistics of a key to a device, for all that have this tensordict."""
        moved = self._follow(state, device)
        if moved is not state:
            write_moments(self._td, key.names, moved)
            if not is_compiling() and not self._in_shared_memory():
                self._reserve()
        return moved

    def _compute(
        self, entries: list[_Entry], known: list[_Entry], updating: bool
    ) -> list[Tensor]:
        """One call of the operator for all keys that have a state."""
        is_apart = len({e.key.names for e in known}) == len(known)
        if (
            updating
            and is_compiling()
            and any(e.is_new and e.value.requires_grad for e in known)
        ):
            results = self._compute_plain(known)
        elif (updating and not is_apart) or any(
            e.state.sum.device != e.value.device for e in known
        ):
            results = self._compute_from_moments(known, updating)
        else:
            results = self._compute_here(known, updating)
        results = iter(results)
        return [
            next(results) if e.state is not None else _identity(e.value)
            for e in entries
        ]

    def _bind(self, known: list[_Entry]) -> None:
        """Lets calls like this one take the short way, :meth:`_common_call`."""
        if is_compiling() or len(self._found.sets) < len(known):
            return
        keys = [
            (
                e.key.in_key,
                e.key.out_key,
                e.key.names,
                None if e.key.shape is not None else e.state.sum.ndim,
                e.value.dtype,
            )
            for e in known
        ]
        users_lock, shared = self._protection()
        states = [self._state(e.key) for e in known]
        if None in states:  # of a trace with fake tensors
            return
        if self._attached is not None:
            states = [
                self._attached.copy_of(state, e.key.names)
                for state, e in zip(states, known, strict=True)
            ]
        # Lists that are changed in place do not say so.
        now = self._in_keys, self._out_keys, self.shapes, self.names
        watched = [
            pair
            for pair in zip(now, self._found.given, strict=True)
            if pair[0] is not None
        ]
        binding = bind(self._td, keys, states, shared, watched)
        if binding is not None:
            binding = binding, self.lock, users_lock, self._is_extended()
        self._binding = binding

    def _compute_here(self, known: list[_Entry], updating: bool) -> list[Tensor]:
        """With the statistics on the devices of the values."""
        if not known:
            return []
        devices = {e.value.device for e in known}
        if len(devices) > 1:
            results = {}
            for device in devices:
                part = [e for e in known if e.value.device == device]
                computed = self._compute_here(part, updating)
                results.update(zip(map(id, part), computed, strict=True))
            return [results[id(e)] for e in known]
        keys = [e.key for e in known]
        values = [e.value for e in known]
        states = [e.state for e in known]
        if not updating:
            return _called(keys, functional.normalize, values, states, eps=self.eps)
        masks = [e.mask for e in known]
        return _called(
            keys,
            functional.update_,
            values,
            states,
            decay=self.decay,
            eps=self.eps,
            mask=masks if any(m is not None for m in masks) else None,
        )

    def _compute_plain(self, known: list[_Entry]) -> list[Tensor]:
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
                state = oracle.fold(e.state, batches[e.key.names], float(self.decay))
                if not e.is_new:
                    copy_moments(e.state, state)
                states[e.key.names] = state
            e.state = states[e.key.names] if e.is_new else e.state
        return [
            oracle.normalize(e.value, states[e.key.names], float(self.eps))
            for e in known
        ]

    def _compute_from_moments(
        self, known: list[_Entry], updating: bool
    ) -> list[Tensor]:
        """With the moments of the batch, where it is not one tensor beside the statistics.

        Shared statistics stay where they are, while the values may be elsewhere: the
        batch is reduced on its own device, its moments travel, and so do the statistics
        that it is normalised with. Keys that share statistics are folded in at once.
        """
        if updating:
            states = {e.key.names: e.state for e in known}
            batches: dict[StateNames, Moments] = {}
            for e in known:
                batch = _called(
                    [e.key],
                    functional.moments,
                    e.value,
                    e.state.sum.ndim,
                    mask=e.mask,
                ).to(e.state.sum.device)
                if e.key.names in batches:
                    functional.merge_(batches[e.key.names], batch)
                else:
                    batches[e.key.names] = batch
            functional.merge_(
                list(states.values()), list(batches.values()), decay=self.decay
            )
        here = [replace(e, state=e.state.to(e.value.device)) for e in known]
        return self._compute_here(here, updating=False)

    def _keep_new(self, known: list[_Entry]) -> None:
        """Makes new and moved states those of the tensordict of the statistics."""
        new = {e.key.names: e.state for e in known if e.is_new}
        # Who traces with fake tensors gets a graph, and no statistics.
        is_export = not torch.compiler.is_dynamo_compiling() and any(
            is_fake(state.sum) for state in new.values()
        )
        if not new or is_export:
            return
        # What was there before may be others' already, with the lock as it is.
        was_shared = not is_compiling() and self._in_shared_memory()
        td = TensorDict({}, batch_size=[]) if self._td is None else self._td
        for names, state in new.items():
            write_moments(td, names, state)
        self._td = td
        if is_compiling() or self._others_update:
            return
        if not was_shared or not self._in_shared_memory():
            self._reserve()

    def _reserve(self) -> None:
        """Makes our lock's journal long enough, while nobody else can have it yet."""
        if isinstance(self.lock, sharing.Lock) and self._td is not None:
            leaves = sharing.leaves_of(self._td)
            if all(leaf.device.type == "cpu" for leaf in leaves.values()):
                with _outside():
                    self.lock.reserve(leaves)

    def _warn_identity(self, count: Tensor | None = None) -> None:
        if is_compiling() or (count is not None and count.item() > 0):
            return
        if not self._warned and (self.frozen or not self.training):
            self._warned = True
            warnings.warn(
                "VecNorm has no statistics yet and does not collect any (it is frozen "
                "or in eval mode): values are passed on as they are.",
                stacklevel=2,
            )

    # --------------------------------------------------------- reading the statistics

    def _seen(self) -> Iterator[tuple[_Key, Moments]]:
        for key in self._keys:
            state = self._state(key)
            if state is not None:
                yield key, state

    def _seen_inputs(self) -> Iterator[tuple[_Key, Moments]]:
        for key in self._look_up().inputs:
            state = self._state(key)
            if state is not None:
                yield key, state

    def _loc_scale(self) -> tuple[TensorDict, TensorDict]:
        loc, scale = TensorDict(), TensorDict()
        with self._session():
            for key, state in self._seen_inputs():
                dtype = self._dtypes.get(key.in_key, torch.get_default_dtype())
                both = functional.loc_scale(state, eps=self.eps)
                for td, value in zip((loc, scale), both, strict=True):
                    td.set(key.in_key, value.to(dtype))
        return loc, scale

    @property
    def loc(self) -> TensorDict:
        """The mean of each in_key seen so far, ``[*features]``.

        In the dtype of the normalised values, the default dtype before any was seen.
        """
        return self._loc_scale()[0]

    @property
    def scale(self) -> TensorDict:
        """The standard deviation of each in_key seen so far, at least ``eps``."""
        return self._loc_scale()[1]

    @property
    def nonfinite(self) -> TensorDict:
        """How many values were left out because they were NaN or infinite.

        int64 ``[*features]`` for each in_key seen so far whose state counts them; a
        ``shared_td`` in the layout of ``torchrl.envs.VecNorm`` does not.
        """
        td = TensorDict()
        with self._session():
            for key, state in self._seen_inputs():
                if state.nonfinite is not None:
                    td.set(key.in_key, state.nonfinite[1].to(torch.int64))
        return td

    @property
    def standard_normal(self) -> bool:
        """Whether ``loc`` and ``scale`` follow the standard normal equation.

        Similar to the ``standard_normal`` attribute of
        :class:`torchrl.envs.ObservationNorm`. Always ``True``.
        """
        return True

    def denorm(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Inverts the normalisation: ``original = normalized * scale + loc``.

        Reads normalised values from ``out_keys`` and writes to ``in_keys``; keys that
        are not in the tensordict are skipped.

        Args:
            tensordict: the tensordict containing normalised values.

        Returns:
            A shallow copy of the tensordict with the original values in ``in_keys``.

        Raises:
            RuntimeError: no data was seen yet.
        """
        if self._td is None:
            raise RuntimeError("VecNorm must be initialized before calling denorm.")
        tensordict = tensordict.copy()
        keys, values, states = [], [], []
        with self._session():
            for key in self._look_up().inputs:
                value = get_entry(tensordict, key.out_key)
                if value is None:
                    continue
                _check_value(key.out_key, value)
                state = self._state(key)
                if state is None:
                    raise RuntimeError(
                        f"VecNorm must have seen key {key.in_key!r} before calling denorm."
                    )
                keys.append(key)
                values.append(value)
                states.append(state)
            if _are_fake(values):
                originals = list(map(_identity, values))
            else:
                pairs = zip(states, values, strict=True)
                states = [state.to(value.device) for state, value in pairs]
                originals = _called(
                    keys, functional.denormalize, values, states, eps=self.eps
                )
        for key, original in zip(keys, originals, strict=True):
            tensordict.set(key.in_key, original)
        return tensordict

    def to_observation_norm(self) -> Compose | ObservationNorm:
        """Converts VecNorm into an ObservationNorm class for inference time.

        The :class:`torchrl.envs.ObservationNorm` can be updated with
        ``load_state_dict(vecnorm.to_observation_norm().state_dict())``. It rounds
        ``loc`` to the dtype of the values, which shows where ``loc / scale`` is huge: a
        warning says so. :meth:`frozen_copy` does not round.

        Raises:
            RuntimeError: a key was not seen yet.
        """
        loc, scale = self._loc_scale()
        norms = []
        for key in self._look_up().inputs:
            if key.in_key not in loc.keys(True, True):
                raise RuntimeError(
                    f"VecNorm must have seen key {key.in_key!r} before it can be "
                    "converted to an ObservationNorm."
                )
            _warn_of_rounding(key.in_key, loc.get(key.in_key), scale.get(key.in_key))
            norms.append(
                ObservationNorm(
                    loc=loc.get(key.in_key),
                    scale=scale.get(key.in_key),
                    standard_normal=True,
                    in_keys=key.in_key,
                    out_keys=key.out_key,
                )
            )
        return norms[0] if len(norms) == 1 else Compose(*norms)

    # ------------------------------------------------------- state_dict, moving, copies

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """The statistics, for ``state_dict()``: the live tensors, flat.

        ``<key>_sum``, ``<key>_ssq``, ``<key>_count`` and ``<key>_nonfinite`` for each key
        seen so far, nested keys joined with ``VecNorm.SEP``; None before any data. Saved
        or copied, also those of a memory map become plain tensors of their own.
        """
        if self._td is None:
            warnings.warn(
                "Querying state_dict on an uninitialized VecNorm transform will return "
                "a `None` value for the summary statistics. Loading such a state_dict "
                "on an initialized VecNorm will result in an error. What loads into the "
                "tensors that are there, as torch.distributed.checkpoint does, needs "
                "some: call the transform first.",
                stacklevel=2,
            )
            return None
        # Whoever asks may put them into shared memory, and others may update them then.
        self._binding = None
        # A plain dict of tensors: EnvCreator drops the tensors of an OrderedDict.
        state = {
            self.SEP.join(as_path(name)): sharing.portable(leaf)
            for key, state in self._seen()
            for name, leaf in zip(key.names, state, strict=True)
            if leaf is not None
        }
        sharing.note_lock(state.values(), self.lock)
        return state

    def consistent_state_dict(self) -> dict[str, Tensor] | None:
        """A copy of :meth:`get_extra_state`, taken under the lock.

        Beside processes that update shared statistics, the live tensors may be read
        half-way through an update; this copy is from before or after one.
        """
        if self._td is None:
            return self.get_extra_state()
        with torch.inference_mode(False), self._session():
            return {name: leaf.clone() for name, leaf in self.get_extra_state().items()}

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        """Loads what :meth:`get_extra_state` gave, here or in ``torchrl.envs.VecNorm``.

        Or in ``torchrl.envs.VecNormV2`` with the same ``decay``: the state then stands
        for the same weighted mean and mean of squares. V2 subtracts the mean's square
        before it corrects the bias of a young average, so that its ``scale`` is larger at
        the beginning.

        The values are copied. A transform that has statistics writes in place, under the
        lock, so that sharing survives; where those do not count what is missing, it
        becomes values that change neither ``loc`` nor ``scale``. One that has none makes
        float64 statistics, on the CPU in shared memory, so that workers that
        ``EnvCreator`` starts later see them.

        Only what is shared under one lock becomes this transform's as it is: tensors in
        shared memory, where the transform was given its ``lock`` and did not make it
        itself; and, where the lock was set since the construction, as ``EnvCreator`` does
        it, the statistics that another transform of this process has under that lock.
        Without that lock, tensors in shared memory are copied with a warning.

        Args:
            state: entries ``<key>_sum`` and ``<key>_ssq`` ``[*features]`` and
                ``<key>_count`` ``[1]`` of each key, floating-point; the others are
                optional.

        Raises:
            KeyError: ``state`` is None or lacks an entry of a key that has statistics.
            ValueError: an entry is no tensor, has another shape, or values that no data
                can have given: negative or NaN counts, a negative variance.

        After an error, the statistics are what they were. Entries of other keys are
        ignored, and keys that are not there begin with their first values, both with a
        warning.
        """
        if state is None:
            if self._td is not None:
                raise KeyError("Could not find a tensordict in the state_dict.")
            self._lock_was_set = False
            return
        _C.leave_the_pool_after_fork()
        # Nothing could update statistics from inside of inference_mode outside of it.
        with torch.inference_mode(False):
            found = self._find_statistics(state)
            if self._is_shared_with_us(found):
                self._adopt(found)
            elif self._td is None:
                self._load_new(found)
            else:
                self._load_in_place(found)
        self._lock_was_set = False

    def _find_statistics(
        self, state: Mapping[str, Tensor]
    ) -> dict[NestedKey, tuple[Sequence[str], Moments]]:
        """The entries of each of our keys in a state_dict: their names and moments."""
        if not isinstance(state, Mapping | TensorDictBase):
            raise ValueError(
                "VecNorm: expected a dict of tensors as state, as `state_dict()` gives "
                f"it, got {type(state).__name__}"
            )
        if isinstance(state, TensorDictBase):
            state = {
                self.SEP.join(as_path(name)): leaf
                for name, leaf in state.items(True, True)
                if name != sharing.CONTROL
            }
        found = {}
        rest = set(state)
        for key in self._keys:
            names = [self.SEP.join(as_path(name)) for name in key.names]
            path = as_path(key.in_key)
            v2_names = [
                VecNormV2.SEP.join((field, *path)) for field in ("loc", "var", "count")
            ]
            is_v2 = not rest.intersection(names) and bool(rest.intersection(v2_names))
            needed = v2_names if is_v2 else names[:3]
            present = rest.intersection(needed if is_v2 else names)
            if not present:
                continue
            for name in needed:
                if name not in present:
                    raise KeyError(
                        f"VecNorm: the state_dict has no entry {name!r}; "
                        f"it has {sorted(map(str, state))}"
                    )
            rest -= present
            if is_v2:
                leaves = [state[name] for name in needed]
                moments = from_v2(needed, *leaves, float(self.decay))
                names[:3] = needed
            else:
                moments = Moments(*map(state.get, names))
            found[key.in_key] = names, moments
        if state and not found:
            raise KeyError(
                f"VecNorm: the state_dict has no statistics of any of the keys "
                f"{self.in_keys}; it has {sorted(map(str, state))}"
            )
        lacking = [key.in_key for key in self._keys if key.in_key not in found]
        for key, _ in self._seen():
            if key.in_key in lacking:
                raise KeyError(
                    f"VecNorm: the state_dict has no statistics of key "
                    f"{key.in_key!r}; it has {sorted(map(str, state))}"
                )
        if lacking:
            warnings.warn(
                f"VecNorm: the state_dict has no statistics of {lacking}: they begin "
                f"with the first values. It has {sorted(map(str, state))}",
                stacklevel=3,
            )
        if rest:
            warnings.warn(
                f"VecNorm: the state_dict has entries {sorted(map(str, rest))}, which are "
                f"of no key of this transform, {self.in_keys}: they are ignored.",
                stacklevel=3,
            )
        return found

    def _is_shared_with_us(
        self, found: dict[NestedKey, tuple[Sequence[str], Moments]]
    ) -> bool:
        """Whether these are statistics that all update under the lock that we have.

        So does EnvCreator share: it sets the lock of a new transform, then has it load
        the tensors. Before, the transform may have loaded a checkpoint.
        """
        if self._others_update or not (self._td is None or self._lock_was_set):
            return False
        leaves = [v for _, moments in found.values() for v in moments if v is not None]
        if not leaves:
            return False
        if not self._lock_is_own and all(
            sharing.is_under(leaf, self.lock, self._lock_was_set) for leaf in leaves
        ):
            return True
        if self._lock_was_set or any(map(sharing.in_shared_memory, leaves)):
            warnings.warn(f"VecNorm: {_COPIED}", stacklevel=3)
        return False

    def _adopt(self, found: dict[NestedKey, tuple[Sequence[str], Moments]]) -> None:
        """Makes statistics that others update ours, as they are."""
        check_apart(moments for _, moments in found.values())
        td = TensorDict({}, batch_size=[])
        is_new = False
        for key in self._keys:
            if key.in_key not in found:
                continue
            names, moments = found[key.in_key]
            check_usable(names, moments)
            sharing.refuse_cuda_of_others({str(key.in_key): moments.sum})
            write_moments(td, key.names, moments)
        before = self._td, self._attached
        self._td = td
        try:
            self._check_statistics({k: names for k, (names, _) in found.items()})
        except BaseException:
            self._td, self._attached = before
            raise
        for leaf in td.values(True, True):
            if leaf.device.type == "cpu" and not sharing.in_shared_memory(leaf):
                leaf.share_memory_()
                is_new = True
        self._binding = None
        self._others_update = self._in_shared_memory()
        if is_new:  # or others have the lock already
            self._reserve()

    def _load_new(self, found: dict[NestedKey, tuple[Sequence[str], Moments]]) -> None:
        """Makes statistics of our own, with the values that were loaded."""
        if not found:
            return
        td = TensorDict({}, batch_size=[])
        for key in self._keys:
            if key.in_key not in found:
                continue
            names, moments = found[key.in_key]
            moments = settled(names, moments, key.shape)
            sharing.refuse_cuda_of_others({str(key.in_key): moments.sum})
            ours = Moments.zeros(moments.sum.shape, device=moments.sum.device)
            copy_moments(ours, moments)
            # EnvCreator may share them next.
            for leaf in ours:
                if leaf is not None:
                    leaf.share_memory_()  # of a CUDA tensor: nothing to do
            write_moments(td, key.names, ours)
        self._td = td
        self._reserve()

    def _load_in_place(
        self, found: dict[NestedKey, tuple[Sequence[str], Moments]]
    ) -> None:
        with self._session():
            attached = self._attached
            if attached is not None:
                attached.state.load()
            # Under the lock: what is loaded may be these very statistics.
            loaded = [
                (key, self._fit(key, *found[key.in_key]))
                for key in self._keys
                if key.in_key in found
            ]
            for key, moments in loaded:
                self._write(key, moments, attached)
            if attached is not None:
                attached.state.commit()

    def _fit(self, key: _Key, names: Sequence[str], moments: Moments) -> Moments:
        """The values as the statistics that are there can hold them."""
        current = self._state(key)
        if current is None:
            return settled(names, moments, key.shape)
        features = current.sum.shape
        moments = settled(names, moments, features)
        is_counted = current.nonfinite is not None
        if not is_counted:
            moments = without_counter(moments)
        if not is_counted or current.sum.dtype != moments.sum.dtype:
            # In float32 large statistics may be infinite.
            as_here = (
                None if new is None else new.to((new if old is None else old).dtype)
                for new, old in zip(moments, current, strict=True)
            )
            check_moments(names, Moments(*as_here), features)
        return moments

    def _check_statistics(self, names: dict[NestedKey, Sequence[str]]) -> None:
        """Refuses shared statistics that no data can have given.

        Under their lock; where somebody has that, they may be in an update.

        Args:
            names: of the entries of each key, for the message.
        """
        _C.leave_the_pool_after_fork()
        session = sharing.Session(*self._protection(), self.lock_timeout)
        is_held = session.try_enter()

        def check() -> None:
            for key, state in self._seen():
                # A count made by hand may be [].
                state = state._replace(count=torch.atleast_1d(state.count))
                check_moments(names[key.in_key], state, key.shape, not is_held)

        try:
            # A process of torchrl's class may know of another lock, or of none.
            patiently(check)
        finally:
            if is_held:
                session.__exit__()

    def _write(
        self, key: _Key, moments: Moments, attached: sharing.Attached | None
    ) -> None:
        state = self._state(key)
        if state is None:
            # Seen where the state_dict comes from, not here yet.
            state = Moments.zeros(moments.sum.shape, device=moments.sum.device)
            write_moments(self._td, key.names, state)
        elif not self._others_update:
            # Where it is, as something that can be written to.
            state = self._move(key, state, state.sum.device)
        if attached is not None:
            state = attached.copy_of(state, key.names)
        copy_moments(state, moments)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # VecNormV2 has a buffer that says that there are statistics.
        state_dict.pop(f"{prefix}initialized", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def to(self, *args, **kwargs) -> VecNorm:
        """Moves the statistics to a device; they stay float64.

        Shared statistics stay where they are.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and self._td is not None and not self._others_update:
            with torch.inference_mode(False), self._session():
                for key, state in list(self._seen()):
                    self._move(key, state, device)
        return super().to(*args, **kwargs)

    def __copy__(self) -> VecNorm:
        # Of the same statistics, so under the same lock. ``clone()`` comes here too.
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # Sending tensors to another process shares them.
        self._binding = None
        state = super().__getstate__()
        state["_binding"] = None
        state["_attached"] = None
        state["_others_update"] = True  # if it is the same memory there
        if any(sharing.is_mapped(moments.sum) for _, moments in self._seen()):
            state["_td"] = self._td.apply(sharing.portable)
        # A multiprocessing lock can only be handed to a process that is being started.
        if multiprocessing.context.get_spawning_popen() is not None:
            if any(moments.sum.is_cuda for _, moments in self._seen()):
                if self._others_update:
                    raise RuntimeError(f"VecNorm: shared_td: {sharing.CUDA_OF_OTHERS}")
                # A copy: no GPU has a lock that outlives a process that is killed.
                state["_td"] = self._td.apply(lambda leaf: leaf.cpu())
                state["_others_update"] = False
        else:
            lock = state.pop("lock", None)
            ours = isinstance(lock, sharing.Lock)
            state["lock_control"] = lock.control if ours else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        control = state.pop("lock_control", None)
        super().__setstate__(state)
        # To a process that is started, and through a queue, the statistics come as the
        # same memory, and so does our lock. Copies, and those from a file, are alone.
        self._others_update &= self._in_shared_memory()
        self._lock_is_own = False
        self._lock_was_set = False
        if "lock" not in state:
            has_lock = self._others_update and control is not None
            if has_lock and control.is_shared():
                self.__dict__["lock"] = sharing.Lock.of(control)
            else:
                self.__dict__["lock"] = sharing.Lock()
                self._lock_is_own = True
                if self._others_update and sharing.CONTROL not in self._td.keys():
                    self._leave_alone()
        if not self._others_update:
            if self._td is not None and sharing.CONTROL in self._td.keys():
                self._td = self._td.exclude(sharing.CONTROL)  # of the original
            self._reserve()  # EnvCreator may share the copy next

    def _leave_alone(self) -> None:
        """Makes a copy of shared statistics, whose lock could not be sent here."""
        warnings.warn(
            f"VecNorm: {_COPIED} A lock of multiprocessing comes to a process only when "
            "that is started.",
            stacklevel=3,
        )
        td = TensorDict({}, batch_size=[])
        for key, state in self._seen():
            names = [str(name) for name in key.names]
            write_moments(td, key.names, settled(names, state, state.sum.shape))
        self._td = td
        self._others_update = False

    def __deepcopy__(self, memo: dict[int, Any]) -> VecNorm:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with torch.inference_mode(False), self._session():  # no half of an update
            state = deepcopy(self.__getstate__(), memo)
        copied.__setstate__(state)
        return copied

    # -------------------------------------------------------------------------- specs

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Transforms the observation spec such that it matches the normalised values.

        Args:
            observation_spec (TensorSpec): spec before the transform.

        Returns:
            The spec after it: entries of ``out_keys`` have no bounds, and a
            floating-point dtype.
        """
        return specs.normalize_specs(observation_spec, self.in_keys, self.out_keys)

    def transform_reward_spec(self, reward_spec: TensorSpec) -> TensorSpec:
        """Transforms the reward spec such that it matches the normalised values."""
        return specs.normalize_specs(reward_spec, self.in_keys, self.out_keys)

    # ------------------------------------------------------------------------- sharing

    @staticmethod
    def build_td_for_shared_vecnorm(
        env: EnvBase,
        keys: Sequence[NestedKey] | None = None,
        memmap: bool | str | os.PathLike = False,
    ) -> TensorDictBase:
        """Creates a shared tensordict for normalization across processes.

        The tensordict carries a lock: transforms in several processes that are given it
        as ``shared_td`` lose no update.

        Args:
            env (EnvBase): example environment to be used to create the tensordict.
            keys (sequence of NestedKey, optional): entries of the step's output that
                have to be normalized; ``"next"`` stands for all floating-point ones,
                rewards among them. Default is ``["next"]``.
            memmap (bool or path): if ``True``, the resulting tensordict will be cast
                into memory map (using ``memmap_()``). Otherwise, the tensordict will be
                placed in shared memory. A path is a folder for the memory map: its
                statistics outlive all processes, and
                ``VecNorm(shared_td=TensorDict.load_memmap(path))`` goes on with them.

        Returns:
            A tensordict in shared memory to be sent to each process.

        Raises:
            KeyError: a key is not an entry of the step's output.
            ValueError: an entry stacks values of different shapes.
            FileExistsError: the folder has shared statistics already.

        Examples:
            >>> from torch import multiprocessing as mp
            >>> queue = mp.Queue()
            >>> env = make_env()
            >>> td_shared = VecNorm.build_td_for_shared_vecnorm(env,
            ...     ["next", "reward"])
            >>> assert td_shared.is_shared()
            >>> queue.put(td_shared)
            >>> # on workers
            >>> v = VecNorm(shared_td=queue.get())
            >>> env = TransformedEnv(make_env(), v)

        """
        return sharing.build_td(env, keys, memmap)

    def __repr__(self) -> str:
        text = (
            f"{self.__class__.__name__}(decay={float(self.decay)!r}, "
            f"eps={float(self.eps)!r}, in_keys={self.in_keys}, out_keys={self.out_keys}"
        )
        # Without the lock: whoever prints does not want to wait, and counters only grow.
        left_out = {
            key.in_key: int(state.nonfinite[1].sum())
            for key, state in self._seen()
            if state.nonfinite is not None
        }
        if any(left_out.values()):
            text += f", nonfinite={left_out}"
        return text + ")"


_COPIED = (
    "the statistics are copied, so that updates of whoever else has them are not seen "
    "here, and the other way round. They are not shared: this transform was not given the "
    "lock that they are updated under, or they were not in shared memory when this process "
    "was started. Share them through EnvCreator (call it once before processes are forked) "
    "or VecNorm.build_td_for_shared_vecnorm; where a copy is what you want, load "
    "`consistent_state_dict()`."
)


# ``isinstance(t, torchrl.envs.VecNorm)`` is how TorchRL finds the transforms that an
# evaluator has to freeze. The class is an ABC: registering makes it true without its
# deprecation warning.
_TorchRLVecNorm.register(VecNorm)


# ------------------------------------------------------------------------ construction


def _number(
    name: str, value: Any, is_good: Callable[[float], bool], expected: str
) -> float:
    """``value`` as a float, if it is a number that can be used for ``name``."""
    is_scalar = isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta
    if not isinstance(value, Real) and not (is_scalar and not value.is_complex()):
        raise TypeError(
            f"VecNorm: expected {name} to be a number that is {expected}, got "
            f"{type(value).__name__} {value!r}"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not is_good(number):  # False for NaN too
        raise ValueError(f"VecNorm: expected {name} {expected}, got {value}")
    return number


def _find_keys(
    in_keys: list[NestedKey],
    out_keys: list[NestedKey],
    shapes: Sequence[torch.Size] | None,
    names: Mapping[NestedKey, NestedKey] | None,
) -> _Keys:
    for name, other in (("out_keys", out_keys), ("shapes", shapes)):
        if other is not None and len(other) != len(in_keys):
            raise ValueError(
                f"VecNorm: expected as many {name} as in_keys, got {len(other)} {name} "
                f"for the {len(in_keys)} in_keys {in_keys}"
            )
    given = deepcopy((in_keys, out_keys, shapes, names))
    # Whoever changes the lists in place need not have done this.
    in_keys = [unravel_key(key) for key in in_keys]
    out_keys = [unravel_key(key) for key in out_keys]
    for name, keys in (("in_keys", in_keys), ("out_keys", out_keys)):
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise ValueError(f"VecNorm: {name} has {twice[0]!r} more than once: {keys}")
    kept = {key: key for key in in_keys}
    for key, name in (names or {}).items():
        if unravel_key(key) not in kept:
            raise ValueError(
                f"VecNorm: names: expected a key that is one of the in_keys {in_keys}, "
                f"got {key!r}"
            )
        kept[unravel_key(key)] = unravel_key(name)
    if shapes is None:
        shapes = [None] * len(in_keys)
    inputs = [
        _Key(
            in_key,
            out_key,
            StateNames.of(kept[in_key]),
            None if shape is None else torch.Size(shape),
            [key for key in in_keys if kept[key] == kept[in_key] and key != in_key],
        )
        for in_key, out_key, shape in zip(in_keys, out_keys, shapes, strict=True)
    ]
    sets: dict[NestedKey, _Key] = {}
    for key in inputs:
        first = sets.setdefault(kept[key.in_key], key)
        if first.shape != key.shape:
            raise ValueError(
                f"VecNorm: expected one shape for the keys {first.in_key!r} and "
                f"{key.in_key!r}, which share their statistics, got "
                f"{tuple(first.shape)} and {tuple(key.shape)}"
            )
    flat: dict[str, NestedKey] = {}
    for name in sets:
        other = flat.setdefault(VecNorm.SEP.join(as_path(name)), name)
        if other != name:
            raise ValueError(
                f"VecNorm: keys {other!r} and {name!r} have the same name in a state_dict"
            )
    for name in sets:
        path = as_path(name)
        for other, key in sets.items():
            for entry in key.names:
                if as_path(entry) == path[: len(as_path(entry))]:
                    raise ValueError(
                        f"VecNorm: key {name!r} collides with {entry!r}, where the "
                        f"statistics of key {other!r} are kept"
                    )
    mask_names = dict.fromkeys(
        (*path[:depth], "_step")
        for path in map(as_path, in_keys)
        for depth in range(1, len(path))
    )
    sets = [replace(key, in_key=name) for name, key in sets.items()]
    return _Keys(given, inputs, sets, list(mask_names))


def _check_shared_td(
    shared_td: TensorDictBase, keys: list[_Key], has_lock: bool
) -> None:
    # What the tensordict says of itself is not to be trusted: `load_memmap` gives one that
    # denies it, `torch.load` one that claims it.
    for name, leaf in shared_td.items(True, True):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.device.type == "cpu" and not sharing.in_shared_memory(leaf):
            raise RuntimeError(
                "shared_td must be either in shared memory or a memmap tensordict; its "
                f"entry {name!r} is neither."
            )
        sharing.check_file(name, leaf)
    present = set(shared_td.keys(True, True))
    for key in keys:
        missing = [name for name in key.names[:3] if name not in present]
        if missing:
            raise KeyError(
                f"key {key.in_key!r} not present in the shared tensordict: it lacks "
                f"{missing}, its keys are {sorted(map(str, present))}"
            )
        check_usable(key.names, read_moments(shared_td, key.names))
    sharing.refuse_cuda_of_others(sharing.leaves_of(shared_td))
    sharing.check_td(shared_td, has_lock)


_PLACING = {
    "__init__",
    "_maybe_make_transform",
    "append",
    "append_transform",
    "insert",
    "insert_transform",
    "transform",
}


def _called_by_torchrl() -> bool:
    """Whether ``train()`` was called by TorchRL's code that places a transform.

    ``eval()`` reaches us through nn.Module, then comes whoever called it. The setter
    ``TransformedEnv.transform``, ``Compose.append`` and ``insert``, and replay buffers
    do so for themselves; everybody else means it.
    """
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != "torch.nn.modules.module":
            name = frame.f_code.co_name
            return module.startswith("torchrl.") and name in _PLACING
        frame = frame.f_back
    return False


# --------------------------------------------------------------------------- one value


class _Partial(NamedTuple):
    """A call for some of the keys and samples, as at a reset."""

    tolerant: bool  # of missing keys
    masks_td: TensorDictBase | None = (
        None  # with the masks that say which samples count
    )
    mask_name: str = ""


#: What ``_reset`` and ``_step`` say to the ``_call`` that a subclass comes back to:
#: ``partial``, a transform and its _Partial. Other threads are in other calls.
_this_thread = threading.local()


def _partial_call_of(transform: VecNorm) -> _Partial | None:
    if not transform._is_extended():
        return None
    partial = getattr(_this_thread, "partial", None)
    return None if partial is None or partial[0] is not transform else partial[1]


def _warn_of_rounding(key: NestedKey, loc: Tensor, scale: Tensor) -> None:
    """Where a mean that is rounded to the dtype of the values is too coarse for them."""
    step = torch.finfo(loc.dtype).eps * loc.abs().double() / scale.double()
    if bool((step > 0.1).any()):
        warnings.warn(
            f"VecNorm: key {key!r}: an ObservationNorm rounds loc to {loc.dtype}, by up to "
            f"{step.max().item() / 2:.2g} deviations here, and values with it; "
            "`frozen_copy()` does not.",
            stacklevel=3,
        )


def _called(keys: Sequence[_Key], operator: Callable, *args, **kwargs) -> Any:
    """Calls an operator, whose errors have the number of a key, for users of names."""
    if is_compiling():
        return operator(*args, **kwargs)
    try:
        return operator(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        text = re.sub(
            r"\bkey (\d+)\b", lambda m: f"key {keys[int(m[1])].in_key!r}", str(error)
        )
        if text == str(error):
            raise
        raise type(error)(f"VecNorm: {text}") from None


def _without_functorch() -> AbstractContextManager:
    """Statistics are no part of what grad, vmap and the like look into."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def _is_active(mode: torch._C._TorchDispatchModeKey) -> bool:
    return torch._C._get_dispatch_mode(mode) is not None


def _are_fake(values: Iterable[Tensor]) -> bool:
    """Whether a call is about shapes and dtypes only: no graph is made of it either."""
    modes = torch._C._TorchDispatchModeKey
    if is_compiling() or _is_active(modes.PROXY):
        return False
    return _is_active(modes.FAKE) or any(map(is_fake, values))


@contextmanager
def _outside() -> Iterator[None]:
    """Statistics outlive the block, the transform and the trace that they are made in."""
    with _without_functorch(), _disable_current_modes(), torch.inference_mode(False):
        yield


@torch.compiler.assume_constant_result
def _is_inference(leaf: Tensor) -> bool:
    # A graph guards on it, so that it asks anew where the tensor was replaced.
    return leaf.is_inference()


def _is_stale(leaf: Tensor) -> bool:
    """Whether the statistics were made under inference_mode: they stay read-only after."""
    if is_compiling():
        return _is_inference(leaf)
    return (
        leaf.is_inference()
        and not torch.is_inference_mode_enabled()
        and not sharing.in_shared_memory(leaf)
    )


def _check_writable(td: TensorDictBase, key: NestedKey) -> None:
    """What is known before the update is said before it."""
    node, path = td, as_path(key)
    for depth in range(len(path)):
        if not is_tensor_collection(node):
            raise KeyError(
                f"VecNorm: out_key {key!r}: expected a tensordict at {path[:depth]}, got "
                f"{type(node).__name__}"
            )
        if node.is_locked:
            raise RuntimeError(
                "VecNorm: the tensordict is locked, so the normalised values cannot be "
                f"written to {key!r}; unlock it with `tensordict.unlock_()`, or pass a copy"
            )
        node = get_entry(node, path[depth])
        if node is None:
            return


def _check_value(key: NestedKey, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"VecNorm: key {key!r}: expected a tensor, got {type(value).__name__}"
        )
    if value.is_nested or value.is_quantized:
        kind = "a nested tensor" if value.is_nested else f"quantized {value.dtype}"
        raise TypeError(f"VecNorm: key {key!r}: expected dense real values, got {kind}")
    if value.is_complex() or value.layout is not torch.strided or value.is_meta:
        raise TypeError(
            f"VecNorm: key {key!r}: expected dense real values, got "
            f"{value.dtype} in layout {value.layout} on {value.device}"
        )


def _features(
    key: _Key,
    value: Tensor,
    batch_dims: int,
    state: Moments | None,
    beside: torch.Size | None = None,
) -> torch.Size:
    """The shape of the features of a value, checked against what is known of it.

    Args:
        key: the key.
        value: its value.
        batch_dims: of the tensordict.
        state: the statistics, if there are any.
        beside: the features of a key that shares the statistics, if there is one.
    """
    if key.shape is not None:
        expected, source = key.shape, "shapes"
        features = value.shape[max(value.ndim - len(expected), 0) :]
    else:
        features = value.shape[batch_dims:]
        expected, source = features, ""
    if features == expected and (state is not None or beside is not None):
        expected = beside if state is None else state.sum.shape
        source = "the statistics"
        if key.others:
            source += f" that it shares with {', '.join(map(repr, key.others))}"
    if features != expected:
        raise ValueError(
            f"VecNorm: key {key.in_key!r}: expected features of shape "
            f"{tuple(expected)} (from {source}), got {tuple(features)}: the value has "
            f"shape {tuple(value.shape)} and the tensordict {batch_dims} batch "
            "dimension(s)"
        )
    return features


def _find_mask(partial: _Partial, key: NestedKey, samples: torch.Size) -> Tensor | None:
    """The mask that speaks of a key, for each sample.

    That is the outermost one on its path, as in torchrl's ``_update_during_reset``. Where
    all are further down, torchrl leaves the entry as it was: nothing of it was reset.
    """
    td, name = partial.masks_td, partial.mask_name
    parents = as_path(key)[:-1]
    for depth in range(len(parents) + 1):
        mask = get_entry(td, (*parents[:depth], name))
        if mask is not None:
            return _for_samples(mask, key, name, samples)
    for path in map(as_path, td.keys(True, True)):
        if path[-1] == name and path[: len(parents)] == parents:
            return torch.zeros(samples, dtype=torch.bool, device=td.get(path).device)
    return None


def _for_samples(
    mask: Tensor, key: NestedKey, name: str, samples: torch.Size
) -> Tensor:
    shape = mask.shape
    if mask.ndim > len(samples):
        # A sample counts if any part of it does.
        mask = mask.flatten(len(samples)).any(-1)
    if any(m not in (1, n) for m, n in zip(mask.shape, samples, strict=False)):
        raise ValueError(
            f"VecNorm: key {key!r}: expected {name!r} of a shape that begins with that of "
            f"the samples, {tuple(samples)}, got {tuple(shape)}"
        )
    mask = mask[(..., *(None for _ in range(len(samples) - mask.ndim)))]
    return mask.expand(samples)


def _new_moments(features: torch.Size, device: torch.device) -> Moments:
    if is_compiling() or _is_active(torch._C._TorchDispatchModeKey.FAKE):
        return Moments.zeros(features, device=device)
    with _outside():
        return Moments.zeros(features, device=device)


def _identity(value: Tensor) -> Tensor:
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return value.to(dtype, copy=True)
