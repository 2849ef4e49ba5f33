# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The operators against the oracle, torch and exact arithmetic."""

import math
import os
import subprocess
import sys
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    SHAPES,
    data,
    op_samples,
    padded,
    through_a_file,
    transposed,
)

from torchrl_vecnorm import Moments, _ops, oracle
from torchrl_vecnorm import functional as F

ops = torch.ops.torchrl_vecnorm

# Of a normalised value, by the dtype it comes out in.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
ids = {"ids": str}


def assert_same(state: Moments, other: Moments, **tolerance):
    for name, a, b in zip(Moments._fields, state, other, strict=True):
        if tolerance:
            torch.testing.assert_close(
                a, b, msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )
        else:
            assert torch.equal(a, b), name


def clone(state: Moments) -> Moments:
    return Moments(*(None if t is None else t.clone() for t in state))


def check(x, state, *, mask=None, decay=0.9, eps=1e-4, calls=1):
    """Calls with x, each compared with the oracle."""
    expected = clone(state)
    for _ in range(calls):
        y = F.update_(x, state, decay=decay, eps=eps, mask=mask)
        want, expected = oracle.update(x, expected, keep=decay, eps=eps, mask=mask)
        assert_same(state, expected, rtol=1e-5, atol=1e-6)
        assert y.dtype == want.dtype and y.shape == want.shape
        # Judged with our own statistics: theirs were compared above.
        want = oracle.normalize(x, state, eps)
        torch.testing.assert_close(y, want, **TOLERANCE[y.dtype], equal_nan=True)
    return y


# ------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS), **ids)
@pytest.mark.parametrize("samples,features", SHAPES, **ids)
def test_update(samples, features, dtype):
    state = Moments.zeros(features)
    for _ in range(3):
        check(data(samples, features, dtype), state)


@pytest.mark.parametrize("samples", [1, 2, 15, 16, 1000, 65536, 1_000_003])
def test_many_samples(samples):
    check(data((samples,), (3,)), Moments.zeros([3]), calls=2)


@pytest.mark.parametrize("features", [1, 2, 3, 63, 64, 65, 129, 1134, 100_003])
def test_many_features(features):
    check(data((40,), (features,)), Moments.zeros([features]), calls=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], **ids)
@pytest.mark.parametrize("shape", [(700, 3), (700, 40), (50, 20, 6)], **ids)
def test_strides(layout, dtype, shape):
    x = data(shape[:-1], shape[-1:], dtype)
    state, dense = Moments.zeros(shape[-1:]), Moments.zeros(shape[-1:])
    y = check(layout(x), state)
    torch.testing.assert_close(y, F.update_(x, dense, decay=0.9))
    assert_same(state, dense, rtol=1e-5, atol=1e-6)


def test_expanded():
    check(data((1,), (6,)).expand(300, 6), Moments.zeros([6]), calls=2)
    check(data((300,), (1,)).expand(300, 6), Moments.zeros([6]), calls=2)


def test_several_keys_are_one_call_each():
    """All keys in one call give what a call for each gives, to the bit."""
    shapes = [
        ((5000,), (3,)),
        ((5000,), ()),
        ((7,), (2, 4)),
        ((0,), (2,)),
        ((9,), (200,)),
    ]
    dtypes = [*FLOATS, torch.int64]
    xs = [data(*s, dtype) for s, dtype in zip(shapes, dtypes, strict=True)]
    together = [Moments.zeros(f) for _, f in shapes]
    alone = [Moments.zeros(f) for _, f in shapes]
    for _ in range(2):
        ys = F.update_(xs, together, decay=0.9)
        for x, y, a, t in zip(xs, ys, alone, together, strict=True):
            assert torch.equal(F.update_(x, a, decay=0.9), y)
            assert_same(a, t)


def test_33_keys():
    xs = [data((50,), (k % 5 + 1,)) for k in range(33)]
    states = [Moments.zeros(x.shape[1:]) for x in xs]
    for x, y, s in zip(xs, F.update_(xs, states), states, strict=True):
        torch.testing.assert_close(
            y, oracle.normalize(x, s, 1e-4), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("features", [(1,), (3,), (70,)], **ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16], **ids)
def test_mask(features, dtype):
    """Only the samples of the mask count, all are normalised."""
    x = data((3000,), features, dtype)
    mask = torch.rand(3000) < 0.3
    state, chosen = Moments.zeros(features), Moments.zeros(features)
    check(x, state, mask=mask)
    F.update_(x[mask], chosen, decay=0.9)
    # Float sums of other rows at a time: kFlushRows of accumulate.inl has the bound.
    assert_same(state, chosen, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 8, 15])
