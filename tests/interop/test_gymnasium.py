# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Gymnasium's normalising wrappers beside ours."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers as theirs
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.utils import RunningMeanStd

from torchrl_vecnorm.interop import gymnasium as ours

#: Theirs has statistics of observations in float32.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
ENVS = ["CartPole-v1", "Pendulum-v1", "MountainCarContinuous-v0"]


def assert_close(a, b, **close):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_allclose(a, b, **(close or CLOSE))


@pytest.mark.parametrize("name", ENVS)
def test_the_same_numbers(name):
    a, b = (
        m.NormalizeReward(m.NormalizeObservation(gym.make(name)), gamma=0.9)
        for m in (ours, theirs)
    )
    assert a.observation_space == b.observation_space
    a.action_space.seed(0)
    assert_close(a.reset(seed=0)[0], b.reset(seed=0)[0])
    for i in range(700):
        if i % 100 == 50:
            learns = i % 200 == 150
            for env in (a, b):
                env.update_running_mean = learns
                env.env.update_running_mean = learns
        action = a.action_space.sample()
        x, y = a.step(action), b.step(action)
        assert_close(x[0], y[0])
        assert_close(x[1], y[1], rtol=1e-5)
        assert x[2:4] == y[2:4]
        assert_close(a.discounted_reward, b.discounted_reward, rtol=1e-6)
        if x[2] or x[3]:
            assert_close(a.reset()[0], b.reset()[0])
    assert_close_statistics(a.env.obs_rms, b.env.obs_rms)
    assert_close_statistics(a.return_rms, b.return_rms)


def assert_close_statistics(a, b):
    assert isinstance(a, RunningMeanStd) and isinstance(b, RunningMeanStd)
    np.testing.assert_allclose(a.mean, b.mean, **CLOSE)
    np.testing.assert_allclose(a.var, b.var, **CLOSE)
    np.testing.assert_allclose(a.count, b.count)


@pytest.mark.parametrize("name", ENVS)
@pytest.mark.parametrize(
    "mode", ["observations", AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
)
def test_the_same_vector_numbers(name, mode):
    kwargs = (
        {} if mode == "observations" else {"vector_kwargs": {"autoreset_mode": mode}}
    )
    which = "NormalizeObservation" if mode == "observations" else "NormalizeReward"
    a, b = (
        getattr(m.vector, which)(
            gym.make_vec(name, 5, vectorization_mode="sync", **kwargs)
        )
        for m in (ours, theirs)
    )
    assert a.observation_space == b.observation_space
    a.action_space.seed(0)
    assert_close(a.reset(seed=0)[0], b.reset(seed=0)[0])
    for i in range(600):
        if i % 100 == 50:
            a.update_running_mean = b.update_running_mean = i % 200 == 150
        if i % 250 == 249:
            assert_close(a.reset(seed=i)[0], b.reset(seed=i)[0])
        action = a.action_space.sample()
        x, y = a.step(action), b.step(action)
        assert_close(x[0], y[0])
        assert_close(x[1], y[1], rtol=1e-5)
        np.testing.assert_array_equal(x[2], y[2])
        if mode != "observations":
            assert_close(a.accumulated_reward, b.accumulated_reward, rtol=1e-5)
    attribute = "obs_rms" if mode == "observations" else "return_rms"
    assert_close_statistics(getattr(a, attribute), getattr(b, attribute))


def test_statistics_in_double():
    """Theirs, in float32, has lost the deviation of what is far from 0."""

    class Far(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.look(), {}

        def look(self):
            return np.float32(1e4 + self.np_random.normal(size=1) * 0.1)

        def step(self, action):
            return self.look(), 0.0, False, False, {}

    a, b = ours.NormalizeObservation(Far()), theirs.NormalizeObservation(Far())
    for env in (a, b):
        env.reset(seed=0)
        env.obs_rms = RunningMeanStd(shape=(1,), dtype=np.float32)
        env.obs_rms.mean = np.array([1e4], np.float32)
        env.obs_rms.var = np.array([1e-2], np.float32)
        for _ in range(3000):
            env.step(0)
    assert a.obs_rms.var.dtype == np.float64 and b.obs_rms.var.dtype == np.float32
    assert abs(a.obs_rms.var.item() ** 0.5 - 0.1) < 0.005
    assert abs(a.obs_rms.mean.item() - 1e4) < 0.01


def test_values_that_are_not_finite():
    class Bad(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action_space = gym.spaces.Discrete(2)
        n = 0

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.n += 1
            bad = np.nan if self.n == 5 else 1.0
            return np.array([bad, self.n], np.float32), bad, False, False, {}

    for m, finite in ((ours, True), (theirs, False)):
        env = m.NormalizeReward(m.NormalizeObservation(Bad()))
        env.reset()
        for _ in range(10):
            obs, *_ = env.step(0)
        assert np.isfinite(obs).all() == finite
        assert np.isfinite(env.return_rms.var) == finite
        # What is summed up is the environment's own, as there.
        assert np.isnan(env.discounted_reward).all()


def test_statistics_to_read_and_to_assign():
    env, other = (
        m.NormalizeObservation(gym.make("Pendulum-v1")) for m in (ours, theirs)
    )
    for each in (env, other):
        each.reset(seed=0)
        each.step(each.action_space.sample() * 0)
    saved = pickle.loads(pickle.dumps(env.obs_rms))
    assert type(saved) is RunningMeanStd
    assert_close_statistics(saved, other.obs_rms)
    other.obs_rms, env.obs_rms = saved, other.obs_rms
    assert_close_statistics(env.obs_rms, other.obs_rms)
    env.obs_rms.mean = np.array([1.0, 2.0, 3.0])
    assert env.obs_rms.mean.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        env.obs_rms.var[0] = 1
    for attribute, value, error in (
        ("var", np.full(3, -1.0), "not negative"),
        ("mean", np.zeros(2), "shape"),
        ("count", 0, "positive"),
    ):
        with pytest.raises(ValueError, match=error):
            setattr(env.obs_rms, attribute, value)
    with pytest.raises(ValueError, match=r"obs_rms: expected mean of shape \(3,\)"):
        env.obs_rms = RunningMeanStd(shape=(4,))
    with pytest.raises(TypeError, match="obs_rms: expected statistics"):
        env.obs_rms = {"mean": 1}


@pytest.mark.parametrize("vector", [False, True], ids=["one", "vector"])
def test_copies_and_arguments(vector):
    m = ours.vector if vector else ours
    make = (
        (lambda: gym.make_vec("Pendulum-v1", 3))
        if vector
        else (lambda: gym.make("Pendulum-v1"))
    )
    env = m.NormalizeReward(m.NormalizeObservation(make()))
    env.reset(seed=0)
    env.step(env.action_space.sample())
    other = copy.deepcopy(env)
    action = env.action_space.sample()
    for x, y in zip(env.step(action)[:2], other.step(action)[:2], strict=True):
        np.testing.assert_array_equal(x, y)
    assert "NormalizeObservation" in str(env) and "NormalizeReward" in str(env)
    with pytest.raises(Exception, match="epsilon"):
        m.NormalizeObservation(make(), epsilon=0)
    with pytest.raises(Exception, match="gamma"):
        m.NormalizeReward(make(), gamma=2)
    if vector:
        with pytest.raises(ValueError, match="partial resets"):
            env.env.reset(options={"reset_mask": np.array([True, False, True])})
