# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where in what a user has there are statistics, and of which library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from torchrl_vecnorm.interop.conversions.carried import Carried
from torchrl_vecnorm.moments import Moments


class Place(NamedTuple):
    """Statistics that were found.

    Attributes:
        path: where, as a user writes it for ``key=``.
        format: whose.
        entries: what is there, by the library's names.
        owner: the object that has them; None where they are in a mapping.
        holder: the object that applies them, where that is another one.
        leaf: which of the statistics of the owner they are.
        names: in a mapping, the keys that lead to each entry.
        trail: the keys that lead to the object or to the mapping.
    """

    path: str
    format: Format
    entries: Mapping[str, Any]
    owner: Any = None
    holder: Any = None
    leaf: tuple = ()
    names: Mapping[str, tuple] | None = None
    trail: tuple = ()


class Options(NamedTuple):
    """What no state says, where a user does."""

    decay: float | None = None
    count: float | None = None


class Format:
    """How one class of one library keeps its statistics.

    Attributes:
        library: what it is called, for ``library=``.
        packages: where classes of it are.
        classes: their names.
        required: entries without which there is nothing.
    """

    library: str
    packages: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    required: tuple[str, ...]

    def recognises(self, entries: Mapping[str, Any]) -> bool:
        """Whether what is beside each other in a mapping is of this class."""
        return all(name in entries for name in self.required)

    def in_mapping(self, mapping: Mapping, path: str) -> Iterator[Place]:
        """Statistics among the keys of a mapping, which may have dots in them."""
        for folder, names in folders(mapping).items():
            entries = {name: mapping[key] for name, key in names.items()}
            if self.recognises(entries):
                trails = {name: (key,) for name, key in names.items()}
                yield Place(joined(path, folder), self, entries, names=trails)

    def in_object(self, obj: Any, path: str) -> Iterator[Place]:
        """Statistics of an object of the library."""
        if is_of(obj, self.packages, self.classes):
            yield Place(path, self, self.entries_of(obj), obj)

    def entries_of(self, obj: Any) -> Mapping[str, Any]:
        """Those entries of an object that it has."""
        return {n: getattr(obj, n) for n in self.required if hasattr(obj, n)}

    def read(self, place: Place, options: Options) -> Carried:
        """The statistics and how they are applied."""
        raise NotImplementedError

    def rule(self, place: Place | None) -> dict[str, Any]:
        """How statistics are applied there; without a place, by default."""
        raise NotImplementedError

    def doubts(self, place: Place, carried: Carried) -> list[str]:
        """What a user has to know of what could not be carried."""
        return []

    def make(
        self, moments: Moments, place: Place | None, options: Options
    ) -> dict[str, Any]:
        """The library's entries for these moments, in the dtypes of those of a place."""
        raise NotImplementedError

    def put(self, place: Place, entries: Mapping[str, Any]) -> Any:
        """Writes entries into the owner; returns it, or what stands for it."""
        for name, value in entries.items():
            setattr(place.owner, name, value)
        return place.owner


def folders(mapping: Mapping) -> dict[str, dict[str, str]]:
    """The keys of a mapping by what is before their last dot: name to key."""
    found: dict[str, dict[str, str]] = {}
    for key in mapping:
        if isinstance(key, str):
            folder, _, name = key.rpartition(".")
            found.setdefault(folder, {})[name] = key
    return found


def replaced(nest: Any, trail: tuple, value: Any) -> Any:
    """A copy of nested mappings and sequences with another value at one place."""
    if not trail:
        return value
    key, rest = trail[0], trail[1:]
    if isinstance(nest, (list, tuple)):
        items = list(nest)
        items[key] = replaced(items[key], rest, value)
        return type(nest)(items)
    copied = dict(nest) if type(nest) is dict else nest.copy()
    copied[key] = replaced(copied.get(key), rest, value)
    return copied


