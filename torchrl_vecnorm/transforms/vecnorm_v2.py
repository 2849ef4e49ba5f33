# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``VecNormV2``: statistics that forget with each sample, of each environment or of all."""

from __future__ import annotations

import inspect
import uuid
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torch import multiprocessing as mp
from torchrl.data.tensor_specs import Composite
from torchrl.envs import EnvBase
from torchrl.envs import VecNormV2 as _TorchRLVecNormV2
from torchrl.envs.transforms import Compose, ObservationNorm, Transform
from typing_extensions import Self

from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.statistics import Averages
from torchrl_vecnorm.statistics.layouts import V2_SEP
from torchrl_vecnorm.statistics.locks import LOCK_TIMEOUT
from torchrl_vecnorm.transforms import specs, stateless
from torchrl_vecnorm.transforms.base import NormTransform
from torchrl_vecnorm.transforms.masks import Partial

# ``isinstance(t, torchrl.envs.VecNormV2)`` is how TorchRL finds the transforms that an
# evaluator has to freeze, and no ABC. So it is a base, without what would run of it.
_Shell = type(
    "_Shell",
    (_TorchRLVecNormV2,),
    {
        name: inspect.getattr_static(Transform, name)
        for name in vars(_TorchRLVecNormV2)
        if hasattr(Transform, name) and not name.startswith("__")
    }
    | {
        name: inspect.getattr_static(Transform, name)
        for name in ("__init__", "__getstate__", "__setstate__")
    },
)


