# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The first seconds on a GPU: what runs there at once, and whether kernels are right."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from bench import measure
from torchrl_vecnorm import functional as F

TOLERANCE = {torch.float64: 1e-9, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = ((64, 5), (1500, 64))


def wrong(x: Tensor, device: str) -> str | None:
    """What an update on a device has wrong, by the same on the CPU."""
    here = F.Moments.zeros(x.shape[1:])
    there = F.Moments.zeros(x.shape[1:]).to(device)
    limit = TOLERANCE.get(x.dtype, 3e-5)
    on_device = x.to(device)
    for _ in range(2):
        want, got = F.update_(x, here), F.update_(on_device, there)
        if not torch.allclose(got.cpu().double(), want.double(), limit, limit):
            worst = (got.cpu().double() - want.double()).abs().max()
            return f"outputs are off by {worst:.3g}"
    pairs = zip(here, there, strict=True)
    if not all(torch.allclose(b.cpu(), a, 1e-6, 1e-6) for a, b in pairs):
        return "the statistics are off"
    return None


def probe(device: str, short: bool) -> int:
    """Prints what there is to say; the exit status."""
    if device == "cuda":
        # Plain torch would be right as well.
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            "torchrl_vecnorm::update", "CUDA"
        ), "the extension has no CUDA kernels"
    if short:
        return int(wrong(torch.randn(64, 5), device) is not None)
    if device == "cuda":
        name, capability = (
            torch.cuda.get_device_name(),
            torch.cuda.get_device_capability(),
        )
        print(f"probe: {name}, sm_{capability[0]}{capability[1]}", flush=True)
        print(f"probe: {measure.limits()}", flush=True)
    faults = 0
    paths = measure.PATHS if measure.has_paths() and device == "cuda" else ("auto",)
    for path in paths:
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for shape in SHAPES:
                with measure.cuda_path(path):
                    why = wrong(
                        torch.randn(shape, dtype=torch.float64).to(dtype), device
                    )
                if why is not None:
                    faults += 1
                    print(f"probe: {path} {dtype} {shape}: {why}", flush=True)
    print(f"probe: {len(paths)} paths, 4 dtypes: {faults} wrong", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.probe", description=__doc__)
    parser.add_argument("--short", action="store_true", help="only that it runs at all")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    raise SystemExit(probe("cuda", arguments.short))
