# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Predicts what an update takes on a GPU: `make model` prints it. No figure was measured.

The plan is the kernels' own (csrc/cuda/plan.cpp, compiled here); the model adds up launches,
bytes, loads that wait for each other, and what blocks need to meet. `make gpu-check` prints
it beside what was measured.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench import goals

ROOT = Path(__file__).resolve().parent.parent

PATHS = ("auto", "cluster", "resident", "two_kernels")
#: The number of a dtype in csrc/dtypes.h, bytes of a value, and of an output.
DTYPES = {
    "float32": (0, 4, 4),
    "float64": (1, 8, 8),
    "float16": (2, 2, 2),
    "bfloat16": (3, 2, 2),
    "uint8": (8, 1, 4),
}
#: Instructions a value to sum and to map, from build/cuda-sass.txt (sm_90).
INSTRUCTIONS = {
    "float32": (8.0, 6.6),
    "float64": (14.0, 11.6),
    "float16": (8.0, 5.9),
    "bfloat16": (8.0, 5.9),
    "uint8": (9.0, 7.3),
}


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU; microseconds, and bytes a microsecond."""

    name: str
    processors: int
    shared: int  # bytes of shared memory that a block may have
    clusters: tuple[int, int, int]  # of 2, 4 and 8 blocks with all of it, at once
    copy: float  # what copy_ reaches, read and written together
    cache: float  # bandwidth of the L2 cache
    kept: float  # bytes that a second pass finds in it
    clock: float  # cycles a microsecond
    launch: float = 2.2  # of a kernel in a graph, with its end
    first: float = 0.8  # until the first byte of the memory is there
    near: float = 0.3  # the same for the L2 cache
    gap: float = 1.5  # between two kernels


#: Processors, shared memory, cache and peak bandwidth are NVIDIA's (data sheets of H200,
#: A100 80 GB, L40S, B200; whitepaper of the Ada architecture for RTX 4090; "Technical
#: Specifications per Compute Capability" in the CUDA C++ Programming Guide). copy_ is taken
#: to reach 90 % of the peak, the cache to serve a third more than the memory of an H200,
#: and a second pass to find 60 % of its size.
GPUS = (
    Gpu("H200", 132, 232448, (66, 32, 15), 4.3e6, 5.5e6, 28e6, 1760),
    Gpu("A100", 108, 166912, (0, 0, 0), 1.83e6, 4.0e6, 24e6, 1410),
    Gpu("L40S", 142, 101376, (0, 0, 0), 0.78e6, 4.0e6, 58e6, 2520),
    Gpu("RTX 4090", 128, 101376, (0, 0, 0), 0.91e6, 4.0e6, 43e6, 2520),
    Gpu("B200", 148, 232448, (74, 36, 16), 7.2e6, 9.0e6, 75e6, 1850),
)
H200 = GPUS[0]

COMBINE = 0.5  # within a block
FOLD = 0.5  # moments of a slab in double
BARRIER = 1.0  # fence, addition, poll: all blocks of a slab
CLUSTER = 0.4
#: Loads of partial sums that a thread has under way.
AT_ONCE = {"cluster": 8, "resident": 8, "two_kernels": 16}
STATE = 40  # bytes of a feature's state: sum, ssq, var, missing, left out
FLIGHT = 64e3  # bytes that a processor can have under way
#: Values that a thread has under way where a key has no vectors, to sum and to map (of eight
#: bytes: as many as to map), and blocks on a processor (kSumBlocks and kMapBlocks in plan.h).
SINGLE = (16, 8)
BLOCKS = (2, 3)


@dataclass(frozen=True)
class Prediction:
    """An update of one key, in a CUDA graph, with inputs that no cache holds."""

    path: str
    blocks: int
    cluster: int
    megabytes: float  # to and from the memory
    state: float  # of them, the statistics'
    microseconds: float
    copy: float

    @property
    def ratio(self) -> float:
        """Times copy_."""
        return self.microseconds / self.copy


def planner() -> Path:
    """Compiles the planner."""
    target = ROOT / "build" / "plan"
    sources = [ROOT / "bench" / "plan.cpp", ROOT / "csrc" / "cuda" / "plan.cpp"]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    newest = max(path.stat().st_mtime for path in (*sources, *headers))
    if not target.exists() or target.stat().st_mtime < newest:
        target.parent.mkdir(exist_ok=True)
        compiler = shutil.which("c++") or shutil.which("g++") or "c++"
        # Beside it, and then in its place: another process may be running it.
        made = target.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++17", "-O1", *map(str, sources), "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(target)
    return target


def plan_of(
    gpu: Gpu, samples: int, features: int, dtype: str, path: str = "auto"
) -> dict[str, int]:
    """How the kernels would be started: what plan.cpp prints."""
    limits = (gpu.processors, gpu.shared, *gpu.clusters, 1)
    key = (PATHS.index(path), samples, features, DTYPES[dtype][0], 0)
    line = " ".join(map(str, limits + key))
    out = subprocess.run(
        [planner()], input=line, capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in (p.split("=") for p in out.split())}


def _flight(plan: dict[str, int], size: int, maps: bool) -> float:
    """Bytes that a processor has under way of a key whose values have ``size`` bytes."""
    if plan["sums_vector"] > 1:
        return FLIGHT
    at_once = SINGLE[maps or size == 8]
    fused = PATHS[plan["path"]] != "two_kernels"
    blocks = 1 if fused else BLOCKS[maps]
    return min(FLIGHT, blocks * plan["threads"] * at_once * size)


def _stream(
    gpu: Gpu, size: float, blocks: int, per: float, values: float, flight: float
) -> float:
    """Microseconds to move ``size`` bytes, ``per`` instructions a value, with blocks."""
    processors = min(blocks, gpu.processors)
    memory = size / gpu.copy
    # A processor takes in what it has under way once in a latency.
    alone = size / processors / (flight / gpu.first)
    issue = values * per / 32 / 4 / processors / gpu.clock
    return max(memory, alone, issue)


def predict(
    samples: int,
    features: int,
    dtype: str = "float32",
    gpu: Gpu = H200,
    path: str = "auto",
) -> Prediction | None:
    """What an update takes; None where the path cannot run it."""
    plan = plan_of(gpu, samples, features, dtype, path)
    taken = PATHS[plan["path"]]
    if path not in ("auto", taken):
        return None
    _, size, out = DTYPES[dtype]
    values = samples * features
    x, y, state = values * size, values * out, features * STATE
    to_sum, to_map = INSTRUCTIONS[dtype]
    blocks = plan["sums_slabs"] * plan["sums_chunks"]
    chunks = plan["sums_chunks"]
    waves = math.ceil(blocks / gpu.processors)

    # What one thread of a block adds up of the others' sums.
    width = 1
    while width < min(3 * plan["sums_features"] + 1, plan["threads"]):
        width *= 2
    rounds = math.ceil((3 * plan["sums_features"] + 1) / width)
    each = math.ceil(chunks * width / plan["threads"])
    steps = rounds * math.ceil(each / AT_ONCE[taken])
    meet = 0.0
    if chunks > 1:
        one = 0.15 if taken == "cluster" else gpu.near
        meet = (CLUSTER if taken == "cluster" else BARRIER) + steps * one
        if taken == "resident":
            partials = blocks * chunks * (3 * plan["sums_features"] + 1) * 8
            meet += partials / gpu.cache

    flight = [_flight(plan, size, maps) for maps in (False, True)]
    reading = _stream(gpu, x, blocks, to_sum, values, flight[0])
    first = gpu.launch + gpu.first + reading
    middle = COMBINE + meet + FOLD
    if taken == "two_kernels":
        again = max(x - gpu.kept, 0)
        near = (x - again) / gpu.cache
        maps = plan["maps_slabs"] * plan["maps_chunks"]
        second = near + _stream(gpu, again + y, maps, to_map, values, flight[1])
        total = first + middle + state / gpu.copy + gpu.gap + gpu.near + second
    else:
        room = plan["threads"] * plan["vector_bytes"] * (plan["held"] + plan["slots"])
        kept = 0 if plan["sums_vector"] == 1 else min(x, room * blocks)
        again = max(x - kept - gpu.kept, 0)
        near = (x - kept - again) / gpu.cache
        second = near + _stream(gpu, again + y, blocks, to_map, values, flight[1])
        # Blocks with a slab alone come in waves, each with its own start.
        extra = (waves - 1) * (gpu.first + COMBINE + FOLD)
        total = first + middle + second + 2 * state / gpu.copy + extra
    copied = gpu.launch + 0.5 + (x + y) / gpu.copy
    moved = (x + again + y + 2 * state) / 1e6
    return Prediction(
        taken, blocks, plan["cluster"], moved, 2 * state / 1e6, total, copied
    )


#: Few rows of many features, and images: no goals, but sizes that people have.
WIDE = [
    (n, 28224, dtype) for dtype in ("float32", "uint8") for n in (1, 8, 64, 256, 4096)
]
ODD = [(4096, 17, "float32"), (65536, 17, "float32"), (16384, 64, "float32")]
#: Rows that no vectors fit.
ODD += [(n, 257, dtype) for dtype in ("float32", "bfloat16") for n in (4096, 65536)]


def table(gpu: Gpu) -> list[list[str]]:
    """A row for each size: how it runs, what it takes, and what other paths would."""
    halves = [(65536, 256, "float16"), (65536, 256, "bfloat16")]
    sizes = [(n, f, "float32") for n, f in (*goals.CUDA_SMALL, *goals.CUDA)]
    rows = []
    for n, f, dtype in [*sizes, *halves, *ODD, *WIDE]:
        p = predict(n, f, dtype, gpu)
        assert p is not None
        goal = goals.CUDA.get((n, f), (None,))[0] if gpu is H200 else None
        if goal is not None and dtype != "float32":
            goal *= goals.HALF
        others = []
        for path in PATHS[1:]:
            other = predict(n, f, dtype, gpu, path) if path != p.path else None
            if other is not None:
                others.append(f"{path} {other.microseconds:.1f}")
        how = p.path + (f" of {p.cluster}" if p.path == "cluster" else "")
        rows.append(
            [
                f"{n} × {f} {dtype}",
                how,
                str(p.blocks),
                f"{p.megabytes:.2f}",
                f"{p.state / p.megabytes:.0%}",
                f"{p.microseconds:.1f}",
                f"{p.copy:.1f}",
                f"{p.ratio:.2f}",
                "" if goal is None else f"{goal:.2f}",
                ", ".join(others),
            ]
        )
    return rows


HEAD = [
    "size",
    "path",
    "blocks",
    "MB",
    "state",
    "µs",
    "copy_",
    "×",
    "goal",
    "other paths, µs",
]


def main(arguments: list[str] | None = None) -> int:
    """Prints the predictions."""
    parser = argparse.ArgumentParser(prog="bench.model", description=__doc__)
    parser.add_argument("--gpu", choices=[g.name for g in GPUS], nargs="+")
    chosen = parser.parse_args(arguments).gpu or [g.name for g in GPUS]
    for gpu in (g for g in GPUS if g.name in chosen):
        rows = [HEAD, *table(gpu)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
        print(f"\n{gpu.name}, predicted by a model, not measured:")
        for row in rows:
            cells = (
                c.ljust(w) if i < 2 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join(cells).rstrip())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