class VecNormV2(NormTransform, _Shell):
    """Moving average normalization layer that forgets with each sample.

    It is ``torchrl.envs.VecNormV2`` with one compiled operator for all keys of a call. A
    call with ``n`` samples computes::

        count <- count + n                     weight = (1 - decay**n) / n
        loc   <- decay**n * loc + weight * Σ x
        var   <- decay**n * var + weight * Σ x²
        W     =  1 - decay**count
        mean  =  loc / W
        scale =  max(sqrt(max(var / W - mean², 0)), eps)
        y     =  (x - mean) / scale

    and with ``decay = 1`` plain averages. The statistics are float64. Values that are NaN
    or infinite are left out of them. Values keep their dtype; integers and bools come out
    in the default dtype.

    Args:
        in_keys (sequence of NestedKey): keys to be updated.
        out_keys (sequence of NestedKey, optional): destination keys. Defaults to
            ``in_keys``.
        lock (mp.Lock, optional): a lock to prevent race conditions between processes.
            Defaults to a lock of its own.
        stateful (bool, optional): whether the transform keeps the statistics. If not,
            they travel in the tensordict, in entries ``_vecnorm_loc``, ``_vecnorm_var``
            and ``_vecnorm_count``. Default: ``True``.
        decay (number, optional): decay rate of the moving average, in (0, 1], applied
            once a sample. 1 never forgets. Default: 0.9999.
        eps (number, optional): lower bound of the running standard deviation, in the
            units of the values. Default: 1e-4.
        shared_data (TensorDictBase, optional): statistics to begin with, entries
            ``loc``, ``var`` (which is the mean of squares) and ``count``, each with an
            entry for each key; they are copied.
        reduce_batch_dims (bool, optional): if ``True``, all of a batch are samples of one
            distribution. Otherwise each element of the batch has statistics of its own,
            and a call is one sample of each. Default: ``False``.
        lock_timeout (float, optional): seconds to wait for the lock of shared statistics
            before a TimeoutError names the process that holds it. Default: 60.
        group (ProcessGroup, DeviceMesh or "world", optional): as that of
            :class:`torchrl_vecnorm.VecNorm`: ``n`` are the samples of all ranks then. With
            ``reduce_batch_dims``.

    Raises:
        ValueError, TypeError: as :class:`torchrl_vecnorm.VecNorm`.
        RuntimeError: ``reduce_batch_dims`` without ``stateful``.
        NotImplementedError: ``shared_data`` without ``stateful``.
    """

    # The separator of flattened nested keys in a state_dict.
    SEP = V2_SEP

    def __init__(
        self,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey] | None = None,
        *,
        lock: mp.Lock = None,
        stateful: bool = True,
        decay: float = 0.9999,
        eps: float = 1e-4,
        shared_data: TensorDictBase | None = None,
        reduce_batch_dims: bool = False,
        lock_timeout: float = LOCK_TIMEOUT,
        group: Group = None,
    ) -> None:
        if reduce_batch_dims and not stateful:
            raise RuntimeError(
                "reduce_batch_dims=True and stateful=False are not supported."
            )
        if shared_data is not None and not stateful:
            raise NotImplementedError("VecNorm: shared_data needs stateful=True")
        self.stateful = stateful
        self.reduce_batch_dims = reduce_batch_dims
        # What the last step has left in the tensordict, where that is not told.
        self._last: TensorDictBase | None = None
        # Of the values in the environment.
        self._shapes: dict[NestedKey, tuple[torch.Size, torch.device | None]] = {}
        super().__init__(
            in_keys,
            out_keys,
            lock=lock,
            decay=decay,
            eps=eps,
            lock_timeout=lock_timeout,
            group=group,
        )
        if shared_data is not None:
            state = {
                self.SEP.join((field, *name)): leaf
                for field in ("loc", "var", "count")
                for name, leaf in _flat(shared_data[field])
            }
            self._statistics.load(state)

    def _make_statistics(self, **options: Any) -> Averages:
        return Averages(
            self._in_keys,
            self._out_keys,
            reduce_batch_dims=self.reduce_batch_dims,
            **options,
        )

    # ------------------------------------------------------ what torchrl's class has

    @property
    def in_keys(self) -> Sequence[NestedKey]:
        """The keys that are read; without ``stateful`` also those of the statistics."""
        if self.stateful:
            return self._in_keys
        return [*self._in_keys, *(f"{self.prefix}_{f}" for f in stateless.FIELDS)]

    @in_keys.setter
    def in_keys(self, value: Sequence[NestedKey]) -> None:
        Transform.in_keys.fset(self, value)

    @property
    def initialized(self) -> bool:
        """Whether there are statistics."""
        return self.stateful and self._td is not None

    @property
    def prefix(self) -> str:
        """What the entries of the statistics in the tensordict begin with."""
        return self.__dict__.get("_prefix", "_vecnorm")

    def set_container(self, container: Transform | EnvBase) -> None:
        """Places the transform; in an environment it begins with statistics of nothing."""
        super().set_container(container)
        parent = self.parent
        if not isinstance(parent, EnvBase):
            return
        if self.stateful:
            if self._td is None:
                self._statistics.begin(parent.fake_tensordict().get("next"))
            return
        # A reward has statistics at a reset too, where it is missing.
        self._shapes = {
            key: (spec[key].shape, spec[key].device)
            for spec in (parent.full_observation_spec, parent.full_reward_spec)
            for key in map(unravel_key, self._in_keys)
            if key in spec.keys(True, True)
        }
        if "_prefix" not in self.__dict__:
            taken = parent.full_observation_spec.keys()
            is_taken = f"{self.prefix}_loc" in taken
            self._prefix = f"_vecnorm{uuid.uuid1()}" if is_taken else "_vecnorm"

    def clone(self) -> Self:
        """A copy with statistics of its own, of no environment."""
        cloned = super().clone()
        cloned.__dict__["_statistics"] = deepcopy(self._statistics)
        cloned.__dict__["lock"] = cloned._statistics.store.lock
        return cloned

    def _check_stateful(self, what: str, error: type[Exception] = RuntimeError) -> None:
        if not self.stateful:
            raise error(f"VecNorm: {what} needs stateful=True")

    def frozen_copy(self) -> Self:
        """Returns a copy, with statistics of its own that are not updated.

        Raises:
            RuntimeError: no data was seen yet, or there are no statistics here.
        """
        self._check_stateful("a frozen copy")
        return super().frozen_copy()

    @property
    def loc(self) -> TensorDict:
        """The mean of each in_key seen so far, in the dtype of the normalised values."""
        self._check_stateful("loc")
        return self._batched(super().loc)

    @property
    def scale(self) -> TensorDict:
        """The standard deviation of each in_key seen so far, at least ``eps``."""
        self._check_stateful("scale")
        return self._batched(super().scale)

    def _batched(self, td: TensorDict) -> TensorDict:
        if not self.reduce_batch_dims and self._statistics.batch_size is not None:
            td.batch_size = self._statistics.batch_size
        return td

    @property
    def _loc(self) -> TensorDict | None:
        return self._field("loc")

    @property
    def _var(self) -> TensorDict | None:
        return self._field("var")

    @property
    def _count(self) -> TensorDict | None:
        return self._field("count")

    def _field(self, field: str) -> TensorDict | None:
        return self._statistics.field(field) if self.initialized else None

    def denorm(self, tensordict: TensorDictBase) -> TensorDictBase:
        """See :meth:`torchrl_vecnorm.VecNorm.denorm`; it needs ``stateful``."""
        self._check_stateful("denorm", NotImplementedError)
        return super().denorm(tensordict)

    def to_observation_norm(self) -> Compose | ObservationNorm:
        """See :meth:`torchrl_vecnorm.VecNorm.to_observation_norm`; it needs ``stateful``."""
        self._check_stateful("to_observation_norm", NotImplementedError)
        return super().to_observation_norm()

    # -------------------------------------------------------------------- the call

    def _normalize(
        self, td: TensorDictBase, partial: Partial, tried: bool = False
    ) -> TensorDictBase:
        if self.stateful:
            return super()._normalize(td, partial, tried)
        return self._travel(td, td, partial)

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        if self.stateful:
            return super()._step(tensordict, next_tensordict)
        partial = Partial(self._missing_tolerance)
        if "_step" in tensordict.keys():
            partial = Partial(self._missing_tolerance, tensordict, "_step")
        return self._travel(tensordict, next_tensordict, partial)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        if self.stateful:
            return super()._reset(tensordict, tensordict_reset)
        partial, last = Partial(True), tensordict_reset
        if tensordict is not None and "_reset" in tensordict.keys():
            partial = Partial(True, tensordict, "_reset")
            # In a rollout it comes without the statistics of before, which go on.
            last = tensordict
            if self._last is not None and f"{self.prefix}_loc" not in last.keys():
                last = self._last
        return self._travel(last, tensordict_reset, partial)

    def _travel(
        self, td: TensorDictBase, out: TensorDictBase, partial: Partial
    ) -> TensorDictBase:
        out = stateless.normalize(
            td,
            out,
            list(zip(self._in_keys, self._out_keys, strict=True)),
            self._shapes,
            self.prefix,
            self.decay,
            self.eps,
            self.training and not self.frozen,
            partial,
        )
        names = [f"{self.prefix}_{field}" for field in stateless.FIELDS]
        if all(name in out.keys() for name in names):
            self._last = TensorDict(
                {name: out.get(name) for name in names}, batch_size=out.batch_size
            )
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}

    # ------------------------------------------------------------------ checkpoints

    def get_extra_state(self) -> dict[str, Tensor]:
        """The statistics, for ``state_dict()``: the live tensors, flat.

        Beside ours ``loc``, ``var`` (the mean of squares) and ``count`` of each key as
        ``torchrl.envs.VecNormV2`` has them, joined with ``VecNormV2.SEP``: copies, but
        for statistics that ``EnvCreator`` shares. Empty before any data.
        """
        if not self.stateful:
            return {}
        if self._td is None:
            warnings.warn(
                "Querying state_dict on an uninitialized VecNorm transform will return a "
                "`None` value for the summary statistics. Loading such a state_dict on "
                "an initialized VecNorm will result in an error.",
                stacklevel=2,
            )
            return {}
        return self._statistics.state_dict()

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Loads what :meth:`get_extra_state` gave, here, in torchrl's class or VecNorm.

        As :meth:`torchrl_vecnorm.VecNorm.set_extra_state`: in place where there are
        statistics.

        Raises:
            RuntimeError: ``state`` is empty, and there are statistics.
            KeyError, ValueError: as there.
        """
        if not self.stateful:
            return
        if not state:
            if self._td is not None:
                raise RuntimeError(
                    "set_extra_state() called with a void state-dict while the instance "
                    "is initialized."
                )
            state = None
        elif self._td is None and not all(leaf.is_shared() for leaf in state.values()):
            warnings.warn(
                "VecNorm wasn't initialized and the tensordict is not shared. Workers "
                "that are to share the statistics must be started after this.",
                stacklevel=2,
            )
        self._statistics.load(state)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stateful:
            destination[f"{prefix}initialized"] = torch.tensor(self.initialized)

    # ------------------------------------------------------------------------ specs

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """See :meth:`torchrl_vecnorm.VecNorm.transform_observation_spec`."""
        spec = specs.normalize_specs(observation_spec, self._in_keys, self._out_keys)
        if not self.stateful:
            stateless.add_specs(spec, observation_spec, self._in_keys, self.prefix)
        return spec

    def transform_reward_spec(
        self, reward_spec: Composite, observation_spec: Composite | None = None
    ) -> Composite:
        """The same of rewards, whose statistics are with the observations."""
        spec = specs.normalize_specs(reward_spec, self._in_keys, self._out_keys)
        if not self.stateful and observation_spec is not None:
            stateless.add_specs(
                observation_spec, reward_spec, self._in_keys, self.prefix
            )
        return spec

    def transform_output_spec(self, output_spec: Composite) -> Composite:
        """Transforms all specs of what an environment gives."""
        output_spec = output_spec.clone()
        observation_spec = self.transform_observation_spec(
            output_spec["full_observation_spec"]
        )
        if "full_reward_spec" in output_spec.keys():
            output_spec["full_reward_spec"] = self.transform_reward_spec(
                output_spec["full_reward_spec"], observation_spec
            )
        output_spec["full_observation_spec"] = observation_spec
        return output_spec


def _flat(td: TensorDictBase) -> list[tuple[tuple[str, ...], Tensor]]:
    found = [(unravel_key(name), leaf) for name, leaf in td.items(True, True)]
    return [((n,) if isinstance(n, str) else n, leaf) for n, leaf in found]
