# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Transforms for TorchRL's environments, in front of ``torchrl_vecnorm.statistics``."""

from torchrl_vecnorm.transforms.vecnorm import VecNorm

__all__ = ["VecNorm"]
