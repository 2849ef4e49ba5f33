# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What stands for Stable-Baselines3's ``VecNormalize``, as of version 2.9.2."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import numpy as np
from stable_baselines3.common import running_mean_std
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env import VecNormalize as Theirs

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.interop._arrays import (
    ArrayStatistics,
    is_usual,
    normalize,
    rule_of,
    tensor_of,
)

__all__ = ["RunningMeanStd", "VecNormalize"]

# What is of the environment, and in no file.
_UNSAVED = ("venv", "class_attributes", "returns")


class RunningMeanStd(ArrayStatistics, running_mean_std.RunningMeanStd):
    """The statistics of a :class:`VecNormalize`; a copy or a pickle is Stable-Baselines3's."""

    _plain = running_mean_std.RunningMeanStd


class VecNormalize(Theirs):
    """For ``stable_baselines3.common.vec_env.VecNormalize`` of version 2.9.2.

    Takes what that takes, and is one. ``save`` writes a file of Stable-Baselines3's class,
    and ``load`` reads one. ``obs_rms`` and ``ret_rms`` can be read, and assigned to.

    What differs: NaN and infinite values count as values at the running mean, and a return
    goes on as if such a reward were 0; arrays of
    statistics are not to be written to in place; statistics that no data can have given
    are refused when they are loaded or assigned. Arithmetic is that of float64.
    """

    obs_rms: Any
    ret_rms: RunningMeanStd

    _scales_as_here = True  # a subclass may have its own way with rewards

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Notes whether the class treats rewards as this one does."""
        super().__init_subclass__(**kwargs)
        cls._scales_as_here = (
            cls._update_reward is VecNormalize._update_reward
            and cls.normalize_reward is VecNormalize.normalize_reward
        )

    # Not properties: without norm_obs there is no obs_rms, which VecEnvWrapper asks for
    # over and over where a property raises AttributeError.
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "ret_rms":
            value = RunningMeanStd.of("ret_rms", value, ())
        elif name == "obs_rms" and isinstance(value, dict):
            spaces = self.observation_space.spaces
            value = {
                key: RunningMeanStd.of(f"obs_rms[{key!r}]", rms, spaces[key].shape)
                for key, rms in value.items()
            }
        elif name == "obs_rms":
            value = RunningMeanStd.of("obs_rms", value, self.observation_space.shape)
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------ calls

    def reset(self) -> Any:
        """The first observations, normalised."""
        self.old_obs = obs = self.venv.reset()
        self.returns = np.zeros(self.num_envs)
        return self._normalized(obs, self.training)

    def step_wait(self) -> Any:
        """Observations, rewards, dones and infos of a step, normalised."""
        obs, rewards, dones, infos = self.venv.step_wait()
        attributes = self.__dict__  # past what looks at each assignment
        attributes["old_obs"], attributes["old_reward"] = obs, rewards
        obs = self._normalized(obs, self.training)
        scaled = self._scaled(rewards, dones) if self.training else None
        if scaled is None:
            if self.training:
                self._update_reward(rewards)
            scaled = self.normalize_reward(rewards)
        if np.count_nonzero(dones):
            for i in np.flatnonzero(dones):
                if "terminal_observation" in infos[i]:
                    infos[i]["terminal_observation"] = self.normalize_obs(
                        infos[i]["terminal_observation"]
                    )
            self.returns[dones] = 0
        return obs, scaled, dones, infos

    def normalize_obs(self, obs: Any) -> Any:
        """Normalises observations with the statistics as they are."""
        return self._normalized(obs, False)

    def normalize_reward(self, reward: np.ndarray) -> np.ndarray:
        """Divides rewards by the deviation of discounted sums, as they are known."""
        if not self.norm_reward:
            return reward.astype(np.float32)
        scaled = np.asarray(reward / self.ret_rms.scale(self.epsilon))
        # As clip(), in half the time.
        np.minimum(scaled, self.clip_reward, out=scaled)
        np.maximum(scaled, -self.clip_reward, out=scaled)
        return _float32(scaled)[()]  # a number comes back as one

    def _update_reward(self, reward: np.ndarray) -> None:
        returns = self.__dict__["returns"] = self.returns * self.gamma + reward
        self.ret_rms.update(returns)

    def _scaled(self, reward: Any, done: Any) -> np.ndarray | None:
        """A step of all returns and the scaled rewards in one call.

        None where something is special: `_update_reward` and `normalize_reward` then do it.
        """
        returns = self.returns
        if not (
            self._scales_as_here
            and self.norm_reward
            and is_usual(reward)
            and type(done) is np.ndarray
            and done.dtype == bool
            and done.flags.carray
            and reward.shape == done.shape == returns.shape
            and is_usual(returns)
            and 0 <= self.gamma <= 1
            and self.epsilon > 0
            and self.clip_reward > 0
        ):
            return None
        rule = rule_of(self.epsilon, self.clip_reward, center=False)
        state = self.ret_rms._state
        return _float32(
            _C.scale_returns_of_arrays(
                reward, done, returns, state, self.gamma, False, rule
            )
        )

    def _normalized(self, obs: Any, update: bool) -> Any:
        if not self.norm_obs:
            return deepcopy(obs)
        rms, rule = self.obs_rms, rule_of(self.epsilon, self.clip_obs)
        if not isinstance(rms, dict):
            return _float32(rms.normalize(obs, rule, update))
        keys = self.norm_obs_keys
        xs = [tensor_of(obs[key]) for key in keys]
        leaves = [leaf for key in keys for leaf in rms[key]._state]
        ys = normalize(xs, leaves, rule, update)
        result = {k: deepcopy(v) for k, v in obs.items() if k not in rms}
        result |= {k: _float32(y.numpy()) for k, y in zip(keys, ys, strict=True)}
        return {k: result[k] for k in obs}

    # ------------------------------------------------------------------------ files

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("obs_rms", "ret_rms"):  # as pickled, those of the library
            if name in state:
                setattr(self, name, state[name])

    @staticmethod
    def load(load_path: str, venv: VecEnv) -> VecNormalize:
        """Reads a file of either class.

        Raises:
            TypeError: a file of something else.
            ValueError: of statistics of another shape, or such as no data can have given.
        """
        with open(load_path, "rb") as file:
            saved = pickle.load(file)
        if not isinstance(saved, Theirs):
            raise TypeError(f"expected a VecNormalize, got {type(saved).__name__}")
        if not isinstance(saved, VecNormalize):
            state = {k: v for k, v in saved.__dict__.items() if k not in _UNSAVED}
            saved = VecNormalize.__new__(VecNormalize)
            saved.__setstate__(state)
        saved.set_venv(venv)
        return saved

    def save(self, save_path: str) -> None:
        """Writes a file of Stable-Baselines3's class, which `load` of either class reads."""
        plain = Theirs.__new__(Theirs)
        plain.__dict__.update(self.__dict__)
        with open(save_path, "wb") as file:
            pickle.dump(plain, file)


def _float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float32 else array.astype(np.float32)
