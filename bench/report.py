# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Turns records into tables, on the terminal and in Markdown, figures and files.

A record is a flat dict, one for each number, with the section that it belongs to and
either what was measured or the reason why nothing was.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable
from tabulate import tabulate

import torchrl_vecnorm
from bench import conditions, env, goals, machine, measure, peers, shapes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOTHING = "–"


@dataclass
class Table:
    """A table with a heading, and what a reader has to know of it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """For the report."""
        align = ["left"] + ["right"] * (len(self.header) - 1)
        body = tabulate(
            self.rows,
            self.header,
            tablefmt="github",
            colalign=align if self.rows else None,
            disable_numparse=True,
        )
        return f"## {self.title}\n\n{body}\n" + (
            f"\n{self.note}\n" if self.note else ""
        )

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=self.title, caption=self.note or None)
        for i, name in enumerate(self.header):
            justify = "right" if i else "left"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


# --------------------------------------------------------------------- the machine


def device_name(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return machine()


def output_of(*command: str) -> str | None:
    """What a program prints, if it is there and works."""
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() or None if run.returncode == 0 else None


def about(device: str) -> dict[str, str | int | None]:
    """The machine, and the version of everything that matters."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    found = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "torchrl_vecnorm": torchrl_vecnorm.__version__,
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        **{p.package: version(p.package) for p in peers.PEERS if p.package},
    }
    found["torch"] = torch.__version__
    if device == "cpu":
        found["threads"] = torch.get_num_threads()
        found["load before"] = round(os.getloadavg()[0], 2)
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        return found
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    release = re.search(r"release (\S+),", output_of("nvcc", "--version") or "")
    found |= {
        "CUDA of torch": torch.version.cuda,
        "nvcc": release.group(1) if release else None,
        "driver": output_of(*query),
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
    }
    return found


# ---------------------------------------------------------------------- the tables


def number(value: float | None, digits: int = 3) -> str:
    """Some digits of a number, without an exponent where that is readable."""
    if value is None:
        return NOTHING
    if value != value:
        return "NaN"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - _magnitude(value))
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def _magnitude(value: float) -> int:
    return int(f"{abs(value):e}".split("e")[1])


def _size(record: dict) -> str:
    return f"{record['samples']} × {record['features']}"


def _of(records: list[dict], section: str, **wanted) -> list[dict]:
    wanted["section"] = section
    return [r for r in records if all(r.get(k) == v for k, v in wanted.items())]


def _values(records: list[dict], key) -> list:
    """Each value once, in the order in which they come."""
    return list(dict.fromkeys(key(r) for r in records))


def _reasons(records: list[dict]) -> str:
    """Who is missing and why, and where if not everywhere."""
    missing: dict[tuple[str, str], list[str]] = {}
    columns = {_size(r) for r in records if "samples" in r}
    for record in records:
        if "reason" in record:
            who = record.get("name") or record.get("label", "")
            where = missing.setdefault((who, record["reason"]), [])
            if "samples" in record and _size(record) not in where:
                where.append(_size(record))
    lines = []
    for (who, why), at in missing.items():
        where = f" at {', '.join(at)}" if 0 < len(at) < len(columns) else ""
        lines.append(f"- {who}{where}: {why}")
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def _notes(*notes: str) -> str:
    return "\n\n".join(note for note in notes if note)


def _grid(records: list[dict], column, cell) -> tuple[list[str], list[list[str]]]:
    """One row a name; a cell takes the records of its column, and its own."""
    columns = _values([r for r in records if "name" in r], column)
    by_place = {(r["name"], column(r)): r for r in records if "name" in r}
    rows = []
    for name in dict.fromkeys(name for name, _ in by_place):
        row = [name]
        for c in columns:
            others = {n: r for (n, k), r in by_place.items() if k == c}
            mine = by_place.get((name, c))
            row.append(NOTHING if mine is None else cell(mine, others))
        rows.append(row)
    return ["", *columns], rows


def _us(records: dict[str, dict], name: str) -> float | None:
    return records.get(name, {}).get("microseconds")


def _times_copy(mine: dict, others: dict) -> str:
    us, floor = mine.get("microseconds"), _us(others, peers.COPY)
    if us is None or floor is None or mine["name"] == peers.COPY:
        return number(us)
    return f"{number(us)} ({us / floor:.2f})"


