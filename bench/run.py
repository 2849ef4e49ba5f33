# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Measures the operator and the transform against copy_ and other normalisers.

Speed, growth, accuracy and memory, on the CPU or a CUDA GPU. Tables go to the terminal;
tables, figures and all numbers go to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench import (
    accuracy,
    conditions,
    env,
    goals,
    measure,
    peers,
    race,
    report,
    results_folder,
    shapes,
)
from torchrl_vecnorm import functional as F

Size = tuple[int, int]
M = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long."""

    sizes: tuple[Size, ...]
    samples: tuple[int, ...]  # at F = 64
    features: tuple[int, ...]  # at N = 4096
    pairs: tuple[Size, ...]
    some: tuple[Size, ...]  # for keys, dtypes and threads
    steps: tuple[Size, ...]
    pendulums: tuple[int, ...]
    memory: tuple[Size, ...]
    shapes: tuple[Size, ...]  # beside torchrl's class
    special: tuple[Size, ...]  # and those that calls which are special are timed at
    busy: tuple[Size, ...]
    precision: tuple[tuple[Size, tuple[int, ...]], ...]  # and after how many calls
    calls: int = 1000  # for accuracy
    rounds: int = 7
    seconds: float = 0.05  # a round of one peer at least
    compiled: bool = True  # time code that takes a minute to compile


FULL = Plan(
    sizes=(
        (1, 8),
        (64, 32),
        (4096, 64),
        (4096, 256),
        (65536, 64),
        (65536, 256),
        (M, 64),
    ),
    samples=(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, M),
    features=(1, 4, 16, 64, 256, 1024),
    pairs=((1, 8), (64, 32), (4096, 64)),
    some=((64, 32), (4096, 64), (4096, 256)),
    steps=((1, 8), (64, 32), (4096, 64)),
    pendulums=(4096, 16384, 65536),
    memory=((4096, 64), (64, 28224), (65536, 256)),
    shapes=tuple(race.sizes()),
    special=((1, 8), (64, 64), (4096, 64), (1, 28224), (8, 28224), (64, 28224)),
    busy=((1024, 64), (4096, 64), (8, 28224)),
    precision=(
        ((1, 8), (1, 20, 10_000)),
        ((64, 8), (1, 20, 10_000)),
        ((4096, 8), (1, 20)),
        ((M, 1), (1, 20)),
    ),
)
QUICK = replace(
    FULL,
    samples=(1, 64, 4096, 65536),
    features=(1, 16, 256),
    some=((4096, 64),),
    steps=((1, 8),),
    shapes=((1, 8), (8, 376), (1, 28224)),
    special=((1, 28224),),
    busy=((4096, 64),),
    precision=(((1, 8), (1, 20)), ((4096, 8), (1,))),
    calls=100,
    rounds=3,
    seconds=0.01,
    compiled=False,
)


def on_cuda(plan: Plan) -> Plan:
    """A GPU has the size that no CPU has time for, and goals for halves."""
    return replace(
        plan,
        sizes=(*plan.sizes, (M, 256)),
        pairs=(*plan.sizes, (M, 256)),
        some=(*(size for size in plan.sizes if size[0] >= 4096), (M, 256)),
        memory=(*plan.memory, (M, 256)),
    )


# ------------------------------------------------------------------- measurements


def timed(
    plan: Plan,
    section: str,
    shapes: list[Size],
    device: str,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    who: list[peers.Peer] | None = None,
    graphs_suffice: bool = False,
) -> list[dict]:
    """The time of each peer on one key for each shape.

    On a GPU both by the host's clock and in graphs, unless ``graphs_suffice``.
    """
    threads = threads or torch.get_num_threads()
    record = {
        "section": section,
        "samples": shapes[0][0],
        "features": shapes[0][1],
        "keys": len(shapes),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }
    who = peers.PEERS if who is None else who
    if not plan.compiled or section != "main":
        who = [peer for peer in who if peer.name != peers.COMPILED_V2]
    xs = [measure.random(*shape, dtype, device) for shape in shapes]
    ys = [torch.empty_like(x) for x in xs]
    runs, reasons = measure.start(who, xs, ys)
    records = []
    if device != "cuda" or not graphs_suffice:
        calls = {name: run.call for name, run in runs.items()}
        times = measure.eager(calls, plan.rounds, plan.seconds, threads)
        records += _records({**record, "method": "eager"}, times, reasons)
    if device == "cuda" and len(shapes) == 1:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        sets = measure.buffer_sets(2 * xs[0].nbytes, cache)
        more = [measure.random(*shapes[0], dtype, device) for _ in range(sets)]
        outs = [torch.empty_like(x) for x in more]
        times, more_reasons = measure.replayed(
            runs, more, outs, 3 * plan.rounds, plan.seconds / 5
        )
        record |= {"method": "graph", "buffers": sets}
        records += _records(record, times, reasons | more_reasons)
    return records


def _records(
    record: dict, times: dict[str, list[float]], reasons: dict[str, str]
) -> list[dict]:
    good = [
        {**record, "name": n, "microseconds": measure.median(t), "rounds": t}
        for n, t in times.items()
    ]
    bad = [{**record, "name": n, "reason": why} for n, why in reasons.items()]
    return good + bad


def env_step(plan: Plan, n: int, features: int, device: str) -> list[dict]:
    """The time of a whole step with each transform."""
    calls, reasons = env.steps(n, features, device)
    threads = torch.get_num_threads()
    times = measure.eager(calls, plan.rounds, plan.seconds, threads)
    record = {
        "section": "step",
        "samples": n,
        "features": features,
        "keys": 2,
        "dtype": "float32",
        "threads": threads,
        "method": "eager",
    }
    return _records(record, times, reasons)


def whole_step(plan: Plan, n: int, how: str) -> list[dict]:
    """The time of `step_and_maybe_reset` with each VecNormV2, eager or compiled."""
    calls, reasons = env.whole_steps(n, how)
    threads = torch.get_num_threads()
    record = {"section": "whole step", "samples": n, "features": 3, "threads": threads}
    times = measure.eager(calls, plan.rounds, plan.seconds, threads)
    return _records({**record, "method": how}, times, reasons)


def pendulum(plan: Plan, n: int, device: str) -> list[dict]:
    """The time of a step of n pendulums with each transform."""
    calls, reasons = env.pendulums(n, device)
    threads = torch.get_num_threads()
    record = {"section": "pendulum", "samples": n, "features": 3, "threads": threads}
    times = measure.eager(calls, plan.rounds, plan.seconds, threads)
    records = _records({**record, "method": "eager"}, times, reasons)
    if device == "cuda":
        if calls.pop(peers.TORCHRL_V2, None):
            reasons[peers.TORCHRL_V2] = measure.NO_GRAPH
        graphs = {name: lambda call=call: [call] for name, call in calls.items()}
        times, failed = measure.graphs(graphs, plan.rounds, plan.seconds)
        records += _records({**record, "method": "graph"}, times, reasons | failed)
    return records


def shape(plan: Plan, n: int, features: int, kind: str) -> list[dict]:
    """The time of a call of our transform and of torchrl's at one shape."""
    calls, reasons = shapes.calls(n, features, kind)
    threads = torch.get_num_threads()
    times = measure.eager(calls, plan.rounds, plan.seconds, threads)
    record = {
        "section": "shapes",
        "samples": n,
        "features": features,
        "kind": kind,
        "threads": threads,
    }
    return _records(record, times, reasons)


