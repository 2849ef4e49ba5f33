# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The oracle against exact fractions, numpy and torch: who judges the kernels is judged."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from samples import data

from torchrl_vecnorm import Moments, oracle


def exact_statistics(batches, decay):
    """loc and var of one feature in exact arithmetic."""
    total = ssq = count = Fraction(0)
    keep = Fraction(decay)
    for batch in batches:
        values = [Fraction(v) for v in batch]
        total = keep * total + sum(values)
        ssq = keep * ssq + sum(v * v for v in values)
        count = keep * count + len(values)
    loc = total / count
    return loc, ssq / count - loc * loc


@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e5])
def test_exact(decay, ratio):
    batches = [data((n,), (), loc=ratio, scale=1.0) for n in (1, 20, 7, 100)]
    loc, var = exact_statistics([b.tolist() for b in batches], decay)
    state = Moments.zeros([])
    for batch in batches:
        y, state = oracle.update(batch, state, keep=decay, eps=1e-12)
    got_loc, got_scale = oracle.loc_scale(state, 1e-12)
    assert float(got_loc) == pytest.approx(float(loc), rel=1e-14)
    assert float(got_scale) == pytest.approx(math.sqrt(var), rel=1e-5)
    want = (batch.double() - float(loc)) / math.sqrt(var)
    torch.testing.assert_close(y, want.float(), rtol=1e-4, atol=1e-4)


def test_numpy():
    """With decay 1, everything seen so far."""
    batches = [data((n,), (2, 3), torch.float64) for n in (3, 50, 8)]
    state = Moments.zeros([2, 3])
    for batch in batches:
        y, state = oracle.update(batch, state, keep=1.0, eps=1e-4)
    seen = np.concatenate([b.numpy() for b in batches]).astype(np.longdouble)
    loc, scale = oracle.loc_scale(state, 1e-4)
    np.testing.assert_allclose(loc, seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale, seen.std(0), rtol=1e-12)
    want = (batches[-1].numpy() - seen.mean(0)) / seen.std(0)
    np.testing.assert_allclose(y, want, rtol=1e-11, atol=1e-11)


def test_batch_norm():
    """One call from nothing is batch normalisation."""
    x = data((200,), (5,), torch.float64)
    y, _ = oracle.update(x, Moments.zeros([5]), keep=1.0, eps=1e-9)
    want = torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-30)
    torch.testing.assert_close(y, want)


def test_left_out():
    """Values that are not finite are as good as never seen."""
    x = data((50,), (3,), torch.float64)
    x[3, 0] = math.nan
    x[7, 1] = math.inf
    x[9, 1] = -math.inf
    _, state = oracle.update(x, Moments.zeros([3]), keep=1.0)
    loc, scale = oracle.loc_scale(state, 1e-4)
    for f in range(3):
        finite = x[:, f][x[:, f].isfinite()]
        torch.testing.assert_close(loc[f], finite.mean())
        torch.testing.assert_close(scale[f], finite.std(correction=0))
    assert state.nonfinite[1].tolist() == [1, 2, 0]
    assert state.count.item() == 50


def test_imputed():
    """Without a counter, a value that is left out counts as one at the running mean."""
    old = data((50,), (1,), torch.float64)
    zeros = Moments.zeros([1])._replace(nonfinite=None)
    _, state = oracle.update(old, zeros, keep=1.0)
    _, state = oracle.update(torch.tensor([[math.nan]]), state, keep=1.0)
    loc, _ = oracle.loc_scale(state, 1e-4)
    torch.testing.assert_close(loc, old.mean(0))
    assert state.count.item() == 51
