# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where eps stands, clipping, scaling without centring: against torch and numpy."""

from itertools import product

import numpy as np
import pytest
import torch
from samples import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    NUMBERS_ARE_INPUTS,
    SHAPES,
    data,
    op_samples,
)
from test_ops import TOLERANCE, clone

from torchrl_vecnorm import Moments, _ops, oracle
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.rule import EPS_MODES, Rule

ops = torch.ops.torchrl_vecnorm
ids = {"ids": str}
RULES = [
    {"eps_mode": mode, "clip": clip, "center": center}
    for mode, clip, center in product(EPS_MODES, (None, 0.75), (True, False))
]


def named(rule: dict) -> str:
    return "-".join(str(value) for value in rule.values())


def wanted(x, eps, eps_mode, clip, center):
    """In long double, from all values of one call."""
    x = np.asarray(x, dtype=np.longdouble)
    mean, var = x.mean(0), x.var(0)
    scale = {
        "std_floor": lambda: np.maximum(np.sqrt(var), eps),
        "std_add": lambda: np.sqrt(var) + eps,
        "var_add": lambda: np.sqrt(var + eps),
        "var_floor": lambda: np.sqrt(np.maximum(var, eps)),
    }[eps_mode]()
    y = (x - mean if center else x) / scale
    return y if clip is None else np.clip(y, -clip, clip), mean, scale


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("eps", [1e-8, 0.5, 9.0])
def test_against_numpy(rule, eps):
    x = data((700,), (19,), torch.float64)
    state = Moments.zeros([19])
    y = F.update_(x, state, decay=1.0, eps=eps, **rule)
    want, mean, scale = wanted(x.numpy(), eps, **rule)
    np.testing.assert_allclose(y.numpy(), want.astype(float), rtol=1e-9, atol=1e-9)
    again = F.normalize(x, state, eps=eps, **rule)
    np.testing.assert_allclose(again.numpy(), y.numpy(), rtol=0, atol=0)
    rule = {name: rule[name] for name in ("eps_mode", "center")}
    loc, got = F.loc_scale(state, eps=eps, **rule)
    np.testing.assert_allclose(got.numpy(), scale.astype(float), rtol=1e-12)
    expected = mean if rule["center"] else 0 * mean
    np.testing.assert_allclose(loc.numpy(), expected.astype(float), rtol=1e-12)


@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS), **ids)
@pytest.mark.parametrize("samples,features", SHAPES, **ids)
def test_shapes_and_dtypes(samples, features, dtype):
    x = data(samples, features, dtype)
    for mode in EPS_MODES:
        rule = Rule(0.3, EPS_MODES.index(mode), 0.9, mode != "var_add")
        state = Moments.zeros(features)
        y = F.update_(x, state, eps=0.3, eps_mode=mode, clip=0.9, center=rule.center)
        want = oracle.normalize(x, state, rule)
        torch.testing.assert_close(y, want, **TOLERANCE[y.dtype])
        assert x.numel() == 0 or y.abs().max() <= 0.9 + 4e-3 * (dtype in FLOATS[2:])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(700, 3), (700, 40), (9, 20, 6)], **ids)
