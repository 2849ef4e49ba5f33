# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a call costs where cores are busy, or nothing of it is in the caches.

Benchmarks repeat a call on a quiet machine. Whoever trains has simulators on the cores,
and between two calls a policy and an environment that have used all caches.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tensordict import TensorDict

from bench import measure, peers
from torchrl_vecnorm import functional as F

BUSY = (0, 1, 2, 4)  # processes that do nothing but run
CALLS = 150
#: What lies between two cold calls: more than any cache holds.
OTHER_WORK_BYTES = 160 * 10**6
#: Three keys of 64 worlds: what the actor and the critic see, and the reward.
KEYS = ((64, 5), (64, 5), (64, 1))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes run meanwhile."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(processes)
    ]
    try:
        time.sleep(0.5 if others else 0)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def times(call: Callable, repeat: int) -> list[float]:
    """Microseconds of each of some calls."""
    found = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        found.append((time.perf_counter() - begin) * 1e6)
    return found


def under_load(n: int, features: int, rounds: int) -> list[dict]:
    """Medians of a quiet machine, then means of CALLS calls beside busy processes."""
    x = measure.random(n, features, torch.float32, "cpu")
    y = torch.empty_like(x)
    state = F.Moments.zeros([features])
    calls = {
        peers.COPY: lambda: y.copy_(x),
        peers.OPERATOR: lambda: F.update_(x, state, out=y),
    }
    for call in calls.values():
        times(call, CALLS)
    quiet = {
        name: statistics.median(times(call, 3 * CALLS)) for name, call in calls.items()
    }
    records = []
    for processes in BUSY:
        means: dict[str, list[float]] = {name: [] for name in calls}
        with busy(processes):
            for _ in range(rounds):
                for name, call in calls.items():
                    means[name].append(statistics.mean(times(call, CALLS)))
        records += [
            {
                "section": "busy",
                "samples": n,
                "features": features,
                "processes": processes,
                "name": name,
                "microseconds": statistics.median(found),
                "rounds": found,
                "quiet": quiet[name],
            }
            for name, found in means.items()
        ]
    return records


def cold(rounds: int) -> list[dict]:
    """Medians of calls on three keys with warm and with cold caches; copy_ of one key."""
    xs = [measure.random(*shape, torch.float32, "cpu") for shape in KEYS]
    ys = [torch.empty_like(x) for x in xs]
    names = [f"key{i}" for i in range(len(xs))]
    td = TensorDict(dict(zip(names, xs, strict=True)), [KEYS[0][0]])

    def of(transform) -> Callable:
        for _ in range(3):
            transform._call(td.copy())

        def call() -> None:
            td._tensordict.update(zip(names, xs, strict=True))
            transform._call(td)

        return call

    calls = {
        peers.COPY: lambda: ys[0].copy_(xs[0]),
        peers.TRANSFORM: of(peers.vecnorm(names)),
        peers.TORCHRL: of(peers.torchrl_vecnorm(names)),
    }
    other_work = torch.ones(OTHER_WORK_BYTES // 4)
    return _warm_and_cold("other work", calls, lambda: other_work.add_(1), rounds)


def in_an_environment(rounds: int) -> list[dict]:
    """The same for the calls that one step of a simulation lies between."""
    from torchrl.envs import GymEnv

    env = GymEnv("Pendulum-v1")
    keys = ["observation", "reward"]
    td = env.rand_step(env.reset())["next"].select(*keys)
    y = torch.empty_like(td["observation"])
    transforms = [peers.vecnorm(keys), peers.torchrl_vecnorm(keys)]
    for transform in 3 * transforms:
        transform._call(td.copy())
    calls = {
        peers.COPY: lambda: y.copy_(td["observation"]),
        peers.TRANSFORM: lambda: transforms[0]._call(td),
        peers.TORCHRL: lambda: transforms[1]._call(td),
    }

    def step() -> None:
        new = env.rand_step(env.reset())["next"]
        td.update(new.select(*keys))

    return _warm_and_cold("Pendulum-v1", calls, step, rounds)


def _warm_and_cold(
    between: str, calls: dict[str, Callable], work: Callable, rounds: int
) -> list[dict]:
    warm = {name: statistics.median(times(call, 300)) for name, call in calls.items()}
    cold: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(10 * rounds):
        for name, call in calls.items():
            work()
            cold[name] += times(call, 1)
    return [
        {
            "section": "cold",
            "between": between,
            "name": name,
            "microseconds": statistics.median(found),
            "rounds": found,
            "warm": warm[name],
        }
        for name, found in cold.items()
    ]
