# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics that go on alone and are joined now and then.

All begin with the same statistics ``S0``. One that has decayed them ``k_r`` times since
holds ``S_r``, and has seen ``S_r - decay**k_r * S0`` itself. Together they have seen::

    S <- decay**k * S0 + Σ (S_r - decay**k_r * S0)        k the largest k_r

which all go on with. Who has begun with nothing has ``S0 = 0``. Adding up the ``S_r``
instead would count ``S0`` as often as there are ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from torchrl_vecnorm._load import _C
from torchrl_vecnorm.groups import (
    Group,
    check_group,
    describe,
    digest,
    first_known,
    gathered,
    is_empty,
    mean_of,
    naming,
    process_group,
    the_same,
)
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.totals import around, decays, from_around


class Since:
    """What statistics were when all had the same, and how much of that is left.

    Attributes:
        base: the statistics, S0: a copy.
        kept: ``decay**k``, float64 ``[]``: what the calls since have multiplied them by.
        count: what these calls have made of their count, to know of others.
        features: how many elements of a value are one sample; 1 where there are none.
        is_told: whether a state_dict says ``kept``, for :func:`torchrl_vecnorm.merge_states`:
            where it was loaded from one that does. Others are what they were without it.
    """

    def __init__(self, state: Moments) -> None:
        with torch.inference_mode(False):
            self.base = Moments(
                *(None if leaf is None else leaf.detach().clone() for leaf in state)
            )
            self.kept = torch.ones((), dtype=torch.float64)
            self.count = self.base.samples().double().cpu().clone()
        self.is_told = False
        self.features = max(self.base.sum.numel(), 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.features = max(self.base.sum.numel(), 1)  # older pickles have none

    def note(self, keep: float, samples: int | Tensor) -> None:
        """Notes a call that has multiplied them by ``keep``, unless it had no samples."""
        if type(samples) is int and samples and not is_compiling() and self.kept.is_cpu:
            _C.note_call(self.kept, self.count, keep, samples)
        elif isinstance(samples, Tensor):  # no read waits for the device
            self.kept = self.kept.to(samples.device)
            self.count = self.count.to(samples.device)
            factor = torch.where(samples > 0, keep, 1.0)
            self.kept.mul_(factor)
            self.count.mul_(factor).add_(samples)
        elif samples > 0:
            self.kept.mul_(keep)
            self.count.mul_(keep).add_(samples)

    def check(self, state: Moments, where: str) -> None:
        """Refuses statistics that others have updated, who knows how often.

        Raises:
            RuntimeError: there are other counts than the calls have made.
        """
        noted, got = self.count.item(), state.samples().item()
        if abs(noted - got) > 1e-6 * max(noted, got):
            raise RuntimeError(
                f"{where}: expected a count of {noted:.9g} after the calls since all had the "
                f"same, got {got:.9g}: others update these statistics too, and how often "
                "they have decayed is not known. Join them with decay=1, or in VecNormV2"
            )


# ------------------------------------------------------------------------- the formula


class Part(NamedTuple):
    """What one of them has of a key.

    Attributes:
        state: S_r; None where it has not met the key.
        base: the S0 that is in it; None where it has begun with nothing.
        kept: decay**k_r; of averages also where it has begun with nothing.
    """

    state: Moments | None
    base: Moments | None
    kept: float


def seen_alone(part: Part, shift: Tensor) -> Tensor:
    """``S_r - decay**k_r * S0``, as numbers that add up; see :func:`around`."""
    if part.state is None:
        return torch.zeros(2 + 4 * shift.numel(), dtype=torch.float64)
    numbers = around(part.state, shift)
    if part.base is not None:
        numbers -= _decayed(around(part.base, shift), part.kept, shift)
    return numbers


def _decayed(numbers: Tensor, kept: float, shift: Tensor) -> Tensor:
    return torch.where(decays(shift.shape), numbers * kept, numbers)


def joined(
    base: Moments | None,
    kept: Sequence[float],
    left: Sequence[float],
    alone: Tensor,
    shift: Tensor,
    counts: int,
    averages: bool = False,
) -> Moments:
    """What all go on with.

    Args:
        base: S0.
        kept: ``decay**k_r`` of those that have begun with it.
        left: the same of all; for averages.
        alone: the sum of what each has seen alone.
        shift: that of these numbers.
        counts: how many elements ``count`` has.
        averages: of ``VecNormV2`` with decay, whose weights are ``1 - decay**count``: as
            they are for as many samples as all have seen.
    """
    numbers, weight = alone, 0.0
    if base is not None:
        begun = around(base, shift)
        weight = begun[0].item()
        numbers = _decayed(begun, min(kept), shift) + alone
    if averages and numbers[0] > 0:
        rest = (1 - weight) * math.prod(left)
        numbers = _decayed(numbers, (1 - rest) / numbers[0].item(), shift)
    return from_around(numbers, shift, counts)


# --------------------------------------------------------------------- through a group


class Told(NamedTuple):
    """What a rank tells the others before they add up."""

    what: str
    names: tuple[str, ...]
    features: tuple[tuple[int, ...] | None, ...]
    digests: tuple[bytes | None, ...]
    means: tuple[Tensor | None, ...]
    kept: tuple[float, ...]


def synced(
    group: Group,
    owner: str,
    what: str,
    names: Sequence[str],
    parts: Sequence[Part],
    counts: int,
    averages: bool = False,
) -> list[Moments | None]:
    """What the ranks of a group go on with, of each key; None where none has it.

    Args:
        group: the ranks; None is all of them.
        owner: whose call it is, for messages.
        what: that which has to be the same on all ranks.
        names: of the keys.
        parts: what this rank has of each.
        counts: how many elements ``count`` has.
        averages: see :func:`joined`.

    Raises:
        RuntimeError: a rank has died, did not come or called something else; or the ranks
            went on from different statistics.
        ValueError: the ranks have features of different shapes.
    """
    pg = process_group(check_group(group, owner), owner)
    parts = [
        part._replace(base=None if is_empty(part.base) else part.base) for part in parts
    ]
    shapes = [None if part.state is None else part.state.sum.shape for part in parts]
    told = Told(
        f"{owner} {what}",
        tuple(names),
        tuple(None if shape is None else tuple(shape) for shape in shapes),
        tuple(digest(part.base) for part in parts),
        tuple(mean_of(part.base, part.state) for part in parts),
        tuple(part.kept for part in parts),
    )
    with naming(owner, "sync_()", pg):
        heard = gathered(pg, told)
    where = f"{owner}: sync_() in group {describe(pg)}: "
    for one in heard:
        if not isinstance(one, Told) or one[:2] != told[:2]:
            raise RuntimeError(
                f"{where}expected sync_() of {told.what} with {list(names)} on all ranks, got "
                f"{one.what if hasattr(one, 'what') else one} with "
                f"{list(getattr(one, 'names', ()))}"
            )
    found: list[torch.Size | None] = []
    for k, name in enumerate(names):
        known = {one.features[k] for one in heard} - {None}
        if len(known) > 1:
            raise ValueError(
                f"{where}key {name}: expected features of one shape on all ranks, got "
                f"{sorted(known)}"
            )
        found.append(torch.Size(known.pop()) if known else None)
    with naming(owner, "sync_()", pg):
        bases = the_same(
            pg,
            names,
            [part.base for part in parts],
            [one.digests for one in heard],
            lambda name: RuntimeError(
                f"{where}key {name}: expected ranks that went on from the same statistics, "
                "or from none, got different ones: load one state_dict on all of them"
            ),
        )
    shifts: list[Tensor | None] = []
    for k, shape in enumerate(found):
        mean = first_known([one.means[k] for one in heard])
        if shape is not None and mean is None:
            mean = torch.zeros(shape, dtype=torch.float64)
        shifts.append(None if mean is None else mean.nan_to_num(0.0))
    # Each key's numbers on their own: a tensor of all would have to be cut again.
    alone = [
        seen_alone(part, shift)
        for part, shift in zip(parts, shifts, strict=True)
        if shift is not None
    ]
    if not alone:
        return [None] * len(names)
    both = torch.cat(alone)
    if dist.get_backend(pg) == "nccl":
        both = both.cuda()
    with naming(owner, "sync_()", pg):
        dist.all_reduce(both, group=pg)
    pieces = iter(both.cpu().split([len(numbers) for numbers in alone]))
    return [
        None
        if shift is None
        else joined(
            bases[k],
            [one.kept[k] for one in heard if one.digests[k] is not None] or [1.0],
            [one.kept[k] for one in heard],
            next(pieces),
            shift,
            counts,
            averages,
        )
        for k, shift in enumerate(shifts)
    ]
