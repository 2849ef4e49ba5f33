# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints, files and objects as other libraries make them, and their traps."""

import importlib.util
import pickle
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from alone import alone
from others import (
    Brax,
    BraxEMA,
    EvoTorch,
    LeRobot,
    RlGames,
    RLlib,
    RslRl,
    SampleFactory,
    Skrl,
    StableBaselines3,
    Tianshou,
    World,
)
from torch import nn

from torchrl_vecnorm import functional as F
from torchrl_vecnorm import interop

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def rows(seed: int = 0, n: int = 200, features: int = 5) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(n, features)) * 2 + 3).astype(np.float32)


def trained(other, **options):
    norm = other.make(5, **options)
    other.learn(norm, rows())
    return norm


def quiet_read(*args, **options) -> interop.Carried:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return interop.read(*args, **options)


# --------------------------------------------------------------------------- checkpoints


def test_rsl_rl_checkpoint(tmp_path):
    """As its runner saves: of actor and critic, in one file."""
    norm = trained(RslRl())
    model = nn.ModuleDict({"obs_normalizer": norm, "mlp": nn.Linear(5, 1)})
    critic = nn.ModuleDict({"obs_normalizer": RslRl().make(7)})
    torch.save(
        {"actor_state_dict": model.state_dict(), "critic_state_dict": critic.state_dict(),
         "optimizer_state_dict": torch.optim.Adam(model.parameters()).state_dict(),
         "iter": 3, "infos": None},
        tmp_path / "model_3.pt",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"actor_state_dict\.obs_normalizer.*critic"):
        interop.read(tmp_path / "model_3.pt")
    carried = interop.read(
        tmp_path / "model_3.pt", key="actor_state_dict.obs_normalizer"
    )
    x = torch.from_numpy(rows(1))
    torch.testing.assert_close(carried.normalize(x), norm(x), **CLOSE)
    # Of the model itself, and into it.
    moments = F.moments(x + 5)
    interop.write(moments, like=model)
    torch.testing.assert_close(model["obs_normalizer"].mean, (x + 5).mean(0))
    # Written in inference mode, as buffers are that a rollout has made.
    with torch.inference_mode():
        norm = trained(RslRl())
        norm._std = norm._std.clone()
    interop.write(moments, like=norm)
    torch.testing.assert_close(norm.std, x.std(0, correction=0))


def test_what_rsl_rl_divides_by():
    """A state without `_std`, loaded as it lets one, divides by what was there before."""
    norm = trained(RslRl())
    state = norm.state_dict()
    del state["_std"]
    other = RslRl().make(5)
    other.load_state_dict(state, strict=False)
    assert (other.std == 1).all() and (norm.std > 1.5).all()
    with pytest.raises(ValueError, match="entry '_std': expected the root of '_var'"):
        interop.read(other)


def test_skrl_checkpoint(tmp_path):
    norm, value = trained(Skrl()), Skrl().make(1)
    agent = {"policy": nn.Linear(5, 1).state_dict(),
             "observation_preprocessor": norm.state_dict(),
             "value_preprocessor": value.state_dict()}  # fmt: skip
    torch.save(agent, tmp_path / "agent_9.pt")
    with pytest.warns(UserWarning, match="skrl gives each batch the variance of n - 1"):
        carried = interop.read(tmp_path / "agent_9.pt", key="observation_preprocessor")
    x = torch.from_numpy(rows(1))
    torch.testing.assert_close(carried.normalize(x), norm(x), **CLOSE)
    # What it warns of, for one batch of 200 after the sample that it begins with.
    data = torch.cat([torch.zeros(1, 5), torch.from_numpy(rows())]).double()
    true = ((data - data.mean(0)) ** 2).sum(0) + 1
    excess = carried.moments.mean_var()[1] - true / 201
    torch.testing.assert_close(excess, data[1:].var(0) / 201, rtol=1e-5, atol=0)


def test_rl_games_as_it_is_used():
    """Scripted, inside a model; and with a dictionary of observations."""
    theirs = trained(RlGames())
    model = nn.ModuleDict({"running_mean_std": torch.jit.script(theirs)})
    carried = interop.read(model)
    x = torch.from_numpy(rows(1))
    torch.testing.assert_close(carried.normalize(x), theirs(x), **CLOSE)
    interop.write(F.moments(x + 9), like=model)
    y = model["running_mean_std"].eval()(x + 9)
    torch.testing.assert_close(y.mean(0), torch.zeros(5), atol=1e-5, rtol=0)

    from rl_games.algos_torch.running_mean_std import RunningMeanStdObs

    obs = RunningMeanStdObs({"pos": (5,), "map": (2, 2)}).train()
    obs({"pos": x, "map": torch.randn(200, 2, 2)})
    state = {f"running_mean_std.{k}": v for k, v in obs.state_dict().items()}
    for source in (obs, state):
        carried = interop.read(source, "rl_games", key="pos")
        want = obs.eval()({"pos": x, "map": torch.zeros(200, 2, 2)})["pos"]
        torch.testing.assert_close(carried.normalize(x), want, **CLOSE)


