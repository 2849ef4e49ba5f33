# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The examples run; ``make demo`` runs the longer one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.skipif(not EXAMPLES.exists(), reason="away from the source tree")
def test_workers():
    arguments = ["--workers", "2", "--steps", "100"]
    result = subprocess.run(
        [sys.executable, EXAMPLES / "workers.py", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    steps = re.search(r"2 workers, one killed half-way: (\d+) steps", result.stdout)
    # All of the one, some of the other.
    assert 100 <= int(steps[1]) <= 200
    assert "scale" in result.stdout
