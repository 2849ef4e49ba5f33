"""The compiled module. Lists hold one tensor for each key, states five; see csrc/torch/ops.cpp."""

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

def update(
    x: list[Tensor],
    state: list[Tensor],
    mask: list[Tensor],
    keep: float,
    weight: float,
    out: list[Tensor] | None,
    rule: tuple[float, int, float | None, bool],
) -> list[Tensor] | None:
    """Folds x into the state and returns it normalised with the result.

    Nothing is normalised where out is an empty list.

    None where functorch or forward-mode derivatives look into x or out: they know plain
    torch only. Nothing has happened then.
    """

def normalize(
    x: list[Tensor],
    state: list[Tensor],
    out: list[Tensor] | None,
    rule: tuple[float, int, float | None, bool],
) -> list[Tensor] | None:
    """Returns x normalised with the state as it is; None as update does."""

def moments(
    x: list[Tensor], feature_ndim: int, mask: list[Tensor]
) -> list[Tensor] | None:
    """Returns the moments of each x, leaf after leaf; None as update does."""

def merge(state: list[Tensor], other: list[Tensor], keep: float, weight: float) -> None:
    """Folds moments into a state."""

def write_totals(
    buffer: Tensor,
    expected: Tensor,
    shift: Tensor,
    batches: list[Tensor],
    asks: bool,
    refused: bool,
) -> None:
    """The half of torchrl_vecnorm.totals.Batches before ranks add up, on the CPU."""

def read_totals(buffer: Tensor, shift: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The half after it: the moments of all that was added."""

def scale_returns(
    x: list[Tensor],
    done: list[Tensor],
    returns: list[Tensor],
    state: list[Tensor],
    mask: list[Tensor],
    gamma: float,
    clears_before: bool,
    keep: float,
    rule: tuple[float, int, float | None, bool],
) -> list[Tensor] | None:
    """The returns go on by a step, their moments are folded into the state, x is scaled.

    None as update does.
    """

def scale_returns_of_one(
    x: Tensor,
    done: Tensor,
    returns: Tensor,
    state: Sequence[Tensor],
    mask: Sequence[Tensor],
    gamma: float,
    clears_before: bool,
    keep: float,
    rule: tuple[float, int, float | None, bool],
) -> Tensor | None:
    """The same of one key."""

def normalize_array(
    x: Any,
    state: Sequence[Tensor],
    updating: bool,
    rule: tuple[float, int, float | None, bool],
) -> Any:
    """An array of numpy, normalised; folded into the state first, or not."""

def scale_returns_of_arrays(
    x: Any,
    done: Any,
    returns: Any,
    state: Sequence[Tensor],
    gamma: float,
    clears_before: bool,
    rule: tuple[float, int, float | None, bool],
) -> Any:
    """scale_returns_of_one of arrays of numpy."""

def note_call(kept: Tensor, count: Tensor, keep: float, samples: float) -> None:
    """``kept *= keep`` and ``count = keep * count + samples``, on the CPU."""

def check_values(x: list[Tensor], y: list[Tensor], state: list[Tensor]) -> None:
    """Refuses what the compiled operators refuse, for those in plain torch."""

def check_update(
    x: list[Tensor],
    y: list[Tensor],
    mask: list[Tensor],
    state: list[Tensor],
    keep: float,
    weight: float,
) -> None:
    """As check_values, for update."""

def check_returns(
    x: list[Tensor],
    done: list[Tensor],
    returns: list[Tensor],
    state: list[Tensor],
    y: list[Tensor],
    mask: list[Tensor],
    gamma: float,
    keep: float,
) -> None:
    """As check_values, for scale_returns."""

def check_floating_point(x: list[Tensor]) -> None:
    """Refuses integers and bools, for denormalize in plain torch."""

def check_mask(mask: Tensor, x: Tensor, feature_ndim: int) -> None:
    """Refuses a mask that has not one element a sample."""

def check_merge(
    state: list[Tensor], other: list[Tensor], keep: float, weight: float
) -> None:
    """As check_values, for merge."""

class Binding:
    """A transform's live statistics and keys; see torchrl_vecnorm.statistics.binding."""

    def __init__(
        self,
        td: TensorDict,
        parts: list[tuple[dict, str, Any]],
        tensordict_type: type,
        in_keys: list[tuple[str, ...]],
        out_keys: list[tuple[str, ...]],
        ndims: list[int | None],
        dtypes: list[torch.dtype],
        state: list[Tensor],
        shared: SharedState | None,
        entries: list[Tensor],
        watched: list[tuple[Any, Any]],
    ) -> None: ...
    def call(
        self,
        state_td: TensorDict | None,
        td: TensorDictBase,
        updating: bool,
        keep: float,
        weight: float,
        eps: float,
        timeout: float,
        tolerant: bool = False,
        masks: list[Tensor | None] | None = None,
    ) -> bool:
        """Normalises the entries of a tensordict, updating the statistics or not.

        ``tolerant`` of missing entries; ``masks``, one a key, say which samples count.
        False if anything is special, or a value is refused: nothing has happened then.
        """

def cuda_path(name: str) -> None:
    """In builds with CUDA kernels, for tests and benchmarks: which of them update takes.

    "auto", "cluster", "resident" or "two_kernels"; where a call cannot be run as wished,
    two_kernels.
    """

def cuda_limits() -> str:
    """What the current GPU runs at once; only in a build with the kernels."""

def last_cuda_path() -> str:
    """How the last update on a GPU ran (in builds with CUDA kernels)."""

def leave_the_pool_after_fork() -> None:
    """Lets torch run on in a forked child, on one thread."""

def came_from_another_process(tensor: Tensor) -> bool:
    """Whether a CUDA tensor is memory that another process has sent."""

class SharedState:
    """Statistics in shared memory, behind a lock that outlives whoever holds it.

    ``copies`` are private copies of the leaves: an update works on them, and ``commit``
    writes them back, all or none, at whatever instruction a process dies. See
    csrc/shared/control.h.
    """

    def __init__(self, control: Tensor, names: list[str], leaves: list[Tensor]) -> None:
        """Attaches to a control block.

        Raises:
            RuntimeError: the tensor holds none, or it was made on another kind of machine.
        """

    note: str
    has_journal: bool  # False: it has no room for these leaves
    copies: list[Tensor]

    def acquire(self, timeout: float) -> None:
        """Takes the lock.

        Raises:
            TimeoutError: after ``timeout`` seconds, naming the process that has it.
        """

    def try_acquire(self) -> bool:
        """Takes the lock if nobody has it."""

    def release(self) -> None:
        """Gives the lock back; only for the thread that holds it."""

    def load(self) -> None:
        """Reads the leaves into the copies. With the lock held."""

    def commit(self) -> None:
        """Writes the copies to the leaves, all or none. With the lock held."""

    def lost(self) -> str:
        """An entry that lost what was committed to it, or "". With the lock held."""

    @staticmethod
    def size_for(names: list[str], leaves: list[Tensor], note: str) -> int:
        """Bytes of the uint8 tensor that a control block for these leaves needs."""

    @staticmethod
    def init(control: Tensor, note: str) -> None:
        """Makes a control block in a zeroed uint8 tensor in shared memory."""
