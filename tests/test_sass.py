# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The machine code of the CUDA kernels: what decides their speed, and no test on the host
can see. A table of it goes to build/cuda-sass.txt.
"""

import hashlib
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import sass
from sass import Kernel, in_flight

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
SOURCES = ("two_kernels", "fused", "returns")
#: Vectors of a thread in registers (held_of() in plan.h), and values of a vector.
HELD = {"float": 8, "double": 8, "Float16": 3, "BFloat16": 3, "uint8": 8}
VALUES = {"float": 4, "double": 2, "Float16": 8, "BFloat16": 8, "uint8": 4}
#: Vectors that a thread asks for before it reads the state: of a launch that sums, and of one
#: that maps. (One of eight small ones takes its own address's register.)
FIRST = {"float": (8, 4), "double": (8, 4), "Float16": (4, 4), "BFloat16": (4, 4)}
FIRST["uint8"] = (7, 4)
#: Vectors under way in the loops that sum rows, of two launches and of one.
SUMMED = {"float": (8, 4), "double": (8, 4), "Float16": (4, 4), "BFloat16": (4, 4)}
SUMMED["uint8"] = (8, 4)
#: Instructions a value where rows are mapped: load, convert, map, clip (two of float, six of
#: double), convert, store, and what the loop itself takes.
MOST_MAPPED = {"float": 8.75, "double": 17.75, "Float16": 8.0, "BFloat16": 8.0}
MOST_MAPPED["uint8"] = 9.5
#: Values under way where a key has no vectors: summed, in float and in double, and mapped.
SINGLE = (16, 8, 8)
#: Of vectors, where what float cannot sum is summed again: values that are not finite.
AGAIN = 4
#: Of rewards and their returns, of any type: rows under way where they go on.
RETURNS = ("alone", "together")
ROWS_OF_RETURNS = 8
#: Instructions before a kernel asks for its first value: where that is, not the state.
MOST_BEFORE = 150


def disassembler() -> str | None:
    """That of the package index, or the toolkit's own."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    return shutil.which("nvdisasm")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
    pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm"),
]


def disassemble(source: Path, arch: int, folder: Path) -> dict[str, Kernel]:
    """The kernels of a source file, kept in a folder by what they are made of."""
    digest = hashlib.sha256(f"{NVCC} {arch} {source.name}".encode())
    for path in sorted(source.parents[1].rglob("*.*")):
        if path.parent.name in ("csrc", "cuda") and path.suffix != ".cpp":
            digest.update(path.read_bytes())
    target = folder / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.sass"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cubin = target.with_suffix(f".{os.getpid()}.cubin")
        command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", source]
        subprocess.run([*command, "-o", cubin], check=True)
        text = subprocess.run(
            [disassembler(), "-c", cubin], check=True, capture_output=True, text=True
        ).stdout
        whole = cubin.with_suffix(".part")
        whole.write_text(text)
        whole.rename(target)  # others may want it at the same time
        cubin.unlink()
    return sass.parse(target.read_text())


def split(name: str) -> tuple[str, str]:
    """``accumulate``, ``float``; the second one is empty where a kernel is for all types."""
    role, _, kind = name.rstrip(">").partition("<")
    return role, kind


def of_value(kernel: Kernel) -> str:
    """How a vector, or a value of a return, is loaded, as a regular expression."""
    if kernel.name in RETURNS:
        return r"LDG\.E\.64"
    return r"LDG\.E$" if "uint8" in kernel.name else r"LDG\.E\.128"


def row(kernel: Kernel) -> dict[str, float]:
    """What there is to say of a kernel."""
    role, kind = split(kernel.name)
    load = of_value(kernel)
    loops = [(span, kernel.within(span)) for span in kernel.loops()]
    stores = r"STG\.E\.EF\.128"
    # What is not of doubles is only summed again in double.
    sums = [
        in_flight(c, load)
        for s, c in loops
        if not kernel.count("STG" if kind == "double" else "STG|DFMA", s)
    ]
    maps = [s for s, _ in loops if kernel.count(stores, s) and kernel.count("LDG", s)]
    # The loop over what other blocks have found reads nothing else.
    partial = r"LD\.E\.64" if role == "cluster" else r"LDG\.E\.64"
    partials = [
        in_flight(c, partial)
        for s, c in loops
        if kernel.count("LD.?[.]", s) == kernel.count(partial, s)
        and not kernel.count("STG", s)
    ]
    table: dict[str, float] = {
        "instructions": len(kernel.code),
        "before": kernel.before_first(load),
        "at first": in_flight(kernel.code[: kernel.before_first("BAR")], load),
        "sums": max(sums, default=0),
        "partials": max(partials, default=0),
        "local": kernel.count("LDL|STL"),
        "constant": kernel.count(r"LDG.*CONSTANT"),
        "generic": kernel.count(r"LD\.E") if role != "cluster" else 0,
        "divisions": kernel.count(r"I2F\.\S*RP", range(kernel.before_first("LDG"))),
    }
    if role in ("accumulate", "cluster", "resident") and kind != "double":
        # In double, from memory alone, and values of one type.
        again = [
            in_flight(c, r"LDG\.E(\.64|\.128)?$")
            for s, c in loops
            if kernel.count("DFMA", s)
            and kernel.count(r"LDG\.E(\.64|\.128)?$", s)
            and not kernel.count(r"LDS|STS|STG|LDG\.E\.U16", s)
        ]
        table["again"] = min(again, default=0)
    if kind == "float":
        # Of every type: no others load bytes and halves, and nothing from shared memory.
        single = [
            (s, c)
            for s, c in loops
            if kernel.count(r"LDG\.E\.U8", s)
            and kernel.count(r"LDG\.E\.U16", s)
            and not kernel.count("LDS|STS", s)
        ]
        alone = [
            in_flight(c, r"LDG\.E$") for s, c in single if not kernel.count("STG", s)
        ]
        mapped = [in_flight(c, r"LDG\.E$") for s, c in single if kernel.count("STG", s)]
        table["single"] = max(alone, default=0)
        table["double"] = min(alone, default=0)
        table["mapped 1"] = min(mapped, default=0)
    if maps:
        values = VALUES[kind] * kernel.count(stores, maps[0])
        table["mapped"] = (
            len(maps[0]) / values
        )  # what is left of the batches comes after
        table["maps"] = max(in_flight(kernel.within(s), load) for s in maps)
    return table


