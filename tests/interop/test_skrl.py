# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""skrl's RunningStandardScaler beside ours."""

import copy
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from skrl import config
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import Wrapper
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.resources.preprocessors.torch import RunningStandardScaler as Theirs
from skrl.trainers.torch import SequentialTrainer
from worlds import (
    CLOSE,
    Points,
    assert_same,
    bad_states,
    draw,
    state_error,
    through_a_file,
)

from torchrl_vecnorm.interop.skrl import RunningStandardScaler

NAMES = ("running_mean", "running_variance", "current_count")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(config.torch, "_device", torch.device("cpu"), raising=False)
    monkeypatch.setattr(config.torch, "device", "cpu")


@pytest.fixture
def biased(monkeypatch):
    """Theirs with the variance of n, the one thing that is to differ."""
    monkeypatch.setattr(torch, "var", partial(torch.var, unbiased=False))


@pytest.mark.parametrize("size", [1, 5, [2, 3], gym.spaces.Box(-1, 1, (4,))], ids=str)
def test_the_same_numbers(size, biased):
    ours, theirs = RunningStandardScaler(size), Theirs(size)
    assert_same(ours.state_dict(), theirs.state_dict())
    generator = np.random.default_rng(0)
    features = ours.running_mean.numel()
    for _ in range(1000):
        x = draw(generator, features)
        if generator.random() < 0.2:
            x = x.expand(int(generator.integers(1, 4)), *x.shape)
        how = {
            "train": bool(generator.random() < 0.5),
            "inverse": bool(generator.random() < 0.3),
            "no_grad": bool(generator.random() < 0.5),
        }
        y, z = ours(x, **how), theirs(x, **how)
        assert y.dtype == z.dtype and y.shape == z.shape
        # The inverse of what lies within ±5 is as large as the mean.
        torch.testing.assert_close(y, z, **CLOSE)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)
    assert ours(None) is None


def test_options_are_theirs(biased):
    x = torch.randn(100, 3) * 4
    for options in (
        {"epsilon": 0.5},
        {"clip_threshold": 0.7},
        {"clip_threshold": np.inf},
    ):
        ours, theirs = RunningStandardScaler(3, **options), Theirs(3, **options)
        for how in ({"train": True}, {}, {"inverse": True}):
            # Their inverse leaves epsilon out: a difference of its size.
            slack = 5 * options.get("epsilon", 0) if "inverse" in how else 0
            diff = (ours(x, **how) - theirs(x, **how)).abs().max()
            assert diff <= 1e-5 + slack * x.abs().max()


def test_variance_of_n_and_one_row():
    """Theirs: n - 1 within a batch, which is NaN for one row, and stays."""
    ours, theirs = RunningStandardScaler(2), Theirs(2)
    x = torch.randn(10, 2) * 2
    ours(x, train=True), theirs(x, train=True)
    pseudo = torch.cat([torch.zeros(1, 2), x]).double()
    want = ((pseudo - pseudo.mean(0)) ** 2).sum(0) + 1
    torch.testing.assert_close(ours.running_variance, want / 11)
    excess = x.double().var(0) / 11  # one sample's variance too much
    torch.testing.assert_close(theirs.running_variance, want / 11 + excess)

    whole, cut = RunningStandardScaler(2), RunningStandardScaler(2)
    whole(x, train=True)
    for row in x:
        cut(row[None], train=True)
    assert_same(whole.state_dict(), cut.state_dict(), rtol=1e-12, atol=1e-12)
    theirs(x[:1], train=True)
    assert theirs(x).isnan().all() and cut(x).isfinite().all()


def test_values_that_are_not_finite():
    """One is NaN for ever there; here it counts as a value at the mean."""
    ours, theirs = RunningStandardScaler(2), Theirs(2)
    x = torch.randn(50, 2) + 3
    for scaler in (ours, theirs):
        scaler(x, train=True)
    mean = ours.running_mean.clone()
    bad = torch.tensor([[torch.nan, 4.0], [torch.inf, 2.0]])
    for scaler in (ours, theirs):
        scaler(bad, train=True)
    assert theirs(x)[:, 0].isnan().all() and ours(x).isfinite().all()
    torch.testing.assert_close(ours.running_mean[0], mean[0])
    assert ours.current_count == 53


def test_gradients():
    """Of x, with the statistics as constants; theirs go through those of the batch."""
    ours = RunningStandardScaler(2)
    x = torch.randn(20, 2, requires_grad=True)
    assert not ours(x, train=True).requires_grad
    y = ours(x, train=True, no_grad=False)
    y.sum().backward()
    scale = ours.running_variance.sqrt() + ours.epsilon
    torch.testing.assert_close(x.grad, (1 / scale).float().expand_as(x))
    assert not any(buffer.requires_grad for buffer in ours.buffers())


def test_compiled():
    ours, other = RunningStandardScaler(3), RunningStandardScaler(3)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for how in ({"train": True}, {}, {"inverse": True}, {"train": True}):
        x = torch.randn(50, 3) + 2
        torch.testing.assert_close(compiled(x, **how), other(x, **how))
    assert_same(ours.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-9)


def test_half_precision_keeps_the_statistics():
    ours = RunningStandardScaler(2)
    ours(torch.randn(20, 2) + 1e3, train=True)
    before = copy.deepcopy(ours.state_dict())
    assert_same(ours.half().state_dict(), before)
    assert ours(torch.randn(2, 2).half()).dtype == torch.float16
    theirs = Theirs(2).half()
    assert theirs.running_mean.dtype == torch.float16


