# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The module for tensors."""

import copy
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from samples import through_a_file
from torch import nn

from torchrl_vecnorm import Moments, RunningNorm
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.running_norm import keep_from_ddp

LEAVES = ("sum", "ssq", "count", "nonfinite", "central")


def batch(*shape, dtype=torch.float32, loc=3.0, scale=2.0):
    return (torch.randn(shape, dtype=torch.float64) * scale + loc).to(dtype)


def trained(shape=3, **options) -> RunningNorm:
    norm = RunningNorm(shape, **options)
    torch.manual_seed(1)
    for _ in range(3):
        norm(batch(64, *((shape,) if isinstance(shape, int) else shape)))
    return norm


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("eps_mode", ["std_floor", "std_add", "var_add", "var_floor"])
def test_against_numpy(decay, eps_mode):
    norm = RunningNorm((2, 3), decay=decay, eps=0.5, eps_mode=eps_mode, clip=1.5)
    seen, weights = [], []
    for n in (5, 1, 70, 300):
        x = batch(n, 2, 3)
        y = norm(x)
        seen.append(x.numpy().astype(np.longdouble))
        weights = [w * decay for w in weights] + [np.longdouble(1)]
        rows = np.concatenate(seen)
        w = np.concatenate(
            [np.full(len(s), u) for s, u in zip(seen, weights, strict=True)]
        )
        mean = np.average(rows, axis=0, weights=w)
        var = np.average((rows - mean) ** 2, axis=0, weights=w)
        np.testing.assert_allclose(norm.mean.numpy(), mean.astype(float), rtol=1e-6)
        np.testing.assert_allclose(norm.var.numpy(), var.astype(float), rtol=1e-5)
        np.testing.assert_allclose(
            norm.std.numpy(), np.sqrt(var).astype(float), rtol=1e-5
        )
        assert norm.count.item() == len(rows)
        scale = {
            "std_floor": np.maximum(np.sqrt(var), 0.5),
            "std_add": np.sqrt(var) + 0.5,
            "var_add": np.sqrt(var + 0.5),
            "var_floor": np.sqrt(np.maximum(var, 0.5)),
        }[eps_mode]
        want = np.clip((x.numpy() - mean) / scale, -1.5, 1.5)
        np.testing.assert_allclose(y.numpy(), want.astype(float), rtol=2e-5, atol=2e-5)
    assert y.dtype is torch.float32 and norm.mean.shape == (2, 3)


def test_scaling_alone():
    norm = RunningNorm(1, center=False, eps=1e-2)
    reward = batch(500, 1, loc=7.0)
    y = norm(reward)
    torch.testing.assert_close(y, (reward / reward.double().std(correction=0)).float())


def test_before_data_it_is_the_identity():
    norm = RunningNorm(3).eval()
    x = batch(4, 3)
    assert torch.equal(norm(x), x) and torch.equal(norm.inverse(x), x)
    assert norm.mean.tolist() == [0, 0, 0] and norm.count.item() == 0
    assert norm.var.tolist() == [1, 1, 1] and norm.std.tolist() == [1, 1, 1]


def test_only_training_mode_and_update_learn():
    norm = trained()
    before = copy.deepcopy(norm)
    norm.eval()
    x = batch(9, 3)
    y = norm(x)
    norm.normalize(x)
    norm.inverse(y)
    assert same(norm, before)
    norm.update(x)
    assert norm.count.item() == before.count.item() + 9
    other = before.train()
    other(x)
    assert same(norm, other)


def test_inverse():
    norm = trained().eval()
    x = batch(50, 3)
    torch.testing.assert_close(norm.inverse(norm(x)), x)
    norm = trained(clip=0.5).eval()
    y = norm(x)
    inside = y.abs() < 0.5
    torch.testing.assert_close(norm.inverse(y)[inside], x[inside])