def paths(plan: Plan, n: int, features: int) -> list[dict]:
    """The operator's time on each of its CUDA kernels."""
    records = []
    who = peers.select(peers.COPY, peers.OPERATOR)
    for path in measure.PATHS:
        with measure.cuda_path(path):
            found = timed(
                plan, "paths", [(n, features)], "cuda", who=who, graphs_suffice=True
            )
            ran = measure.last_path()
        records += [{**r, "path": path, "ran": ran} for r in found]
    return records


def peak_memory(n: int, features: int, device: str) -> list[dict]:
    """What a call allocates, in sizes of x."""
    x = measure.random(n, features, torch.float32, device)
    ys = [torch.empty_like(x)]
    records = []
    for peer in peers.without(peers.FORWARD, peers.STEP, peers.COMPILED_V2):
        record = {"section": "memory", "samples": n, "features": features}
        record["name"] = peer.name
        try:
            peak = measure.peak_memory(peer.make([x], ys).call, device)
            record |= {"bytes": peak, "of_x": peak / x.nbytes}
        except Exception as error:
            record["reason"] = peers.reason(error)
        records.append(record)
    return records


def errors(peer: peers.Peer, ratio: float, calls: int, device: str) -> list[dict]:
    """The error of one peer at one ratio of mean to deviation."""
    record = {"section": "accuracy", "name": peer.name, "ratio": ratio}
    try:
        found = accuracy.errors(peer.make, peer.formula, ratio, calls, device)
    except Exception as error:
        return [{**record, "reason": peers.reason(error)}]
    return [{**record, "calls": k, **values} for k, values in found.items()]


