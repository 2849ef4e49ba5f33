# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""rsl_rl in mjlab, MuJoCo-Warp's worlds on the CPU: trained with its normaliser and ours."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchrl_vecnorm

PACKAGE = Path(torchrl_vecnorm.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mjlab") is None,
    reason="needs mjlab, which make interop installs aside",
)

WORLDS, ITERATIONS = 64, 3
STEPS = 32  # of a world, an iteration


def train(which: str, folder: Path) -> dict:
    script = Path(__file__).parent / "mjlab_train.py"
    result = subprocess.run(
        [sys.executable, script, which, folder, str(WORLDS), str(ITERATIONS)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PACKAGE)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_trains_as_with_theirs(tmp_path):
    """The first rewards are the same; later ones drift with float32 roundings."""
    ours, theirs = (train(which, tmp_path / which) for which in ("ours", "theirs"))
    assert (
        ours["normalisers"].keys()
        == theirs["normalisers"].keys()
        == {"actor", "critic"}
    )
    for name, mine in ours["normalisers"].items():
        other = theirs["normalisers"][name]
        assert mine["class"] == "torchrl_vecnorm.interop.rsl_rl"
        assert other["class"].startswith("rsl_rl.")
        assert mine["count"] == other["count"] == WORLDS * STEPS * ITERATIONS
        assert mine["mean"] == pytest.approx(other["mean"], rel=0.02, abs=0.02)
        assert mine["std"] == pytest.approx(other["std"], rel=0.02, abs=0.02)
    rewards = ours["rewards"], theirs["rewards"]
    assert len(rewards[0]) == len(rewards[1]) == STEPS * ITERATIONS
    assert rewards[0][:8] == pytest.approx(rewards[1][:8], rel=1e-4)
    assert sum(rewards[0]) == pytest.approx(sum(rewards[1]), rel=0.02)
