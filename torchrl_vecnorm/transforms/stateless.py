# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``VecNormV2`` without statistics of its own: they travel in the tensordict.

In plain torch, for torch.compile to fuse with the step of the environment around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.tensor_specs import Composite, Unbounded

from torchrl_vecnorm.moments import largest_square
from torchrl_vecnorm.statistics.entries import get_entry
from torchrl_vecnorm.statistics.values import check_value, identity
from torchrl_vecnorm.transforms.masks import Partial

#: What the entries are called, after the prefix of a transform.
FIELDS = ("loc", "var", "count")


def _entry(prefix: str, field: str, key: NestedKey) -> NestedKey:
    return (f"{prefix}_{field}", *((key,) if isinstance(key, str) else key))


def _read(
    td: TensorDictBase,
    prefix: str,
    key: NestedKey,
    shape: torch.Size,
    device: torch.device | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed means of x and of x², and how many there were of each; zeros if none."""
    found = [get_entry(td, _entry(prefix, field, key)) for field in FIELDS]
    if found[0] is None:
        loc, var = torch.zeros((2, *shape), dtype=torch.float64, device=device)
        return loc, var, torch.zeros(shape, dtype=torch.int64, device=device)
    return found[0].double(), found[1].double(), found[2]


def _mass(count: Tensor, decay: float) -> Tensor:
    """``1 - decay**count``, what the averages weigh, to float64's last digits."""
    exponent = count.double() * math.log(decay)
    if not torch.compiler.is_compiling():
        return -torch.expm1(exponent)
    # Up to torch 2.13 what is compiled for CPUs has exp(x) - 1 for expm1(x), a relative
    # 1e-12 off, of which a mean of 1e5 deviations makes a hundredth of the variance
    # (mended by pytorch/pytorch#190533). So the series of a 64th of the exponent, summed
    # in pairs, as a chain of sixteen would take longer than exp; then six times
    # 1 - a² = (1 - a) (2 - (1 - a)). From exp(-40) on it is 1.
    part = exponent.clamp_min(-40.0) * -(2.0**-6)
    terms = [(-1) ** i / math.factorial(i + 1) for i in range(16)]
    power = part
    while len(terms) > 1:
        terms = [a + b * power for a, b in zip(terms[::2], terms[1::2], strict=True)]
        power = power * power
    mass = part * terms[0]
    for _ in range(6):
        mass = mass * (2 - mass)
    return mass


def normalize(
    td: TensorDictBase,
    out: TensorDictBase,
    keys: Sequence[tuple[NestedKey, NestedKey]],
    shapes: Mapping[NestedKey, tuple[torch.Size, torch.device | None]],
    prefix: str,
    decay: float,
    eps: float,
    updating: bool,
    partial: Partial,
) -> TensorDictBase:
    """Normalises values with the statistics beside them.

    Args:
        td: where the statistics are, entries ``<prefix>_loc``, ``_var`` and ``_count``;
            those of nothing if they are missing.
        out: the values, and where they and the new statistics are written to.
        keys: in_keys and out_keys.
        shapes: of the values, and their devices, as far as they are known before.
        prefix: of the entries of the statistics.
        decay: what is left of a sample when the next one comes.
        eps: lower bound of the standard deviation.
        updating: whether the statistics take in the values first.
        partial: which keys may be missing, and which elements of the batch count.

    Raises:
        KeyError: an in_key is missing.
        TypeError: a value is none that can be normalised.
    """
    written = {}
    for in_key, out_key in keys:
        value = get_entry(out, in_key)
        if value is None and not partial.tolerant:
            raise KeyError(
                f"VecNorm: key {in_key!r} is not in the tensordict, which has "
                f"{sorted(map(str, out.keys(True, True)))}"
            )
        if value is None:
            # Nothing to say at a reset: the statistics go on.
            if in_key in shapes:
                old = _read(td, prefix, in_key, *shapes[in_key])
                for field, leaf in zip(FIELDS, old, strict=True):
                    written[_entry(prefix, field, in_key)] = leaf
            continue
        check_value(in_key, value)
        x = value.double()
        loc, var, count = _read(td, prefix, in_key, value.shape, value.device)
        if updating:
            new = x.detach()
            good = new * new <= largest_square(new.dtype)
            if partial.masks_td is not None:
                mask = partial.mask_of(in_key, out.batch_size)
                if mask is not None:
                    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
                    good = good & mask
            new = torch.where(good, new, 0.0)
            weight = 1 - decay if decay < 1 else 1 / (count.double() + 1)
            weight = good.double() * weight
            loc = loc + weight * (new - loc)
            var = var + weight * (new * new - var)
            count = count + good
        seen = count > 0
        mass = torch.ones_like(loc)
        if decay < 1:
            mass = torch.where(seen, _mass(count, decay), mass)
        # All multiplied by the mass: the averages need no division then.
        scale = (var * mass - loc * loc).clamp_min(0).sqrt()
        scale = torch.where(seen, torch.maximum(scale, mass * eps), 1.0)
        y = (x * mass - loc) / scale
        written[out_key] = y.to(identity(value.detach()[:0]).dtype)
        for field, leaf in zip(FIELDS, (loc, var, count), strict=True):
            written[_entry(prefix, field, in_key)] = leaf
    for field in FIELDS:
        name = f"{prefix}_{field}"
        if get_entry(out, name) is None and any(key[0] == name for key in written):
            out.set(name, TensorDict(batch_size=out.batch_size, device=out.device))
    for key, leaf in written.items():
        out.set(key, leaf)
    return out


def add_specs(
    observation_spec: Composite,
    spec: Composite,
    keys: Sequence[NestedKey],
    prefix: str,
) -> None:
    """Adds the statistics of some of a spec's keys to the observations of an environment."""
    for key in keys:
        if key not in spec.keys(True, True):
            continue
        for field in FIELDS:
            name = f"{prefix}_{field}"
            if name not in observation_spec.keys():
                observation_spec[name] = Composite(
                    shape=observation_spec.shape, device=observation_spec.device
                )
            dtype = torch.int64 if field == "count" else torch.float64
            leaf = spec[key]
            observation_spec[_entry(prefix, field, key)] = Unbounded(
                shape=leaf.shape, dtype=dtype, device=leaf.device
            )
