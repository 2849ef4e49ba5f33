# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What normalisation does to the specs of an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import unravel_key
from tensordict.utils import NestedKey
from torchrl.data.tensor_specs import Composite, TensorSpec, Unbounded

if TYPE_CHECKING:
    from torchrl.envs import EnvBase


def normalized_spec(spec: TensorSpec) -> TensorSpec:
    """The spec of a normalised entry.

    Normalised values have no bounds, and integers come out in the default dtype.
    """
    if hasattr(spec, "_specs") and not isinstance(spec, Composite):
        # Entries of different shapes, stacked lazily.
        return torch.stack([normalized_spec(s) for s in spec._specs], spec.dim)
    dtype = spec.dtype
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    elif isinstance(spec, Unbounded):
        return spec
    return Unbounded(shape=spec.shape, dtype=dtype, device=spec.device)


def normalize_specs(
    spec: TensorSpec, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]
) -> TensorSpec:
    """A copy of ``spec`` in which every out_key is a normalised in_key."""
    if not isinstance(spec, Composite):
        return normalized_spec(spec)
    spec = spec.clone()
    present = set(spec.keys(True, True))
    normalized = {
        out_key: normalized_spec(spec[in_key])
        for in_key, out_key in zip(in_keys, out_keys, strict=True)
        if in_key in present
    }
    for out_key, out_spec in normalized.items():
        spec[out_key] = out_spec
    return spec


def _step_keys(spec: Composite, keys: Sequence[NestedKey]) -> list[NestedKey]:
    """``keys`` with "next" resolved, each relative to the step's output."""
    selected: list[NestedKey] = []
    for key in keys:
        key = unravel_key(key)
        if key == "next":
            selected += [
                leaf
                for leaf, leaf_spec in spec.items(True, True)
                if leaf_spec.dtype.is_floating_point
            ]
            continue
        if isinstance(key, tuple) and key[0] == "next":
            key = unravel_key(key[1:])
        if key not in spec.keys(True, True):
            raise KeyError(
                f"key {key!r} is not an entry of the step's output; "
                f"it has {list(spec.keys(True, True))}"
            )
        selected.append(key)
    return list(dict.fromkeys(selected))


def _features(env: EnvBase, key: NestedKey, spec: TensorSpec) -> torch.Size:
    features = spec.shape[len(env.batch_size) :]
    if -1 in features:
        raise ValueError(
            f"key {key!r}: expected features of one shape, got {tuple(features)}: entries "
            "of different shapes are stacked there"
        )
    return features


def step_features(
    env: EnvBase, keys: Sequence[NestedKey]
) -> dict[NestedKey, torch.Size]:
    """The shape of the features of each of these keys in a step's output.

    Raises:
        KeyError: a key is not an entry of it.
        ValueError: an entry stacks values of different shapes.
    """
    spec = env.full_observation_spec.clone()
    spec.update(env.full_reward_spec.clone())
    return {key: _features(env, key, spec[key]) for key in _step_keys(spec, keys)}