def precision(
    dtype: torch.dtype, ratio: float, size: Size, calls: tuple[int, ...], device: str
) -> list[dict]:
    """The error of ours and of torchrl's, with each decay."""
    record = {
        "section": "precision",
        "samples": size[0],
        "features": size[1],
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": ratio,
    }
    makes = {}
    for decay in goals.DECAYS:
        formula = peers.decayed(decay)
        makes[peers.OPERATOR, decay] = partial(peers.operator, decay=decay), formula
        makes[peers.TORCHRL, decay] = partial(peers.torchrl, decay=decay), formula
    try:
        found = accuracy.precision(makes, dtype, ratio, size, calls, device)
    except ValueError as error:  # not of data that this dtype can hold
        return [
            {**record, "name": name, "calls": k, "reason": str(error)}
            for name in dict.fromkeys(name for name, _ in makes)
            for k in calls
        ]
    records = []
    for (name, decay), errors in found.items():
        more = {**record, "name": name, "decay": decay}
        if isinstance(errors, Exception):
            why = peers.reason(errors)
            records += [{**more, "calls": k, "reason": why} for k in calls]
        else:
            records += [{**more, "calls": k, **e} for k, e in errors.items()]
    return records


TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


def correct(
    n: int, features: int, dtype: torch.dtype, path: str, device: str
) -> list[dict]:
    """Two updates on fresh data, against plain torch in float64.

    The outputs hold NaN before: an element that is not written shows.
    """
    state = F.Moments.zeros([features], device=device)
    total = squares = count = 0.0
    with measure.cuda_path(path):
        for _ in range(2):
            x = measure.random(n, features, dtype, device)
            y = torch.full_like(x, torch.nan)
            F.update_(x, state, decay=peers.DECAY, eps=peers.EPS, out=y)
            exact = x.double()
            total = peers.DECAY * total + exact.sum(0)
            squares = peers.DECAY * squares + exact.square().sum(0)
            count = peers.DECAY * count + n
        ran = measure.last_path()
    loc = total / count
    scale = (squares / count - loc**2).clamp_min(0).sqrt().clamp_min(peers.EPS)
    want = exact.sub_(loc).div_(scale)
    limit = TOLERANCE[dtype]
    error = ((y.double() - want).abs_() / want.abs_().add_(1)).max().item()
    moments = max(
        ((a - b).abs() / b.abs().clamp_min(1)).max().item()
        for a, b in [(state.sum, total), (state.ssq, squares)]
    )
    return [
        {
            "section": "correctness",
            "samples": n,
            "features": features,
            "dtype": str(dtype).removeprefix("torch."),
            "path": path,
            "ran": ran,
            "error": error,
            "moments": moments,
            "tolerance": limit,
            # NaN is not below anything. The moments are what the tests allow: kernels
            # add up a few samples in float32 before they go to float64.
            "passed": error <= limit and moments <= 1e-5,
        }
    ]