def test_sample_factory_checkpoint():
    module = alone("sample_factory.algo.utils.running_mean_std")
    space = gym.spaces.Dict(
        {"obs": gym.spaces.Box(-1, 1, (5,)), "m": gym.spaces.Box(-1, 1, (2,))}
    )
    norm = module.RunningMeanStdDictInPlace(space).train()
    norm({"obs": torch.from_numpy(rows()), "m": torch.randn(200, 2)})
    state = {
        f"obs_normalizer.running_mean_std.{k}": v for k, v in norm.state_dict().items()
    }
    checkpoint = {"train_step": 3, "model": state}
    carried = quiet_read(checkpoint, "sample_factory", key="obs")
    x = torch.from_numpy(rows(1))
    want = SampleFactory().apply(norm.running_mean_std["obs"], x.numpy())
    torch.testing.assert_close(carried.normalize(x).numpy(), want, **CLOSE)
    # Its count has a dimension, that of rl_games has none: each gets its own.
    assert interop.write(carried, "sample_factory")["count"].shape == (1,)
    assert interop.write(carried, "rl_games")["count"].shape == ()
    new = interop.write(carried, "rl_games", like=RlGames().make(5).state_dict())
    RlGames().make(5).load_state_dict(new)


# ------------------------------------------------------------------------- stable-baselines3


class Robot(World):
    """Observations of two kinds."""

    def __init__(self):
        super().__init__(5)
        spaces = {"pos": self.observation_space, "lit": gym.spaces.Discrete(3)}
        self.observation_space = gym.spaces.Dict(spaces)
        self.random = np.random.default_rng(0)

    def reset(self, *, seed=None, options=None):
        pos = np.float32(self.random.normal(size=5) * 2 + 3)
        return {"pos": pos, "lit": int(self.random.integers(3))}, {}

    def step(self, action):
        return self.reset()[0], float(self.random.normal() + 2), False, False, {}


@pytest.fixture
def saved(tmp_path):
    """A VecNormalize after some steps, and its file."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = VecNormalize(DummyVecEnv([Robot] * 4), norm_obs_keys=["pos"], clip_obs=3.0)
    env.reset()
    (
        env.action_space.sample(),
        env.observation_space.sample(),
    )  # generators are saved, too
    for _ in range(30):
        env.step(np.zeros((4, 1)))
    env.save(str(tmp_path / "vecnormalize.pkl"))
    return env, tmp_path / "vecnormalize.pkl"


def test_stable_baselines3_files(saved):
    env, file = saved
    carried = interop.read(file, key="obs_rms.pos")
    assert carried.rule() == {
        "eps": 1e-8,
        "eps_mode": "var_add",
        "clip": 3.0,
        "center": True,
    }
    obs = {"pos": rows(1), "lit": np.zeros(200)}
    want = env.normalize_obs(obs)["pos"]
    y = carried.normalize(torch.from_numpy(obs["pos"]))
    np.testing.assert_allclose(y, want, **CLOSE)

    rewards = interop.read(file, key="ret_rms")
    assert rewards.clip == 10 and not rewards.center
    scaled = rewards.normalize(torch.tensor([1.0, -4.0]))
    np.testing.assert_allclose(
        scaled, env.normalize_reward(np.array([1.0, -4.0])), **CLOSE
    )

    # What stands for it here writes the same file.
    from stable_baselines3.common.vec_env import DummyVecEnv

    from torchrl_vecnorm.interop.stable_baselines3 import VecNormalize

    ours = VecNormalize.load(str(file), DummyVecEnv([Robot] * 4))
    interop.write(F.moments(torch.from_numpy(rows(2) + 7)), like=ours, key="pos")
    ours.save(str(file))
    for source in (file, ours):
        mean = interop.read(source, key="pos").moments.mean_var()[0]
        np.testing.assert_allclose(mean, rows(2).mean(0) + 7, rtol=1e-6)


def test_the_example(saved, tmp_path, quiet):
    """Its file into a VecNorm."""
    env, file = saved
    path = Path(__file__).parents[2] / "examples" / "convert_statistics.py"
    spec = importlib.util.spec_from_file_location("convert_statistics", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    t = example.forth(file, "obs_rms.pos", None, tmp_path / "vecnorm.pt")
    np.testing.assert_allclose(t.loc["observation"], env.obs_rms["pos"].mean, rtol=1e-6)
    scale = np.sqrt(env.obs_rms["pos"].var)
    np.testing.assert_allclose(t.scale["observation"], scale, rtol=1e-6)


class MyNormalize:
    """Somebody's own class in a pickle."""


