# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Calls for some of the keys and samples, as at a reset."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vecnorm.statistics.entries import get_entry
from torchrl_vecnorm.statistics.names import as_path


class Partial(NamedTuple):
    """A call for some of the keys and samples."""

    tolerant: bool  # of missing keys
    masks_td: TensorDictBase | None = (
        None  # with the masks that say which samples count
    )
    mask_name: str = ""

    def mask_of(self, key: NestedKey, samples: torch.Size) -> Tensor | None:
        """The mask that speaks of a key, for each sample: bool, ``samples``.

        That is the outermost one on its path, as in torchrl's ``_update_during_reset``.
        Where all are further down, torchrl leaves the entry as it was: nothing of it was
        reset.
        """
        td, name = self.masks_td, self.mask_name
        parents = as_path(key)[:-1]
        for depth in range(len(parents) + 1):
            mask = get_entry(td, (*parents[:depth], name))
            if mask is not None:
                return for_samples(mask, key, name, samples)
        for path in map(as_path, td.keys(True, True)):
            if path[-1] == name and path[: len(parents)] == parents:
                return torch.zeros(
                    samples, dtype=torch.bool, device=td.get(path).device
                )
        return None


def for_samples(
    mask: Tensor,
    key: NestedKey,
    name: NestedKey,
    samples: torch.Size,
    owner: str = "VecNorm",
) -> Tensor:
    """Flags of environments, or of parts of them, for each sample: bool, ``samples``."""
    shape = mask.shape
    if mask.ndim > len(samples):
        # A sample counts if any part of it does; masks shaped as done have one part.
        if mask.dtype == torch.bool and shape[len(samples) :].numel() == 1:
            mask = mask.reshape(shape[: len(samples)])
        else:
            mask = mask.flatten(len(samples)).any(-1)
    if mask.shape == samples:
        return mask
    if any(m not in (1, n) for m, n in zip(mask.shape, samples, strict=False)):
        raise ValueError(
            f"{owner}: key {key!r}: expected {name!r} of a shape that begins with that of "
            f"the samples, {tuple(samples)}, got {tuple(shape)}"
        )
    mask = mask[(..., *(None for _ in range(len(samples) - mask.ndim)))]
    return mask.expand(samples)


class StepMasks(NamedTuple):
    """Where ``_step`` may be for nested in_keys."""

    in_keys: list[NestedKey]  # as they were when this was looked up
    names: list[tuple[str, ...]]

    @classmethod
    def of(cls, in_keys: Sequence[NestedKey]) -> StepMasks:
        """Those of some in_keys."""
        names = dict.fromkeys(
            (*path[:depth], "_step")
            for path in map(as_path, map(unravel_key, in_keys))
            for depth in range(1, len(path))
        )
        return cls(deepcopy(in_keys), list(names))
