# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What statistics of several ranks cost: beside one all-reduce, and beside rsl_rl's own.

    python -m bench.ranks [--quick]

Ranks are processes of this machine with a thread each, joined by gloo. With more of them
than cores they wait for each other to be let in, which no network does: such rows say how
it compares, not what it costs. The results go to ``bench/results/<machine>/ranks.json``,
a picture of them beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from bench import machine, results_folder
from torchrl_vecnorm import RunningNorm

SHAPES = [(64, 32), (4096, 64)]
RANKS = [2, 4]
#: At so many features the ranks are compared in the picture, of 64 samples each.
FEATURES, GROWTH_RANKS = [8, 64, 512, 4096], [1, 2, 4]
#: The call with a group may take so many all-reduces more than one without.
MOST_ALL_REDUCES = 1.3
#: How many times faster than rsl_rl's update and forward it is to be.
FASTER = 2.0

Call = Callable[[], object]


def calls(shape: tuple[int, int]) -> tuple[dict[str, Call], int]:
    """What takes turns, and the bytes of our all-reduce."""
    x = torch.randn(shape) * 2 + 3
    together, alone = RunningNorm(shape[1], group="world"), RunningNorm(shape[1])
    together(x)
    buffer = torch.zeros_like(together._ranks._batches.buffer)

    def with_one():  # ranks that computed something come to it at different times
        alone(x)
        dist.all_reduce(buffer)

    found = {
        "together": lambda: together(x),
        "alone": lambda: alone(x),
        "with_one": with_one,
    }
    if importlib.util.find_spec("rsl_rl") is not None:
        from rsl_rl.modules import EmpiricalNormalization

        theirs = EmpiricalNormalization(shape[1])

        def call():
            theirs.update(x)
            return theirs(x)

        found["rsl_rl"] = call
    return found, buffer.numel() * buffer.element_size()


def rank(index: int, size: int, folder: str, shapes: list, rounds: int, n: int) -> None:
    """Times the calls, one after the other in each round; rank 0 writes the times."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=index, world_size=size
    )
    report = []
    for shape in shapes:
        compared, length = calls(shape)
        times: dict[str, list[float]] = {name: [] for name in compared}
        for i in range(rounds + 1):
            for name, call in compared.items():
                dist.barrier()
                begun = time.perf_counter()
                for _ in range(n):
                    call()
                if i:  # the first round warms up
                    times[name].append((time.perf_counter() - begun) / n * 1e6)
        report.append((length, times))
    if index == 0:
        Path(folder, "report.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def measured(size: int, shapes: list, rounds: int, n: int) -> list[dict]:
    """A row for each shape: medians in microseconds, and of differences in a round."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (size, folder, shapes, rounds, n), nprocs=size)
        report = json.loads(Path(folder, "report.json").read_text())
    rows = []
    for (samples, features), (length, times) in zip(shapes, report, strict=True):
        each = {name: np.array(t) for name, t in times.items()}
        added = each["together"] - each["alone"]
        one = each.pop("with_one") - each["alone"]
        row = {
            "ranks": size,
            "samples": samples,
            "features": features,
            "bytes": length,
            **{f"{name}_us": round(float(np.median(t)), 2) for name, t in each.items()},
            "added_us": round(float(np.median(added)), 2),
            "all_reduce_us": round(float(np.median(one)), 2),
            "all_reduces": round(float(np.median(added / one)), 2),
        }
        if "rsl_rl" in each:
            ratio = np.median(each["rsl_rl"] / each["together"])
            row["times_faster"] = round(float(ratio), 2)
        rows.append(row)
    return rows


def draw(rows: list[dict], file: Path) -> None:
    """What a group adds to a call, over features and ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for color, size in enumerate(sorted({row["ranks"] for row in rows})):
        some = [row for row in rows if row["ranks"] == size]
        x = [row["features"] for row in some]
        cores = len(os.sched_getaffinity(0))
        label = f"{size} rank{'s' * (size > 1)}" + (
            f" on {cores} cores" if size > cores else ""
        )
        axes.plot(x, [row["added_us"] for row in some], f"C{color}o-", label=label)
        axes.plot(x, [row["all_reduce_us"] for row in some], f"C{color}--")
    axes.plot([], [], "k--", label="one all-reduce of the same bytes")
    axes.set(xscale="log", yscale="log", xlabel="features", ylabel="µs added to a call")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> int:
    """Prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds, for a test")
    parser.add_argument("--out", type=Path, default=results_folder(machine()))
    args = parser.parse_args()
    rounds, n = (3, 20) if args.quick else (15, 200)
    rows = [row for size in RANKS for row in measured(size, SHAPES, rounds, n)]
    line = "{:>6} {:>10} {:>7} {:>9} {:>9} {:>9} {:>11} {:>9} {:>7}"
    print(f"µs a call, float32, medians of {rounds} rounds in turn, gloo\n")
    print(
        line.format(
            *("ranks", "N × F", "bytes", "together", "added", "rsl_rl", "all-reduce"),
            *("added/it", "faster"),
        )
    )
    for row in rows:
        print(
            line.format(
                row["ranks"],
                f"{row['samples']} × {row['features']}",
                row["bytes"],
                row["together_us"],
                row["added_us"],
                row.get("rsl_rl_us", "–"),
                row["all_reduce_us"],
                row["all_reduces"],
                row.get("times_faster", "–"),
            )
        )
    print(f"\ngoals: added/it ≤ {MOST_ALL_REDUCES}, faster ≥ {FASTER}")
    sizes, features = (GROWTH_RANKS[:2], FEATURES[::2]) if args.quick else (
        GROWTH_RANKS, FEATURES)  # fmt: skip
    growth = [
        row
        for size in sizes
        for row in measured(size, [(64, f) for f in features], rounds // 3, n // 4)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    installed = importlib.util.find_spec("rsl_rl") is not None
    about = {
        "device": machine(),
        "torch": torch.__version__,
        "rsl_rl": importlib.metadata.version("rsl-rl-lib") if installed else None,
        "cores": len(os.sched_getaffinity(0)),
        "goals": {"all_reduces": MOST_ALL_REDUCES, "times_faster": FASTER},
    }
    file = args.out / "ranks.json"
    results = {"about": about, "rows": rows, "growth": growth}
    file.write_text(json.dumps(results, indent=1) + "\n")
    draw(growth, file.with_suffix(".png"))
    print(f"\nwritten to {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
