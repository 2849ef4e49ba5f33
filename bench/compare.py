# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Times the operator and the transform against ``copy_`` and torchrl's own VecNorm.

``copy_`` of the same tensors is the floor: x has to be read, and y written. Everything
runs interleaved, round after round, on float32 tensors that are written with ``out=``
where that is possible; medians over the rounds. Prints a table in Markdown and writes
it, with the raw numbers, to ``bench/results/<machine>/``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from torch.utils.benchmark import Timer
from torchrl.envs import VecNorm as TorchRLVecNorm
from tqdm import tqdm

import torchrl_vecnorm
from torchrl_vecnorm import VecNorm
from torchrl_vecnorm import functional as F

SIZES = [
    (1, 8),
    (64, 32),
    (4096, 64),
    (4096, 256),
    (65536, 64),
    (65536, 256),
    (1_000_000, 64),
]


def machine() -> str:
    """A name for the machine, fit for a folder."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found.group(1) if found else name
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def contenders(n: int, features: int) -> dict[str, Callable[[], object]]:
    """What is timed at one size; each has its own memory."""
    x = torch.randn(n, features)
    y = torch.empty_like(x)
    state = F.Moments.zeros([features])
    td = TensorDict({"observation": x}, [n])
    ours = VecNorm(["observation"], ["normalized"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = TorchRLVecNorm(["observation"], ["normalized"], new_api=False)
    ours_td, theirs_td = td.clone(), td.clone()
    return {
        "copy_": lambda: y.copy_(x),
        "operator": lambda: F.update_(x, state, decay=0.9999, out=y),
        "VecNorm": lambda: ours._call(ours_td),
        "torchrl VecNorm": lambda: theirs._call(theirs_td),
    }


def measure(
    calls: dict[str, Callable], rounds: int, seconds: float
) -> dict[str, float]:
    """Median microseconds of a call, the contenders taking turns."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
        for name, f in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, timer in timers.items():
        timer.timeit(2)  # first calls allocate
        times[name] = []
    for _ in range(rounds):
        for name, timer in timers.items():
            run = timer.blocked_autorange(min_run_time=seconds)
            times[name].append(run.median * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def markdown(results: list[dict]) -> str:
    """One row a size."""
    lines = [
        "| N × F | `copy_` µs | operator µs (× copy_) | `VecNorm` µs | torchrl "
        "`VecNorm` µs | times faster |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        t = row["microseconds"]
        lines.append(
            f"| {row['samples']} × {row['features']} | {t['copy_']:.1f} "
            f"| {t['operator']:.1f} ({t['operator'] / t['copy_']:.2f}) "
            f"| {t['VecNorm']:.1f} | {t['torchrl VecNorm']:.1f} "
            f"| {t['torchrl VecNorm'] / t['VecNorm']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1)
    args = parser.parse_args()

    results = []
    for n, features in tqdm(SIZES, desc="sizes"):
        times = measure(contenders(n, features), args.rounds, args.seconds)
        results.append({"samples": n, "features": features, "microseconds": times})

    folder = Path(__file__).parent / "results" / machine()
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown(results)
    about = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "torchrl_vecnorm": torchrl_vecnorm.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    (folder / "compare.json").write_text(
        json.dumps({"about": about, "results": results}, indent=1) + "\n"
    )
    (folder / "compare.md").write_text(f"{about}\n\n{table}\n")
    print(f"\n{table}\n\nwritten to {folder}")


if __name__ == "__main__":
    main()
