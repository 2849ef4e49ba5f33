# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What people meet when an installation goes wrong: one sentence that helps."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import torchrl_vecnorm
from torchrl_vecnorm._load import _C

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="away from the source tree"
)


def run(*args, cwd=ROOT, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, **kwargs
    )


def test_build_without_torch(tmp_path):
    """torch is no build requirement; without it, the command to run is printed."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    result = run("setup.py", "build_ext", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "--no-build-isolation" in result.stderr


def test_build_with_an_old_setuptools(tmp_path):
    """One that a new environment has; it would read pyproject.toml, and not understand."""
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"')
    result = run("setup.py", "build_ext", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "pip install 'setuptools>=77'" in result.stderr


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, which sets nothing up."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("how", ["variable", "torch", "path"])
def test_nvcc_may_be_a_script(setup_py, how, tmp_path, monkeypatch):
    """The toolkit is where headers are; a script in a bin/ is none, though it runs."""
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{shutil.which("nvcc")}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(setup_py.cpp_extension, "CUDA_HOME", None)
    if how == "variable":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    elif how == "torch":
        monkeypatch.setattr(setup_py.cpp_extension, "CUDA_HOME", str(tmp_path))
    else:
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    home = setup_py.cuda_home()
    assert (home / "include" / "cuda_runtime_api.h").is_file()
    assert setup_py.nvcc_version(home) is not None


def test_no_toolkit(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.cuda_home() is None


def test_kernels_know_nothing_of_torch():
    """Outside csrc/torch/ no file includes a torch header."""
    torch_header = re.compile(r'#include [<"](torch|ATen|c10)/')
    found = {
        path.relative_to(ROOT / "csrc").parts[0]
        for path in (ROOT / "csrc").rglob("*.*")
        if torch_header.search(path.read_text())
    }
    assert found == {"torch"}


def test_arrows_run_one_way():
    """Fronts, engine, functions, operators: none knows what is in front of it."""
    package = ROOT / "torchrl_vecnorm"
    imports = re.compile(r"^ *(?:from|import) (torchrl\S*)(?: import (.*))?", re.M)

    def imported(*files: Path) -> set[str]:
        found = set()
        for module, names in imports.findall("\n".join(f.read_text() for f in files)):
            found.add(module)
            if module == "torchrl_vecnorm":
                found |= {f"{module}.{name.strip()}" for name in names.split(",")}
        return found

    def of(*names: str) -> set[str]:
        found = {f"torchrl_vecnorm.{name}" for name in names}
        return {"torchrl_vecnorm", *found} if "_ops" in names else found

    adds_up = imported(package / "totals.py", package / "groups.py")
    assert adds_up == of("_load", "moments")
    ranks = imported(package / "ranks.py")
    assert ranks <= of("_ops", "moments", "totals", "groups")
    below = of("_ops", "_return_ops", "oracle", "moments", "rule", "ranks", "groups")
    assert imported(package / "functional.py") <= below
    now_and_then = imported(package / "syncing.py", package / "merging.py")
    assert now_and_then <= of(
        "_load", "moments", "checks", "totals", "groups", "syncing"
    )
    engine = imported(*(package / "statistics").glob("*.py"))
    assert "torchrl_vecnorm.functional" in engine
    assert not any(re.match(r"torchrl(\.|$)|.*\.transforms", name) for name in engine)


@pytest.mark.parametrize(
    "built_for,message",
    [
        ("1.0.0", "was compiled for torch 1.0.0, but torch"),
        (None, "is not compiled here"),
    ],
)
def test_import_of_another_build(tmp_path, built_for, message):
    package = tmp_path / "torchrl_vecnorm"
    shutil.copytree(
        ROOT / "torchrl_vecnorm",
        package,
        ignore=shutil.ignore_patterns("_build.py", "*.so", "__pycache__"),
    )
    if built_for is not None:
        (package / "_build.py").write_text(f'torch_version = "{built_for}"\n')
    # An editable install of this very source would stand in for what is missing.
    script = (
        "import sys; "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        "import torchrl_vecnorm"
    )
    result = run("-c", script, cwd=tmp_path)
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError")
    assert message in result.stderr


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_nothing_is_left_to_the_linker():
    """Every symbol is there when the module is loaded, but for Python's own."""
    libraries = str(Path(torch.__file__).parent / "lib")
    result = subprocess.run(
        ["ldd", "-r", _C.__file__],
        env={"LD_LIBRARY_PATH": libraries, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"undefined symbol: (\S+)", result.stdout + result.stderr)
    assert found and [s for s in found if not s.startswith(("Py", "_Py"))] == []


def arithmetic(isa: str, of: str) -> list[str]:
    """The floating-point instructions of a function of the CPU kernels, of all its clones."""
    lines = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", _C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "<vecnorm::cpu::" in lines
    if "<vecnorm::not_negative(" in lines:
        pytest.skip("not optimised")
    found = []
    for function in re.split(r"\n\n", lines):
        head, _, body = function.partition("\n")
        if f"vecnorm::cpu::{isa}::" in head and re.search(rf"::{of}[(<]", head):
            instruction = r"\t(v(?:add|sub|mul|div|sqrt|fn?m(?:add|sub)\d+)[sp]d .*)"
            found += re.findall(instruction, body)
    return found


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(b"GCC: (" not in Path(_C.__file__).read_bytes(), reason="GCC's")
@pytest.mark.parametrize("isa, register", [("avx2", "ymm"), ("avx512", "zmm")])
def test_statistics_are_worked_on_in_packs(isa, register):
    """One comparison that GCC takes for a branch, a root that may set errno, or a number
    that may change with what is written, and a loop over features has none: one row of
    pixels then took three times as long.
    """
    least = {"fold_and_project": 60, "project_state": 15, "project": 90}
    for function, number in least.items():
        packs = [i for i in arithmetic(isa, function) if register in i]
        assert len(packs) >= number, function
    # Maps and inverses, of either form of a strip: to floats two packs at a time, to
    # doubles one.
    assert sum("sqrt" in i for i in packs) >= 12


def test_wheel_has_all_packages(tmp_path):
    """What is not listed in pyproject.toml is left out."""
    result = run("setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for pattern in ("*.py", "*.pyi", "py.typed"):
        for source in (ROOT / "torchrl_vecnorm").rglob(pattern):
            if source.name != "_build.py":
                assert (tmp_path / source.relative_to(ROOT)).exists(), source


def test_sdist_has_what_a_build_needs(tmp_path):
    """CI compiles it, and runs its tests; here, that nothing was forgotten.

    Without torch, as an isolated build of it is.
    """
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    arguments = ["sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run("setup.py", "--quiet", *arguments, env=environment)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"torchrl_vecnorm-{torchrl_vecnorm.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    for folder, patterns in {
        "csrc": ("*.h", "*.inl", "*.cpp", "*.cu", "*.cuh"),
        "torchrl_vecnorm": ("*.py", "*.pyi", "py.typed"),
        "tests": ("*.py", "*.h", "*.cpp", "*.txt"),
        "examples": ("*.py",),
        "docs": ("*.py", "*.md", "*.rst", "*.txt"),
    }.items():
        for pattern in patterns:
            for source in (ROOT / folder).rglob(pattern):
                if source.name != "_build.py":
                    assert str(source.relative_to(ROOT)) in names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert {"CHANGELOG.md", "Makefile", "requirements.txt"} <= names
    assert not [name for name in names if name.endswith(("m/_build.py", ".so", ".pyc"))]
