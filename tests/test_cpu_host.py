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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
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
def program_of(tmp_path_factory) -> Callable[[str], Path]:
    """The check in a variant, compiled when it is asked for."""

    @cache
    def compiled(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("cpu_host")
        flags = VARIANTS[variant]
        with ThreadPoolExecutor(2) as pool:
            for job in [
                pool.submit(compile_one, ROOT / s, folder / f"{Path(s).stem}.o", *flags)
                for s in SOURCES
            ]:
                job.result()
        return link(folder, *flags)

    return compiled


def run(program: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *args], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels(program_of, variant):
    result = run(program_of(variant))
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr
    assert int(result.stdout.split(" teams")[0]) > 100


@pytest.fixture
def _the_first_is_enough(monkeypatch):
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")


@pytest.mark.usefixtures("_the_first_is_enough")
def test_races_without_the_barrier(program_of):
    assert "data race" in run(program_of("races"), "--no-barrier").stderr


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


@pytest.mark.usefixtures("_the_first_is_enough")
@pytest.mark.parametrize("name", PLANTED)
def test_harness_catches(program_of, tmp_path, name):
    variant, report, file, old, new = PLANTED[name]
    folder = shutil.copytree(program_of(variant).parent, tmp_path / "check")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cpu" / file
    text = path.read_text()
    assert old in text, f"{old!r} is not there to be replaced"
    path.write_text(text.replace(old, new))
    flags = VARIANTS[variant]
    compile_one(tmp_path / SOURCES[1], folder / "isa_baseline.o", *flags)
    result = run(link(folder, *flags))
    assert result.returncode != 0
    assert report in result.stderr, result.stdout + result.stderr
