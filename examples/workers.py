# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Several processes normalise Pendulum-v1 with the same statistics.

Each worker makes an environment and a transform of its own; what they share is the
tensordict that comes through a queue. One of them is killed on the way, which costs at
most the update that it was at.
"""

from __future__ import annotations

import argparse
import time

from torch import multiprocessing as mp
from torchrl.envs import GymEnv, TransformedEnv

from torchrl_vecnorm import VecNorm


def work(queue: mp.Queue, steps: int) -> None:
    """What each worker does: the last three lines of the documented example."""
    t = VecNorm(shared_td=queue.get(), decay=1.0)
    env = TransformedEnv(GymEnv("Pendulum-v1"), t)
    env.rollout(steps, break_when_any_done=False)


def main() -> None:
    """Starts the workers, kills one, and shows what all of them have seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()

    context = mp.get_context("spawn")
    queue = context.Queue()
    td = VecNorm.build_td_for_shared_vecnorm(GymEnv("Pendulum-v1"), ["next"])
    workers = [
        context.Process(target=work, args=(queue, args.steps))
        for _ in range(args.workers)
    ]
    for worker in workers:
        worker.start()
        queue.put(td)

    t = VecNorm(shared_td=td, decay=1.0).freeze()

    def seen() -> int:
        return int(t.consistent_state_dict()["reward_count"].item())

    while seen() < args.steps // 2:
        time.sleep(0.01)
    workers[0].kill()
    for worker in workers:
        worker.join()
    print(f"{args.workers} workers, one killed half-way: {seen()} steps in all")
    for name, values in (("loc", t.loc), ("scale", t.scale)):
        print(name, {key: value.tolist() for key, value in values.items()})


if __name__ == "__main__":
    main()