def test_mask_of_few_wide_samples(rows):
    """As one environment of pixels that is reset beside others."""
    x = data((rows,), (300,), torch.float32)
    x[rows // 2, 7] = math.nan
    state, chosen = (
        Moments.zeros([300], counts_all=True),
        Moments.zeros([300], counts_all=True),
    )
    for mask in (
        torch.arange(rows) % 3 != 1,
        torch.arange(rows) < 0,
        torch.ones(rows) > 0,
    ):
        check(x, state, mask=mask)
        F.update_(x[mask], chosen, decay=0.9)
        assert_same(state, chosen, rtol=0, atol=0)


@pytest.mark.parametrize("composite", [False, True])
def test_shapes_of_masks(composite):
    """One element a sample, in the samples' order or not at all."""
    update, moments = implemented(composite, "update", "moments")
    x = torch.arange(6.0).reshape(2, 3, 1)
    mask = x.squeeze(-1) > 2
    for shape in ((2, 3), (6,), (2, 3, 1), (1, 2, 1, 3)):
        state = Moments.zeros([1])
        update([x], F.leaves_of([state]), [], [mask.reshape(shape)], 1.0, 1.0, 1e-4)
        assert state.sum == 12 and state.count == 3
        assert moments([x], 1, [mask.reshape(shape)])[0] == 12
    state = Moments.zeros([1])
    for wrong in (
        mask.t(),
        mask[:1],
        mask.reshape(1, 6),
        mask.float(),
        mask[..., None, None][:, :2],
    ):
        for call in (
            lambda m=wrong: update([x], F.leaves_of([state]), [], [m], 1.0, 1.0, 1e-4),
            lambda m=wrong: moments([x], 1, [m]),
        ):
            with pytest.raises(ValueError, match=r"key 0: .* mask of shape \[2, 3\]"):
                call()
    assert state.count == 0


@pytest.mark.parametrize("empty", ["no samples", "no sample counts"])
def test_empty_batch_changes_nothing(empty):
    state = Moments.zeros([4])
    F.update_(data((30,), (4,)), state)
    before = clone(state)
    if empty == "no samples":
        y = F.update_(torch.empty(0, 4), state, decay=0.5)
        assert y.shape == (0, 4)
    else:
        x = data((9,), (4,))
        y = F.update_(x, state, decay=0.5, mask=torch.zeros(9, dtype=torch.bool))
        assert torch.equal(y, F.normalize(x, before))
    assert_same(state, before)


def test_out():
    x = data((500,), (6,))
    state = Moments.zeros([6])
    F.update_(x, state)
    want = F.normalize(x, state)
    for out in (
        torch.empty(500, 6),
        torch.empty(6, 500).t(),
        torch.empty(500, 12)[:, ::2],
    ):
        assert F.normalize(x, state, out=out) is out
        torch.testing.assert_close(out, want)
    wide = torch.empty(50, 2, 10, 6)[:, 0]  # no stride describes its samples
    F.normalize(x.view(50, 10, 6), state, out=wide)
    torch.testing.assert_close(wide, want.view(50, 10, 6))
    F.normalize(x, state, out=x)
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize("features", [1, 5, 17, 33, 65, 129, 1000])
@pytest.mark.parametrize("dtype", FLOATS, **ids)
@pytest.mark.parametrize(
    "layout", [torch.clone, padded, transposed], ids=lambda f: f.__name__
)
def test_in_place(layout, dtype, features):
    """What a row's last register reaches back over is not mapped twice."""
    x = layout(data((70,), (features,), dtype))
    state, other = Moments.zeros([features]), Moments.zeros([features])
    want = F.update_(x, other, decay=0.9)
    assert F.update_(x, state, decay=0.9, out=x) is x
    assert torch.equal(x, want)
    assert_same(state, other)


@pytest.mark.parametrize(
    "samples,features,dtype",
    [
        (200_003, 64, torch.float32),
        pytest.param(50_001, 256, torch.float32, marks=pytest.mark.slow),
        pytest.param(200_003, 63, torch.float32, marks=pytest.mark.slow),
        (30_003, 256, torch.float64),
    ],
    **ids,
)
def test_large(samples, features, dtype):
    """Outputs of 48 MB and more are written around the caches, but in place."""
    x = data((samples,), (features,), dtype)
    y = check(x, Moments.zeros([features]))
    F.update_(x, Moments.zeros([features]), decay=0.9, out=x)
    assert torch.equal(x, y)


@pytest.mark.parametrize("value", [1e8, 1e20, math.inf, math.nan])
def test_a_masked_first_sample_is_no_shift(value):
    x = data((64,), (3,))
    x[0] = value
    mask = torch.arange(64) > 0
    state, other = Moments.zeros([3]), Moments.zeros([3])
    F.update_(x, state, mask=mask)
    F.update_(x[1:], other)
    assert_same(state, other, rtol=1e-6, atol=1e-6)


def test_default_dtype_of_integers():
    x = data((50,), (3,), torch.int64)
    for dtype in FLOATS:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            y = F.update_(x, Moments.zeros([3]))
        finally:
            torch.set_default_dtype(before)
        assert y.dtype == dtype
        torch.testing.assert_close(y.mean(0).float(), torch.zeros(3), atol=2e-2, rtol=0)


_ON_ONE_SET = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_ops import SHAPES, FLOATS, LAYOUTS, F, Moments, check, data
def in_place_too(x):
    state, other = (Moments.zeros(x.shape[1:]) for _ in range(2))
    y = check(x, state)
    F.update_(x, other, decay=0.9, out=x)
    assert torch.equal(x, y)

torch.manual_seed(0)
for dtype in FLOATS:
    for samples, features in SHAPES:
        check(data(samples, features, dtype), Moments.zeros(features), calls=2)
    for layout in LAYOUTS:
        check(layout(data((50, 20), (6,), dtype)), Moments.zeros([6]), calls=2)
    for features in (5, 17, 33, 65, 129):
        in_place_too(data((70,), (features,), dtype))
x = data((50001,), (256,))
check(x, Moments.zeros([256]))
check(data((20001,), (255,)), Moments.zeros([255]))
for dtype in FLOATS:
    for features in range(41, 146, 8):
        in_place_too(data((70,), (features,), dtype))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(capability):
    """Each build of the CPU kernels, where the processor has the instructions."""
    result = subprocess.run(
        [sys.executable, "-c", _ON_ONE_SET.format(tests=str(Path(__file__).parent))],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("samples", [1, 9, 300])
@pytest.mark.parametrize("decay", [1e-6, 0.5, 0.9999, 1.0])
def test_values_are_normalised_by_what_the_state_says(samples, decay):
    """To the bit, wherever the batch before this one was: by the variance that is read."""
    places = [(0.0, 1.0), (1e6, 1.0), (1e-3, 1e-9), (1e6, 1e3), (0.0, 1e9), (5.0, 0.0)]
    for (loc, scale), (then_loc, then_scale) in product(places, places):
        state = Moments.zeros([300])
        F.update_(data((50,), (300,), torch.float64, loc, scale), state)
        x = data((samples,), (300,), torch.float64, then_loc, then_scale)
        y = F.update_(x, state, decay=decay)
        assert torch.equal(y, F.normalize(x, state)), (loc, scale, then_loc, then_scale)


# ---------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
@pytest.mark.parametrize("samples", [1, 64, 4096, 1_000_000])
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e5])
def test_scale_far_from_zero(samples, ratio, decay):
    """A relative error of scale below 1e-3, however far the mean is from zero."""
    calls = 2 if samples == 1_000_000 else 30
    state = Moments.zeros([2])
    total = ssq = count = np.longdouble(0)
    keep = np.longdouble(decay)
    for _ in range(calls):
        x = data((samples,), (2,), loc=ratio, scale=1.0)
        F.update_(x, state, decay=decay)
        exact = x.numpy().astype(np.longdouble) - np.longdouble(ratio)
        total = keep * total + exact.sum(0)
        ssq = keep * ssq + (exact * exact).sum(0)
        count = keep * count + samples
    loc, scale = F.loc_scale(state)
    want_loc = total / count
    want_scale = np.sqrt(ssq / count - want_loc**2)
    assert np.all(np.abs(scale.numpy() / want_scale - 1) < 1e-3)
    assert np.all(np.abs(loc.numpy() - ratio - want_loc) < 1e-3 * want_scale)
    y = F.normalize(x, state).numpy()
    want = (x.numpy() - np.longdouble(ratio) - want_loc) / want_scale
    assert np.max(np.abs(y - want)) < 5e-3


def _exact(chunks, decay):
    """loc and scale of integers in exact arithmetic."""
    keep = Fraction(decay)
    total = ssq = count = Fraction(0)
    for x in chunks:
        values = [int(v) for v in x]
        total = keep * total + sum(values)
        ssq = keep * ssq + sum(v * v for v in values)
        count = keep * count + len(values)
    return total / count, math.sqrt(ssq / count - (total / count) ** 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], **ids)
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
@pytest.mark.parametrize("samples", [1, 10])
@pytest.mark.parametrize("loc", [10**6, 1_700_000_000, -(10**12)])
def test_too_far_from_zero_for_sums(loc, samples, decay, dtype):
    """Seconds since 1970: sum and ssq alone have no digit left for the variance."""
    state, merged = Moments.zeros([1]), Moments.zeros([1])
    chunks = [torch.randint(-5, 6, (samples, 1)) + loc for _ in range(150)]
    for x in chunks:
        y = F.update_(x.to(dtype), state, decay=decay)
        F.merge_(merged, F.moments(x.to(dtype)), decay=decay)
    want_loc, want_scale = _exact(chunks, decay)
    for s in (state, merged, state.to("cpu", copy=True)):
        got_loc, got_scale = F.loc_scale(s)
        assert abs(Fraction(got_loc.item()) - want_loc) < 1e-3 * want_scale
        assert got_scale.item() == pytest.approx(want_scale, rel=1e-3)
    want = [(Fraction(int(v)) - want_loc) / Fraction(want_scale) for v in x]
    np.testing.assert_allclose(y[:, 0].double(), [*map(float, want)], atol=2e-3)
    assert torch.equal(F.normalize(x.to(dtype), state), y)
    back = F.denormalize(y.double(), state)
    np.testing.assert_allclose(back - loc, x - loc, atol=1e-2)


