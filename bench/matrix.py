# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Builds and tests the package with each torch that it is for; `make matrix` starts it.

Each has an environment of its own in build/matrix/, in which what a user does is done: torch
from the package index, ``pip install --no-build-isolation --no-deps`` of the source
distribution, and then the tests, away from the sources. torchrl is not there: who has torch
alone is served. It comes afterwards, for a run of the tests against its class.

A torch with CUDA is several gigabytes, downloaded and on disk, and a build some minutes: name
versions to do these alone. Results go to bench/results/matrix.json, which keeps what is not
done again, and from there to docs/guides/versions.md.

Exit status: 0 if every version that was asked for is built, imported and without failures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
RESULTS = ROOT / "bench" / "results" / "matrix.json"
PAGE = ROOT / "docs" / "guides" / "versions.md"

NEWEST = "newest"
VERSIONS = ("2.7.1", "2.9.1", "2.11.0", "2.13.0", NEWEST)
#: What torch alone is enough for.
TESTS = tuple(
    f"test_{name}.py" for name in ("rule", "running_norm", "ops", "oracle", "graphs")
)
TORCHRL = ("torchrl", "tensordict", "gymnasium")
TORCHRL_TESTS = ("test_reference.py",)
#: Of a build and the tests. torch before 2.13 wants a setuptools before 82.
TOOLS = ("setuptools>=77,<82", "wheel", "ninja", "pybind11", "numpy", "pytest")

BEGIN, END = "<!-- from bench/results/matrix.json -->\n", "<!-- end -->"

PROBE = """
import importlib.util, json, platform, sys, time
assert not any(map(importlib.util.find_spec, ("torchrl", "tensordict"))), "not alone"
start = time.process_time()
import torch
middle = time.process_time()
import torchrl_vecnorm
end = time.process_time()
print(json.dumps({
    "torch": torch.__version__, "python": platform.python_version(),
    "torch_ms": round(1000 * (middle - start)),
    "import_ms": round(1000 * (end - middle), 1),
}))
"""


def run(*command: object, log: Path, cwd: Path = ROOT, **variables: str) -> bool:
    """Whether a command ended well. What it says goes to the end of a file."""
    with log.open("ab") as output:
        return not subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode


def error_in(text: str) -> str:
    """The line of a log that says what went wrong first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error: (?!subprocess)", line, re.I)]
    return [*errors[:1], *lines[-1:], "no output"][0][:200]


def counted(report: Path) -> dict:
    """Of pytest's report: how many passed, what failed, and what was skipped and why."""
    passed, failed, skipped = 0, [], {}
    for case in ElementTree.parse(report).iter("testcase"):
        states = {child.tag: child.get("message", "") for child in case}
        if "skipped" in states:
            reason = states["skipped"]
            skipped[reason] = skipped.get(reason, 0) + 1
        elif "failure" in states or "error" in states:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


