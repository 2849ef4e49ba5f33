# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Stable-Baselines3's VecNormalize beside ours."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    sync_envs_normalization,
)
from stable_baselines3.common.vec_env import (
    VecNormalize as Theirs,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from torchrl_vecnorm.interop._arrays import tensor_of
from torchrl_vecnorm.interop.stable_baselines3 import VecNormalize

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Prepared(VecEnv):
    """Gives observations and rewards of its own making, whatever the actions are."""

    def __init__(self, space, n: int = 6, seed: int = 0) -> None:
        super().__init__(n, space, spaces.Discrete(2))
        self.rng = np.random.default_rng(seed)
        self.dtype = np.float32

    def observations(self):
        def draw(space):
            if space.dtype == np.uint8:
                return self.rng.integers(
                    0, 255, (self.num_envs, *space.shape), dtype=np.uint8
                )
            values = self.rng.normal(size=(self.num_envs, *space.shape)) * 3 + 20
            return values.astype(self.dtype)

        if isinstance(self.observation_space, spaces.Dict):
            return {key: draw(space) for key, space in self.space.items()}
        return draw(self.space)

    @property
    def space(self):
        return self.__dict__.setdefault("_space", copy.deepcopy(self.observation_space))

    def reset(self):
        return self.observations()

    def step_async(self, actions):
        pass

    def step_wait(self):
        rewards = (self.rng.normal(size=self.num_envs) + 1).astype(np.float32)
        dones = self.rng.random(self.num_envs) < 0.1
        infos = [
            {"terminal_observation": self.first(self.observations())} if done else {}
            for done in dones
        ]
        return self.observations(), rewards, dones, infos

    def first(self, obs):
        return {k: v[0] for k, v in obs.items()} if isinstance(obs, dict) else obs[0]

    def close(self):
        pass

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs

    def env_method(self, *args, indices=None, **kwargs):
        return [None] * self.num_envs

    def get_attr(self, name, indices=None):
        return [None] * self.num_envs

    def set_attr(self, name, value, indices=None):
        pass


BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DICT = spaces.Dict(
    {
        "a": BOX,
        "b": spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
        "c": spaces.Box(-1, 1, (1,), np.float32),
    }
)
IMAGE = spaces.Box(0, 255, (4, 4, 3), np.uint8)


def pair(space=BOX, **options):
    return tuple(kind(Prepared(space), **options) for kind in (VecNormalize, Theirs))


def assert_close(a, b):
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_close(a[key], b[key])
        return
    assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_allclose(a, b, **CLOSE)


def assert_same_statistics(a, b):
    pairs = [(a.ret_rms, b.ret_rms)]
    if a.norm_obs:
        if isinstance(a.obs_rms, dict):
            assert a.obs_rms.keys() == b.obs_rms.keys()
            pairs += [(a.obs_rms[key], b.obs_rms[key]) for key in a.obs_rms]
        else:
            pairs.append((a.obs_rms, b.obs_rms))
    for x, y in pairs:
        assert isinstance(x, RunningMeanStd) and isinstance(y, RunningMeanStd)
        # Theirs takes the moments of a batch of float32 in float32.
        np.testing.assert_allclose(x.mean, y.mean, **CLOSE)
        np.testing.assert_allclose(x.var, y.var, **CLOSE)
        np.testing.assert_allclose(x.count, y.count)


@pytest.mark.parametrize(
    "space, options",
    [
        (BOX, {}),
        (BOX, {"norm_obs": False}),
        (BOX, {"norm_reward": False}),
        (BOX, {"clip_obs": 1.0, "clip_reward": 0.5, "gamma": 0.9, "epsilon": 0.1}),
        (BOX, {"clip_obs": np.inf}),
        (BOX, {"training": False}),
        (DICT, {}),
        (DICT, {"norm_obs_keys": ["b"]}),
        (IMAGE, {}),
    ],
    ids=str,
)
def test_the_same_numbers(space, options):
    ours, theirs = pair(space, **options)
    assert ours.observation_space == theirs.observation_space
    assert_close(ours.reset(), theirs.reset())
    for i in range(400):
        if i % 50 == 25:
            ours.training = theirs.training = not ours.training
        if i % 70 == 69:
            assert_close(ours.reset(), theirs.reset())
        ours.step_async(None), theirs.step_async(None)
        (obs, reward, done, infos), (obs2, reward2, done2, infos2) = (
            ours.step_wait(),
            theirs.step_wait(),
        )
        assert_close(obs, obs2)
        assert_close(reward, reward2)
        np.testing.assert_array_equal(done, done2)
        for a, b in zip(infos, infos2, strict=True):
            assert a.keys() == b.keys()
            if a:
                assert_close(a["terminal_observation"], b["terminal_observation"])
        assert_close(ours.get_original_obs(), theirs.get_original_obs())
        assert_close(ours.get_original_reward(), theirs.get_original_reward())
        assert_close(ours.returns, theirs.returns)
        assert_close(ours.unnormalize_obs(obs), theirs.unnormalize_obs(obs2))
        assert_close(
            ours.unnormalize_reward(reward), theirs.unnormalize_reward(reward2)
        )
    assert_same_statistics(ours, theirs)
    for reward in (np.float64(3), np.float32(3), np.arange(6)):
        assert_close(ours.normalize_reward(reward), theirs.normalize_reward(reward))


def test_arrays_as_they_come():
    """Read-only, reversed, of other dtypes and byte orders: as numpy takes them."""
    ours, theirs = pair()
    ours.reset(), theirs.reset()
    x = np.arange(18.0).reshape(6, 3)
    frozen = x.copy()
    frozen.flags.writeable = False
    for array in (
        x,
        x.astype(np.float16),
        x.astype(np.uint16),
        x.astype(">f4"),
        frozen,
        x[::-1],
        np.asfortranarray(x),
        np.broadcast_to(x[0], (6, 3)),
    ):
        before = array.copy()
        assert_close(ours.normalize_obs(array), theirs.normalize_obs(array))
        np.testing.assert_array_equal(array, before)
    with pytest.raises(TypeError, match="real numbers"):
        ours.normalize_obs(np.array([["a"] * 3]))
    with pytest.raises(ValueError, match=r"\[3\].*\[6, 4\]"):
        ours.normalize_obs(np.zeros((6, 4)))


def test_no_copies_of_what_goes_in():
    for dtype in (np.float32, np.float64, np.uint8):
        x = np.ones((6, 3), dtype)
        assert tensor_of(x).data_ptr() == x.ctypes.data
        assert tensor_of(x.T).data_ptr() == x.ctypes.data


def test_values_that_are_not_finite():
    ours, theirs = pair()
    bad = np.full((6, 3), 20, np.float32)
    bad[0, 0], bad[1, 1] = np.nan, np.inf
    for each in (ours, theirs):
        each.reset()
        each.venv.observations = lambda: bad
        each.reset()
        del each.venv.observations
    assert np.isnan(theirs.reset()[:, 0]).all()
    assert np.isfinite(ours.reset()).all()


# ------------------------------------------------------------------------------- files


@pytest.mark.parametrize("space", [BOX, DICT, IMAGE], ids=["box", "dict", "image"])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_files_both_ways(space, norm_obs, tmp_path):
    ours, theirs = pair(space, clip_obs=7.0, norm_obs=norm_obs)
    for each in (ours, theirs):
        each.reset()
        for _ in range(20):
            each.step_wait()
    ours.save(str(tmp_path / "ours.pkl"))
    theirs.save(str(tmp_path / "theirs.pkl"))
    # Without a word of this package in it.
    assert b"torchrl_vecnorm" not in (tmp_path / "ours.pkl").read_bytes()
    here = VecNormalize.load(str(tmp_path / "theirs.pkl"), Prepared(space, seed=1))
    own = VecNormalize.load(str(tmp_path / "ours.pkl"), Prepared(space, seed=1))
    there = Theirs.load(str(tmp_path / "ours.pkl"), Prepared(space, seed=1))
    assert type(here) is type(own) is VecNormalize and type(there) is Theirs
    assert_same_statistics(ours, there)
    assert_same_statistics(here, theirs)
    assert here.clip_obs == there.clip_obs == 7
    first = [each.reset() for each in (here, own, there)]
    assert_close(first[0], first[2])
    assert_close(first[1], first[2])
    # And what pickle makes of the wrapper itself.
    again = pickle.loads(pickle.dumps(ours))
    again.set_venv(Prepared(space, seed=1))
    assert type(again) is VecNormalize
    assert_close(again.reset(), first[2])


def test_files_that_cannot_be(tmp_path):
    _, theirs = pair()
    theirs.reset()
    file = tmp_path / "file.pkl"
    for name, attribute, value, message in (
        ("obs_rms", "var", -theirs.obs_rms.var, "obs_rms: expected var"),
        ("obs_rms", "mean", theirs.obs_rms.mean * np.nan, "obs_rms: expected mean"),
        ("obs_rms", "mean", np.zeros(4), r"obs_rms: expected mean of shape \(3,\)"),
        ("ret_rms", "count", 0.0, "ret_rms: expected count"),
    ):
        broken = copy.deepcopy(getattr(theirs, name))
        setattr(broken, attribute, value)
        good = getattr(theirs, name)
        setattr(theirs, name, broken)
        theirs.save(str(file))
        setattr(theirs, name, good)
        with pytest.raises(ValueError, match=message):
            VecNormalize.load(str(file), Prepared(BOX))
    file.write_bytes(pickle.dumps({"obs_rms": 1}))
    with pytest.raises(TypeError, match="expected a VecNormalize, got dict"):
        VecNormalize.load(str(file), Prepared(BOX))


def test_statistics_to_read_and_to_assign():
    ours, theirs = pair()
    ours.reset(), theirs.reset()
    ours.obs_rms = theirs.obs_rms
    assert_same_statistics(ours, theirs)
    for each in (ours, theirs):
        each.obs_rms.mean = np.array([1.0, 2.0, 3.0])
        each.obs_rms.var = np.array([4.0, 4.0, 4.0])
        each.obs_rms.count = 100.0
        each.ret_rms.combine(RunningMeanStd(epsilon=3.0))
    assert_same_statistics(ours, theirs)
    assert_close(ours.reset(), theirs.reset())
    # Written to in place, they would not be those that normalise.
    with pytest.raises(ValueError, match="read-only"):
        ours.obs_rms.mean[0] = 5
    for value, error in ((np.zeros(2), "shape"), (np.full(3, -1.0), "not negative")):
        with pytest.raises(ValueError, match=error):
            ours.obs_rms.var = value
    with pytest.raises(TypeError, match="obs_rms: expected statistics"):
        ours.obs_rms = 3
    assert type(copy.deepcopy(ours.obs_rms)) is RunningMeanStd
    assert_same_statistics(ours, theirs)


def test_without_statistics_of_observations():
    ours, theirs = pair(norm_obs=False)
    assert not hasattr(ours, "obs_rms") and not hasattr(theirs, "obs_rms")
    sync_envs_normalization(ours, pair(norm_obs=False)[0])


def test_evaluation_takes_the_statistics_over():
    for training, evaluation in ((VecNormalize, Theirs), (Theirs, VecNormalize)):
        one, other = training(Prepared(BOX)), evaluation(Prepared(BOX), training=False)
        one.reset()
        sync_envs_normalization(one, other)
        assert_same_statistics(one, other)
        one.reset()
        assert one.obs_rms.count != other.obs_rms.count


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_training_and_its_checkpoints(name, tmp_path):
    agents = {}
    for kind in (VecNormalize, Theirs):
        env = kind(DummyVecEnv([lambda: gym.make(name)] * 4))
        agent = PPO("MlpPolicy", env, n_steps=64, n_epochs=2, seed=0, device="cpu")
        agent.learn(1024)
        agent.save(str(tmp_path / kind.__module__))
        env.save(str(tmp_path / f"{kind.__module__}.pkl"))
        agents[kind] = agent
        assert kind is type(agent.get_vec_normalize_env())
    a, b = (agent.get_vec_normalize_env() for agent in agents.values())
    assert a.obs_rms.count == b.obs_rms.count == 1024 + 4 + 1e-4
    for kind, other in ((VecNormalize, Theirs), (Theirs, VecNormalize)):
        env = other.load(
            str(tmp_path / f"{kind.__module__}.pkl"),
            DummyVecEnv([lambda: gym.make(name)] * 4),
        )
        assert_same_statistics(agents[kind].get_vec_normalize_env(), env)
        resumed = PPO.load(str(tmp_path / kind.__module__), env=env)
        resumed.learn(256)
    check_env(gym.make(name))


def test_a_subclass_with_its_own_way_with_rewards():
    class Halved(VecNormalize):
        def _update_reward(self, reward):
            super()._update_reward(reward / 2)

    class TheirHalved(Theirs):
        def _update_reward(self, reward):
            super()._update_reward(reward / 2)

    ours, theirs = Halved(Prepared(BOX)), TheirHalved(Prepared(BOX))
    for env in (ours, theirs):
        env.reset()
    for _ in range(50):
        for a, b in zip(ours.step_wait(), theirs.step_wait(), strict=True):
            if isinstance(a, np.ndarray):
                assert_close(a, b)
    assert_same_statistics(ours, theirs)


def test_returns_that_are_assigned():
    ours, theirs = pair()
    for env in (ours, theirs):
        env.reset()
    for i in range(40):
        if i % 10 == 5:  # a view, and of another width
            for env in (ours, theirs):
                env.returns = np.full(12, i, dtype=np.float32 if i > 20 else float)[::2]
        rewards, others = ours.step_wait()[1], theirs.step_wait()[1]
        assert_close(rewards, others)
        assert_close(ours.returns, theirs.returns)


@pytest.mark.parametrize(
    "options",
    [{"clip_reward": np.inf}, {"clip_reward": 0.0}, {"epsilon": 0.0}, {"gamma": 1}],
)
def test_numbers_that_rewards_may_have(options):
    ours, theirs = pair(norm_obs=False, **options)
    for env in (ours, theirs):
        env.reset()
    for _ in range(30):
        assert_close(ours.step_wait()[1], theirs.step_wait()[1])
    assert_same_statistics(ours, theirs)
