# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Data-parallel PPO: pendulums over several processes, with the statistics of all of them.

    torchrun --nproc-per-node 2 examples/torchrun_ppo.py             # Ctrl-C, or kill one
    torchrun --nproc-per-node 3 examples/torchrun_ppo.py --resume    # on as many as you like

The pendulums of all ranks are as many as there are, whatever the number of ranks. Every
call of the normalisers is one all-reduce: all ranks normalise alike, so that the averaged
gradients are those of one policy. A checkpoint is written by rank 0 and loaded by all.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import ppo_tensors as alone
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrl_vecnorm import RunningNorm

#: Of all ranks together: whole numbers for 1 to 6 of them.
PENDULUMS, STEPS, EPISODE = 240, 50, 200
EPOCHS, MINIBATCHES = 5, 6
DECAY, CLIP = 0.9999, 0.2


def average_gradients(model: nn.Module) -> None:
    """The mean over the ranks, in one all-reduce."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    for g, mean in zip(
        gradients, flat.split([g.numel() for g in gradients]), strict=True
    ):
        g.copy_(mean.view_as(g))


class Trainer:
    """One rank: its pendulums, and what all ranks have the same."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        alone.PENDULUMS = PENDULUMS // dist.get_world_size()
        torch.manual_seed(0)  # the same networks
        self.model = alone.ActorCritic()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.observed = RunningNorm(3, decay=DECAY, group="world")
        # What the value has to learn is scaled; its mean stays.
        self.returned = RunningNorm(1, decay=DECAY, center=False, group="world")
        self.iteration = 0
        if resume:
            saved = torch.load(path)
            self.iteration = saved["iteration"]
            for name, part in self.parts().items():
                part.load_state_dict(saved[name])
        torch.manual_seed(1000 * self.iteration + dist.get_rank())  # other pendulums
        self.env = alone.Pendulums()

    def parts(self) -> dict:
        """What a checkpoint has."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "observed": self.observed,
            "returned": self.returned,
        }

    def save(self) -> None:
        """Written by one rank; whoever reads it finds the old one or the new one."""
        if dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            saved = {name: part.state_dict() for name, part in self.parts().items()}
            torch.save(saved | {"iteration": self.iteration}, f"{self.path}.new")
            os.replace(f"{self.path}.new", self.path)

    def train(self, iterations: int) -> float:
        """Trains; the mean reward of the last iteration over all ranks."""
        begun, mean = time.perf_counter(), 0.0
        while self.iteration < iterations:
            mean = self.iterate()
            self.iteration += 1
            self.save()
            if dist.get_rank() == 0:
                print(
                    f"{self.iteration * STEPS * PENDULUMS:8} steps, "
                    f"{time.perf_counter() - begun:4.0f} s: reward {mean:.2f}",
                    flush=True,
                )
        return mean

    @torch.no_grad()
    def collect(self) -> tuple[list[Tensor], float]:
        """Observations, actions, log-probabilities, gains and targets, as columns."""
        model, env = self.model, self.env
        x = self.observed(env.reset())
        discounted = torch.zeros(len(x), 1)
        xs, actions, log_probs, rewards = [], [], [], []
        for _ in range(STEPS):
            policy = model.policy(x)
            action = policy.sample()
            raw, reward = env.step(action)
            discounted = alone.GAMMA * discounted + reward.unsqueeze(-1)
            self.returned.update(discounted)
            xs.append(x)
            actions.append(action)
            log_probs.append(policy.log_prob(action))
            rewards.append(reward)
            x = self.observed(raw)
        values = model.value(torch.stack([*xs, x])).squeeze(-1)
        scaled = torch.stack(rewards) / self.returned.std.float()
        gain = alone.advantages(scaled, values)
        target = (gain + values[:-1]).reshape(-1, 1)
        gain = ((gain - gain.mean()) / gain.std()).reshape(-1, 1)
        mean = torch.stack(rewards).mean()
        dist.all_reduce(mean)
        columns = [*(torch.cat(v) for v in (xs, actions, log_probs)), gain, target]
        return columns, mean.item() / dist.get_world_size()

    def iterate(self) -> float:
        """Collects and learns once."""
        columns, mean = self.collect()
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(columns[0])).chunk(MINIBATCHES):
                at, act, old, gain, target = (v[rows] for v in columns)
                ratio = (self.model.policy(at).log_prob(act) - old).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.min(ratio * gain, clipped * gain).mean()
                loss = loss + 0.5 * (self.model.value(at) - target).pow(2).mean()
                self.optimizer.zero_grad()
                loss.backward()
                average_gradients(self.model)
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
        return mean


def main() -> None:
    """One rank of what torchrun starts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, as shown above")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainer = Trainer(args.out / "torchrun_ppo.pt", args.resume)
    trainer.train(args.iterations)
    if dist.get_rank() == 0:
        print(f"{trainer.path}: {trainer.observed.count.item():.0f} observations seen")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
