# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The statistics of named keys, and the calls that update and use them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy, deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling

from torchrl_vecnorm import _ops, functional
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.ranks import Ranks
from torchrl_vecnorm.statistics import checkpoints, sharing, together
from torchrl_vecnorm.statistics.binding import Bound, bind
from torchrl_vecnorm.statistics.compute import (
    Entry,
    MaskOf,
    Weights,
    called,
    compute,
    find_entries,
    keep_new,
)
from torchrl_vecnorm.statistics.entries import get_entry, set_entry
from torchrl_vecnorm.statistics.keys import Key, Keys, find_keys
from torchrl_vecnorm.statistics.layouts import Layout, kept_names, layouts_of_sums
from torchrl_vecnorm.statistics.locks import LOCK_TIMEOUT, Lock, Session
from torchrl_vecnorm.statistics.modes import are_fake
from torchrl_vecnorm.statistics.names import StateNames, flat_name
from torchrl_vecnorm.statistics.shared_td import advise, check_shared_td
from torchrl_vecnorm.statistics.store import Store
from torchrl_vecnorm.statistics.undo import all_or_nothing
from torchrl_vecnorm.statistics.values import (
    check_value,
    check_writable,
    features_of,
    identity,
    number,
)


class Statistics:
    """Running statistics of keys of tensordicts.

    Args:
        in_keys: where the values are.
        out_keys: where they are written to, normalised.
        td: statistics in shared memory, to be updated in place; None begins with none.
        lock: what they are updated under; None is one of their own.
        decay: what the old moments are multiplied by, once a call, in (0, 1].
        eps: lower bound of the standard deviation.
        shapes: the shape of the features of each in_key: by default all dimensions that
            are not the tensordict's batch size.
        lock_timeout: seconds to wait for the lock.
        names: the key under whose name the statistics of an in_key are kept.
        group: ranks of ``torch.distributed`` whose batches are joined at every update.

    The lists of keys, shapes and names may be changed in place, or replaced by
    :meth:`set_keys`; the other options may be set. All hold from the next call on.

    Raises:
        ValueError, TypeError: an option is none that can be used.
        RuntimeError, KeyError: ``td`` is not shared, or lacks entries, see
            :func:`torchrl_vecnorm.statistics.shared_td.check_shared_td`.
    """

    #: Elements of ``count``: 2 where all samples that were ever seen are counted too.
    counts = 1
    #: Where the statistics of a key are in the tensordict.
    names_of = staticmethod(StateNames.of)
    #: What an entry of it is called in a state_dict.
    flat_name = staticmethod(flat_name)

    def __init__(
        self,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        td: TensorDictBase | None = None,
        lock: Any = None,
        decay: float = 0.9999,
        eps: float = 1e-4,
        shapes: Sequence[torch.Size] | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
        names: Mapping[NestedKey, NestedKey] | None = None,
        group: Group = None,
    ) -> None:
        self.in_keys, self.out_keys = in_keys, out_keys
        self.shapes, self.names = shapes, names
        #: The short way of a common call, and the lock that it is made under.
        self.binding: Bound | None = None
        self.decay = decay
        self.eps = eps
        # The dtype of the normalised values of each in_key, once one was seen.
        self.dtypes: dict[NestedKey, torch.dtype] = {}
        self._warned = False
        self._found = find_keys(in_keys, out_keys, shapes, names, self.names_of)
        if td is not None:
            check_shared_td(td, self._found.sets, has_lock=lock is not None)
        self.store = Store(td, lock, [key.names for key in self._found.sets])
        self.lock_timeout = lock_timeout
        #: Those whose batches are joined at every update; None: this process is alone.
        self.ranks: Ranks | None = None
        self.set_group(group)
        if td is not None:
            self._check_given(td, lock)

    def _check_given(self, td: TensorDictBase, lock: Any) -> None:
        store = self.store
        if lock is None:
            store.reserve()
        store.protection()  # refuses a lock of another kind of machine
        if isinstance(lock, Lock) and store.attached is not None:
            store.attached.warn_without_journal()
        try:
            checkpoints.check_live(self, {key.in_key: key.names for key in self.keys})
        except ValueError as error:
            raise ValueError(advise(str(error), td)) from None

    # --------------------------------------------------------------------- options

    @property
    def decay(self) -> float:
        """What the old moments are multiplied by, once a call, in (0, 1]."""
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        self._decay = number("decay", value, lambda v: 0 < v <= 1, "in (0, 1]")
        self.weights = Weights(self._decay)

    @property
    def eps(self) -> float:
        """The lower bound of the standard deviation, positive and finite."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = number(
            "eps", value, lambda v: 0 < v < math.inf, "positive and finite"
        )

    @property
    def lock_timeout(self) -> float:
        """Seconds to wait for the lock of shared statistics, positive."""
        return self.store.timeout

    @lock_timeout.setter
    def lock_timeout(self, value: float) -> None:
        self.store.timeout = number("lock_timeout", value, lambda v: v > 0, "positive")

    @property
    def td(self) -> TensorDictBase | None:
        """The live statistics, None before any data came."""
        return self.store.td

    @td.setter
    def td(self, td: TensorDictBase | None) -> None:
        self.store.td = td

    def set_group(self, group: Group) -> None:
        """The ranks whose batches are joined at every update; None: none."""
        if group is not None and self.store.others_update:
            raise ValueError(f"VecNorm: {together.NOT_SHARED}")
        self.ranks = None if group is None else Ranks(group, "VecNorm")

    def set_keys(self, **changes: Any) -> None:
        """Replaces ``in_keys``, ``out_keys``, ``shapes`` or ``names``."""
        self.__dict__.update(changes)
        self.binding = None  # it watches the lists that were there

    def look_up(self) -> Keys:
        """The keys as they are now; the lists may have been changed in place."""
        given = self.in_keys, self.out_keys, self.shapes, self.names
        if self._found.given != given:
            self._found = find_keys(*given, self.names_of)
            self.store.names = [key.names for key in self._found.sets]
            self.binding = self.store.attached = None
        return self._found

    @property
    def keys(self) -> list[Key]:
        """One for each set of statistics, with the key that they are kept under."""
        return self.look_up().sets

    def session(self) -> AbstractContextManager[Session | None]:
        """Holds the locks; None in a compiled graph, where they mean nothing."""
        self.look_up()
        return self.store.session()

    # ------------------------------------------------------------------- the call

    def normalize_again(
        self,
        td: TensorDictBase,
        updating: bool,
        tolerant: bool = False,
        mask_of: MaskOf | None = None,
        weights: Weights | None = None,
    ) -> bool:
        """As :meth:`normalize`, where nothing is special: every state is known.

        False when there is something special, or wrong: nothing has happened then.
        """
        bound = self.binding  # another thread may take it away
        if bound is None:
            return False
        if updating and self.ranks is not None:
            return False
        if not updating and _ops.needs_plain_torch():
            return False
        binding, bound_lock, users_lock, ndims = bound
        store = self.store
        if store.lock is not bound_lock:
            return False
        weights = weights or self.weights
        masks = None
        if mask_of is not None and updating:
            masks = self._masks(td, ndims, mask_of)
            weights = None if masks is None else self._weights_with(td, masks, weights)
            if weights is None:
                return False
        call = store.td, td, updating, *weights, self._eps, store.timeout
        if masks is not None:
            call = *call, tolerant, masks
        elif tolerant:
            call = *call, tolerant
        try:
            if users_lock is None:
                is_done = binding.call(*call)
            else:
                with Session(users_lock, None, store.timeout):
                    is_done = binding.call(*call)
        except NotImplementedError:  # of a kind of tensor that no operator takes
            return False
        if is_done and updating and store.since:
            self._note_again(td, weights, masks)
        return is_done

    def _weights_with(
        self, td: TensorDictBase, masks: list[Tensor | None], weights: Weights
    ) -> Weights | None:
        """The weights of all keys where these samples count, ``weights`` if all do; None
        if that is not one pair of numbers, or not known here.
        """
        return weights

    def _note_again(
        self, td: TensorDictBase, weights: Weights, masks: list[Tensor | None] | None
    ) -> None:
        """As :meth:`_note_all`, of a call by the short way."""
        if weights.keep == 1:
            return
        for k, key in enumerate(self._found.inputs):
            since = self.store.since.get(key.names)
            # An output may have its place, and has its shape.
            value = get_entry(td, key.in_key)
            if since is None or value is None:
                continue
            mask = None if masks is None else masks[k]
            since.note(
                weights.keep,
                value.numel() // since.features if mask is None else mask.sum(),
            )

    def _masks(
        self, td: TensorDictBase, ndims: list[int], mask_of: MaskOf
    ) -> list[Tensor | None] | None:
        """What ``mask_of`` says of each key; None where a value is none to ask it of."""
        masks = []
        for key, ndim in zip(self._found.inputs, ndims, strict=True):
            value = get_entry(td, key.in_key)
            if value is None:
                masks.append(None)
            elif type(value) is Tensor and value.ndim >= ndim:
                samples = value.shape[: value.ndim - ndim]
                masks.append(mask_of(key.in_key, samples))
            else:
                return None
        return masks

    def normalize(
        self,
        td: TensorDictBase,
        updating: bool,
        tolerant: bool = False,
        mask_of: MaskOf | None = None,
    ) -> TensorDictBase:
        """Normalises the in_keys of ``td`` into its out_keys.

        Args:
            td: entries ``in_keys``, each ``[*samples, *features]``.
            updating: whether the statistics take in the values first.
            tolerant: whether keys may be missing.
            mask_of: says which samples count for the statistics.

        Returns:
            ``td``. After an error the statistics are what they were.

        Raises:
            KeyError: an in_key is missing.
            ValueError: the features of a value have another shape than ``shapes``, the
                statistics, or another in_key that shares them.
            TypeError: a value is complex, sparse, quantized or a nested tensor.
        """
        inputs = self.look_up().inputs
        if updating and self.ranks is not None:
            here = (get_entry(td, key.in_key) for key in inputs)
            if not are_fake(value for value in here if value is not None):
                return together.normalize(self, td, tolerant, mask_of)
        values = self.values_of(td, tolerant)
        if not values:
            return td
        store = self.store
        if are_fake(value for _, value in values):
            for key, value in values:
                features_of(key, value, self._batch_dims(td), store.moments(key.names))
                td.set(key.out_key, identity(value))
            return td
        with store.session() as session:
            attached = store.attached if session is not None and updating else None
            if attached is not None:
                attached.state.load()
            entries = find_entries(
                store,
                values,
                self._batch_dims(td),
                updating,
                mask_of,
                self.counts == 2,
            )
            if not updating and not self._warned and not is_compiling():
                self._warn_identity(entries)
            known = [e for e in entries if e.state is not None]
            if attached is not None:
                for e in known:
                    e.state = attached.copy_of(e.state, e.key.names)
            with all_or_nothing(self, known if updating else []):
                normalized = self._compute(entries, td, updating)
                self._write_outputs(td, [e.key for e in entries], normalized)
                if updating:
                    keep_new(store, known)
                if attached is not None:
                    attached.state.commit()
                if updating:
                    if store.since:
                        self._note_all(known, td)
                    self._after_update()
            is_common = len(known) == len(inputs) and type(td) is TensorDict
            if (
                is_common
                and not is_compiling()
                and (self.binding is None or mask_of is None)
            ):
                # Lists that are changed in place do not say so.
                now = self.in_keys, self.out_keys, self.shapes, self.names
                self.binding = bind(store, self._found, known, td.batch_dims, now)
        return td

    def values_of(self, td: TensorDictBase, tolerant: bool) -> list[tuple[Key, Tensor]]:
        """The values of a call, checked as far as nobody has to know of the statistics."""
        values = []
        for key in self.look_up().inputs:
            value = get_entry(td, key.in_key)
            if value is not None:
                values.append((key, value))
            elif not tolerant:
                raise KeyError(
                    f"VecNorm: key {key.in_key!r} is not in the tensordict, which has "
                    f"{sorted(map(str, td.keys(True, True)))}"
                )
        for key, value in values:
            check_value(key.in_key, value)
            check_writable(td, key.out_key)
        return values

    def _note_all(self, known: list[Entry], td: TensorDictBase) -> None:
        """How much an update has left of what others go on from too.

        Keys may share their statistics.
        """
        weights = self.weights
        samples: dict[StateNames, int | Tensor] = {}
        for e in known:
            since = self.store.since.get(e.key.names)
            if since is not None:
                n = (
                    e.value.numel() // since.features
                    if e.mask is None
                    else e.mask.sum()
                )
                samples[e.key.names] = samples.get(e.key.names, 0) + n
        if weights.keep < 1:
            for names, n in samples.items():
                self.store.since[names].note(weights.keep, n)

    def _batch_dims(self, td: TensorDictBase) -> int:
        """How many leading dimensions of its values are samples."""
        return td.batch_dims

    def _after_update(self) -> None:
        """Under the lock, when the update is there."""

    def _compute(
        self, entries: list[Entry], td: TensorDictBase, updating: bool
    ) -> list[Tensor]:
        return compute(entries, updating, self.weights, self._eps)

    def fold(
        self, keys: list[Key], states: list[Moments], totals: list[Moments]
    ) -> None:
        """Folds the batches of all ranks into the statistics of some keys."""
        weights = self.weights
        called(
            keys,
            functional.merge_,
            states,
            totals,
            decay=weights.keep,
            weight=weights.weight,
        )

    @_ops.not_in_graphs(
        reason="VecNorm: statistics that other processes update need their lock, and "
        "a compiled graph works on copies. Compile without fullgraph=True."
    )
    def normalize_outside_graph(self, *args) -> TensorDictBase:
        """As :meth:`normalize`, for statistics that others update."""
        return self.normalize(*args)

    @_ops.not_in_graphs(reason="VecNorm: ranks meet outside of compiled graphs.")
    def normalize_among_ranks(self, *args) -> TensorDictBase:
        """As :meth:`normalize`, for batches that are joined with those of other ranks."""
        return self.normalize(*args)

    def sync_(self, group: Group) -> None:
        """Joins what ranks have seen since they had the same statistics."""
        together.sync_(self, group)

    def _warn_identity(self, entries: list[Entry]) -> None:
        counts = [None if e.state is None else e.state.samples() for e in entries]
        if any(c is None or (c.device.type == "cpu" and c.item() <= 0) for c in counts):
            self._warned = True
            warnings.warn(
                "VecNorm has no statistics yet and does not collect any (it is frozen "
                "or in eval mode): values are passed on as they are.",
                stacklevel=2,
            )

    def _write_outputs(
        self, td: TensorDictBase, keys: list[Key], normalized: list[Tensor]
    ) -> None:
        for key, y in zip(keys, normalized, strict=True):  # may fail
            set_entry(td, key.out_key, y)
        for key, y in zip(keys, normalized, strict=True):
            if self.dtypes.get(key.in_key) is not y.dtype:
                # Clones were given the dictionary as it was.
                self.dtypes = {**self.dtypes, key.in_key: y.dtype}
                self.binding = None  # of other dtypes, which it would not say

    def denormalize(self, td: TensorDictBase) -> TensorDictBase:
        """The inverse of :meth:`normalize`, without an update.

        Args:
            td: normalised values in ``out_keys``; those that are missing are skipped.

        Returns:
            A shallow copy of ``td``, with the original values in ``in_keys``.

        Raises:
            RuntimeError: a key was not seen yet.
        """
        td = td.copy()
        keys, values, states = [], [], []
        with self.session():
            for key in self._found.inputs:
                value = get_entry(td, key.out_key)
                if value is None:
                    continue
                check_value(key.out_key, value)
                state = self.store.moments(key.names)
                if state is None:
                    raise RuntimeError(
                        f"VecNorm must have seen key {key.in_key!r} before calling denorm."
                    )
                keys.append(key)
                values.append(value)
                states.append(state)
            if are_fake(values):
                originals = list(map(identity, values))
            else:
                pairs = zip(states, values, strict=True)
                states = [state.to(value.device) for state, value in pairs]
                originals = called(
                    keys, functional.denormalize, values, states, eps=self._eps
                )
        for key, original in zip(keys, originals, strict=True):
            td.set(key.in_key, original)
        return td

    # ----------------------------------------------------- reading the statistics

    def seen(self) -> Iterator[tuple[Key, Moments]]:
        """Each set of statistics, with the key that it is kept under."""
        return self._seen(self.look_up().sets)

    def _seen(self, keys: list[Key]) -> Iterator[tuple[Key, Moments]]:
        for key in keys:
            state = self.store.moments(key.names)
            if state is not None:
                yield key, state

    def loc_scale(
        self, dtype: torch.dtype | None = None
    ) -> tuple[TensorDict, TensorDict]:
        """The mean and the standard deviation of each in_key seen so far.

        In a dtype, or in that of the normalised values, the default dtype before any was
        seen.
        """
        loc, scale = TensorDict(), TensorDict()
        with self.session():
            for key, state in self._seen(self._found.inputs):
                known = self.dtypes.get(key.in_key, torch.get_default_dtype())
                both = functional.loc_scale(state, eps=self._eps)
                for td, value in zip((loc, scale), both, strict=True):
                    td.set(key.in_key, value.to(dtype or known))
        return loc, scale

    def nonfinite(self) -> TensorDict:
        """How many values of each in_key were left out, int64 ``[*features]``."""
        td = TensorDict()
        with self.session():
            for key, state in self._seen(self._found.inputs):
                if state.nonfinite is not None:
                    td.set(key.in_key, state.nonfinite[1].to(torch.int64))
        return td

    # -------------------------------------------- checkpoints, moving and copying

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors, flat; those of a memory map are saved and copied by value."""
        # Whoever asks may put them into shared memory, and others may update them then.
        self.binding = None
        # A plain dict of tensors: EnvCreator drops the tensors of an OrderedDict.
        state = {
            self.flat_name(name): sharing.portable(leaf)
            for key, moments in self.seen()
            for name, leaf in zip(key.names, moments, strict=True)
            if leaf is not None
        }
        sharing.note_lock(state.values(), self.store.lock)
        for key, moments in self.seen() if self.store.since else ():
            since = self.store.since.get(key.names)
            if since is not None and since.is_told:
                kept = torch.tensor(self.kept(key, moments), dtype=torch.float64)
                state[self.kept_name(key.in_key)] = kept
        return state

    @staticmethod
    def kept_name(key: NestedKey) -> str:
        """What the entry of :meth:`kept` is called in a state_dict."""
        return kept_names(key)[0]

    def kept(self, key: Key, moments: Moments) -> float:
        """What is left of the statistics that several have had, as a factor."""
        since = self.store.since.get(key.names)
        return 1.0 if since is None else since.kept.item()

    def zeros(self, features: torch.Size, device: torch.device) -> Moments:
        """Statistics of nothing."""
        return Moments.zeros(features, device=device, counts_all=self.counts == 2)

    def layouts(self, key: Key) -> list[Layout]:
        """What a state_dict may have of a key."""
        return layouts_of_sums(key.in_key, self._decay)

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Loads a state_dict, also one of torchrl's ``VecNorm`` or ``VecNormV2``.

        Private tensors are copied; what is shared under our lock becomes ours as it is.

        Raises:
            KeyError: ``state`` is None or lacks an entry of a key that has statistics.
            ValueError: an entry is none that data can have given. In both cases the
                statistics are what they were.
        """
        if state is None:
            if self.store.td is not None:
                raise KeyError("Could not find a tensordict in the state_dict.")
            self.store.lock_was_set = False
            return
        _C.leave_the_pool_after_fork()
        # Nothing could update statistics from inside of inference_mode outside of it.
        with torch.inference_mode(False):
            found = checkpoints.find_statistics(self, state)
            if checkpoints.is_shared_with_us(self, found):
                checkpoints.adopt(self, found)
            elif self.store.td is None:
                checkpoints.load_new(self, found)
            else:
                checkpoints.load_in_place(self, found)
            if not self.store.others_update:
                self.rebase()
                for key in self.keys:
                    since = self.store.since.get(key.names)
                    if since is not None and any(
                        n in state for n in kept_names(key.in_key)
                    ):
                        since.is_told = True
        self.store.lock_was_set = False

    def rebase(self) -> None:
        """Notes that others may go on from these statistics too, as they are."""
        with self.session():
            self.store.rebase()
        if self.ranks is not None:
            self.ranks.asks = True

    def to(self, device: torch.device) -> None:
        """Moves the statistics; shared ones stay where they are."""
        store = self.store
        if store.td is not None and not store.others_update:
            with torch.inference_mode(False), self.session():
                for names, moments in list(store.seen()):
                    store.move(names, moments, device)

    def __copy__(self) -> Statistics:
        # Of the same tensordict, until one of them has another.
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.store = copy(self.store)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Statistics:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with torch.inference_mode(False), self.session():  # no half of an update
            state = deepcopy(self.__getstate__(), memo)
        copied.__setstate__(state)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # Sending tensors to another process shares them.
        self.look_up()
        self.binding = None
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.ranks = None  # of a pickle that is older
        self.__dict__.update(state)
