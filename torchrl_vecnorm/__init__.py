# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's VecNorm transform as one fused, compiled operator."""

from torchrl_vecnorm import functional
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.transforms import VecNorm, VecNormV2

__all__ = ["Moments", "VecNorm", "VecNormV2", "functional"]
__version__ = "0.2.0"
