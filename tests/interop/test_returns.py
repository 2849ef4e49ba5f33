# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Rewards scaled by the deviation of discounted returns, beside the libraries that do so.

Stable-Baselines3 clears a return after its last reward, Gymnasium before it. Their
statistics begin with a weight of 1e-4 of a variance of 1; a state that begins so gives
their numbers from the first call on.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import NormalizeReward
from gymnasium.wrappers.vector import NormalizeReward as VectorNormalizeReward
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnv
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Binary, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_vecnorm import Moments, VecNormReturn
from torchrl_vecnorm import functional as F

CALLS = 3000


def prior(features=()) -> Moments:
    """What both libraries begin with: a weight of 1e-4, at 0, of variance 1."""
    state = Moments.zeros(features)
    state.ssq.fill_(1e-4)
    state.count.fill_(1e-4)
    state.central.fill_(1.0)
    return state


class Script:
    """Rewards and ends of episodes, drawn before anybody asks for them."""

    def __init__(self, envs: int, calls: int = CALLS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        size = (calls, envs)
        self.rewards = rng.normal(size=size) * rng.choice([0.1, 1, 5], size) + 0.4
        self.terminated = rng.random(size) < 0.03
        self.truncated = rng.random(size) < 0.02
        self.rewards[self.terminated] += 100


class Scripted(VecEnv):
    """One for Stable-Baselines3."""

    def __init__(self, script: Script) -> None:
        envs = script.rewards.shape[1]
        super().__init__(envs, spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
        self.script, self.at = script, 0

    def reset(self):
        return np.zeros((self.num_envs, 1), np.float32)

    def step_async(self, actions):
        pass

    def step_wait(self):
        done = self.script.terminated[self.at] | self.script.truncated[self.at]
        reward = self.script.rewards[self.at].astype(np.float32)
        self.at += 1
        return self.reset(), reward, done, [{} for _ in range(self.num_envs)]

    def close(self):
        pass

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs

    def env_method(self, name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def get_attr(self, name, indices=None):
        return [None] * self.num_envs

    def set_attr(self, name, value, indices=None):
        raise NotImplementedError


class ScriptedVector(gym.vector.VectorEnv):
    """One for Gymnasium's vector wrapper."""

    def __init__(self, script: Script, mode: AutoresetMode) -> None:
        self.script, self.at = script, 0
        self.num_envs = script.rewards.shape[1]
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = spaces.Box(-1, 1, (1,))
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, self.num_envs
        )
        self.action_space = gym.vector.utils.batch_space(
            self.single_action_space, self.num_envs
        )

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, 1), np.float32), {}

    def step(self, actions):
        at, self.at = self.at, self.at + 1
        s = self.script
        reward, ends = s.rewards[at], (s.terminated[at], s.truncated[at])
        return self.reset()[0], reward, *ends, {}


