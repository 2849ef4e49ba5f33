# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What :mod:`~torchrl_vecnorm._ops` is to the other operators, of ``scale_returns``.

Its schema, checks and CPU kernel are compiled (``csrc/torch/returns.cpp``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_vecnorm import _ops, oracle
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.rule import Rule, RuleArgs

#: When an episode's end clears a return.
CLEARS = ("after", "before")

_operators = torch.ops.torchrl_vecnorm

torch.library.register_fake("torchrl_vecnorm::scale_returns", _ops.updates)


def check_gamma(gamma: float) -> None:
    """Refuses what the operator refuses, where plain torch runs in its place."""
    if torch.compiler.is_compiling() and _ops.change(gamma):
        number = torch.zeros((), dtype=torch.float64) + gamma
        good = (number >= 0) & (number <= 1)
        torch._assert_async(good, "expected gamma in [0, 1]")
    elif not 0 <= gamma <= 1:
        raise ValueError(f"expected gamma in [0, 1], got {gamma}")


def _step(
    x: _ops.Tensors,
    done: _ops.Tensors,
    returns: _ops.Tensors,
    state: _ops.Tensors,
    mask: _ops.Tensors,
    gamma: float,
    clears_before: bool,
    keep: float,
    rule: Rule,
) -> list[Tensor]:
    """All keys in plain torch; nothing is written before all have been computed."""
    states = _ops.states_of(state)
    masks = _ops.masks_of(mask, x)
    results = [
        oracle.scale_returns(
            *key[:4],
            gamma=gamma,
            clears_before=clears_before,
            keep=keep,
            rule=rule,
            mask=key[4],
        )
        for key in zip(x, done, returns, states, masks, strict=True)
    ]
    _ops.store(states, [moments for _, _, moments in results])
    for old, (_, left, _) in zip(returns, results, strict=True):
        old.copy_(left)
    return [y for y, _, _ in results]


def _scale_returns(
    x: _ops.Tensors,
    done: _ops.Tensors,
    returns: _ops.Tensors,
    state: _ops.Tensors,
    y: _ops.Tensors,
    mask: _ops.Tensors,
    gamma: float,
    clears_before: bool,
    keep: float,
    *rule,
) -> None:
    how = Rule(*rule, center=False)
    _ops.check_numbers(keep, rule=how)
    _C.check_returns(x, done, returns, state, y, mask, gamma, keep)
    scaled = _step(x, done, returns, state, mask, gamma, clears_before, keep, how)
    for out, value in zip(y, scaled, strict=False):
        out.copy_(value)


#: scale_returns() of one key without lists, where no graph is made; None as that of _C.
scale_returns_of_one = _C.scale_returns_of_one

_ops.library.impl("scale_returns", _scale_returns, "CompositeExplicitAutograd")


def scale_returns(
    x: list[Tensor],
    done: list[Tensor],
    returns: list[Tensor],
    state: list[Tensor],
    mask: list[Tensor],
    gamma: float,
    clears_before: bool,
    keep: float,
    rule: RuleArgs,
) -> list[Tensor]:
    """The returns go on by a step, the state takes them in, and x is scaled by it."""
    if not torch.compiler.is_compiling():
        y = _C.scale_returns(
            x, done, returns, state, mask, gamma, clears_before, keep, rule
        )
        if y is not None:
            return y
    how = gamma, clears_before, keep
    plain = [v.detach() for v in x]
    if torch.compiler.is_compiling():
        if _ops.change(gamma, keep) or _ops.rule_changes(rule):
            check_gamma(gamma)
            _ops.check_numbers(keep, rule=rule)
            _step(plain, done, returns, state, mask, *how, Rule(*rule))
            return _ops.normalize(x, state, rule)
        if not _ops.needs_plain_torch():
            y = _ops.outputs_like(x)
            _operators.scale_returns(x, done, returns, state, y, mask, *how, *rule[:3])
            return y
    _operators.scale_returns(plain, done, returns, state, [], mask, *how, *rule[:3])
    return _ops.normalize(x, state, rule)
