# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's protocol for transforms, in front of running statistics.

Which samples and keys count (steps, resets), what becomes of specs, how the statistics
travel with the transform.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs.transforms import Compose, ObservationNorm
from typing_extensions import Self

from torchrl_vecnorm.export import Normalizer
from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.statistics import Statistics
from torchrl_vecnorm.statistics.entries import get_entry
from torchrl_vecnorm.statistics.keys import Key
from torchrl_vecnorm.transforms import specs
from torchrl_vecnorm.transforms.masks import Partial, StepMasks
from torchrl_vecnorm.transforms.switching import Switching

#: What ``_reset`` and ``_step`` say to the ``_call`` that a subclass comes back to:
#: ``partial``, a transform and its Partial. Other threads are in other calls.
_this_thread = threading.local()


class NormTransform(Switching):
    """A transform that keeps statistics of its in_keys and normalises with them.

    Subclasses say how these look in a state_dict.

    Args:
        in_keys: where the values are.
        out_keys: where they are written to, normalised; by default the same.
        options: of :class:`torchrl_vecnorm.statistics.Statistics`.
    """

    def __init__(
        self,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey] | None,
        **options: Any,
    ) -> None:
        if out_keys is None:
            out_keys = copy(in_keys)
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.frozen = False
        self._step_masks = StepMasks.of(self._in_keys)
        self._statistics = self._make_statistics(**options)
        # Where EnvCreator looks for it.
        self.__dict__["lock"] = self._statistics.store.lock

    def _make_statistics(self, **options: Any) -> Statistics:
        return Statistics(self._in_keys, self._out_keys, **options)

    @property
    def decay(self) -> float:
        """The decay rate, in (0, 1]."""
        return self._statistics.decay

    @decay.setter
    def decay(self, value: float) -> None:
        self._statistics.decay = value

    @property
    def eps(self) -> float:
        """The lower bound of the standard deviation, positive and finite."""
        return self._statistics.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._statistics.eps = value

    @property
    def lock_timeout(self) -> float:
        """Seconds to wait for the lock of shared statistics, positive."""
        return self._statistics.lock_timeout

    @lock_timeout.setter
    def lock_timeout(self, value: float) -> None:
        self._statistics.lock_timeout = value

    @property
    def group(self) -> Group:
        """The ranks whose batches are joined at every call; None: it is alone."""
        ranks = self._statistics.ranks
        return None if ranks is None else ranks.group

    @group.setter
    def group(self, group: Group) -> None:
        self._statistics.set_group(group)

    @property
    def _td(self) -> TensorDictBase | None:
        """The live statistics, None before any data came."""
        return self._statistics.td

    @_td.setter
    def _td(self, td: TensorDictBase | None) -> None:
        self._statistics.td = td

    def __setattr__(self, name: str, value: Any) -> None:
        # No properties: who replaces a list, or shares a lock, finds them in __dict__.
        super().__setattr__(name, value)
        statistics = self.__dict__.get("_statistics")
        if statistics is None:  # being constructed
            return
        if name == "lock":
            statistics.store.set_lock(value)
        elif name in ("_in_keys", "_out_keys", "shapes", "names"):
            statistics.set_keys(**{name.removeprefix("_"): value})

    def frozen_copy(self) -> Self:
        """Returns a copy that follows the statistics but does not update them.

        Raises:
            RuntimeError: no data was seen yet.
        """
        if self._td is None:
            raise RuntimeError(
                "Make sure the VecNorm has been initialized before creating a frozen copy."
            )
        return self.clone().freeze()

    # -------------------------------------------------------------------- the call

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Notes whether the class has a ``_call`` of its own."""
        super().__init_subclass__(**kwargs)
        cls._is_extended = cls._call is not NormTransform._call

    _is_extended = False

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        partial = self._partial_call() if self._is_extended else None
        if partial is None:
            updating = self.training and not self.frozen
            if not is_compiling() and self._statistics.normalize_again(
                next_tensordict, updating
            ):
                return next_tensordict
            partial = Partial(self._missing_tolerance)
            return self._normalize(next_tensordict, partial, tried=True)
        return self._normalize(next_tensordict, partial)

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
        if self._step_masks.in_keys != self._in_keys:
            self._step_masks = StepMasks.of(self._in_keys)
        names = self._step_masks.names
        if get_entry(tensordict, "_step") is None and not (
            names and any(get_entry(tensordict, name) is not None for name in names)
        ):
            return self._call(next_tensordict)
        return self._call_partially(
            next_tensordict, Partial(self._missing_tolerance, tensordict, "_step")
        )

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        # Rewards and the like are not there at a reset; and of a batch of environments
        # only those that are being reset count.
        return self._call_partially(
            tensordict_reset, Partial(True, tensordict, "_reset")
        )

    @property
    def missing_tolerance(self) -> bool:
        """Whether in_keys may be missing, as they may at a reset."""
        partial = self._partial_call() if self._is_extended else None
        return self._missing_tolerance or (partial is not None and partial.tolerant)

    def _partial_call(self) -> Partial | None:
        """What this thread's ``_reset`` or ``_step`` has called our ``_call`` for."""
        transform, partial = getattr(_this_thread, "partial", None) or (None, None)
        return partial if transform is self else None

    def _call_partially(self, td: TensorDictBase, partial: Partial) -> TensorDictBase:
        if not self._is_extended:
            return self._normalize(td, partial)
        # The subclass calls ours with this tensordict, with another, or not at all.
        before = getattr(_this_thread, "partial", None)
        _this_thread.partial = (self, partial)
        try:
            return self._call(td)
        finally:
            _this_thread.partial = before

    def _normalize(
        self, td: TensorDictBase, partial: Partial, tried: bool = False
    ) -> TensorDictBase:
        statistics = self._statistics
        mask_of = None if partial.masks_td is None else partial.mask_of
        call = td, self.training and not self.frozen, partial.tolerant, mask_of
        if not is_compiling():
            if not tried and statistics.normalize_again(*call):
                return td
        # Asked here: a frame without a module is none that Dynamo looks into.
        elif statistics.store.others_update:
            return statistics.normalize_outside_graph(*call)
        elif call[1] and statistics.ranks is not None:
            return statistics.normalize_among_ranks(*call)
        return statistics.normalize(*call)

    # ------------------------------------------------------------------------- ranks

    def sync_(self, group: Group = None) -> None:
        """Joins what ranks have seen since they last had the same statistics.

        For ranks that go on alone, and call this now and then: all of them. After it they
        have the same bits. They begin with nothing, with one ``state_dict`` on all of
        them, or with the last ``sync_()``; who has nothing may join later. Of statistics
        that processes of one machine share, one of them calls it.

        Args:
            group: the ranks of ``torch.distributed``: a process group, a ``DeviceMesh`` of
                one dimension, ``"world"``; by default all ranks.

        Raises:
            RuntimeError: a rank has died, did not come within the group's timeout or
                called something else; ranks went on from different statistics; others
                update these too, so that it is not known how often they have decayed.
                The statistics are as they were.
            ValueError: the ranks have features of different shapes.

        Equivalent to, with ``S0`` what all had and ``k`` calls since (``VecNormV2``: samples)::

            S = decay**k.max() * S0 + sum(S_r - decay**k_r * S0 for all ranks)
        """
        self._statistics.sync_(group)

    # --------------------------------------------------------- reading the statistics

    @property
    def loc(self) -> TensorDict:
        """The mean of each in_key seen so far, ``[*features]``.

        In the dtype of the normalised values, the default dtype before any was seen.
        """
        return self._statistics.loc_scale()[0]

    @property
    def scale(self) -> TensorDict:
        """The standard deviation of each in_key seen so far, at least ``eps``."""
        return self._statistics.loc_scale()[1]

    @property
    def nonfinite(self) -> TensorDict:
        """How many values were left out because they were NaN or infinite.

        int64 ``[*features]`` for each in_key seen so far whose state counts them; a
        ``shared_td`` in the layout of ``torchrl.envs.VecNorm`` does not.
        """
        return self._statistics.nonfinite()

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
        return self._statistics.denormalize(tensordict)

    def to_observation_norm(self) -> Compose | ObservationNorm:
        """Converts VecNorm into an ObservationNorm class for inference time.

        The :class:`torchrl.envs.ObservationNorm` can be updated with
        ``load_state_dict(vecnorm.to_observation_norm().state_dict())``. It rounds
        ``loc`` to the dtype of the values, which shows where ``loc / scale`` is huge: a
        warning says so. :meth:`frozen_copy` does not round.

        Raises:
            RuntimeError: a key was not seen yet.
        """
        norms = []
        for key, loc, scale in self._converted("an ObservationNorm"):
            _warn_of_rounding(key.in_key, loc, scale)
            norms.append(
                ObservationNorm(
                    loc=loc,
                    scale=scale,
                    standard_normal=True,
                    in_keys=key.in_key,
                    out_keys=key.out_key,
                )
            )
        return norms[0] if len(norms) == 1 else Compose(*norms)

    def to_module(self) -> dict[NestedKey, Normalizer]:
        """What it does to each key when it is frozen, as a plain module of torch.

        A :class:`~torchrl_vecnorm.export.Normalizer` for each ``in_key``, for policies that
        are shipped: ``torch.export``, ``torch.jit.script`` and ``torch.onnx.export`` take it,
        and what they make of it is loaded without this package.

        Raises:
            RuntimeError: a key was not seen yet.
        """
        return {
            key.in_key: Normalizer(loc, scale)
            for key, loc, scale in self._converted("a module", torch.float64)
        }

    def _converted(
        self, to: str, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[Key, Tensor, Tensor]]:
        """Each key with its mean and deviation, all of which must have been seen."""
        loc, scale = self._statistics.loc_scale(dtype)
        for key in self._statistics.look_up().inputs:
            if key.in_key not in loc.keys(True, True):
                raise RuntimeError(
                    f"VecNorm must have seen key {key.in_key!r} before it can be "
                    f"converted to {to}."
                )
            yield key, loc.get(key.in_key), scale.get(key.in_key)

    # ----------------------------------------------------------- moving and copying

    def consistent_state_dict(self) -> dict[str, Tensor] | None:
        """A copy of :meth:`get_extra_state`, taken under the lock.

        Beside processes that update shared statistics, the live tensors may be read
        half-way through an update; this copy is from before or after one.
        """
        if self._td is None:
            return self.get_extra_state()
        with torch.inference_mode(False), self._statistics.session():
            return {name: leaf.clone() for name, leaf in self.get_extra_state().items()}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # VecNormV2 has a buffer that says that there are statistics.
        state_dict.pop(f"{prefix}initialized", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def to(self, *args, **kwargs) -> Self:
        """Moves the statistics to a device; they stay float64.

        Shared statistics stay where they are.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None:
            self._statistics.to(device)
        return super().to(*args, **kwargs)

    def __copy__(self) -> Self:
        # Of the same statistics, so under the same lock.
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.__dict__["_statistics"] = copy(self._statistics)
        return copied

    def clone(self) -> Self:
        """A copy of the same statistics, of no environment."""
        cloned = super().clone()
        cloned.__dict__["_statistics"] = copy(self._statistics)
        return cloned

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["lock"]  # the statistics take it along where they can
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_statistics" not in state:
            from torchrl_vecnorm.vecnorm import statistics_of

            state["_statistics"] = statistics_of(state)
            state["_step_masks"] = StepMasks.of(state["_in_keys"])
        super().__setstate__(state)
        self.__dict__["lock"] = self._statistics.store.lock

    # -------------------------------------------------------------------------- specs

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Transforms the observation spec such that it matches the normalised values.

        Args:
            observation_spec (TensorSpec): spec before the transform.

        Returns:
            The spec after it: entries of ``out_keys`` have no bounds, and a
            floating-point dtype.
        """
        return specs.normalize_specs(observation_spec, self._in_keys, self._out_keys)

    def transform_reward_spec(self, reward_spec: TensorSpec) -> TensorSpec:
        """Transforms the reward spec such that it matches the normalised values."""
        return specs.normalize_specs(reward_spec, self._in_keys, self._out_keys)

    def __repr__(self) -> str:
        text = (
            f"{self.__class__.__name__}(decay={float(self.decay)!r}, "
            f"eps={float(self.eps)!r}, in_keys={self.in_keys}, out_keys={self.out_keys}"
        )
        # Without the lock: whoever prints does not want to wait, and counters only grow.
        left_out = {
            key.in_key: int(state.nonfinite[1].sum())
            for key, state in self._statistics.seen()
            if state.nonfinite is not None
        }
        if any(left_out.values()):
            text += f", nonfinite={left_out}"
        return text + ")"


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
