# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Time and memory of calls, on whatever device they run.

What is compared takes turns, round after round in one process: a machine that slows
down for a while slows all of them.
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.peers import Peer, Run, reason
from torchrl_vecnorm._load import _C

PATHS = ("auto", "cluster", "resident", "two_kernels")

#: A cache that holds x and y answers for memory: they rotate in this many times its size.
CACHES = 3
MOST_BUFFERS = 512

#: Why a normaliser is not captured.
NO_GRAPH = "waits for the GPU, or changes its state's tensors"


def median(times: list[float]) -> float:
    """The median of the rounds."""
    return statistics.median(times)


def random(n: int, features: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal values with mean 3 and deviation 2, never zeros: those can run faster."""
    return (torch.randn(n, features, device=device) * 2 + 3).to(dtype)


def start(
    peers: list[Peer], xs: list[Tensor], ys: list[Tensor]
) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that run on these tensors, and why the others do not."""
    runs, reasons = {}, {}
    for peer in peers:
        try:
            run = peer.make(xs, ys)
            run.call()
            if xs[0].is_cuda:
                torch.cuda.synchronize()
            runs[peer.name] = run
        except Exception as error:
            reasons[peer.name] = reason(error)
    return runs, reasons


def eager(
    calls: dict[str, Callable], rounds: int, seconds: float, threads: int
) -> dict[str, list[float]]:
    """Microseconds of a call by the host's clock, one number a round.

    On a GPU the timer waits for it before it starts and before it stops.
    """
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=threads)
        for name, f in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            run = timer.blocked_autorange(min_run_time=seconds)
            times[name].append(run.median * 1e6)
    return times


# --------------------------------------------------------------------- CUDA graphs


def buffer_sets(n_bytes: int, cache_bytes: int) -> int:
    """How many (x, y) of ``n_bytes`` together outgrow the cache; two at least."""
    return min(max(CACHES * cache_bytes // n_bytes + 1, 2), MOST_BUFFERS)


def replayed(
    runs: dict[str, Run],
    xs: list[Tensor],
    ys: list[Tensor],
    rounds: int,
    seconds: float,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Microseconds of a call in a CUDA graph over rotating buffers, one key.

    ``xs`` and ``ys`` are the buffers. A graph has one call on each pair, so that
    launches cost next to nothing.
    """
    reasons = {name: NO_GRAPH for name, run in runs.items() if run.bind is None}
    calls = {
        name: lambda bind=run.bind: [
            bind([x], [y]) for x, y in zip(xs, ys, strict=True)
        ]
        for name, run in runs.items()
        if run.bind is not None
    }
    times, failed = graphs(calls, rounds, seconds)
    return times, reasons | failed


def graphs(
    calls: dict[str, Callable[[], list[Callable]]], rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Microseconds of a call in a CUDA graph of several, and why some have none.

    Events on the GPU time replays of the graph.
    """
    captured, reasons = {}, {}
    for name, make in calls.items():
        try:
            some = make()
            captured[name] = _capture(some), len(some)
        except Exception as error:
            torch.cuda.synchronize()
            reasons[name] = reason(error)
    repeats = {}
    for name, (graph, _) in captured.items():
        _replay(graph, 1)
        repeats[name] = max(1, int(seconds * 1e3 / max(_replay(graph, 3) / 3, 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(rounds):
        for name, (graph, in_each) in captured.items():
            elapsed = _replay(graph, repeats[name])
            times[name].append(elapsed * 1e3 / (repeats[name] * in_each))
    return times, reasons


def _capture(calls: list[Callable]) -> torch.cuda.CUDAGraph:
    # Once outside the graph: what a call allocates for good must not live in it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Milliseconds of some replays."""
    first = torch.cuda.Event(enable_timing=True)
    last = torch.cuda.Event(enable_timing=True)
    graph.replay()  # the GPU is busy while the host gets ahead
    first.record()
    for _ in range(repeats):
        graph.replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def has_paths() -> bool:
    """Whether this build can be told which CUDA kernels update."""
    return hasattr(_C, "cuda_path") and hasattr(_C, "last_cuda_path")


@contextmanager
def cuda_path(name: str) -> Iterator[None]:
    """Updates run on these kernels, where they can."""
    if not has_paths():
        yield
        return
    _C.cuda_path(name)
    try:
        yield
    finally:
        _C.cuda_path("auto")


def last_path() -> str | None:
    """The kernels that the last update ran on."""
    return _C.last_cuda_path() if has_paths() else None


def limits() -> str:
    """What the GPU runs at once, as the kernels see it."""
    return _C.cuda_limits() if hasattr(_C, "cuda_limits") else "limits are not known"


# -------------------------------------------------------------------------- memory


def peak_memory(call: Callable, device: str) -> int:
    """Bytes that a call needs on top of what was there before, its results included."""
    call()  # what it keeps from call to call
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The kernel's own account of the process: it sees numpy and C++ too. Memory that
    # something else gives back meanwhile would count against it.
    gc.collect()
    peaks = []
    for _ in range(3):
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        peaks.append(_status("VmHWM") - before)
    return max(*peaks, 0)


def _give_back() -> None:
    """Memory that malloc keeps for later is resident before a call that takes it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) * 1024
