# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a call costs beside the libraries that the drop-ins stand for, and return scaling.

``make interop`` runs it, in the environment that has them. What is compared takes turns,
as in the other benchmarks; the results go to ``bench/results/<machine>/interop.json``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import sys
import warnings
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import VecEnv

from bench import machine, measure, results_folder
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.interop import gymnasium as our_gymnasium
from torchrl_vecnorm.interop import rl_games as our_rl_games
from torchrl_vecnorm.interop import rsl_rl as our_rsl_rl
from torchrl_vecnorm.interop import skrl as our_skrl
from torchrl_vecnorm.interop import stable_baselines3 as our_sb3

LARGE, SMALL, REWARDS = (4096, 64), (64, 32), (4096, 1)
ROUNDS, SECONDS = 9, 0.1

Call = Callable[[], object]


def values(shape: tuple[int, ...]) -> torch.Tensor:
    """Normal, with mean 3 and deviation 2."""
    return torch.randn(shape) * 2 + 3


def skrl(ours: bool, shape: tuple[int, int]) -> Call:
    """As an agent calls it while it learns."""
    from skrl.resources.preprocessors.torch import RunningStandardScaler

    kind = our_skrl.RunningStandardScaler if ours else RunningStandardScaler
    norm, x = kind(shape[1], device="cpu"), values(shape)
    return lambda: norm(x, train=True)


def skrl_read(ours: bool, shape: tuple[int, int]) -> Call:
    """As it is called in a rollout."""
    from skrl.resources.preprocessors.torch import RunningStandardScaler

    kind = our_skrl.RunningStandardScaler if ours else RunningStandardScaler
    norm, x = kind(shape[1], device="cpu"), values(shape)
    norm(x, train=True)
    return lambda: norm(x)


def rsl_rl(ours: bool, shape: tuple[int, int]) -> Call:
    """``update`` and ``forward``, each of a step in 5.4.2."""
    from rsl_rl.modules import EmpiricalNormalization

    kind = our_rsl_rl.EmpiricalNormalization if ours else EmpiricalNormalization
    norm, x = kind(shape[1]), values(shape)

    def call():
        norm.update(x)
        return norm(x)

    return call


def rsl_rl_read(ours: bool, shape: tuple[int, int]) -> Call:
    """``forward`` alone."""
    from rsl_rl.modules import EmpiricalNormalization

    kind = our_rsl_rl.EmpiricalNormalization if ours else EmpiricalNormalization
    norm, x = kind(shape[1]), values(shape)
    norm.update(x)
    return lambda: norm(x)


def rl_games(ours: bool, shape: tuple[int, int]) -> Call:
    """Scripted, as rl_games has it."""
    from rl_games.algos_torch.running_mean_std import RunningMeanStd

    kind = our_rl_games.RunningMeanStd if ours else RunningMeanStd
    with contextlib.redirect_stdout(io.StringIO()):
        norm = torch.jit.script(kind((shape[1],)))
    x = values(shape)
    return lambda: norm(x)


def prepared_vec_env(shape: tuple[int, int]) -> VecEnv:
    """An environment of Stable-Baselines3 that does nothing."""

    class PreparedVecEnv(VecEnv):
        def __init__(self):
            box = gym.spaces.Box(-np.inf, np.inf, shape[1:], np.float32)
            super().__init__(shape[0], box, gym.spaces.Discrete(2))
            no = np.zeros(shape[0], bool)
            infos = [{} for _ in no]
            rewards = values(shape[:1]).numpy()
            self.returned = values(shape).numpy(), rewards, no, infos

        def step_wait(self):
            return self.returned

        def reset(self):
            return self.returned[0]

        def get_attr(self, name, indices=None):
            return [None] * self.num_envs

        step_async = close = env_is_wrapped = env_method = set_attr = None

    return PreparedVecEnv()


def stable_baselines3(ours: bool, shape: tuple[int, int]) -> Call:
    """A whole step of the wrapper, around an environment that does nothing."""
    from stable_baselines3.common.vec_env import VecNormalize

    kind = our_sb3.VecNormalize if ours else VecNormalize
    env = kind(prepared_vec_env(shape))
    env.reset()
    return env.step_wait


class Prepared(VectorEnv):
    """A vector environment of Gymnasium that does nothing."""

    def __init__(self, shape: tuple[int, int]) -> None:
        n = self.num_envs = shape[0]
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = gym.spaces.Box(
            -np.inf, np.inf, shape[1:], np.float32
        )
        self.single_action_space = gym.spaces.Box(-1, 1)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        no = np.zeros(n, bool)
        rewards = values(shape[:1]).double().numpy()
        self.returned = values(shape).numpy(), rewards, no, no, {}

    def step(self, actions):
        """The same each time."""
        return self.returned


def gymnasium(ours: bool, shape: tuple[int, int]) -> Call:
    """A step of the wrapper of observations."""
    from gymnasium.wrappers import vector

    kind = (our_gymnasium.vector if ours else vector).NormalizeObservation
    env = kind(Prepared(shape))
    return lambda: env.step(None)


def gymnasium_reward(ours: bool, shape: tuple[int, int]) -> Call:
    """A step of the wrapper of rewards."""
    from gymnasium.wrappers import vector

    kind = (our_gymnasium.vector if ours else vector).NormalizeReward
    env = kind(Prepared(shape))
    return lambda: env.step(None)


