# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Builds the compiled part of torchrl_vecnorm; all metadata is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as err:
    # torch is not a build requirement: an isolated build would fetch a torch of its
    # own, and the extension would not load with the one that is installed.
    sys.exit(
        f"torchrl_vecnorm is compiled against your PyTorch, but this build does not see it "
        f"({err}).\nInstall PyTorch first, then run:\n\n"
        f"    pip install setuptools ninja pybind11 && "
        f"pip install --no-build-isolation {ROOT if ROOT.exists() else '.'}\n"
    )


def _flag(name: str) -> bool:
    return os.getenv(name, "0").strip().lower() in ("1", "true", "yes", "on")


class build_ext(BuildExtension):
    """Records the torch that the extension was built for, for the check on import."""

    def run(self) -> None:
        """Builds, then writes the record."""
        super().run()
        target = ROOT if self.inplace else Path(self.build_lib)
        (target / "torchrl_vecnorm" / "_build.py").write_text(
            '"""Written by setup.py: what the extension was built for."""\n\n'
            f'torch_version = "{torch.__version__}"\n'
        )


def _extension():
    debug = _flag("DEBUG")
    flags = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
    sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.cpp"))]
    return CppExtension(
        "torchrl_vecnorm._C",
        sources,
        # setuptools rebuilds when one of these changes.
        depends=[str(p) for p in (ROOT / "csrc").rglob("*.h")],
        extra_compile_args={"cxx": flags},
    )


setup(
    ext_modules=[_extension()],
    cmdclass={"build_ext": build_ext},
)
