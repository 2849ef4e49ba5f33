# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How far results are from the same formula in numpy's long double.

Normalisers differ on purpose: some forget, some begin with samples that nobody drew,
each bounds the deviation in its own way. Two errors tell the arithmetic from the
formula: against the normaliser's own formula only rounding is left, and against the
plain mean and deviation of the data everything shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def plain(var, mean, mass):
    """The standard deviation and nothing else."""
    return np.sqrt(var)


@dataclass(frozen=True)
class Formula:
    """What a normaliser computes: a mean and a variance of weighted samples.

    ``scale`` takes the variance, the mean and the sum of all weights.
    """

    scale: Callable = plain
    decay: float = 1.0  # what old samples weigh after a call
    decays_each_sample: bool = False  # then weights are a share of 1, as in an EMA
    prior: float = 0.0  # the weight of a first sample with mean 0 and variance 1
    unbiased: bool = False  # the variance of each batch divides by N - 1
    clip: float = math.inf

    def without_quirks(self) -> Formula:
        """The plain mean and deviation, forgetting as fast as the formula does."""
        return Formula(
            decay=self.decay,
            decays_each_sample=self.decays_each_sample,
            clip=self.clip,
        )


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared deviations of batches ``[..., N, F]``, in long double."""
    x = x.astype(np.longdouble)
    first = x[..., :1, :].copy()
    x -= first  # so that a mean far from zero costs no digits
    mean = x.mean(-2, keepdims=True)
    squares = np.square(x - mean).sum(-2)
    return (first + mean)[..., 0, :], squares


class Exact:
    """A formula in long double: moments around the mean, merged batch by batch."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.mass = np.longdouble(formula.prior)
        self.mean = np.longdouble(0)
        self.squares = np.longdouble(formula.prior)

    def update(self, x: np.ndarray) -> None:
        """Folds in a batch ``[N, F]``."""
        self.merge(len(x), *moments(x))

    def merge(self, n: int, mean: np.ndarray, squares: np.ndarray) -> None:
        """Folds in what :func:`moments` says of a batch of ``n``."""
        f, n = self.formula, np.longdouble(n)
        keep, mass = np.longdouble(f.decay), n
        if f.decays_each_sample:
            keep = keep**n
            mass = 1 - keep
        squares = squares / (n - 1 if f.unbiased else n) * mass
        old = keep * self.mass
        delta = mean - self.mean
        self.mass = old + mass
        self.mean = self.mean + delta * (mass / self.mass)
        self.squares = (
            keep * self.squares + squares + delta**2 * (old * mass / self.mass)
        )

    def scale(self) -> np.ndarray:
        """What deviations from the mean are divided by."""
        return self.formula.scale(self.squares / self.mass, self.mean, self.mass)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """The batch, normalised with what was seen so far."""
        y = (x.astype(np.longdouble) - self.mean) / self.scale()
        return y.clip(-self.formula.clip, self.formula.clip)


def _double(t: Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()


def _worst(error: np.ndarray) -> float:
    # max() alone would hide infinities that cancel into NaN.
    return float(error.max()) if np.isfinite(error).all() else math.nan


def errors(
    make: Callable, formula: Formula, ratio: float, calls: int, device: str
) -> dict[int, dict[str, float | None]]:
    """Errors after the first call and after the last one.

    ``ratio`` is the mean of the data over its standard deviation, which is 1.
    ``rounding`` and ``total`` are in standard deviations, ``scale`` is relative.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(256, 8, device=device)
    run = None
    own, simple = Exact(formula), Exact(formula.without_quirks())
    found = {}
    for i in range(1, calls + 1):
        x.copy_(torch.randn(x.shape, generator=generator) + ratio)
        if run is None:
            run = make([x], [torch.empty_like(x)])
        y = run.read(run.call())
        values = x.cpu().numpy()
        own.update(values)
        simple.update(values)
        if i in (1, calls):
            y = _double(y)
            scale = None
            if run.scale is not None:
                scale = _worst(np.abs(_double(run.scale()) / own.scale() - 1))
            found[i] = {
                "rounding": _worst(np.abs(y - own.normalize(values))),
                "total": _worst(np.abs(y - simple.normalize(values))),
                "scale": scale,
            }
    return found


#: Values of a few calls that are looked at together.
_AT_ONCE = 1 << 21


def precision(
    makes: dict[str, tuple[Callable, Formula]],
    dtype: torch.dtype,
    ratio: float,
    size: tuple[int, int],
    calls: tuple[int, ...],
    device: str,
) -> dict[str, dict[int, dict[str, float]] | Exception]:
    """Errors of each normaliser after so many calls, or what it raised.

    The data are normal with deviation 1 and mean ``ratio``, rounded to ``dtype``: what
    is exact is exact for the rounded values. ``scale`` is a relative error, ``y`` in
    deviations; ``own`` is what rounding alone makes of an exact y.
    """
    n, features = size
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(n, features, dtype=dtype, device=device)
    exact = {formula: Exact(formula) for _, formula in makes.values()}
    runs, found = {}, {}
    done = 0
    while done < max(calls):
        some = min(max(calls) - done, max(1, _AT_ONCE // (n * features)))
        block = torch.randn(some, n, features, generator=generator, dtype=torch.float64)
        block = (block + ratio).to(dtype)
        if not block.isfinite().all():
            raise ValueError("the values overflow")
        if block.numel() > features and (block == block[0, 0]).all():
            raise ValueError("every value is the same")
        values = block.double().numpy()
        for i, means, squares in zip(range(some), *moments(values), strict=True):
            x.copy_(block[i])
            for judge in exact.values():
                judge.merge(n, means, squares)
            for name, (make, formula) in makes.items():
                if isinstance(found.get(name), Exception):
                    continue
                try:
                    if name not in runs:
                        runs[name] = make([x], [torch.empty_like(x)])
                    result = runs[name].call()
                    if done + i + 1 in calls:
                        y = _double(runs[name].read(result))
                        scale = _double(runs[name].scale())
                except Exception as error:
                    found[name] = error
                    continue
                if done + i + 1 in calls:
                    want = exact[formula].normalize(values[i])
                    rounded = _double(torch.from_numpy(want.astype(float)).to(dtype))
                    found.setdefault(name, {})[done + i + 1] = {
                        "scale": _worst(np.abs(scale / exact[formula].scale() - 1)),
                        "y": _worst(np.abs(y - want)),
                        "own": _worst(np.abs(rounded - want)),
                    }
        done += some
    return found
