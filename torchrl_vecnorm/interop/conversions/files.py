# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Files of statistics: of torch, of safetensors, pickles."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_vecnorm.interop.conversions.pickles import unpickled

try:
    from numpy._core.multiarray import scalar
except ImportError:  # numpy 1
    from numpy.core.multiarray import scalar  # type: ignore[no-redef]

#: What torch's unpickler is to take beside tensors: numbers of numpy.
_NUMBERS = [
    scalar,
    np.dtype,
    *(type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "?")),
]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def loaded(path: str | os.PathLike[str]) -> Any:
    """What is in a file, by what it looks like; nothing in it is run.

    Raises:
        ValueError: it is none of these, or cut, or holds more than statistics.
    """
    file = Path(path)
    try:
        if file.suffix == ".safetensors":
            return safetensors(file.read_bytes())
        if zipfile.is_zipfile(file):
            with torch.serialization.safe_globals(_NUMBERS):
                return torch.load(file, map_location="cpu", weights_only=True)
        with file.open("rb") as stream:
            return unpickled(stream)
    except OSError:
        raise
    except Exception as err:
        # Of torch, of zipfile: as many as there are ways to be no such file.
        name = re.search(r"GLOBAL (\S+)", str(err))
        why = f"expected statistics, got {name[1]}, which is not run" if name else err
        raise ValueError(f"{str(path)!r}: {why}") from None


def safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which says itself where they are.

    Raises:
        ValueError: it is cut, or says what cannot be.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(
            f"expected a safetensors file, got {len(data)} bytes whose header has {size}"
        )
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if not isinstance(header, dict):
        raise ValueError(f"expected a header of names, got {type(header).__name__}")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(
                f"entry {name!r}: expected real numbers, got {entry['dtype']}"
            )
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        need = math.prod(shape) * dtype.itemsize
        if not 0 <= begin <= end <= len(body) or end - begin != need:
            raise ValueError(
                f"entry {name!r}: expected {need} bytes within {len(body)}, got those from "
                f"{begin} to {end}"
            )
        part = bytearray(body[begin:end])
        flat = (
            torch.frombuffer(part, dtype=dtype) if need else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.reshape(shape)
    return tensors
