# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The CPU kernels under sanitizers, without Python, torch and OpenMP.

``cpu_host/check.cpp`` runs them on a team of threads that ThreadSanitizer understands,
in memory that ends where the values do.
"""

import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "csrc").exists(), reason="away from the source tree"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="needs ThreadSanitizer"),
    pytest.mark.slow,
]

#: One instruction set: they differ in the width of a register only.
SOURCES = ("tests/cpu_host/check.cpp", "csrc/cpu/isa_baseline.cpp")
#: Without optimisation: sanitized kernels take a minute to compile with it.
VARIANTS = {
    "memory": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "races": ("-O0", "-fsanitize=thread"),
}


def compile_one(source: Path, to: Path, *flags: str) -> None:
    command = [COMPILER, "-std=c++20", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT}", f"-I{ROOT / 'csrc' / 'cpu'}", *flags, "-c"]
    result = subprocess.run(
        [*command, source, "-o", to], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def link(folder: Path, *flags: str) -> Path:
    program = folder / "check"
    objects = sorted(folder.glob("*.o"))
    subprocess.run([COMPILER, "-pthread", *flags, *objects, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    """The check in both variants."""
    folder = tmp_path_factory.mktemp("cpu_host")
    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for variant, flags in VARIANTS.items():
            (folder / variant).mkdir()
            for source in SOURCES:
                to = folder / variant / f"{Path(source).stem}.o"
                jobs.append(pool.submit(compile_one, ROOT / source, to, *flags))
        for job in jobs:
            job.result()
    return {name: link(folder / name, *flags) for name, flags in VARIANTS.items()}


def run(program: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *args], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(programs) -> dict[str, Future]:
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, program) for name, program in programs.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels(runs, variant):
    result = runs[variant].result()
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr
    assert int(result.stdout.split(" teams")[0]) > 100


@pytest.fixture
def _the_first_is_enough(monkeypatch):
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")


@pytest.mark.usefixtures("_the_first_is_enough")
def test_races_without_the_barrier(programs):
    assert "data race" in run(programs["races"], "--no-barrier").stderr


#: An error: in which variant it is seen as what, and the replacement that plants it.
PLANTED = {
    "every strip writes what one does": (
        "races",
        "data race",
        "kernels.inl",
        "if (features.begin == 0) {",
        "{",
    ),
    "a write past the workspace": (
        "memory",
        "heap-buffer-overflow",
        "kernels.inl",
        "w.plan.row_chunks * (3 * w.plan.features + 1)",
        "w.plan.row_chunks * (3 * w.plan.features)",
    ),
    "a read past the values": (
        "memory",
        "heap-buffer-overflow",
        "accumulate.inl",
        "sums.add(load<C>(x[r * row_stride]), shift);",
        "sums.add(load<C>(x[(r + 1) * row_stride]), shift);",
    ),
}


@pytest.fixture(scope="module")
def planted(programs, tmp_path_factory) -> dict[str, Future]:
    """The results with each of them, two at a time."""

    def plant(variant, report, name, old, new) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("planted")
        shutil.copytree(programs[variant].parent, folder / "check")
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        path = folder / "csrc" / "cpu" / name
        text = path.read_text()
        assert old in text, f"{old!r} is not there to be replaced"
        path.write_text(text.replace(old, new))
        flags = VARIANTS[variant]
        compile_one(folder / SOURCES[1], folder / "check" / "isa_baseline.o", *flags)
        return run(link(folder / "check", *flags))

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(plant, *how) for name, how in PLANTED.items()}


@pytest.mark.usefixtures("_the_first_is_enough")
@pytest.mark.parametrize("name", PLANTED)
def test_harness_catches(planted, name):
    result = planted[name].result()
    assert result.returncode != 0
    assert PLANTED[name][1] in result.stderr, result.stdout + result.stderr
