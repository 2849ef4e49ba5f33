# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TorchRL's VecNorm transform as one fused, compiled operator.

``RunningNorm``, ``ReturnNorm``, ``functional`` and ``merge_states`` need torch alone; torchrl and
tensordict are imported when one of the transforms is first asked for.
"""

from typing import TYPE_CHECKING

from torchrl_vecnorm import functional
from torchrl_vecnorm.merging import merge_states
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.return_norm import ReturnNorm
from torchrl_vecnorm.running_norm import RunningNorm

if TYPE_CHECKING:
    from torchrl_vecnorm.transforms import VecNorm, VecNormReturn, VecNormV2

_TRANSFORMS = ("VecNorm", "VecNormReturn", "VecNormV2")
__all__ = [
    "Moments",
    "ReturnNorm",
    "RunningNorm",
    "VecNorm",
    "VecNormReturn",
    "VecNormV2",
    "functional",
    "merge_states",
]
__version__ = "0.2.0"


def __getattr__(name: str):
    if name in _TRANSFORMS:
        from torchrl_vecnorm import transforms

        globals().update({name: getattr(transforms, name) for name in _TRANSFORMS})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
