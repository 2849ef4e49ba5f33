# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A module of an installed library, without what the packages above it import."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import pytest

#: Where `make interop` puts what other libraries would import if they found it.
ASIDE = Path(sys.prefix) / "aside"


def alone(name: str, *without: str) -> ModuleType:
    """The module; the test is skipped where the library is not installed.

    A normaliser is a file of its own: it needs neither the simulators nor the servers that
    ``__init__`` of its packages imports, and that would have to be installed for it.

    Args:
        name: of the module, as one imports it.
        without: what it imports and does not call, as ``module:name``; the module is an empty
            one with that name.
    """
    top, *rest = name.split(".")
    if name not in sys.modules:
        spec = PathFinder.find_spec(top, [*sys.path, str(ASIDE)])
        if spec is None:
            pytest.skip(f"{top} is not installed")
        path = Path(spec.submodule_search_locations[0])
        for i in range(len(rest)):
            package = ".".join([top, *rest[:i]])
            if package not in sys.modules:
                module = ModuleType(package)
                module.__path__ = [str(path.joinpath(*rest[:i]))]
                module.__spec__ = ModuleSpec(package, None, is_package=True)
                sys.modules[package] = module
        for other in without:
            module, _, attribute = other.rpartition(":")
            stand_in = sys.modules.setdefault(module, ModuleType(module))
            stand_in.__path__ = [str(path.joinpath(*module.split(".")[1:]))]
            setattr(stand_in, attribute, object)
    return importlib.import_module(name)
