# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Races this build against another one: ``make bench BENCH="--against FOLDER"``.

Both cannot be in one process, as their operators have the same names. So each has a
worker, and they take turns, call by call and round by round: a machine that slows down
for a while slows both. Each worker times torchrl's class and ``copy_`` too, which are the
same in both.

This file imports nothing of the project but the package that is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

OURS, TORCHRL, COPY, OPERATOR, FROZEN = "_call", "torchrl", "copy_", "update_", "frozen"
WHO = (OURS, TORCHRL, COPY, OPERATOR, FROZEN)

SAMPLES = (1, 8, 64, 512, 4096)
FEATURES = (8, 64, 376, 1024, 4096, 28224)

#: No more values than that: beyond it everything waits for memory.
MOST_VALUES = 4096 * 376


def sizes() -> list[tuple[int, int]]:
    """Samples and features of the race."""
    return [
        (n, f) for f in FEATURES for n in SAMPLES if n * f <= MOST_VALUES or n == 64
    ]


# ------------------------------------------------------------------------- a worker


def calls(samples: int, features: int) -> dict[str, Callable]:
    """What is timed at one size, float32, one key."""
    from tensordict import TensorDict
    from torchrl.envs import VecNorm as TorchRL

    from torchrl_vecnorm import VecNorm
    from torchrl_vecnorm import functional as F

    x = torch.randn(samples, features)
    out = torch.empty_like(x)
    state = F.Moments.zeros([features])
    td = TensorDict({"observation": x}, [samples])

    def of(transform) -> Callable:
        fill = td.copy()
        for _ in range(3):
            transform._call(fill.set("observation", x))

        def call() -> None:
            fill._tensordict["observation"] = x
            transform._call(fill)

        return call

    frozen = VecNorm(["observation"])
    frozen._call(td.copy())
    return {
        OURS: of(VecNorm(["observation"])),
        TORCHRL: of(TorchRL(["observation"], new_api=False)),
        COPY: lambda: out.copy_(x),
        OPERATOR: lambda: F.update_(x, state, out=out),
        FROZEN: of(frozen.freeze()),
    }


def work() -> None:
    """Answers one line for each line: what to time, and how often."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("RL_WARNINGS", "0")
    found: dict[tuple[int, int], dict[str, Callable]] = {}
    for line in sys.stdin:
        samples, features, name, seconds = json.loads(line)
        size = samples, features
        if size not in found:
            found = {size: calls(*size)}
        timer = Timer(
            "f()", globals={"f": found[size][name]}, num_threads=torch.get_num_threads()
        )
        run = timer.blocked_autorange(min_run_time=seconds)
        print(json.dumps(run.median * 1e6), flush=True)


# -------------------------------------------------------------------------- the race


class Worker:
    """A process with the package of a folder."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def time(self, size: tuple[int, int], name: str, seconds: float) -> float:
        """Microseconds of a call."""
        self.process.stdin.write(json.dumps([*size, name, seconds]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        self.process.stdin.close()
        self.process.wait()


THIS, OTHER = "this", "other"


def race(folder: Path, rounds: int, seconds: float) -> list[dict]:
    """One record for each build, size and call: medians, in microseconds."""
    here = Path(__file__).resolve().parents[1]
    workers = {THIS: Worker(here), OTHER: Worker(folder)}
    records = []
    try:
        for size in sizes():
            times: dict[tuple[str, str], list[float]] = {}
            for _ in range(rounds):
                for who in WHO:
                    for build, worker in workers.items():
                        taken = worker.time(size, who, seconds)
                        times.setdefault((build, who), []).append(taken)
            records += [
                {
                    "section": "race",
                    "samples": size[0],
                    "features": size[1],
                    "build": build,
                    "name": who,
                    "microseconds": statistics.median(t),
                }
                for (build, who), t in times.items()
            ]
    finally:
        for worker in workers.values():
            worker.close()
    return records


def show(records: list[dict]) -> str:
    """A line a size: µs of both, how much faster than the other and than torchrl's."""
    found = {
        (r["samples"], r["features"], r["build"], r["name"]): r["microseconds"]
        for r in records
    }
    lines = [
        f"{'N':>6}{'F':>7}{'_call µs':>11}{'before':>10}{'faster':>8}{'× torchrl':>11}"
        f"{'update_':>10}{'before':>10}{'× copy_':>9}{'frozen':>9}{'before':>9}"
    ]
    for n, f in sizes():

        def us(name, build=THIS, n=n, f=f):
            return found[n, f, build, name]

        torchrl = min(us(TORCHRL), us(TORCHRL, OTHER))
        copy = min(us(COPY), us(COPY, OTHER))
        lines.append(
            f"{n:>6}{f:>7}{us(OURS):>11.2f}{us(OURS, OTHER):>10.2f}"
            f"{us(OURS, OTHER) / us(OURS):>8.2f}{torchrl / us(OURS):>11.2f}"
            f"{us(OPERATOR):>10.2f}{us(OPERATOR, OTHER):>10.2f}"
            f"{us(OPERATOR) / copy:>9.2f}{us(FROZEN):>9.2f}{us(FROZEN, OTHER):>9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    work()