def follows(kernel: Kernel, opcode: str, other: str, within: int) -> list[bool]:
    """For each opcode, whether the other one comes soon before (or after, if < 0)."""
    found = []
    for i, instruction in enumerate(kernel.code):
        if re.match(opcode, instruction.opcode):
            near = range(i + 1, i + 1 - within) if within < 0 else range(i - within, i)
            found.append(kernel.count(other, near) > 0)
    return found


def faults(kernel: Kernel) -> list[str]:
    """What is not as it should be."""
    role, kind = split(kernel.name)
    fused = role in ("cluster", "resident")
    t = row(kernel)
    wrong = []

    def least(what: str, bound: float) -> None:
        if t[what] < bound:
            wrong.append(f"{what}: {t[what]}, expected at least {bound}")

    def most(what: str, bound: float) -> None:
        if t[what] > bound:
            wrong.append(f"{what}: {t[what]}, expected at most {bound}")

    for what in ("constant", "generic", "divisions", "local"):
        most(what, 0)
    most("before", MOST_BEFORE)
    if fused:
        least("at first", HELD[kind])
    elif role not in RETURNS:
        least("at first", FIRST[kind][role != "accumulate"])
    if fused or role == "accumulate":
        least("sums", SUMMED[kind][fused])
        least("partials", 8 if fused else 16)
    if "again" in t:
        least("again", AGAIN)
    if kind == "float":
        if fused or role == "accumulate":
            least("single", SINGLE[0])
            least("double", SINGLE[1])
        if role != "accumulate":
            least("mapped 1", SINGLE[2])
    if role in RETURNS:
        least("at first", ROWS_OF_RETURNS)
        if role == "together":
            least("partials", 16)
    elif role != "accumulate":
        least("maps", 3 if fused and kind == "double" else 4)
        most("mapped", MOST_MAPPED[kind])
    # What a block wrote goes out before the others are told, and what was cached before
    # they are heard is forgotten.
    fences = []
    if role == "resident":
        fences += follows(kernel, r"REDG?\.E\.ADD", "MEMBAR", 6)
        # One reads the phase, which orders nothing.
        heard = follows(kernel, r"LDG\.E\.STRONG\.GPU", r"CCTL\.IVALL", -6)
        fences.append(sum(heard) >= kernel.count(r"REDG?\.E\.ADD") > 0)
    elif role in ("accumulate", "together"):
        orders = follows(kernel, r"ATOMG", "MEMBAR", 6)
        fences.append(any(orders))
        fences.append(any(follows(kernel, r"ATOMG", r"CCTL\.IVALL", -6)))
    elif role == "cluster" and kernel.count("UCGABAR_ARV"):
        fences.append(any(follows(kernel, "UCGABAR_ARV", "MEMBAR", 8)))
    if not all(fences):
        wrong.append(f"fences: {fences}")
    return [f"{kernel.name}: {w}" for w in wrong]


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for source in SOURCES:
        path = ROOT / "csrc" / "cuda" / f"{source}.cu"
        found |= disassemble(path, 90, ROOT / "build" / "sass")
    return found


def test_the_machine_code(kernels):
    assert len(kernels) == 27
    rows = {name: row(kernel) for name, kernel in sorted(kernels.items())}
    columns = list(dict.fromkeys(c for r in rows.values() for c in r))
    lines = ["sm_90".ljust(24) + "".join(c.rjust(13) for c in columns)]
    for name, values in rows.items():
        cells = (f"{values.get(c, 0):.4g}" if c in values else "" for c in columns)
        lines.append(name.ljust(24) + "".join(c.rjust(13) for c in cells))
    (ROOT / "build" / "cuda-sass.txt").write_text("\n".join(lines) + "\n")
    wrong = [fault for kernel in kernels.values() for fault in faults(kernel)]
    assert not wrong, "\n".join(wrong)


