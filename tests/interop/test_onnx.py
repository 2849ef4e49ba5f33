# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A frozen normaliser in a policy, run by onnxruntime."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrl_vecnorm import RunningNorm

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
@pytest.mark.parametrize("ratio", [1.0, 1e5])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_onnxruntime_gives_what_the_live_one_gives(ratio, clip, dynamo, tmp_path):
    torch.manual_seed(0)
    norm = RunningNorm(17, clip=clip)
    for _ in range(3):
        norm(torch.randn(512, 17) + ratio)
    norm.eval()
    module = norm.to_module()
    x = torch.randn(64, 17) + ratio
    file = tmp_path / "normalizer.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own age
        torch.onnx.export(
            module, (x,), file, dynamo=dynamo, input_names=["x"], opset_version=18
        )
    session = onnxruntime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), norm(x), rtol=0, atol=2e-5)


def test_a_whole_policy(tmp_path):
    norm = RunningNorm(5)
    norm(torch.randn(512, 5) * 3 + 10)
    policy = nn.Sequential(norm.eval().to_module(), nn.Linear(5, 32), nn.Tanh())
    x = torch.randn(8, 5) * 3 + 10
    file = tmp_path / "policy.onnx"
    torch.onnx.export(policy, (x,), file, dynamo=True)
    session = onnxruntime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = policy[1:](norm(x))
    torch.testing.assert_close(torch.from_numpy(y), want, rtol=0, atol=1e-5)


def test_the_example(tmp_path, quiet):
    file = Path(__file__).parents[2] / "examples" / "export_policy.py"
    spec = importlib.util.spec_from_file_location("export_policy", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(tmp_path)["onnx"] < 2e-5
