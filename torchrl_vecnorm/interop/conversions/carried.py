# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What one library's normaliser knows, in the form that goes into another's."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrl_vecnorm import functional
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.rule import EpsMode
from torchrl_vecnorm.running_norm import RunningNorm

#: How far a library's rounding may take a sum of squares beneath what the mean says.
_SLACK = {"float64": 1e-6, "float32": 1e-2}


class Carried(NamedTuple):
    """Statistics, and how they are applied.

    Attributes:
        moments: float64, on the CPU, in our own layout.
        eps: as in :func:`~torchrl_vecnorm.functional.normalize`, as are the others.
        eps_mode: where eps stands.
        clip: outputs are within ``[-clip, clip]``.
        center: whether the mean is taken away.

    A state dict does not say all of it: what it leaves open is the library's default, and
    ``carried._replace(eps=...)`` says otherwise.
    """

    moments: Moments
    eps: float
    eps_mode: EpsMode
    clip: float | None = None
    center: bool = True

    def rule(self) -> dict[str, Any]:
        """How they are applied, as keyword arguments.

        ``functional.normalize(x, carried.moments, **carried.rule())`` is what the library
        gives.
        """
        return {name: getattr(self, name) for name in self._fields[1:]}

    def normalize(self, x: Tensor) -> Tensor:
        """Normalises ``[*samples, *features]`` as the library does."""
        return functional.normalize(x, self.moments, **self.rule())

    def running_norm(self, **options: Any) -> RunningNorm:
        """A :class:`~torchrl_vecnorm.RunningNorm` that goes on from them.

        Args:
            options: of that class: ``decay``, ``until``, ``dtype``, ``device``.
        """
        norm = RunningNorm(tuple(self.moments.sum.shape), **self.rule(), **options)
        leaves = self.moments._asdict()
        count = self.moments.count
        leaves["count"] = torch.stack([count.flatten()[0], count.flatten()[-1]])
        norm.load_state_dict({f"stats.{name}": leaf for name, leaf in leaves.items()})
        return norm


def tensor(owner: str, name: str, value: Any) -> Tensor:
    """A number, an array or a tensor of any library as float64 on the CPU.

    Raises:
        ValueError: what is in none of these forms, or not of real numbers, or not finite.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_complex():
            got = f"{value.dtype} in layout {value.layout}"
            raise ValueError(wrong(owner, name, "dense real numbers", got))
        found = value.detach().to("cpu", torch.float64, copy=True)
    else:
        try:
            array = np.asarray(value)
        except Exception:  # of any library
            array = np.asarray(None)
        if array.dtype.kind not in "fiu":
            got = f"{type(value).__name__} of {array.dtype}"
            raise ValueError(wrong(owner, name, "an array of real numbers", got))
        found = torch.from_numpy(array.astype(np.float64))
    if not found.isfinite().all():
        bad = found[~found.isfinite()].flatten()[0].item()
        raise ValueError(wrong(owner, name, "finite values", bad))
    return found


def count_of(owner: str, name: str, value: Any) -> Tensor:
    """A count as ``[1]``; like :func:`tensor`, and refused where it is below 0."""
    count = tensor(owner, name, value)
    if count.numel() != 1:
        raise ValueError(
            wrong(owner, name, "one number", f"shape {tuple(count.shape)}")
        )
    if count.item() < 0:
        raise ValueError(
            wrong(owner, name, "a number that is not negative", count.item())
        )
    return count.reshape(1)


def same_shape(owner: str, name: str, value: Tensor, shape: torch.Size) -> None:
    """Refuses a value of another shape than the mean's."""
    if value.shape != shape:
        got = tuple(value.shape)
        raise ValueError(wrong(owner, name, f"shape {tuple(shape)}", got))


def of_mean_var(mean: Tensor, var: Tensor, count: Tensor, seen: Any = None) -> Moments:
    """The moments of ``count`` samples with this mean and this variance (of n).

    Without samples they are empty, whatever mean and variance a library begins with.
    """
    if count.item() == 0:
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    n = count.reshape(())
    total = mean * n
    squares = n * (var + mean * mean)
    if not (total.isfinite().all() and squares.isfinite().all()):
        raise ValueError("expected statistics whose sums are finite, got larger ones")
    both = count if seen is None else torch.cat([count, seen])
    return Moments(total, squares, both, mean.new_zeros(2, *mean.shape), var)


def of_sums(
    owner: str, names: tuple[str, str], total: Any, squares: Any, count: Tensor
) -> Moments:
    """The moments with these sums.

    Args:
        owner: the library, for the message.
        names: of the sums, for the message.
        total: Σ x, as the library has it.
        squares: Σ x².
        count: ``[1]``.

    Raises:
        ValueError: the squares are below what the sums say, by more than rounding.
    """
    is_double = "64" in str(getattr(squares, "dtype", "float64"))
    slack = _SLACK["float64" if is_double else "float32"]
    total, squares = tensor(owner, names[0], total), tensor(owner, names[1], squares)
    same_shape(owner, names[1], squares, total.shape)
    if count.item() == 0:
        if total.any() or squares.any():
            raise ValueError(wrong(owner, names[0], "0 beside a count of 0", total))
        return of_mean_var(total, squares, count)
    n = count.reshape(())
    mean, square = total / n, squares / n
    if (square < mean * mean * (1 - slack)).any() or (square < 0).any():
        expected = f"{names[1]} · count ≥ {names[0]}²"
        raise ValueError(wrong(owner, names[1], expected, squares))
    # What rounding has left beneath it is no variance.
    squares = torch.maximum(squares, n * mean * mean)
    var = (square - mean * mean).clamp_min(0)
    return Moments(total, squares, count, mean.new_zeros(2, *mean.shape), var)


def wrong(owner: str, name: str, expected: str, got: Any) -> str:
    """The message of an error."""
    if isinstance(got, Tensor):
        got = got.flatten()[0].item() if got.numel() == 1 else got.tolist()
    return f"{owner}: entry {name!r}: expected {expected}, got {got}"


def whole(owner: str, name: str, count: float, dtype: torch.dtype) -> Tensor:
    """A count in a dtype, rounded where that has to be, but not to 0.

    Raises:
        ValueError: the dtype does not go as far.
    """
    if dtype.is_floating_point:
        return torch.tensor(count, dtype=dtype)
    if count > torch.iinfo(dtype).max:
        raise ValueError(wrong(owner, name, f"no more than {dtype} holds", count))
    return torch.tensor(max(round(count), 1) if count > 0 else 0, dtype=dtype)
