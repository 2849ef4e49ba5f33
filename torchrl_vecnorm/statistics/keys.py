# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which keys have statistics, and under which names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from tensordict import unravel_key
from tensordict.utils import NestedKey

from torchrl_vecnorm.statistics.names import StateNames, as_path, flat_name


@dataclass
class Key:
    """One in_key, and where its things are."""

    in_key: NestedKey
    out_key: NestedKey
    names: StateNames
    shape: torch.Size | None  # of the features, where the user gave it
    others: list[NestedKey]  # in_keys that share the statistics


@dataclass
class Keys:
    """All in_keys, as they were when they were looked up."""

    given: tuple  # in_keys, out_keys, shapes, names
    inputs: list[Key]  # one for each in_key
    sets: list[
        Key
    ]  # one for each set of statistics, with the key that it is kept under


def find_keys(
    in_keys: list[NestedKey],
    out_keys: list[NestedKey],
    shapes: Sequence[torch.Size] | None,
    names: Mapping[NestedKey, NestedKey] | None,
    names_of: Callable[[NestedKey], StateNames] = StateNames.of,
) -> Keys:
    """Looks keys up; ``names_of`` says where the statistics of one are.

    Raises:
        ValueError: ``shapes`` or ``out_keys`` do not match ``in_keys`` in length, a key
            is given twice or is the name of another's statistics, ``names`` has a key
            that is no in_key.
    """
    for name, other in (("out_keys", out_keys), ("shapes", shapes)):
        if other is not None and len(other) != len(in_keys):
            raise ValueError(
                f"VecNorm: expected as many {name} as in_keys, got {len(other)} {name} "
                f"for the {len(in_keys)} in_keys {in_keys}"
            )
    given = deepcopy((in_keys, out_keys, shapes, names))
    # Whoever changes the lists in place need not have done this.
    in_keys = [unravel_key(key) for key in in_keys]
    out_keys = [unravel_key(key) for key in out_keys]
    for name, keys in (("in_keys", in_keys), ("out_keys", out_keys)):
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise ValueError(f"VecNorm: {name} has {twice[0]!r} more than once: {keys}")
    kept = {key: key for key in in_keys}
    for key, name in (names or {}).items():
        if unravel_key(key) not in kept:
            raise ValueError(
                f"VecNorm: names: expected a key that is one of the in_keys {in_keys}, "
                f"got {key!r}"
            )
        kept[unravel_key(key)] = unravel_key(name)
    if shapes is None:
        shapes = [None] * len(in_keys)
    inputs = [
        Key(
            in_key,
            out_key,
            names_of(kept[in_key]),
            None if shape is None else torch.Size(shape),
            [key for key in in_keys if kept[key] == kept[in_key] and key != in_key],
        )
        for in_key, out_key, shape in zip(in_keys, out_keys, shapes, strict=True)
    ]
    sets: dict[NestedKey, Key] = {}
    for key in inputs:
        first = sets.setdefault(kept[key.in_key], key)
        if first.shape != key.shape:
            raise ValueError(
                f"VecNorm: expected one shape for the keys {first.in_key!r} and "
                f"{key.in_key!r}, which share their statistics, got "
                f"{tuple(first.shape)} and {tuple(key.shape)}"
            )
    flat: dict[str, NestedKey] = {}
    for name in sets:
        other = flat.setdefault(flat_name(name), name)
        if other != name:
            raise ValueError(
                f"VecNorm: keys {other!r} and {name!r} have the same name in a state_dict"
            )
    for name in sets:
        path = as_path(name)
        for other, key in sets.items():
            for entry in key.names:
                if as_path(entry) == path[: len(as_path(entry))]:
                    raise ValueError(
                        f"VecNorm: key {name!r} collides with {entry!r}, where the "
                        f"statistics of key {other!r} are kept"
                    )
    sets = [replace(key, in_key=name) for name, key in sets.items()]
    return Keys(given, inputs, sets)
