# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One list of sample inputs, for correctness, gradients and opcheck alike.

Imports torch alone, as do the tests of the operators and of RunningNorm.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from torchrl_vecnorm import Moments

#: Tests of a number as an input of a compiled graph.
NUMBERS_ARE_INPUTS = pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"),
    reason="this torch compiles a graph for each value of a number, eight at most",
)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,  # no kernel of its own
)

# Tails of tiles, of rows taken together, of chunks and of blocks of features.
SHAPES = (
    ((0,), (3,)),
    ((), ()),
    ((), (5,)),
    ((1,), (1,)),
    ((2,), (129,)),
    ((3,), (4097,)),
    ((15,), (33,)),
    ((17,), (31,)),
    ((33,), (64,)),
    ((129,), (1,)),
    ((129,), (3,)),
    ((1134,), (63,)),
    ((1134,), (65,)),
    ((4, 5), (2, 3)),
    ((2, 3, 7), (7,)),
    ((513,), (100,)),
    ((8193,), (2,)),
    ((20001,), (16,)),
    ((300,), (5000,)),
)


def data(samples, features, dtype=torch.float32, loc=3.0, scale=2.0) -> Tensor:
    """Normal values, of another mean and scale for each feature."""
    count = torch.Size(features).numel()
    spread = torch.linspace(0.5, 1.5, max(count, 1), dtype=torch.float64)[:count]
    x = torch.randn((*samples, *features), dtype=torch.float64)
    x = x * scale * spread.reshape(features) + loc * spread.reshape(features)
    if dtype is torch.bool:
        return x > loc
    if not dtype.is_floating_point:
        return x.abs().to(dtype)
    return x.to(dtype)


def transposed(x: Tensor) -> Tensor:
    """The same values, the samples next to each other in memory."""
    return x.mT.contiguous().mT


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def padded(x: Tensor) -> Tensor:
    """The same values, rows apart from each other and misaligned."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def batch_strided(x: Tensor) -> Tensor:
    """The same values with batch dimensions that no single stride describes."""
    wide = torch.zeros(x.shape[0], 2, *x.shape[1:], dtype=x.dtype)
    wide[:, 0] = x
    return wide[:, 0]


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    transposed,
    strided,
    padded,
    batch_strided,
)


@dataclass
class Sample:
    """Arguments of ``torch.ops.torchrl_vecnorm.update`` but for the numbers."""

    name: str
    x: list[Tensor]
    states: list[Moments]
    mask: list[Tensor]


def op_samples(requires_grad: bool = False) -> list[Sample]:
    """Calls with one key and several, with and without masks and counters."""

    def leaf(*shape, dtype=torch.float32):
        x = data(shape[:1], shape[1:], dtype)
        return x.requires_grad_(requires_grad and dtype.is_floating_point)

    uncounted = Moments.zeros([3], dtype=torch.float32)._replace(nonfinite=None)
    seen = Moments(
        torch.tensor([2.0, 4.0], dtype=torch.float64),
        torch.tensor([6.0, 20.0], dtype=torch.float64),
        torch.tensor([2.0], dtype=torch.float64),
        torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64),
    )
    return [
        Sample("one key", [leaf(7, 3)], [Moments.zeros([3])], []),
        Sample("one number", [leaf(1)[0]], [Moments.zeros([])], []),
        Sample("seen before", [leaf(40, 2)], [seen], []),
        Sample("the reference's layout", [leaf(9, 3)], [uncounted], []),
        Sample(
            "several keys",
            [leaf(5, 3), leaf(5, 2, 2, dtype=torch.float64), leaf(4, 1)],
            [Moments.zeros([3]), Moments.zeros([2, 2]), Moments.zeros([1])],
            [],
        ),
        Sample(
            "masks",
            [leaf(6, 3), leaf(6, 2)],
            [Moments.zeros([3]), Moments.zeros([2])],
            [
                torch.tensor([True, False, True, True, False, True]),
                torch.empty(0, dtype=torch.bool),
            ],
        ),
        Sample("half", [leaf(8, 4, dtype=torch.float16)], [Moments.zeros([4])], []),
        Sample("integers", [leaf(8, 4, dtype=torch.int32)], [Moments.zeros([4])], []),
    ]


def through_a_file(saved, **kwargs):
    """What another session would load."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, **kwargs)