def leaves(nest: Any, trail: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each array of nested mappings and sequences."""
    if isinstance(nest, Mapping):
        items: Any = nest.items()
    elif isinstance(nest, (list, tuple)) and not all(np.isscalar(v) for v in nest):
        items = enumerate(nest)
    else:
        yield trail
        return
    for key, child in items:
        yield from leaves(child, (*trail, key))


def at_leaf(nest: Any, trail: tuple) -> Any:
    """What is there."""
    for key in trail:
        try:
            nest = nest[key]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"expected {key!r} in each of its nests") from None
    return nest


def joined(*parts: str) -> str:
    """Parts of a path, those that are there."""
    return ".".join(part for part in parts if part)


def is_of(obj: Any, packages: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether an object is of a class with one of these names, of these packages."""
    found = [(cls.__module__, cls.__name__) for cls in type(obj).__mro__]
    if isinstance(obj, torch.jit.ScriptModule):  # all of them are of one class
        module, _, name = obj._c._type().qualified_name().rpartition(".")
        parts = [p for p in module.split(".") if not p.startswith("__")]
        found.append((".".join(parts), name))
    return any(
        name in classes and any(f"{module}.".startswith(f"{of}.") for of in packages)
        for module, name in found
    )


def look(source: Any, formats: Sequence[Format], path: str = "") -> Iterator[Place]:
    """All statistics in an object, a state dict, or a checkpoint of them."""
    if isinstance(source, nn.Module):
        for name, module in source.named_modules():
            for of in formats:
                yield from of.in_object(module, joined(path, name))
    elif isinstance(source, Mapping):
        for of in formats:
            yield from of.in_mapping(source, path)
        yield from _children(source, source.keys(), formats, path)
    elif isinstance(source, (list, tuple)) and not hasattr(source, "_fields"):
        yield from _children(source, range(len(source)), formats, path)
    else:
        for of in formats:
            yield from of.in_object(source, path)


def _children(source: Any, keys: Any, formats: Sequence[Format], path: str):
    for key in keys:
        name = "" if key == "_extra_state" else str(key).removesuffix("._extra_state")
        for place in look(source[key], formats, joined(path, name)):
            yield place._replace(trail=(key, *place.trail))


def choose(
    source: Any, formats: Sequence[Format], library: str | None, key: str | None
) -> Place:
    """The one place that a user means.

    Raises:
        ValueError: none, or several.
    """
    wanted = named(formats, library)
    found = list(look(source, wanted))
    if not found:
        raise ValueError(_nothing(source, wanted, library))
    paths = list(dict.fromkeys(place.path for place in found))
    if key is not None:
        good = [path for path in paths if path == key]
        good = good or [path for path in paths if f".{path}".endswith(f".{key}")]
        if not good:
            raise ValueError(f"expected key as one of {paths}, got {key!r}")
        paths = good
    if len(paths) > 1:
        raise ValueError(f"expected statistics at one place, found {paths}: pass key=")
    places = [place for place in found if place.path == paths[0]]
    missing = [n for n in places[0].format.required if n not in places[0].entries]
    if missing:
        raise ValueError(f"{places[0].format.library}: expected {missing}, got none")
    if len(places) > 1:
        names = [place.format.library for place in places]
        raise ValueError(
            f"expected the statistics of one library, found what {' and '.join(names)} "
            "have under the same names: pass library="
        )
    return places[0]


def named(formats: Sequence[Format], library: str | None) -> list[Format]:
    """The formats of a library, or the one of that name."""
    if library is None:
        return list(formats)
    good = [f for f in formats if library in (f.library, f.library.split(".")[0])]
    if not good:
        names = ", ".join(f.library for f in formats)
        raise ValueError(f"expected library as one of {names}, got {library!r}")
    return good


def _nothing(source: Any, formats: Sequence[Format], library: str | None) -> str:
    """Why there is nothing: what is missing of what is nearly there, or what is there."""
    best, text = 0, ""
    for folder, there in _names(source):
        for of in formats:
            missing = [name for name in of.required if name not in there]
            some = len(of.required) - len(missing)
            if some > best and missing:
                best = some
                names = ", ".join(repr(joined(folder, name)) for name in missing)
                text = f"; for those of {of.library} there is no {names}"
            elif some > best:
                best = some
                text = f"; what is at {folder!r} is not what {of.library} has there"
    whose = "a library that is known" if library is None else library
    got = type(source).__name__
    if isinstance(source, Mapping):
        keys = [str(key) for key in list(source)[:8]]
        got = f"a mapping of {keys}{' and more' if len(source) > 8 else ''}"
    return f"expected statistics of {whose}, got {got}{text}"


def _names(source: Any, path: str = "") -> Iterator[tuple[str, Sequence[str]]]:
    if isinstance(source, Mapping):
        for folder, names in folders(source).items():
            yield joined(path, folder), list(names)
        for key, child in source.items():
            yield from _names(child, joined(path, str(key)))
