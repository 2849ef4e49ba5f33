# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics that forget with each sample, as ``VecNormV2`` keeps them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling

from torchrl_vecnorm import functional, oracle
from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.compute import Entry, MaskOf, Weights, called, compute
from torchrl_vecnorm.statistics.engine import Statistics
from torchrl_vecnorm.statistics.entries import copy_moments, get_entry
from torchrl_vecnorm.statistics.keys import Key
from torchrl_vecnorm.statistics.layouts import (
    Layout,
    kept_names,
    layouts_of_averages,
    names_of_averages,
    v2_name,
)
from torchrl_vecnorm.statistics.modes import can_be_read, new_moments
from torchrl_vecnorm.statistics.names import as_path
from torchrl_vecnorm.statistics.values import check_value, features_of, identity

#: What torchrl's class has of a key.
FIELDS = ("loc", "var", "count")

#: Why ranks do not join statistics of single environments.
NOT_JOINED = (
    "expected reduce_batch_dims=True with a group: without it each environment of a batch has "
    "statistics of its own, and ranks have none in common"
)

#: What is left of a state after so many samples that a float64 says nothing.
_LEAST = sys.float_info.min


class Averages(Statistics):
    """Running averages of keys of tensordicts.

    A call with n samples, with ``weight = (1 - decay**n) / n``::

        sum    <- decay**n * sum    + weight * Σ x
        ssq    <- decay**n * ssq    + weight * Σ x²
        weight <- decay**n * weight + weight * n        = 1 - decay**count

    and without decay plain sums. ``weight`` is ``[2]``, with the count of samples.

    Args:
        in_keys: where the values are.
        out_keys: where they are written to, normalised.
        reduce_batch_dims: whether all of a batch are samples of one distribution.
            Otherwise each element of the batch has its own statistics.
        options: of :class:`Statistics`.
    """

    counts = 2
    names_of = staticmethod(names_of_averages)
    flat_name = staticmethod(v2_name)

    def __init__(
        self,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        reduce_batch_dims: bool,
        **options: Any,
    ) -> None:
        self.reduce_batch_dims = reduce_batch_dims
        #: Of the last call.
        self.batch_size: torch.Size | None = None
        # Of the call that is bound: the decay, the batch size, and the weights of both.
        self._bound_to: tuple[float, torch.Size, Weights] | None = None
        # Where statistics are shared: what torchrl's class has of each key, shared too.
        self._shown: dict[NestedKey, tuple[Tensor, ...]] = {}
        super().__init__(in_keys, out_keys, **options)

    def set_group(self, group: Group) -> None:
        """As that of :class:`Statistics`, for samples of one distribution."""
        if group is not None and not self.reduce_batch_dims:
            raise ValueError(f"VecNorm: {NOT_JOINED}")
        super().set_group(group)

    def sync_(self, group: Group) -> None:
        """As that of :class:`Statistics`, for samples of one distribution."""
        if not self.reduce_batch_dims:
            raise RuntimeError(f"VecNorm: {NOT_JOINED}")
        super().sync_(group)

    def _batch_dims(self, td: TensorDictBase) -> int:
        return td.batch_dims if self.reduce_batch_dims else 0

    def _weights(self, td: TensorDictBase) -> Weights:
        return self._weights_of(td.batch_size.numel() if self.reduce_batch_dims else 1)

    def _weights_of(self, n: int) -> Weights:
        if self.decay == 1 or n == 0:
            return Weights(1.0)
        forgotten = -math.expm1(n * math.log(self.decay))
        return Weights(max(1 - forgotten, _LEAST), forgotten / n)

    def normalize_again(
        self,
        td: TensorDictBase,
        updating: bool,
        tolerant: bool = False,
        mask_of: MaskOf | None = None,
        weights: Weights | None = None,
    ) -> bool:
        """As that of :class:`Statistics`, for a batch of the same size."""
        bound = self._bound_to
        if (
            bound is None
            or (mask_of is not None and updating and not self.reduce_batch_dims)
            or bound[0] != self._decay
            or bound[1] != td.batch_size
        ):
            return False
        return super().normalize_again(td, updating, tolerant, mask_of, bound[2])

    def _weights_with(
        self, td: TensorDictBase, masks: list[Tensor | None], weights: Weights
    ) -> Weights | None:
        """As that of :class:`Statistics`, where as many samples of each key count."""
        counts = set()
        for key, mask in zip(self._found.inputs, masks, strict=True):
            if mask is None:
                # Without its values a key is not one of the call.
                if get_entry(td, key.in_key) is not None:
                    return None
            elif not can_be_read(mask):
                return None  # how many count, the device knows
            else:
                counts.add(int(mask.sum()))
        return self._weights_of(counts.pop()) if len(counts) == 1 else None

    def normalize(
        self,
        td: TensorDictBase,
        updating: bool,
        tolerant: bool = False,
        mask_of: MaskOf | None = None,
    ) -> TensorDictBase:
        """As that of :class:`Statistics`."""
        of_samples = mask_of
        if mask_of is not None and not self.reduce_batch_dims:
            # Each element of the batch is one sample of statistics of its own.
            def mask_of(key: NestedKey, samples: torch.Size) -> Tensor | None:
                return of_samples(key, td.batch_size)

        if not is_compiling():
            self.batch_size = td.batch_size
            # What torchrl's class has is brought up to date on the long way.
            bound = self._decay, td.batch_size, self._weights(td)
            self._bound_to = None if self._shown else bound
        return super().normalize(td, updating, tolerant, mask_of)

    def _compute(
        self, entries: list[Entry], td: TensorDictBase, updating: bool
    ) -> list[Tensor]:
        weights = self._weights(td)
        masked = [
            e
            for e in entries
            if updating and e.mask is not None and e.state is not None
        ]
        if not masked:
            return compute(entries, updating, weights, self._eps)
        if self._are_counted_here(masked):
            return self._compute_by_count(entries, weights)
        plain = [e for e in entries if all(e is not other for other in masked)]
        for e in masked:
            if self.reduce_batch_dims:
                self._take_in(e)
            else:
                self._take_in_some(e, weights)
        results = compute(plain, updating, weights, self._eps)
        results += compute(masked, False, weights, self._eps)
        found = dict(zip(map(id, (*plain, *masked)), results, strict=True))
        return [found[id(e)] for e in entries]

    def _are_counted_here(self, masked: list[Entry]) -> bool:
        """Whether the host can say how many samples count, and each key has statistics of
        its own: then the operators do it all.
        """
        return (
            self.reduce_batch_dims
            and all(can_be_read(e.mask) for e in masked)
            and len({e.key.names for e in masked}) == len(masked)
        )

    def _compute_by_count(self, entries: list[Entry], weights: Weights) -> list[Tensor]:
        """Keys of which as many samples count, together; ``weights`` are of all."""
        alike: dict[Weights, list[Entry]] = {}
        for e in entries:
            own = weights if e.mask is None else self._weights_of(int(e.mask.sum()))
            alike.setdefault(own, []).append(e)
        found = {}
        for own, some in alike.items():
            results = compute(some, True, own, self._eps)
            found.update(zip(map(id, some), results, strict=True))
        return [found[id(e)] for e in entries]

    def _note_all(self, known: list[Entry], td: TensorDictBase) -> None:
        """They count their samples: nothing to note."""

    def _note_again(self, td: TensorDictBase, weights: Weights, masks: Any) -> None:
        """Nor here."""

    def kept(self, key: Key, moments: Moments) -> float:
        """As that of :class:`Statistics`."""
        since = self.store.since.get(key.names)
        if self.decay == 1:
            return 1.0
        samples = moments.seen().item()
        if since is not None:
            samples -= since.base.seen().item()
        return math.exp(samples * math.log(self.decay))

    @staticmethod
    def kept_name(key: NestedKey) -> str:
        """As that of :class:`Statistics`."""
        return kept_names(key)[1]

    def fold(
        self, keys: list[Key], states: list[Moments], totals: list[Moments]
    ) -> None:
        """As that of :class:`Statistics`, by how many samples all ranks have had."""
        for one, state, total in zip(keys, states, totals, strict=True):
            if total.count.device.type == "cpu":
                weights = self._weights_of(int(total.count.item()))
                called(
                    [one],
                    functional.merge_,
                    state,
                    total,
                    decay=weights.keep,
                    weight=weights.weight,
                )
            else:
                self._fold(state, total)

    def _take_in(self, e: Entry) -> None:
        """Updates with some of the samples; how many is known to the device alone."""
        features = e.state.sum.ndim
        batch = called([e.key], functional.moments, e.value, features, mask=e.mask)
        self._fold(e.state, batch.to(e.state.sum.device))

    def _fold(self, state: Moments, batch: Moments) -> None:
        keep = weight = 1.0
        if self.decay < 1:
            n = batch.samples()
            forgotten = -torch.expm1(n * math.log(self.decay))
            keep, weight = 1 - forgotten, forgotten / n.clamp_min(1)
        copy_moments(state, oracle.fold(state, batch, keep, weight))

    def _take_in_some(self, e: Entry, weights: Weights) -> None:
        """Updates the statistics of some of the batch, the others stay as they are."""
        old = e.state.to(e.state.sum.device, copy=True)
        value = e.value.detach().to(e.state.sum.device)
        called(
            [e.key],
            functional.update_,
            [value],
            [e.state],
            decay=weights.keep,
            weight=weights.weight,
        )
        mask = e.mask.to(value.device)
        mask = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        # As many are missing there as are counted more than before.
        missing = old.nonfinite[0] + (e.state.samples() - old.samples())
        unseen = Moments(
            old.sum,
            old.ssq,
            e.state.count,
            torch.stack([missing, old.nonfinite[1]]),
            old.central,
        )
        new = (
            torch.where(mask, now, before) if now is not e.state.count else now
            for now, before in zip(e.state, unseen, strict=True)
        )
        for leaf, now in zip(e.state, tuple(new), strict=True):
            leaf.copy_(now)

    def begin(self, td: TensorDictBase) -> None:
        """Makes statistics of nothing for values like these; of keys that are there."""
        self.batch_size = td.batch_size
        new = {}
        for key in self.keys:
            value = get_entry(td, key.in_key)
            if value is None:
                continue
            check_value(key.in_key, value)
            features = features_of(key, value, self._batch_dims(td), None)
            new[key.names] = new_moments(features, value.device, True)
            self.dtypes = {**self.dtypes, key.in_key: identity(value).dtype}
        if new:
            self.store.add(new)

    # ------------------------------------------------------- as torchrl's class has it

    def _averages(self, state: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Decayed means of x and of x², and the count of samples."""
        loc, var = state.mean_var()
        square = var + loc * loc
        if self.decay < 1:
            weight = state.samples()
            loc, square = loc * weight, square * weight
        return loc, square, state.seen().round().to(torch.int64)

    def field(self, name: str) -> TensorDict:
        """``loc``, ``var`` or ``count`` of all keys; of shared ones what is shared."""
        at = FIELDS.index(name)
        td = TensorDict()
        with self.session():
            for key, state in self.seen():
                shown = self._shown.get(key.in_key) or self._averages(state)
                td.set(key.in_key, shown[at])
        if not self.reduce_batch_dims and name != "count":
            td.batch_size = self.batch_size or []
        return td

    def _after_update(self) -> None:
        for key, state in self.seen() if self._shown else ():
            pairs = zip(
                self._shown.get(key.in_key, ()), self._averages(state), strict=False
            )
            for shown, now in pairs:
                shown.copy_(now)

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors, flat, and beside them what torchrl's class has."""
        state = super().state_dict()
        for key, moments in self.seen():
            shown = self._shown.get(key.in_key)
            if shown is None:
                dtype = self.dtypes.get(key.in_key, torch.get_default_dtype())
                loc, var, count = self._averages(moments)
                shown = loc.to(dtype), var.to(dtype), count
            path = as_path(key.in_key)
            for field, leaf in zip(FIELDS, shown, strict=True):
                state[v2_name((field, *path))] = leaf
        return state

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """As that of :class:`Statistics`."""
        super().load(state)
        if self.store.others_update and isinstance(state, Mapping):
            for key in self.keys:
                path = as_path(key.in_key)
                shown = tuple(state.get(v2_name((field, *path))) for field in FIELDS)
                if all(isinstance(leaf, Tensor) for leaf in shown):
                    for leaf in shown:
                        leaf.share_memory_()
                    self._shown[key.in_key] = shown
        else:
            with self.session():
                self._after_update()

    def layouts(self, key: Key) -> list[Layout]:
        """What a state_dict may have of a key."""
        return layouts_of_averages(key.in_key, self._decay)
