# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
import pytest
import torch


def pytest_collection_modifyitems(items):
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
        "--mutations",
        type=int,
        default=20_000,
        help="how many damaged checkpoints are loaded; CI takes 100,000",
    )
