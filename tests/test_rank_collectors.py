# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""torchrl's collectors on several nodes: what the guide to ranks shows works.

Each in a process of its own, which becomes a rank, and whose nodes import this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.collectors.distributed import DistributedCollector, RPCCollector
from torchrl.envs import GymEnv, TransformedEnv

import torchrl_vecnorm
from torchrl_vecnorm import VecNorm, merge_states

pytestmark = pytest.mark.slow
NODES, FRAMES, ITERATIONS = 2, 40, 3
PACKAGE = str(Path(torchrl_vecnorm.__file__).parents[1])


def make_env(seed):
    env = TransformedEnv(GymEnv("Pendulum-v1"), VecNorm(["observation"], decay=1.0))
    env.set_seed(seed)
    return env


def policy():
    return TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["action"])


def options():
    return {
        "create_env_fn": [partial(make_env, seed) for seed in range(NODES)],
        "policy": policy(),
        "frames_per_batch": FRAMES * NODES,
        "total_frames": FRAMES * NODES * ITERATIONS,
        "launcher": "mp",
        "sync": True,
    }


def trained(kind: str, folder: Path) -> list[list[dict]]:
    """The states that nodes had after each iteration."""
    with open(folder / "output", "w") as output:
        arguments = [sys.executable, __file__, kind]
        ended = subprocess.run(
            arguments,
            stdout=output,
            stderr=output,
            timeout=120,
            env=os.environ | {"PYTHONPATH": PACKAGE, "REPORTS": str(folder)},
        )
    assert ended.returncode == 0, (folder / "output").read_text()
    nodes = range(1, NODES + 1)
    return [
        [torch.load(folder / f"{node}-{i}") for node in nodes]
        for i in range(ITERATIONS)
    ]


def judge(states):
    """Of each iteration and node: all have the same, and each sample counts once.

    A node resets once before its first batch, and no episode ends in so few frames.
    """
    for i, nodes in enumerate(states):
        counts = {state["observation_count"].item() for state in nodes}
        assert counts == {NODES * (1 + (i + 1) * FRAMES)}
        for name, leaf in nodes[0].items():
            assert all(torch.equal(leaf, other[name]) for other in nodes), name


class Together(Collector):
    """Joins the statistics of the nodes after each batch; the trainer, rank 0, has none."""

    nodes = None

    def next(self):
        batch = super().next()
        if self.nodes is None:
            self.nodes = dist.new_group(
                list(range(1, dist.get_world_size())),
                timeout=timedelta(seconds=60),
                use_local_synchronization=True,  # the trainer does not call this
            )
        self.env.transform.sync_(self.nodes)
        report(dist.get_rank(), self.env.transform.get_extra_state())
        return batch


def report(node: int, state: dict) -> None:
    folder = Path(os.environ["REPORTS"])
    i = len(list(folder.glob(f"{node}-*")))
    torch.save({**state}, folder / f"{node}-{i}")


def distributed():
    collector = DistributedCollector(
        **options(), collector_class=Together, backend="gloo"
    )
    for _ in collector:
        pass
    collector.shutdown()


def rpc():
    collector = RPCCollector(**options(), collector_class=Collector)
    base = None
    for _ in collector:
        nodes = [node.rpc_sync() for node in collector.collector_rrefs]
        base = merge_states([node.state_dict() for node in nodes], base)
        for i, node in enumerate(nodes):
            node.load_state_dict(base)
            report(i + 1, node.state_dict()["env_state_dict"]["_extra_state"])
    collector.shutdown()


@pytest.mark.parametrize("kind", ["distributed", "rpc"])
def test_nodes_have_the_same_after_each_batch(kind, tmp_path):
    judge(trained(kind, tmp_path))


if __name__ == "__main__":
    {"distributed": distributed, "rpc": rpc}[sys.argv[1]]()
