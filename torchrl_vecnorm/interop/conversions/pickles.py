# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Pickles, read without running what they hold.

A pickle is a program that calls whatever it names. Here a name stands for an array of numpy or
torch, for a plain container, or for a :class:`Record`, which has the attributes of the
object and none of its code; any other is an error.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict, defaultdict
from typing import Any, BinaryIO

import numpy as np
import torch

#: Classes that are read as their attributes: what holds statistics, and what is saved with
#: it.
_RECORDS = {
    "stable_baselines3.common.vec_env.vec_normalize": ("VecNormalize",),
    "stable_baselines3.common.running_mean_std": ("RunningMeanStd",),
    "gymnasium.wrappers.utils": ("RunningMeanStd",),
    "gymnasium.wrappers.normalize": ("RunningMeanStd",),  # before 1.0
    "gymnasium.spaces.box": ("Box",),
    "gymnasium.spaces.dict": ("Dict",),
    "gymnasium.spaces.discrete": ("Discrete",),
    "gymnasium.spaces.multi_binary": ("MultiBinary",),
    "gymnasium.spaces.multi_discrete": ("MultiDiscrete",),
    "gymnasium.spaces.tuple": ("Tuple",),
    "tianshou.utils.statistics": ("RunningMeanStd",),
    "evotorch.neuroevolution.net.runningnorm": ("RunningNorm",),
    "ray.rllib.utils.filter": ("MeanStdFilter", "RunningStat"),
    "numpy.random._pcg64": ("PCG64",),
    "numpy.random._generator": ("Generator",),
    "numpy.random.bit_generator": ("SeedSequence", "__pyx_unpickle_SeedSequence"),
    "numpy.random._pickle": ("__generator_ctor", "__bit_generator_ctor"),
}
#: Names of modules in pickles that Python 2 could read.
_OLD = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Dtype:
    """What a pickle says of a dtype; numpy's own would take anything that it is told."""

    def __init__(self, code: str, *args: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple) -> None:
        """Takes the order of bytes."""
        self.order = {"|": "=", "<": "<", ">": ">"}[state[1]]

    def numpy(self) -> np.dtype:
        """As numpy has it, if it is of numbers."""
        kind, size = self.code[:1], self.code[1:]
        if kind not in "fiub" or size not in ("1", "2", "4", "8"):
            raise ValueError(f"expected arrays of real numbers, got {self.code!r}")
        return np.dtype(f"{self.order}{kind}{size}")


class Array:
    """What a pickle says of an array."""

    def __init__(self, *args: Any) -> None:
        self.values = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        """Takes the shape, the dtype, the order of dimensions and the bytes."""
        _, shape, dtype, columns_first, data = state
        if isinstance(data, list):  # of objects
            self.values = np.empty(0, object)
            return
        self.values = _values(data, dtype, shape, "F" if columns_first else "C")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """The array."""
        return np.asarray(self.values, dtype=dtype)

    @property
    def dtype(self) -> np.dtype:
        """As that of the array, as is ``shape``."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``dtype``."""
        return self.values.shape


def _values(data: Any, dtype: Dtype, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(dtype, Dtype):
        raise TypeError(f"expected a dtype, got {type(dtype).__name__}")
    return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)


def _array(data: Any, dtype: Dtype, shape: Any, order: Any = "C") -> Array:
    array = Array()
    array.values = _values(data, dtype, shape, order)
    return array


def _scalar(dtype: Dtype, data: bytes) -> Any:
    return _values(data, dtype, ())[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"expected bytes as latin1, got {encoding}")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "object"): object,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("numpy", "dtype"): Dtype,
    ("numpy", "ndarray"): Array,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}
_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): copyreg._reconstructor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(
        io.BytesIO(data), weights_only=True
    ),
}
for _core in ("numpy.core", "numpy._core"):
    _FUNCTIONS |= {
        (f"{_core}.multiarray", "_reconstruct"): Array,
        (f"{_core}.multiarray", "scalar"): _scalar,
        (f"{_core}.numeric", "_frombuffer"): _array,
    }


class Record:
    """What a pickle says of an object: its attributes. A subclass has the class's name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Whatever it is called with."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """As ``__init__``."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Takes attributes, and leaves anything else."""
        if isinstance(state, dict):
            vars(self).update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = _OLD.get(module, module)
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        function = _FUNCTIONS.get((module, name))
        if function is not None:
            # A new one: a pickle may write attributes to what it has.
            return lambda *args: function(*args)
        if name in _RECORDS.get(module, ()):
            return type(name, (Record,), {"__module__": module})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnknownClass(
            f"expected a pickle of statistics, got one with {module}.{name}, which is not run"
        )


class UnknownClass(ValueError):
    """A pickle names what is not known."""


def unpickled(file: BinaryIO) -> Any:
    """What is in a pickle.

    Raises:
        ValueError: naming a class that is not known; or no pickle, or one that is cut.
    """
    try:
        return _Unpickler(file).load()
    except UnknownClass as err:
        raise ValueError(str(err)) from None
    except Exception as err:
        # A pickle that is not right may raise anything.
        raise ValueError(
            f"expected a whole pickle, got one that ends in {type(err).__name__}: {err}"
        ) from None
