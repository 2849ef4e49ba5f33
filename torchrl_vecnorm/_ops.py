# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the operators are to torch.compile and to devices without a kernel of ours.

Their schemas, checks, gradients and CPU kernels are compiled (``csrc/ops.cpp``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchrl_vecnorm import oracle
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments

Tensors = Sequence[Tensor]


# ------------------------------------------------------------------ fake tensors


def _mutates(*args) -> None:
    """Outputs are allocated by the caller, so there is nothing to describe."""


for _name in ("update", "normalize", "denormalize", "merge"):
    torch.library.register_fake(f"torchrl_vecnorm::{_name}", _mutates)


# --------------------------------------------------- any other device: plain torch


def _states(
    sum: Tensors, ssq: Tensors, count: Tensors, nonfinite: Tensors
) -> list[Moments]:
    nonfinite = nonfinite or [torch.empty(0)] * len(sum)
    return [
        Moments(*leaves, f if f.numel() else None)
        for *leaves, f in zip(sum, ssq, count, nonfinite, strict=True)
    ]


def _store(states: list[Moments], new: list[Moments]) -> None:
    for old, now in zip(states, new, strict=True):
        for leaf, value in zip(old, now, strict=True):
            if leaf is not None:
                leaf.copy_(value)


def _update(
    x: Tensors,
    sum: Tensors,
    ssq: Tensors,
    count: Tensors,
    nonfinite: Tensors,
    y: Tensors,
    mask: Tensors,
    keep: float,
    weight: float,
    eps: float,
) -> None:
    _C.check_update(x, y, mask, sum, ssq, count, nonfinite)
    states = _states(sum, ssq, count, nonfinite)
    masks = [m if m.numel() else None for m in mask] or [None] * len(x)
    results = [
        oracle.update(value, state, keep=keep, weight=weight, eps=eps, mask=m)
        for value, state, m in zip(x, states, masks, strict=True)
    ]
    # Only now, so that an error in one key leaves all states as they were.
    _store(states, [state for _, state in results])
    for out, (value, _) in zip(y, results, strict=False):
        out.copy_(value)


def _normalize(
    x: Tensors,
    sum: Tensors,
    ssq: Tensors,
    count: Tensors,
    nonfinite: Tensors,
    y: Tensors,
    eps: float,
) -> None:
    _C.check_values(x, y, sum, ssq, count, nonfinite)
    for value, state, out in zip(
        x, _states(sum, ssq, count, nonfinite), y, strict=True
    ):
        out.copy_(oracle.normalize(value, state, eps))


def _denormalize(
    y: Tensors,
    sum: Tensors,
    ssq: Tensors,
    count: Tensors,
    nonfinite: Tensors,
    x: Tensors,
    eps: float,
) -> None:
    _C.check_floating_point(y)
    _C.check_values(y, x, sum, ssq, count, nonfinite)
    for value, state, out in zip(
        y, _states(sum, ssq, count, nonfinite), x, strict=True
    ):
        out.copy_(oracle.denormalize(value, state, eps))


def _merge(
    sum: Tensors,
    ssq: Tensors,
    count: Tensors,
    nonfinite: Tensors,
    other_sum: Tensors,
    other_ssq: Tensors,
    other_count: Tensors,
    other_nonfinite: Tensors,
    keep: float,
    weight: float,
) -> None:
    _C.check_merge(
        sum,
        ssq,
        count,
        nonfinite,
        other_sum,
        other_ssq,
        other_count,
        other_nonfinite,
    )
    states = _states(sum, ssq, count, nonfinite)
    others = _states(other_sum, other_ssq, other_count, other_nonfinite)
    new = [oracle.fold(s, o, keep, weight) for s, o in zip(states, others, strict=True)]
    _store(states, new)


_library = torch.library.Library("torchrl_vecnorm", "IMPL")
_library.impl("update", _update, "CompositeExplicitAutograd")
_library.impl("normalize", _normalize, "CompositeExplicitAutograd")
_library.impl("denormalize", _denormalize, "CompositeExplicitAutograd")
_library.impl("merge", _merge, "CompositeExplicitAutograd")


# ------------------------------------------- one call for eager and compiled code


def outputs_like(x: Tensors) -> list[Tensor]:
    """Uninitialised outputs: in the dtype of x, or the default dtype for integers."""
    default = torch.get_default_dtype()
    return [
        torch.empty_like(v, dtype=v.dtype if v.is_floating_point() else default)
        for v in x
    ]


def needs_plain_torch() -> bool:
    """Whether functorch or forward-mode derivatives look into the operators.

    They know plain torch only.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _normalize_plainly(
    x: list[Tensor], states: list[Moments], eps: float, out: list[Tensor] | None
) -> list[Tensor]:
    y = [oracle.normalize(v, s, eps) for v, s in zip(x, states, strict=True)]
    if out is None:
        return y
    for written, value in zip(out, y, strict=True):
        written.copy_(value)
    return out


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
    # Dynamo cannot trace pybind11; in eager mode it is the faster door.
    if torch.compiler.is_compiling():
        y = outputs_like(x) if out is None else out
        torch.ops.torchrl_vecnorm.update(
            x, sum, ssq, count, nonfinite, y, mask, keep, weight, eps
        )
        return y
    y = _C.update(x, sum, ssq, count, nonfinite, mask, keep, weight, eps, out)
    if y is not None:
        return y
    if out is not None:
        _C.check_update(x, out, mask, sum, ssq, count, nonfinite)
        for t in out:
            t.copy_(t)  # what torch refuses to write to, before the state changes
    plain = [v.detach() for v in x]
    torch.ops.torchrl_vecnorm.update(
        plain, sum, ssq, count, nonfinite, [], mask, keep, weight, eps
    )
    return _normalize_plainly(x, _states(sum, ssq, count, nonfinite), eps, out)


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
    if torch.compiler.is_compiling():
        y = outputs_like(x) if out is None else out
        torch.ops.torchrl_vecnorm.normalize(x, sum, ssq, count, nonfinite, y, eps)
        return y
    y = None
    if out is not None or not needs_plain_torch():
        y = _C.normalize(x, sum, ssq, count, nonfinite, eps, out)
    if y is not None:
        return y
    if out is not None:
        _C.check_values(x, out, sum, ssq, count, nonfinite)
    return _normalize_plainly(x, _states(sum, ssq, count, nonfinite), eps, out)
