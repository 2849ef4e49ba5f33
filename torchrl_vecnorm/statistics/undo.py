# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""All or nothing: a call that fails leaves the statistics as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.compiler import is_compiling

from torchrl_vecnorm.statistics.compute import Entry
from torchrl_vecnorm.statistics.entries import restore_moments
from torchrl_vecnorm.statistics.modes import without_functorch

if TYPE_CHECKING:
    from torchrl_vecnorm.statistics.engine import Statistics


@contextmanager
def all_or_nothing(statistics: Statistics, known: list[Entry]) -> Iterator[None]:
    """Puts the statistics back if the call fails, whatever it was that failed."""
    if is_compiling():
        yield
        return
    store = statistics.store
    td, dtypes = store.td, statistics.dtypes
    states = {e.key.names: e.state for e in known}
    new = {e.key.names: store.moments(e.key.names) for e in known if e.is_new}
    with without_functorch():
        copies = {
            names: state.to(state.sum.device, copy=True)
            for names, state in states.items()
            if names not in new
        }
    try:
        yield
    except BaseException:  # an interrupt too
        with without_functorch():
            for names, copied in copies.items():
                for leaf, value in zip(states[names], copied, strict=True):
                    if leaf is not None:
                        leaf.copy_(value)
        store.td, statistics.dtypes, statistics.binding = td, dtypes, None
        if td is not None:
            for names, old in new.items():
                restore_moments(td, names, old)
        raise