def _faster(ours: str):
    def cell(mine: dict, others: dict) -> str:
        us, base = mine.get("microseconds"), _us(others, ours)
        return NOTHING if us is None or base is None else f"{number(us / base)} ×"

    return cell


def _faster_than(ours: str, records: list[dict], where: str = "") -> Table:
    header, rows = _grid(records, _size, _faster(ours))
    rows = [row for row in rows if row[0] != ours]
    return Table(f"How much faster {ours} is{where} than", header, rows)


def _timed(title: str, records: list[dict], column=_size, note: str = "") -> Table:
    header, rows = _grid(records, column, _times_copy)
    header[0] = "µs (× copy_)"
    return Table(title, header, rows, _notes(note, _reasons(records)))


def _goals(records: list[dict], device: str) -> Table:
    rows = [
        [
            goal.what,
            f"{'≥' if goal.at_least else '≤'} {goal.limit:.3g}",
            number(goal.value),
            goal.verdict,
        ]
        for goal in goals.evaluate(records, device)
    ]
    note = "The goals were set for an H200." if device == "cuda" else ""
    return Table("Goals", ["", "goal", "measured", ""], rows, note)


def _main(records: list[dict], device: str) -> list[Table]:
    tables = []
    eager = _of(records, "main", method="eager")
    graph = _of(records, "main", method="graph")
    if graph:
        note = (
            "Calls in a CUDA graph, timed by events, over buffers that outgrow the L2 "
            f"cache {measure.CACHES} times; small sizes rotate {measure.MOST_BUFFERS} "
            "pairs and stay in it."
        )
        tables.append(_timed("Time on the GPU", graph, note=note))
    if eager:
        note = (
            "Medians, float32, one key. `copy_` reads x and writes y, which is the "
            "floor. It and `update_` write where they are told (`out=`); all others "
            "allocate their result at each call, and from 32 MB on the page faults of "
            "fresh memory cost the CPU more than the arithmetic does. numpy code runs "
            "on one thread."
            if device == "cpu"
            else "Medians by the host's clock, float32, one key. What is small costs "
            "launches, not work."
        )
        tables.append(_timed("Time of a call", eager, note=note))
        for ours in (peers.OPERATOR, peers.TRANSFORM):
            others = [p.name for p in peers.PEERS if p.package] + [ours]
            some = [r for r in eager if r["name"] in others]
            tables.append(_faster_than(ours, some))
    return tables


def _shapes(records: list[dict]) -> list[Table]:
    """How often torchrl's time ours goes into: by shape, then by kind of call."""

    def cell(n: int, f: int, kind: str) -> str:
        here = [r for r in records if (r["samples"], r["features"]) == (n, f)]
        times = {r["name"]: r for r in here if r["kind"] == kind}
        ours, theirs = _us(times, peers.TRANSFORM), _us(times, peers.TORCHRL)
        if ours is None:
            return NOTHING
        if theirs is None:
            return f"{number(ours)} µs"
        return f"{number(theirs / ours)} ({number(ours)} µs)"

    updates = [r for r in records if r["kind"] == shapes.UPDATE]
    samples = sorted({r["samples"] for r in updates})
    rows = [
        [f"F = {f}", *(cell(n, f, shapes.UPDATE) for n in samples)]
        for f in sorted({r["features"] for r in updates})
    ]
    found = [
        Table(
            "VecNorm._call at every shape",
            ["torchrl's / ours (ours)", *(f"N = {n}" for n in samples)],
            rows,
            "float32, one key, new values at each call. 28,224 features are pixels "
            "[4, 84, 84].",
        )
    ]
    special = [r for r in records if r["kind"] != shapes.UPDATE]
    if special:
        at = _values(special, lambda r: (r["samples"], r["features"]))
        kinds = _values(special, lambda r: r["kind"])
        found.append(
            Table(
                "Calls that are special",
                ["torchrl's / ours (ours)", *(f"{n} × {f}" for n, f in at)],
                [[kind, *(cell(n, f, kind) for n, f in at)] for kind in kinds],
                _notes(
                    "A partial reset counts half of the rows here; torchrl's counts all.",
                    _reasons(special),
                ),
            )
        )
    return found


