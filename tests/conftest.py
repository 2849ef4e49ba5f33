# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    packages = config.getoption("--sanitized")
    if packages is not None:
        from torchrl_vecnorm import _C

        # Or the tests would be of the usual build.
        loaded = Path("/proc/self/maps").read_text()
        assert Path(_C.__file__).is_relative_to(packages.resolve())
        assert "libasan" in loaded


#: What takes longest, first: at the end one worker would wait for the other.
LONG = ("test_cuda_host.py", "test_cpu_host.py", "test_examples.py", "test_long_run.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="compile the CUDA kernels for every GPU; takes minutes",
    )
    parser.addoption(
        "--sanitized",
        type=Path,
        help="only with a build under sanitizers, which this folder has: `make sanitize`",
    )
    parser.addoption(
        "--updates", type=int, default=2000, help="of each process in test_sharing.py"
    )
    parser.addoption("--workers", type=int, help="processes in test_sharing.py")
    parser.addoption(
        "--calls",
        type=int,
        default=100,
        help="of groups of 4 and 8 in test_ranks.py; 1,000 of them take minutes",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=12,
        help="how many ranks test_rank_faults.py kills; 200 of them take a minute",
    )
    parser.addoption(
        "--mutations",
        type=int,
        default=1_000,
        help="how many damaged checkpoints are loaded; test-all takes 4,000",
    )
