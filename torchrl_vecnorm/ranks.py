# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Ranks of ``torch.distributed`` that have their statistics in common.

All that crosses from one process to another does so here. At every call the batches of all
keys go through one all-reduce (:class:`Ranks`). What that needs to know of the other ranks,
which keys of which shape there are and that they begin with the same statistics, is asked
for at the first call in a group, and again when a rank says in a call that it has to ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchrl_vecnorm._ops import needs_plain_torch, not_in_graphs
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
from torchrl_vecnorm.totals import HEADER, LIMIT, Batches


def _number_of(what: Any) -> float:
    """What stands for it in a header: other calls have another one, nearly always."""
    at = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return float(int.from_bytes(at, "little") % LIMIT)


def _call(function: Callable, *args: Any) -> Any:
    return function(*args)


def plainly() -> None:
    """Refuses what no other rank could take part in.

    Raises:
        RuntimeError: functorch or forward-mode derivatives look into the call.
    """
    if needs_plain_torch():
        raise RuntimeError(
            "expected a call of a group outside of torch.func's transforms, which call "
            "more often, or less often, than the other ranks do"
        )


# ----------------------------------------------------------------------- every call


class Key(NamedTuple):
    """One key of a call, as this rank sees it."""

    name: str
    features: torch.Size | None  # None: neither a value nor statistics say
    state: Moments | None
    batch: Moments | None  # None: it is missing here


class Joined(NamedTuple):
    """What a call of all ranks gives for a key."""

    state: Moments | None  # what all begin with; None: statistics of nothing
    total: Moments | None  # of the joined batch; None: no rank has had the key yet


class Said(NamedTuple):
    """What a rank tells the others when they agree."""

    what: str
    names: tuple[str, ...]
    features: tuple[tuple[int, ...] | None, ...]
    digests: tuple[bytes | None, ...]
    means: tuple[Tensor | None, ...]
    refused: bool


