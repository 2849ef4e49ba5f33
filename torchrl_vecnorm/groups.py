# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Process groups as users give them, and what their ranks tell each other before they add up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from torchrl_vecnorm.moments import Moments

#: What a user gives as one: a process group, a DeviceMesh of one dimension, or "world".
Group: TypeAlias = Any


def check_group(group: Group, owner: str) -> Group:
    """What is kept of a group that a user gives: the default one by its name.

    Raises:
        TypeError, ValueError: it is none, or not of this process.
    """
    if group is None or (isinstance(group, str) and group == "world"):
        return group
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            raise ValueError(
                f"{owner}: expected a DeviceMesh of one dimension as group, got one of "
                f"{group.mesh_dim_names or group.ndim}: take a dimension of it, as in "
                "mesh['dp']"
            )
        return group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{owner}: expected a group that this process is a rank of, got one of others"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{owner}: expected group as a process group, a DeviceMesh or 'world', got "
            f"{type(group).__name__} {group!r}"
        )
    if dist.is_initialized() and group is dist.group.WORLD:
        return "world"  # that which is there when it is called
    return group


def process_group(group: Group, owner: str) -> dist.ProcessGroup:
    """The process group itself; None is the default one.

    Raises:
        RuntimeError: torch.distributed was not started here.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{owner}: expected torch.distributed to be initialised for statistics of a "
            "group, but this process is no rank: call "
            "torch.distributed.init_process_group first (workers of an environment are "
            "no ranks: put the transform around it)"
        )
    if hasattr(group, "get_group"):
        return group.get_group()
    return dist.group.WORLD if group is None or isinstance(group, str) else group


def describe(group: dist.ProcessGroup) -> str:
    """A group for messages, from the eyes of this rank."""
    name = getattr(group, "group_desc", "") or "undefined"
    if name == "undefined":
        name = group.group_name
    return f"{name!r} (rank {group.rank()} of {group.size()})"


@contextmanager
def naming(owner: str, what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Says of an error of torch.distributed which call of which group it is of."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{owner}: {what} in group {describe(group)} failed, the statistics are as "
            f"they were: a rank has died, has not come within the group's timeout, or "
            f"called something else. torch.distributed says: {error}"
        ) from error


def gathered(group: dist.ProcessGroup, said: Any) -> list[Any]:
    """What each rank says."""
    heard: list[Any] = [None] * group.size()
    dist.all_gather_object(heard, said, group=group)
    return heard


# -------------------------------------------------------- what ranks have in common already


def digest(moments: Moments | None) -> bytes | None:
    """The same for the same bits."""
    if moments is None:
        return None
    found = hashlib.blake2b(digest_size=16)
    for leaf in moments:
        if leaf is not None:
            plain = leaf.detach().cpu().contiguous()
            found.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            found.update(plain.numpy().tobytes())
    return found.digest()


def the_same(
    group: dist.ProcessGroup,
    names: Sequence[str],
    mine: Sequence[Moments | None],
    digests: Sequence[Sequence[bytes | None]],
    complain: Callable[[str], Exception],
) -> list[Moments | None]:
    """What all ranks have of each key, given to those that have nothing.

    Args:
        group: the ranks.
        names: of the keys.
        mine: what this rank has.
        digests: of what each rank has, for each key.
        complain: makes an error, of the name of a key that ranks have different ones of.
    """
    sources: list[int | None] = []
    for k, name in enumerate(names):
        held = [said[k] for said in digests]
        if len(set(held) - {None}) > 1:
            raise complain(name)
        holder = next((r for r, one in enumerate(held) if one is not None), None)
        sources.append(holder if None in held else None)
    if all(source is None for source in sources):
        return list(mine)
    rank = group.rank()
    sent = {
        k: tuple(None if v is None else v.detach().cpu().clone() for v in mine[k])
        for k, source in enumerate(sources)
        if source == rank and mine[k] is not None
    }
    heard = gathered(group, sent)
    return [
        mine[k] if source is None or mine[k] is not None else Moments(*heard[source][k])
        for k, source in enumerate(sources)
    ]


def is_empty(state: Moments | None) -> bool:
    """Whether nothing was seen."""
    return state is None or not bool(state.samples() > 0)


def mean_of(*known: Moments | None) -> Tensor | None:
    """Where values are about, by the first moments that say so; NaN where none do."""
    return first_known(
        [
            torch.where(m.used() > 0, m.mean_var()[0], torch.nan).cpu().double()
            for m in known
            if m is not None
        ]
    )


def first_known(values: Sequence[Tensor | None]) -> Tensor | None:
    """Of each element the first that is no NaN."""
    found = None
    for value in values:
        if found is None:
            found = value
        elif value is not None:
            found = torch.where(found.isnan(), value, found)
    return found
