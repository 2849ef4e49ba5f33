# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Builds, tests, sanitizes and measures on a machine with a CUDA GPU, in eight minutes.

Needs torch, torchrl and no network, nvcc where the extension does not load as it is and for
the kernels without torch, and uses the interpreter that runs it. Every stage is a process of
its own with a time limit, so that none stops the next, and can be run alone (``--only
probe``); the first ones say most. Results go to bench/results/<device>/ or to the folder that
the variable OUT names, as they come.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import results_folder

ROOT = Path(__file__).resolve().parent.parent

#: The seconds of each stage, what says most first. What is not needed, later ones may use.
SECONDS = {
    "build": 200,
    "probe": 20,
    "figures": 110,
    "tests": 110,
    "kernels": 60,
    "memcheck": 40,
    "racecheck": 40,
    "rest": 100,
    "initcheck": 30,
    "synccheck": 30,
}
#: All of them together.
TOTAL = 440
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STAGES = {"sanitize": ("kernels", *TOOLS)}  # several under one name
#: Sections of bench.run: what the goals need, then the others.
FIGURES = ("correctness", "main", "paths", "dtypes", "pair")
REST = ("step", "pendulum", "memory", "accuracy", "precision", "keys", "samples")
#: The kernels with a check that knows no torch, and how its output ends where all is well.
CHECK = ROOT / "build" / "cuda-check"
CHECK_SOURCES = (
    "csrc/cuda/fused.cu",
    "csrc/cuda/two_kernels.cu",
    "csrc/cuda/returns.cu",
    "csrc/cuda/kernels.cpp",
    "csrc/cuda/plan.cpp",
    "tests/cuda_host/check.cpp",
)
CHECKED = "\n0 differences"
#: A test that takes longer hangs: it alone is given up.
SECONDS_A_TEST = 60

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
    """Runs a command for at most ``limit`` seconds; its output goes to the log at once."""
    with log.open("a+", errors="replace") as file:
        file.write(f"\n===== {' '.join(command)}\n")
        file.flush()
        start = file.tell()
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
        file.seek(start)
        output = file.read()
        file.seek(0, os.SEEK_END)
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
    """Compiles in place for this GPU alone, unless there is a build that runs here."""
    probe = [sys.executable, "-m", "bench.probe", "--short"]
    if run(probe, 60, {}, log).code == 0:
        return PASSED, "the extension was there"
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