def test_sums_that_somebody_else_has_updated():
    """torchrl's class does not know of the variance beside them: they are right."""
    x, other = data((500,), (3,)), data((500,), (3,), loc=-4.0, scale=7.0)
    state, want = Moments.zeros([3]), Moments.zeros([3])
    for s in (state, want):
        F.update_(x, s)
    F.merge_(want, F.moments(other))
    alone = state._replace(nonfinite=None, central=None)
    F.merge_(alone, F.moments(other))
    torch.testing.assert_close(F.loc_scale(state), F.loc_scale(want))
    torch.testing.assert_close(F.normalize(x, state), F.normalize(x, want))
    for s in (state, want):
        F.update_(x, s)
    torch.testing.assert_close(F.loc_scale(state), F.loc_scale(want))


@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
@pytest.mark.parametrize("samples", [1, 64, 1000])
@pytest.mark.parametrize("value", [0.1, 1.0, -333.3, 1e5, 7e8])
@pytest.mark.parametrize("layout", ["reference", "float32", "plain", "own"])
def test_a_constant_shows_no_rounding(layout, value, samples, decay):
    """Its deviations are rounding, which no smaller scale may blow up."""
    dtype = torch.float32 if layout in ("reference", "float32") else torch.float64
    state = Moments.zeros([1], dtype=dtype)
    if layout in ("reference", "plain"):
        state = state._replace(nonfinite=None, central=None)
    x = torch.full((samples, 1), value)
    worst = 0.0
    for _ in range(500):
        y = F.update_(x, state, decay=decay, eps=1e-30)
        worst = max(worst, y.abs().max().item())
    assert worst < 1


@pytest.mark.parametrize("jump", [1e2, 1e4, 1e6])
def test_shift_far_off(jump):
    """A batch far from the running mean, or from its own first sample."""
    state = Moments.zeros([3])
    F.update_(data((1000,), (3,), loc=0.0, scale=1.0), state, decay=0.5)
    before = clone(state)
    x = data((1000,), (3,), loc=jump, scale=1.0)
    F.update_(x, state, decay=0.5)
    want = oracle.fold(before, oracle.batch_moments(x, 1), 0.5)
    # Of the batch alone: the jump itself would hide its variance.
    batch = F.moments(x)
    _, scale = F.loc_scale(batch)
    np.testing.assert_allclose(scale, x.numpy().astype(np.longdouble).std(0), rtol=1e-3)
    # Each lane sums in float: with fewer lanes, more of them round in a row.
    rtol = 1e-7 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1e-6
    torch.testing.assert_close(state.ssq, want.ssq, rtol=rtol, atol=0)
    x[0] = jump * 1e3  # the first sample is the shift of the first call
    outlier = F.moments(x)
    want = oracle.batch_moments(x, 1)
    torch.testing.assert_close(outlier.ssq, want.ssq, rtol=1e-9, atol=0)


def test_constant():
    """A feature that never moves has scale eps, and comes out as zero."""
    for value in (0.0, 0.1, -1e5, 1e30):
        state = Moments.zeros([2])
        for _ in range(5):
            y = F.update_(torch.full((100, 2), value), state, decay=0.9, eps=1e-3)
        loc, scale = F.loc_scale(state, eps=1e-3)
        torch.testing.assert_close(
            loc, torch.full_like(loc, torch.tensor(value).item())
        )
        if abs(value) <= 1:
            assert torch.equal(scale, torch.full_like(scale, 1e-3))
            assert y.abs().max() < 1e-6


