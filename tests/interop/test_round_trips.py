# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics of other libraries, read and written, beside the libraries themselves."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from others import OTHERS, Other

from torchrl_vecnorm import functional as F
from torchrl_vecnorm import interop

RATIOS = [1.0, 100.0, 1e4]
FEATURES = 5


@pytest.fixture(params=OTHERS, ids=lambda other: type(other).__name__)
def other(request) -> Other:
    return request.param


def draw(seed: int, n: int, ratio: float) -> np.ndarray:
    """Rows of float32 whose means are so many deviations away from zero."""
    generator = np.random.default_rng(seed)
    std = np.linspace(0.5, 3, FEATURES)
    return ((generator.normal(size=(n, FEATURES)) + ratio) * std).astype(np.float32)


def trained(other: Other, ratio: float):
    norm = other.make(FEATURES)
    for seed in range(3):
        other.learn(norm, draw(seed, 400, ratio))
    return norm


def doubts(other: Other):
    return pytest.warns(UserWarning, match=other.library) if other.warns else (
        contextlib.nullcontext())  # fmt: skip


def read(other: Other, norm) -> interop.Carried:
    with doubts(other):
        return interop.read(norm, key=other.key)


def same(y: np.ndarray, want: np.ndarray) -> None:
    """But for the last digit of the type."""
    assert y.dtype == want.dtype
    rounding = 3e-7 if y.dtype == np.float32 else 1e-10
    np.testing.assert_allclose(y, want, rtol=rounding, atol=rounding)


def close(ratio: float) -> dict[str, float]:
    """Rounding of float32: of the mean, and of the difference to it."""
    return {"atol": 2e-6 + 1.3e-7 * ratio, "rtol": 2e-6}


@pytest.mark.parametrize("ratio", RATIOS)
def test_outputs(other, ratio):
    """What was read gives theirs; far from zero where they have kept the variance."""
    if ratio > other.most:
        pytest.skip("it has lost the variance itself")
    norm = trained(other, ratio)
    carried = read(other, norm)
    x = draw(9, 1, ratio)
    want = other.apply(norm, x)
    values = torch.from_numpy(x).double()
    ours = carried.running_norm().eval()
    count = carried.moments.count[0].item()
    for y in (
        carried.normalize(values),
        ours(values),
        F.normalize(values, carried.moments, **carried.rule()),
    ):
        y = y / other.divisor(count)
        np.testing.assert_allclose(y, want, **close(ratio))
    # Most of them are not at the clip.
    assert np.unique(want).size == FEATURES and np.abs(want).max() < (
        4 if carried.center else 1e5
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_there_and_back(other, ratio):
    norm = trained(other, ratio)
    if ratio > other.most:
        pytest.skip("it has lost the variance itself")
    carried = read(other, norm)
    x = draw(9, 1, ratio)
    want = other.apply(norm, x)
    fresh = other.make(FEATURES)
    back = interop.write(carried, like=fresh, key=other.key)
    same(other.apply(back, x), want)
    assert back is fresh or "brax" in other.library
    # They go on from there as from their own.
    if type(other).__name__ != "RLlib":
        more = draw(7, 100, ratio)
        other.learn(back, more), other.learn(norm, more)
        y, want = other.apply(back, x), other.apply(norm, x)
        np.testing.assert_allclose(y, want, **close(ratio))


def test_state_dicts(other):
    """With what a state dict does not say; and written to one."""
    norm = trained(other, 1.0)
    state = other.state(norm)
    library = other.library if other.ambiguous else None
    with doubts(other):
        carried = interop.read(state, library, decay=other.decay)
    for a, b in zip(carried.moments, read(other, norm).moments, strict=True):
        assert torch.equal(a, b)
    x = draw(9, 1, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eps and clip may be others than the object's
        new = interop.write(carried, library, like=state, decay=other.decay)
    assert new is not state and new.keys() == state.keys()
    back = other.load(other.make(FEATURES), new)
    same(other.apply(back, x), other.apply(norm, x))


def test_before_data(other):
    """Empty, or with what the library begins with; written, it is what that begins with."""
    if type(other).__name__ in ("LeRobot",):
        pytest.skip("it has no statistics before data")
    fresh = other.make(FEATURES)
    if type(other).__name__ == "Tianshou":
        fresh.mean, fresh.var = np.zeros(FEATURES), np.ones(FEATURES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        carried = interop.read(fresh, key=other.key)
        other.learn(fresh, draw(0, 10, 1.0))
        back = interop.write(carried, like=fresh, key=other.key)
    x = draw(9, 1, 1.0)
    if type(other).__name__ in ("EvoTorch",):
        with pytest.raises(ValueError, match="no data"):
            other.apply(back, x)
        return
    again = other.make(FEATURES)
    if type(other).__name__ == "Tianshou":
        again.mean, again.var = np.zeros(FEATURES), np.ones(FEATURES)
    same(other.apply(back, x), other.apply(again, x))
    more = draw(5, 50, 1.0)
    other.learn(back, more), other.learn(again, more)
    np.testing.assert_allclose(other.apply(back, x), other.apply(again, x), rtol=1e-6)


def test_other_shapes(other):
    """Nothing is written into a normaliser of other features."""
    norm = trained(other, 1.0)
    x = draw(9, 1, 1.0)
    want = other.apply(norm, x)
    moments = F.moments(torch.randn(20, FEATURES + 1))
    if other.decay:
        moments = moments._replace(count=torch.tensor([5.0], dtype=torch.float64))
        moments = moments._replace(sum=moments.sum / 4, ssq=moments.ssq / 4)
    with pytest.raises(ValueError, match=r"shape \(1, 5\)|shape \(5,\)"):
        interop.write(moments, like=norm, key=other.key)
    np.testing.assert_array_equal(other.apply(norm, x), want)
