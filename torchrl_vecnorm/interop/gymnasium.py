# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What stands for Gymnasium's normalising wrappers, as of version 1.4.0.

``NormalizeObservation`` and ``NormalizeReward`` are those of ``gymnasium.wrappers``, and
``vector.NormalizeObservation`` and ``vector.NormalizeReward`` those of
``gymnasium.wrappers.vector``.
"""

from __future__ import annotations

from typing import Any

import gymnasium.wrappers as theirs
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import utils
from gymnasium.wrappers import vector as their_vector

from torchrl_vecnorm.interop._arrays import ArrayStatistics, fold, rule_of

__all__ = ["NormalizeObservation", "NormalizeReward", "RunningMeanStd", "vector"]


class RunningMeanStd(ArrayStatistics, utils.RunningMeanStd):
    """The statistics of a wrapper; a copy or a pickle of it is Gymnasium's."""

    _plain = utils.RunningMeanStd


class _Statistics:
    """A wrapper whose statistics are those of this module, whoever sets them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STATISTICS:
            # Those that Gymnasium's constructor makes say what shape they have.
            shape = np.shape(getattr(self.__dict__.get(name, value), "mean", ()))
            value = RunningMeanStd.of(name, value, shape)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _STATISTICS & state.keys():  # as copied, those of the library
            setattr(self, name, state[name])


_STATISTICS = {"obs_rms", "return_rms"}


class NormalizeObservation(_Statistics, theirs.NormalizeObservation):
    """For ``gymnasium.wrappers.NormalizeObservation`` of version 1.4.0; takes what that takes.

    What differs: statistics are float64, where Gymnasium's are float32; NaN and infinite
    values count as values at the running mean; arrays of ``obs_rms`` are not to be written
    to in place, and what no data can have given cannot be assigned.
    """

    def observation(self, observation: Any) -> np.ndarray:
        """Normalises an observation, which the statistics take in first."""
        rms, rule = self.obs_rms, rule_of(self.epsilon)
        return np.float32(rms.normalize(observation, rule, self._update_running_mean))


class NormalizeReward(_Statistics, theirs.NormalizeReward):
    """For ``gymnasium.wrappers.NormalizeReward`` of version 1.4.0; takes what that takes.

    What differs: a reward that is NaN or infinite counts as one at the running mean, in the
    statistics; arrays of ``return_rms`` are not to be written to in place, and what no data
    can have given cannot be assigned.
    """

    def step(self, action: Any) -> tuple:
        """A step, with its reward over the deviation of discounted sums of rewards."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.discounted_reward = self.discounted_reward * (
            self.gamma * (1 - terminated)
        ) + float(reward)
        rms = self.return_rms
        if self._update_running_mean:
            rms.update(self.discounted_reward)
        scaled = np.float64(reward / rms.scale(self.epsilon))
        return obs, scaled, terminated, truncated, info


class vector:  # a namespace, as Gymnasium has one
    """The wrappers of vector environments."""

    class NormalizeObservation(_Statistics, their_vector.NormalizeObservation):
        """For ``gymnasium.wrappers.vector.NormalizeObservation`` of version 1.4.0.

        What differs is what differs in the wrapper of one environment.
        """

        def observations(self, observations: np.ndarray) -> np.ndarray:
            """Normalises observations, which the statistics take in first."""
            rms, rule = self.obs_rms, rule_of(self.epsilon)
            y = rms.normalize(observations, rule, self._update_running_mean)
            return y if y.dtype == np.float32 else y.astype(np.float32)

    class NormalizeReward(_Statistics, their_vector.NormalizeReward):
        """For ``gymnasium.wrappers.vector.NormalizeReward`` of version 1.4.0.

        What differs is what differs in the wrapper of one environment.
        """

        def step(self, actions: Any) -> tuple:
            """A step, with rewards over the deviation of discounted sums of rewards."""
            obs, reward, terminated, truncated, info = self.env.step(actions)
            sums, restarts = self.accumulated_reward, self._restarts()
            resets = not restarts and np.count_nonzero(self._prev_dones)
            if resets or np.count_nonzero(terminated):
                new = sums * self.gamma * (1 - terminated) + reward
            else:
                new = sums * self.gamma + reward
            # The step after the last one of an episode is its reset, and counts for nothing.
            active = [self._prev_dones == 0] if resets else []
            np.copyto(
                sums, new, casting="same_kind", where=active[0] if resets else True
            )
            rms = self.return_rms
            if self._update_running_mean:
                fold(
                    [torch.from_numpy(sums)], rms._state, *map(torch.from_numpy, active)
                )
            done = np.logical_or(terminated, truncated)
            self._prev_dones = done.astype(np.float32)
            if restarts:
                sums[done] = 0
            return (
                obs,
                np.divide(reward, rms.scale(self.epsilon), dtype=np.float64),
                terminated,
                truncated,
                info,
            )

        def _restarts(self) -> bool:
            """Whether environments begin anew in the step that ends an episode."""
            return self._autoreset_mode == AutoresetMode.SAME_STEP
