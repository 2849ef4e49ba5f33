# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""rl_games' normalisers beside ours."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from rl_games.algos_torch import models
from rl_games.algos_torch import running_mean_std as theirs
from rl_games.common import env_configurations, vecenv
from rl_games.common.ivecenv import IVecEnv
from rl_games.torch_runner import Runner
from worlds import (
    CLOSE,
    Points,
    assert_same,
    bad_states,
    draw,
    state_error,
    through_a_file,
)

from torchrl_vecnorm.interop import rl_games as ours

NAMES = ("running_mean", "running_var", "count")
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize(
    "insize, options",
    [
        ((5,), {}),
        ((1,), {"epsilon": 0.1}),
        ((2, 3), {}),
        ((5,), {"norm_only": True}),
        ((3,), {"per_channel": True}),
        ((3, 4), {"per_channel": True}),
        ((3, 4, 2), {"per_channel": True}),
    ],
    ids=str,
)
def test_the_same_numbers(insize, options, scripted):
    norm, other = (
        ours.RunningMeanStd(insize, **options),
        theirs.RunningMeanStd(insize, **options),
    )
    assert_same(norm.state_dict(), other.state_dict())
    if scripted:
        norm = torch.jit.script(norm)
    generator = np.random.default_rng(0)
    for _ in range(400):
        x = draw(generator, *insize)
        training = bool(generator.random() < 0.6)
        norm.train(training), other.train(training)
        y, z = norm(x), other(x)
        assert y.dtype == z.dtype and y.shape == z.shape
        torch.testing.assert_close(y, z, **CLOSE)
        if not options.get("norm_only"):
            other.eval()
            torch.testing.assert_close(
                norm(x, denorm=True), other(x, denorm=True), **CLOSE
            )
    assert_same(norm.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-5)


def test_denorm_does_not_learn():
    norm, other = ours.RunningMeanStd((2,)), theirs.RunningMeanStd((2,))
    x = torch.randn(50, 2) + 3
    for each in (norm, other):
        each(x)
        each(x, denorm=True)
    assert norm.count == 51 and other.count == 101


def test_norm_only_is_undone():
    norm, other = (
        kind((2,), norm_only=True)
        for kind in (ours.RunningMeanStd, theirs.RunningMeanStd)
    )
    x = torch.randn(50, 2) * 30 + 100
    for each in (norm, other):
        each(x)
        each.eval()
    torch.testing.assert_close(norm(norm(x), denorm=True), x, rtol=1e-5, atol=0)
    assert (other(other(x), denorm=True) - x).abs().max() > 50


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_a_mask_is_for_each_feature(scripted):
    """Theirs: one mean for all features, and a variance below 0."""
    norm, other = ours.RunningMeanStd((3,)), theirs.RunningMeanStd((3,))
    if scripted:
        norm = torch.jit.script(norm)
    x = torch.randn(500, 3) + torch.tensor([1.0, 10.0, 100.0])
    mask = (torch.rand(500, 1) < 0.5).float()
    y = norm(x, mask=mask)
    other(x, mask=mask)
    kept = torch.cat([x[mask[:, 0] > 0].double(), torch.zeros(1, 3)])
    n = len(kept)
    mean = kept.mean(0)
    var = ((kept - mean) ** 2).mean(0) + 1 / n  # the first sample has a variance of 1
    assert norm.count == n and other.count == 501
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-6, atol=0)
    want = ((x - mean) / (var + 1e-5).sqrt()).clamp(-5, 5).float()
    torch.testing.assert_close(y, want, **CLOSE)
    assert (other.running_var < 0).all() and len(other.running_mean.unique()) == 1
    torch.testing.assert_close(
        norm(x[:4], mask=mask[:4, 0]), norm.eval()(x[:4]), **CLOSE
    )
    with pytest.raises((ValueError, RuntimeError), match="mask"):
        norm.train()(x, mask=mask[:7])


