# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Running statistics kept in the buffers of another library's module.

The buffers are the state, and nothing else is: what is loaded, broadcast between ranks or
written by hand into a buffer is what the next call goes on from. For a call the operators
are given moments made of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrl_vecnorm import _ops
from torchrl_vecnorm.rule import Rule
from torchrl_vecnorm.running_norm import keeping_dtypes


def moments_of(mean: Tensor, var: Tensor, count: Tensor) -> list[Tensor]:
    """Moments as the operators take them. They write to ``count`` and ``var`` in place.

    Args:
        mean: ``[*features]``, float64.
        var: ``[*features]``, float64.
        count: ``[]`` or ``[1]``, float64.
    """
    total = mean * count
    squares = torch.addcmul(var * count, mean, total)
    return [total, squares, count, count.new_empty(0), var]


def moments_at_one(mean: Tensor, var: Tensor) -> list[Tensor]:
    """The same for calls that only read: moments of one sample's weight."""
    one = torch.ones((), dtype=torch.float64, device=mean.device)
    return [mean, torch.addcmul(var, mean, mean), one, mean.new_empty(0), var]


def learn(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    rule: Rule,
    mask: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Takes x into mean, var and count, in place, and returns it normalised with them."""
    state = moments_of(mean, var, count)
    y = _ops.update([x], state, [] if mask is None else [mask], 1.0, weight, rule)[0]
    torch.div(state[0], count, out=mean)
    return y


def check_tensor(owner: str, name: str, x: Any) -> None:
    """Refuses what is no tensor, in a sentence."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{owner}: expected {name} as a torch.Tensor, got {type(x).__name__}"
        )


class Statistics(nn.Module):
    """Buffers that keep their dtypes, and load all or nothing.

    A subclass registers its buffers, and names those that it cannot do without.
    """

    _required = ("running_mean", "running_var", "count")

    # TorchScript leaves ignored methods to Python, bound to a module of its own class.

    @torch.jit.ignore
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, keeping_dtypes(fn), recurse)

    @torch.jit.ignore
    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        buffers = dict(self._buffers.items())
        required = getattr(self, "_required", Statistics._required)
        owner = getattr(self, "original_name", type(self).__name__)
        given = {
            name: state_dict[prefix + name]
            for name in buffers
            if prefix + name in state_dict
        }
        absent = [name for name in required if name not in given]
        wrong = [
            f"{owner}: entry {prefix + name!r}: {what}"
            for name, value in given.items()
            if (what := _wrong(name, value, buffers[name]))
        ]
        if absent or wrong:
            missing += [prefix + name for name in absent]
            errors += wrong
            if strict:
                known = {prefix + name for name in buffers}
                unexpected += [
                    name
                    for name in state_dict
                    if name.startswith(prefix) and name not in known
                ]
            return
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


def _wrong(name: str, value: Any, buffer: Tensor) -> str:
    """Why a buffer cannot be this, or nothing."""
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    shapes = {tuple(buffer.shape)}
    if buffer.ndim == 0:
        shapes.add((1,))
    if tuple(value.shape) not in shapes:
        return f"expected shape {tuple(buffer.shape)}, got {tuple(value.shape)}"
    if value.is_complex() or value.dtype is torch.bool:
        return f"expected real numbers, got {value.dtype}"
    good = value.isfinite()
    if "mean" in name:
        expected = "finite values"
    else:
        good = good & (value >= 0)
        expected = "values that are finite and not negative"
    if not good.all():
        return f"expected {expected}, got {value[~good].flatten()[0].item()}"
    return ""