class Returns:
    """Rewards of a step, whose episodes end now and then, and the returns so far."""

    gamma, eps, clip = 0.99, 1e-8, 10.0

    def __init__(self, shape: tuple[int, int]) -> None:
        self.reward, self.done = values(shape[:1]), torch.rand(shape[0]) < 0.01
        self.returns = torch.zeros(shape[0], dtype=torch.float64)
        self.state = F.Moments.zeros(())

    def ours(self) -> torch.Tensor:
        """One call."""
        return F.scale_returns_(
            self.reward,
            self.done,
            self.returns,
            self.state,
            gamma=self.gamma,
            eps=self.eps,
            clip=self.clip,
        )

    def eager(self) -> torch.Tensor:
        """The same in torch."""
        returns, s = self.returns, self.state
        returns.mul_(self.gamma).add_(self.reward)
        s.sum.add_(returns.sum())
        s.ssq.add_(returns.square().sum())
        s.count.add_(len(returns))
        mean = s.sum / s.count
        var = (s.ssq / s.count - mean.square()).clamp(min=0)
        returns.masked_fill_(self.done, 0.0)
        scale = (var + self.eps).sqrt().to(self.reward.dtype)
        return (self.reward / scale).clamp(-self.clip, self.clip)


def returns_eager(ours: bool, shape: tuple[int, int]) -> Call:
    """The formula, beside one call."""
    returns = Returns(shape)
    return returns.ours if ours else returns.eager


def returns_stable_baselines3(ours: bool, shape: tuple[int, int]) -> Call:
    """A step of a wrapper that scales rewards alone, beside a call."""
    from stable_baselines3.common.vec_env import VecNormalize

    if ours:
        return Returns(shape).ours
    env = VecNormalize(prepared_vec_env(shape), norm_obs=False)
    env.reset()
    return env.step_wait


def returns_stable_baselines3_alone(ours: bool, shape: tuple[int, int]) -> Call:
    """What such a step does with rewards, and nothing else of it."""
    from stable_baselines3.common.vec_env import VecNormalize

    returns = Returns(shape)
    if ours:
        return returns.ours
    env = VecNormalize(prepared_vec_env(shape), norm_obs=False)
    env.reset()
    reward, done = returns.reward.numpy(), returns.done.numpy()

    def call():
        env._update_reward(reward)
        scaled = env.normalize_reward(reward)
        env.returns[done] = 0
        return scaled

    return call


def returns_gymnasium(ours: bool, shape: tuple[int, int]) -> Call:
    """A step of the wrapper of rewards, beside a call."""
    from gymnasium.wrappers import vector

    if ours:
        return Returns(shape).ours
    env = vector.NormalizeReward(Prepared(shape))
    return lambda: env.step(None)


#: Name, package, maker, shape, and how many times faster ours is to be.
ROWS = [
    ("skrl", "skrl", skrl, LARGE, 15),
    ("skrl, no training", "skrl", skrl_read, LARGE, None),
    ("rsl_rl", "rsl-rl-lib", rsl_rl, LARGE, 15),
    ("rsl_rl, forward alone", "rsl-rl-lib", rsl_rl_read, LARGE, None),
    ("rl_games", "rl-games", rl_games, LARGE, 15),
    ("Stable-Baselines3", "stable-baselines3", stable_baselines3, SMALL, 5),
    ("Gymnasium, observations", "gymnasium", gymnasium, SMALL, 5),
    ("Gymnasium, rewards", "gymnasium", gymnasium_reward, SMALL, None),
    ("returns, eager torch", "torch", returns_eager, REWARDS, 10),
    (
        "returns, Stable-Baselines3",
        "stable-baselines3",
        returns_stable_baselines3,
        REWARDS,
        15,
    ),
    (
        "… its rewards alone",
        "stable-baselines3",
        returns_stable_baselines3_alone,
        REWARDS,
        None,
    ),
    ("returns, Gymnasium", "gymnasium", returns_gymnasium, REWARDS, None),
]


def medians(calls: dict[str, Call], threads: int) -> dict[str, float]:
    """Microseconds of a call: the median of rounds in which all take their turn."""
    times = measure.eager(calls, ROUNDS, SECONDS, threads)
    return {name: float(np.median(each)) for name, each in times.items()}


def main() -> int:
    """Prints a table and writes the numbers."""
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    records = []
    print(
        f"µs a call, float32, {threads} threads, medians of {ROUNDS} rounds in turn\n"
    )
    header = ("", "N × F", "theirs", "ours", "faster", "goal")
    line = "{:28} {:>10} {:>9} {:>9} {:>9} {:>7}"
    print(line.format(*header))
    for name, package, make, shape, goal in ROWS:
        calls = {"theirs": make(False, shape), "ours": make(True, shape)}
        for call in calls.values():
            for _ in range(10):
                call()
        times = medians(calls, threads)
        ratio = times["theirs"] / times["ours"]
        records.append(
            {
                "name": name,
                "version": importlib.metadata.version(package),
                "samples": shape[0],
                "features": shape[1],
                "theirs_us": round(times["theirs"], 2),
                "ours_us": round(times["ours"], 2),
                "times_faster": round(ratio, 2),
                "goal": goal,
            }
        )
        print(
            line.format(
                name,
                f"{shape[0]} × {shape[1]}",
                f"{times['theirs']:.1f}",
                f"{times['ours']:.1f}",
                f"{ratio:.1f} ×",
                f"{goal} ×" if goal else "",
            )
        )
    folder = results_folder(machine())
    folder.mkdir(parents=True, exist_ok=True)
    about = {"device": machine(), "torch": torch.__version__, "threads": threads}
    file = folder / "interop.json"
    file.write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")
    print(f"\nwritten to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
