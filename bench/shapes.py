# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Our transform beside torchrl's at the shapes that people have, and in special calls.

One key on the CPU. From one robot's joints to pixels [4, 84, 84] of some environments;
frozen, in other dtypes, with a partial reset, and on statistics in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict
from torch import multiprocessing as mp

from bench import measure, peers
from torchrl_vecnorm import VecNorm
from torchrl_vecnorm.statistics.shared_td import build_shared_td

KEY = "key0"  # as peers.vecnorm has it
UPDATE, FROZEN, MASKED, SHARED = "update", "frozen", "partial reset", "shared"
DTYPES = ("float16", "bfloat16", "uint8")
SPECIAL = (FROZEN, *DTYPES, MASKED, SHARED)

#: Where special calls are timed.
SOME = ((1, 8), (64, 64), (4096, 64), (1, 28224), (8, 28224), (64, 28224))


def calls(
    n: int, features: int, kind: str
) -> tuple[dict[str, Callable], dict[str, str]]:
    """What is timed at one size, and why some cannot be had."""
    dtype = getattr(torch, kind) if kind in DTYPES else torch.float32
    x = measure.random(n, features, dtype, "cpu")
    y = torch.empty_like(x)
    found: dict[str, Callable] = {peers.COPY: lambda: y.copy_(x)}
    reasons = {}
    for name, make in {
        peers.TRANSFORM: partial(peers.vecnorm, [KEY]),
        peers.TORCHRL: partial(peers.torchrl_vecnorm, [KEY]),
    }.items():
        try:
            found[name] = _call(make, x, kind)
            found[name]()
        except Exception as error:
            found.pop(name, None)
            reasons[name] = peers.reason(error)
    return found, reasons


def _call(make: Callable, x: torch.Tensor, kind: str) -> Callable:
    n, features = x.shape
    td = TensorDict({KEY: x}, [n])
    transform = make()
    if kind == SHARED:
        transform = _shared(type(transform), features)
    if kind == MASKED:
        before = TensorDict({"_reset": torch.arange(n).reshape(n, 1) % 2 == 0}, [n])

        def reset() -> None:
            td._tensordict[KEY] = x
            transform._reset(before, td)

        return reset
    for _ in range(3):
        transform._call(td.copy())
    if kind == FROZEN:
        transform.freeze()

    def call() -> None:
        # As an environment does: the values are new at each call.
        td._tensordict[KEY] = x
        transform._call(td)

    return call


def _shared(kind: type, features: int):
    if kind is VecNorm:
        return VecNorm([KEY], shared_td=build_shared_td({KEY: [features]}, False))
    td = TensorDict(
        {
            f"{KEY}_sum": torch.zeros(features),
            f"{KEY}_ssq": torch.zeros(features),
            f"{KEY}_count": torch.zeros(1),
        },
        [],
    ).share_memory_()
    return kind([KEY], shared_td=td, lock=mp.Lock(), new_api=False)