def test_values_that_are_not_finite():
    norm, other = ours.RunningMeanStd((2,)), theirs.RunningMeanStd((2,))
    x = torch.randn(50, 2) + 3
    bad = torch.tensor([[torch.nan, 4.0], [torch.inf, 2.0]])
    for each in (norm, other):
        each(x), each(bad)
    assert other(x)[:, 0].isnan().all() and norm(x).isfinite().all()
    assert norm.count == 103


def test_dicts_of_observations():
    sizes = {"place": (3,), "map": (2, 2)}
    norm, other = ours.RunningMeanStdObs(sizes), theirs.RunningMeanStdObs(sizes)
    scripted = torch.jit.script(ours.RunningMeanStdObs(sizes))
    assert_same(norm.state_dict(), other.state_dict())
    for _ in range(20):
        x = {name: torch.randn(64, *size) * 2 + 3 for name, size in sizes.items()}
        y, z, s = norm(x), other(x), scripted(x)
        for name in sizes:
            torch.testing.assert_close(y[name], z[name], **CLOSE)
            torch.testing.assert_close(s[name], z[name], **CLOSE)
    assert_same(norm.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm({"map": x["map"]})["map"].shape, x["map"].shape)
    with pytest.raises(KeyError, match=r"place.*map.*speed"):
        norm({"speed": x["map"]})
    # Compiling theirs is an error in this version.
    with pytest.raises(Exception, match="object has no attribute or method"):
        torch.jit.script(other)


def test_gradients():
    norm = ours.RunningMeanStd((2,))
    x = torch.randn(20, 2, requires_grad=True)
    norm(x).sum().backward()
    scale = (norm.running_var + 1e-5).sqrt().float()
    torch.testing.assert_close(x.grad, (1 / scale).expand_as(x))
    assert not any(buffer.requires_grad for buffer in norm.buffers())


def test_compiled():
    norm, other = ours.RunningMeanStd((3,)), ours.RunningMeanStd((3,))
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for how in ({}, {"denorm": True}, {}):
        x = torch.randn(50, 3) + 2
        torch.testing.assert_close(compiled(x, **how), other(x, **how))
    assert_same(norm.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-9)


def test_half_precision_keeps_the_statistics():
    norm = ours.RunningMeanStd((2,))
    norm(torch.randn(20, 2) + 1e3)
    before = copy.deepcopy(norm.state_dict())
    assert_same(norm.half().state_dict(), before)
    scripted = torch.jit.script(ours.RunningMeanStd((2,)))
    scripted.load_state_dict(before)
    assert_same(scripted.half().state_dict(), before)


def test_states_both_ways():
    generator = np.random.default_rng(1)
    norm, other = ours.RunningMeanStd((3,)), theirs.RunningMeanStd((3,))
    for _ in range(5):
        norm(draw(generator, 3)), other(draw(generator, 3))
    there, here = theirs.RunningMeanStd((3,)), ours.RunningMeanStd((3,))
    scripted = torch.jit.script(ours.RunningMeanStd((3,)))
    there.load_state_dict(through_a_file(norm.state_dict()))
    here.load_state_dict(through_a_file(other.state_dict()))
    scripted.load_state_dict(through_a_file(other.state_dict()))
    x = draw(generator, 3)
    for a, b in ((norm, there), (here, other), (scripted, copy.deepcopy(other))):
        torch.testing.assert_close(a(x), b(x), **CLOSE)
        torch.testing.assert_close(a.eval()(x), b.eval()(x), **CLOSE)


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_states_that_cannot_be(scripted):
    norm = ours.RunningMeanStd((3,))
    if scripted:
        norm = torch.jit.script(norm)
    norm(torch.randn(9, 3))
    for state, entry in bad_states(norm.state_dict(), *NAMES):
        state_error(norm, state, entry)


def test_what_is_no_tensor():
    norm = ours.RunningMeanStd((3,))
    for x in (np.zeros((2, 3)), [[1.0, 2.0, 3.0]], 1.0):
        with pytest.raises(TypeError, match="expected input as a torch"):
            norm(x)
    with pytest.raises(TypeError, match="expected insize as a mapping"):
        ours.RunningMeanStdObs((3,))
    with pytest.raises(ValueError, match=r"\[3\].*\[2, 4\]"):
        norm(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="eps"):
        ours.RunningMeanStd((3,), epsilon=0)
    assert norm.count == 1