def test_mask():
    norm, other = RunningNorm(3), RunningNorm(3)
    x = batch(40, 3)
    mask = torch.rand(40) < 0.5
    x[~mask] = math.nan
    y = norm(x, mask)
    other.update(x[mask])
    assert norm.count.item() == mask.sum() == other.count.item()
    torch.testing.assert_close(norm.mean, other.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(y[mask], other.normalize(x[mask]))
    assert y[~mask].isnan().all()


def test_values_that_are_not_finite_are_left_out():
    norm = RunningNorm(2)
    x = batch(40, 2)
    x[3, 0] = math.nan
    x[5, 1] = math.inf
    norm(x)
    rows = [i for i in range(40) if i != 3]
    torch.testing.assert_close(norm.mean[0], x[rows, 0].double().mean())
    assert norm.stats.nonfinite[1].tolist() == [1, 1]


def test_one_sample_does_no_harm():
    """skrl's and sample-factory's classes give NaN for ever after."""
    norm = RunningNorm(2)
    norm(batch(1, 2))
    y = norm(batch(64, 2))
    assert y.isfinite().all() and norm.std.isfinite().all()


# --------------------------------------------------------------------------- until


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("until", [1, 7, 64, 100])
def test_until_stops_exactly_there(until, masked):
    norm, other = RunningNorm(3, until=until), RunningNorm(3)
    rows = []
    for n in (10, 30, 50, 60):
        x = batch(n, 3)
        mask = torch.rand(n) < 0.7 if masked else torch.ones(n, dtype=torch.bool)
        y = norm(x, mask if masked else None)
        rows.append(x[mask])
        torch.testing.assert_close(y, norm.normalize(x))
    other.update(torch.cat(rows)[:until])
    want = min(until, sum(map(len, rows)))
    assert norm.count.item() == want == other.count.item()
    torch.testing.assert_close(norm.mean, other.mean)
    # Of float32 values, whose sums are taken in float a few rows at a time.
    torch.testing.assert_close(norm.var, other.var, rtol=1e-6, atol=0)


def test_until_of_several_dimensions():
    norm, other = RunningNorm(3, until=13), RunningNorm(3)
    x = batch(4, 5, 3)
    norm(x)
    other.update(x.reshape(20, 3)[:13])
    torch.testing.assert_close(norm.mean, other.mean)
    norm(x)
    torch.testing.assert_close(norm.mean, other.mean)
    mask = torch.rand(4, 5) < 0.5
    masked, other = RunningNorm(3, until=6), RunningNorm(3)
    masked(x, mask)
    other.update(x[mask][:6])
    torch.testing.assert_close(masked.mean, other.mean)


# ------------------------------------------------------------------ several tensors

SHAPES = {"policy": 4, "critic": {"state": 6, "map": (2, 3)}}


def inputs(n=8):
    return {
        "critic": {"map": batch(n, 2, 3), "state": batch(n, 6)},
        "policy": batch(n, 4, dtype=torch.float64),
    }


def test_a_mapping():
    norm = RunningNorm(SHAPES, decay=0.9, clip=2.0)
    alone = {
        "policy": RunningNorm(4, decay=0.9, clip=2.0),
        "state": RunningNorm(6, decay=0.9, clip=2.0),
        "map": RunningNorm((2, 3), decay=0.9, clip=2.0),
    }
    for _ in range(3):
        x = inputs()
        y = norm(x)
        assert torch.equal(y["policy"], alone["policy"](x["policy"]))
        assert torch.equal(y["critic"]["state"], alone["state"](x["critic"]["state"]))
        assert torch.equal(y["critic"]["map"], alone["map"](x["critic"]["map"]))
    assert torch.equal(norm.mean["critic"]["map"], alone["map"].mean)
    assert norm.count["policy"].item() == 24
    back = norm.inverse(norm.eval()(x))
    assert back["critic"]["state"].shape == (8, 6)


def test_a_mapping_is_one_call():
    norm = RunningNorm(SHAPES)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        norm(inputs())
    names = [e.name for e in p.events()]
    assert names.count("torchrl_vecnorm::update") == 1


def test_masks_of_a_mapping():
    x = inputs()
    mask = torch.arange(8) < 5
    norm, other = RunningNorm(SHAPES), RunningNorm(SHAPES)
    norm(x, mask)
    other(x, {"policy": mask, "critic": {"state": mask, "map": mask}})
    assert same(norm, other) and norm.count["policy"].item() == 5


@pytest.mark.parametrize(
    "x,error",
    [
        ({"policy": batch(2, 4)}, KeyError),
        ({**inputs(), "more": batch(2, 1)}, KeyError),
        (batch(2, 4), TypeError),
        ({**inputs(), "critic": batch(2, 6)}, TypeError),
        ({**inputs(), "policy": {"a": batch(2, 4)}}, TypeError),
        ({**inputs(), "policy": np.zeros((2, 4))}, TypeError),
        ({**inputs(), "policy": batch(2, 5)}, ValueError),
    ],
    ids=["missing", "more", "a tensor", "no mapping", "a mapping", "numpy", "shape"],
)
def test_wrong_mappings(x, error):
    norm = RunningNorm(SHAPES)
    for call in (norm, norm.update, norm.normalize, norm.inverse):
        with pytest.raises(error, match="expected"):
            call(x)
    assert norm.count["policy"].item() == 0


# ----------------------------------------------------------------- as an nn.Module


def test_what_it_consists_of():
    norm = RunningNorm(3)
    assert list(norm.state_dict()) == [f"stats.{leaf}" for leaf in LEAVES]
    assert not list(norm.parameters())
    nested = RunningNorm({"a": {"b": 2}})
    assert list(nested.state_dict()) == [f"stats.a.b.{leaf}" for leaf in LEAVES]
    assert "eps_mode='std_floor'" in repr(norm) and "decay=1.0" in repr(norm)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float32),
        lambda m: nn.Sequential(nn.Linear(3, 3), m).half()[1],
    ],
)
def test_statistics_keep_their_dtype(convert):
    norm = trained()
    before = copy.deepcopy(norm)
    norm = convert(norm)
    assert same(norm, before)
    assert all(b.dtype is torch.float64 for b in norm.buffers())