@pytest.mark.parametrize("eps", [1e-300, 1e-30, 1e-4, 10.0])
def test_eps_bounds_the_standard_deviation(eps):
    x = torch.cat([torch.zeros(50, 1), data((50,), (1,)) * 1e-3], 1)
    state = Moments.zeros([2])
    y = F.update_(x, state, eps=eps)
    _, scale = F.loc_scale(state, eps=eps)
    assert (scale >= eps).all() and scale[0] == eps
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("value", [1e-25, 1e-12, 1e15, 1e30, 3e38])
def test_squares_out_of_range(value):
    """Sums are float64: the square of a float32 neither over- nor underflows."""
    x = data((500,), (3,), torch.float64, loc=0.0, scale=1.0).clamp(-3, 3) / 3 * value
    x = x.float()
    state = Moments.zeros([3])
    y = F.update_(x, state, eps=1e-300)
    _, scale = F.loc_scale(state, eps=1e-300)
    exact = x.numpy().astype(np.longdouble).std(0)
    np.testing.assert_allclose(scale, exact, rtol=1e-5)
    if value > 1e-12:
        torch.testing.assert_close(
            y.std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("features", [1, 3, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
@pytest.mark.parametrize("sign", [1, -1])
def test_differences_out_of_range(sign, dtype, features):
    """x - loc overflows in float, where y is an ordinary number."""
    # From one value in three to one in a hundred on the other side of zero.
    other = torch.arange(300)[:, None] % torch.linspace(3, 100, features).int() == 0
    x = (torch.rand(300, features) * 3e37 + 3e38).to(dtype)
    x = sign * torch.where(other, -x, x)
    state = Moments.zeros([features])
    y = F.update_(x, state)
    exact = x.double().numpy().astype(np.longdouble)
    want = (exact - exact.mean(0)) / exact.std(0)
    rtol, atol = (1e-5, 1e-5) if dtype is torch.float32 else (5e-3, 1e-5)
    np.testing.assert_allclose(y.double(), want, rtol=rtol, atol=atol)
    assert torch.equal(F.normalize(x, state), y)


def test_a_constant_at_the_end_of_the_range():
    """Its mean is too many deviations from zero to be taken away last."""
    state = Moments.zeros([2])
    x = torch.full((1, 2), 3e38)
    assert torch.equal(F.update_(x, state), torch.zeros(1, 2))


@pytest.mark.parametrize("features", [(1,), (3,), (64,), (100,)], **ids)
@pytest.mark.parametrize("dtype", FLOATS, **ids)
@pytest.mark.parametrize("samples", [1, 20, 5000])
def test_not_finite(samples, dtype, features):
    """Left out, counted, and as IEEE has it in the output; the rest still counts."""
    x = data((samples,), features, dtype)
    x[0, 0] = math.nan
    if samples > 1:
        x[samples // 2, -1] = math.inf
        x[samples - 1, 0] = -math.inf
    state = Moments.zeros(features)
    y = check(x, state, calls=2)
    assert torch.equal(y.isfinite(), x.isfinite())
    left_out = 2 * (~x.isfinite()).sum(0)
    assert torch.equal(state.nonfinite[1], left_out.double())
    total = torch.where(x.isfinite(), x.double(), 0.0).sum(0)
    torch.testing.assert_close(state.sum, 0.9 * total + total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", [(1,), (3,), (16,), (64,), (100,), (700,)], **ids)
@pytest.mark.parametrize("samples", [1, 2, 20, 300])
def test_squares_that_no_sum_holds(samples, features, masked):
    """A double beyond 1e145 is left out, and a smaller one counts, wherever it is."""
    x = data((samples,), features, torch.float64)
    x[0, 0] = 1.01e145
    x[samples // 2, -1] = 0.99e145
    x[samples - 1, features[0] // 2] = -1e200
    mask = torch.arange(samples) != 1 if masked else None
    counts = x if mask is None else x[mask]
    state = Moments.zeros(features)
    for _ in range(2):  # around a shift of as much, the second time
        F.update_(x, state, decay=1, mask=mask)
    assert torch.equal(state.nonfinite[1], 2.0 * (counts.abs() > 1e145).sum(0))
    total = 2 * torch.where(counts.abs() > 1e145, 0.0, counts).sum(0)
    torch.testing.assert_close(state.sum, total, rtol=1e-12, atol=1e-9)


def test_not_finite_in_the_reference_layout():
    state = Moments.zeros([2])._replace(nonfinite=None)
    x = data((100,), (2,))
    check(x, state)
    x[5, 0] = math.nan
    check(x, state, calls=2)
    assert torch.isfinite(state.sum).all()


@pytest.mark.parametrize("counted", [True, False])
def test_float32_state(counted):
    """The reference's layout, updated in place in its own dtype."""
    state = Moments.zeros([4], dtype=torch.float32)
    state = state._replace(nonfinite=state.nonfinite.double() if counted else None)
    address = [t.data_ptr() for t in state if t is not None]
    for _ in range(20):
        check(data((64,), (4,)), state)
    assert state.sum.dtype == state.count.dtype == torch.float32
    assert [t.data_ptr() for t in state if t is not None] == address


# ------------------------------------------------------------------- determinism


def _bits(threads: int) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    result = []
    shapes = (
        (100_000, 3),
        (4096, 64),
        (600, 4200),
        (100, 700),
        (30, 9000),
        (1, 28224),
        (7,),
    )
    for shape in shapes:
        state = Moments.zeros(shape[1:])
        for _ in range(3):
            result.append(F.update_(data(shape[:1], shape[1:]), state))
        result += state
    return result


def test_deterministic():
    """The same to the bit, on every run and with every number of threads."""
    before = torch.get_num_threads()
    try:
        runs = [_bits(threads) for threads in (1, 2, 3, 8, 2)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


# --------------------------------------------------------- pieces of the operation


@pytest.mark.parametrize("decay,weight", [(1.0, 1.0), (0.9, 1.0), (0.99, 0.01)])
def test_moments_and_merge_are_update(decay, weight):
    x = data((200,), (3,))
    x[4, 1] = math.inf
    at_once, in_pieces = Moments.zeros([3]), Moments.zeros([3])
    for _ in range(3):
        F.update_(x, at_once, decay=decay, weight=weight)
        F.merge_(in_pieces, F.moments(x), decay=decay, weight=weight)
    assert_same(at_once, in_pieces, rtol=1e-6, atol=1e-6)


def test_merge_into_the_reference_layout():
    x = data((200,), (3,))
    x[4, 1] = math.inf
    state = Moments.zeros([3], dtype=torch.float32)._replace(nonfinite=None)
    want = clone(state)
    for _ in range(3):
        F.merge_(state, F.moments(x), decay=0.9)
        want = oracle.fold(want, oracle.batch_moments(x, 1), 0.9)
    assert_same(state._replace(nonfinite=state.sum), want._replace(nonfinite=want.sum))


@pytest.mark.parametrize("dtype", FLOATS, **ids)
def test_denormalize(dtype):
    x = data((300,), (3, 2), dtype)
    state = Moments.zeros([3, 2])
    y = F.update_(x, state)
    back = F.denormalize(y, state)
    torch.testing.assert_close(back, x, **TOLERANCE[dtype])
    torch.testing.assert_close(back, oracle.denormalize(y, state, 1e-4))


def test_nothing_seen_is_identity():
    x = data((20,), (3,))
    assert torch.equal(F.normalize(x, Moments.zeros([3])), x)
    assert torch.equal(F.denormalize(x, Moments.zeros([3])), x)
    loc, scale = F.loc_scale(Moments.zeros([3]))
    assert torch.equal(loc, torch.zeros_like(loc)) and torch.equal(scale, torch.ones(3))


# --------------------------------------------------------------------- gradients


def test_gradients():
    """Differentiable in x, with the statistics as constants."""
    for sample in op_samples(requires_grad=True):
        xs = [x for x in sample.x if x.is_floating_point()]
        if len(xs) != len(sample.x):
            continue
        masks = sample.mask or None
        for y, x, s in zip(
            F.update_(xs, sample.states, decay=0.9, mask=masks),
            xs,
            sample.states,
            strict=True,
        ):
            _, scale = oracle.loc_scale(s, 1e-4)
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
            want = (1 / scale).expand_as(x).to(x.dtype)
            torch.testing.assert_close(grad, want, rtol=2e-3, atol=1e-6)


def test_gradcheck():
    state = Moments.zeros([3])
    F.update_(data((50,), (3,)), state)
    x = data((4,), (3,), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: F.normalize(v, state), x)
    assert torch.autograd.gradcheck(lambda v: F.denormalize(v, state), x)
    assert torch.autograd.gradgradcheck(lambda v: F.normalize(v, state), x)


def test_no_graph_from_call_to_call():
    state = Moments.zeros([3])
    for _ in range(3):
        y = F.update_(data((4,), (3,)).requires_grad_(), state)
    assert not any(t.requires_grad for t in state)
    assert y.grad_fn.next_functions[0][0].name().endswith("AccumulateGrad")
    with torch.no_grad():
        assert not F.update_(data((4,), (3,)).requires_grad_(), state).requires_grad


def test_only_what_needs_gradients():
    xs = [data((4,), (3,)).requires_grad_(), data((4,), (2,))]
    ys = F.update_(xs, [Moments.zeros([3]), Moments.zeros([2])])
    assert [y.requires_grad for y in ys] == [True, False]
    (ys[0].sum() + ys[1].sum()).backward()
    assert xs[0].grad is not None and xs[1].grad is None


def _outputs(like: torch.Tensor) -> dict[str, torch.Tensor]:
    buffer = torch.zeros(2, *like.shape, dtype=like.dtype)
    graph = torch.zeros_like(like, requires_grad=True) * 1
    return {
        "plain": torch.zeros_like(like),
        "view": buffer[0],
        "transposed": torch.zeros_like(like.mT).mT,
        "of a graph": graph,
        "view of a graph": graph.view(like.shape),
    }


@pytest.mark.parametrize("call", [F.update_, F.normalize])
@pytest.mark.parametrize("which", _outputs(torch.ones(4, 3)))
def test_gradients_through_outputs(which, call):
    """Whatever the result is written to, its gradient is that of the result."""
    w = data((4,), (3,), torch.float64).requires_grad_()
    state = F.moments(data((40,), (3,)))
    other = clone(state)
    out = _outputs(w.detach())[which]
    y = call(w * 2, state, out=out)
    assert y is out
    want = call(w.detach() * 2, other)
    assert torch.equal(y, want)
    y.sum().backward()
    _, scale = F.loc_scale(state)
    torch.testing.assert_close(w.grad, (2 / scale).expand(4, 3))


def test_gradients_in_place():
    """Also of a view that is its own output, beside one of the same buffer."""
    w = data((4,), (6,), torch.float64).requires_grad_()
    states = [Moments.zeros([3]), Moments.zeros([3])]
    buffer = w * 2
    halves = [buffer[:, :3], buffer[:, 3:]]
    F.update_(halves, states, out=halves)
    buffer.sum().backward()
    scales = [F.loc_scale(s)[1] for s in states]
    torch.testing.assert_close(w.grad, (2 / torch.cat(scales)).expand(4, 6))


def test_no_gradient_through_what_was_overwritten():
    w = torch.ones(4, 3, requires_grad=True)
    out = w * 2
    F.update_(data((4,), (3,)), Moments.zeros([3]), out=out)
    out.sum().backward()
    assert torch.equal(w.grad, torch.zeros(4, 3))


def test_outputs_that_autograd_refuses():
    """Before anything is written."""
    x = data((4,), (3,)).requires_grad_()
    with torch.inference_mode():
        inference = torch.empty(4, 3)
    with torch.no_grad():
        old = torch.empty(1, 4, 3)[0]
    for value, out, match in (
        (x, x, "leaf Variable"),
        (x, torch.empty(4, 3, requires_grad=True), "leaf Variable"),
        (x, torch.empty(1, 4, 3, requires_grad=True)[0], "leaf Variable"),
        (x.detach(), torch.empty(4, 3, requires_grad=True), "leaf Variable"),
        (x, torch.empty(2, 4, 3).unbind(0)[0], "multiple views"),
        (x, old, "no_grad"),
        (x, inference, "inference tensor"),
    ):
        state = Moments.zeros([3])
        before = out.detach().clone()
        with pytest.raises(RuntimeError, match=match) as error:
            F.update_([value], [state], out=[out])
        assert "key 0" in str(error.value)
        assert_same(state, Moments.zeros([3]))
        assert torch.equal(out.detach().nan_to_num(), before.nan_to_num())
        with torch.no_grad():
            F.update_(value.detach(), state, out=out)
        assert state.count == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_that_were_ever_seen(dtype):
    """The second element of count, where there is one: it does not decay."""
    state, plain = (
        Moments.zeros([3], dtype=dtype, counts_all=c) for c in (True, False)
    )
    expected, seen = Moments.zeros([3], counts_all=True), 0
    mask = torch.tensor([True, False, True, True, False])
    for i, (n, m) in enumerate(
        [(5, None), (5, mask), (0, None), (1, None), (5, ~mask)]
    ):
        x = data((n,), (3,)) + i
        y = F.update_(x, state, decay=0.9, weight=0.25, mask=m)
        z, expected = oracle.update(x, expected, keep=0.9, weight=0.25, mask=m)
        assert torch.equal(F.update_(x, plain, decay=0.9, weight=0.25, mask=m), y)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
        seen += n if m is None else int(m.sum())
        assert state.count[1] == state.seen() == expected.seen() == seen
        assert state.count[0] == state.samples() == plain.count
        torch.testing.assert_close(F.normalize(x, state), y)
    # Another that counts them, and a batch.
    other, batch = state.to(state.sum.device, copy=True), F.moments(data((7,), (3,)))
    F.merge_(state, other, decay=0.5)
    F.merge_(state, batch)
    assert state.count[1] == 2 * seen + 7
    expected = oracle.fold(oracle.fold(other, other, 0.5), batch, 1.0)
    torch.testing.assert_close(state.count, expected.count.to(dtype))
    w = data((2,), (3,)).requires_grad_()
    F.normalize(w, state).sum().backward()
    F.normalize(w.detach(), state._replace(count=state.count[:1]))
    torch.testing.assert_close(w.grad[0], 1 / F.loc_scale(state)[1].to(w.dtype))


@pytest.mark.parametrize("inference", [False, True])
def test_a_state_that_a_graph_has_saved(inference):
    """Its backward pass would take the new statistics for the old ones."""
    x = data((5,), (3,))
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    batch = F.moments(x)
    for call in (
        lambda s: F.update_(x, s),
        lambda s: F.merge_(s, batch),
        lambda s: _ops._merge(F.leaves_of([s]), F.leaves_of([batch]), 1.0, 1.0),
    ):
        for leaf in range(5):
            state = Moments.zeros([3])
            loss = (w * state[leaf]).sum()
            with torch.inference_mode(inference):
                call(state)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# ---------------------------------------------------------------------- operators


@pytest.mark.parametrize(
    "requires_grad", [pytest.param(False, marks=pytest.mark.slow), True]
)
@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(i, marks=[pytest.mark.slow] * (len(sample.x) > 1))
        for i, sample in enumerate(op_samples())
    ],
)
def test_opcheck(sample, requires_grad):
    sample = op_samples(requires_grad)[sample]
    leaves = F.leaves_of(sample.states)
    y = _ops.outputs_like(sample.x)
    numbers = (0.9, 1.0, 1e-4)
    arguments = (sample.x, leaves, y, sample.mask, *numbers)
    torch.library.opcheck(ops.update.default, arguments)
    torch.library.opcheck(ops.normalize.default, (sample.x, leaves, 1e-4))
    torch.library.opcheck(ops.normalize_out.default, (sample.x, leaves, y, 1e-4))
    floats = [x for x in sample.x if x.is_floating_point()]
    if len(floats) == len(sample.x):
        torch.library.opcheck(ops.denormalize.default, (sample.x, leaves, 1e-4))
    for x, state, mask in zip(
        sample.x, sample.states, sample.mask or [None] * len(sample.x), strict=True
    ):
        masks = [] if mask is None else [mask]
        torch.library.opcheck(ops.moments.default, ([x], state.sum.ndim, masks))
    others = F.leaves_of([clone(s) for s in sample.states])
    torch.library.opcheck(ops.merge.default, (leaves, others, 0.9, 1.0))


def _steps(update, requires_grad):
    state = Moments.zeros([3])
    torch.manual_seed(3)
    results = []
    for _ in range(3):
        x = data((50,), (3,)).requires_grad_(requires_grad)
        y = update(x, state)
        if requires_grad:
            y.square().sum().backward()
            results.append(x.grad)
        results.append(y.detach())
    return [*results, *state]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile(backend, requires_grad):
    def update(x, state):
        return F.update_(x, state, decay=0.9)

    compiled = torch.compile(update, fullgraph=True, backend=backend)
    for a, b in zip(
        _steps(update, requires_grad), _steps(compiled, requires_grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_profiler_sees_one_operator():
    xs, states = (
        [data((9,), (3,)), data((9,), ())],
        [Moments.zeros([3]), Moments.zeros([])],
    )
    with torch.profiler.profile() as profile:
        F.update_(xs, states)
    names = [e.name for e in profile.events()]
    assert names.count("torchrl_vecnorm::update") == 1


def test_composite():
    """Devices without a kernel run plain torch: the same operators, the same results."""
    for sample in op_samples():
        leaves = F.leaves_of([clone(s) for s in sample.states])
        other = F.leaves_of([clone(s) for s in sample.states])
        mine, theirs = _ops.outputs_like(sample.x), _ops.outputs_like(sample.x)
        ops.update(sample.x, leaves, mine, sample.mask, 0.9, 1.0, 1e-4)
        _ops._update(sample.x, other, theirs, sample.mask, 0.9, 1.0, 1e-4)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[a.dtype])
        for a, b in zip(leaves, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        _ops._normalize_out(sample.x, other, theirs, 1e-4)
        mine = ops.normalize(sample.x, other, 1e-4)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[a.dtype])
    for name in (
        "update",
        "normalize",
        "normalize_out",
        "denormalize",
        "moments",
        "merge",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"torchrl_vecnorm::{name}", "CompositeExplicitAutograd"
        )


# --------------------------------------------------------------------------- errors


def _refused_calls():
    """What every implementation refuses: arguments of update, the error, its message."""
    good, x = Moments.zeros([3]), data((5,), (3,))

    def call(value, state=good, out=None, mask=None):
        y = torch.empty_like(x) if out is None else out
        masks = [] if mask is None else [torch.empty(0, dtype=torch.bool), mask]
        xs = [x, value]
        leaves = F.leaves_of([Moments.zeros([3]), clone(state)])
        return xs, leaves, [torch.empty_like(x), y], masks, 0.9, 1.0, 1e-4

    return {
        "features": (call(torch.ones(5, 1)), ValueError, r"shape \[3\].*\[5, 1\]"),
        "output": (call(x, out=torch.empty(1, 3)), ValueError, r"\[5, 3\].*\[1, 3\]"),
        "complex": (call(x.to(torch.complex64)), TypeError, "real"),
        "integer output": (
            call(x, out=torch.empty(5, 3).int()),
            TypeError,
            "Int output",
        ),
        "mask": (
            call(x, mask=torch.ones(4).bool()),
            ValueError,
            r"bool mask of shape \[5\]",
        ),
        "count": (
            call(x, good._replace(count=torch.zeros(3).double())),
            ValueError,
            "count",
        ),
        "dtype": (
            call(x, good._replace(ssq=torch.zeros(3).half())),
            TypeError,
            "ssq as dense float64 or float32, got Half",
        ),
    }


@pytest.mark.parametrize("update", [ops.update, _ops._update])
@pytest.mark.parametrize("what", _refused_calls())
def test_refused_by_every_implementation(what, update):
    arguments, error, message = _refused_calls()[what]
    before = [t.clone() for t in arguments[1]]
    with pytest.raises(error, match=f"key 1.*{message}"):
        update(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[1], before, strict=True))


def implemented(composite: bool, *names: str) -> list:
    """The operators: as the dispatcher has them, or those in plain torch."""
    if composite:
        return [getattr(_ops, f"_{name}") for name in names]
    return [getattr(ops, name) for name in names]


@pytest.mark.parametrize("composite", [False, True])
def test_refused_by_the_others(composite):
    good, x = Moments.zeros([3]), data((5,), (3,))
    leaves, wide = F.leaves_of([good]), [torch.empty(1, 3)]
    normalize_out, denormalize, merge = implemented(
        composite, "normalize_out", "denormalize", "merge"
    )
    with pytest.raises(ValueError, match=r"key 0.*\[5, 3\].*\[1, 3\]"):
        normalize_out([x], leaves, wide, 1e-4)
    integers = torch.ones(5, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"key 0.*floating-point"):
        denormalize([integers], leaves, 1e-4)
    with pytest.raises(ValueError, match=r"key 0.*\[3\].*\[1\]"):
        merge(leaves, F.leaves_of([F.moments(x[:, :1])]), 1.0, 1.0)
    with pytest.raises(ValueError, match="expected moments of 1 keys to merge, got 2"):
        merge(leaves, F.leaves_of([good, good]), 1.0, 1.0)
    assert_same(good, Moments.zeros([3]))


BAD_DECAYS = (math.nan, 0.0, -0.5, 1.5, math.inf)
BAD_WEIGHTS = (math.nan, 0.0, -1.0, math.inf)


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize(
    "name,value",
    [("decay", v) for v in BAD_DECAYS]
    + [(name, v) for name in ("weight", "eps") for v in BAD_WEIGHTS],
)
def test_numbers_that_are_none(name, value, composite):
    """Nothing is written, in eager mode and by the operators of a graph."""
    x, state = data((5,), (3,)), F.moments(data((9,), (3,)))
    before = clone(state)
    numbers = {"decay": 0.9, "weight": 1.0, "eps": 1e-4, name: value}
    calls = [lambda: F.update_(x, state, **numbers)]
    leaves, names = (
        F.leaves_of([state]),
        ("update", "merge", "normalize", "denormalize"),
    )
    update, merge, normalize, denormalize = implemented(composite, *names)
    calls.append(lambda: update([x], leaves, [], [], *numbers.values()))
    if name != "eps":
        weights = {k: numbers[k] for k in ("decay", "weight")}
        calls.append(lambda: F.merge_(state, F.moments(x), **weights))
        batch = F.leaves_of([F.moments(x)])
        calls.append(lambda: merge(leaves, batch, *weights.values()))
    else:
        calls += [
            lambda: F.normalize(x, state, eps=value),
            lambda: F.normalize(x, state, eps=value, out=torch.empty_like(x)),
            lambda: F.denormalize(x, state, eps=value),
            lambda: F.loc_scale(state, eps=value),
            lambda: normalize([x], leaves, value),
            lambda: denormalize([x], leaves, value),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=f"expected {name} .*, got"):
            call()
    assert_same(state, before)


@pytest.mark.parametrize(
    "value",
    [np.ones(1), [0.9], "0.9", None, 1j, torch.tensor(1j), torch.ones(2)],
    **ids,
)
def test_numbers_of_other_types(value):
    x, state = data((5,), (3,)), Moments.zeros([3])
    for name in ("decay", "weight", "eps"):
        with pytest.raises(TypeError, match=f"expected {name} as a number, got"):
            F.update_(x, state, **{name: value})
    assert state.count == 0
    for good in (np.float32(0.5), Fraction(1, 2), torch.tensor(0.5)):
        F.update_(x, state, decay=good)
    assert state.count == 5 * 1.75


@pytest.mark.parametrize("value", [np.ones((5, 3)), [[1.0]], 3.0, "x", None], **ids)
def test_values_that_are_no_tensors(value):
    state = Moments.zeros([3])
    with pytest.raises(TypeError, match="expected x as Tensor or a list of them, got"):
        F.update_(value, state)
    with pytest.raises(TypeError, match="expected x as Tensor or a list"):
        F.normalize(value, state)
    with pytest.raises(TypeError, match="expected y as Tensor or a list"):
        F.denormalize(value, state)
    x = data((5,), (3,))
    if value is not None:
        with pytest.raises(TypeError, match="expected mask as a tensor"):
            F.update_(x, state, mask=value)
    with pytest.raises(TypeError, match="expected state as Moments or a list of them"):
        F.update_(x, tuple(state))
    assert state.count == 0


def test_refused():
    """A key that is refused leaves the statistics of all keys as they were."""
    good, x = Moments.zeros([3]), data((5,), (3,))
    F.update_(x, good)
    bad = [
        (torch.ones(5, 4), Moments.zeros([3]), ValueError, r"shape \[3\].*\[5, 4\]"),
        (torch.ones(()), Moments.zeros([3]), ValueError, r"shape \[3\]"),
        (
            torch.ones(5, 3, dtype=torch.complex64),
            Moments.zeros([3]),
            TypeError,
            "real",
        ),
        (x, good._replace(ssq=torch.zeros(2).double()), ValueError, "ssq"),
        (x, good._replace(count=torch.zeros(3).double()), ValueError, "count"),
        (x, good._replace(nonfinite=torch.zeros(3).double()), ValueError, "finite"),
        (x, good._replace(sum=torch.zeros(3).half()), TypeError, "float64 or float32"),
    ]
    for value, state, error, message in bad:
        before = clone(good)
        with pytest.raises(error, match=f"key 1.*{message}"):
            F.update_([x, value], [good, state])
        assert_same(good, before)
    for call in (
        lambda: F.update_([x, x], [good]),
        lambda: F.update_(x, good, mask=torch.ones(4, dtype=torch.bool)),
        lambda: F.normalize(x, good, out=torch.empty(5, 2)),
        lambda: F.merge_(good, Moments.zeros([2])),
    ):
        with pytest.raises(ValueError):
            call()
        assert_same(good, before)
    with pytest.raises(TypeError, match="output"):
        F.normalize(x, good, out=torch.empty(5, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="floating-point"):
        F.denormalize(torch.ones(5, 3, dtype=torch.int64), good)


def test_outputs_that_overlap():
    x = data((6,), (3,))
    state = Moments.zeros([3])
    F.update_(x, state)
    for out in (torch.zeros(1, 3).expand(6, 3), torch.empty(0)):
        with pytest.raises((RuntimeError, ValueError)):
            F.normalize(x, state, out=out)
    buffer = torch.zeros(7, 3)
    with pytest.raises(RuntimeError, match="memory location"):
        F.normalize(buffer[:-1], state, out=buffer[1:])


@pytest.mark.parametrize("update", [ops.update, _ops._update])
def test_outputs_of_other_keys(update):
    """One key's output is not where another reads or writes."""
    a, b, buffer = data((5,), (3,)), data((5,), (3,)), torch.zeros(6, 3)
    for xs, ys in (
        ([a, b], [b, a]),
        ([a, b], [torch.empty(5, 3), a]),
        ([a, b], [buffer[:5], buffer[1:]]),
        ([a, b], [buffer[:5], buffer[:5]]),
        ([a, b[:, :2]], [torch.empty(5, 3), a[:, :2]]),
    ):
        states = [Moments.zeros(x.shape[1:]) for x in xs]
        before = [x.clone() for x in xs]
        with pytest.raises(ValueError, match=r"key \d: .* memory"):
            update(xs, F.leaves_of(states), ys, [], 0.9, 1.0, 1e-4)
        assert all(s.count == 0 for s in states)
        assert all(torch.equal(x, v) for x, v in zip(xs, before, strict=True))
    wide = torch.cat([a, b], 1)
    halves = [wide[:, :3], wide[:, 3:]]
    states = [Moments.zeros([3]), Moments.zeros([3])]
    update(halves, F.leaves_of(states), halves, [], 0.9, 1.0, 1e-4)
    want = [F.update_(x, Moments.zeros([3]), decay=0.9) for x in (a, b)]
    torch.testing.assert_close(wide, torch.cat(want, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("composite", [False, True])
def test_one_state_for_two_keys(composite):
    """It can be read twice, but an update would depend on the order."""
    update, merge, normalize_out = implemented(
        composite, "update", "merge", "normalize_out"
    )
    x, state = data((5,), (3,)), Moments.zeros([3])
    F.update_(x, state)
    before = clone(state)
    twice, outputs = F.leaves_of([state, state]), [torch.empty(5, 3), torch.empty(5, 3)]
    with pytest.raises(
        ValueError, match=r"key 1: .*of its own, .* sum of key 0 and sum of key 1"
    ):
        update([x, x], twice, outputs, [], 0.9, 1.0, 1e-4)
    with pytest.raises(
        ValueError, match=r"key 1: .*of its own, .* sum of key 0 and sum of key 1"
    ):
        merge(twice, F.leaves_of([F.moments(x), F.moments(x)]), 1.0, 1.0)
    assert_same(state, before)
    normalize_out([x, x], twice, outputs, 1e-4)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("pair", [*combinations(range(10), 2)], **ids)
def test_leaves_that_share_memory(pair, composite):
    """Of one state, and of two: an update of one would be an update of the other."""
    update, merge = implemented(composite, "update", "merge")
    leaves = F.leaves_of([Moments.zeros([1]), Moments.zeros([1])])
    _, second = pair
    memory = torch.zeros(4, dtype=torch.float64)
    for at in pair:
        shape = leaves[at].shape
        leaves[at] = memory[: shape.numel()].view(shape)
    x = [torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [30.0]])]
    y = [torch.empty(2, 1), torch.empty(2, 1)]
    names = [f"{Moments._fields[i % 5]} of key {i // 5}" for i in pair]
    message = f"key {second // 5}: .*one piece of memory for {' and '.join(names)}"
    with pytest.raises(ValueError, match=message):
        update(x, leaves, y, [], 1.0, 1.0, 1e-4)
    with pytest.raises(ValueError, match=message):
        merge(leaves, F.leaves_of(F.moments(x)), 1.0, 1.0)
    assert not any(leaf.any() for leaf in leaves)


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("leaf", range(5))
def test_memory_of_a_state(leaf, composite):
    """No value, output or batch of moments lies where an update writes."""
    update, merge, normalize_out = implemented(
        composite, "update", "merge", "normalize_out"
    )
    state = F.moments(data((50,), (1,), torch.float64))
    before = clone(state)
    leaves = F.leaves_of([state])
    inside = state[leaf].view(-1, 1)
    x, y = torch.zeros_like(inside), torch.zeros_like(inside)
    numbers = (0.9, 1.0, 1e-4)
    for values, out in ((inside, y), (inside[:1].expand(7, 1), None), (x, inside)):
        outputs = [] if out is None else [out]
        with pytest.raises(ValueError, match=r"key 0: .* apart from all states"):
            update([values], leaves, outputs, [], *numbers)
    with pytest.raises(ValueError, match="an output apart from all states"):
        normalize_out([x], leaves, [inside], 1e-4)
    other = list(F.moments(data((50,), (1,))))
    other[leaf] = state[leaf]
    with pytest.raises(ValueError, match="moments to merge apart from all states"):
        merge(leaves, other, 1.0, 1.0)
    assert_same(state, before)
    # Between the columns of a larger tensor is room for a state.
    wide = torch.zeros(6, 4, dtype=torch.float64)
    held = Moments.zeros([1])._replace(sum=wide[0, 3:])
    F.update_(wide[:, :2].mT[..., None], held)
    assert held.count == 12


def test_more_outputs_than_values():
    state = Moments.zeros([3])
    with pytest.raises(ValueError, match="expected 1 tensors in y"):
        F.update_([data((5,), (3,))], [state], out=[torch.empty(5, 3)] * 20)
    assert state.count == 0


def test_an_output_that_a_graph_has_saved():
    x, saved = data((5,), (3,)), torch.ones(5, 3)
    w = torch.ones(5, 3, requires_grad=True)
    z = (saved * w).sum()
    F.update_(x, Moments.zeros([3]), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_feature_ndim():
    with pytest.raises(ValueError, match="feature_ndim from 0 to 1"):
        F.moments(torch.ones(5), feature_ndim=2)


def test_functorch_and_forward_mode():
    """They know plain torch only, and get it."""
    state = Moments.zeros([3])
    F.update_(data((50,), (3,)), state)
    _, scale = F.loc_scale(state)
    x, ones = data((4,), (3,)), torch.ones(4, 3)
    _, tangent = torch.func.jvp(lambda v: F.normalize(v, state), (x,), (ones,))
    torch.testing.assert_close(tangent, (1 / scale).float().expand(4, 3))
    _, tangent = torch.func.jvp(lambda v: F.denormalize(v, state), (x,), (ones,))
    torch.testing.assert_close(tangent, scale.float().expand(4, 3))
    grad = torch.func.grad(lambda v: F.normalize(v, state).sum())(x)
    torch.testing.assert_close(grad, (1 / scale).float().expand(4, 3))
    mapped = torch.func.vmap(lambda v: F.normalize(v, state))(x)
    torch.testing.assert_close(mapped, F.normalize(x, state))


def _scales(state, samples=4):
    return (1 / F.loc_scale(state)[1]).float().expand(samples, 3)


@pytest.mark.parametrize("out", [False, True])
def test_forward_mode_of_update(out):
    """The statistics are constants, and see each value once."""
    x, ones = data((4,), (3,)), torch.ones(4, 3)

    def update(v, state):
        return F.update_(v, state, out=torch.zeros(2, 4, 3)[0] if out else None)

    state, want = Moments.zeros([3]), Moments.zeros([3])
    F.update_(x, want)
    y, tangent = torch.func.jvp(lambda v: update(v, state), (x,), (ones,))
    assert_same(state, want)
    torch.testing.assert_close(tangent, _scales(state))
    torch.testing.assert_close(y, F.normalize(x, state))
    state = Moments.zeros([3])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, ones)
        y = torch.autograd.forward_ad.unpack_dual(update(dual, state))
        torch.testing.assert_close(y.tangent, _scales(state))
    assert_same(state, want)
    state = Moments.zeros([3])
    grad = torch.func.grad(lambda v: update(v, state).sum())(x)
    torch.testing.assert_close(grad, _scales(state))
    assert_same(state, want)
    state = Moments.zeros([3])
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        jacobian = transform(lambda v: update(v, state))(x)
        torch.testing.assert_close(
            jacobian.sum((2, 3)), _scales(state), rtol=1e-5, atol=0
        )


def test_forward_mode_is_not_forgotten():
    state, x = Moments.zeros([3]), data((4,), (3,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(4, 3))
        with pytest.raises(NotImplementedError, match=r"key 0.*forward-mode"):
            ops.update([dual], F.leaves_of([state]), [x], [], 0.9, 1.0, 1e-4)
        y = F.normalize(dual, state, out=torch.empty(4, 3))
        assert torch.equal(
            torch.autograd.forward_ad.unpack_dual(y).tangent, torch.ones(4, 3)
        )
    assert state.count == 0
    captured = torch.empty(4, 3)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.grad(lambda v: F.update_(v, state, out=captured).sum())(x)
    with pytest.raises(ValueError, match=r"key 0: .* each of the 4 .* got one sum"):
        torch.func.vmap(lambda v: F.update_(v, state))(x)
    assert state.count == 0


def _stacked(n: int, features=(3,)) -> Moments:
    """Statistics of n networks that have seen different values."""
    states = [Moments.zeros(features) for _ in range(n)]
    for i, state in enumerate(states):
        F.update_(data((10 + i,), features), state)
    return Moments(*(torch.stack(leaves) for leaves in zip(*states, strict=True)))


@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=pytest.mark.slow, id="inductor")],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("x_dim", [None, 0, 1])
def test_networks_that_are_stacked(x_dim, masked, compiled):
    """Each of them learns from its batch, or from that of all, as it would alone."""
    state = _stacked(3)
    want = [Moments(*(leaf[i].clone() for leaf in state)) for i in range(3)]
    x = data((7, 3) if x_dim is not None else (7,), (3,))
    x = x.transpose(0, 1) if x_dim == 0 else x
    x[0, 0] = math.nan
    x.requires_grad_()
    mask = torch.arange(7) % 3 > 0 if masked else None

    def update(leaves, v):
        return F.update_(v, leaves, decay=0.9, mask=mask)

    call = torch.func.vmap(update, in_dims=(0, x_dim))
    y = (torch.compile(call) if compiled else call)(state, x)
    y.sum().backward()
    for i in range(3):
        alone = x.detach() if x_dim is None else x.detach().select(x_dim, i)
        torch.testing.assert_close(
            y[i], F.update_(alone, want[i], decay=0.9, mask=mask), equal_nan=True
        )
        assert_same(Moments(*(leaf[i] for leaf in state)), want[i])
    grads = torch.stack([_scales(s, 7) for s in want], x_dim or 0)
    torch.testing.assert_close(x.grad, grads.sum(0) if x_dim is None else grads)


def _update_what_needs_a_copy(queue):
    x = torch.randn(40, 50, 60, 17).permute(2, 1, 0, 3)[::2, :, ::2]
    queue.put(F.update_(x, Moments.zeros([17])).mean().item())


def test_after_a_fork():
    """A forked child has no thread pool: copies of torch's must not wait for it."""
    F.update_(torch.randn(300_000, 7), Moments.zeros([7]))
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_update_what_needs_a_copy, args=(queue,))
    child.start()
    try:
        assert abs(queue.get(timeout=60)) < 0.01
    finally:
        child.kill()
        child.join()


# ------------------------------------------------------------------- traces, files


def traced(function, *args):
    return torch.jit.trace(function, args, check_trace=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32], **ids)
def test_traces(dtype):
    """What mutates nothing is recorded, by values and not by memory."""
    state = F.moments(data((50,), (3,)))
    x, other = data((4,), (3,), dtype), data((6,), (3,), dtype)
    for function in (
        lambda v: F.normalize(v, state),
        lambda v: F.denormalize(v.float(), state),
        lambda v: F.moments(v).sum,
        lambda v: F.normalize([v, 2 * v], [state, state])[1],
    ):
        trace = traced(function, x)
        torch.testing.assert_close(trace(other), function(other))
        torch.testing.assert_close(trace(other.t().contiguous().t()), function(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traces_of_what_changes():
    """An update cannot be part of a trace: it says so, and changes nothing."""
    state, x = F.moments(data((50,), (3,))), data((4,), (3,))
    before = clone(state)
    batch = F.moments(x)
    for call in (
        lambda v: F.update_(v, state),
        lambda v: F.update_(v, state, out=torch.empty(4, 3)),
        lambda v: F.normalize(v, state, out=torch.empty(4, 3)),
        lambda v: (F.merge_(state, batch), v)[1],
    ):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record"):
            traced(call, x)
    assert_same(state, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """The backward pass runs the forward pass again: an update would count twice."""
    state, x = F.moments(torch.randn(10, 3)), torch.randn(4, 3, requires_grad=True)
    checkpoint = torch.utils.checkpoint.checkpoint
    loss = checkpoint(
        lambda v: F.update_(v, state, decay=1).pow(2).sum(), x, use_reentrant=reentrant
    )
    with pytest.raises(RuntimeError, match=r"expected updates .* in forward passes"):
        loss.backward()
    assert state.count == 14
    # What is not an update runs again as it ran, and hooks may update.
    loss = checkpoint(
        lambda v: F.normalize(v, state).pow(2).sum(), x, use_reentrant=reentrant
    )
    (grad,) = torch.autograd.grad(loss, x) if not reentrant else (None,)
    y = F.normalize(x, state)
    if grad is not None:
        torch.testing.assert_close(grad, 2 * y * _scales(state))
    y.register_hook(lambda g: (F.update_(g, state, decay=1), None)[1])
    y.sum().backward()
    assert state.count == 18


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_file(weights_only):
    state = F.moments(data((50,), (3,)))
    plain = state._replace(nonfinite=None, central=None)
    for saved in (state, plain):
        loaded = through_a_file(saved, weights_only=weights_only)
        assert type(loaded) is Moments
        assert [leaf is None for leaf in loaded] == [leaf is None for leaf in saved]
        assert torch.equal(loaded.ssq, state.ssq)
        fields = through_a_file(saved._asdict(), weights_only=weights_only)
        assert torch.equal(Moments(**fields).sum, state.sum)


def test_float32_statistics():
    """Of a device that has nothing better, brought to the CPU."""
    x = data((40,), (3,)).requires_grad_()
    single, double = Moments.zeros([3], dtype=torch.float32), Moments.zeros([3])
    for _ in range(3):
        y = F.update_(x, single, decay=0.9)
        want = F.update_(x, double, decay=0.9)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        F.loc_scale(single), F.loc_scale(double), rtol=1e-5, atol=1e-5
    )
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (1 / F.loc_scale(single)[1]).float().expand(40, 3))
    for into, other in ((Moments.zeros([3]), single), (clone(single), double)):
        F.merge_(into, other)
        torch.testing.assert_close(
            F.loc_scale(into), F.loc_scale(double), rtol=1e-5, atol=1e-5
        )
    spoiled = x.detach().clone()
    spoiled[0, 0] = math.nan
    F.update_(spoiled, single)
    assert single.nonfinite[1].tolist() == [1, 0, 0]


def test_extras():
    """What the layout of torchrl's class does without is made for it."""
    state = F.moments(data((50,), (3,), loc=100.0))
    made = state._replace(nonfinite=None, central=None).with_extras()
    assert not made.nonfinite.any()
    torch.testing.assert_close(made.central, state.central)
    assert state.with_extras() == state
