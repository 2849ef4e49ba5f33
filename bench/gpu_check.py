# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Builds, tests, sanitizes and measures on a machine with a CUDA GPU.

Needs torch, torchrl, nvcc and no network, and uses the interpreter that runs it. Every
step is a process of its own with a time limit, so that none stops the next. Results go
to bench/results/<device>/ or to the folder that the variable OUT names.

Exit status: 0 if all is well, 1 if the build, a test, compute-sanitizer or a result is
not, 2 if nothing can run here. Speed goals that are missed do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from bench import results_folder

ROOT = Path(__file__).resolve().parent.parent

#: The seconds of each step. What a step does not need, later ones may.
SECONDS = {
    "build": 100,
    "tests": 130,
    "memcheck": 35,
    "racecheck": 35,
    "initcheck": 35,
    "synccheck": 35,
    "bench": 100,
}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

PASSED, FAILED, DID_NOT_RUN = "passed", "FAILED", "did not run"


@dataclass
class Outcome:
    """How a step ended."""

    step: str
    state: str
    detail: str
    seconds: float = 0.0


@dataclass
class Finished:
    """A process that ended, or was ended."""

    code: int | None  # None: it ran out of time
    output: str


def run(command: list[str], limit: float, env: dict[str, str], log: Path) -> Finished:
    """Runs a command for at most ``limit`` seconds; its output is logged and returned."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            code = None
            # As Ctrl-C does, on which pytest writes down how far it came.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            # Its own children too: pytest's workers, what a sanitizer looks at.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        output = file.read()
    with log.open("a") as file:
        file.write(f"\n===== {' '.join(command)}\n{output}")
        file.write(
            f"===== exit status {'none: out of time' if code is None else code}\n"
        )
    return Finished(code, output)


def tail(output: str, lines: int = 3) -> str:
    """The last lines that say something."""
    return " / ".join([line for line in output.splitlines() if line.strip()][-lines:])


# ---------------------------------------------------------------------- verdicts


def judge_tests(xml: Path, finished: Finished) -> tuple[str, str]:
    """What the tests' own record says."""
    if not xml.exists():
        why = "out of time" if finished.code is None else tail(finished.output)
        return FAILED, f"no record of the tests: {why}"
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    bad, skips = [], {}
    for case in ElementTree.parse(xml).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            bad.append(f"{case.get('classname')}::{case.get('name')}")
        elif (skip := case.find("skipped")) is not None:
            counts["skipped"] += 1
            why = skip.get("message", "")
            skips[why] = skips.get(why, 0) + 1
        else:
            counts["passed"] += 1
    detail = ", ".join(f"{n} {what}" for what, n in counts.items())
    if skips:
        detail += "; skipped: " + ", ".join(f"{why} ({n})" for why, n in skips.items())
    if bad:
        detail += "; failed: " + ", ".join(bad)
    if finished.code is None:
        detail += "; ended because it ran out of time"
    return (PASSED if finished.code == 0 and not bad else FAILED), detail


