# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What stands for rl_games' normalisers, as of rl-games 1.6.5.

rl_games compiles them with ``torch.jit.script``: ``forward`` is in the part of Python that
TorchScript knows.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from rl_games.algos_torch import running_mean_std as theirs
from torch import Tensor, nn

from torchrl_vecnorm import _ops
from torchrl_vecnorm.interop._buffers import Statistics, check_tensor, learn
from torchrl_vecnorm.interop._replace import replace
from torchrl_vecnorm.rule import EPS_MODES, Rule

__all__ = ["RunningMeanStd", "RunningMeanStdObs", "install", "uninstall"]


class RunningMeanStd(Statistics):
    """For ``rl_games.algos_torch.running_mean_std.RunningMeanStd`` of rl-games 1.6.5.

    Args:
        insize: the shape of a sample.
        epsilon: is added to the variance.
        per_channel: statistics of the first dimension of ``insize`` alone, ``(C,)``,
            ``(C, L)`` or ``(C, H, W)``.
        norm_only: values are divided by the deviation; the mean stays, and no clip.

    Its buffers are ``running_mean`` and ``running_var`` (``insize``, or ``[C]``) and
    ``count`` (``[]``), all float64; before any data they stand for one sample of mean 0 and
    variance 1. Checkpoints are those of rl_games, in both directions.

    What differs: ``denorm`` never learns, and undoes what ``norm_only`` did; with a mask,
    each feature has the mean and the variance of the samples that the mask leaves, and
    these alone count; NaN and infinite values count as values at the running mean; buffers
    are written in place, and stay float64 under ``.half()``; statistics are constants to
    autograd; nothing is printed.
    """

    _required = ("running_mean", "running_var", "count")

    def __init__(
        self,
        insize: Sequence[int],
        epsilon: float = 1e-05,
        per_channel: bool = False,
        norm_only: bool = False,
    ) -> None:
        super().__init__()
        _ops.check_numbers(rule=Rule(epsilon))
        self.insize = insize
        self.epsilon = float(epsilon)
        self.norm_only = norm_only
        self.per_channel = per_channel
        if per_channel and not 1 <= len(insize) <= 3:
            raise ValueError(
                "expected insize as (C,), (C, L) or (C, H, W) with per_channel, got "
                f"{insize!r}"
            )
        # A batch has the weight of its rows, however many values of a channel a row has.
        self.weight = 1.0 / math.prod(insize[1:]) if per_channel else 1.0
        self.channel_last = per_channel and len(insize) > 1
        size = insize[0] if per_channel else insize
        self.register_buffer("running_mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.ones((), dtype=torch.float64))

    def forward(
        self, input: Tensor, denorm: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Normalises, and in training mode takes the input in first.

        Args:
            input: ``[*samples, *insize]``.
            denorm: undoes it instead.
            mask: one element a sample, 0 where it does not count.
        """
        if not torch.jit.is_scripting():
            check_tensor("RunningMeanStd", "input", input)
        x = input.movedim(1, -1) if self.channel_last else input
        clip: float | None = None if self.norm_only else 5.0
        center = not self.norm_only
        if denorm:
            (y,) = torch.ops.torchrl_vecnorm.denormalize(
                [x], self._read(), self.epsilon, 2, clip, center
            )
        elif self.training:
            y = _learn(
                x,
                self.running_mean,
                self.running_var,
                self.count,
                mask,
                self.weight,
                self.epsilon,
                clip,
                center,
            )
        else:
            (y,) = torch.ops.torchrl_vecnorm.normalize(
                [x], self._read(), self.epsilon, 2, clip, center
            )
        return y.movedim(-1, 1) if self.channel_last else y

    def _read(self) -> list[Tensor]:
        mean, var = self.running_mean, self.running_var
        one = torch.ones((), dtype=torch.float64, device=mean.device)
        return [mean, torch.addcmul(var, mean, mean), one, mean.new_empty(0), var]


# TorchScript takes operators that write to elements of a list for ones without an effect,
# and leaves them out. Python is called as it is.
@torch.jit.ignore
def _learn(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    mask: Tensor | None,
    weight: float,
    eps: float,
    clip: float | None,
    center: bool,
) -> Tensor:
    mask = None if mask is None else mask != 0
    return learn(x, mean, var, count, Rule(eps, 2, clip, center), mask, weight)


class RunningMeanStdObs(nn.Module):
    """For ``rl_games.algos_torch.running_mean_std.RunningMeanStdObs`` of rl-games 1.6.5.

    Args:
        insize: the shape of a sample for each name.
        epsilon: as in :class:`RunningMeanStd`, as are the others.
        per_channel: statistics of channels.
        norm_only: no mean and no clip.

    What differs is what differs there, and that ``torch.jit.script`` takes it.
    """

    def __init__(
        self,
        insize: Mapping[str, Sequence[int]],
        epsilon: float = 1e-05,
        per_channel: bool = False,
        norm_only: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(insize, Mapping):
            raise TypeError(
                "RunningMeanStdObs: expected insize as a mapping of names to shapes, got "
                f"{type(insize).__name__}"
            )
        self.running_mean_std = nn.ModuleDict(
            {
                name: RunningMeanStd(size, epsilon, per_channel, norm_only)
                for name, size in insize.items()
            }
        )

    def forward(
        self,
        input: dict[str, Tensor],
        denorm: bool = False,
    ) -> dict[str, Tensor]:
        """Normalises each entry by its own statistics; see :class:`RunningMeanStd`."""
        result: dict[str, Tensor] = {}
        for name, norm in self.running_mean_std.items():
            if name in input:
                result[name] = norm(input[name], denorm)
        if len(result) != len(input):
            raise KeyError(
                f"RunningMeanStdObs: expected names of {list(self.running_mean_std.keys())}, "
                f"got {list(input.keys())}"
            )
        return result


assert EPS_MODES[2] == "var_add"  # TorchScript takes no tuple of this module

_CLASSES = {
    theirs.RunningMeanStd: RunningMeanStd,
    theirs.RunningMeanStdObs: RunningMeanStdObs,
}


def install() -> None:
    """Models that rl_games constructs from now on have the normalisers of this module."""
    replace("rl_games", _CLASSES)


def uninstall() -> None:
    """Models that rl_games constructs from now on have its own normalisers."""
    replace("rl_games", {ours: own for own, ours in _CLASSES.items()})
