# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The CUDA kernels where there is no GPU: run on the host, and compiled for all GPUs.

``cuda_host/check.cpp`` runs the source of the kernels on the CPU and compares it with
sums in long double. It says nothing about speed, and nothing about what a GPU reorders.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
#: Bytes of registers that a kernel may spill.
SPILL_LIMIT = 16

COMPILER = shutil.which("g++") or shutil.which("c++")
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists(), reason="away from the source tree"
)


def build(tmp_path: Path, *flags: str, mutate: tuple[str, str, int] | None = None):
    """Compiles the check; ``mutate`` = (old, new, i) replaces the i-th old by new."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copytree(ROOT / "tests" / "cuda_host", source / "tests" / "cuda_host")
    if mutate is not None:
        old, new, index = mutate
        path = source / "csrc" / "cuda" / "kernels.cu"
        pieces = path.read_text().split(old)
        assert len(pieces) > index + 1, f"{old!r} is not there to be replaced"
        before, after = pieces[: index + 1], pieces[index + 1 :]
        path.write_text(old.join(before) + new + old.join(after))
    program = tmp_path / "check"
    optimize = "-O0" if mutate else "-O1"
    command = [COMPILER, "-std=c++20", optimize, "-g", "-I.", *flags]
    command += ['-DVECNORM_CUDA_ON_HOST="tests/cuda_host/emulation.h"']
    command += ["tests/cuda_host/check.cpp", "-x", "c++", "csrc/cuda/kernels.cu"]
    result = subprocess.run(
        [*command, "-pthread", "-o", program],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return program


def run(program: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *args], capture_output=True, text=True, timeout=300)


def test_kernels(tmp_path):
    result = run(build(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 differences" in result.stdout


def test_memory(tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    result = run(build(tmp_path, *flags), "small")
    assert result.returncode == 0, result.stdout + result.stderr


RACE_FLAGS = (
    "-fsanitize=thread",
    "-Wno-tsan",
    "-DVECNORM_HOST_THREADS",
    "-DVECNORM_BLOCK_THREADS=64",
)


def test_races(tmp_path):
    """Under ThreadSanitizer, with a host thread for each thread of a block."""
    result = run(build(tmp_path, *RACE_FLAGS), "races")
    assert result.returncode == 0, result.stdout + result.stderr


BARRIER = "__syncthreads();"


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param((f"{BARRIER}  // every thread", "// every thread", 0), id="count"),
        pytest.param(("r < at.end; r += at", "r <= at.end; r += at", 0), id="row"),
        pytest.param(
            ("at.width = kSlabLanes", "at.width = kSlabLanes - 1", 0), id="lane"
        ),
        *(pytest.param((BARRIER, "", i), id=f"barrier {i}") for i in (0, 1)),
    ],
)
def test_harness_catches(tmp_path, mutation):
    """A planted missing barrier, and a planted off-by-one."""
    assert run(build(tmp_path, mutate=mutation), "small").returncode != 0


def test_harness_catches_a_race(tmp_path):
    program = build(tmp_path, *RACE_FLAGS, mutate=(BARRIER, "", 1))
    result = run(program, "races")
    assert "data race" in result.stderr


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_compiles_without_spills(tmp_path):
    """For every architecture, with a CUDA compiler alone; the table goes to build/."""
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-c", "csrc/cuda/kernels.cu"]
    table, spills = ["arch  registers  shared  spilled  kernel"], []
    for arch in ARCHITECTURES:
        result = subprocess.run(
            [*command, f"-arch=sm_{arch}", "-o", tmp_path / f"{arch}.o"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        kernels = re.findall(
            r"Function properties for \S*?([a-z]+_kernel)\S*\n"
            r".*?(\d+) bytes spill stores.*\n"
            r".*?Used (\d+) registers.*?(\d+) bytes smem",
            result.stderr,
        )
        assert len(kernels) == 3, result.stderr
        for name, spilled, registers, shared in kernels:
            table.append(f"{arch:4}  {registers:>9}  {shared:>6}  {spilled:>7}  {name}")
            spills.append(int(spilled))
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "cuda-registers.txt").write_text("\n".join(table) + "\n")
    assert max(spills) <= SPILL_LIMIT, "\n".join(table)