def judge_sanitizer(tool: str, finished: Finished, done: str) -> tuple[str, str]:
    """What compute-sanitizer found; ``done`` is what the driver prints at its end."""
    output = finished.output
    if finished.code is None:
        return DID_NOT_RUN, f"out of time, after: {tail(output, 1)}"
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazard.*?\((\d+) error", output)
    found = found or re.search(r"ERROR SUMMARY: (\d+) error", output)
    if "Device not supported" in output or found is None:
        return DID_NOT_RUN, tail(output)
    summary = re.search(r"(?:RACECHECK|ERROR) SUMMARY: .*", output).group(0)
    errors = int(found.group(1))
    if tool == "initcheck":
        # This tool sees all kernels, else it would not know what torch's have written;
        # what it says of those is not ours to mend.
        errors, others = initcheck_reports(output)
        summary = f"{errors} reports" + (f", {others} on torch's own" if others else "")
    if errors:
        return FAILED, summary
    if done not in output:
        return FAILED, f"the driver did not come to its end: {tail(output)}"
    return PASSED, summary


def initcheck_reports(output: str) -> tuple[int, int]:
    """How many reports there are on our kernels and copies, and on kernels of others."""
    reports: list[str] = []  # the kernel of each, empty for copies to the host
    for line in output.splitlines():
        if re.match(r"=+ (Uninitialized|Host API uninitialized)", line):
            reports.append("")
        elif reports and not reports[-1] and re.match(r"=+\s+at ", line):
            reports[-1] = line
    others = sum(bool(kernel) and "vecnorm" not in kernel for kernel in reports)
    return len(reports) - others, others


# -------------------------------------------------------------------------- steps


def build(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """Compiles in place, for this GPU alone unless the environment says otherwise."""
    import torch

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    env = {
        # A build without the kernels would be of no use here.
        "FORCE_CUDA": os.getenv("FORCE_CUDA", "1"),
        "TORCH_CUDA_ARCH_LIST": os.getenv("TORCH_CUDA_ARCH_LIST", capability),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    finished = run(command, limit, env, log)
    if finished.code != 0:
        why = "out of time" if finished.code is None else tail(finished.output)
        return FAILED, why
    return PASSED, f"TORCH_CUDA_ARCH_LIST={env['TORCH_CUDA_ARCH_LIST']}"


def tests(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """The whole suite, those that need a GPU included."""
    # Those that only a GPU can run come first, in case time runs out.
    files = sorted((ROOT / "tests").glob("test_*.py"))
    files.sort(key=lambda file: file.name != "test_cuda.py")
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", *map(str, files), "-q"]
        command += [f"--junitxml={xml}"]
        # A test file that misses a package must not stop the others.
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
        finished = run(command, limit, {}, log)
        return judge_tests(xml, finished)


def compute_sanitizer() -> str | None:
    """Where the tool is: on the path, or beside nvcc."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = Path(CUDA_HOME or "") / "bin"
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(beside)
    )


def sanitize(tool: str, limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """One of compute-sanitizer's tools over every kernel."""
    program = compute_sanitizer()
    if program is None:
        return DID_NOT_RUN, "compute-sanitizer is not installed"
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        "--print-limit",
        "1000",
    ]
    if tool != "initcheck":
        # Our kernels sit in namespace vecnorm. torch's would take minutes.
        command += ["--kernel-name", "kns=vecnorm"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch asks for what may fail
    command += [sys.executable, "-m", "bench.sanitize"]
    # With torch's cache of allocations, writing past the end of one hits the next.
    finished = run(command, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, log)
    source = (ROOT / "bench" / "sanitize.py").read_text()
    done = re.search(r'^DONE = "(.*)"$', source, re.MULTILINE).group(1)
    return judge_sanitizer(tool, finished, done)


def bench(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """What `make bench` does, in short; a result that is wrong fails it."""
    numbers = folder / "results.json"
    numbers.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.run", "--quick", "--device", "cuda"]
    finished = run([*command, "--out", str(folder)], limit, {}, log)
    if not numbers.exists():
        return FAILED, tail(finished.output)
    records = json.loads(numbers.read_text())["records"]
    checks = [r for r in records if r["section"] == "correctness"]
    wrong = sum(not r["passed"] for r in checks)
    detail = f"{len(checks) - wrong} of {len(checks)} results are right"
    if finished.code is None:
        detail += "; out of time, so that figures are missing"
    elif finished.code != 0:
        detail += f"; {tail(finished.output)}"
    good = checks and not wrong and finished.code in (0, None)
    return (PASSED if good else FAILED), detail


def check(folder: Path, only: list[str]) -> list[Outcome]:
    """Runs the steps; a note in the folder after each, whatever happens to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "gpu-check.log"
    log.write_text("")
    functions = {"build": build, "tests": tests, "bench": bench}
    outcomes: list[Outcome] = []
    begin, until = time.monotonic(), 0.0
    for step, seconds in SECONDS.items():
        until += seconds
        if step not in only:
            continue
        print(f"{step} …", flush=True)
        start = time.monotonic()
        limit = begin + until - start
        try:
            if step in TOOLS:
                state, detail = sanitize(step, limit, folder, log)
            else:
                state, detail = functions[step](limit, folder, log)
        except Exception as error:
            state, detail = FAILED, f"{type(error).__name__}: {error}"
        took = time.monotonic() - start
        outcomes.append(Outcome(step, state, detail, took))
        print(f"{step}: {state} in {took:.0f} s: {detail}", flush=True)
        write(folder, outcomes)
    return outcomes


# -------------------------------------------------------------------------- report


def write(folder: Path, outcomes: list[Outcome]) -> None:
    """The steps, in Markdown."""
    lines = ["# GPU check", "", "| step | | seconds | |", "|---|---|---|---|"]
    for o in outcomes:
        detail = o.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {o.step} | {o.state} | {o.seconds:.0f} | {detail} |")
    lines += ["", "Figures are in [README.md](README.md), output in gpu-check.log."]
    (folder / "gpu-check.md").write_text("\n".join(lines) + "\n")


def show_figures(folder: Path) -> None:
    """The tables of the benchmark, and which goals hold."""
    numbers = folder / "results.json"
    if not numbers.exists():
        return
    from bench import goals, report

    saved = json.loads(numbers.read_text())
    report.write(folder, saved["about"], saved["records"], "cuda")
    report.show(saved["records"], "cuda")
    print("\nGoals, set for an H200:")
    for goal in goals.evaluate(saved["records"], "cuda"):
        sign = "≥" if goal.at_least else "≤"
        value = report.number(goal.value)
        print(f"  {goal.what}: {value}, goal {sign} {goal.limit:.3g}: {goal.verdict}")


def why_nothing_runs() -> str | None:
    """One sentence, or None if there is what is needed."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}), so nothing can run."
    if not torch.cuda.is_available():
        return "there is no CUDA GPU that torch can use here, so nothing was run."
    try:
        importlib.import_module("torchrl.envs")
    except Exception as error:
        return (
            f"torchrl cannot be imported ({type(error).__name__}: {error}); "
            "torchrl_vecnorm itself imports it, so nothing can run."
        )
    return None


def main(arguments: list[str] | None = None) -> int:
    """Runs the check."""
    parser = argparse.ArgumentParser(prog="bench.gpu_check", description=__doc__)
    out = os.getenv("OUT")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out) if out else None,
        help="the folder to write to; the variable OUT does the same",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(SECONDS),
        default=list(SECONDS),
        help="some of the steps, which get the time of those before them too",
    )
    args = parser.parse_args(arguments)
    if why := why_nothing_runs():
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    folder = args.out
    if folder is None:
        import torch

        folder = results_folder(torch.cuda.get_device_name())
    outcomes = check(folder.resolve(), args.only)
    if "bench" in args.only:
        try:
            show_figures(folder)
        except Exception as error:  # after a build that failed, say
            print(f"no figures: {type(error).__name__}: {error}")
    print()
    for outcome in outcomes:
        print(f"{outcome.step}: {outcome.state}: {outcome.detail}")
    print(f"written to {folder}")
    return 1 if any(o.state == FAILED for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