def _busy(records: list[dict]) -> Table:
    """Means beside busy processes, in medians of the quiet machine."""
    at = _values(records, _size)
    rows = []
    for processes in conditions.BUSY:
        row = [str(processes)]
        for size in at:
            for name in (peers.OPERATOR, peers.COPY):
                (r,) = (
                    r
                    for r in records
                    if (r["processes"], _size(r), r["name"]) == (processes, size, name)
                )
                us = r["microseconds"]
                row.append(f"{number(us / r['quiet'])} ({number(us)} µs)")
        rows.append(row)
    header = [f"{size} {name}" for size in at for name in ("update_", "copy_")]
    return Table(
        "On a busy machine",
        ["other processes", *header],
        rows,
        f"Mean of {conditions.CALLS} calls beside processes that do nothing but run, in "
        "medians of a quiet machine.",
    )


def _cold(records: list[dict]) -> Table:
    rows = [
        [
            f"{r['name']}, {r['between']}",
            number(r["warm"]),
            number(r["microseconds"]),
        ]
        for r in records
        if "name" in r
    ]
    return Table(
        "Cold calls",
        ["", "µs warm", "µs cold"],
        rows,
        "Medians. Other work goes over 160 MB between two calls, for three keys of 64 "
        "worlds; or a simulation is reset and makes one step, for its observation and "
        "reward. `copy_` copies one key.",
    )


def _paths(records: list[dict]) -> Table:
    found = _of(records, "paths", method="graph") or _of(records, "paths")
    named = [
        {**r, "name": f"{r['path']}" if r["name"] != peers.COPY else peers.COPY}
        for r in found
        if "name" in r
    ]

    def cell(mine: dict, others: dict) -> str:
        text = _times_copy(mine, others)
        if mine["name"] == peers.COPY or mine["ran"] == mine["path"]:
            return text
        return f"{text} {mine['ran']}"

    header, rows = _grid(named, _size, cell)
    header[0] = "µs (× copy_)"
    note = "Where a name follows, those kernels ran instead of the ones asked for."
    return Table("CUDA kernels", header, rows, _notes(note, _reasons(found)))


def _steps(records: list[dict]) -> Table:
    def cell(mine: dict, others: dict) -> str:
        us, base = mine.get("microseconds"), _us(others, env.IDENTITY)
        if us is None or base is None or mine["name"] in (env.BARE, env.IDENTITY):
            return number(us)
        return f"{number(us)} (+{number(us - base)})"

    header, rows = _grid(records, _size, cell)
    header[0] = "µs (more than identity)"
    note = (
        "`TransformedEnv.step` of an environment that does nothing, with an observation "
        "[N, F] and a reward [N, 1]."
    )
    return Table("A whole step", header, rows, _notes(note, _reasons(records)))


def _whole_steps(records: list[dict]) -> Table:
    def cell(mine: dict, others: dict) -> str:
        us, base = mine.get("microseconds"), _us(others, env.BARE)
        if us is None or base is None or mine["name"] == env.BARE:
            return number(us)
        return f"{number(us)} (+{number(us - base)})"

    header, rows = _grid(
        records, lambda r: f"{r['samples']} pendulums, {r['method']}", cell
    )
    header[0] = "µs (more than without)"
    note = (
        "`step_and_maybe_reset` of pendulums that reset themselves, with `StepCounter`, "
        "`RewardSum` and a `VecNormV2` of observation [N, 3] and reward [N, 1]; compiled "
        "as one graph."
    )
    return Table("A step and its reset", header, rows, _notes(note, _reasons(records)))


def _per_second(record: dict) -> float:
    """Millions of steps of one environment."""
    return record["samples"] / record["microseconds"]


def _pendulums(records: list[dict]) -> list[Table]:
    def cell(mine: dict, others: dict) -> str:
        bare = others.get(env.BARE, {})
        if "microseconds" not in mine or "microseconds" not in bare:
            return NOTHING
        rate = _per_second(mine)
        return f"{number(rate)} ({rate / _per_second(bare):.0%})"

    found = []
    for method, how in [("eager", ""), ("graph", ", in a CUDA graph")]:
        if some := _of(records, "pendulum", method=method):
            header, rows = _grid(some, lambda r: f"{r['samples']} pendulums", cell)
            header[0] = "million steps a second"
            note = (
                "A random action and `TransformedEnv.step` of N pendulums (Pendulum-v1 in "
                "torch); observation [N, 3] and reward [N, 1] are normalised."
            )
            title = f"Pendulums{how}"
            found.append(Table(title, header, rows, _notes(note, _reasons(some))))
    return found