class ScriptedEnv(gym.Env):
    """One for Gymnasium's wrapper of a single environment."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, script: Script) -> None:
        self.script, self.at = script, 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        at, self.at = self.at, self.at + 1
        s = self.script
        return (
            self.reset()[0],
            float(s.rewards[at, 0]),
            bool(s.terminated[at, 0]),
            bool(s.truncated[at, 0]),
            {},
        )


class ScriptedTorchRL(EnvBase):
    """One for TorchRL, whose collectors reset what is done."""

    def __init__(self, script: Script) -> None:
        n = script.rewards.shape[1]
        super().__init__(batch_size=[n])
        self.script, self.at = script, 0
        self.observation_spec = Composite(observation=Unbounded((n, 1)), shape=(n,))
        self.action_spec = Unbounded((n, 1))
        self.reward_spec = Unbounded((n, 1))
        names = ("done", "terminated", "truncated")
        ends = {name: Binary(shape=(n, 1), dtype=torch.bool) for name in names}
        self.full_done_spec = Composite(ends, shape=(n,))

    def _observed(self, **entries) -> TensorDict:
        zeros = torch.zeros(*self.batch_size, 1)
        return TensorDict(observation=zeros, **entries, batch_size=self.batch_size)

    def _reset(self, tensordict=None, **kwargs):
        return self._observed()

    def _step(self, tensordict):
        at, self.at = self.at, self.at + 1
        s = self.script
        terminated = torch.from_numpy(s.terminated[at])[:, None]
        truncated = torch.from_numpy(s.truncated[at])[:, None]
        return self._observed(
            reward=torch.from_numpy(s.rewards[at].astype(np.float32))[:, None],
            done=terminated | truncated,
            terminated=terminated,
            truncated=truncated,
        )

    def _set_seed(self, seed):
        pass


def assert_same_statistics(state: Moments, rms, rtol=1e-9) -> None:
    mean, var = state.mean_var()
    np.testing.assert_allclose(mean.numpy(), rms.mean, rtol=rtol)
    np.testing.assert_allclose(var.numpy(), rms.var, rtol=rtol)
    np.testing.assert_allclose(state.samples().numpy(), rms.count, rtol=1e-12)


@pytest.mark.parametrize("envs", [1, 2, 17])
def test_stable_baselines3(envs):
    script = Script(envs)
    theirs = VecNormalize(Scripted(script), norm_obs=False, gamma=0.95)
    theirs.reset()
    state, returns = prior(), torch.zeros(envs, dtype=torch.float64)
    for i in range(CALLS):
        training = i % 500 < 400
        theirs.training = training
        _, want, done, _ = theirs.step(np.zeros(envs, int))
        reward = torch.from_numpy(script.rewards[i].astype(np.float32))
        done = torch.from_numpy(done)
        if training:
            y = F.scale_returns_(reward, done, returns, state, gamma=0.95)
        else:
            y = F.normalize(
                reward, state, eps=1e-8, eps_mode="var_add", clip=10.0, center=False
            )
            returns[done] = 0  # as the library does, whoever goes on learning
        np.testing.assert_allclose(y.numpy(), want, rtol=3e-7)
        np.testing.assert_allclose(returns.numpy(), theirs.returns, 1e-12, 1e-12)
    assert_same_statistics(state, theirs.ret_rms)


def test_a_collector_beside_stable_baselines3():
    """Through resets of some environments, and from batch to batch."""
    envs, calls = 5, 300
    script = Script(envs, calls)
    theirs = VecNormalize(Scripted(script), norm_obs=False, gamma=0.95)
    theirs.reset()
    want = np.stack([theirs.step(np.zeros(envs, int))[1] for _ in range(calls)], 1)

    env = TransformedEnv(ScriptedTorchRL(script), VecNormReturn(gamma=0.95))
    env.transform.set_extra_state(
        {f"reward_{name}": v for name, v in prior([1])._asdict().items()}
    )
    collector = Collector(
        env, frames_per_batch=envs * 25, total_frames=envs * calls, policy=None
    )
    got = torch.cat([td["next", "reward"][..., 0] for td in collector], -1)
    np.testing.assert_allclose(got.numpy(), want, rtol=3e-7)
    np.testing.assert_allclose(
        env.transform.get_extra_state()["reward_returns"][:, 0],
        theirs.returns,
        1e-12,
        1e-12,
    )


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_gymnasium_vector(mode):
    """Its returns are float32."""
    envs = 17
    script = Script(envs)
    theirs = VectorNormalizeReward(ScriptedVector(script, mode), gamma=0.95)
    theirs.reset()
    state, returns = prior(), torch.zeros(envs, dtype=torch.float32)
    ended = torch.zeros(envs, dtype=torch.bool)
    for i in range(CALLS):
        want = theirs.step(None)[1]
        terminated = torch.from_numpy(script.terminated[i])
        y = F.scale_returns_(
            torch.from_numpy(script.rewards[i]),
            terminated,
            returns,
            state,
            gamma=0.95,
            clear="before",
            clip=None,
            mask=~ended if mode == AutoresetMode.NEXT_STEP else None,
        )
        ended = terminated | torch.from_numpy(script.truncated[i])
        if mode == AutoresetMode.SAME_STEP:
            returns[ended] = 0
        np.testing.assert_allclose(y.numpy(), want, rtol=1e-5)
        np.testing.assert_allclose(returns, theirs.accumulated_reward, 1e-4, 1e-4)
    assert_same_statistics(state, theirs.return_rms, rtol=1e-5)


def test_gymnasium_single():
    script = Script(1)
    theirs = NormalizeReward(ScriptedEnv(script), gamma=0.95)
    theirs.reset()
    state, returns = prior(), torch.zeros(1, dtype=torch.float64)
    for i in range(CALLS):
        want = theirs.step(0)[1]
        y = F.scale_returns_(
            torch.from_numpy(script.rewards[i]),
            torch.from_numpy(script.terminated[i]),
            returns,
            state,
            gamma=0.95,
            clear="before",
            clip=None,
        )
        np.testing.assert_allclose(y.numpy(), want, rtol=1e-12)
        np.testing.assert_allclose(returns, theirs.discounted_reward, 1e-12, 1e-12)
    assert_same_statistics(state, theirs.return_rms)


def test_they_differ():
    """Episodes that are only cut off: Gymnasium's returns go on for ever."""
    calls, steps = 20_000, 100
    script = Script(1, calls)
    script.rewards = np.ones((calls, 1))
    script.terminated = np.zeros((calls, 1), bool)
    script.truncated = np.arange(calls)[:, None] % steps == steps - 1
    theirs = VecNormalize(Scripted(script), norm_obs=False, gamma=0.99)
    single = NormalizeReward(ScriptedEnv(script), gamma=0.99)
    rules = {"after": theirs.ret_rms, "before": single.return_rms}
    theirs.reset()
    single.reset()
    scales = []
    for clear, rms in rules.items():
        state, returns = prior(), torch.zeros(1, dtype=torch.float64)
        for i in range(calls):
            ends = script.truncated[i] if clear == "after" else script.terminated[i]
            reward = torch.from_numpy(script.rewards[i])
            F.scale_returns_(
                reward, torch.from_numpy(ends), returns, state, clear=clear
            )
            theirs.step(np.zeros(1, int)) if clear == "after" else single.step(0)
        assert_same_statistics(state, rms)
        scales.append(rms.var**0.5)
    assert scales[0] > 2.5 * scales[1]
