# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Measures the project against others; `make bench` and `make gpu-check` start it."""

import platform
import re
from pathlib import Path


def machine() -> str:
    """The processor and its instructions: hypervisors call different ones the same."""
    import torch  # `make matrix` starts without it

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def results_folder(device_name: str) -> Path:
    """Where results of a machine go."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", device_name).strip("-")
    return Path(__file__).parent / "results" / name
