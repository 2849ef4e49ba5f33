# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Ships a policy with its normaliser inside, so that it runs without this package.

    python examples/export_policy.py

Three ways, each checked against the live policy: a program of torch.export; a file of ONNX, run
by onnxruntime, where onnx, onnxscript and onnxruntime are installed; and plain layers, the
normaliser folded into the first of them.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from torchrl_vecnorm import RunningNorm

FEATURES, ACTIONS = 17, 6


def observations(n: int) -> Tensor:
    """What a robot might see: angles near 0, a height, a pressure far from 0."""
    scale = torch.linspace(0.1, 3.0, FEATURES)
    offset = torch.zeros(FEATURES)
    offset[-2:] = torch.tensor([1.3, 101_325.0])
    return torch.randn(n, FEATURES) * scale + offset


def trained(clip: float | None) -> nn.Sequential:
    """A policy as training leaves it; the layers have learnt nothing here."""
    policy = nn.Sequential(
        RunningNorm(FEATURES, clip=clip),
        nn.Linear(FEATURES, 64),
        nn.Tanh(),
        nn.Linear(64, ACTIONS),
    )
    with torch.no_grad():
        for _ in range(20):
            policy(observations(512))
    return policy.eval()


def shipped(policy: nn.Sequential) -> nn.Sequential:
    """The same policy with the normaliser as plain torch."""
    norm, *layers = policy
    return nn.Sequential(norm.to_module(), *layers).eval()


def folded(policy: nn.Sequential) -> nn.Sequential:
    """The same policy without a normaliser: the first layer does it. There may be no clip."""
    norm, first, *layers = policy
    return nn.Sequential(norm.fold_into(first), *layers).eval()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two results."""
    return (a - b).abs().max().item()


def main(out: Path) -> dict[str, float]:
    """Exports a policy in each way; how far the actions are from those of the live one."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    policy, x = trained(clip=10.0), observations(64)
    plain = shipped(policy)
    far = {}
    with torch.no_grad():
        want = policy(x)

        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(plain, (x,), dynamic_shapes=({0: batch},))
        torch.export.save(program, out / "policy.pt2")
        loaded = torch.export.load(out / "policy.pt2").module()
        far["torch.export"] = difference(loaded(x), want)

        needed = ("onnx", "onnxscript", "onnxruntime")
        if all(importlib.util.find_spec(name) for name in needed):
            far["onnx"] = difference(run_onnx(plain, x, out / "policy.onnx"), want)

        policy = trained(clip=None)
        far["folded"] = difference(folded(policy)(x), policy(x))
    return far


def run_onnx(plain: nn.Sequential, x: Tensor, file: Path) -> Tensor:
    """What onnxruntime makes of a policy."""
    import onnxruntime

    torch.onnx.export(plain, (x,), file, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()
    for way, far in main(arguments.out).items():
        print(f"{way:12} actions within {far:.1e} of the live policy's")