def test_states_both_ways(biased):
    generator = np.random.default_rng(1)
    ours, theirs = RunningStandardScaler(3), Theirs(3)
    for scaler in (ours, theirs):
        for _ in range(5):
            scaler(draw(generator, 3), train=True)
    there, here = Theirs(3), RunningStandardScaler(3)
    there.load_state_dict(through_a_file(ours.state_dict()))
    here.load_state_dict(through_a_file(theirs.state_dict()))
    x = draw(generator, 3)
    for a, b in ((ours, there), (here, theirs)):
        assert_same(a.state_dict(), b.state_dict())
        for how in ({}, {"train": True}, {}):
            torch.testing.assert_close(a(x, **how), b(x, **how), **CLOSE)


def test_states_that_cannot_be():
    ours = RunningStandardScaler(3)
    ours(torch.randn(9, 3), train=True)
    for state, entry in bad_states(ours.state_dict(), *NAMES):
        state_error(ours, state, entry)


def test_what_is_no_tensor():
    ours = RunningStandardScaler(3)
    for x in (np.zeros((2, 3)), [[1.0, 2.0, 3.0]], 1.0):
        with pytest.raises(TypeError, match="expected x as a torch"):
            ours(x, train=True)
    with pytest.raises(ValueError, match=r"\[3\].*\[2, 4\]"):
        ours(torch.zeros(2, 4), train=True)
    with pytest.raises(ValueError, match="eps"):
        RunningStandardScaler(3, epsilon=0)
    assert ours.current_count == 1


# ------------------------------------------------------------------------ an agent


class World(Wrapper):
    def __init__(self):
        torch.manual_seed(0)
        self.points = Points()
        super().__init__(self.points)
        self._device = torch.device("cpu")

    num_envs = property(lambda self: self.points.n)
    num_agents = property(lambda self: 1)
    observation_space = property(lambda self: gym.spaces.Box(-np.inf, np.inf, (4,)))
    action_space = property(lambda self: gym.spaces.Box(-1, 1, (1,)))
    state_space = property(lambda self: None)

    def reset(self):
        return self.points.look(), {}

    def step(self, actions):
        obs, reward, done = self.points.move(actions)
        return obs, reward[:, None], torch.zeros_like(done)[:, None], done[:, None], {}

    def state(self):
        return None

    def render(self):
        return None

    def close(self):
        pass


class Policy(GaussianMixin, Model):
    def __init__(self, **spaces):
        Model.__init__(self, **spaces, device="cpu")
        GaussianMixin.__init__(self)
        self.net = torch.nn.Linear(4, 1)
        self.log_std = torch.nn.Parameter(torch.zeros(1))

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    def __init__(self, **spaces):
        Model.__init__(self, **spaces, device="cpu")
        DeterministicMixin.__init__(self)
        self.net = torch.nn.Linear(4, 1)

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {}


def agent_with(scaler: type, env: World, folder) -> PPO:
    torch.manual_seed(0)
    spaces = {
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "state_space": env.state_space,
    }
    cfg = PPO_CFG()
    cfg.rollouts = 16
    cfg.learning_epochs = 2
    cfg.observation_preprocessor = scaler
    cfg.observation_preprocessor_kwargs = {"size": env.observation_space}
    cfg.value_preprocessor = scaler
    cfg.value_preprocessor_kwargs = {"size": 1}
    cfg.experiment.directory = str(folder)
    cfg.experiment.write_interval = 0
    cfg.experiment.checkpoint_interval = 0
    return PPO(
        models={"policy": Policy(**spaces), "value": Value(**spaces)},
        memory=RandomMemory(memory_size=16, num_envs=env.num_envs, device="cpu"),
        cfg=cfg,
        device="cpu",
        **spaces,
    )


def test_training_and_its_checkpoints(tmp_path, biased):
    agents = {}
    for scaler in (RunningStandardScaler, Theirs):
        env = World()
        agent = agents[scaler] = agent_with(scaler, env, tmp_path)
        trainer = SequentialTrainer(
            env=env,
            agents=agent,
            cfg={
                "timesteps": 96,
                "headless": True,
                "disable_progressbar": True,
                "close_environment_at_exit": False,
            },
        )
        trainer.train()
        file = str(tmp_path / f"{scaler.__module__}.pt")
        agent.save(file)
        other = Theirs if scaler is RunningStandardScaler else RunningStandardScaler
        resumed = agent_with(other, env, tmp_path)
        resumed.load(file)
        for name in ("observation_preprocessor", "value_preprocessor"):
            a, b = agent.checkpoint_modules[name], resumed.checkpoint_modules[name]
            assert type(a) is scaler and type(b) is other and a.current_count > 1000
            assert_same(a.state_dict(), b.state_dict())
            x = torch.randn(8, a.running_mean.numel())
            torch.testing.assert_close(a(x), b(x), **CLOSE)
    # The same run but for rounding, which training enlarges.
    a, b = (agents[s].checkpoint_modules["observation_preprocessor"] for s in agents)
    assert a.current_count == b.current_count
    assert torch.allclose(a.running_mean[2], b.running_mean[2], rtol=0.05)