# ------------------------------------------------------------------------ an agent


class World(IVecEnv):
    def __init__(self, config_name, num_actors, **kwargs):
        torch.manual_seed(0)
        self.points = Points(num_actors)

    def step(self, actions):
        obs, reward, done = self.points.move(actions)
        return obs, reward, done, {}

    def reset(self):
        return self.points.look()

    def get_env_info(self):
        return {
            "observation_space": gym.spaces.Box(-np.inf, np.inf, (4,)),
            "action_space": gym.spaces.Box(-1, 1, (1,)),
        }


def agent_of(folder):
    vecenv.register(
        "POINTS", lambda name, actors, **kwargs: World(name, actors, **kwargs)
    )
    env_configurations.register(
        "points", {"vecenv_type": "POINTS", "env_creator": lambda **kwargs: None}
    )
    config = {
        "name": "points",
        "env_name": "points",
        "device": "cpu",
        "device_name": "cpu",
        "train_dir": str(folder),
        "multi_gpu": False,
        "normalize_input": True,
        "normalize_value": True,
        "normalize_advantage": True,
        "reward_shaper": {"scale_value": 1.0},
        "num_actors": 64,
        "horizon_length": 16,
        "minibatch_size": 512,
        "mini_epochs": 2,
        "learning_rate": 1e-3,
        "lr_schedule": None,
        "gamma": 0.99,
        "tau": 0.95,
        "e_clip": 0.2,
        "entropy_coef": 0.0,
        "critic_coef": 1.0,
        "clip_value": True,
        "grad_norm": 1.0,
        "truncate_grads": True,
        "bounds_loss_coef": 0.0,
        "max_epochs": 4,
        "score_to_win": 1e9,
        "save_best_after": 1000,
        "print_stats": False,
        "ppo": True,
        "torch_compile": False,
    }
    network = {
        "name": "actor_critic",
        "separate": False,
        "space": {
            "continuous": {
                "mu_activation": "None",
                "sigma_activation": "None",
                "mu_init": {"name": "default"},
                "sigma_init": {"name": "const_initializer", "val": 0},
                "fixed_sigma": True,
            }
        },
        "mlp": {
            "units": [16],
            "activation": "elu",
            "initializer": {"name": "default"},
        },
    }
    runner = Runner()
    runner.load(
        {
            "params": {
                "seed": 1,
                "algo": {"name": "a2c_continuous"},
                "model": {"name": "continuous_a2c_logstd"},
                "network": network,
                "config": config,
            }
        }
    )
    return runner.algo_factory.create(
        runner.algo_name, base_name="run", params=runner.params
    )


def normalizers(agent) -> list[torch.nn.Module]:
    return [agent.model.running_mean_std, agent.model.value_mean_std]


def test_training_and_its_checkpoints(tmp_path):
    def make(name):
        if name == "ours":
            ours.install()
        try:
            return agent_of(tmp_path)
        finally:
            ours.uninstall()

    agents = {name: make(name) for name in ("ours", "theirs")}
    assert models.RunningMeanStd is theirs.RunningMeanStd
    for name, agent in agents.items():
        agent.train()
        agent.save(str(tmp_path / name))
    for a, b in zip(*map(normalizers, agents.values()), strict=True):
        assert a.count == b.count > 1000
    a, b = (normalizers(agent)[0] for agent in agents.values())
    assert a.original_name == b.original_name and a.code != b.code
    torch.testing.assert_close(a.running_mean[2], b.running_mean[2], rtol=0.02, atol=0)
    for name, other in (("ours", "theirs"), ("theirs", "ours")):
        resumed = make(other)
        resumed.restore(str(tmp_path / f"{name}.pth"))
        pairs = zip(normalizers(agents[name]), normalizers(resumed), strict=True)
        for a, b in pairs:
            assert_same(a.state_dict(), b.state_dict())
            a.eval(), b.eval()
            x = torch.randn(8, *a.running_mean.shape)
            torch.testing.assert_close(a(x), b(x), **CLOSE)