def test_strides(layout, shape):
    x = layout(data(shape[:-1], shape[-1:]))
    state = Moments.zeros(shape[-1:])
    y = F.update_(x, state, eps=0.1, eps_mode="std_add", clip=0.5)
    want = oracle.normalize(x, state, Rule(0.1, 1, 0.5))
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    x = data((5000,), (65,))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            state = Moments.zeros([65])
            results.append(F.update_(x, state, eps_mode="var_add", clip=1.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_nothing_is_clipped_without_a_clip():
    x = torch.tensor([[0.0], [1e30]])
    state = Moments(*(torch.tensor([v], dtype=torch.float64) for v in (0.0, 4.0, 4.0)))
    assert F.normalize(x, state)[1].item() == pytest.approx(1e30)
    assert F.normalize(x, state, clip=1e300)[1].item() == pytest.approx(1e30)
    assert F.normalize(x, state, clip=10)[1].item() == 10


@pytest.mark.parametrize("dtype", FLOATS, **ids)
def test_nan_and_inf(dtype):
    x = torch.tensor(
        [[1.0], [3.0], [torch.nan], [torch.inf], [-torch.inf]], dtype=dtype
    )
    for n in (1, 40):  # a value at a time, and packs of them
        state = Moments.zeros([n])
        y = F.update_(x.expand(5, n).contiguous(), state, clip=5.0)
        want = torch.tensor([[-1.0], [1.0], [torch.nan], [5.0], [-5.0]], dtype=dtype)
        torch.testing.assert_close(y, want.expand(5, n), equal_nan=True)


@pytest.mark.parametrize(
    "eps_mode,scale",
    [("std_floor", 1), ("std_add", 1.5), ("var_add", 1.5**0.5), ("var_floor", 1)],
)
def test_before_data_a_deviation_of_one_is_assumed(eps_mode, scale):
    x = torch.tensor([[2.0, -3.0]])
    state = Moments.zeros([2])
    rule = {"eps": 0.5, "eps_mode": eps_mode}
    torch.testing.assert_close(F.normalize(x, state, **rule), x / scale)
    torch.testing.assert_close(F.denormalize(x, state, **rule), x * scale)
    loc, got = F.loc_scale(state, **rule)
    assert loc.tolist() == [0, 0] and got.tolist() == [scale, scale]


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_inverse(rule):
    x = data((90,), (7,), torch.float64)
    state = Moments.zeros([7])
    y = F.update_(x, state, decay=1.0, eps=0.4, **rule)
    back = F.denormalize(y, state, eps=0.4, **rule)
    clip = rule["clip"] or np.inf
    inside = y.abs() < clip
    torch.testing.assert_close(back[inside], x[inside])
    # Beyond the clip, what it has left.
    far = F.denormalize(torch.full_like(y, 100.0), state, eps=0.4, **rule)
    limit = torch.full_like(y, min(clip, 100.0))
    torch.testing.assert_close(far, F.denormalize(limit, state, eps=0.4, **rule))


def test_one_constant_feature_is_scaled_not_blown_up():
    """A reward that never changes, by its deviation alone: eps is all there is."""
    state = Moments.zeros([1])
    y = F.update_(torch.ones(64, 1), state, eps=1e-2, eps_mode="std_add", center=False)
    torch.testing.assert_close(y, torch.full((64, 1), 100.0))
    y = F.update_(torch.ones(64, 1), state, eps=1e-2, center=False, clip=10)
    assert (y == 10).all()


# ----------------------------------------------------------------------- gradients


def plain(x, state, eps, eps_mode, clip, center):
    """By torch, whose clamp knows its gradient."""
    loc, scale = F.loc_scale(state, eps=eps, eps_mode=eps_mode, center=center)
    y = (x.double() - loc) / scale
    return (y if clip is None else y.clamp(-clip, clip)).to(x.dtype)


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("how", ["returned", "out", "in place", "normalize"])
def test_gradients(rule, how):
    state = Moments.zeros([5])
    F.update_(data((40,), (5,), torch.float64), state)
    x = data((12,), (5,), torch.float64).requires_grad_()
    weight = torch.randn(12, 5, dtype=torch.float64)
    after = clone(state)
    F.update_(x.detach(), after, decay=0.9, eps=0.2)
    numbers = {"eps": 0.2, **rule}
    if how == "normalize":
        after = state
        y = F.normalize(x, state, **numbers)
    elif how == "in place":
        y = x * 1.0
        F.update_(y, state, decay=0.9, out=y, **numbers)
    else:
        out = torch.empty_like(x) if how == "out" else None
        y = F.update_(x, state, decay=0.9, out=out, **numbers)
    (got,) = torch.autograd.grad((y * weight).sum(), x)
    want = torch.autograd.grad((plain(x, after, **numbers) * weight).sum(), x)[0]
    torch.testing.assert_close(got, want)
    assert rule["clip"] is None or (got == 0).any()


@pytest.mark.parametrize("clip", [None, 0.75])
def test_gradient_of_the_inverse(clip):
    state = Moments.zeros([5])
    F.update_(data((40,), (5,), torch.float64), state)
    y = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(F.denormalize(y, state, clip=clip).sum(), y)
    _, scale = F.loc_scale(state)
    inside = (y.abs() <= (clip or torch.inf)).double()
    torch.testing.assert_close(got, inside * scale)


def test_gradcheck():
    state = Moments.zeros([3])
    F.update_(data((40,), (3,), torch.float64), state)
    x = data((6,), (3,), torch.float64).requires_grad_()
    for rule in RULES:
        function = lambda v, rule=rule: F.normalize(v, state, eps=0.3, **rule)  # noqa: E731
        assert torch.autograd.gradcheck(function, x)


# ------------------------------------------------------------------- torch's machines


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(i, id=op_samples()[i].name, marks=[pytest.mark.slow] * (i != 5))
        for i in (0, 4, 5, 6, 7)
    ],
)
def test_opcheck(sample):
    sample = op_samples(requires_grad=True)[sample]
    leaves = F.leaves_of(sample.states)
    y = _ops.outputs_like(sample.x)
    rule = (0.1, 2, 0.8, False)
    torch.library.opcheck(
        ops.update.default, (sample.x, leaves, y, sample.mask, 0.9, 1.0, *rule)
    )
    torch.library.opcheck(ops.normalize.default, (sample.x, leaves, *rule))
    torch.library.opcheck(ops.normalize_out.default, (sample.x, leaves, y, *rule))


