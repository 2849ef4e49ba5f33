# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``VecNormReturn``: rewards over the deviation of discounted returns, in environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torch.compiler import is_compiling
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import VecNorm as _TorchRLVecNorm
from typing_extensions import Self

from torchrl_vecnorm import _ops, _return_ops, functional, oracle
from torchrl_vecnorm.checks import check_moments
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.return_norm import check_returns
from torchrl_vecnorm.rule import EpsMode
from torchrl_vecnorm.running_norm import keeping_dtypes
from torchrl_vecnorm.statistics.compute import with_names
from torchrl_vecnorm.statistics.entries import get_entry
from torchrl_vecnorm.statistics.modes import new_moments
from torchrl_vecnorm.statistics.names import as_path, flat_name
from torchrl_vecnorm.transforms import specs
from torchrl_vecnorm.transforms.masks import Partial, StepMasks, for_samples
from torchrl_vecnorm.transforms.switching import Switching


class VecNormReturn(Switching):
    """Divides rewards by the running deviation of discounted returns.

    Each step, for all environments in one call::

        G     <- gamma * G + reward
        sum   <- decay * sum   + Σ G
        ssq   <- decay * ssq   + Σ G²
        count <- decay * count + N
        reward / sqrt(ssq / count - (sum / count)² + eps), within [-clip, clip]
        G     <- 0 where the episode is over

    Args:
        in_keys (sequence of NestedKey, optional): rewards, ``[*envs, k]``, each of whose
            ``k`` features has a deviation of its own. Default: ``["reward"]``.
        out_keys (sequence of NestedKey, optional): where they are written to, scaled.
            Defaults to ``in_keys``.
        gamma (number, optional): the discount, in [0, 1]. Default: 0.99.
        clear (str, optional): ``"after"``: an episode's end, terminated or truncated,
            clears G when the statistics have taken it in, as Stable-Baselines3 has it.
            ``"before"``: a termination clears it before the last reward is added, as
            Gymnasium has it. Resets clear it in both. Default: ``"after"``.
        decay (number, optional): what the old moments are multiplied by, once a step.
            Default: 1, which never forgets.
        eps (number, optional): is added to the variance, or stands where ``eps_mode``
            says, as in :class:`~torchrl_vecnorm.RunningNorm`. Default: 1e-8.
        eps_mode (str, optional): Default: ``"var_add"``.
        clip (number, optional): Default: 10. None for no clip.
        done_keys (sequence of NestedKey, optional): an entry of the step's output for
            each in_key that says whose episode is over, ``[*envs, 1]``. By default
            ``"done"`` (``"terminated"`` with ``clear="before"``) beside the reward, or
            else nearer to the root; without a ``"done"`` it is ``"terminated"`` or
            ``"truncated"``.

    Raises:
        ValueError: ``gamma``, ``decay``, ``eps`` or ``clip`` is out of its range,
            ``out_keys`` or ``done_keys`` do not match ``in_keys`` in length, a key is
            given twice.
        TypeError: one of them is no number.

    The statistics are float64. A reward that is NaN or infinite is left out of them, and
    counts as 0 in what is left of G. In eval mode and while frozen rewards are scaled, and
    neither the statistics nor G change, but that resets clear G. Called on a tensordict
    that is no step of an environment, as by a replay buffer, it scales as well and
    changes nothing: such samples are in no order.

    Statistics are of one process: put the transform around a ``ParallelEnv``, not into
    its workers, each of which would have statistics of its own. A ``clone()`` follows
    these statistics, for environments of its own.

    Examples:
        >>> from torchrl.envs import GymEnv, SerialEnv, TransformedEnv
        >>> env = SerialEnv(4, lambda: GymEnv("Pendulum-v1"))
        >>> env = TransformedEnv(env, VecNormReturn(gamma=0.99))
        >>> rollout = env.rollout(100)
        >>> scale = env.transform.scale["reward"]

    """

    def __init__(
        self,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        *,
        gamma: float = 0.99,
        clear: functional.Clear = "after",
        decay: float = 1.0,
        eps: float = 1e-8,
        eps_mode: EpsMode = "var_add",
        clip: float | None = 10.0,
        done_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        in_keys = ["reward"] if in_keys is None else in_keys
        out_keys = copy(in_keys) if out_keys is None else out_keys
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.gamma = functional.number("gamma", gamma)
        self.clears_before = functional.clears_before(clear)
        self.decay = functional.number("decay", decay)
        self.rule = functional.rule_of(eps, eps_mode, clip, center=False)
        _return_ops.check_gamma(self.gamma)
        _ops.check_numbers(keep=self.decay, rule=self.rule)
        keys = [unravel_key(key) for key in self.in_keys]
        if len(set(keys)) < len(keys):
            raise ValueError(f"expected in_keys that differ, got {keys}")
        for name, others in (("out_keys", self.out_keys), ("done_keys", done_keys)):
            if others is not None and len(others) != len(keys):
                raise ValueError(
                    f"expected {name} to match in_keys in length, got {len(others)} for "
                    f"{len(keys)}"
                )
        self.done_keys = done_keys
        # Clones share the statistics; their environments are others.
        self._moments: dict[NestedKey, Moments] = {}
        self._returns: dict[NestedKey, Tensor] = {}
        # Those that have taken a step since all were reset, or loaded.
        self._begun: set[NestedKey] = set()

    # ------------------------------------------------------------------ environments

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        if not self.training or self.frozen:
            return self.forward(next_tensordict)
        keys, rewards = self._rewards(next_tensordict)
        if next_tensordict.is_locked:
            raise RuntimeError("VecNormReturn: the step's output is locked")
        ends, masks = [], []
        for key, reward in zip(keys, rewards, strict=True):
            envs = reward.shape[: self._env_ndim(next_tensordict, reward)]
            ends.append(self._ends(next_tensordict, key, envs))
            masks.append(_step_mask(tensordict, key, envs))
        states = [
            self._state_for(key, reward, self._env_ndim(next_tensordict, reward))
            for key, reward in zip(keys, rewards, strict=True)
        ]
        scaled = _called(
            keys,
            _return_ops.scale_returns,
            rewards,
            ends,
            [returns for _, returns in states],
            functional.leaves_of([moments for moments, _ in states]),
            functional.masks_of(masks, rewards),
            self.gamma,
            self.clears_before,
            self.decay,
            self.rule,
        )
        # Only now: an error has begun nothing.
        for key, (moments, returns) in zip(keys, states, strict=True):
            self._moments[key], self._returns[key] = moments, returns
        self._begun.update(keys)
        return self._write(next_tensordict, keys, scaled)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        for key, returns in self._returns.items():
            moments = self._moments[key]
            envs = returns.shape[: returns.ndim - moments.sum.ndim]
            mask = None
            if tensordict is not None:
                mask = Partial(True, tensordict, "_reset").mask_of(key, envs)
            if mask is None:
                returns.zero_()
                self._begun.discard(key)
            else:
                mask = mask.reshape(*envs, *(1 for _ in moments.sum.shape))
                returns.masked_fill_(mask.to(returns.device), 0.0)
        return tensordict_reset

    def _reset_on_native_autoreset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._reset(tensordict, tensordict_reset)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Scales the rewards with the statistics as they are.

        Args:
            tensordict: entries ``in_keys``, each ``[*samples, k]``.

        Returns:
            The same tensordict, with the scaled rewards in ``out_keys``.

        Raises:
            KeyError: an in_key is missing.
        """
        keys, rewards = self._rewards(tensordict)
        states = [
            self._moments[key]
            if key in self._moments
            else Moments.zeros(
                reward.shape[self._env_ndim(tensordict, reward) :], device=reward.device
            )
            for key, reward in zip(keys, rewards, strict=True)
        ]
        states = [
            m if m.sum.device == reward.device else m.to(reward.device)
            for m, reward in zip(states, rewards, strict=True)
        ]
        scaled = _called(
            keys, _ops.normalize, rewards, functional.leaves_of(states), self.rule
        )
        return self._write(tensordict, keys, scaled)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self.forward(next_tensordict)

    # ----------------------------------------------------------------------- entries

    def _rewards(self, td: TensorDictBase) -> tuple[list[NestedKey], list[Tensor]]:
        keys, rewards = [], []
        for key in map(unravel_key, self.in_keys):
            reward = get_entry(td, key)
            if reward is not None:
                keys.append(key)
                rewards.append(reward)
            elif not self.missing_tolerance:
                raise KeyError(
                    f"VecNormReturn: key {key!r} not found, there are "
                    f"{sorted(map(str, td.keys(True, True)))}"
                )
        return keys, rewards

    def _env_ndim(self, td: TensorDictBase, reward: Tensor) -> int:
        """How many leading dimensions are environments: the last one is the features'."""
        return reward.ndim - 1 if reward.ndim > td.ndim else reward.ndim

    def _ends(self, td: TensorDictBase, key: NestedKey, envs: torch.Size) -> Tensor:
        """Whose episode is over, ``envs``."""
        if self.done_keys is not None:
            at = list(map(unravel_key, self.in_keys)).index(key)
            candidates = [[unravel_key(self.done_keys[at])]]
        else:
            names = ["terminated"] if self.clears_before else ["done"]
            others = ["done"] if self.clears_before else ["terminated", "truncated"]
            parents = as_path(key)[:-1]
            candidates = [
                [unravel_key((*parents[:depth], name)) for name in of]
                for depth in range(len(parents), -1, -1)
                for of in (names, others)
            ]
        for keys in candidates:
            found = [end for end in (get_entry(td, k) for k in keys) if end is not None]
            if found:
                ends = found[0] if len(found) == 1 else found[0] | found[1]
                return for_samples(ends, key, keys[0], envs, "VecNormReturn")
        raise KeyError(
            f"VecNormReturn: key {key!r}: expected one of {candidates} beside it, there "
            f"are {sorted(map(str, td.keys(True, True)))}"
        )

    def _write(
        self, td: TensorDictBase, keys: list[NestedKey], values: list[Tensor]
    ) -> TensorDictBase:
        out_keys = dict(zip(map(unravel_key, self.in_keys), self.out_keys, strict=True))
        for key, value in zip(keys, values, strict=True):
            td.set(out_keys[key], value)
        return td

    def _state_for(
        self, key: NestedKey, reward: Tensor, env_ndim: int
    ) -> tuple[Moments, Tensor]:
        """The statistics and returns that go on with this reward; zeros at first."""
        device = reward.device
        moments = self._moments.get(key)
        if moments is None:
            moments = new_moments(reward.shape[env_ndim:], device)
        elif moments.sum.device != device:
            moments = moments.to(device)
        returns = self._returns.get(key)
        if returns is None or returns.shape != reward.shape:
            if key in self._begun:
                raise ValueError(
                    f"VecNormReturn: key {key!r}: expected rewards of shape "
                    f"{tuple(self._returns[key].shape)}, as in the steps before, got "
                    f"{tuple(reward.shape)}; a reset of all environments makes room for "
                    "others"
                )
            # As statistics are, for who steps in inference_mode now, and not later.
            returns = new_moments(reward.shape, device).sum
        return moments, returns.to(device)

    # ------------------------------------------------------------ reading, checkpoints

    @property
    def scale(self) -> TensorDict:
        """What rewards are divided by, ``[k]`` and float64, for each in_key seen so far."""
        scales = TensorDict()
        for key, moments in self._moments.items():
            scales.set(key, oracle.loc_scale(moments, self.rule)[1])
        return scales

    def get_extra_state(self) -> dict[str, Tensor]:
        """The statistics and returns, for ``state_dict()``: the live tensors, flat.

        ``<key>_sum``, ``<key>_ssq``, ``<key>_count``, ``<key>_nonfinite``,
        ``<key>_central`` and, where there are environments, ``<key>_returns`` for each
        key seen so far, nested keys joined with ``VecNorm.SEP``.
        """
        state = {}
        for key, moments in self._moments.items():
            name = flat_name(key)
            state |= {f"{name}_{leaf}": v for leaf, v in moments._asdict().items()}
            if key in self._returns:
                state[f"{name}_returns"] = self._returns[key]
        return state

    def set_extra_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Loads what :meth:`get_extra_state` gave. All of it, or nothing where it errs.

        The values are copied, into the statistics that are there. Returns are those of
        as many environments as were saved: other ones begin anew.

        Raises:
            KeyError: an entry of a key that has statistics is missing, or an entry is of
                no key.
            ValueError: an entry is no tensor, has another shape, or values that no data
                can have given.
        """
        state = dict(state or {})
        loaded: dict[NestedKey, tuple[Moments, Tensor | None]] = {}
        for key in map(unravel_key, self.in_keys):
            names = [f"{flat_name(key)}_{field}" for field in Moments._fields]
            entries = [state.pop(name, None) for name in names]
            returns = state.pop(f"{flat_name(key)}_returns", None)
            live = self._moments.get(key)
            if live is None and returns is None and not any(_is_there(*entries)):
                continue
            for name, there in zip(names, _is_there(*entries), strict=True):
                if not there:
                    raise KeyError(f"VecNormReturn: entry {name!r} is missing")
            features = None if live is None else live.sum.shape
            moments = check_moments(
                names, Moments(*entries), features, owner="VecNormReturn"
            )
            if returns is not None:
                name = f"{flat_name(key)}_returns"
                check_returns(name, returns, None, "VecNormReturn")
                n = returns.ndim - moments.sum.ndim
                if n < 0 or returns.shape[n:] != moments.sum.shape:
                    raise ValueError(
                        f"VecNormReturn: entry {name!r}: expected features of shape "
                        f"{tuple(moments.sum.shape)}, got shape {tuple(returns.shape)}"
                    )
            loaded[key] = moments, returns
        if state:
            raise KeyError(f"VecNormReturn: entries of no in_key: {sorted(state)}")
        # What inference_mode makes could not be updated outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for key, (moments, returns) in loaded.items():
                self._load(key, moments, returns)

    def _load(self, key: NestedKey, moments: Moments, returns: Tensor | None) -> None:
        live = self._moments.get(key)
        if live is None:
            live = Moments(*(leaf.to(torch.float64, copy=True) for leaf in moments))
            self._moments[key] = live
        else:
            for leaf, value in zip(live, moments, strict=True):
                leaf.copy_(value)
        self._begun.discard(key)
        old = self._returns.get(key)
        if returns is not None and old is not None and old.shape == returns.shape:
            old.copy_(returns)
        elif returns is not None:
            self._returns[key] = returns.to(live.sum.device, live.sum.dtype, copy=True)
        elif old is not None:
            old.zero_()

    # ------------------------------------------------------------- moving and copying

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        move = keeping_dtypes(fn)
        with torch.inference_mode(False):
            for key, moments in self._moments.items():
                self._moments[key] = Moments(*map(move, moments))
            for key, returns in self._returns.items():
                self._returns[key] = move(returns)
        return super()._apply(fn, recurse)

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied._with_no_environments()

    def clone(self) -> Self:
        """A copy that follows the same statistics, for environments of its own."""
        return super().clone()._with_no_environments()

    def frozen_copy(self) -> Self:
        """A copy that follows the statistics but does not update them."""
        return self.clone().freeze()

    def _with_no_environments(self) -> Self:
        self.__dict__.update(_returns={}, _begun=set())
        return self

    # -------------------------------------------------------------------------- specs

    def transform_reward_spec(self, reward_spec: TensorSpec) -> TensorSpec:
        """The spec after it: floating-point, without bounds, as a NaN stays one."""
        return specs.normalize_specs(reward_spec, self.in_keys, self.out_keys)

    def __repr__(self) -> str:
        eps, _, clip, _ = self.rule
        return (
            f"{self.__class__.__name__}(gamma={self.gamma}, "
            f"clear={_return_ops.CLEARS[self.clears_before]!r}, decay={self.decay}, "
            f"eps={eps}, clip={clip}, in_keys={self.in_keys}, out_keys={self.out_keys})"
        )


def _called(keys: Sequence[NestedKey], operator: Callable, *args: Any) -> list[Tensor]:
    """Calls an operator, whose errors have the number of a key, for users of names."""
    if is_compiling():
        return operator(*args)
    try:
        return operator(*args)
    except (ValueError, TypeError, RuntimeError) as error:
        text = with_names(error, keys)
        if text == str(error):
            raise
        raise type(error)(f"VecNormReturn: {text}") from None


def _is_there(*entries: Any) -> list[bool]:
    return [entry is not None for entry in entries]


def _step_mask(
    tensordict: TensorDictBase, key: NestedKey, envs: torch.Size
) -> Tensor | None:
    """Which environments have taken part in a partial step; None where all have."""
    names = ["_step", *StepMasks.of([key]).names]
    if all(get_entry(tensordict, name) is None for name in names):
        return None
    return Partial(False, tensordict, "_step").mask_of(key, envs)


# ``isinstance(t, torchrl.envs.VecNorm)`` is how TorchRL finds what an evaluator has to
# freeze.
_TorchRLVecNorm.register(VecNormReturn)