# -------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """Something to measure."""

    section: str
    label: str
    measure: Callable[[], list[dict]]

    def run(self) -> list[dict]:
        """The records; one that says why, if there are none."""
        try:
            return self.measure()
        except Exception as error:  # out of memory, say: the rest still counts
            why = peers.reason(error)
            record = {"section": self.section, "label": self.label, "reason": why}
            if self.section == "correctness":
                record["passed"] = False
            return [record]
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def tasks(plan: Plan, device: str) -> list[Task]:
    """Everything, what matters most first."""
    found = []

    def add(section: str, label: str, function: Callable, *args, **kwargs) -> None:
        found.append(Task(section, label, lambda: function(*args, **kwargs)))

    which = measure.PATHS if device == "cuda" and measure.has_paths() else ("auto",)
    for n, f in plan.sizes:
        for dtype in TOLERANCE:
            for path in which:
                label = f"{n} × {f} {dtype} {path}"
                add("correctness", label, correct, n, f, dtype, path, device)
    one_key = peers.without(peers.FORWARD, peers.STEP)
    for n, f in plan.sizes:
        add("main", f"{n} × {f}", timed, plan, "main", [(n, f)], device, who=one_key)
    usual = peers.select(
        peers.COPY, peers.OPERATOR, peers.TRANSFORM, peers.TORCHRL, peers.BATCH_NORM
    )
    transforms = peers.select(
        peers.TRANSFORM,
        peers.FORWARD,
        peers.STEP,
        peers.OURS_V2,
        peers.TORCHRL,
        peers.TORCHRL_V2,
    )
    for n, f in plan.pairs:
        pair = [(n, f), (n, 1)]
        add("pair", f"{n} × {f}", timed, plan, "pair", pair, device, who=transforms)
    if device == "cpu":
        for n, f in plan.shapes:
            add("shapes", f"{n} × {f}", shape, plan, n, f, shapes.UPDATE)
        for kind in shapes.SPECIAL:
            for n, f in plan.special:
                add("shapes", f"{n} × {f}, {kind}", shape, plan, n, f, kind)
        for n, f in plan.busy:
            add("busy", f"{n} × {f}", conditions.under_load, n, f, plan.rounds)
        add("cold", "three keys", conditions.cold, plan.rounds)
        add("cold", "a simulation", conditions.in_an_environment, plan.rounds)
    for n, f in plan.steps:
        add("step", f"{n} × {f}", env_step, plan, n, f, device)
    if device == "cpu":
        for how in (env.EAGER, env.COMPILED) if plan.compiled else (env.EAGER,):
            for n, _ in plan.steps:
                add("whole step", f"{n}, {how}", whole_step, plan, n, how)
    for n in plan.pendulums:
        add("pendulum", f"{n}", pendulum, plan, n, device)
    if len(which) > 1:
        for n, f in plan.sizes:
            add("paths", f"{n} × {f}", paths, plan, n, f)
    for n, f in plan.some:
        for dtype in TOLERANCE:
            label = f"{n} × {f} {dtype}"
            kwargs = {"dtype": dtype, "who": usual, "graphs_suffice": True}
            add("dtypes", label, timed, plan, "dtypes", [(n, f)], device, **kwargs)
    for n, f in plan.memory:
        add("memory", f"{n} × {f}", peak_memory, n, f, device)
    for peer in peers.PEERS:
        if peer.formula is not None and (
            plan.compiled or peer.name != peers.COMPILED_V2
        ):
            for ratio in (1, 1e3, 1e5):
                label = f"{peer.name} {ratio:g}"
                add("accuracy", label, errors, peer, ratio, plan.calls, device)
    for dtype in TOLERANCE:
        for ratio in (1, 1e3, 1e5):
            for size, calls in plan.precision:
                label = f"{dtype} {ratio:g} {size[0]}"
                add("precision", label, precision, dtype, ratio, size, calls, device)
    for n, f in plan.some[:2]:
        for keys in (1, 8):
            label, each = f"{keys} × {n} × {f}", [(n, f)] * keys
            add("keys", label, timed, plan, "keys", each, device, who=usual)
    every = torch.get_num_threads()
    if device == "cpu" and every > 1:
        for n, f in plan.some:
            for threads in (1, every):
                kwargs = {"threads": threads, "who": usual}
                label, one = f"{n} × {f}, {threads}", [(n, f)]
                add("threads", label, timed, plan, "threads", one, device, **kwargs)
    short = replace(plan, rounds=min(plan.rounds, 3))
    sweeps = [("samples", (n, 64)) for n in plan.samples]
    sweeps += [("features", (4096, f)) for f in plan.features]
    for section, (n, f) in sweeps:
        add(section, f"{n} × {f}", timed, short, section, [(n, f)], device, who=one_key)
    return found


