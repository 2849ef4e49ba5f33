# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where the state of a key lives in the tensordict of the statistics."""

from __future__ import annotations

from typing import NamedTuple

from tensordict import unravel_key
from tensordict.utils import NestedKey


def as_path(key: NestedKey) -> tuple[str, ...]:
    """A key as a tuple, also where it is not nested."""
    return (key,) if isinstance(key, str) else tuple(key)


#: The separator of flattened nested keys in a state_dict: keys may contain points.
SEP = "-<.>-"


def flat_name(key: NestedKey) -> str:
    """The name of an entry in a state_dict."""
    return SEP.join(as_path(key))


class StateNames(NamedTuple):
    """The entries of one key, in the order of :class:`Moments`.

    ``"obs"`` has ``"obs_sum"``, ``("agents", "obs")`` has ``("agents", "obs_sum")``.
    ``nonfinite`` and ``central`` are ours; the others are those of ``torchrl.envs.VecNorm``.
    """

    sum: NestedKey
    ssq: NestedKey
    count: NestedKey
    nonfinite: NestedKey
    central: NestedKey

    @classmethod
    def of(cls, key: NestedKey) -> StateNames:
        """The names that belong to an in_key."""
        *parents, last = as_path(key)
        return cls(
            *(unravel_key((*parents, f"{last}_{field}")) for field in cls._fields)
        )
