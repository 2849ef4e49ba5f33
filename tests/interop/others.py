# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The normalisers of other libraries: how one is made, learns, and normalises."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from alone import alone


class Other:
    """A normaliser of a library. By default, a module that takes tensors."""

    #: As ``write`` wants it.
    library: str
    #: Up to how many deviations from zero it knows the deviation, in float32.
    most = 1e4
    #: Whether reading it is always with a doubt.
    warns = False
    #: Whether the state dict is one of several libraries'.
    ambiguous = False
    decay: float | None = None
    #: Of the statistics in the object.
    key: str | None = None

    def make(self, features: int) -> Any:
        raise NotImplementedError

    def learn(self, norm: Any, x: np.ndarray) -> None:
        norm.train()
        norm(torch.from_numpy(x.copy()))
        norm.eval()

    def apply(self, norm: Any, x: np.ndarray) -> np.ndarray:
        return norm.eval()(torch.from_numpy(x.copy())).detach().numpy()

    def state(self, norm: Any) -> Any:
        return norm.state_dict()

    def load(self, norm: Any, state: Any) -> Any:
        """A normaliser with a state; norm itself, mostly."""
        norm.load_state_dict(state)
        return norm

    def divisor(self, count: float) -> float:
        """How many times its deviation is that of n."""
        return 1.0


class Skrl(Other):
    library = "skrl"
    warns = True

    def make(self, features):
        from skrl.resources.preprocessors.torch import RunningStandardScaler

        return RunningStandardScaler(features, device="cpu")

    def learn(self, norm, x):
        norm(torch.from_numpy(x), train=True)


class RslRl(Other):
    library = "rsl_rl"

    def make(self, features):
        from rsl_rl.modules import EmpiricalNormalization

        return EmpiricalNormalization(features)

    def learn(self, norm, x):
        norm.train().update(torch.from_numpy(x))


class RlGames(Other):
    library = "rl_games"
    ambiguous = True
    options: ClassVar[dict[str, Any]] = {}

    def make(self, features):
        from rl_games.algos_torch.running_mean_std import RunningMeanStd

        with contextlib.redirect_stdout(io.StringIO()):
            return RunningMeanStd((features,), **self.options).eval()


class RlGamesScaled(RlGames):
    options: ClassVar = {"norm_only": True}


class SampleFactory(Other):
    library = "sample_factory"
    warns = ambiguous = True

    def make(self, features):
        module = alone("sample_factory.algo.utils.running_mean_std")
        module.log.setLevel(logging.ERROR)
        return module.RunningMeanStdInPlace((features,)).eval()

    def apply(self, norm, x):
        y = torch.from_numpy(x.copy())
        norm.eval()(y)
        return y.numpy()


class Pfrl(Other):
    library = "pfrl"

    def make(self, features):
        module = alone("pfrl.nn.empirical_normalization")
        return module.EmpiricalNormalization(features, clip_threshold=7.0)

    def learn(self, norm, x):
        norm.experience(torch.from_numpy(x))

    def apply(self, norm, x):
        return norm(torch.from_numpy(x), update=False).numpy()


class Imitation(Other):
    library = "imitation.RunningNorm"

    def make(self, features):
        return alone("imitation.util.networks").RunningNorm(features).eval()


class ImitationEMA(Other):
    library = "imitation.EMANorm"
    decay = 0.99

    def make(self, features):
        return alone("imitation.util.networks").EMANorm(features, decay=0.99).eval()


class PopArt(Other):
    library = "torchrl.PopArtValueNorm"
    decay = 0.9
    most = 1.0

    def make(self, features):
        from torchrl.modules import PopArtValueNorm

        return PopArtValueNorm(shape=features, beta=0.9)

    def learn(self, norm, x):
        norm.update(torch.from_numpy(x))

    def apply(self, norm, x):
        return norm.normalize(torch.from_numpy(x)).numpy()


class RunningValue(PopArt):
    library = "torchrl.RunningValueNorm"
    decay = None
    most = 1e4

    def make(self, features):
        from torchrl.modules import RunningValueNorm

        return RunningValueNorm(shape=features)


class _Attributes(Other):
    """An object whose attributes are its state."""

    attributes = ("mean", "var", "count")

    def state(self, norm):
        return {name: getattr(norm, name) for name in self.attributes}

    def load(self, norm, state):
        for name, value in state.items():
            setattr(norm, name, value)
        return norm


class Tianshou(_Attributes):
    library = "tianshou"
    ambiguous = True

    def make(self, features):
        return alone("tianshou.utils.statistics").RunningMeanStd()

    def learn(self, norm, x):
        norm.update(x.astype(np.float64))

    def apply(self, norm, x):
        return norm.norm(x.astype(np.float64))


