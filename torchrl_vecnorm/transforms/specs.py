# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What normalisation does to the specs of an environment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torchrl.data.tensor_specs import Composite, TensorSpec, Unbounded


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
