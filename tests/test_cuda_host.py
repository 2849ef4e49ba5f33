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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: 8.6 and 8.9 have the registers and instructions of 8.0, 10.0 those of its neighbours here.
ARCHITECTURES = (75, 80, 90, 120)
#: Without and with clusters; CI compiles for all.
FEW_ARCHITECTURES = (80, 90)
#: two_kernels.cu: accumulate, normalize, denormalize. fused.cu: cluster and resident. For
#: five types each. returns.cu: one block, and more.
KERNELS = {
    "csrc/cuda/two_kernels.cu": 15,
    "csrc/cuda/fused.cu": 10,
    "csrc/cuda/returns.cu": 2,
}

COMPILER = shutil.which("g++") or shutil.which("c++")
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists(), reason="away from the source tree"
)


HOST_SOURCES = ("csrc/cuda/kernels.cpp", "csrc/cuda/plan.cpp")
#: A fiber for each thread is slow: the kernels take any number of them from 64 on.
SMALL_BLOCKS = ("-DVECNORM_BLOCK_THREADS=128", "-DVECNORM_FUSED_THREADS=128")


def build(folder: Path, *flags: str, mutate: tuple | None = None) -> Path:
    """Compiles the check; ``mutate`` = (file, old, new, i) replaces the i-th old by new."""
    source = folder / "source"
    for part in ("csrc", "tests/cuda_host"):
        shutil.copytree(ROOT / part, source / part)
    for header in ("cases.h", "returns_cases.h"):
        shutil.copy(ROOT / "tests" / header, source / "tests")
    if mutate is not None:
        name, old, new, index = mutate
        path = source / "csrc" / "cuda" / name
        pieces = path.read_text().split(old)
        assert len(pieces) > index + 1, f"{old!r} is not there to be replaced"
        before, after = pieces[: index + 1], pieces[index + 1 :]
        path.write_text(old.join(before) + new + old.join(after))
    command = [COMPILER, "-std=c++20", "-g", "-I.", "-pthread", *flags]
    command += ["-U_FORTIFY_SOURCE"]  # fibers jump where it lets nobody
    command += [
        '-DVECNORM_CUDA_ON_HOST="tests/cuda_host/emulation.h"',
        "-c",
        "-x",
        "c++",
    ]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(
                subprocess.run,
                [*command, file, "-o", source / f"{Path(file).stem}.o"],
                cwd=source,
                capture_output=True,
                text=True,
            )
            for file in ("tests/cuda_host/check.cpp", *HOST_SOURCES, *KERNELS)
        ]
        for job in jobs:
            assert job.result().returncode == 0, job.result().stderr
    program = folder / "check"
    objects = [str(path) for path in source.glob("*.o")]
    subprocess.run([COMPILER, "-pthread", *flags, *objects, "-o", program], check=True)
    return program


def run(program: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *args], capture_output=True, text=True, timeout=300)


RACE_FLAGS = (
    "-O1",
    "-fsanitize=thread",
    "-Wno-tsan",
    "-DVECNORM_HOST_THREADS",
    "-DVECNORM_BLOCK_THREADS=64",
    "-DVECNORM_FUSED_THREADS=64",
)
MEMORY_FLAGS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def output_of(folder: Path, flags: tuple[str, ...], *extents: str) -> str:
    """What the check prints of the last of the extents: "few", "small" or "" for all."""
    program = build(folder, *flags)
    for extent in extents:
        result = run(program, *filter(None, [extent]))
        assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def paths_taken(output: str) -> list[int]:
    """How many calls took each of the paths, all of them with the right results."""
    assert "\n0 differences" in output
    taken = re.search(r"(\d+) clusters, (\d+) resident, (\d+) two kernels", output)
    return [int(n) for n in taken.groups()]


@pytest.mark.slow
def test_kernels(tmp_path):
    output = output_of(tmp_path, ("-O1", *SMALL_BLOCKS), "few", "")
    assert min(paths_taken(output)) > 100, output


@pytest.mark.slow
def test_memory(tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    output = output_of(tmp_path, (*MEMORY_FLAGS, *SMALL_BLOCKS), "small")
    assert min(paths_taken(output)) > 50, output


@pytest.mark.slow
def test_races(tmp_path):
    """Under ThreadSanitizer, with a host thread for each thread of a block."""
    output_of(tmp_path, RACE_FLAGS, "few")


BARRIER = "__syncthreads();"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(
            ("block.cuh", "step(i, n - i);", "step(i, n - i - 1);", 0), id="row"
        ),
        pytest.param(
            ("fused.cu", "if (i < n) {", "if (i < n - 1) {", 0), id="last row"
        ),
        pytest.param(
            ("fused.cu", "    cluster_arrive();\n    cluster_wait();\n", "", 0),
            id="cluster barrier",
        ),
        pytest.param(
            ("fused.cu", "      cluster_wait();\n", "", 0), id="cluster leave"
        ),
        pytest.param(
            ("fused.cu", "    wait_for_slab(", "    (void)(", 0), id="slab barrier"
        ),
        pytest.param(("block.cuh", BARRIER, "", 1), id="barrier"),
    ],
)
def test_harness_catches(tmp_path, mutation):
    """A planted missing barrier, and a planted off-by-one."""
    assert (
        run(build(tmp_path, "-O0", *SMALL_BLOCKS, mutate=mutation), "few").returncode
        != 0
    )


@pytest.mark.slow
def test_harness_catches_a_race(tmp_path, monkeypatch):
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")
    mutation = ("block.cuh", BARRIER, "", 2)
    program = build(tmp_path, *RACE_FLAGS, mutate=mutation)
    result = run(program, "few")
    assert "data race" in result.stderr


def compile_with_nvcc(source: str, arch: int, tmp_path: Path) -> list[tuple]:
    """(arch, registers, spilled bytes, kernel, type) of the kernels in a source file."""
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{arch}", "-c"]
    target = tmp_path / f"{Path(source).stem}-{arch}.o"
    result = subprocess.run(
        [*command, source, "-o", target], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    kernels = re.findall(
        r"Function properties for \S*?([a-z]+_kernel)(?:I(\S+?)EEv|E)N\S*\n"
        r".*?(\d+) bytes spill stores.*\n"
        r".*?Used (\d+) registers",
        result.stderr,
    )
    assert len(kernels) == KERNELS[source], result.stderr
    return [
        (arch, int(registers), int(spilled), name, re.sub(r".*\d+", "", kind))
        for name, kind, spilled, registers in kernels
    ]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_compiles_without_spills(tmp_path, request):
    """With a CUDA compiler alone; the table of registers goes to build/."""
    few = not request.config.getoption("--all-architectures")
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_with_nvcc, source, arch, tmp_path)
            for arch in (FEW_ARCHITECTURES if few else ARCHITECTURES)
            for source in KERNELS
        ]
        rows = [row for job in jobs for row in job.result()]
    table = "arch  registers  spilled  kernel\n" + "".join(
        f"{arch:4}  {registers:9}  {spilled:7}  {name} {kind}\n"
        for arch, registers, spilled, name, kind in rows
    )
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "cuda-registers.txt").write_text(table)
    assert not any(spilled for _, _, spilled, _, _ in rows), table
