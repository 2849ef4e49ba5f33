# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Builds the compiled part of torchrl_vecnorm; all metadata is in pyproject.toml.

The environment variables are those of every PyTorch extension: FORCE_CUDA=1,
TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, DEBUG=1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent

# A new environment of Python 3.11 has 65, which reads another form of pyproject.toml.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"torchrl_vecnorm needs setuptools 77 or newer to be built, and this is "
        f"{setuptools.__version__}: run `pip install 'setuptools>=77'` first."
    )

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension
except ModuleNotFoundError as err:
    # torch is not a build requirement: an isolated build would fetch a torch of its
    # own, and the extension would not load with the one that is installed. A source
    # distribution needs none.
    if {"egg_info", "sdist"}.isdisjoint(sys.argv):
        sys.exit(
            f"torchrl_vecnorm is compiled against your PyTorch, but this build does not see "
            f"it ({err}).\nInstall PyTorch first, then run:\n\n"
            f"    pip install 'setuptools>=77' ninja pybind11 && "
            f"pip install --no-build-isolation {ROOT if ROOT.exists() else '.'}\n"
        )
    torch, BuildExtension = None, setuptools.Command

# What is compiled where no GPU tells; a list of torch's own would need one.
# PTX of 9.0 is for those between, like 11.0.
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"


def flag(name: str) -> bool:
    """Whether an environment variable is switched on."""
    return os.getenv(name, "0").strip().lower() in ("1", "true", "yes", "on")


def cuda_home() -> Path | None:
    """The CUDA toolkit, also where torch is a CPU build and does not look for one."""
    home = os.getenv("CUDA_HOME") or os.getenv("CUDA_PATH") or cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        return None
    home = Path(home or Path(nvcc).resolve().parents[1])
    if not (home / "include" / "cuda_runtime_api.h").is_file():
        # A script in the place of nvcc starts another one, which knows where it is.
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        found = re.search(r"TOP=(\S+)", dryrun.stderr)
        if found is None:
            return None
        home = Path(found.group(1))
    return home.resolve()


def nvcc_version(home: Path) -> str | None:
    """The toolkit's version, like "13.0"."""
    output = subprocess.run(
        [home / "bin" / "nvcc", "--version"], capture_output=True, text=True
    ).stdout
    found = re.search(r"release (\d+\.\d+)", output)
    return found.group(1) if found else None


def build_cuda() -> bool:
    """TorchRL's rule: where torch is a CUDA build and nvcc has the same version."""
    home = cuda_home()
    if flag("FORCE_CUDA"):
        if home is None:
            sys.exit("FORCE_CUDA=1, but there is no nvcc: set CUDA_HOME or PATH.")
        return True
    if torch.version.cuda is None:
        return False
    found = None if home is None else nvcc_version(home)
    if found != torch.version.cuda:
        warnings.warn(
            f"torchrl_vecnorm: torch was built with CUDA {torch.version.cuda}, nvcc is "
            f"{found or 'not there'}: CUDA tensors will run as plain torch operations. "
            "FORCE_CUDA=1 builds the kernels all the same.",
            stacklevel=2,
        )
        return False
    return True


def sources(pattern: str) -> list[str]:
    """Source files, relative to the project."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(pattern))


class build_ext(BuildExtension):
    """Compiles CUDA kernels with nvcc itself, and records the torch that it built for.

    Kernels include no torch header, so they need nothing of torch's own CUDA support,
    which a CPU build of torch does not have.
    """

    def build_extension(self, ext) -> None:
        """Adds the kernels' objects to an extension that has CUDA sources."""
        home = cuda_home()
        for source in ext.cuda_sources:
            target = Path(self.build_temp).resolve() / f"{source}.o"
            newest = max(Path(p).stat().st_mtime for p in [source, *ext.depends])
            if not target.exists() or target.stat().st_mtime < newest:
                target.parent.mkdir(parents=True, exist_ok=True)
                command = [home / "bin" / "nvcc", "-c", source, "-o", target]
                command += ["-Xcompiler", "-fPIC", "--threads", "0"]
                command += ["-O0", "-g", "-G"] if flag("DEBUG") else ["-O3"]
                command += cpp_extension._get_cuda_arch_flags()
                print(*command, flush=True)
                subprocess.run(command, check=True)
            ext.extra_objects.append(str(target))
        super().build_extension(ext)

    def run(self) -> None:
        """Builds, then writes the record."""
        if self.editable_mode:
            # setuptools would have it in an empty folder, and compile all once more.
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", f"temp.{tag}")
        super().run()
        target = ROOT if self.inplace else Path(self.build_lib)
        (target / "torchrl_vecnorm" / "_build.py").write_text(
            '"""Written by setup.py: what the extension was built for."""\n\n'
            f'torch_version = "{torch.__version__}"\n'
            f"has_cuda = {bool(self.extensions[0].cuda_sources)}\n"
        )


def extension():
    """The module torchrl_vecnorm._C."""
    flags = ["-O0", "-g"] if flag("DEBUG") else ["-O3", "-g0"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
    # No number changes by these. For the sake of flags that a comparison may raise, and of
    # errno after a root, which nobody reads, GCC keeps loops with one from becoming packs.
    flags += ["-fno-trapping-math", "-fno-math-errno"]
    # The team of threads is OpenMP (csrc/torch/ops.cpp): without the flag it is one thread.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []
    if sys.platform == "darwin":
        openmp = []  # Apple's compiler does not know it
    ext = cpp_extension.CppExtension(
        "torchrl_vecnorm._C",
        [s for s in sources("*.cpp") if "cuda" not in s],
        # setuptools rebuilds when one of these changes.
        depends=sources("*.h") + sources("*.inl") + sources("*.cuh"),
        extra_compile_args={"cxx": flags + openmp},
        extra_link_args=openmp,
    )
    ext.cuda_sources = []
    if build_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        home = cuda_home()
        ext.cuda_sources = sources("*.cu")
        ext.sources += [s for s in sources("*.cpp") if "cuda" in s]
        ext.define_macros.append(("VECNORM_WITH_CUDA", None))
        ext.include_dirs.append(str(home / "include"))
        ext.library_dirs += [str(home / "lib64"), str(home / "lib")]
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
    return ext


setuptools.setup(
    ext_modules=[extension()] if torch else [], cmdclass={"build_ext": build_ext}
)
