# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How values are normalised by statistics: where eps stands, a clip, centring."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

EpsMode = Literal["std_floor", "std_add", "var_add", "var_floor"]

# As the operators number them, and `EpsMode` of csrc/moments.h does.
EPS_MODES: tuple[EpsMode, ...] = ("std_floor", "std_add", "var_add", "var_floor")


#: What an operator takes beside statistics: the fields of a `Rule`. Made at each call, and a
#: plain tuple takes a tenth of the time.
RuleArgs: TypeAlias = "tuple[float, int, float | None, bool]"


class Rule(NamedTuple):
    """What an operator takes beside statistics, in its order.

    Attributes:
        eps: bounds ``scale`` away from 0, in the units of ``x`` (``"std_…"``) or of its
            square (``"var_…"``).
        eps_mode: where it stands, an index of ``EPS_MODES``: ``max(std, eps)``, ``std +
            eps``, ``sqrt(var + eps)`` or ``sqrt(max(var, eps))``.
        clip: normalised values are within ``[-clip, clip]``.
        center: whether the mean is taken away.
    """

    eps: float
    eps_mode: int = 0
    clip: float | None = None
    center: bool = True

    def scale(self, var: Tensor, least: Tensor, seen: Tensor) -> Tensor:
        """The scale of features with these variances, bounded by ``least``.

        Where nothing was seen a deviation of 1 is assumed.
        """
        mode = EPS_MODES[self.eps_mode]
        eps = (
            torch.zeros_like(least) + self.eps
        )  # a number, or one that a graph is given
        var = torch.where(seen, var, 1.0)
        if mode == "var_add":
            var = var + eps
        elif mode == "var_floor":
            var = torch.maximum(var, eps)
        elif mode == "std_floor":
            least = torch.maximum(least, eps)
        scale = torch.where(seen, torch.maximum(var.sqrt(), least), var.sqrt())
        return scale + eps if mode == "std_add" else scale

    def limit(self, y: Tensor) -> Tensor:
        """Y within the clip."""
        return y if self.clip is None else y.clamp(-self.clip, self.clip)


def eps_mode_of(name: str) -> int:
    """The number of a mode."""
    try:
        return EPS_MODES.index(name)
    except ValueError:
        raise ValueError(
            f"expected eps_mode as one of {', '.join(EPS_MODES)}, got {name!r}"
        ) from None
