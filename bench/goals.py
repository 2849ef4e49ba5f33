# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the project set out to reach, and whether the figures reach it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench import env, peers, race

MAIN, PAIR, DTYPES, STEP = "main", "pair", "dtypes", "step"

# N, F: the operator's × copy_ at most, × faster than torchrl's VecNorm and than
# batch_norm at least.
CPU = {
    (4096, 64): (1.6, 10.0, 3.5),
    (4096, 256): (1.45, 4.5, 1.8),
    (65536, 64): (1.5, 3.5, 2.0),
    (65536, 256): (1.2, 10.0, 5.0),
    (1_000_000, 64): (1.45, 8.0, 4.0),
}
CALL_1x8 = 25.0  # times faster than torchrl's, observation [1, 8] and reward [1, 1]
STEP_1x8 = 8.0  # µs on top of an identity transform

# N, F: `VecNorm._call`, times faster than torchrl's at least; elsewhere EVERYWHERE.
SHAPES = {(1, 8): 5.0, (64, 8): 5.0, (1, 64): 5.0, (64, 64): 5.0, (1, 376): 5.0}
EVERYWHERE = 3.0
# Other busy processes: the mean in medians of a quiet machine at most.
BUSY = {1: 2.5, 2: 3.5, 4: 6.0}
# Our VecNormV2, times faster than torchrl's at least: of two keys, eager, N and F; and of
# one, [1, 8], than torchrl's compiled. And in steps of our own VecNorm at most.
V2 = {(1, 8): 60.0, (4096, 64): 8.0}
V2_COMPILED = 8.0
V2_OF_OURS = 1.15
WHOLE_STEP = 1.0  # a compiled step with torchrl's VecNormV2 / with ours, at least
COLD = 2.0  # a cold call of three keys in cold copy_s of one, at most
COLD_TORCHRL = 10.0  # and times faster than torchrl's

# N, F on an H200: the operator's × copy_ at most, `_call` × faster than torchrl's.
CUDA = {
    (4096, 64): (1.9, 15.0),
    (4096, 256): (1.55, 15.0),
    (65536, 64): (1.4, None),
    (65536, 256): (1.25, None),
    (1_000_000, 64): (1.5, 3.0),
    (1_000_000, 256): (1.5, 3.0),
}
CUDA_SMALL = ((1, 8), (64, 32))  # where `_call` has the goal of 4096 × 256 too
DECAYS = (0.9, 0.9999, 1.0)
SCALE = 1e-3  # relative error of float32 scales at mean/std 1e5, whatever N and decay
HALF = 1.2  # what bf16 and f16 may take of the ratio that float32 has


@dataclass(frozen=True)
class Goal:
    """A limit, and what was measured; None where nothing was."""

    what: str
    limit: float
    at_least: bool
    value: float | None

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def verdict(self) -> str:
        """``met``, or by how much it is not."""
        if self.met is None:
            return "not measured"
        if self.met:
            return "met"
        off = abs(self.value - self.limit)
        return f"misses by {off:.3g} ({off / self.limit:.0%})"


def find(records: list[dict], **wanted) -> float | None:
    """The microseconds of one measurement; None if it was not taken or failed."""
    for record in records:
        if all(record.get(k) == v for k, v in wanted.items()):
            return record.get("microseconds")
    return None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def evaluate(records: list[dict], device: str) -> list[Goal]:
    """The goals for a kind of device, ``cpu`` or ``cuda``."""
    found = _cuda(records) if device == "cuda" else _cpu(records)
    errors = [
        r.get("scale", math.nan)
        for r in records
        if (r["section"], r.get("name"), r.get("dtype"), r.get("ratio"))
        == ("precision", peers.OPERATOR, "float32", 1e5)
    ]
    # max() alone would pass over NaN.
    worst = None if not errors else max(errors, key=lambda e: (math.isnan(e), e))
    what = "float32 at mean/std 1e5: relative error of the scale"
    return [*found, Goal(what, SCALE, False, worst)]


def _cpu(records: list[dict]) -> list[Goal]:
    goals = []
    for (n, f), (floor, torchrl, batch_norm) in CPU.items():

        def us(name, n=n, f=f):
            return find(records, section=MAIN, samples=n, features=f, name=name)

        size, ours = f"{n} × {f}", us(peers.OPERATOR)
        for what, limit, at_least, value in [
            ("update_ / copy_", floor, False, _ratio(ours, us(peers.COPY))),
            (
                "update_, times faster than torchrl VecNorm",
                torchrl,
                True,
                _ratio(us(peers.TORCHRL), ours),
            ),
            (
                "update_, times faster than F.batch_norm",
                batch_norm,
                True,
                _ratio(us(peers.BATCH_NORM), ours),
            ),
        ]:
            goals.append(Goal(f"{size}: {what}", limit, at_least, value))
    goals += _shapes(records) + _v2(records) + _whole_steps(records)
    goals += _conditions(records)
    at = {"section": PAIR, "samples": 1, "features": 8}
    faster = _ratio(
        find(records, name=peers.TORCHRL, **at),
        find(records, name=peers.TRANSFORM, **at),
    )
    what = "[1, 8] and reward: VecNorm._call, times faster than torchrl's"
    goals.append(Goal(what, CALL_1x8, True, faster))
    at["section"] = STEP
    ours = find(records, name=env.OURS, **at)
    identity = find(records, name=env.IDENTITY, **at)
    added = None if ours is None or identity is None else ours - identity
    what = "[1, 8] and reward: µs that VecNorm adds to a step with an identity"
    goals.append(Goal(what, STEP_1x8, False, added))
    return goals


