# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What stands for rsl_rl's normalisers, as of rsl-rl-lib 5.5.1; 5.4.2 takes them too."""

from __future__ import annotations

import torch
from rsl_rl import modules as theirs
from torch import Tensor, nn

from torchrl_vecnorm import _ops
from torchrl_vecnorm.interop._buffers import (
    Statistics,
    check_tensor,
    moments_of,
)
from torchrl_vecnorm.interop._replace import replace
from torchrl_vecnorm.rule import EPS_MODES, Rule

__all__ = [
    "EmpiricalDiscountedVariationNormalization",
    "EmpiricalNormalization",
    "install",
    "uninstall",
]


class EmpiricalNormalization(Statistics):
    """For ``rsl_rl.modules.EmpiricalNormalization`` of rsl-rl-lib 5.5.1.

    Args:
        shape: of a sample.
        eps: is added to the standard deviation.
        until: no update begins with that many samples or more.

    Its buffers are ``_mean``, ``_var`` and ``_std`` (``[1, *shape]``, float32) and ``count``
    (``[]``, int64). Checkpoints are those of rsl_rl, in both directions, and so are
    ``torch.jit.script`` and the ONNX export of a policy with one inside.

    Where ``torch.distributed`` is initialised, ``update`` joins the batches of all ranks,
    in one collective.

    What differs: NaN and infinite values count as values at the running mean; a batch of no
    samples changes nothing; ``until`` is decided on the device; what is normalised is
    ``sqrt(_var)``, also where ``_std`` was not loaded; buffers are written in place, and
    keep their dtypes; statistics are constants to autograd.
    """

    _required = ("_mean", "_var", "count")
    # For torch.jit.script, which knows `forward` alone.
    __jit_unused_properties__ = ["mean", "std", "_buffers"]  # noqa: RUF012
    __jit_ignored_attributes__ = ["_state", "_known"]  # noqa: RUF012

    def __init__(
        self,
        shape: int | tuple[int, ...] | list[int],
        eps: float = 1e-2,
        until: int | None = None,
    ) -> None:
        super().__init__()
        _ops.check_numbers(rule=Rule(eps))
        self.eps = eps
        self.until = until
        self._state: list[Tensor] | None = None
        self._known: tuple = ()
        self.register_buffer("_mean", torch.zeros(shape).unsqueeze(0))
        self.register_buffer("_var", torch.ones(shape).unsqueeze(0))
        self.register_buffer("_std", torch.ones(shape).unsqueeze(0))
        self.register_buffer("count", torch.tensor(0, dtype=torch.long))

    @property
    def mean(self) -> Tensor:
        """The running mean, ``shape``."""
        return self._mean.squeeze(0).clone()

    @property
    def std(self) -> Tensor:
        """The running standard deviation, ``shape``."""
        return self._std.squeeze(0).clone()

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x, ``[*samples, *shape]``, with the statistics as they are."""
        if torch.jit.is_scripting():
            return (x - self._mean) / (self._std + self.eps)
        return self._map(x, inverse=False)

    @torch.jit.unused
    def update(self, x: Tensor) -> None:
        """Takes x, ``[*samples, *shape]``, into the statistics, in training mode."""
        if not self.training:
            return
        check_tensor("EmpiricalNormalization", "x", x)
        state = self._moments()
        total, _, count, _, var = state
        buffers = self.__dict__["_buffers"]
        mask = []
        if self.until is not None:  # all samples or none of them
            samples = x.shape[: max(x.ndim - total.ndim, 0)]
            mask = [(buffers["count"] < self.until).expand(samples)]
        if torch.distributed.is_initialized():
            _ops.merge(state, _of_all_ranks(x, mask, total / count), 1.0, 1.0)
        else:
            _ops.fold([x], state, mask, 1.0, 1.0)
        # They have an axis in front.
        buffers["_mean"].copy_(total / count)
        buffers["_var"].copy_(var)
        buffers["_std"].copy_(var.sqrt())
        buffers["count"].copy_(count)
        if torch.compiler.is_compiling():
            self._state = None
        else:
            self._known = _identity(buffers)

    @torch.jit.unused
    def inverse(self, y: Tensor) -> Tensor:
        """``y * (std + eps) + mean``."""
        return self._map(y, inverse=True)

    @torch.jit.unused
    def _map(self, x: Tensor, inverse: bool) -> Tensor:
        check_tensor("EmpiricalNormalization", "y" if inverse else "x", x)
        # Exports know torch's operators alone.
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            mean, scale = self._mean, self._std + self.eps
            return x * scale + mean if inverse else (x - mean) / scale
        call = _ops.denormalize if inverse else _ops.normalize
        state = self._moments()
        (y,) = call([x], state, Rule(self.eps, _STD_ADD))
        return y if y.ndim > state[0].ndim else y.unsqueeze(0)

    # The operators want moments in float64, and a policy is called far more often than it
    # learns: those of the last call are kept while the buffers are what they were then.
    # Collectives write to a buffer without its version changing, so that whoever takes
    # hold of buffers ends that too.

    def _moments(self) -> list[Tensor]:
        buffers = self.__dict__["_buffers"]
        if torch.compiler.is_compiling():
            return _moments_of(buffers)
        known = _identity(buffers)
        if self._state is None or not known or known != self._known:
            # A rollout is in inference mode, and what is made there is for there only.
            with torch.inference_mode(False), torch.no_grad():
                self._state = _moments_of(buffers)
            self._known = known
        return self._state

    @property
    def _buffers(self) -> dict[str, Tensor]:
        self.__dict__["_state"] = None
        return self.__dict__["_buffers"]

    @_buffers.setter
    def _buffers(self, value: dict[str, Tensor]) -> None:
        self.__dict__["_buffers"] = value

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_state": None}

    def __getattr__(self, name: str):
        self.__dict__["_state"] = None
        return super().__getattr__(name)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What normalises is the variance: a deviation beside it is its root, loaded or not.
        if isinstance(var := state_dict.get(prefix + "_var"), Tensor):
            state_dict = {**state_dict, prefix + "_std": var.clamp_min(0).sqrt()}
        super()._load_from_state_dict(state_dict, prefix, *args)


class EmpiricalDiscountedVariationNormalization(nn.Module):
    """For ``rsl_rl.modules.EmpiricalDiscountedVariationNormalization`` of rsl-rl-lib 5.5.1.

    Args:
        shape: of a reward, mostly ``[]``.
        eps: of the statistics; rewards are divided by their deviation alone.
        gamma: the discount of the sums whose deviation it is.
        until: as in :class:`EmpiricalNormalization`, which is ``emp_norm`` here.

    What differs is what differs there; and the choice between the reward and the reward over
    the deviation, which is 0 while all sums were alike, is made for each element on the
    device; and the first reward is copied, so that it may be written to later.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...] | list[int],
        eps: float = 1e-2,
        gamma: float = 0.99,
        until: int | None = None,
    ) -> None:
        super().__init__()
        self.emp_norm = EmpiricalNormalization(shape, eps, until)
        self.disc_avg = _DiscountedAverage(gamma)

    def forward(self, rew: Tensor) -> Tensor:
        """Divides rewards, ``[*samples, *shape]``, by the deviation of discounted sums."""
        check_tensor("EmpiricalDiscountedVariationNormalization", "rew", rew)
        if self.training:
            self.emp_norm.update(self.disc_avg.update(rew))
        std = self.emp_norm.__dict__["_buffers"]["_std"]
        return rew / torch.where(std > 0, std, 1.0)


