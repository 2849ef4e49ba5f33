# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The engine: running statistics of named keys of tensordicts, and values normalised.

It knows tensors and tensordicts, and nothing of environments: what is reset, frozen or
evaluated is the business of what is in front of it (``torchrl_vecnorm.transforms``).
"""

from torchrl_vecnorm.statistics.averages import Averages
from torchrl_vecnorm.statistics.engine import Statistics

__all__ = ["Averages", "Statistics"]