def test_moves_between_devices():
    norm = trained().to("meta")
    assert all(b.is_meta and b.dtype is torch.float64 for b in norm.buffers())
    norm = norm.to_empty(device="cpu")
    norm.load_state_dict(trained().state_dict())
    assert same(norm, trained())


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, partial(through_a_file, weights_only=False)],
    ids=["deepcopy", "file"],
)
def test_copies(copied):
    norm = trained(clip=3.0, until=1000)
    other = copied(norm)
    assert same(norm, other)
    norm(batch(8, 3))
    assert not same(norm, other)
    x = batch(8, 3)
    other(x)
    assert other.rule == norm.rule and other.until == 1000


def test_a_state_dict_goes_on_where_it_was():
    norm, other = trained(), RunningNorm(3)
    other.load_state_dict(norm.state_dict())
    x = batch(16, 3)
    assert torch.equal(norm(x), other(x)) and same(norm, other)


def test_a_wrong_state_dict_is_refused_by_name():
    norm = trained()
    before = copy.deepcopy(norm)
    other = RunningNorm(4).state_dict()
    with pytest.raises(RuntimeError, match=r"stats\.sum"):
        norm.load_state_dict(other)
    with pytest.raises(RuntimeError, match="running_mean"):
        norm.load_state_dict({"running_mean": torch.zeros(3)})
    cut = {k: v for k, v in norm.state_dict().items() if k != "stats.central"}
    with pytest.raises(RuntimeError, match=r"stats\.central"):
        norm.load_state_dict(cut)
    assert same(norm, before)


@pytest.mark.parametrize(
    "leaf,value",
    [("sum", torch.nan), ("ssq", -1.0), ("count", -5.0), ("central", torch.inf)],
)
def test_statistics_that_no_data_can_have_given_are_refused(leaf, value):
    norm = RunningNorm({"a": 3, "b": 2})
    norm({"a": batch(9, 3), "b": batch(9, 2)})
    before = copy.deepcopy(norm)
    state = copy.deepcopy(norm.state_dict())
    state["stats.a.sum"] += 1.0  # the first key is good, and must not be written
    state["stats.a.ssq"] += 100.0
    state[f"stats.b.{leaf}"][..., 0] = value
    with pytest.raises(RuntimeError, match=rf"stats\.b\.{leaf}.*expected"):
        norm.load_state_dict(state)
    assert same(norm, before)