class _DiscountedAverage:
    """``avg <- gamma * avg + reward``."""

    def __init__(self, gamma: float) -> None:
        self.avg: Tensor | None = None
        self.gamma = gamma

    def update(self, rew: Tensor) -> Tensor:
        """The sums with another reward."""
        self.avg = rew.clone() if self.avg is None else self.avg * self.gamma + rew
        return self.avg


def _moments_of(buffers: dict[str, Tensor]) -> list[Tensor]:
    names = ("_mean", "_var", "count")
    mean, var, count = (buffers[name].to(torch.float64, copy=True) for name in names)
    mean, var = mean.squeeze(0), var.squeeze(0)
    # Before any data the mean and the variance in the buffers are what normalises: those
    # of samples whose weight no other sample's can be told from.
    return moments_of(mean, var, count.clamp_min(1e-200))


def _identity(buffers: dict[str, Tensor]) -> tuple:
    """Buffers and their versions; nothing where torch does not keep versions."""
    mean, var, count = buffers["_mean"], buffers["_var"], buffers["count"]
    if mean.is_inference() or var.is_inference() or count.is_inference():
        return ()
    return id(mean), mean._version, id(var), var._version, id(count), count._version


def _of_all_ranks(x: Tensor, mask: list[Tensor], at: Tensor) -> list[Tensor]:
    """The moments of what all ranks have, by one collective of float64.

    They are summed around the running mean, which all ranks share, so that digits are not
    lost far from zero. Values that are not finite are at it.
    """
    batch = _ops.moments([x], at.ndim, mask)[0]
    used = batch.used()
    mean, var = batch.mean_var()
    apart = torch.where(used > 0, mean - at, 0.0)
    flat = torch.cat(
        [batch.count, *((used * v).flatten() for v in (apart, var + apart * apart))]
    )
    torch.distributed.all_reduce(flat)
    count, apart, squares = flat[:1], *(v.view_as(at) for v in flat[1:].chunk(2))
    n = count.clamp_min(1)
    mean, var = at + apart / n, (squares / n - (apart / n) ** 2).clamp_min(0)
    return moments_of(mean, var, count)


_STD_ADD = EPS_MODES.index("std_add")
_CLASSES = {
    theirs.EmpiricalNormalization: EmpiricalNormalization,
    theirs.EmpiricalDiscountedVariationNormalization: (
        EmpiricalDiscountedVariationNormalization
    ),
}


def install() -> None:
    """Models that rsl_rl constructs from now on have the normalisers of this module."""
    replace("rsl_rl", _CLASSES)


def uninstall() -> None:
    """Models that rsl_rl constructs from now on have its own normalisers."""
    replace("rsl_rl", {ours: own for own, ours in _CLASSES.items()})