def _shapes(records: list[dict]) -> list[Goal]:
    found = []
    for n, f in race.sizes():
        at = {"section": "shapes", "kind": "update", "samples": n, "features": f}
        faster = _ratio(
            find(records, name=peers.TORCHRL, **at),
            find(records, name=peers.TRANSFORM, **at),
        )
        what = f"{n} × {f}: VecNorm._call, times faster than torchrl's"
        found.append(Goal(what, SHAPES.get((n, f), EVERYWHERE), True, faster))
    return found


def _v2(records: list[dict]) -> list[Goal]:
    found = []
    for (n, f), limit in V2.items():
        at = {"section": PAIR, "samples": n, "features": f}
        ours, theirs = (
            find(records, name=name, **at) for name in (peers.OURS_V2, peers.TORCHRL_V2)
        )
        what = f"[{n}, {f}] and reward: VecNormV2._step, times faster than torchrl's"
        found.append(Goal(what, limit, True, _ratio(theirs, ours)))
        what = f"[{n}, {f}] and reward: VecNormV2._step / VecNorm._step"
        of_ours = _ratio(ours, find(records, name=peers.STEP, **at))
        found.append(Goal(what, V2_OF_OURS, False, of_ours))
    at = {"section": MAIN, "samples": 1, "features": 8}
    faster = _ratio(
        find(records, name=peers.COMPILED_V2, **at),
        find(records, name=peers.OURS_V2, **at),
    )
    what = "1 × 8: VecNormV2._step, times faster than torchrl's compiled"
    return [*found, Goal(what, V2_COMPILED, True, faster)]


def _whole_steps(records: list[dict]) -> list[Goal]:
    found = []
    sizes = {r["samples"] for r in records if r["section"] == "whole step"}
    for n in sorted(sizes):
        at = {"section": "whole step", "samples": n, "method": env.COMPILED}
        for ours, theirs, how in [
            (peers.OURS_V2, peers.TORCHRL_V2, ""),
            (peers.OURS_TRAVELS, peers.TORCHRL_TRAVELS, "(stateful=False)"),
        ]:
            faster = _ratio(
                find(records, name=theirs, **at), find(records, name=ours, **at)
            )
            what = f"{n}: step_and_maybe_reset compiled with VecNormV2{how}"
            found.append(Goal(f"{what}, torchrl's / ours", WHOLE_STEP, True, faster))
    return found


def _conditions(records: list[dict]) -> list[Goal]:
    found = []
    for record in records:
        if record["section"] == "busy" and record.get("name") == peers.OPERATOR:
            processes = record["processes"]
            if processes in BUSY:
                slower = record["microseconds"] / record["quiet"]
                size = f"{record['samples']} × {record['features']}"
                what = f"{size}: update_ beside {processes} busy processes / quiet"
                found.append(Goal(what, BUSY[processes], False, slower))
    at = {"section": "cold", "between": "other work"}
    ours = find(records, name=peers.TRANSFORM, **at)
    what = "cold: VecNorm._call of three keys / copy_ of one"
    of_copy = _ratio(ours, find(records, name=peers.COPY, **at))
    found.append(Goal(what, COLD, False, of_copy))
    what = "cold: VecNorm._call of three keys, times faster than torchrl's"
    faster = _ratio(find(records, name=peers.TORCHRL, **at), ours)
    return [*found, Goal(what, COLD_TORCHRL, True, faster)]


def _cuda(records: list[dict]) -> list[Goal]:
    goals = []
    for (n, f), (floor, _) in CUDA.items():
        for dtype, section, factor in [
            ("float32", MAIN, 1.0),
            ("bfloat16", DTYPES, HALF),
            ("float16", DTYPES, HALF),
        ]:
            at = {"section": section, "samples": n, "features": f, "dtype": dtype}
            at["method"] = "graph"
            value = _ratio(
                find(records, name=peers.OPERATOR, **at),
                find(records, name=peers.COPY, **at),
            )
            what = f"{n} × {f} {dtype}: update_ / copy_"
            goals.append(Goal(what, floor * factor, False, value))
    limits = dict.fromkeys(CUDA_SMALL, CUDA[4096, 256][1])
    limits |= {size: limit for size, (_, limit) in CUDA.items() if limit is not None}
    for (n, f), limit in limits.items():
        at = {"section": PAIR, "samples": n, "features": f, "method": "eager"}
        value = _ratio(
            find(records, name=peers.TORCHRL, **at),
            find(records, name=peers.TRANSFORM, **at),
        )
        what = f"[{n}, {f}] and reward: VecNorm._call, times faster than torchrl's"
        goals.append(Goal(what, limit, True, value))
    return goals
