# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where ``VecNorm`` was, as imports and pickles of that time have it."""

from __future__ import annotations

import sys
from typing import Any

from torchrl_vecnorm.statistics import Statistics, names
from torchrl_vecnorm.statistics.compute import Weights
from torchrl_vecnorm.statistics.keys import Key as _Key
from torchrl_vecnorm.statistics.keys import Keys as _Keys
from torchrl_vecnorm.statistics.store import Store
from torchrl_vecnorm.transforms.vecnorm import VecNorm

__all__ = ["VecNorm", "_Key", "_Keys"]

sys.modules.setdefault("torchrl_vecnorm.names", names)


def statistics_of(state: dict[str, Any]) -> Statistics:
    """Takes the statistics out of a transform's state, where they were attributes."""
    found = state.pop("_found")
    del state["_lock_is_own"], state["_lock_was_set"]  # not of this lock
    store = Store.__new__(Store)
    store.__setstate__(
        {
            "td": state.pop("_td"),
            "names": [key.names for key in found.sets],
            "timeout": state.pop("_lock_timeout"),
            "others_update": state.pop("_others_update"),
            "attached": state.pop("_attached"),
            "control": state.pop("lock_control"),
        }
    )
    statistics = Statistics.__new__(Statistics)
    statistics.__setstate__(
        {
            "in_keys": state["_in_keys"],
            "out_keys": state["_out_keys"],
            "shapes": state["shapes"],
            "names": state["names"],
            "binding": state.pop("_binding"),
            "dtypes": state.pop("_dtypes"),
            "_decay": state["_decay"],
            "weights": Weights(state.pop("_decay")),
            "_eps": state.pop("_eps"),
            "_warned": state.pop("_warned"),
            "_found": found,
            "store": store,
        }
    )
    return statistics
