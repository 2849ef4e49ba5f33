# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO from pixels [4, 84, 84], as Atari games are played, but no ROM is needed.

    python examples/atari_like.py

The game is Catch: a ball falls, a paddle has to be below it. Frames are bytes, four of
them are stacked, and each of the 28,224 pixels is normalised with moments of its own, as
exploration by random network distillation does it. ``eps`` is in the units of the values:
most pixels hardly ever change, and 16 of 255 keeps those few changes from becoming huge.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import CatFrames, Compose, EnvBase, TransformedEnv
from torchrl.modules import MLP, ConvNet, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_vecnorm import VecNorm

CELLS, CELL = 7, 12  # of 12 × 12 pixels: 84 × 84
GAMES, FRAMES, EPOCHS, MINIBATCH = 32, 512, 4, 128


class Catch(EnvBase):
    """Many games at once: reward 1 for a ball that is caught, -1 for one that is not."""

    def __init__(self, games: int) -> None:
        super().__init__(batch_size=[games])
        pixels = (games, 1, CELLS * CELL, CELLS * CELL)
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, pixels, dtype=torch.uint8), shape=[games]
        )
        self.action_spec = Categorical(3, shape=(games,))  # left, stay, right
        self.reward_spec = Unbounded((games, 1))
        self.done_spec = Categorical(2, dtype=torch.bool, shape=(games, 1))
        self.row, self.ball, self.paddle = torch.zeros(3, games, dtype=torch.long)

    def _set_seed(self, seed) -> None:
        torch.manual_seed(seed)

    def _observe(self) -> TensorDict:
        cells = torch.zeros(*self.batch_size, CELLS, CELLS, dtype=torch.uint8)
        game = torch.arange(len(cells))
        cells[game, self.row, self.ball] = 255
        cells[game, -1, self.paddle] = 255
        pixels = cells.repeat_interleave(CELL, -1).repeat_interleave(CELL, -2)
        done = (self.row == CELLS - 1).unsqueeze(-1)
        return TensorDict(
            {"pixels": pixels.unsqueeze(1), "done": done, "terminated": done},
            self.batch_size,
        )

    def _reset(self, tensordict=None, **kwargs) -> TensorDict:
        which = None if tensordict is None else tensordict.get("_reset", None)
        which = ... if which is None else which.squeeze(-1)
        for place, most in ((self.row, 1), (self.ball, CELLS), (self.paddle, CELLS)):
            place[which] = torch.randint_like(place[which], most)
        return self._observe().set("done", torch.zeros_like(self._observe()["done"]))

    def _step(self, tensordict) -> TensorDict:
        self.row = self.row + 1
        self.paddle = (self.paddle + tensordict["action"] - 1).clamp(0, CELLS - 1)
        td = self._observe()
        hit = torch.where(self.ball == self.paddle, 1.0, -1.0).unsqueeze(-1)
        return td.set("reward", torch.where(td["done"], hit, 0.0))


def make_env(games: int) -> TransformedEnv:
    """Four frames, as bytes; then the normalisation, which makes them floating-point."""
    return TransformedEnv(
        Catch(games),
        Compose(
            CatFrames(4, dim=-3, in_keys=["pixels"]),
            VecNorm(["pixels"], eps=16.0),
        ),
    )


def make_networks() -> tuple[ProbabilisticActor, ValueOperator]:
    """The usual three convolutions, with fewer channels; a policy and a value on top."""

    def network(out: int) -> nn.Sequential:
        return nn.Sequential(
            ConvNet(
                4, num_cells=[8, 16, 16], kernel_sizes=[8, 4, 3], strides=[4, 2, 2]
            ),
            MLP(16 * 4 * 4, out, num_cells=[128]),
        )

    actor = ProbabilisticActor(
        TensorDictModule(network(3), ["pixels"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, ValueOperator(network(1), ["pixels"])


def train(env: TransformedEnv, frames: int) -> Iterator[tuple[int, float]]:
    """Trains; gives frames so far, and which share of the balls of a batch was caught."""
    actor, critic = make_networks()
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    collector = Collector(
        env,
        actor,
        frames_per_batch=FRAMES,
        total_frames=frames,
        auto_register_policy_transforms=False,
    )
    seen = 0
    for data in collector:
        with torch.no_grad():
            advantage(data)
        samples = data.reshape(-1)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(samples)).split(MINIBATCH):
                losses = loss(samples[rows])
                optimizer.zero_grad()
                sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
                nn.utils.clip_grad_norm_(weights, 0.5)
                optimizer.step()
        seen += data.numel()
        ended = data["next", "done"]
        yield seen, (data["next", "reward"][ended] > 0).float().mean().item()


def main() -> None:
    """Trains, and saves the statistics of the pixels as a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=40 * FRAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    env = make_env(GAMES)
    env.set_seed(args.seed)
    start = time.perf_counter()
    for seen, caught in train(env, args.frames):
        seconds = time.perf_counter() - start
        print(f"{seen:6} frames, {seconds:4.0f} s: {caught:.0%} caught")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    normalizer = env.transform[1]
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for axis, title, values in (
        (axes[0], "loc", normalizer.loc["pixels"]),
        (axes[1], "scale, at least eps", normalizer.scale["pixels"]),
    ):
        image = axis.imshow(values[-1])
        axis.set_title(f"{title} (grey level, 0 to 255)")
        axis.set_axis_off()
        fig.colorbar(image, ax=axis)
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "atari_like.png", dpi=110)
    print(f"picture: {args.out / 'atari_like.png'}")


if __name__ == "__main__":
    main()
