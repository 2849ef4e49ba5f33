# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What statistics of others have to be like, beside their values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from torchrl_vecnorm.checks import check_moments
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.sharing import in_shared_memory

T = TypeVar("T")


def patiently(check: Callable[[], T]) -> T:
    """Calls a check of what others may be in the middle of an update of, until it passes.

    Raises:
        ValueError: of the last attempt.
    """
    for milliseconds in (1, 2, 4, 8, 16):
        with suppress(ValueError):
            return check()
        time.sleep(milliseconds / 1000)
    return check()


def settled(
    names: Sequence[str],
    moments: Moments,
    features: torch.Size | None,
    counts: int = 1,
) -> Moments:
    """Moments that were checked, as :func:`check_moments` does.

    In shared memory others may update them: then it is a copy of between two updates.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """
    if not any(map(in_shared_memory, moments)):
        return check_moments(names, moments, features, counts=counts)
    check_moments(names, moments, features, True, counts)

    def take() -> Moments:
        copied = (None if leaf is None else leaf.detach().clone() for leaf in moments)
        return check_moments(names, Moments(*copied), features, counts=counts)

    return patiently(take)


def check_usable(names: Sequence[str], moments: Moments) -> None:
    """Refuses moments of others that no call could update where they are.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """
    for name, leaf in zip(names, moments, strict=True):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
            raise ValueError(
                f"VecNorm: entry {name!r}: expected a dense tensor, got "
                f"{getattr(leaf, 'layout', type(leaf).__name__)}"
            )
        wanted = (torch.float64, torch.float32)
        if leaf.dtype not in wanted or not leaf.is_contiguous() or leaf.requires_grad:
            raise ValueError(
                f"VecNorm: entry {name!r}: expected contiguous statistics of dtype "
                f"{' or '.join(map(str, wanted))} that need no gradient, got {leaf.dtype} "
                f"of strides {leaf.stride()}"
                + (" that needs a gradient" if leaf.requires_grad else "")
            )


def check_apart(loaded: Iterable[Moments]) -> None:
    """Refuses leaves that share memory: an update of one would change the other.

    Raises:
        ValueError: two leaves overlap.
    """
    leaves = [
        leaf
        for moments in loaded
        for leaf in moments
        if isinstance(leaf, Tensor)
        and leaf.layout is torch.strided
        and leaf.numel()
        and leaf.is_contiguous()
    ]
    begins = sorted((leaf.data_ptr(), leaf.nbytes) for leaf in leaves)
    for (begin, size), (following, _) in pairwise(begins):
        if following < begin + size:
            raise ValueError(
                "VecNorm: expected a tensor of its own for each entry of the state_dict, "
                "got one piece of memory for several of them"
            )