def test_stable_baselines3_files_of_other_classes(saved, tmp_path):
    env, _ = saved
    env.mine = MyNormalize()
    env.save(str(tmp_path / "more.pkl"))
    with pytest.raises(
        ValueError, match=r"more\.pkl.*test_carried\.MyNormalize.*not run"
    ):
        interop.read(tmp_path / "more.pkl")


def test_what_stands_for_others_here():
    """The drop-ins are read as the classes that they stand for."""
    from torchrl_vecnorm.interop import gymnasium, rl_games, rsl_rl, skrl

    x = torch.from_numpy(rows())
    scaler = skrl.RunningStandardScaler(5, device="cpu", clip_threshold=9.0)
    scaler(x, train=True)
    theirs = rsl_rl.EmpiricalNormalization(5, eps=0.5)
    theirs.update(x)
    games = rl_games.RunningMeanStd((5,), epsilon=0.1)
    games(x)
    for norm in (scaler, theirs, games.eval()):
        carried = quiet_read(norm)
        torch.testing.assert_close(carried.normalize(x), norm(x), **CLOSE)
        # It sees what is written to its buffers.
        interop.write(carried._replace(moments=F.moments(x + 20)), like=norm)
        torch.testing.assert_close(
            norm(x + 20).mean(0), torch.zeros(5), atol=1e-5, rtol=0
        )
    env = gymnasium.NormalizeObservation(World(5))
    env.reset()
    interop.write(F.moments(x), like=env)
    np.testing.assert_allclose(env.obs_rms.mean, x.mean(0), rtol=1e-6)


# ---------------------------------------------------------------------------------- others


@pytest.mark.parametrize("other", [Tianshou(), EvoTorch()], ids=lambda o: o.library)
def test_pickled_objects(other, tmp_path):
    norm = trained(other)
    (tmp_path / "norm.pkl").write_bytes(pickle.dumps(norm))
    carried, want = interop.read(tmp_path / "norm.pkl"), interop.read(norm)
    assert carried.rule() == want.rule()
    for a, b in zip(carried.moments, want.moments, strict=True):
        assert torch.equal(a, b)


def test_evotorch_clips_on_two_sides():
    module = alone("evotorch.neuroevolution.net.runningnorm")
    norm = module.RunningNorm(shape=5, dtype="float32", clip=(-1.0, 6.0))
    norm.update(rows())
    with pytest.raises(ValueError, match=r"clip as \(-c, c\), got \(-1.0, 6.0\)"):
        interop.read(norm)


def test_tianshou_takes_a_variance_for_the_deviation():
    """So that statistics are never written by its constructor."""
    norm = alone("tianshou.utils.statistics").RunningMeanStd(mean=0.0, std=4.0)
    assert norm.norm(4.0) == pytest.approx(2.0)  # 1, were it the deviation
    interop.write(F.moments(torch.from_numpy(rows())), like=norm)
    assert norm.count == 200 and norm.mean.shape == (5,)