def _accuracy(records: list[dict]) -> list[Table]:
    def column(r: dict) -> str:
        when = "first call" if r["calls"] == 1 else f"call {r['calls']}"
        return f"mean {r['ratio']:g}, {when}"

    good = [r for r in records if "calls" in r]
    tables = []
    for key, title, note in [
        (
            "rounding",
            "Error of the normalised values: rounding",
            "The largest error of float32 values with deviation 1, in deviations, "
            "against the normaliser's own formula in long double.",
        ),
        (
            "total",
            "Error of the normalised values: all of it",
            "The same against the plain mean and deviation of the data, forgetting as "
            "the normaliser does. What is added to a deviation, samples that were never "
            "drawn and the like show here.",
        ),
        (
            "scale",
            "Error of the scale",
            "Relative, against the normaliser's own formula in long double.",
        ),
    ]:

        def cell(mine: dict, others: dict, key=key) -> str:
            value = mine[key]
            if value is None or value != value:
                return number(value)
            return f"{value:.1e}"

        header, rows = _grid(good, column, cell)
        if key == "scale":
            rows = [row for row in rows if set(row[1:]) != {NOTHING}]
            note += " Of those that tell it."
        tables.append(Table(title, header, rows, _notes(note, _reasons(records))))
    return tables


def precision(records: list[dict], key: str) -> Table:
    """The errors of ours and of torchrl's for each dtype, mean, N and number of calls.

    ``key`` is "scale" or "y".
    """

    def column(r: dict) -> str:
        calls = "1 call" if r["calls"] == 1 else f"{r['calls']:,} calls"
        return f"N = {r['samples']:,}, {calls}"

    def worst(some: list[dict], key: str) -> str:
        values = [r[key] for r in some if key in r]
        if not values:
            return NOTHING
        # max() alone would pass over NaN.
        value = max(values, key=lambda v: (v != v, v))
        return "NaN" if value != value else f"{value:.0e}" if value else "0"

    rows = []
    columns = _values(records, column)
    for dtype, ratio in _values(records, lambda r: (r["dtype"], r["ratio"])):
        row = [f"{dtype}, {ratio:g}"]
        for c in columns:
            here = [
                r
                for r in records
                if (r["dtype"], r["ratio"], column(r)) == (dtype, ratio, c)
            ]
            ours, theirs = (
                [r for r in here if r["name"] == name]
                for name in (peers.OPERATOR, peers.TORCHRL)
            )
            cell = f"{worst(ours, key)} / {worst(theirs, key)}"
            if key == "y" and any("own" in r for r in ours):
                cell += f" ({worst(ours, 'own')})"
            row.append(cell if cell != f"{NOTHING} / {NOTHING}" else NOTHING)
        rows.append(row)
    what = {
        "scale": "Relative error of `scale`",
        "y": "Largest error of y, in deviations (what rounding alone makes of it in "
        "its dtype)",
    }[key]
    decays = ", ".join(f"{d:g}" for d in goals.DECAYS)
    why = _values([r for r in records if "reason" in r], lambda r: r["reason"])
    note = (
        f"{what}: ours / torchrl's VecNorm, the larger of the errors at the decays "
        f"{decays}, against numpy's long double. Values are normal with deviation 1, "
        "rounded to the dtype before; rows are the dtype and mean/std. "
        f"{NOTHING}: {'; '.join(why) if why else 'not measured'}."
    )
    title = f"Precision of {'the scale' if key == 'scale' else 'y'}"
    return Table(title, ["", *columns], rows, note)


#: Where the project's README has the table that is made of a results file.
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- precision: from {} -->\n", "<!-- end of precision -->\n"


def readme(text: str, records: list[dict], folder: str) -> str:
    """The project's README with three lines of precision that records give."""
    records = [r for r in _of(records, "precision") if r["dtype"] == "float32"]

    def worst(name: str, ratio: float) -> str:
        errors = [
            r["scale"]
            for r in records
            if (r["name"], r["ratio"]) == (name, ratio) and "scale" in r
        ]
        return f"{max(errors, key=lambda v: (v != v, v)):.0e}"

    rows = [
        [f"{ratio:,g}", worst(peers.OPERATOR, ratio), worst(peers.TORCHRL, ratio)]
        for ratio in _values(records, lambda r: r["ratio"])
    ]
    table = tabulate(
        rows,
        ["float32, mean/std", "here", "torchrl's `VecNorm`"],
        tablefmt="github",
        colalign=["right"] * 3,
        disable_numparse=True,
    )
    most = f"{max(r['samples'] for r in records):,}"
    calls = f"{max(r['calls'] for r in records):,}"
    note = (
        f"The worst of 1 to {most} samples, 1 to {calls} calls and three decays, against "
        f"numpy's long double; every dtype and size is in [the results](bench/results/"
        f"{folder}/README.md#precision-of-the-scale)."
    )
    block = BEGIN.format(folder) + f"{table}\n\n{note}\n" + END
    pattern = BEGIN.format(".*") + "(?s:.*?)" + END
    text, places = re.subn(pattern, lambda _: block, text)
    if places != 1:
        raise ValueError(f"README.md has {places} places for the table, not one")
    return text