#: The end of the kernels in a source file: the rest starts them.
END = {
    "fused": "}  // namespace\n\nnamespace {\n\ntemplate <typename T>\ncudaError_t allow(",
    "two_kernels": "template <typename T>\ncudaError_t allow(",
    "returns": "bool is_alone(",
}
SOURCE_OF = dict.fromkeys(("cluster", "resident"), "fused")
SOURCE_OF |= dict.fromkeys(RETURNS, "returns")


def of_kernel(name: str, tmp_path: Path, *edits: tuple[str, str, str]) -> Kernel:
    """One kernel, compiled alone, after ``edits`` = (file, old, new) of its sources."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    role, kind = split(name)
    path = csrc / "cuda" / f"{SOURCE_OF.get(role, 'two_kernels')}.cu"
    text, end, _ = path.read_text().partition(END[path.stem])
    assert end
    if kind:
        text += f"template __global__ void {role}_kernel<{kind}>("
        text += "const __grid_constant__ Params);\n"
    path.write_text(text + "}\n}\n}\n")
    for file, old, new in edits:
        text = (csrc / file).read_text()
        assert old in text, f"{old!r} is not there to be replaced"
        (csrc / file).write_text(text.replace(old, new))
    kernels = disassemble(path, 90, tmp_path / "sass")
    return kernels[name.replace("uint8_t", "uint8")]


@pytest.mark.parametrize(
    "name,fault,edits",
    [
        pytest.param(
            "accumulate<BFloat16>",
            "sums",
            [("cuda/two_kernels.cu", "kBatch = kSumBatch<T>;", "kBatch = 1;")],
            id="one row at a time",
        ),
        pytest.param(
            "accumulate<double>",
            "partials",
            [("cuda/two_kernels.cu", "kAtOnce = 16", "kAtOnce = 1")],
            id="one chunk at a time",
        ),
        pytest.param(
            "denormalize<double>",
            "before",
            [("cuda/two_kernels.cu", "  load_batch(0, n);\n  const", "  const")],
            id="the state before the values",
        ),
        pytest.param(
            "cluster<double>",
            "local",
            [("cuda/plan.h", ": 8;", ": 16;")],
            id="too many vectors in registers",
        ),
        pytest.param(
            "normalize<double>",
            "divisions",
            [
                (
                    "cuda/block.cuh",
                    "at.key->by_inner.divide(piece)",
                    "piece / plan.slabs",
                )
            ],
            id="a division",
        ),
        pytest.param(
            "normalize<Float16>",
            "mapped",
            [
                ("dtypes.h", "#ifdef __CUDA_ARCH__", "#if 0"),
                ("dtypes.h", "#if defined(__CUDA_ARCH__)", "#if 0 && defined(NONE)"),
            ],
            id="conversions in integers",
        ),
        pytest.param(
            "accumulate<uint8>",
            "constant",
            [
                ("cuda/two_kernels.cu", "return slab[", "return __ldg(slab + "),
                ("cuda/two_kernels.cu", ") * values + i];", ") * values + i);"),
            ],
            id="what others wrote as if it were constant",
        ),
        pytest.param(
            "resident<double>",
            "fences",
            [("cuda/device.h", "red.release.gpu", "red.relaxed.gpu")],
            id="no release",
        ),
        pytest.param(
            "resident<double>",
            "fences",
            [("cuda/device.h", "ld.acquire.gpu", "ld.relaxed.gpu")],
            id="no acquire",
        ),
        pytest.param(
            "accumulate<Float16>",
            "again",
            [
                (
                    "cuda/block.cuh",
                    "  constexpr int kAtOnce = 4;",
                    "constexpr int kAtOnce = 2;",
                )
            ],
            id="two vectors at a time, again",
        ),
        pytest.param(
            "accumulate<float>",
            "single",
            [("cuda/block.cuh", "kSummedAtOnce = 16", "kSummedAtOnce = 4")],
            id="four single values at a time",
        ),
        pytest.param(
            "denormalize<float>",
            "mapped 1",
            [("cuda/block.cuh", "kValuesAtOnce = 8", "kValuesAtOnce = 2")],
            id="two single values at a time",
        ),
        pytest.param(
            "together",
            "at first",
            [("cuda/block.cuh", "kValuesAtOnce = 8", "kValuesAtOnce = 1")],
            id="one reward at a time",
        ),
    ],
)
def test_what_is_planted_is_found(tmp_path, name, fault, edits):
    found = faults(of_kernel(name.replace("uint8", "uint8_t"), tmp_path, *edits))
    assert any(f.partition(": ")[2].startswith(f"{fault}:") for f in found), found
