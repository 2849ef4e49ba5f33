# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Running statistics of numpy arrays, behind the attributes of other libraries' classes."""

from __future__ import annotations

import copyreg
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.interop._buffers import moments_of
from torchrl_vecnorm.rule import EPS_MODES

_VAR_ADD = EPS_MODES.index("var_add")
_FOLD = (1.0, 0, None, True)  # nothing is normalised by it

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
#: What the operators take as it is; anything else goes as float64, halves as float32.
_DTYPES = frozenset(
    map(np.dtype, ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")),
)


def rule_of(epsilon: float, clip: float = math.inf, center: bool = True) -> tuple:
    """``(x - mean) / sqrt(var + epsilon)``, clipped: the fields of a `Rule`."""
    return epsilon, _VAR_ADD, None if clip == math.inf else clip, center


def is_usual(x: Any) -> bool:
    """Whether x is as nearly all arrays are: what the compiled code takes as it is."""
    return type(x) is np.ndarray and x.dtype in _FLOATS and x.flags.carray


def tensor_of(x: Any) -> Tensor:
    """An array as a tensor, without a copy where torch can read it as it lies."""
    if is_usual(x):
        return torch.from_numpy(x)
    if type(x) is not np.ndarray:
        x = np.asarray(x)
    if x.dtype not in _DTYPES:
        if x.dtype.kind not in "fiu":
            raise TypeError(f"expected an array of real numbers, got {x.dtype}")
        x = x.astype(np.float32 if x.dtype.itemsize == 2 else np.float64)
    # torch warns of the one and refuses the other.
    if not x.flags.writeable or (x.ndim and min(x.strides) < 0):
        x = x.copy()
    return torch.from_numpy(x)


# As those of `_ops`, which look whether a graph or a transform of torch is at work: neither
# is on arrays.


def fold(xs: list[Tensor], leaves: list[Tensor], *mask: Tensor) -> None:
    """Folds tensors of arrays into their statistics."""
    _C.update(xs, leaves, list(mask), 1.0, 1.0, [], _FOLD)


def normalize(
    xs: list[Tensor], leaves: list[Tensor], rule: tuple, update: bool
) -> list[Tensor]:
    """Normalises tensors of arrays, with them taken in first or not."""
    if update:
        return _C.update(xs, leaves, [], 1.0, 1.0, None, rule)
    return _C.normalize(xs, leaves, None, rule)


class ArrayStatistics:
    """The mean, the variance and the count of arrays that came so far.

    To be mixed into a library's own class, whose attributes these are. They are made when
    they are asked for, and cannot be written to in place: assign another array.
    """

    #: The class that a copy or a pickle of it is, which needs nothing of this package.
    _plain: type

    def __init__(
        self, epsilon: float = 1e-4, shape: tuple[int, ...] = (), dtype: Any = None
    ) -> None:
        self._write(np.zeros(shape), np.ones(shape), epsilon)

    @classmethod
    def of(cls, owner: str, other: Any, shape: tuple[int, ...]) -> ArrayStatistics:
        """The same statistics as those of the library's own class.

        Raises:
            TypeError: not such an object.
            ValueError: of another shape, or such as no data can have given; ``owner`` is
                for the message.
        """
        missing = [n for n in ("mean", "var", "count") if not hasattr(other, n)]
        if missing:
            raise TypeError(
                f"{owner}: expected statistics with mean, var and count, got "
                f"{type(other).__name__} without {', '.join(missing)}"
            )
        new = cls.__new__(cls)
        try:
            new._write(other.mean, other.var, other.count, shape)
        except ValueError as err:
            raise ValueError(f"{owner}: {err}") from None
        return new

    def update(self, arr: np.ndarray) -> None:
        """Takes in ``[*samples, *shape]``."""
        fold([tensor_of(arr)], self._state)

    def normalize(self, x: Any, rule: tuple, update: bool = False) -> np.ndarray:
        """Normalises ``[*samples, *shape]``, with x taken in first or not."""
        if is_usual(x):
            return _C.normalize_array(x, self._state, update, rule)
        return normalize([tensor_of(x)], self._state, rule, update)[0].numpy()

    def scale(self, epsilon: float) -> float:
        """``sqrt(var + epsilon)``, of statistics of one number."""
        return math.sqrt(self._state[-1].item() + epsilon)

    @property
    def mean(self) -> np.ndarray:
        """The mean, float64; not to be written to."""
        total, _, count, *_ = self._state
        return _read_only(total / count)

    @mean.setter
    def mean(self, value: Any) -> None:
        self._write(value, self.var, self.count, self._shape)

    @property
    def var(self) -> np.ndarray:
        """The variance, float64; not to be written to."""
        return _read_only(self._state[-1].clone())

    @var.setter
    def var(self, value: Any) -> None:
        self._write(self.mean, value, self.count, self._shape)

    @property
    def count(self) -> float:
        """How many samples there were, and what the library begins with."""
        return self._state[2].item()

    @count.setter
    def count(self, value: float) -> None:
        self._write(self.mean, self.var, value, self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self._state[0].shape)

    def _write(self, mean, var, count, shape: tuple[int, ...] | None = None) -> None:
        given = {"mean": mean, "var": var, "count": count}
        arrays = {name: np.asarray(v, dtype=np.float64) for name, v in given.items()}
        shape = arrays["mean"].shape if shape is None else tuple(shape)
        for name, value in arrays.items():
            expected = () if name == "count" else shape
            if value.shape != expected:
                raise ValueError(
                    f"expected {name} of shape {expected}, got {value.shape}"
                )
            low = {"mean": -math.inf, "var": 0.0, "count": 5e-324}[name]
            if not (np.isfinite(value) & (value >= low)).all():
                what = {"mean": "finite", "var": "finite and not negative"}
                raise ValueError(
                    f"expected {name} {what.get(name, 'finite and positive')}, got {value}"
                )
        leaves = (torch.tensor(value) for value in arrays.values())
        self._state = moments_of(*leaves)

    # Files and copies are the library's, which has the attributes as such.
    def __reduce__(self):
        state = {
            "mean": np.array(self.mean),
            "var": np.array(self.var),
            "count": self.count,
        }
        return copyreg._reconstructor, (self._plain, object, None), state


def _read_only(values: Tensor) -> np.ndarray:
    array = values.numpy()
    array.flags.writeable = False
    return array[()]  # a number where there are no dimensions
