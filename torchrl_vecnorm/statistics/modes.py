# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What torch is about when it calls: a trace, fake tensors, functorch, inference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.sharing import in_shared_memory


def without_functorch() -> AbstractContextManager:
    """Statistics are no part of what grad, vmap and the like look into."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def is_active(mode: torch._C._TorchDispatchModeKey) -> bool:
    """Whether a mode of torch is on."""
    return torch._C._get_dispatch_mode(mode) is not None


def are_fake(values: Iterable[Tensor]) -> bool:
    """Whether a call is about shapes and dtypes only: no graph is made of it either."""
    modes = torch._C._TorchDispatchModeKey
    if is_compiling() or is_active(modes.PROXY):
        return False
    return is_active(modes.FAKE) or any(map(is_fake, values))


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host may ask for numbers of a tensor: they are in its memory, and no graph
    is made for others.
    """
    return (
        not is_compiling()
        and tensor.device.type == "cpu"
        and not is_active(torch._C._TorchDispatchModeKey.PROXY)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not are_fake([tensor])
    )


@contextmanager
def outside() -> Iterator[None]:
    """Statistics outlive the block, the transform and the trace that they are made in."""
    with without_functorch(), _disable_current_modes(), torch.inference_mode(False):
        yield


@torch.compiler.assume_constant_result
def _is_inference(leaf: Tensor) -> bool:
    # A graph guards on it, so that it asks anew where the tensor was replaced.
    return leaf.is_inference()


def is_stale(leaf: Tensor) -> bool:
    """Whether the statistics were made under inference_mode: they stay read-only after."""
    if is_compiling():
        return _is_inference(leaf)
    return (
        leaf.is_inference()
        and not torch.is_inference_mode_enabled()
        and not in_shared_memory(leaf)
    )


def new_moments(
    features: torch.Size, device: torch.device, counts_all: bool = False
) -> Moments:
    """The moments of nothing, to be kept."""
    if is_compiling() or is_active(torch._C._TorchDispatchModeKey.FAKE):
        return Moments.zeros(features, device=device, counts_all=counts_all)
    with outside():
        return Moments.zeros(features, device=device, counts_all=counts_all)
