# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO on an mjlab task (MuJoCo-Warp), with its observation groups normalised.

    pip install torchrl_vecnorm[mjlab]
    python examples/mjlab_ppo.py

mjlab simulates thousands of worlds on one GPU, or some on a CPU, and gives groups of
observations: ``actor`` for the policy, and ``critic`` for the value, which may see more
(what a robot cannot measure). One transform normalises both in one call, on the device
where they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import mjlab.tasks  # noqa: F401 (registers them)
import torch
from mjlab.tasks.registry import load_env_cfg
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import MJLabEnv, TransformedEnv
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_vecnorm import VecNorm

STEPS, EPOCHS, MINIBATCHES = 32, 5, 8


def make_networks(env: TransformedEnv) -> tuple[ProbabilisticActor, ValueOperator]:
    """A policy of ``actor`` and a value of ``critic``."""
    spec = env.observation_spec
    n_act = env.action_spec.shape[-1]
    sizes = {"num_cells": [64, 64], "activation_class": nn.ELU, "device": env.device}
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(
                MLP(spec["actor"].shape[-1], 2 * n_act, **sizes), NormalParamExtractor()
            ),
            ["actor"],
            ["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=torch.distributions.Normal,
        return_log_prob=True,
    )
    return actor, ValueOperator(MLP(spec["critic"].shape[-1], 1, **sizes), ["critic"])


def train(env: TransformedEnv, batches: int, path: Path) -> Iterator[tuple[int, float]]:
    """Trains; gives frames so far, and the mean reward of a step of the batch."""
    actor, critic = make_networks(env)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=1e-3)
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    frames = STEPS * env.batch_size.numel()
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames,
        total_frames=frames * batches,
        auto_register_policy_transforms=False,
    )
    seen = 0
    for data in collector:
        with torch.no_grad():
            advantage(data)
        samples = data.reshape(-1)
        for _ in range(EPOCHS):
            order = torch.randperm(len(samples), device=data.device)
            for rows in order.chunk(MINIBATCHES):
                losses = loss(samples[rows])
                optimizer.zero_grad()
                sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
        seen += data.numel()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"actor": actor.state_dict(), "env": env.state_dict()}, path)
        yield seen, data["next", "reward"].mean().item()


def main() -> None:
    """Trains on a GPU where there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--task", default="Mjlab-Cartpole-Balance")
    parser.add_argument("--num-envs", type=int, default=4096 if on_gpu else 64)
    parser.add_argument(
        "--seconds",
        type=float,
        default=50.0 if on_gpu else 3.2,
        help="of an episode: few worlds learn to balance from many short ones",
    )
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    cfg = load_env_cfg(args.task)
    cfg.episode_length_s = args.seconds
    env = MJLabEnv(args.task, cfg=cfg, num_envs=args.num_envs)
    env = TransformedEnv(env, VecNorm(["actor", "critic"]))
    env.set_seed(args.seed)
    print(f"{args.task}: {args.num_envs} worlds on {env.device}")
    start = time.perf_counter()
    for seen, reward in train(env, args.batches, args.out / "mjlab_ppo.pt"):
        seconds = time.perf_counter() - start
        print(f"{seen:8} frames, {seconds:4.0f} s: reward of a step {reward:.4f}")
    for name, values in (("loc", env.transform.loc), ("scale", env.transform.scale)):
        print(name, {key: value.tolist() for key, value in values.items()})


if __name__ == "__main__":
    main()
