# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics from one library to another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from torchrl_vecnorm.checks import check_moments
from torchrl_vecnorm.interop.conversions import (
    buffers,
    of_arrays,
    of_brax,
    of_rllib,
    of_torchrl,
)
from torchrl_vecnorm.interop.conversions.carried import Carried
from torchrl_vecnorm.interop.conversions.files import loaded
from torchrl_vecnorm.interop.conversions.places import (
    Format,
    Options,
    Place,
    choose,
    named,
    replaced,
)
from torchrl_vecnorm.moments import Moments

__all__ = ["Carried", "read", "write"]

_RMS = ("running_mean", "running_var", "count")
_FLOAT32, _FLOAT64 = torch.float32, torch.float64
_IMITATION: dict[str, Any] = {
    "eps": (1e-5, "eps"),
    "eps_mode": "var_add",
    "dtypes": (_FLOAT32, torch.int32),
}

#: All that is known, by library.
FORMATS: list[Format] = [
    of_torchrl.Ours(),
    of_torchrl.V1(),
    of_torchrl.V2(),
    of_torchrl.PopArt(),
    of_torchrl.RunningValue(),
    buffers.UnbiasedBatches(
        "skrl",
        ("skrl",),
        ("RunningStandardScaler",),
        ("running_mean", "running_variance", "current_count"),
        eps=(1e-8, "epsilon"),
        eps_mode="std_add",
        clip=(5.0, "clip_threshold"),
        first=1.0,
    ),
    buffers.RslRl(
        "rsl_rl",
        ("rsl_rl",),
        ("EmpiricalNormalization",),
        ("_mean", "_var", "count"),
        eps=(1e-2, "eps"),
        eps_mode="std_add",
        dtypes=(_FLOAT32, torch.int64),
        axis=True,
    ),
    buffers.Buffers(
        "rl_games",
        ("rl_games",),
        ("RunningMeanStd",),
        _RMS,
        eps=(1e-5, "epsilon"),
        eps_mode="var_add",
        clip=(5.0, ""),
        first=1.0,
    ),
    buffers.UnbiasedBatches(
        "sample_factory",
        ("sample_factory",),
        ("RunningMeanStdInPlace",),
        _RMS,
        eps=(1e-5, "eps"),
        eps_mode="var_add",
        clip=(5.0, "clip"),
        first=1.0,
        count_shape=(1,),
    ),
    buffers.Pfrl(
        "pfrl",
        ("pfrl",),
        ("EmpiricalNormalization",),
        ("_mean", "_var", "count"),
        eps=(1e-2, "eps"),
        eps_mode="var_add",
        clip=(None, "clip_threshold"),
        dtypes=(_FLOAT32, torch.int64),
        axis=True,
    ),
    buffers.RunningNormOfImitation(
        "imitation.RunningNorm", ("imitation",), ("RunningNorm",), _RMS, **_IMITATION
    ),
    buffers.EMANorm(
        "imitation.EMANorm", ("imitation",), ("EMANorm",), _RMS, **_IMITATION
    ),
    of_arrays.Attributes(
        "stable_baselines3",
        {"VecNormalize": ("obs_rms", "ret_rms")},
        eps=(1e-8, "epsilon"),
        clip=(10.0, "clip_obs", "clip_reward"),
        first=1e-4,
    ),
    of_arrays.Attributes(
        "gymnasium",
        {"NormalizeObservation": ("obs_rms",), "NormalizeReward": ("return_rms",)},
        eps=(1e-8, "epsilon"),
        first=1e-4,
    ),
    of_arrays.Attributes(
        "tianshou",
        {"VectorEnvNormObs": ("obs_rms",)},
        eps=(1.1920928955078125e-07, "eps"),
        clip=(10.0, "clip_max", "clip_max"),
        first=0,
    ),
    of_brax.Brax(),
    of_rllib.RLlib(),
    of_arrays.EvoTorch(),
    of_arrays.LeRobot(),
    of_arrays.D3rlpy(),
]


