# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the operators are to torch.compile and to devices without a kernel of ours.

Their schemas, checks, gradients and CPU kernels are compiled (``csrc/torch/ops.cpp``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.traceback import get_current_meta

from torchrl_vecnorm import oracle
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.moments import Moments, state_dtype
from torchrl_vecnorm.rule import EPS_MODES, Rule, RuleArgs

Tensors = Sequence[Tensor]
_operators = torch.ops.torchrl_vecnorm


# ------------------------------------------------------------------ fake tensors


def _mutates(*args) -> None:
    """Outputs are allocated by the caller, so there is nothing to describe."""


def updates(*args) -> None:
    """As :func:`_mutates`, for what takes a batch into the statistics."""
    # A graph would fold the batch in again, into statistics that have it already. In
    # eager mode the kernels say so.
    if "recompute" in get_current_meta():
        raise RuntimeError(
            "torchrl_vecnorm: expected updates of the statistics in forward passes only, "
            "got one in a function that torch.utils.checkpoint runs again: normalise "
            "before it, or freeze the statistics in it"
        )


torch.library.register_fake("torchrl_vecnorm::update", updates)
torch.library.register_fake("torchrl_vecnorm::merge", updates)
torch.library.register_fake("torchrl_vecnorm::normalize_out", _mutates)


def outputs_like(x: Tensors) -> list[Tensor]:
    """Uninitialised outputs: in the dtype of x, or the default dtype for integers."""
    default = torch.get_default_dtype()
    return [
        torch.empty_like(v, dtype=v.dtype if v.is_floating_point() else default)
        for v in x
    ]


@torch.library.register_fake("torchrl_vecnorm::normalize")
def _(x: Tensors, state: Tensors, eps: float, *rule) -> list[Tensor]:
    return outputs_like(x)


@torch.library.register_fake("torchrl_vecnorm::denormalize")
def _(y: Tensors, state: Tensors, eps: float, *rule) -> list[Tensor]:
    return outputs_like(y)


@torch.library.register_fake("torchrl_vecnorm::moments")
def _(x: Tensors, feature_ndim: int, mask: Tensors) -> list[Tensor]:
    leaves = []
    for v in x:
        features = v.shape[v.ndim - feature_ndim :]
        shapes = (features, features, (1,), (2, *features), features)
        leaves += [v.new_empty(shape, dtype=state_dtype(v.device)) for shape in shapes]
    return leaves


# ------------------------------------------------------------------------ torch.vmap


@torch.library.register_vmap("torchrl_vecnorm::update")
def _(
    info, in_dims: tuple, x: Tensors, state: Tensors, y: Tensors, mask: Tensors, *how
):
    """As many keys as there are elements, in one call: networks that are stacked."""
    n = len(Moments._fields)
    for i, (leaf, dim) in enumerate(zip(state, in_dims[1], strict=True)):
        if dim is None and leaf.numel():
            raise ValueError(
                f"torchrl_vecnorm: key {i // n}: expected statistics for each of the "
                f"{info.batch_size} elements of torch.vmap, got one {Moments._fields[i % n]} "
                "for all"
            )
    elements: list[list[Tensor]] = []
    for tensors, dims in zip((x, state, y, mask), in_dims, strict=False):
        pairs = list(zip(tensors, dims, strict=True))
        elements.append(
            [
                t if dim is None else t.select(dim, b)
                for b in range(info.batch_size)
                for t, dim in pairs
            ]
        )
    _operators.update(*elements, *how)
    return None, None


# --------------------------------------------------- any other device: plain torch


def states_of(leaves: Tensors) -> list[Moments]:
    """The inverse of :func:`torchrl_vecnorm.functional.leaves_of`."""
    n = len(Moments._fields)
    return [
        Moments(
            *leaves[i : i + 3],
            *(v if v.numel() else None for v in leaves[i + 3 : i + n]),
        )
        for i in range(0, len(leaves), n)
    ]


def store(states: list[Moments], new: list[Moments]) -> None:
    """Writes new moments to states."""
    for old, now in zip(states, new, strict=True):
        for leaf, value in zip(old, now, strict=True):
            if leaf is not None:
                # A graph of torch 2.13 loses what it writes to a float64 tensor without
                # dimensions, but not what it writes to a view of it.
                leaf.unsqueeze(0).copy_(value.unsqueeze(0))


def masks_of(mask: Tensors, x: Tensors) -> list[Tensor | None]:
    """The inverse of :func:`torchrl_vecnorm.functional.masks_of`."""
    return [m if m.numel() else None for m in mask] or [None] * len(x)


def _update(
    x: Tensors,
    state: Tensors,
    y: Tensors,
    mask: Tensors,
    keep: float,
    weight: float,
    *rule,
) -> None:
    how = Rule(*rule)
    check_numbers(keep, weight, how)
    _C.check_update(x, y, mask, state, keep, weight)
    states = states_of(state)
    results = [
        oracle.update(value, moments, keep=keep, weight=weight, eps=how, mask=m)
        for value, moments, m in zip(x, states, masks_of(mask, x), strict=True)
    ]
    # Only now, so that an error in one key leaves all states as they were.
    store(states, [moments for _, moments in results])
    for out, (value, _) in zip(y, results, strict=False):
        out.copy_(value)


def _normalize(x: Tensors, state: Tensors, *rule) -> list[Tensor]:
    how = Rule(*rule)
    check_numbers(rule=how)
    _C.check_values(x, [], state)
    return [
        oracle.normalize(v, s, how) for v, s in zip(x, states_of(state), strict=True)
    ]


def _normalize_out(x: Tensors, state: Tensors, y: Tensors, *rule) -> None:
    _C.check_values(x, y, state)
    for out, value in zip(y, _normalize(x, state, *rule), strict=True):
        out.copy_(value)


def _denormalize(y: Tensors, state: Tensors, *rule) -> list[Tensor]:
    how = Rule(*rule)
    check_numbers(rule=how)
    _C.check_floating_point(y)
    _C.check_values(y, [], state)
    return [
        oracle.denormalize(v, s, how) for v, s in zip(y, states_of(state), strict=True)
    ]


def _moments(x: Tensors, feature_ndim: int, mask: Tensors) -> list[Tensor]:
    leaves: list[Tensor] = []
    for v, m in zip(x, masks_of(mask, x), strict=True):
        if m is not None:
            _C.check_mask(m, v, feature_ndim)
        leaves += oracle.batch_moments(v, feature_ndim, m)
    return leaves


def _merge(state: Tensors, other: Tensors, keep: float, weight: float) -> None:
    _C.check_merge(state, other, keep, weight)
    states = states_of(state)
    new = [
        oracle.fold(s, o, keep, weight)
        for s, o in zip(states, states_of(other), strict=True)
    ]
    store(states, new)


library = torch.library.Library("torchrl_vecnorm", "IMPL")
for _name, _function in (
    ("update", _update),
    ("normalize", _normalize),
    ("normalize_out", _normalize_out),
    ("denormalize", _denormalize),
    ("moments", _moments),
    ("merge", _merge),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")


# ------------------------------------------- one call for eager and compiled code


def needs_plain_torch() -> bool:
    """Whether functorch or forward-mode derivatives look into the operators.

    They know plain torch only.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


# Dynamo asks this as it traces, within the transforms that it traces. The decorator,
# torch.compiler.assume_constant_result, imports all of Dynamo: as long as torch again.
needs_plain_torch._dynamo_marked_constant = True


def not_in_graphs(reason: str) -> Callable[[Callable], Callable]:
    """A decorator of functions that torch.compile leaves alone, and of what it says then."""
    try:
        return torch.compiler.disable(reason=reason)
    except TypeError:  # torch 2.7 has words of its own
        return torch.compiler.disable


def change(*numbers: float | None) -> bool:
    """Whether numbers are a compiled graph's inputs: operators take constants."""
    # Of what traces, which has imported it; torch 2.7 has no such function, and makes
    # them constants as it calls an operator.
    symbols = torch.fx.experimental.symbolic_shapes
    if not hasattr(symbols, "has_static_value"):
        return False
    return not all(n is None or symbols.has_static_value(n) for n in numbers)


def rule_changes(rule: RuleArgs) -> bool:
    """The same of a rule's numbers."""
    return change(rule[0], rule[2])


_ANY = Rule(1.0)


# Dynamo of torch 2.7 cannot look it up.
_MOST = sys.float_info.max


def check_numbers(
    keep: float = 1.0, weight: float = 1.0, rule: RuleArgs = _ANY
) -> None:
    """Refuses what the operators refuse, where plain torch runs in their place."""
    eps, eps_mode, clip, _ = Rule(*rule)
    if not 0 <= eps_mode < len(EPS_MODES):
        raise ValueError(f"expected eps_mode in 0 … 3, got {eps_mode}")
    for name, value, most, expected in (
        ("decay", keep, 1.0, "in (0, 1]"),
        ("weight", weight, _MOST, "positive and finite"),
        ("eps", eps, _MOST, "positive and finite"),
        ("clip", clip, _MOST, "positive and finite, or none"),
    ):
        if value is None:
            continue
        if torch.compiler.is_compiling() and change(value):
            # An input of the graph: asked each time that it runs, on the CPU.
            number = torch.zeros((), dtype=torch.float64) + value
            good = (number > 0) & (number <= most)
            torch._assert_async(good, f"expected {name} {expected}")
        elif not 0 < value <= most:
            raise ValueError(f"expected {name} {expected}, got {value}")


def _write(out: list[Tensor] | None, values: list[Tensor]) -> list[Tensor]:
    if out is None:
        return values
    for written, value in zip(out, values, strict=True):
        written.copy_(value)
    return out


def _normalize_plainly(
    x: list[Tensor], state: list[Tensor], rule: RuleArgs, out: list[Tensor] | None
) -> list[Tensor]:
    check_numbers(rule=rule)
    pairs = zip(x, states_of(state), strict=True)
    return _write(out, [oracle.normalize(v, s, rule) for v, s in pairs])


def _update_plainly(
    x: list[Tensor],
    state: list[Tensor],
    mask: list[Tensor],
    keep: float,
    weight: float,
    rule: RuleArgs,
    out: list[Tensor] | None,
) -> list[Tensor]:
    check_numbers(keep, weight, rule)
    states = states_of(state)
    batch = [
        oracle.batch_moments(v.detach(), s.sum.ndim, m)
        for v, s, m in zip(x, states, masks_of(mask, x), strict=True)
    ]
    new = [oracle.fold(s, b, keep, weight) for s, b in zip(states, batch, strict=True)]
    store(states, new)
    pairs = zip(x, new, strict=True)
    return _write(out, [oracle.normalize(v, s, rule) for v, s in pairs])


def update(
    x: list[Tensor],
    state: list[Tensor],
    mask: list[Tensor],
    keep: float,
    weight: float,
    rule: RuleArgs,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Folds x into the state and returns it normalised with the result."""
    # Dynamo cannot trace pybind11; in eager mode it is the faster door.
    if torch.compiler.is_compiling():
        if change(keep, weight) or rule_changes(rule):
            return _update_plainly(x, state, mask, keep, weight, rule, out)
        if not needs_plain_torch():
            y = outputs_like(x) if out is None else out
            _operators.update(x, state, y, mask, keep, weight, *rule)
            return y
    else:
        y = _C.update(x, state, mask, keep, weight, out, rule)
        if y is not None:
            return y
        check_numbers(keep, weight, rule)
        if out is not None:
            _C.check_update(x, out, mask, state, keep, weight)
    if out is not None:
        for t in out:
            t.copy_(t)  # what torch refuses to write to, before the state changes
    plain = [v.detach() for v in x]
    _operators.update(plain, state, [], mask, keep, weight, *rule)
    return _normalize_plainly(x, state, rule, out)


def fold(
    x: list[Tensor],
    state: list[Tensor],
    mask: list[Tensor],
    keep: float,
    weight: float,
) -> None:
    """Folds x into the state."""
    # With no outputs, the faster door too; it leaves to the operator what it cannot see.
    if not torch.compiler.is_compiling() and (
        _C.update(x, state, mask, keep, weight, [], _ANY) is not None
    ):
        return
    x = [v.detach() for v in x]
    if torch.compiler.is_compiling() and change(keep, weight):
        _update_plainly(x, state, mask, keep, weight, _ANY, None)
    else:
        _operators.update(x, state, [], mask, keep, weight, 1.0)


def normalize(
    x: list[Tensor],
    state: list[Tensor],
    rule: RuleArgs,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Returns x normalised with the state as it is."""
    if torch.compiler.is_compiling():
        if needs_plain_torch() or rule_changes(rule):
            return _normalize_plainly(x, state, rule, out)
        if out is None:
            return _operators.normalize(x, state, *rule)
        _operators.normalize_out(x, state, out, *rule)
        return out
    y = None
    if out is not None or not needs_plain_torch():
        y = _C.normalize(x, state, out, rule)
    if y is not None:
        return y
    if out is not None:
        _C.check_values(x, out, state)
    return _normalize_plainly(x, state, rule, out)


def denormalize(y: list[Tensor], state: list[Tensor], rule: RuleArgs) -> list[Tensor]:
    """The inverse of :func:`normalize`."""
    if needs_plain_torch() or (torch.compiler.is_compiling() and rule_changes(rule)):
        check_numbers(rule=rule)
        pairs = zip(y, states_of(state), strict=True)
        return [oracle.denormalize(v, s, rule) for v, s in pairs]
    return _operators.denormalize(y, state, *rule)


def moments(x: list[Tensor], feature_ndim: int, mask: list[Tensor]) -> list[Moments]:
    """The moments of a batch."""
    if not torch.compiler.is_compiling():
        leaves = _C.moments(x, feature_ndim, mask)
        if leaves is not None:
            return states_of(leaves)
    x = [v.detach() for v in x]
    if needs_plain_torch():
        masks = masks_of(mask, x)
        pairs = zip(x, masks, strict=True)
        return [oracle.batch_moments(v, feature_ndim, m) for v, m in pairs]
    return states_of(_operators.moments(x, feature_ndim, mask))


def merge(state: list[Tensor], other: list[Tensor], keep: float, weight: float) -> None:
    """Folds moments into a state."""
    if not torch.compiler.is_compiling():
        _C.merge(state, other, keep, weight)
        return
    if change(keep, weight):
        check_numbers(keep, weight)
        states = states_of(state)
        pairs = zip(states, states_of(other), strict=True)
        store(states, [oracle.fold(s, o, keep, weight) for s, o in pairs])
        return
    _operators.merge(state, other, keep, weight)