class Ranks:
    """The ranks of a group, which join their batches at every call.

    Args:
        group: a process group, a DeviceMesh of one dimension, or ``"world"``.
        owner: whose calls they are, for messages.

    It cannot be pickled, as no process group can: another process has others.
    """

    def __init__(self, group: Group, owner: str) -> None:
        self.group = check_group(group, owner)
        self.owner = owner
        #: Calls a function outside of compiled graphs. Made here: it imports all of Dynamo.
        reason = f"{owner}: ranks meet outside of compiled graphs."
        self.outside = not_in_graphs(reason)(_call)
        #: Whether the other ranks have to be asked what they have; they notice.
        self.asks = False
        #: Whether errors that only the device knows of are told at the next call.
        self.defers: bool | None = None
        self._calls = 0
        self._agreed: dist.ProcessGroup | None = None
        self._keys: list[int] = []  # those that have a place in the tensor
        self._others: list[int] = []
        self._begun: list[Moments | None] = []
        self._what = ""
        self._pending: tuple[Tensor, Any] | None = None

    def __deepcopy__(self, memo: dict) -> Ranks:
        return type(self)(self.group, self.owner)

    def __reduce__(self):
        raise TypeError(
            f"{self.owner}: expected no group in what is pickled, got one of "
            f"{self.group!r}: a process group is of its process alone. Save the "
            "state_dict, or set `group` to None before, and to a group of the other "
            "process there"
        )

    def join(
        self,
        keys: Sequence[Key],
        what: str,
        device: torch.device,
        refused: bool = False,
    ) -> list[Joined]:
        """The batches of all ranks, as one; all ranks have to call it.

        Args:
            keys: the same names in the same order on all ranks.
            what: that which has to be the same on all ranks too, as the decay.
            device: where to.
            refused: this rank cannot take part. Then none does.

        Raises:
            RuntimeError: a rank has died, did not come, called something else or refused
                its values; begins with other statistics.
            ValueError: the ranks have features of different shapes.
        """
        group = process_group(self.group, self.owner)
        self._calls += 1
        call, what = f"call {self._calls}", f"{self.owner} {what}"
        self._look_back(group)
        if self._agreed is not group or (self.asks and self._is_deferred(device)):
            self._agree(group, keys, what, device, call, refused)
        asks = self.asks or any(keys[k].features is not None for k in self._others)
        totals = self._reduce(group, keys, what, device, call, asks, refused)
        if totals is None:  # a rank asks
            self._agree(group, keys, what, device, call, refused)
            totals = self._reduce(group, keys, what, device, call, False, refused)
            assert totals is not None
        found = [Joined(None, None)] * len(keys)
        for k, total in zip(self._keys, totals, strict=True):
            found[k] = Joined(self._begun[k] if self._begun else None, total)
        self._begun = []
        return found

    # -------------------------------------------------------------------- agreeing

    def _agree(
        self,
        group: dist.ProcessGroup,
        keys: Sequence[Key],
        what: str,
        device: torch.device,
        call: str,
        refused: bool,
    ) -> None:
        self._agreed = None
        call = f"the agreement before {call}"
        states = [None if is_empty(key.state) else key.state for key in keys]
        said = Said(
            what,
            tuple(key.name for key in keys),
            tuple(
                None if key.features is None else tuple(key.features) for key in keys
            ),
            tuple(digest(state) for state in states),
            tuple(mean_of(key.state, key.batch) for key in keys),
            refused,
        )
        with naming(self.owner, call, group):
            heard = gathered(group, said)
        if not all(isinstance(one, Said) for one in heard):
            raise self._error(call, group, "ranks called something else")
        for one in heard:
            if one[:2] != said[:2]:
                raise self._error(
                    call,
                    group,
                    f"expected the same call of all ranks, got {one.what} of "
                    f"{list(one.names)} beside {said.what} of {list(said.names)}",
                )
        if any(one.refused for one in heard):
            raise self._refusal(call, group, sum(one.refused for one in heard))
        features: list[tuple[int, ...] | None] = []
        for k, key in enumerate(keys):
            shapes = {one.features[k] for one in heard} - {None}
            if len(shapes) > 1:
                raise ValueError(
                    f"{self.owner}: {call} in group {describe(group)}: key {key.name}: "
                    f"expected features of one shape on all ranks, got {sorted(shapes)}"
                )
            features.append(next(iter(shapes), None))
        with naming(self.owner, call, group):
            begun = the_same(
                group,
                said.names,
                states,
                [one.digests for one in heard],
                lambda name: self._error(
                    call,
                    group,
                    f"key {name}: expected all ranks to begin with the same statistics, "
                    "or with none, got different ones: load one state_dict on all of "
                    "them, or call sync_()",
                ),
            )
        self._keys = [k for k, shape in enumerate(features) if shape is not None]
        self._others = [k for k, shape in enumerate(features) if shape is None]
        shifts = [first_known([one.means[k] for one in heard]) for k in self._keys]
        shapes = [torch.Size(features[k]) for k in self._keys]
        self._what, self._names = said.what, (said.names, features)
        self._batches = Batches(shapes, shifts, device, self._name())
        self._begun = begun
        self._agreed, self.asks = group, False

    def _name(self) -> float:
        """What the calls are of: a number that goes with each."""
        return _number_of((self._what, *self._names))

    # -------------------------------------------------------------------- reducing

    def _reduce(
        self,
        group: dist.ProcessGroup,
        keys: Sequence[Key],
        what: str,
        device: torch.device,
        call: str,
        asks: bool,
        refused: bool,
    ) -> list[Moments] | None:
        """The totals; None where a rank has to ask first."""
        batches = self._batches
        if self._what != what:  # another decay
            self._what = what
            batches.name(self._name())
        batches.write(
            [None if refused else keys[k].batch for k in self._keys], asks, refused
        )
        try:
            with naming(self.owner, call, group):
                dist.all_reduce(batches.buffer, group=group)
        except BaseException:
            # What is on its way may still write to the buffer; and who knows what the
            # others have got.
            self._agreed = None
            raise
        if self._is_deferred(device):
            batches.empty_unless_agreed(group.size())
            self._remember(batches.header, batches.expected)
            return batches.read()
        said = batches.header.tolist(), batches.expected.tolist()
        if not self._is_good(call, group, *said):
            return None
        if batches.moves():
            return self._reduce(group, keys, what, device, call, False, False)
        return batches.read()

    def _is_good(
        self,
        call: str,
        group: dist.ProcessGroup,
        got: list[float],
        expected: list[float],
    ) -> bool:
        """Whether the sum of the headers is one of equal calls; False where a rank asks."""
        size = group.size()
        agreed = [v * size for v in expected]
        if got == agreed:
            return True
        if got[:4] != agreed[:4]:
            raise self._error(
                call,
                group,
                "expected the same call of all ranks, with the same keys and options, "
                "got different ones: ranks call in another order, or not as often",
            )
        if got[5]:
            raise self._refusal(call, group, int(got[5]))
        return False

    def _refusal(self, call: str, group: dist.ProcessGroup, ranks: int) -> Exception:
        return self._error(
            call,
            group,
            f"{ranks} of the ranks refused their values, see the error there",
        )

    def _error(self, call: str, group: dist.ProcessGroup, text: str) -> Exception:
        return RuntimeError(
            f"{self.owner}: {call} in group {describe(group)}: {text}; the statistics "
            "are as they were"
        )

    # --------------------------------------------- where nobody waits for the device

    def _is_deferred(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.defers is None else self.defers

    def _remember(self, header: Tensor, expected: Tensor) -> None:
        """Has the header copied to where the next call looks at it."""
        event = None
        if header.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            both = torch.empty(2, HEADER, dtype=header.dtype, pin_memory=True)
            both.copy_(torch.stack((header, expected)), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            both = torch.stack((header, expected))
        self._pending = both, event

    def _look_back(self, group: dist.ProcessGroup) -> None:
        """Says what was wrong with the call before, where only the device knew."""
        if self._pending is None or self._agreed is not group:
            self._pending = None
            return
        both, event = self._pending
        if event is not None and torch.cuda.is_current_stream_capturing():
            return
        self._pending = None
        if event is not None:
            event.synchronize()
        got, expected = both.tolist()
        if not self._is_good(f"call {self._calls - 1}", group, got, expected):
            self.asks = True  # of all ranks alike


# --------------------------------------------------------------- without any memory of it


def reduced(
    batches: Sequence[Moments],
    near: Sequence[Moments | None],
    group: Group,
    owner: str,
) -> list[Moments]:
    """The moments of the batches of all ranks, in one all-reduce.

    Args:
        batches: as :func:`torchrl_vecnorm.functional.moments` gives them.
        near: statistics whose mean is near to the values, the same on all ranks.
        group: the ranks.
        owner: whose call it is, for messages.
    """
    pg = process_group(check_group(group, owner), owner)
    features = [batch.sum.shape for batch in batches]
    device = batches[0].sum.device
    shifts = [mean_of(state) for state in near]
    together = Batches(features, shifts, device, _number_of(features))
    # Of the two counts of a state that is given as a batch the first.
    with_extras = [
        batch.with_extras()._replace(count=batch.count.reshape(-1)[:1])
        for batch in batches
    ]
    for _ in range(2):
        together.write(with_extras)
        with naming(owner, "a call", pg):
            dist.all_reduce(together.buffer, group=pg)
        if device.type == "cuda":
            together.empty_unless_agreed(pg.size())
            break
        if not together.header.equal(together.expected * pg.size()):
            raise RuntimeError(
                f"{owner}: a call in group {describe(pg)}: expected the same call of all "
                f"ranks, with features {[tuple(f) for f in features]}, got different ones"
            )
        if not together.moves():
            break
    return together.read()
