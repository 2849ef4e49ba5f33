# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Two RayCollectors, each in a process of its own, with the statistics of both.

    pip install "ray==2.60.*"
    python examples/ray_collectors.py

torchrl's collectors give their statistics away in ``state_dict()`` and take them in
``load_state_dict()``; what is in between, ``merge_states``, is all that it takes. Without
it each collector normalises by what it has seen itself, and the policy meets observations
of two scales.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import GymEnv, TransformedEnv

from torchrl_vecnorm import VecNorm, merge_states

#: Where the statistics are in what a collector saves.
COUNT = "observation_count"


def make_env(seed: int) -> TransformedEnv:
    """A pendulum whose observations are normalised where it is stepped."""
    env = TransformedEnv(GymEnv("Pendulum-v1"), VecNorm(["observation"], decay=0.999))
    env.set_seed(seed)
    return env


def statistics_in(state: dict) -> dict[str, Tensor]:
    """The entries of the normaliser, wherever they are in it."""
    if COUNT in state:
        return state
    found = (statistics_in(v) for v in state.values() if isinstance(v, dict))
    return next((one for one in found if one), {})


def collect(collectors: int, iterations: int, frames: int) -> list[dict]:
    """Collects; the states of the collectors after each iteration, all alike."""
    # Ray's workers import what this process does, from where it does.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    collector = RayCollector(
        [partial(make_env, seed) for seed in range(collectors)],
        frames_per_batch=frames * collectors,
        total_frames=frames * collectors * iterations,
        sync=True,
        ray_init_config={
            "num_cpus": collectors,
            "include_dashboard": False,
            "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
        },
        remote_configs={"num_cpus": 1, "num_gpus": 0, "memory": 2**28},
    )
    base, states = None, []
    try:
        for i, batch in enumerate(collector):
            alone = collector.state_dict()  # one for each
            base = merge_states(alone, base)
            collector.load_state_dict([base] * collectors)
            states = collector.state_dict()
            counts = [statistics_in(one)[COUNT].item() for one in alone]
            print(
                f"{i + 1}: {batch.numel()} frames, counts {[round(c) for c in counts]}, "
                f"together {statistics_in(base)[COUNT].item():.0f}",
                flush=True,
            )
    finally:
        collector.shutdown(shutdown_ray=True)
    return states


def main() -> None:
    """Collects with what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collectors", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--frames", type=int, default=200, help="of each, an iteration")
    args = parser.parse_args()
    states = collect(args.collectors, args.iterations, args.frames)
    first, *others = map(statistics_in, states)
    alike = all(torch.equal(one[k], first[k]) for one in others for k in first)
    print(f"all collectors have the same statistics: {alike}")


if __name__ == "__main__":
    main()