def test_rllib_after_merges():
    """As its connector merges: right after one, wrong after two, which nothing tells."""
    other = RLlib()
    driver, runner = other.make(1), other.make(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.learn(runner, np.full((100, 1), 5.0) + rows(0, 100, 1))
        own = interop.read(runner)
    for merges in (1, 2):
        driver.running_stats.update(runner.running_stats)
        with pytest.warns(UserWarning, match=r"after a second merge"):
            carried = interop.read(driver)
        mean = carried.moments.mean_var()[0]
        if merges == 1:
            torch.testing.assert_close(mean, own.moments.mean_var()[0])
            # What the driver sends back, and what comes after it.
            runner.running_stats = type(runner.running_stats).from_state(
                driver.running_stats.to_state()
            )
            other.learn(runner, np.full((100, 1), 5.0) + rows(1, 100, 1))
        else:
            assert abs(mean - 8) > 2  # of samples whose mean is 8


def test_brax_modes():
    """A checkpoint does not have the mode, and a state from one says the wrong one."""
    for other in (Brax(), BraxEMA()):
        norm = trained(other)[0]
        state = other.state([norm])
        want = interop.read(norm).moments.central
        del state["mode"]
        assert torch.equal(interop.read(state).moments.central, want)
        wrong = norm.replace(mode=1 - int(norm.mode))
        with pytest.warns(UserWarning, match="'std' is that of the other mode"):
            assert torch.equal(interop.read(wrong).moments.central, want)
    with pytest.raises(ValueError, match=r"'std'.*in either mode"):
        interop.read(norm.replace(std={"state": norm.std["state"] * 2}))


def test_brax_params():
    """The normaliser is the first of a policy's parameters."""
    other = Brax()
    norm = trained(other)[0]
    params = (norm, {"params": {"dense": np.ones(3)}}, None)
    carried = interop.read(params)
    assert torch.equal(carried.moments.sum, interop.read(norm).moments.sum)
    new = interop.write(F.moments(torch.from_numpy(rows(1))), like=params)
    assert new[1] is params[1] and type(new[0]) is type(norm)
    np.testing.assert_allclose(new[0].mean["state"], rows(1).mean(0), rtol=1e-6)
    assert int(new[0].count) == 200
    # More than 32 bits.
    moments = interop.read(norm).moments
    factor = 2.0**34 / moments.count
    many = moments._replace(sum=moments.sum * factor, ssq=moments.ssq * factor,
                            count=moments.count * factor)  # fmt: skip
    assert int(interop.write(many, like=norm).count) == 2**34
    assert interop.read(interop.write(many, like=norm)).moments.count == 2**34


def test_brax_variances_below_0():
    """Of a constant far from zero: rounding of float32. It uses 0, and so is it read."""
    other = Brax()
    norm = other.make(1)
    other.learn(norm, np.full((1000, 1), 1000.3, np.float32))
    if norm[0].summed_variance["state"] < 0:
        with pytest.warns(UserWarning, match="was read as 0"):
            carried = interop.read(norm[0])
        assert carried.moments.central == 0
    low = norm[0].replace(
        summed_variance={"state": norm[0].summed_variance["state"] * 0 - 6}
    )
    with pytest.warns(UserWarning, match="'summed_variance' is -6"):
        carried = interop.read(low)
    y = carried.normalize(torch.tensor([1000.3 + 1e-3]).double())
    want = other.apply([low], np.array([1000.3 + 1e-3]))
    np.testing.assert_allclose(y, want, rtol=1e-4)


def test_lerobot_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    other = LeRobot()
    norm = trained(other)
    file = tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    safetensors.save_file(norm.state_dict(), file)
    x = torch.from_numpy(rows(1))
    carried = interop.read(file)
    torch.testing.assert_close(
        carried.normalize(x).numpy(), other.apply(norm, x.numpy()), **CLOSE
    )
    new = interop.write(carried._replace(moments=F.moments(x)), like=norm.state_dict())
    safetensors.save_file(new, file)
    back = LeRobot().make(5)
    back.load_state_dict(safetensors.load_file(file))
    y = other.apply(back, x.numpy())
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)


def test_lerobot_by_other_statistics():
    """Features that it does not normalise by mean and deviation are refused."""
    other = LeRobot()
    norm = trained(other)
    types = alone("lerobot.configs.types")
    norm.norm_map = {types.FeatureType.STATE: types.NormalizationMode.MIN_MAX}
    with pytest.raises(
        ValueError, match=r"'observation\.state'.*deviation, got MIN_MAX"
    ):
        interop.read(norm)
    stats = {"observation.state": {"mean": np.ones(3), "std": np.ones(3)}}
    with pytest.raises(ValueError, match="'count', which is not there: pass count="):
        interop.read(stats)
    assert interop.read(stats, count=50).moments.count == 50


def test_d3rlpy_keeps_no_count():
    module = alone("d3rlpy.preprocessing.observation_scalers")
    x = torch.from_numpy(rows(1))
    data = rows().astype(np.float64)
    scaler = module.StandardObservationScaler(mean=data.mean(0), std=data.std(0))
    want = scaler.transform(x)
    with pytest.raises(
        ValueError, match=r"d3rlpy: expected entry 'count'.*pass count="
    ):
        interop.read(scaler)
    for source in (scaler, {"type": "standard", "params": scaler.to_dict()}):
        carried = interop.read(source, count=200)
        torch.testing.assert_close(carried.normalize(x), want.float(), **CLOSE)
    # It has kept tensors of its first use, which are not those any more.
    interop.write(F.moments(x + 9), like=scaler)
    torch.testing.assert_close(
        scaler.transform((x + 9).double()).mean(0),
        torch.zeros(5).double(),
        rtol=0,
        atol=1e-5,
    )


def test_from_one_to_another():
    """What stable-baselines3 has learnt, in skrl."""
    env, scaler = trained(StableBaselines3()), Skrl().make(5)
    carried = interop.read(env, key="obs_rms")
    with pytest.warns(UserWarning, match="eps_mode='std_add' where it was 'var_add'"):
        interop.write(carried, like=scaler)
    x = rows(1)
    y = scaler(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, env.normalize_obs(x).clip(-5, 5), **CLOSE)
