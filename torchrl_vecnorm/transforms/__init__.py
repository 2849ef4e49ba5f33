# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Transforms for TorchRL's environments, in front of ``torchrl_vecnorm.statistics``."""

from torchrl_vecnorm.transforms.returns import VecNormReturn
from torchrl_vecnorm.transforms.vecnorm import VecNorm
from torchrl_vecnorm.transforms.vecnorm_v2 import VecNormV2

__all__ = ["VecNorm", "VecNormReturn", "VecNormV2"]
