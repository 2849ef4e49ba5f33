# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Moments as numbers that add up: what several processes can sum.

A variance does not add up, and sums of squares around zero lose it where the mean is far
from there. Sums around a shift do neither: with ``d = x - shift``, the same shift for all,

    count, Σ d, Σ d²

of the parts add up to those of the whole, and keep the digits of the variance as long as
the shift is about as near to the mean as the values are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments, state_dtype

#: What a tensor that is reduced begins with: the number of the call and its square, the
#: name of it and its square, how many ranks ask, how many refuse.
HEADER = 6

#: Numbers in it are below that, so that sums of their squares over 2^13 ranks are exact.
LIMIT = 2**20

#: A multiple of it is the length of one. Calls in another order are then of one length,
#: most of them: gloo ends a process that is sent more than it waits for.
_PAD = 512


class Batches:
    """The batches of some keys as one tensor, all of whose elements add up.

    Args:
        features: the shape of the features of each key.
        shifts: of each key, ``[*features]``, the same on all ranks; NaN where nobody knows
            any, None where that is all of them.
        device: of the tensor.
        name: a number below :data:`LIMIT` for what the calls are of.

    Attributes:
        buffer: the tensor.
        header: of ``buffer`` what says which call it is of, ``[HEADER]``.
        expected: what one rank writes there when all is well, ``[HEADER]``.
    """

    def __init__(
        self,
        features: Sequence[torch.Size],
        shifts: Sequence[Tensor | None],
        device: torch.device,
        name: float,
    ) -> None:
        self.features = list(features)
        self.sizes = [shape.numel() for shape in features]
        self._ones = [1] * len(self.sizes)
        keys, total = len(self.sizes), sum(self.sizes)
        length = HEADER + keys + 3 * total
        dtype = state_dtype(device)
        with torch.inference_mode(False):
            self.buffer = torch.zeros(
                -(-length // _PAD) * _PAD, dtype=dtype, device=device
            )
            parts = [HEADER, keys, total, total, total, len(self.buffer) - length]
            self.header, self.counts, self.missing, self.d1, self.d2, _ = (
                self.buffer.split(parts)
            )
            self._body = self.buffer[HEADER:]
            self.expected = torch.zeros(HEADER, dtype=dtype, device=device)
            self._number, self._square = self.expected[:2].unbind()
            sizes = torch.tensor(self.sizes, dtype=torch.long)
            self._of_key = torch.arange(keys).repeat_interleave(sizes).to(device)
            self._nothing = [
                Moments.zeros(shape, dtype=dtype, device=device) for shape in features
            ]
            self._like = [nothing.sum for nothing in self._nothing]
            #: Whether the halves of a call are compiled; the tests compare them.
            self.compiled = self.buffer.is_cpu
            flat = [
                torch.full_like(nothing.sum, torch.nan) if shift is None else shift
                for nothing, shift in zip(self._nothing, shifts, strict=True)
            ]
            flat = [v.to(device, dtype).reshape(-1) for v in flat]
            flat.append(torch.zeros(0, dtype=dtype, device=device))  # of no keys
            self.shift = torch.cat(flat)
            self._known = ~self.shift.isnan()
            self._all_known = bool(self._known.all())
            self.shift.nan_to_num_(0.0)
        self.name(name)

    def name(self, name: float) -> None:
        """Gives the calls another name; their count goes on."""
        self.expected[2], self.expected[3] = name, name * name

    def write(
        self,
        batches: Sequence[Moments | None],
        asks: bool = False,
        refused: bool = False,
    ) -> None:
        """Puts a call of this rank into the tensor.

        Args:
            batches: of each key; None is an empty one.
            asks: this rank has to ask the others what they have.
            refused: it cannot take part.
        """
        found = [
            nothing if batch is None else batch
            for batch, nothing in zip(batches, self._nothing, strict=True)
        ]
        # Moments of no features have no leaves of these.
        found = [m.with_extras() if m.central is None else m for m in found]
        if self.compiled:
            leaves = [leaf for moments in found for leaf in moments]
            _C.write_totals(
                self.buffer, self.expected, self.shift, leaves, asks, refused
            )
            return
        # Counted by the device: a graph of it goes on counting.
        self._number.add_(1).remainder_(LIMIT)
        torch.mul(self._number, self._number, out=self._square)
        self.header.copy_(self.expected)
        if asks:
            self.header[4] = 1
        if refused:
            self.header[5] = 1
        if not found:
            return
        torch.cat([m.count for m in found], out=self.counts)
        torch.cat([m.nonfinite[0].reshape(-1) for m in found], out=self.missing)
        torch.cat([m.sum.reshape(-1) for m in found], out=self.d1)
        torch.cat([m.central.reshape(-1) for m in found], out=self.d2)
        n = self._used()
        self.d1.addcmul_(n, self.shift, value=-1)
        self.d2.mul_(n).addcdiv_(self.d1 * self.d1, torch.where(n > 0, n, 1.0))

    def _used(self) -> Tensor:
        """How many values of each feature there are."""
        alone = len(self.sizes) == 1
        return (self.counts if alone else self.counts[self._of_key]) - self.missing

    def empty_unless_agreed(self, ranks: int) -> None:
        """Makes the sum one of empty batches where the ranks have not called alike.

        They change nothing, on any rank, and nobody waits for the device to say so.
        """
        wrong = (self.header != self.expected * ranks).any()
        self._body.copy_(torch.where(wrong, 0.0, self._body))

    def moves(self) -> bool:
        """Whether values came for features that nobody knew a shift of.

        It is there then, and the batches have to be added up again: around zero they may
        have lost their variance. The same on all ranks, as it is asked of the sum.
        """
        if self._all_known or not self.sizes:
            return False
        n = self._used()
        new = (n > 0) & ~self._known
        self._known |= new
        self._all_known = bool(self._known.all())
        self.shift.add_(torch.where(new, self.d1 / n, 0.0))
        return bool(new.any())

    def read(self) -> list[Moments]:
        """The moments of all that was added; the next shift is their mean."""
        if not self.sizes:
            return []
        if self.compiled:
            leaves = _C.read_totals(self.buffer, self.shift, self._like)
            return [Moments(*leaves[i : i + 5]) for i in range(0, len(leaves), 5)]
        n = self._used()
        at_least_some = torch.where(n > 0, n, 1.0)
        apart = self.d1 / at_least_some
        var = (self.d2 / at_least_some).addcmul_(apart, apart, value=-1).clamp_min_(0)
        total = torch.addcmul(self.d1, n, self.shift)
        squares = torch.addcmul(self.d2, self.shift, self.d1 + total)
        self.shift.add_(apart)
        # One copy of what the next call writes to; each key's part of it is a view.
        rows = torch.stack((total, squares, var, self.missing, self.missing))
        counts = self.counts.clone()
        if len(self.sizes) == 1:
            return [self._moments(self.features[0], counts, rows)]
        parts = rows.split_with_sizes(self.sizes, 1)
        each = zip(
            self.features, counts.split_with_sizes(self._ones), parts, strict=True
        )
        return [self._moments(*one) for one in each]

    @staticmethod
    def _moments(shape: torch.Size, count: Tensor, rows: Tensor) -> Moments:
        rows = rows.contiguous().view(5, *shape)
        total, squares, var, _, _ = rows.unbind()
        return Moments(total, squares, count, rows[3:], var)


# ------------------------------------------------------------------ of one state, readable


def around(state: Moments, shift: Tensor) -> Tensor:
    """A state as numbers that add up: count, seen, missing, left out, Σ d, Σ d².

    Returns:
        ``[2 + 4 F]``, float64, on the CPU.
    """
    state = Moments(*(v.detach().cpu().double() for v in state.with_extras()))
    n = state.used()
    mean, var = state.mean_var()
    apart = torch.where(n > 0, mean - shift, 0.0)
    parts = (
        state.samples(),
        state.seen(),
        state.nonfinite[0],
        state.nonfinite[1],
        n * apart,
        n * (var + apart * apart),
    )
    return torch.cat([part.reshape(-1) for part in parts])


def decays(features: torch.Size) -> Tensor:
    """Which of these numbers an update multiplies by the decay; bool ``[2 + 4 F]``."""
    size = features.numel()
    which = torch.ones(2 + 4 * size, dtype=torch.bool)
    which[1] = which[2 + size : 2 + 2 * size] = False
    return which


def from_around(numbers: Tensor, shift: Tensor, counts: int = 1) -> Moments:
    """The inverse of :func:`around`; ``counts`` is how many elements ``count`` has."""
    features, size = shift.shape, shift.numel()
    count, seen, missing, left_out, d1, d2 = numbers.split([1, 1, *[size] * 4])
    nonfinite = torch.stack((missing, left_out)).view(2, *features).clamp_min(0)
    both = torch.cat((count, seen)) if counts == 2 else count.clone()
    d1, d2 = d1.view(features), d2.view(features)
    n = Moments(d1, d2, both, nonfinite).used()
    at_least_some = torch.where(n > 0, n, 1.0)
    apart = torch.where(n > 0, d1 / at_least_some, 0.0)
    var = torch.where(n > 0, d2 / at_least_some - apart * apart, 0.0).clamp_min(0)
    total = torch.where(n > 0, d1 + n * shift, 0.0)
    # Of what is left of a difference of nothing: nothing.
    squares = torch.where(n > 0, n * var + total * (shift + apart), 0.0)
    return Moments(total, squares, both, nonfinite, var)
