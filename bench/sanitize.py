# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Runs every kernel on small inputs, for compute-sanitizer to look at.

Where there is nvcc, it looks at tests/cuda_host/check.cpp instead, which has no torch in it.

Everything is drawn on the CPU and compared there, so that next to nothing but the
kernels of this project runs on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import measure
from torchrl_vecnorm import functional as F

#: Printed last: without it, the run has not come to its end.
DONE = "every kernel ran"

SHAPES = ((1, 8), (33, 17), (64, 300), (257, 64), (1030, 5), (1500, 128))
TOLERANCE = {torch.float64: 1e-9, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def values(n: int, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values with some that are not finite, where the dtype has such."""
    x = torch.randn(n, features, dtype=torch.float64) * 2 + 3
    if dtype.is_floating_point:
        x[n // 2, 0] = torch.nan
        x[n // 3, -1] = torch.inf
    if dtype is torch.uint8:
        x = x.abs() * 20
    return (x > 3) if dtype is torch.bool else x.to(dtype)


def cases() -> Iterator[tuple[str, list[Tensor], list[Tensor | None] | None]]:
    """Keys of one call, and masks."""
    for shape in SHAPES:
        yield f"{shape}", [values(*shape)], None
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.uint8,  # the larger one is an image, with vectors
        torch.bool,
    ):
        for shape in ((33, 17), (257, 64)):
            yield f"{shape} {dtype}", [values(*shape, dtype)], None
    for shape in ((33, 17), (257, 64), (1030, 5)):
        mask = torch.arange(shape[0]) % 3 != 0
        yield f"{shape} masked", [values(*shape)], [mask]
    keys = [values(65, 8), values(65, 1), values(300, 33, torch.float16)]
    yield "three keys", keys, None
    yield "three keys, one mask", keys, [None, torch.arange(65) % 2 == 0, None]
    yield "thirty keys", [values(20, i + 1) for i in range(30)], None
    yield "transposed", [values(64, 200).T], None
    yield "rows apart", [values(200, 70)[:, 1:-2]], None
    yield "misaligned", [values(1, 64 * 16 + 1).reshape(-1)[1:].view(64, 16)], None
    yield "no samples", [torch.empty(0, 3)], None


def _there(tensors: list[Tensor], device: str) -> list[Tensor]:
    # Strides stay, and so does the offset: both decide which kernel runs.
    copies = []
    for t in tensors:
        storage = t.untyped_storage()
        base = torch.empty(0, dtype=t.dtype).set_(storage).to(device)
        copies.append(base.as_strided(t.shape, t.stride(), t.storage_offset()))
    return copies


def _close(name: str, got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        limit = TOLERANCE.get(b.dtype, 3e-5)
        torch.testing.assert_close(
            a.cpu(),
            b,
            rtol=limit,
            atol=limit,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def drive(device: str) -> None:
    """Every kernel, on every case; fails if the CPU has other results."""
    paths = measure.PATHS if measure.has_paths() and device == "cuda" else ("auto",)
    for name, xs, masks in cases():
        states = [F.Moments.zeros(x.shape[1:]) for x in xs]
        want = [F.update_(xs, states, mask=masks) for _ in range(2)]
        again = F.normalize(xs, states)
        back = F.denormalize(again, states)
        there = _there(xs, device)
        on = masks and [None if m is None else m.to(device) for m in masks]
        for path in paths:
            own = [F.Moments.zeros(x.shape[1:]).to(device) for x in xs]
            with measure.cuda_path(path):
                for y in want:
                    got = F.update_(there, own, mask=on)
                    ran = measure.last_path()
                    _close(f"{name}, {path}: update", got, y)
            _close(f"{name}, {path}: normalize", F.normalize(there, own), again)
            _close(f"{name}, {path}: denormalize", F.denormalize(got, own), back)
            for here, other in zip(states, own, strict=True):
                _close(f"{name}, {path}: state", list(other), list(here))
            print(f"{name}: {path}" + (f" ran {ran}" if ran else ""), flush=True)
    drive_returns(device)


def drive_returns(device: str) -> None:
    """Rewards of a step, in one block and in more."""
    for shape in ((1, 1), (300, 1), (70, 3), (9000, 1), (4500, 2)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32):
            x, ends = values(*shape, dtype), torch.arange(shape[0]) % 7 == 0
            mask = torch.arange(shape[0]) % 3 != 0
            here, there = (
                (F.Moments.zeros(shape[1:], device=d), torch.zeros(*shape).to(d))
                for d in ("cpu", device)
            )
            name = f"returns of {shape} {dtype}"
            for counts in (None, mask):
                want = F.scale_returns_(x, ends, here[1], here[0], mask=counts)
                got = F.scale_returns_(
                    x.to(device),
                    ends.to(device),
                    there[1],
                    there[0],
                    mask=None if counts is None else counts.to(device),
                )
                _close(name, [got, there[1]], [want, here[1]])
            _close(f"{name}: state", list(there[0]), list(here[0]))
        print(f"returns of {shape}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    drive("cuda")
    torch.cuda.synchronize()
    print(DONE)