def probe(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """What the GPU lets run at once, and whether each kind of kernel is right."""
    finished = run([sys.executable, "-m", "bench.probe"], limit, {}, log)
    lines = [line for line in finished.output.splitlines() if line.startswith("probe:")]
    detail = "; ".join(line.partition(": ")[2] for line in lines)
    if finished.code != 0:
        why = "out of time" if finished.code is None else tail(finished.output)
        return FAILED, "; ".join(filter(None, [detail, why]))
    return PASSED, detail


def tests(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """The tests that need a GPU; one that hangs costs itself alone."""
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q"]
        command += [f"--junitxml={xml}", "-p", "no:cacheprovider"]
        # A kernel that waits for ever lets no signal through: its process has to go, and
        # xdist starts another one.
        if importlib.util.find_spec("xdist"):
            command += ["-n", "2", "--max-worker-restart", "20"]
            if importlib.util.find_spec("pytest_timeout"):
                command += [f"--timeout={SECONDS_A_TEST}", "--timeout-method=thread"]
        finished = run(command, limit, {}, log)
        return judge_tests(xml, finished)


def compute_sanitizer() -> str | None:
    """Where the tool is: on the path, or in the toolkit."""
    program = shutil.which("compute-sanitizer")
    if program is None and (nvcc := shutil.which("nvcc")):
        # It may be a script that starts another one.
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        if found := re.search(r"TOP=(\S+)", dryrun.stderr):
            program = shutil.which("compute-sanitizer", path=f"{found.group(1)}/bin")
    return program


def build_check(capability: str, limit: float, log: Path) -> tuple[str, str]:
    """Compiles the check with the kernels, without torch."""
    nvcc = shutil.which("nvcc")
    CHECK.unlink(missing_ok=True)
    if nvcc is None:
        return DID_NOT_RUN, "there is no nvcc to compile the check"
    CHECK.parent.mkdir(exist_ok=True)
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as scratch:
        objects = {s: f"{scratch}/{Path(s).stem}.o" for s in CHECK_SOURCES}

        def compiled(source: str) -> Finished:
            command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-I."]
            command += [f"-arch=sm_{capability.replace('.', '')}"]
            command += ["-c", source, "-o", objects[source]]
            return run(command, limit, {}, log)

        with ThreadPoolExecutor(len(CHECK_SOURCES)) as pool:
            made = list(pool.map(compiled, CHECK_SOURCES))
        if all(finished.code == 0 for finished in made):
            command = [nvcc, *objects.values(), "-o", str(CHECK)]
            made = [run(command, end - time.monotonic(), {}, log)]
    bad = [finished for finished in made if finished.code != 0]
    if bad:
        why = "out of time" if bad[0].code is None else tail(bad[0].output)
        return FAILED, f"the check was not compiled: {why}"
    return PASSED, ""


def kernels(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """The kernels against long double; compute-sanitizer looks at the same program."""
    import torch

    end = time.monotonic() + limit
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    state, why = build_check(capability, limit, log)
    if state != PASSED:
        return state, why
    finished = run([str(CHECK)], end - time.monotonic(), {}, log)
    if finished.code is None:
        return FAILED, f"out of time, after: {tail(finished.output, 1)}"
    good = finished.code == 0 and CHECKED in finished.output
    return (PASSED if good else FAILED), tail(finished.output, 2)


def is_fresh() -> bool:
    """Whether there is a check of the sources that are there."""
    folders = (ROOT / "csrc", ROOT / "tests" / "cuda_host")
    sources = [p for folder in folders for p in folder.rglob("*.*")]
    sources += (ROOT / "tests").glob("*.h")
    newest = max(p.stat().st_mtime for p in sources)
    return CHECK.exists() and CHECK.stat().st_mtime >= newest


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
    if is_fresh():
        # It starts in a second, and every allocation ends where its values do.
        command += [str(CHECK), "small"]
        return judge_sanitizer(tool, run(command, limit, {}, log), CHECKED)
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


def measure(sections: tuple[str, ...], limit: float, folder: Path, log: Path):
    """Sections of `make bench`, in short; a result that is wrong fails it."""
    numbers = folder / "results.json"
    command = [sys.executable, "-m", "bench.run", "--quick", "--device", "cuda"]
    command += ["--only", *sections, "--out", str(folder)]
    finished = run(command, limit, {}, log)
    if not numbers.exists():
        why = "out of time" if finished.code is None else tail(finished.output)
        return FAILED, why
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


def figures(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """What the goals need."""
    (folder / "results.json").unlink(missing_ok=True)
    return measure(FIGURES, limit, folder, log)


def rest(limit: float, folder: Path, log: Path) -> tuple[str, str]:
    """What else the benchmark has, beside the figures."""
    return measure(REST, limit, folder, log)


def check(folder: Path, only: list[str]) -> list[Outcome]:
    """Runs the steps; a note in the folder after each, whatever happens to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "gpu-check.log"
    if set(only) == set(SECONDS):  # else beside what other stages have left
        log.write_text("")
        (folder / "gpu-check.md").unlink(missing_ok=True)
    functions = {
        "build": build,
        "probe": probe,
        "figures": figures,
        "tests": tests,
        "kernels": kernels,
        "rest": rest,
    }
    outcomes: list[Outcome] = []
    begin, spare = time.monotonic(), 0.0
    for step, seconds in SECONDS.items():
        if step not in only:
            continue
        print(f"{step} …", flush=True)
        start = time.monotonic()
        left = begin + TOTAL - start
        if left < 5:
            outcomes.append(Outcome(step, DID_NOT_RUN, "no time was left"))
            write(folder, outcomes)
            continue
        limit = min(seconds + spare, left)
        try:
            if step in TOOLS:
                state, detail = sanitize(step, limit, folder, log)
            else:
                state, detail = functions[step](limit, folder, log)
        except Exception as error:
            state, detail = FAILED, f"{type(error).__name__}: {error}"
        took = time.monotonic() - start
        if step != "build":  # most of whose time is not needed
            spare = max(spare + seconds - took, 0.0)
        outcomes.append(Outcome(step, state, detail, took))
        print(f"{step}: {state} in {took:.0f} s: {detail}", flush=True)
        write(folder, outcomes)
    return outcomes


# -------------------------------------------------------------------------- report


def write(folder: Path, outcomes: list[Outcome]) -> None:
    """The steps, in Markdown; those of other runs stay."""
    report = folder / "gpu-check.md"
    rows = {}
    if report.exists():
        found = re.findall(r"^\| (\w+) \| .*$", report.read_text(), re.MULTILINE)
        lines = re.findall(r"^\| \w+ \| .*$", report.read_text(), re.MULTILINE)
        rows = {s: row for s, row in zip(found, lines, strict=True) if s in SECONDS}
    for o in outcomes:
        detail = o.detail.replace("|", "\\|").replace("\n", " ")
        rows[o.step] = f"| {o.step} | {o.state} | {o.seconds:.0f} | {detail} |"
    lines = ["# GPU check", "", "| step | | seconds | |", "|---|---|---|---|"]
    lines += [rows[step] for step in SECONDS if step in rows]
    lines += ["", *predicted(folder)]
    lines += ["", "Figures are in [README.md](README.md), output in gpu-check.log."]
    report.write_text("\n".join(lines) + "\n")


def predicted(folder: Path) -> list[str]:
    """What a model says (model.py) beside what was measured, in Markdown."""
    numbers = folder / "results.json"
    if not numbers.exists():
        return []
    from bench import goals, model, peers

    saved = json.loads(numbers.read_text())
    gpus = [g for g in model.GPUS if g.name in saved["about"].get("device", "")]
    gpu = gpus[0] if gpus else model.H200
    lines = [f"| model of {gpu.name} | predicted µs | measured |", "|---|---|---|"]
    for record in saved["records"]:
        dtype = record.get("dtype")
        known = record.get("name") == peers.OPERATOR and dtype in model.DTYPES
        if not known or record.get("method") != "graph" or "microseconds" not in record:
            continue
        if record["section"] not in (goals.MAIN, goals.DTYPES, "paths"):
            continue
        n, f, path = record["samples"], record["features"], record.get("path", "auto")
        try:
            found = model.predict(n, f, dtype, gpu, path)
        except (OSError, subprocess.CalledProcessError) as error:
            return [f"no predictions: {error}"]
        if found is not None:
            what = f"{n} × {f} {dtype} {path}"
            lines.append(
                f"| {what} | {found.microseconds:.1f} | {record['microseconds']:.1f} |"
            )
    return lines


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
        choices=(*SECONDS, *STAGES),
        default=list(SECONDS),
        help="some of the stages",
    )
    args = parser.parse_args(arguments)
    if why := why_nothing_runs():
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    folder = args.out
    if folder is None:
        import torch

        folder = results_folder(torch.cuda.get_device_name())
    only = [step for name in args.only for step in STAGES.get(name, (name,))]
    outcomes = check(folder.resolve(), only)
    if {"figures", "rest"} & set(only):
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
