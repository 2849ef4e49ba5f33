# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Puts classes in place of those that a library constructs itself, and takes them out."""

from __future__ import annotations

import sys


def replace(package: str, classes: dict[type, type]) -> None:
    """In all modules of a package that were imported, each class becomes another one.

    What is imported later finds them where the library has them from.
    """
    for path, module in list(sys.modules.items()):
        if path != package and not path.startswith(f"{package}."):
            continue
        for old, new in classes.items():
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)