def _memory(records: list[dict]) -> Table:
    def cell(mine: dict, others: dict) -> str:
        of_x = mine.get("of_x")
        return NOTHING if of_x is None else f"{of_x:.2f}"

    header, rows = _grid(records, _size, cell)
    note = (
        "The most that a call has allocated at any time, its result included, in sizes "
        "of x. `update_` with `out=` needs nothing, the transform its output."
    )
    return Table("Memory", header, rows, _notes(note, _reasons(records)))


def _correctness(records: list[dict]) -> Table:
    rows = [
        [
            r["label"] if "label" in r else f"{_size(r)} {r['dtype']} {r['path']}",
            f"{r['error']:.1e}" if "error" in r else NOTHING,
            f"{r['moments']:.1e}" if "moments" in r else NOTHING,
            "right" if r["passed"] else f"WRONG {r.get('reason', '')}".strip(),
        ]
        for r in records
    ]
    wrong = [row for row in rows if row[3] != "right"]
    note = (
        "Two updates on fresh random data against plain torch in float64, outputs full "
        f"of NaN before: {len(rows) - len(wrong)} of {len(rows)} are right. The error "
        "is relative to 1 + |y|."
    )
    worst: dict[str, list[str]] = {}
    for record, row in zip(records, rows, strict=True):
        if "error" in record:
            key = f"{record['dtype']} {record['path']}"
            if key not in worst or float(row[1]) > float(worst[key][1]):
                worst[key] = [f"{key}, worst of all sizes", *row[1:]]
    header = ["", "error of y", "of the moments", ""]
    return Table("Correctness", header, wrong + list(worst.values()), note)


def tables(records: list[dict], device: str) -> list[Table]:
    """Everything there are records for."""
    found = [_goals(records, device), *_main(records, device)]
    if some := _of(records, "paths"):
        found.append(_paths(some))
    if some := _of(records, "pair"):
        note = "Observation [N, F] and reward [N, 1]."
        found.append(_timed("Two keys, as environments have them", some, note=note))
        found.append(_faster_than(peers.TRANSFORM, some, " on two keys"))
    if some := [r for r in _of(records, "shapes") if "name" in r]:
        found += _shapes(some)
    if some := [r for r in _of(records, "busy") if "name" in r]:
        found.append(_busy(some))
    if some := [r for r in _of(records, "cold") if "name" in r]:
        found.append(_cold(some))
    if some := _of(records, "step"):
        found.append(_steps(some))
    if some := _of(records, "whole step"):
        found.append(_whole_steps(some))
    found += _pendulums(records)
    if some := _of(records, "accuracy"):
        found += _accuracy(some)
    if some := [r for r in _of(records, "precision") if "name" in r]:
        found += [precision(some, key) for key in ("scale", "y")]
    if some := _of(records, "memory"):
        found.append(_memory(some))
    if some := _of(records, "correctness"):
        found.append(_correctness(some))
    best = "graph" if device == "cuda" else "eager"
    for section, title, column, method in [
        ("dtypes", "Dtypes", lambda r: f"{_size(r)} {r['dtype']}", best),
        ("keys", "Keys", lambda r: f"{r['keys']} × {_size(r)}", "eager"),
        ("threads", "Threads", lambda r: f"{_size(r)}, {r['threads']}", "eager"),
        ("samples", "Growth with the number of samples", _size, "eager"),
        ("features", "Growth with the number of features", _size, "eager"),
    ]:
        if some := _of(records, section, method=method):
            found.append(_timed(title, some, column))
    if lost := [r for r in records if "name" not in r and "passed" not in r]:
        rows = [[r["section"], r["label"], r["reason"]] for r in lost]
        found.append(Table("Not measured at all", ["", "", "why"], rows))
    return found


# --------------------------------------------------------------------- the figures


