# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO by hand, on tensors alone: 256 pendulums, and the functional interface.

    python examples/ppo_tensors.py

Observations are normalised as they come. Rewards keep their mean: they are divided by
the deviation of the discounted return, which a module follows. Both states go into the
checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from torchrl_vecnorm import ReturnNorm
from torchrl_vecnorm import functional as F

PENDULUMS, STEPS, EPISODE = 256, 50, 200
EPOCHS, MINIBATCH = 5, 1600
GAMMA, LAMBDA, CLIP = 0.95, 0.95, 0.2


class Pendulums:
    """Gymnasium's Pendulum-v1, many at once; all of them start and end together."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> Tensor:
        """Any angle, little speed."""
        self.angle = torch.empty(PENDULUMS).uniform_(-math.pi, math.pi)
        self.speed = torch.empty(PENDULUMS).uniform_(-1, 1)
        return self.observe()

    def observe(self) -> Tensor:
        """``[PENDULUMS, 3]``."""
        return torch.stack([self.angle.cos(), self.angle.sin(), self.speed], -1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Observations and rewards ``[PENDULUMS]`` for torques ``[PENDULUMS, 1]``."""
        torque = action.squeeze(-1).clamp(-2, 2)
        from_top = torch.remainder(self.angle + math.pi, 2 * math.pi) - math.pi
        cost = from_top**2 + 0.1 * self.speed**2 + 0.001 * torque**2
        speed = self.speed + (15 * self.angle.sin() + 3 * torque) * 0.05
        self.speed = speed.clamp(-8, 8)
        self.angle = self.angle + self.speed * 0.05
        return self.observe(), -cost


class ActorCritic(nn.Module):
    """A Gaussian policy and a value, of normalised observations."""

    def __init__(self) -> None:
        super().__init__()

        def network(out: int) -> nn.Sequential:
            return nn.Sequential(
                *(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()),
                nn.Linear(64, out),
            )

        self.mean, self.value = network(1), network(1)
        self.log_std = nn.Parameter(torch.zeros(1))

    def policy(self, x: Tensor) -> torch.distributions.Normal:
        """The distribution of torques."""
        return torch.distributions.Normal(self.mean(x), self.log_std.exp())


def advantages(rewards: Tensor, values: Tensor) -> Tensor:
    """Generalised advantages ``[STEPS, PENDULUMS]``; values have one row more.

    Nothing ends by itself here: an episode that is cut off goes on in its value.
    """
    result = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * values[t + 1] - values[t]
        result[t] = last = delta + GAMMA * LAMBDA * last
    return result


def train(iterations: int, path: Path) -> list[float]:
    """Trains, and returns the mean return of an episode, one number for each of them."""
    env, model = Pendulums(), ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    observed = F.Moments.zeros([3])
    returned = ReturnNorm(PENDULUMS, gamma=GAMMA, decay=0.9999)
    episodes, total = [], torch.zeros(PENDULUMS)
    no_end = torch.zeros(PENDULUMS, dtype=torch.bool)
    start = time.perf_counter()

    for iteration in range(iterations):
        if iteration * STEPS % EPISODE == 0:
            x = F.update_(env.reset(), observed, decay=0.9999)
            total.zero_()
            returned.reset()
        xs, actions, log_probs, rewards = [], [], [], []
        with torch.no_grad():
            for _ in range(STEPS):
                policy = model.policy(x)
                action = policy.sample()
                raw, reward = env.step(action)
                total += reward
                # The scale of what the value has to learn; the mean stays.
                rewards.append(returned(reward, no_end))
                xs.append(x)
                actions.append(action)
                log_probs.append(policy.log_prob(action))
                x = F.update_(raw, observed, decay=0.9999)
            values = model.value(torch.stack([*xs, x])).squeeze(-1)
            gain = advantages(torch.stack(rewards), values)
            target = (gain + values[:-1]).reshape(-1, 1)
            gain = ((gain - gain.mean()) / gain.std()).reshape(-1, 1)
            batch = [torch.cat(v) for v in (xs, actions, log_probs)]

        for _ in range(EPOCHS):
            for rows in torch.randperm(len(gain)).split(MINIBATCH):
                at, act, old = (v[rows] for v in batch)
                ratio = (model.policy(at).log_prob(act) - old).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.min(ratio * gain[rows], clipped * gain[rows]).mean()
                loss = loss + 0.5 * (model.value(at) - target[rows]).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()

        if (iteration + 1) * STEPS % EPISODE == 0:
            episodes.append(total.mean().item())
            print(
                f"{(iteration + 1) * STEPS * PENDULUMS:8} steps, "
                f"{time.perf_counter() - start:4.0f} s: return {episodes[-1]:.0f}"
            )

    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "model": model.state_dict(),
        "observed": observed,
        "returned": returned.state_dict(),
    }
    torch.save(saved, path)
    return episodes


def evaluate(path: Path) -> float:
    """The mean return of an episode without noise, with the statistics as they are."""
    saved = torch.load(path)
    model, env = ActorCritic(), Pendulums()
    model.load_state_dict(saved["model"])
    total = torch.zeros(PENDULUMS)
    raw = env.reset()
    with torch.no_grad():
        for _ in range(EPISODE):
            raw, reward = env.step(model.mean(F.normalize(raw, saved["observed"])))
            total += reward
    return total.mean().item()


def main() -> None:
    """Trains and evaluates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are no quicker on more

    torch.manual_seed(args.seed)
    path = args.out / "ppo_tensors.pt"
    train(args.iterations, path)
    print(f"{path}: return without noise {evaluate(path):.0f}")


if __name__ == "__main__":
    main()
