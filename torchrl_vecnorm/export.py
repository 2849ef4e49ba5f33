# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A normaliser that learns no more, as plain torch: to be shipped inside of a policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Normalizer", "fold_into"]


class Normalizer(nn.Module):
    """``(x - loc) / scale``, clipped, by buffers in float32.

    ``torch.export``, ``torch.jit.script``, ``torch.jit.trace`` and ``torch.onnx.export`` take
    it, and what they make of it is loaded without this package.

    Args:
        loc: the mean, ``[*features]``, float64.
        scale: the deviation, with eps, ``[*features]``, float64.
        clip: outputs are within ``[-clip, clip]``.

    The mean is kept as two float32 numbers: a single one would cost the digits of ``y`` that
    ``mean / std`` has, 4e-3 deviations at 1e5.

    Equivalent to::

        y = ((x.double() - loc) / scale).clamp(-clip, clip).float()
    """

    def __init__(self, loc: Tensor, scale: Tensor, clip: float | None = None) -> None:
        super().__init__()
        high = loc.float()
        self.register_buffer("loc", torch.stack([high, (loc - high).float()]))
        self.register_buffer("scale", scale.float())
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[*samples, *features]``, float32."""
        y = ((x - self.loc[0]) - self.loc[1]) / self.scale
        if self.clip is not None:
            y = y.clamp(-self.clip, self.clip)
        return y


def fold_into(linear: nn.Linear, loc: Tensor, scale: Tensor) -> nn.Linear:
    """A layer that does to raw values what ``linear`` does to normalised ones.

    ``weight / scale`` and ``bias - weight @ (loc / scale)``, computed in float64. In the
    layer's float32 the large terms that cancel cost digits where the mean is many deviations
    from zero, about ``1e-7 * mean / std`` of a weight: :class:`Normalizer` does not.

    Args:
        linear: the layer that follows the normaliser; it is left as it is.
        loc: the mean, ``[features]``, float64.
        scale: the deviation, with eps, ``[features]``, float64.

    Raises:
        TypeError: not a linear layer.
        ValueError: of another number of features.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
    if tuple(loc.shape) != (linear.in_features,):
        raise ValueError(
            f"expected a layer of {tuple(loc.shape)} features, got {linear.in_features}"
        )
    old = linear.weight
    new = nn.Linear(
        linear.in_features, linear.out_features, device=old.device, dtype=old.dtype
    )
    with torch.no_grad():
        weight = old.double() / scale.to(old.device)
        bias = 0.0 if linear.bias is None else linear.bias.double()
        new.weight.copy_(weight)
        new.bias.copy_(bias - weight @ loc.to(old.device))
    return new
