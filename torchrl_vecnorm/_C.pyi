"""The compiled module. Lists hold one tensor for each key; see csrc/ops.cpp."""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

def update(
    x: list[Tensor],
    sum: list[Tensor],
    ssq: list[Tensor],
    count: list[Tensor],
    nonfinite: list[Tensor],
    mask: list[Tensor],
    keep: float,
    weight: float,
    eps: float,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Folds x into the state and returns it normalised with the result."""

def normalize(
    x: list[Tensor],
    sum: list[Tensor],
    ssq: list[Tensor],
    count: list[Tensor],
    nonfinite: list[Tensor],
    eps: float,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Returns x normalised with the state as it is."""

class Binding:
    """A transform's live statistics and keys; see torchrl_vecnorm.state.bind."""

    def __init__(
        self,
        td: TensorDict,
        parts: list[tuple[dict, str, Any]],
        tensordict_type: type,
        in_keys: list[tuple[str, ...]],
        out_keys: list[tuple[str, ...]],
        ndims: list[int | None],
        dtypes: list[torch.dtype],
        sum: list[Tensor],
        ssq: list[Tensor],
        count: list[Tensor],
        nonfinite: list[Tensor],
    ) -> None: ...
    def call(
        self,
        state_td: TensorDict | None,
        td: TensorDictBase,
        updating: bool,
        keep: float,
        eps: float,
    ) -> bool:
        """Normalises the entries of a tensordict, updating the statistics or not.

        False if anything is special, or a value is refused: nothing has happened then.
        """

def cuda_path(name: str) -> None:
    """In builds with CUDA kernels, for tests and benchmarks: which of them update takes.

    "auto", "cluster", "resident" or "two_kernels"; where a call cannot be run as wished,
    two_kernels.
    """

def last_cuda_path() -> str:
    """How the last update on a GPU ran (in builds with CUDA kernels)."""

def mutex_size() -> int:
    """Bytes of the uint8 tensor that a mutex lives in."""

def mutex_init(mutex: Tensor) -> None:
    """Makes a mutex in a zeroed uint8 tensor in shared memory."""

def mutex_acquire(mutex: Tensor, timeout: float) -> bool:
    """Waits for at most ``timeout`` seconds; False when the time ran out."""

def mutex_release(mutex: Tensor) -> None:
    """Gives the mutex back; only for the thread that holds it."""
