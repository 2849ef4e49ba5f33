# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Loads the compiled module, or says in one sentence why it cannot be loaded."""

from __future__ import annotations

import torch

_REBUILD = (
    "pip install --no-build-isolation --no-deps --force-reinstall torchrl_vecnorm "
    "(or a path to its source)"
)

try:
    from torchrl_vecnorm._build import torch_version as _built_for
except ModuleNotFoundError as err:
    raise ImportError(
        "torchrl_vecnorm is not compiled here: run `pip install --no-build-isolation .` "
        "in its source folder, and start Python in another folder."
    ) from err

# The C++ ABI of torch changes from release to release, and between CPU and CUDA builds.
if _built_for != torch.__version__:
    raise ImportError(
        f"torchrl_vecnorm was compiled for torch {_built_for}, but torch "
        f"{torch.__version__} is installed; compile it again: {_REBUILD}."
    )

from torchrl_vecnorm import _C  # noqa: E402

__all__ = ["_C"]