def read(
    source: Any,
    library: str | None = None,
    *,
    key: str | None = None,
    decay: float | None = None,
    count: float | None = None,
) -> Carried:
    """The statistics of a normaliser of another library, and how it applies them.

    Args:
        source: the object; its state dict, or a checkpoint with that in it; or the path of a
            file of these: of ``torch.save``, of safetensors, or a pickle. A pickle is read
            without running what it holds.
        library: whose, where several have the same names in a state dict.
        key: which, where there are several: a path as an error names it, or its end.
        decay: of classes that forget, where it is a state dict, which does not say.
        count: how many samples, where the library does not say.

    Nothing is imported for it, and nothing is changed.

    Raises:
        ValueError: statistics of no known library, or of several, or such as no data can have
            given, or a file that is cut or holds anything else; it names what.

    Warns:
        UserWarning: of what cannot be carried.

    Example:
        >>> from torchrl_vecnorm import interop
        >>> carried = interop.read("vecnormalize.pkl", key="obs_rms")  # doctest: +SKIP
        >>> norm = carried.running_norm()  # doctest: +SKIP
    """
    is_file = isinstance(source, (str, os.PathLike))
    found = loaded(source) if is_file else source
    options = Options(decay, count)
    place = choose(found, FORMATS, library, key)
    carried = place.format.read(place, options)
    for doubt in place.format.doubts(place, carried):
        warnings.warn(doubt, stacklevel=2)
    return carried


def write(
    carried: Carried | Moments,
    library: str | None = None,
    *,
    like: Any = None,
    key: str | None = None,
    decay: float | None = None,
) -> Any:
    """Statistics in the form of another library.

    Args:
        carried: what :func:`read` gave, or moments.
        library: whose; where it has several classes, with the name of one, as in
            ``"torchrl.VecNormV2"``. What ``like`` is says it too.
        like: an object of the library, which is written to and returned (brax's does not
            change: a new one is returned); or a state dict or a checkpoint, of which a copy
            with these statistics is returned.
        key: which of the statistics in ``like``; as in :func:`read`.
        decay: of classes that forget, where ``like`` does not say.

    Returns:
        ``like`` with these statistics; without it, the library's entries by its own names.

    Counts are rounded where the library has whole ones. Without samples the state is the one
    that the library begins with.

    Raises:
        ValueError: other shapes than those of ``like``; moments that no data can have given;
            ``like`` is of no known library. Nothing has been written then.

    Warns:
        UserWarning: the library applies statistics in another way than they were applied, so
            that outputs will differ.
    """
    moments = carried.moments if isinstance(carried, Carried) else carried
    if not isinstance(moments, Moments):
        raise TypeError(
            f"expected what read() gave, or Moments, got {type(moments).__name__}"
        )
    names = [f"moments.{field}" for field in Moments._fields]
    counts = moments.count.numel()
    check_moments(names, moments, None, counts=counts, owner="write")
    moments = Moments(
        *(None if leaf is None else leaf.detach().cpu().double() for leaf in moments)
    ).with_extras()
    place: Place | None = None
    if like is not None:
        place = choose(like, FORMATS, library, key)
        of = place.format
    elif library is None:
        raise TypeError("expected library= or like=, got neither")
    else:
        of = _one(library)
    made = of.make(moments, place, Options(decay))
    if isinstance(carried, Carried):
        rule = of.rule(place)
        given = {name: value for name, value in carried.rule().items()}
        if rule != given:
            warnings.warn(
                f"{of.library} has {_differences(rule, given)}: outputs will differ",
                stacklevel=2,
            )
    if place is None:
        return made
    if place.owner is not None:
        put = of.put(place, made)
        return like if put is place.owner else replaced(like, place.trail, put)
    result = like
    for name, value in made.items():
        if name in place.names:
            trail = (*place.trail, *place.names[name])
            result = replaced(result, trail, value)
    return result


def _one(library: str) -> Format:
    formats = named(FORMATS, library)
    if len(formats) > 1:
        names = ", ".join(repr(of.library) for of in formats)
        raise ValueError(f"expected library as one of {names}, got {library!r}")
    return formats[0]


def _differences(rule: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={rule[name]!r} where it was {given[name]!r}"
        for name in rule
        if rule[name] != given[name]
    )
