# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO on InvertedPendulum-v5 with normalised observations.

    python examples/ppo.py              # trains; Ctrl-C stops it
    python examples/ppo.py --resume     # goes on where it was stopped
    python examples/ppo.py --evaluate   # 10 episodes with the statistics as they are
    python examples/ppo.py --compare    # three seeds, beside torchrl's class: a picture

Several processes step environments; the transform is around all of them, so one set of
statistics sees every step. They are a part of the environment's state_dict, and what an
evaluation has to be given is a frozen copy: the policy has only ever seen values that
were normalised with them.

Rewards are left alone: here they are always 1, and minus their mean that is 0.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import (
    DoubleToFloat,
    ExplorationType,
    GymEnv,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    Transform,
    TransformedEnv,
    set_exploration_type,
)
from torchrl.envs import VecNorm as TorchRLVecNorm
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.modules import ValueOperator as Critic
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_vecnorm import VecNorm

KEYS = ["observation"]
DECAY, EPS = 0.9999, 1e-4
WORKERS, FRAMES, EPOCHS, MINIBATCH = 4, 1024, 10, 128


def make_gym() -> TransformedEnv:
    """One environment; float32, as the policy is."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    return TransformedEnv(GymEnv("InvertedPendulum-v5"), DoubleToFloat(KEYS))


def make_normalizer(name: str) -> Transform:
    """The transform, or torchrl's with the same settings: its eps bounds the variance."""
    if name == "torchrl_vecnorm":
        return VecNorm(KEYS, decay=DECAY, eps=EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TorchRLVecNorm(KEYS, decay=DECAY, eps=EPS**2, new_api=False)


@dataclass
class Run:
    """What is trained, and with what: all that a checkpoint has to hold."""

    env: TransformedEnv
    actor: ProbabilisticActor
    critic: Critic
    optimizer: torch.optim.Optimizer
    frames: int = 0

    @classmethod
    def make(cls, normalizer: str, seed: int, batch: type = ParallelEnv) -> Run:
        """A new one."""
        torch.manual_seed(seed)
        env = TransformedEnv(batch(WORKERS, make_gym), make_normalizer(normalizer))
        env.append_transform(RewardSum())
        env.set_seed(seed)
        n_obs = env.observation_spec["observation"].shape[-1]
        n_act = env.action_spec.shape[-1]
        hidden = {"num_cells": [64, 64], "activation_class": nn.Tanh}
        actor = ProbabilisticActor(
            TensorDictModule(
                nn.Sequential(MLP(n_obs, 2 * n_act, **hidden), NormalParamExtractor()),
                ["observation"],
                ["loc", "scale"],
            ),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            distribution_kwargs={
                "low": env.action_spec_unbatched.space.low,
                "high": env.action_spec_unbatched.space.high,
            },
            return_log_prob=True,
        )
        critic = Critic(MLP(n_obs, 1, **hidden), ["observation"])
        weights = [*actor.parameters(), *critic.parameters()]
        return cls(env, actor, critic, torch.optim.Adam(weights, lr=1e-3))

    def save(self, path: Path) -> None:
        """Writes a checkpoint, all or nothing: Ctrl-C may come at any time."""
        checkpoint = {
            "env": self.env.state_dict(),  # the statistics, by value
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "frames": self.frames,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint."""
        checkpoint = torch.load(path)
        self.env.load_state_dict(checkpoint["env"])
        self.actor.load_state_dict(checkpoint["actor"])
        self.critic.load_state_dict(checkpoint["critic"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.frames = checkpoint["frames"]


def train(run: Run, frames: int) -> Iterator[float]:
    """Trains, and gives after each batch the mean return of the episodes that ended."""
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=run.critic, average_gae=True)
    loss = ClipPPOLoss(run.actor, run.critic, entropy_coeff=1e-3)
    weights = [*run.actor.parameters(), *run.critic.parameters()]
    collector = Collector(
        run.env,
        run.actor,
        frames_per_batch=FRAMES,
        total_frames=frames - run.frames,
        auto_register_policy_transforms=False,
    )
    returned = float("nan")
    for data in collector:
        with torch.no_grad():
            advantage(data)
        samples = data.reshape(-1)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(samples)).split(MINIBATCH):
                losses = loss(samples[rows])
                run.optimizer.zero_grad()
                sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
                nn.utils.clip_grad_norm_(weights, 0.5)
                run.optimizer.step()
        run.frames += data.numel()
        ended = data["next", "done"]
        if ended.any():
            returned = data["next", "episode_reward"][ended].mean().item()
        yield returned


def evaluate(run: Run, episodes: int = 10) -> list[float]:
    """Returns of the policy without noise, in an environment of its own.

    The frozen copy follows the statistics, and leaves them alone.
    """
    env = make_gym()
    env.append_transform(run.env.transform[0].frozen_copy())
    env.set_seed(1000)
    returns = []
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(episodes):
            returns.append(env.rollout(1000, run.actor)["next", "reward"].sum().item())
    return returns


def compare(folder: Path, frames: int, seeds: int) -> None:
    """The same seeds with both classes: ``ppo.csv`` and ``ppo.png``.

    In one process, whose numbers are those of several.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []
    for name in ("torchrl_vecnorm", "torchrl"):
        for seed in range(seeds):
            run = Run.make(name, seed, SerialEnv)
            for returned in train(run, frames):
                rows.append((name, seed, run.frames, round(returned, 2)))
            run.env.close(raise_if_closed=False)  # the collector has
            print(f"{name}, seed {seed}: {returned:.0f}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ppo.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("normalizer", "seed", "frames", "return"), *rows])

    fig, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, colour in (("torchrl_vecnorm", "tab:blue"), ("torchrl", "tab:orange")):
        for seed in range(seeds):
            curve = [row[2:] for row in rows if row[:2] == (name, seed)]
            label = f"{name}.VecNorm" if seed == 0 else None
            axis.plot(*zip(*curve, strict=True), color=colour, alpha=0.7, label=label)
    axis.set_title(
        f"PPO on InvertedPendulum-v5, normalised observations, {seeds} seeds"
    )
    axis.set_xlabel("frames (environment steps)")
    axis.set_ylabel("return of an episode (steps, at most 1000)")
    axis.grid(alpha=0.3)
    axis.legend()
    fig.savefig(folder / "ppo.png", dpi=110)
    print(f"picture: {folder / 'ppo.png'}")


def work(run: Run, args: argparse.Namespace, checkpoint: Path) -> None:
    """Loads a checkpoint where that is asked for, then trains or evaluates."""
    if args.resume or args.evaluate:
        run.load(checkpoint)
        print(f"{checkpoint}: {run.frames} frames")
    if args.evaluate:
        returns = evaluate(run)
        print(f"mean return of {len(returns)}: {sum(returns) / len(returns):.0f}")
        return
    start = time.perf_counter()
    try:
        for returned in train(run, args.frames):
            run.save(checkpoint)
            seconds = time.perf_counter() - start
            print(f"{run.frames:7} frames, {seconds:4.0f} s: return {returned:.0f}")
    except KeyboardInterrupt:
        print(f"stopped; --resume goes on from {checkpoint}")


def main() -> None:
    """Trains, goes on, evaluates or compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=32 * FRAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="for --compare")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are no quicker on more
    checkpoint = args.out / "ppo.pt"

    if args.compare:
        return compare(args.out, args.frames, args.seeds)
    run = Run.make("torchrl_vecnorm", args.seed)
    try:
        work(run, args, checkpoint)
    finally:
        run.env.close(raise_if_closed=False)  # or its processes would be waited for


if __name__ == "__main__":
    main()
