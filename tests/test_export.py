# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Frozen normalisers as plain torch: torch.jit.script, torch.export, without this package."""

import io
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_vecnorm import RunningNorm, VecNorm, VecNormV2
from torchrl_vecnorm.export import Normalizer, fold_into


def batch(n, *features, ratio=1.0):
    return torch.randn(n, *features) + ratio


def trained(*features, ratio=1.0, **options) -> RunningNorm:
    torch.manual_seed(0)
    norm = RunningNorm(features, **options)
    for _ in range(3):
        norm(batch(512, *features, ratio=ratio))
    return norm.eval()


def scripted(module, x):
    return torch.jit.script(module)


def traced(module, x):
    return torch.jit.trace(module, x)


def exported(module, x):
    return torch.export.export(module, (x,)).module()


@pytest.mark.parametrize("ship", [None, scripted, traced, exported])
@pytest.mark.parametrize("ratio", [1.0, 1e5])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_gives_what_the_live_one_gives(ship, ratio, clip):
    norm = trained(2, 3, ratio=ratio, clip=clip)
    module = norm.to_module()
    x = batch(64, 2, 3, ratio=ratio)
    if ship is not None:
        module = ship(module, x)
    want = norm(x)
    torch.testing.assert_close(module(x), want, rtol=0, atol=2e-5)
    assert module(x).dtype is torch.float32


def test_is_frozen():
    norm = trained(3)
    module = norm.to_module()
    x = batch(8, 3)
    before = module(x)
    norm.train()(x + 10)
    assert torch.equal(module(x), before)
    assert not list(module.parameters()) and len(list(module.buffers())) == 2


def test_a_mapping():
    norm = RunningNorm({"a": 3, "b": {"c": 2}})
    x = {"a": batch(9, 3), "b": {"c": batch(9, 2)}}
    norm(x)
    modules = norm.to_module()
    want = norm.eval()(x)
    torch.testing.assert_close(modules["a"](x["a"]), want["a"])
    torch.testing.assert_close(modules["b"]["c"](x["b"]["c"]), want["b"]["c"])


@pytest.mark.parametrize("make", [VecNorm, VecNormV2])
@pytest.mark.parametrize("ratio", [1.0, 1e5])
def test_transforms(make, ratio):
    options = {"reduce_batch_dims": True} if make is VecNormV2 else {}
    t = make(in_keys=["a", ("b", "c")], decay=0.99, **options)

    def data():
        inner = TensorDict(c=batch(64, 2, ratio=ratio), batch_size=[64])
        return TensorDict(a=batch(64, 3, ratio=ratio), b=inner, batch_size=[64])

    with pytest.raises(RuntimeError, match="must have seen key"):
        t.to_module()
    for _ in range(3):
        t(data())
    td = data()
    raw = td.clone()
    want = t.frozen_copy()(td)
    modules = t.to_module()
    assert set(modules) == {"a", ("b", "c")}
    for key, module in modules.items():
        torch.testing.assert_close(module(raw[key]), want[key], rtol=0, atol=2e-5)


_LOAD = """
import sys
sys.modules["torchrl_vecnorm"] = None  # what imports it fails
import torch
policy = torch.jit.load(sys.argv[1])
torch.save(policy(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_a_policy_is_loaded_without_this_package(tmp_path):
    norm = trained(3, clip=2.0)
    policy = nn.Sequential(norm.to_module(), nn.Linear(3, 2)).eval()
    files = [str(tmp_path / name) for name in ("policy.pt", "x.pt", "y.pt")]
    torch.jit.script(policy).save(files[0])
    x = batch(5, 3)
    torch.save(x, files[1])
    subprocess.run([sys.executable, "-c", _LOAD, *files], check=True)
    want = policy[1](norm(x))
    torch.testing.assert_close(torch.load(files[2]), want)
    program = torch.export.export(policy, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 100.0])
def test_fold_into_a_layer(bias, ratio):
    norm = trained(5, ratio=ratio, eps=1e-2, eps_mode="std_add")
    layer = nn.Linear(5, 4, bias=bias)
    before = layer.weight.clone()
    folded = norm.fold_into(layer)
    x = batch(64, 5, ratio=ratio)
    want = layer(norm(x))
    torch.testing.assert_close(folded(x), want, rtol=0, atol=1e-5 * (1 + ratio))
    assert torch.equal(layer.weight, before)
    assert isinstance(folded, nn.Linear) and folded.bias is not None


def test_what_cannot_be_folded():
    layer = nn.Linear(5, 4)
    with pytest.raises(ValueError, match="no clip"):
        trained(5, clip=1.0).fold_into(layer)
    with pytest.raises(ValueError, match="features"):
        trained(4).fold_into(layer)
    with pytest.raises(ValueError, match="features"):
        trained(5, 1).fold_into(layer)
    with pytest.raises(TypeError, match="got Conv2d"):
        fold_into(nn.Conv2d(5, 4, 1), torch.zeros(5), torch.ones(5))
    with pytest.raises(TypeError, match="of a mapping"):
        RunningNorm({"a": 5}).fold_into(layer)


def test_needs_no_second_number_where_one_will_do():
    module = Normalizer(torch.tensor([0.5]).double(), torch.tensor([2.0]).double())
    assert module.loc.tolist() == [[0.5], [0.0]]
