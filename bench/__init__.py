# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Measures the project against others; `make bench` and `make gpu-check` start it."""

import re
from pathlib import Path


def results_folder(device_name: str) -> Path:
    """Where results of a machine go."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device_name).strip("-")
    return Path(__file__).parent / "results" / name
