# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How the statistics of a key look in a state_dict: ours, and those of torchrl's classes.

``VecNorm`` keeps sums, in which a sample weighs ``decay`` to the power of the calls since.
``VecNormV2`` keeps averages, in which it weighs ``(1 - decay)`` times ``decay`` to the power
of the samples since: sums times ``1 - decay``, whose weights add up to ``1 - decay^count``.
Without decay both are plain sums here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vecnorm.checks import REQUIRED, SLACK
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.names import StateNames, as_path, flat_name

#: What joins the names of a state_dict of ``torchrl.envs.VecNormV2``.
V2_SEP = ".-|-."

#: What weights of averages add up to where nobody can tell any more how many they are.
_FULL = 1 - 1e-12


class Layout(NamedTuple):
    """One way of keeping the statistics of a key.

    Attributes:
        names: of the entries of :class:`Moments`, for messages too.
        required: the names without which there is nothing.
        read: makes moments of the entries, in the order of ``present``.
        present: the names of all entries.
    """

    names: list[str]
    required: list[str]
    read: Callable[..., Moments]
    present: list[str]


def v2_name(key: NestedKey) -> str:
    """The name of an entry in a state_dict of V2's."""
    return V2_SEP.join(as_path(key))


def names_of_averages(key: NestedKey) -> StateNames:
    """Where averages of a key are kept: ``("sum", "obs")`` for ``"obs"``."""
    fields = ("sum", "ssq", "weight", "nonfinite", "central")
    return StateNames(*((field, *as_path(key)) for field in fields))


def kept_names(key: NestedKey) -> tuple[str, str]:
    """What sums and averages call what is left of statistics that several have had.

    That is no statistic, and optional: `torchrl_vecnorm.merge_states` asks for it.
    """
    *parents, last = as_path(key)
    return flat_name((*parents, f"{last}_kept")), v2_name(("kept", *as_path(key)))


def _sums(key: NestedKey, read: Callable[..., Moments]) -> Layout:
    names = [flat_name(name) for name in StateNames.of(key)]
    return Layout(names, names[: len(REQUIRED)], read, names)


def _averages(key: NestedKey, read: Callable[..., Moments]) -> Layout:
    names = [v2_name(name) for name in names_of_averages(key)]
    return Layout(names, names, read, names)


def _torchrl_v2(key: NestedKey, read: Callable[..., Moments]) -> Layout:
    entries = [v2_name((field, *as_path(key))) for field in ("loc", "var", "count")]
    names = [*entries, *map(v2_name, names_of_averages(key)[len(entries) :])]
    return Layout(names, entries, lambda *leaves: read(entries, *leaves), entries)


def layouts_of_sums(key: NestedKey, decay: float) -> list[Layout]:
    """What becomes the sums of a key: our own first."""
    return [
        _sums(key, Moments),
        _averages(key, lambda *leaves: sums_of(Moments(*leaves), decay)),
        _torchrl_v2(key, lambda *leaves: from_v2(*leaves, decay)),
    ]


def layouts_of_averages(key: NestedKey, decay: float) -> list[Layout]:
    """What becomes the averages of a key: our own first."""

    def averages(names: Sequence[str], *leaves: Tensor) -> Moments:
        sums = from_v2(names, *leaves, decay)
        return averages_of(sums, decay, leaves[-1])

    return [
        _averages(key, Moments),
        _torchrl_v2(key, averages),
        _sums(key, lambda *leaves: averages_of(Moments(*leaves), decay)),
    ]


def _scaled(moments: Moments, factor: Tensor | float, count: Tensor) -> Moments:
    nonfinite = moments.nonfinite
    if isinstance(nonfinite, Tensor):
        nonfinite = torch.stack([nonfinite[0] * factor, nonfinite[1]])
    return moments._replace(
        sum=moments.sum * factor,
        ssq=moments.ssq * factor,
        count=count,
        nonfinite=nonfinite,
    )


def _is_plain(moments: Moments) -> bool:
    """Whether the leaves are what can be computed with; others are refused as they are."""
    return all(
        isinstance(leaf, Tensor)
        and leaf.layout is torch.strided
        and leaf.is_floating_point()
        and not leaf.is_meta
        for leaf in moments
        if leaf is not None
    )


def sums_of(averages: Moments, decay: float) -> Moments:
    """The sums with the same mean and variance, which the next call will weigh alike."""
    if not _is_plain(averages) or averages.count.numel() != 2:
        return averages
    factor = 1.0 if decay == 1 else 1 / (1 - decay)
    return _scaled(averages, factor, averages.samples().reshape(1) * factor)


def averages_of(sums: Moments, decay: float, seen: Tensor | None = None) -> Moments:
    """The averages with the same mean and variance.

    Args:
        sums: with more weight than averages may have, they get all that these may have.
        decay: of both.
        seen: how many samples they are of, where that is known.
    """
    if not _is_plain(sums) or sums.count.numel() != 1:
        return sums
    count = sums.count.double().reshape(())
    factor = torch.ones_like(count)
    if decay < 1:
        factor = torch.minimum(factor - decay, 1 / count.clamp_min(1e-300))
    weight = count * factor
    if seen is None:
        seen = count
        if decay < 1:
            seen = (torch.log1p(-weight.clamp(0, _FULL)) / math.log(decay)).round()
    both = torch.stack([weight, seen.detach().to(weight).reshape(())])
    return _scaled(sums, factor, both)


def from_v2(
    names: Sequence[str], loc: Tensor, var: Tensor, count: Tensor, decay: float
) -> Moments:
    """The moments that a ``torchrl.envs.VecNormV2`` stands for.

    Its ``loc`` and ``var`` are averages of x and x² (not a variance) that begin at zero,
    with weights (1 - decay) · decay^age, which add up to W = 1 - decay^count. Ours are
    sums with weights decay^age::

        sum, ssq, count = loc / (1 - decay), var / (1 - decay), W / (1 - decay)

    and without decay, where the average is the plain one, each times the number of
    samples.

    Args:
        names: of the three entries, for the message.
        loc: ``[*features]``.
        var: ``[*features]``.
        count: one number, how many samples were seen.
        decay: of both classes; V2's state does not tell it.
    """
    for name, leaf in zip(names, (loc, var, count), strict=True):
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
            raise ValueError(
                f"VecNorm: entry {name!r}: expected a tensor, got {leaf!r}"
            )
    if count.numel() != 1 or count.is_complex():
        raise ValueError(
            f"VecNorm: entry {names[2]!r}: expected one number, got {count.dtype} of shape "
            f"{tuple(count.shape)}"
        )
    seen = count.reshape(1).double()
    weight = mass = seen
    if decay < 1:
        weight = torch.full_like(seen, 1 / (1 - decay))
        mass = -torch.expm1(seen * math.log(decay)) * weight
    if not bool((seen >= 0).all()):
        mass = seen  # refused as it came
    total, squares = (
        # What is not floating-point is refused as it came.
        leaf.double() * weight if leaf.is_floating_point() else leaf
        for leaf in (loc, var)
    )
    # Rounded to float32 before: what a constant feature leaves may be beneath its mean².
    if total.is_floating_point() and squares.shape == total.shape:
        least = total * total / mass
        near = (squares < least) & (squares >= least * (1 - SLACK[torch.float32]))
        squares = torch.where(near, least, squares)
    return Moments(total, squares, mass)