def test_loading_copies():
    norm, other = trained(), RunningNorm(3)
    state = norm.state_dict()
    other.load_state_dict(state)
    other(batch(8, 3))
    assert torch.equal(state["stats.count"], norm.stats.count) and not same(norm, other)
    model = nn.Sequential(RunningNorm(3), nn.Linear(3, 1))
    model.load_state_dict(model.state_dict(), assign=True)
    assert not model.load_state_dict(model.state_dict()).missing_keys
    with torch.device("meta"):
        fresh = RunningNorm(3)
    fresh.load_state_dict(state, assign=True)
    assert same(fresh, norm)


def test_gradients():
    norm = trained(clip=1.0)
    x = batch(20, 3).requires_grad_()
    norm(x).sum().backward()
    inside = (norm.normalize(x.detach()).abs() < 1).float()
    torch.testing.assert_close(x.grad, inside / norm.std.float())
    x.grad = None
    norm.eval()(x).sum().backward()
    assert x.grad is not None


def test_below_another_module():
    """Where the input of the first layer needs no gradient, and one that does."""
    model = nn.Sequential(
        RunningNorm(3), nn.Linear(3, 3), RunningNorm(3), nn.Linear(3, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch(32, 3)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert model[2].count.item() == 96


@pytest.mark.parametrize(
    "options", [{}, {"until": 70}, {"clip": 1.0, "decay": 0.9}], ids=str
)
@pytest.mark.parametrize("shape", [3, {"a": 3, "b": {"c": (2, 2)}}], ids=str)
def test_compile(options, shape):
    def x():
        if shape == 3:
            return batch(30, 3)
        return {"a": batch(30, 3), "b": {"c": batch(30, 2, 2)}}

    torch.compiler.reset()
    norm = RunningNorm(shape, **options)
    other = copy.deepcopy(norm)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        value = x()
        torch.testing.assert_close(norm(value), compiled(value))
    assert all(
        torch.allclose(a, b)
        for a, b in zip(norm.buffers(), other.buffers(), strict=True)
    )
    norm.eval()
    other.eval()
    torch.testing.assert_close(norm(value), compiled(value))


@pytest.mark.slow
def test_inductor():
    norm = RunningNorm(3)
    model = nn.Sequential(norm, nn.Linear(3, 2))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    for _ in range(3):
        x = batch(30, 3).requires_grad_()
        a, b = model(x), compiled(x)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(
            torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), x)
        )
    torch.testing.assert_close(norm.mean, other[0].mean)


def test_export():
    norm = trained().eval()
    program = torch.export.export(norm, (batch(4, 3),))
    x = batch(4, 3)
    torch.testing.assert_close(program.module()(x), norm(x))


_DDP = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrl_vecnorm import RunningNorm
from torchrl_vecnorm.running_norm import keep_from_ddp

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(RunningNorm(2), nn.BatchNorm1d(2), nn.Linear(2, 1))
ddp = DistributedDataParallel(keep_from_ddp(model))
for i in range(3):
    ddp(torch.randn(8, 2) + 10 * rank).sum().backward()
