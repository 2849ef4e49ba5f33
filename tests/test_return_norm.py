# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ReturnNorm, the module: against the functional form, and torch's rules for modules."""

import copy
import pickle

import pytest
import torch
from samples import through_a_file
from torch import nn

from torchrl_vecnorm import Moments, ReturnNorm
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.running_norm import keep_from_ddp


def batch(envs=6):
    return torch.randn(envs) + 0.5, torch.rand(envs) < 0.2


def trained(envs=6, **options) -> ReturnNorm:
    norm = ReturnNorm(envs, **options)
    for _ in range(5):
        norm(*batch(envs))
    return norm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.5, "clear": "before", "decay": 0.9, "clip": None},
        {"eps": 0.1, "eps_mode": "std_floor", "clip": 1.0},
    ],
)
def test_the_functional_form(options):
    norm = ReturnNorm(6, **options)
    state, returns = Moments.zeros(()), torch.zeros(6, dtype=torch.float64)
    for step in range(6):
        (x, done), mask = batch(), None if step % 2 else torch.rand(6) < 0.5
        y = norm(x, done, mask)
        assert torch.equal(
            y, F.scale_returns_(x, done, returns, state, mask=mask, **options)
        )
    assert torch.equal(norm.returns, returns) and torch.equal(norm.stats.sum, state.sum)
    rule = {"eps": 1e-8, "eps_mode": "var_add"}
    rule |= {k: v for k, v in options.items() if k in rule}
    torch.testing.assert_close(norm.scale, F.loc_scale(state, **rule)[1])
    assert norm.stats.count[0] == state.count and norm.count >= state.count
    if options.get("clip", 10) is None:
        torch.testing.assert_close(norm.inverse(norm.normalize(x)), x)


def test_features():
    norm = ReturnNorm((2, 3), shape=2)
    norm(torch.randn(2, 3, 2), torch.rand(2, 3, 1) < 0.5)
    assert norm.scale.shape == (2,) and norm.returns.shape == (2, 3, 2)
    assert norm.eval()(torch.randn(7, 2)).shape == (7, 2)


def test_eval_scales_only():
    norm = trained().eval()
    before = copy.deepcopy(norm.state_dict())
    x, done = batch()
    torch.testing.assert_close(norm(x, done), (x / norm.scale).float())
    norm(torch.randn(100))  # of other environments
    assert all(map(torch.equal, norm.state_dict().values(), before.values()))


def test_reset():
    norm = trained()
    before, returns = copy.deepcopy(norm.stats), norm.returns.clone()
    which = torch.tensor([True, False] * 3)
    norm.reset(which.reshape(6, 1))
    assert torch.equal(norm.returns, returns * ~which)
    norm.reset()
    assert not norm.returns.any()
    assert torch.equal(norm.stats.ssq, before.ssq)
    for bad in (torch.ones(6), torch.ones(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="expected which as bool of shape"):
            norm.reset(bad)


@pytest.mark.parametrize(
    "options,error",
    [
        ({"gamma": -0.1}, "expected gamma in"),
        ({"decay": 2.0}, "expected decay in"),
        ({"eps": 0.0}, "expected eps"),
        ({"clip": 0.0}, "expected clip"),
        ({"clear": "now"}, "expected clear as one of"),
    ],
)
def test_options_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        ReturnNorm(3, **options)


def test_calls_are_refused():
    norm = ReturnNorm(6)
    x, _ = batch()
    with pytest.raises(TypeError, match="expected done as Tensor, got NoneType"):
        norm(x)
    with pytest.raises(ValueError, match="returns of the shape of the rewards"):
        norm(*batch(7))
    assert not norm.count


# ------------------------------------------------------------ what modules have to do


def test_save_and_go_on():
    """What goes on after a load is to the bit what would have gone on without it."""
    norm, other = trained(), ReturnNorm(6)
    other.load_state_dict(through_a_file(norm.state_dict()))
    copied, pickled = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    for _ in range(3):
        step = batch()
        y = norm(*step)
        for of in (other, copied, pickled):
            assert torch.equal(of(*step), y) and torch.equal(of.returns, norm.returns)


def test_loading_is_strict():
    """By name; and nothing is written."""
    norm, good = trained(), trained().state_dict()
    before = copy.deepcopy(norm.state_dict())
    for change, match in (
        ({"stats.ssq": -good["stats.ssq"]}, "stats.ssq"),
        ({"stats.sum": torch.zeros(2)}, "stats.sum"),
        ({"returns": torch.zeros(7)}, "'returns': expected shape .6,., got .7,."),
        ({"returns": torch.full((6,), torch.nan)}, "'returns': expected finite"),
        ({"returns": [0.0] * 6}, "'returns': expected a dense floating-point"),
    ):
        with pytest.raises(RuntimeError, match=match):
            norm.load_state_dict({**good, **change})
    for name in good:
        with pytest.raises(RuntimeError, match=f"Missing.*{name}"):
            norm.load_state_dict({k: v for k, v in good.items() if k != name})
    assert all(map(torch.equal, norm.state_dict().values(), before.values()))
    with pytest.raises(RuntimeError, match=r"Unexpected.*more"):
        norm.load_state_dict({**good, "more": torch.zeros(())})


def test_from_other_environments():
    """The statistics, with returns that begin anew."""
    norm, other = trained(), ReturnNorm(9)
    other.load_state_dict({**norm.state_dict(), "returns": torch.zeros(9)})
    assert other.scale == norm.scale and not other.returns.any()
    other(*batch(9))
    assert other.count == norm.count + 9


def test_dtypes_are_kept():
    norm = nn.Sequential(nn.Linear(1, 1), trained()).half()[1]
    assert norm.returns.dtype == norm.stats.sum.dtype == torch.float64
    assert norm(torch.ones(6).half(), torch.zeros(6) > 0).dtype == torch.float16
    assert norm.float().returns.dtype == torch.float64
    assert ReturnNorm(3, dtype=torch.float32).returns.dtype == torch.float32
    assert norm.to("meta").returns.is_meta


def test_ddp_leaves_it_to_each_rank():
    model = nn.Sequential(nn.Linear(1, 1), ReturnNorm(3))
    ignored = keep_from_ddp(model)._ddp_params_and_buffers_to_ignore
    buffers = {name for name, _ in model.named_buffers()}
    assert set(ignored) == buffers and "1.returns" in buffers


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    eager, other = (trained().train(training) for _ in range(2))
    other.load_state_dict(eager.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, done = batch()
        torch.testing.assert_close(compiled(x, done), eager(x, done))
    torch.testing.assert_close(other.returns, eager.returns)
    torch.testing.assert_close(other.stats.ssq, eager.stats.ssq)


def test_repr():
    assert "gamma=0.9, clear='before'" in repr(ReturnNorm(3, gamma=0.9, clear="before"))