class Environment:
    """A virtual environment with one torch."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.folder = FOLDER / version
        self.python = self.folder / "bin" / "python"
        self.log = FOLDER / f"{version}.log"

    def pip(self, *arguments: object, **variables: str) -> bool:
        """Whether pip did it."""
        pip = (
            self.python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-cache-dir",
        )
        return run(*pip, *arguments, log=self.log, **variables)

    def create(self) -> bool:
        """Torch and the tools of a build, where they are not there yet."""
        self.log.unlink(missing_ok=True)
        done = self.folder / "installed"
        if done.exists():
            return True
        torch = "torch" if self.version == NEWEST else f"torch=={self.version}"
        FOLDER.mkdir(parents=True, exist_ok=True)
        good = run(sys.executable, "-m", "venv", self.folder, log=self.log)
        if good and self.pip("install", torch, *TOOLS):
            done.touch()
        return done.exists()

    def distribution(self) -> bool:
        """The source distribution; its tests are unpacked, without the package."""
        folder = self.folder / "sdist"
        shutil.rmtree(folder, ignore_errors=True)
        command = (self.python, "setup.py", "--quiet", "sdist", "--dist-dir", folder)
        if not run(*command, log=self.log):
            return False
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                member.name = member.name.split("/", 1)[-1]
                if member.name.startswith("tests/") or member.name == "pyproject.toml":
                    tar.extract(member, folder)
        return True

    def test(self, names: Iterable[str]) -> dict:
        """Runs files of tests, with the package that is installed."""
        report, log = self.folder / "report.xml", self.folder / "tests.log"
        for old in (report, log):
            old.unlink(missing_ok=True)
        pytest = (self.python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider")
        arguments = ("-m", "not slow", f"--junitxml={report}")
        files = [f"tests/{name}" for name in names]
        where = {"cwd": self.folder / "sdist", "log": log, "PYTHONHASHSEED": "0"}
        good = run(*pytest, *arguments, *files, **where)
        found: dict = {"passed": 0, "failed": [], "skipped": {}}
        if report.exists():
            found = counted(report)
        if not good and not found["failed"]:
            found["failed"] = [error_in(log.read_text())]
        return found

    def build(self) -> bool:
        """The package, built and installed as a user with torch alone does it."""
        self.pip("uninstall", "--yes", "torchrl_vecnorm")
        (archive,) = (self.folder / "sdist").glob("*.tar.gz")
        # CUDA kernels include nothing of torch, and take long: a folder without nvcc.
        cpu = {"CUDA_HOME": str(self.folder), "FORCE_CUDA": "0"}
        alone = ("--no-build-isolation", "--no-deps")
        return self.pip("install", *alone, archive, **cpu)

    def renew(self) -> bool:
        """The Python files of now beside what was compiled earlier."""
        mine = ROOT / "torchrl_vecnorm"
        for package in self.folder.glob("lib/python*/site-packages/torchrl_vecnorm"):
            for file in set(mine.rglob("*.py")) - {mine / "_build.py"}:
                inside = package / file.relative_to(mine)
                inside.parent.mkdir(exist_ok=True)
                shutil.copy(file, inside)
            return True
        return False

    def alone(self, as_built: bool) -> dict:
        """Builds and tests with torch alone, up to what goes wrong."""
        row = {"installed": self.create(), "built": False, "imported": False}
        if row["installed"]:
            self.pip("uninstall", "--yes", *TORCHRL)
            found = self.distribution() and (self.renew() if as_built else self.build())
            row["built"] = found
        if not row["built"]:
            return {**row, "error": error_in(self.log.read_text())}
        command = [self.python, "-c", PROBE]
        probe = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
        if probe.returncode:
            return {**row, "error": error_in(probe.stderr)}
        row |= {"imported": True, **json.loads(probe.stdout)}
        return {**row, "tests": self.test(TESTS)}

    def beside_torchrl(self, torch: str) -> dict:
        """Tests against torchrl's class, where torchrl goes with this torch."""
        pinned = (ROOT / "requirements.txt").read_text().split()
        wanted = [line for line in pinned if line.partition("==")[0] in TORCHRL]
        versions = dict(line.split("==") for line in wanted)
        try:
            # torch stays what it is: another one would need another build.
            if not self.pip("install", f"torch=={torch}", *wanted):
                return {**versions, "error": error_in(self.log.read_text())}
            return {**versions, **self.test(TORCHRL_TESTS)}
        finally:
            self.pip("uninstall", "--yes", *TORCHRL)


def counts(tests: dict | None) -> str:
    """What became of tests, in words."""
    if tests is None or "error" in tests:
        return "–"
    many = {"failed": len(tests["failed"]), "skipped": sum(tests["skipped"].values())}
    parts = [f"{n} {what}" for what, n in many.items() if n]
    return ", ".join([f"{tests['passed']} passed", *parts])


def page(text: str, rows: dict[str, dict]) -> str:
    """The page with the table of these results, and below it what did not pass."""
    lines = [
        "| torch | built | imported | with torch alone | against torchrl's class |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for version, row in rows.items():
        name = row.get("torch", version)
        time = f"{row['import_ms']:.0f} ms" if row["imported"] else "no"
        built = "yes" if row["built"] else "no" if row["installed"] else "–"
        cells = (name, built, time, counts(row.get("tests")), counts(row.get("beside")))
        lines.append(f"| {' | '.join(cells)} |")
        for part in (row, row.get("tests", {}), row.get("beside", {})):
            if "error" in part:
                notes.append(f"- {name}: `{part['error']}`")
            notes += [f"- {name} fails `{test}`" for test in part.get("failed", ())]
            skipped = part.get("skipped", {})
            notes += [f"- {name} skips {n}: {reason}" for reason, n in skipped.items()]
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return "\n".join([text[:start] + lines[0], *lines[1:], "", *notes, text[end:]])


def results() -> dict[str, dict]:
    """What was found so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def is_good(row: dict) -> bool:
    """Whether a version is built, imported and without failures."""
    of_torchrl = row.get("beside") or {}
    failed = row.get("tests", {"failed": [""]})["failed"] + of_torchrl.get("failed", [])
    return not failed and "error" not in of_torchrl


def main(arguments: list[str] | None = None) -> int:
    """Does what was asked for, and writes what was found after each version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help=f"of {', '.join(VERSIONS)}")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument(
        "--as-built", action="store_true", help="build nothing anew: Python files alone"
    )
    options = parser.parse_args(arguments)
    done = True
    for version in [] if options.page else options.versions or VERSIONS:
        environment = Environment(version)
        print(f"torch {version}: {environment.log}", flush=True)
        row = environment.alone(options.as_built)
        if row.get("imported"):
            row["beside"] = environment.beside_torchrl(row["torch"].split("+")[0])
        print(json.dumps(row, indent=1), flush=True)
        done = done and is_good(row)
        rows = {**results(), version: row}  # others may run meanwhile
        order = [name for name in VERSIONS if name in rows]
        order += sorted(rows.keys() - order)
        RESULTS.write_text(json.dumps({v: rows[v] for v in order}, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), results()))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