def run(plan: Plan, device: str, folder: Path, only: Sequence[str] = ()) -> list[dict]:
    """Measures everything and writes it into a folder, as it goes.

    ``only`` some sections are measured anew, in this order, beside what the folder has
    of the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = report.about(device)
    records: list[dict] = []
    numbers = folder / "results.json"
    if only and numbers.exists():
        before = json.loads(numbers.read_text())
        records = [r for r in before["records"] if r["section"] not in only]
        again = f"{about['date']}, commit {about['commit']}"
        about = {**before["about"], f"{', '.join(only)} measured": again}
    if device == "cpu" and os.getloadavg()[0] > 0.5:
        busy = (
            "other programs are running: threads that wait for each other will show it"
        )
        print(busy, file=sys.stderr)
    gc.freeze()  # modules are here to stay: collections need not look at them
    begin = time.perf_counter()
    todo = tasks(plan, device)
    if only:
        todo = [t for section in only for t in todo if t.section == section]
    with tqdm(todo, unit="task") as bar:
        for i, task in enumerate(bar):
            bar.set_description(f"{task.section}: {task.label}")
            records += task.run()
            last = i + 1 == len(todo) or todo[i + 1].section != task.section
            if last:  # what a run that is cut short leaves behind
                report.write_numbers(folder, about, records)
    if not only:
        about["minutes"] = round((time.perf_counter() - begin) / 60, 1)
    report.write_numbers(folder, about, records)
    report.write(folder, about, records, device)
    return records


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a result was wrong, whatever the speed."""
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a couple of minutes")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=dict.fromkeys(
            t.section for device in ("cpu", "cuda") for t in tasks(FULL, device)
        ),
        help="some sections, beside what the folder has of the others; with precision, "
        "the project's README gets its table",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="the GPU if there is one, by default",
    )
    parser.add_argument("--out", type=Path, help="the folder to write to")
    parser.add_argument(
        "--against",
        type=Path,
        help="the folder of another checkout that was built (make build): races this build "
        "against that one, call by call, and measures nothing else",
    )
    args = parser.parse_args(arguments)

    # skrl and gymnasium say hello, torchrl deprecates what it is compared by.
    warnings.simplefilter("ignore")
    os.environ.setdefault("RL_WARNINGS", "0")
    plan = QUICK if args.quick else FULL
    if args.against is not None:
        print(race.show(race.race(args.against, plan.rounds, plan.seconds)))
        return 0
    if args.device == "cuda":
        plan = on_cuda(plan)
    folder = args.out or results_folder(report.device_name(args.device))
    records = run(plan, args.device, folder, args.only)
    if args.only == ["precision"] and args.out is None and not args.quick:
        text = report.readme(report.README.read_text(), records, folder.name)
        report.README.write_text(text)
    report.show(records, args.device)
    print(f"\nwritten to {folder}")
    wrong = [r for r in records if r["section"] == "correctness" and not r["passed"]]
    for record in wrong:
        print("WRONG:", record, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