def _lines(axis, records: list[dict], x: str, y) -> None:
    for i, name in enumerate(_values(records, lambda r: r["name"])):
        points = sorted((r[x], y(r)) for r in records if r["name"] == name)
        ours = "(ours)" in name
        axis.plot(
            *zip(*points, strict=True),
            marker="o" if ours else ".",
            linewidth=2.2 if ours else 1,
            color="black" if name == peers.COPY else f"C{i % 10}",
            linestyle="--" if name == peers.COPY else "-",
            label=name,
        )
    axis.set(xscale="log", yscale="log")
    axis.grid(alpha=0.3)


def figures(folder: Path, machine: str, records: list[dict], device: str) -> list[str]:
    """Draws what there are records for; returns the names of the files."""
    measured = [r for r in records if "microseconds" in r]
    return [
        *_growth(folder, machine, measured, device),
        *_steps_a_second(folder, machine, _of(measured, "pendulum")),
    ]


def _steps_a_second(folder: Path, machine: str, records: list[dict]) -> list[str]:
    methods = _values(records, lambda r: r["method"])
    if not methods:
        return []
    figure, axes = plt.subplots(
        1, len(methods), figsize=(2 + 5 * len(methods), 4.5), layout="constrained"
    )
    axes = np.atleast_1d(axes)
    for method, axis in zip(methods, axes, strict=True):
        some = _of(records, "pendulum", method=method)
        names = _values(some, lambda r: r["name"])
        sizes = _values(some, lambda r: r["samples"])
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            mine = [r for r in some if r["name"] == name]
            left = (i - (len(names) - 1) / 2) * width
            at = [sizes.index(r["samples"]) + left for r in mine]
            axis.bar(at, [_per_second(r) for r in mine], width, label=name)
        axis.set_xticks(range(len(sizes)), sizes)
        title = "in a CUDA graph" if method == "graph" else "call by call"
        axis.set(xlabel="pendulums", ylabel="million steps a second", title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Pendulums, {machine}")
    figure.savefig(folder / "pendulums.png", dpi=110)
    plt.close(figure)
    return ["pendulums.png"]


def _growth(folder: Path, machine: str, measured: list[dict], device: str) -> list[str]:
    samples = _of(measured, "samples", method="eager")
    features = _of(measured, "features", method="eager")
    if not samples or not features:
        return []
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    _lines(axes[0], samples, "samples", lambda r: r["microseconds"])
    _lines(axes[1], features, "features", lambda r: r["microseconds"])
    axes[0].set(xlabel="samples, of 64 features", ylabel="µs a call")
    axes[1].set(xlabel="features, of 4096 samples")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Time of a call, {machine}")
    figure.savefig(folder / "growth.png", dpi=110)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    best = "graph" if device == "cuda" else "eager"
    samples = _of(measured, "samples", method=best)

    def gigabytes(r: dict) -> float:
        moved = 8 * r["samples"] * r["features"]  # float32: 4 bytes read, 4 written
        return moved / r["microseconds"] / 1e3

    _lines(axis, samples, "samples", gigabytes)
    axis.set(xlabel="samples, of 64 features", ylabel="GB/s of x read and y written")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Bytes against the floor, {machine}")
    figure.savefig(folder / "bandwidth.png", dpi=110)
    plt.close(figure)
    return ["growth.png", "bandwidth.png"]


# ----------------------------------------------------------------------- the files


def write_numbers(folder: Path, about: dict, records: list[dict]) -> None:
    """All numbers, for programs."""
    text = json.dumps({"about": about, "records": records}, indent=1)
    (folder / "results.json").write_text(text + "\n")
    columns = _values([{"k": k} for r in records for k in r], lambda r: r["k"])
    columns = [c for c in columns if c != "rounds"]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def write(folder: Path, about: dict, records: list[dict], device: str) -> None:
    """The report, for people."""
    head = tabulate(
        [[k, v] for k, v in about.items() if v is not None],
        ["", ""],
        tablefmt="github",
        disable_numparse=True,
    )
    parts = [f"# {about['device']}\n\n{head}\n"]
    parts += [table.markdown() for table in tables(records, device)]
    names = figures(folder, about["device"], records, device)
    parts += [f"![{Path(name).stem}]({name})\n" for name in names]
    (folder / "README.md").write_text("\n".join(parts))


def show(records: list[dict], device: str) -> None:
    """The tables on the terminal."""
    # A log has no width to respect.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables(records, device):
        console.print(table.rich())
