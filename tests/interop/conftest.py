# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The drop-ins beside the libraries: `make interop`, in an environment that has them."""

import contextlib
import importlib.util
import io

import pytest

# `make test` collects this folder too: without the libraries there is nothing to test.
# mjlab has an environment of its own, and none of them.
LIBRARIES = ("skrl", "rsl_rl", "rl_games", "stable_baselines3")
if not all(importlib.util.find_spec(name) for name in LIBRARIES):
    collect_ignore_glob = ["test_[!m]*.py"]


@pytest.fixture
def quiet():
    """Libraries print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
