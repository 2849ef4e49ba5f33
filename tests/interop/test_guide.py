# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the guide shows runs, where the libraries are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "other_libraries.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split()[1] for block in BLOCKS])
def test_snippets(block, tmp_path, monkeypatch, quiet):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, GUIDE, "exec"), {"__name__": "__main__"})


def test_every_library_has_one():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("name", ["skrl", "rl_games", "stable_baselines3", "gymnasium"])
def test_neither_torchrl_nor_tensordict(name):
    """rsl_rl imports tensordict itself."""
    code = (
        f"import sys, torchrl_vecnorm.interop.{name}; "
        "assert not {'torchrl', 'tensordict'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