mean = model[0].mean
assert abs(mean[0] - 10 * rank) < 2, mean
assert model[0].count == 24
means = [torch.zeros(2) for _ in range(2)]
dist.all_gather(means, model[2].weight.grad[0])
assert torch.equal(*means)
dist.destroy_process_group()
"""


def test_ddp_leaves_statistics_to_each_rank(tmp_path):
    arguments = [str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _DDP, str(r), *arguments]
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def test_keep_from_ddp_keeps_what_was_there():
    model = nn.Sequential(nn.Linear(3, 3), RunningNorm({"a": 2}))
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    keep_from_ddp(model)
    assert model._ddp_params_and_buffers_to_ignore == [
        "0.bias",
        *(f"1.stats.a.{leaf}" for leaf in LEAVES),
    ]


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 3)), [[1.0, 2.0, 3.0]], 1.0, None, "x"],
    ids=lambda v: type(v).__name__,
)
def test_not_a_tensor(x):
    norm = RunningNorm(3)
    for call in (norm, norm.update, norm.normalize, norm.inverse):
        with pytest.raises(TypeError, match="expected x as a Tensor, got"):
            call(x)
    with pytest.raises(TypeError, match="expected mask as a Tensor, got"):
        norm(batch(2, 3), [True, False])


def test_wrong_shapes():
    norm = RunningNorm((2, 3))
    for shape in ((4, 3), (3,), (4, 3, 2), ()):
        with pytest.raises(ValueError, match="expected features of shape"):
            norm(batch(*shape))
    with pytest.raises(ValueError, match="expected a bool mask"):
        norm(batch(4, 2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="dense real values"):
        norm(torch.zeros(4, 2, 3, dtype=torch.complex64))
    assert norm.count.item() == 0


@pytest.mark.parametrize(
    "options,error",
    [
        ({"decay": 0.0}, ValueError),
        ({"decay": 1.1}, ValueError),
        ({"decay": math.nan}, ValueError),
        ({"decay": "0.9"}, TypeError),
        ({"eps": 0.0}, ValueError),
        ({"eps": -1.0}, ValueError),
        ({"clip": 0.0}, ValueError),
        ({"clip": math.inf}, ValueError),
        ({"eps_mode": "floor"}, ValueError),
        ({"until": 0}, ValueError),
        ({"until": 1.5}, ValueError),
        ({"until": True}, ValueError),
    ],
    ids=str,
)
def test_wrong_options(options, error):
    with pytest.raises(error, match=f"expected {next(iter(options))}"):
        RunningNorm(3, **options)


@pytest.mark.parametrize("shape", ["3", 1.5, [1, "a"], [-1], None, True], ids=str)
def test_wrong_shape_of_a_sample(shape):
    with pytest.raises(TypeError, match="expected shape as an int"):
        RunningNorm(shape)
    with pytest.raises(TypeError, match="expected shape as an int"):
        RunningNorm({"a": shape})
    with pytest.raises(ValueError, match="empty mapping"):
        RunningNorm({})


# ------------------------------------------------------------------ without torchrl


_ALONE = """
import sys
for name in ("torchrl", "tensordict"):
    sys.modules[name] = None  # what imports it fails
import torch
before = set(sys.modules)
from torchrl_vecnorm import Moments, RunningNorm, functional as F
new = [name for name in sys.modules.keys() - before if "torchrl_vecnorm" not in name]
# Dynamo and sympy, which torch has not imported yet, would take as long as torch itself.
assert sys.stdlib_module_names.issuperset(new), new
norm = RunningNorm({"a": 3, "b": (2, 2)})
norm({"a": torch.randn(4, 3), "b": torch.randn(4, 2, 2)})
state = Moments.zeros([3])
F.update_(torch.randn(4, 3), state)
import torchrl_vecnorm
assert "VecNorm" in dir(torchrl_vecnorm)
try:
    torchrl_vecnorm.VecNorm
except ImportError as err:
    assert "tensordict" in str(err) or "torchrl" in str(err), err
else:
    raise AssertionError("VecNorm without torchrl")
"""


def test_needs_torch_alone():
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    subprocess.run([sys.executable, "-c", _ALONE], check=True, env=environment)


def test_other_names_are_not_there():
    import torchrl_vecnorm

    with pytest.raises(AttributeError, match="no attribute 'VecNorm3'"):
        torchrl_vecnorm.VecNorm3  # noqa: B018


def test_vecnorm_is_there_when_asked_for():
    pytest.importorskip("torchrl")
    import torchrl_vecnorm

    assert torchrl_vecnorm.VecNorm is torchrl_vecnorm.transforms.VecNorm


def test_is_what_functional_computes():
    norm = RunningNorm(5, decay=0.99, eps=1e-3, eps_mode="std_add", clip=4.0)
    state = Moments.zeros([5], counts_all=True)
    for _ in range(5):
        x = batch(33, 5)
        want = F.update_(x, state, decay=0.99, eps=1e-3, eps_mode="std_add", clip=4.0)
        assert torch.equal(norm(x), want)
    assert all(
        torch.equal(a, b) for a, b in zip(norm.stats.moments(), state, strict=True)
    )