class StableBaselines3(_Attributes):
    library = "stable_baselines3"
    key = "obs_rms"
    ambiguous = True

    def make(self, features):
        from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

        return VecNormalize(DummyVecEnv([lambda: World(features)]), norm_reward=False)

    def learn(self, norm, x):
        norm.obs_rms.update(x.astype(np.float64))

    def apply(self, norm, x):
        return norm.normalize_obs(x)

    def state(self, norm):
        return super().state(norm.obs_rms)

    def load(self, norm, state):
        super().load(norm.obs_rms, state)
        return norm


class Gymnasium(StableBaselines3):
    library = "gymnasium"

    def make(self, features):
        return gym.wrappers.NormalizeObservation(World(features))

    def apply(self, norm, x):
        norm.update_running_mean = False
        return norm.observation(x)


class EvoTorch(_Attributes):
    library = "evotorch"
    attributes = ("_sum", "_sum_of_squares", "_count")

    def make(self, features):
        module = alone("evotorch.neuroevolution.net.runningnorm")
        return module.RunningNorm(shape=features, dtype="float64", clip=(-6, 6))

    def learn(self, norm, x):
        norm.update(torch.from_numpy(x))

    def apply(self, norm, x):
        return norm.normalize(torch.from_numpy(x)).numpy()


class Brax(Other):
    library = "brax"
    most = 100.0
    mode, eps = "welford", 0.0

    def make(self, features):
        stats = alone("brax.training.acme.running_statistics")
        jax = pytest.importorskip("jax")
        nest = {"state": jax.numpy.zeros(features)}
        return [stats.init_state(nest, std_eps=self.eps, mode=self.mode)]

    def learn(self, norm, x):
        stats = alone("brax.training.acme.running_statistics")
        norm[0] = stats.update(norm[0], {"state": np.asarray(x)})

    def apply(self, norm, x):
        stats = alone("brax.training.acme.running_statistics")
        return np.asarray(stats.normalize({"state": x}, norm[0])["state"])

    def state(self, norm):
        state, count = norm[0], norm[0].count
        names = ("mean", "std", "summed_variance", "std_eps", "mode")
        return {
            **{name: getattr(state, name) for name in names},
            "count": {"hi": np.asarray(count.hi), "lo": np.asarray(count.lo)},
        }

    def load(self, norm, state):
        count = type(norm[0].count)(**state["count"])
        return [norm[0].replace(**{**state, "count": count})]


class BraxEMA(Brax):
    most = 1e4
    mode, eps = "ema", 1e-3


class RLlib(Other):
    library = "rllib"

    def make(self, features):
        module = alone("ray.rllib.utils.filter", "ray.util:log_once")
        return module.MeanStdFilter((features,))

    def learn(self, norm, x):
        for row in x.astype(np.float64):
            norm(row)

    def apply(self, norm, x):
        return norm(x.astype(np.float64)[0], update=False)[None]

    def state(self, norm):
        stats = norm.running_stats.to_state()
        return {
            None: {
                "shape": norm.shape,
                "de_mean_to_zero": norm.demean,
                "de_std_to_one": norm.destd,
                "clip_by_value": norm.clip,
                "running_stats": [stats],
            }
        }

    def load(self, norm, state):
        stats = state[None]["running_stats"][0]
        norm.running_stats = type(norm.running_stats).from_state(stats)
        return norm

    def divisor(self, count):
        return (count / (count - 1)) ** 0.5


class LeRobot(Other):
    """Its statistics are those of a dataset, computed at once."""

    library = "lerobot"

    def make(self, features):
        module = alone(
            "lerobot.processor.normalize_processor",
            "lerobot.datasets.lerobot_dataset:LeRobotDataset",
        )
        types = alone("lerobot.configs.types")
        return module.NormalizerProcessorStep(
            features={
                "observation.state": types.PolicyFeature(
                    types.FeatureType.STATE, (features,)
                )
            },
            norm_map={types.FeatureType.STATE: types.NormalizationMode.MEAN_STD},
        )

    def learn(self, norm, x):
        stats = {
            "mean": x.astype(np.float64).mean(0),
            "std": x.astype(np.float64).std(0),
            "count": np.array([len(x)]),
        }
        module = alone("lerobot.processor.normalize_processor")
        norm.__dict__.update(
            module.hotswap_stats(
                type("Pipeline", (), {"steps": [norm]})(), {"observation.state": stats}
            )
            .steps[0]
            .__dict__
        )

    def apply(self, norm, x):
        values = {"observation.state": torch.from_numpy(x)}
        return norm._normalize_observation(values, inverse=False)[
            "observation.state"
        ].numpy()


class World(gym.Env):
    """Observations of a shape."""

    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, features: int) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (features,))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


OTHERS = [
    Skrl(), RslRl(), RlGames(), RlGamesScaled(), SampleFactory(), Pfrl(), Imitation(),
    ImitationEMA(), PopArt(), RunningValue(), Tianshou(), StableBaselines3(), Gymnasium(),
    EvoTorch(), Brax(), BraxEMA(), RLlib(), LeRobot(),
]  # fmt: skip
