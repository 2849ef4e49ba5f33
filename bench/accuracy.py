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


class Exact:
    """A formula in long double: moments around the mean, merged batch by batch."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.mass = np.longdouble(formula.prior)
        self.mean = np.longdouble(0)
        self.squares = np.longdouble(formula.prior)

    def update(self, x: np.ndarray) -> None:
        """Folds in a batch ``[N, F]``."""
        f, n = self.formula, np.longdouble(len(x))
        keep, mass = np.longdouble(f.decay), n
        if f.decays_each_sample:
            keep = keep**n
            mass = 1 - keep
        x = x.astype(np.longdouble)
        mean = x.mean(0)
        squares = ((x - mean) ** 2).sum(0) / (n - 1 if f.unbiased else n) * mass
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