@pytest.mark.parametrize("rule", RULES[::3], ids=named)
def test_compile(rule):
    def function(x, state):
        y = F.update_(x, state, decay=0.9, eps=0.1, **rule)
        return y, F.denormalize(y, state, eps=0.1, **rule)

    x = data((50,), (3,))
    states = Moments.zeros([3]), Moments.zeros([3])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for a, b in zip(function(x, states[0]), compiled(x, states[1]), strict=True):
            torch.testing.assert_close(a, b)


@NUMBERS_ARE_INPUTS
@pytest.mark.parametrize("name", ["eps", "clip"])
def test_a_number_that_changes_is_compiled_twice_at_most(name):
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    def function(x, state, value):
        return F.update_(x, state, eps_mode="var_add", **{name: value})

    x = data((50,), (3,))
    state, other = Moments.zeros([3]), Moments.zeros([3])
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for value in (0.5, 0.6, 0.7, 0.8):
        want = function(x, other, value)
        torch.testing.assert_close(compiled(x, state, value), want)
    assert len(compilations) <= 2


def test_vmap_and_jvp():
    state = Moments.zeros([3])
    F.update_(data((40,), (3,), torch.float64), state)
    x = data((8,), (3,), torch.float64)
    rule = {"eps": 0.2, "eps_mode": "std_add", "clip": 0.7}
    want = F.normalize(x, state, **rule)
    got = torch.func.vmap(lambda v: F.normalize(v, state, **rule))(x)
    torch.testing.assert_close(got, want)
    _, tangent = torch.func.jvp(
        lambda v: F.normalize(v, state, **rule), (x,), (torch.ones_like(x),)
    )
    _, scale = F.loc_scale(state, eps=0.2, eps_mode="std_add")
    torch.testing.assert_close(tangent, (want.abs() < 0.7) / scale)


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize("clip", [0, -1.0, torch.nan, torch.inf, 0.0])
def test_bad_clip(clip):
    x, state = data((4,), (3,)), Moments.zeros([3])
    before = clone(state)
    for call in (
        lambda: F.update_(x, state, clip=clip),
        lambda: F.normalize(x, state, clip=clip),
        lambda: F.normalize(x, state, clip=clip, out=torch.empty_like(x)),
        lambda: F.denormalize(x, state, clip=clip),
        lambda: torch.func.vmap(lambda v: F.normalize(v, state, clip=clip))(x),
    ):
        with pytest.raises(ValueError, match="expected clip positive and finite"):
            call()
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("value", ["floor", "STD_ADD", 1, None])
def test_bad_mode(value):
    x, state = data((4,), (3,)), Moments.zeros([3])
    with pytest.raises(ValueError, match="expected eps_mode as one of std_floor"):
        F.update_(x, state, eps_mode=value)
    assert state.count.item() == 0


def test_bad_types():
    x, state = data((4,), (3,)), Moments.zeros([3])
    with pytest.raises(TypeError, match="expected clip as a number, got str"):
        F.update_(x, state, clip="10")
    with pytest.raises(ValueError, match="expected eps_mode in 0"):
        ops.normalize([x], F.leaves_of([state]), 1e-4, 4)
