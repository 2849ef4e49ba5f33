# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The running normaliser as a module, for whoever trains on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchrl_vecnorm import _ops, functional, oracle
from torchrl_vecnorm._load import _C
from torchrl_vecnorm.checks import check_moments
from torchrl_vecnorm.export import Normalizer, fold_into
from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.ranks import Key as RankKey
from torchrl_vecnorm.ranks import Ranks, plainly
from torchrl_vecnorm.rule import EPS_MODES, EpsMode
from torchrl_vecnorm.syncing import Part, Since, synced

__all__ = ["RunningNorm", "keep_from_ddp"]

Shape: TypeAlias = "int | Sequence[int] | Mapping[str, Shape]"
Values: TypeAlias = "Tensor | Mapping[str, Values]"


def keeping_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``nn.Module._apply`` does to statistics.

    They move, but stay what they are under ``.half()`` and ``.to(dtype)``.
    """

    def move(leaf: Tensor) -> Tensor:
        moved = fn(leaf)
        return moved if moved.dtype == leaf.dtype else leaf.to(moved.device)

    return move


class _Key(nn.Module):
    """The statistics of one tensor: the leaves of :class:`~torchrl_vecnorm.Moments`."""

    is_of_a_rank = True

    def __init__(self, shape, dtype, device) -> None:
        super().__init__()
        zeros = Moments.zeros(shape, dtype=dtype, device=device, counts_all=True)
        for name, leaf in zeros._asdict().items():
            self.register_buffer(name, leaf)
        #: What it was when several had the same, see `RunningNorm.sync_`.
        self.since: Since | None = None

    def moments(self) -> Moments:
        return Moments(*self._buffers.values())

    def _load_from_state_dict(self, *args) -> None:
        """All statistics of a module are loaded, or none: it sees to that."""

    def _apply(self, fn, recurse=True):
        return super()._apply(keeping_dtypes(fn), recurse)


class RunningNorm(nn.Module):
    """Normalises tensors by running statistics, which it updates in training mode.

    Args:
        shape: the shape of a sample: an int, a sequence of them, or a (nested) mapping of
            names to shapes. Whatever comes before it in an input is samples.
        decay: what the old moments are multiplied by, once an update. 1 never forgets.
        eps: bounds the scale away from 0, in the units of the input (of its square in
            the modes that begin with ``"var"``).
        eps_mode: where eps stands: ``"std_floor"`` is ``max(std, eps)``, ``"std_add"`` is
            ``std + eps``, ``"var_add"`` is ``sqrt(var + eps)`` and ``"var_floor"`` is
            ``sqrt(max(var, eps))``.
        clip: outputs are within ``[-clip, clip]``; their gradient is 0 outside.
        center: whether the mean is taken away. Without it ``x / scale``, as rewards want.
        until: how many samples to learn from; the statistics stay as they are after
            exactly that many. It is decided on the device: no read waits for it.
        dtype: of the statistics: float64, or float32.
        device: of the statistics.
        group: ranks of ``torch.distributed`` whose batches are joined at every call: a
            process group, a ``DeviceMesh`` of one dimension, or ``"world"``, which is the
            default group. All of them have to make the same calls, in one order; a batch
            may be empty. The statistics are then those of one process that has the joined
            batch, and the same bits on every rank. Without ``until``.

    The statistics are buffers, ``stats.…`` in a ``state_dict()``: float64 whatever the
    module's own dtype becomes, moved with it, copied by ``copy.deepcopy``. All tensors of
    a mapping go in one call of a compiled operator. Works in ``torch.compile`` without a
    graph break, and in CUDA graphs.

        >>> norm = RunningNorm(3, clip=10.0)
        >>> y = norm(torch.randn(128, 3))  # updates, then normalises
        >>> z = norm.eval()(torch.randn(3))  # normalises only
        >>> both = RunningNorm({"policy": 48, "critic": {"state": 60, "map": (2, 8, 8)}})

    Equivalent to, for one tensor::

        if self.training:
            self.update(x)
        y = (x - self.mean) / self.std.clamp_min(eps)  # or where else eps stands
        y = y.clamp(-clip, clip).to(x.dtype)
    """

    def __init__(
        self,
        shape: Shape,
        *,
        decay: float = 1.0,
        eps: float = 1e-4,
        eps_mode: EpsMode = "std_floor",
        clip: float | None = None,
        center: bool = True,
        until: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        self.decay = functional.number("decay", decay)
        self.rule = functional.rule_of(eps, eps_mode, clip, center)
        _ops.check_numbers(keep=self.decay, rule=self.rule)
        is_count = isinstance(until, Integral) and not isinstance(until, bool)
        if until is not None and not (is_count and until > 0):
            raise ValueError(f"expected until as a positive int or None, got {until!r}")
        self.until = until
        self.stats = _tree(shape, dtype, device)
        self._ranks: Ranks | None = None
        self.group = group

    # ------------------------------------------------------------------------ calls

    def forward(self, x: Values, mask: Any = None) -> Any:
        """Normalises x; in training mode the statistics take it in first.

        Args:
            x: ``[*samples, *shape]``, any real dtype, any strides; a mapping where the
                shape is one.
            mask: bool, one element a sample: which samples count for the statistics. All
                are normalised. For a mapping one for all, or a mapping alike.

        Returns:
            As x, in its dtype (the default dtype for integers). Differentiable in x, with
            the statistics as constants.

        Raises:
            TypeError: not a tensor, or a complex or sparse one.
            ValueError: trailing dimensions other than ``shape``.
            KeyError: names other than those of ``shape``.
        """
        if not self.training:
            return self.normalize(x)
        if self._ranks is not None:
            self._ranks.outside(self._update_joined, x, mask)
            return self.normalize(x)
        keys, xs = self._pair(x)
        masks = self._masks(mask, keys, xs)
        y = _ops.update(xs, _leaves(keys), masks, self.decay, 1.0, self.rule)
        self._note(keys, xs, masks)
        return self._like(y)

    @torch.no_grad()
    def update(self, x: Values, mask: Any = None) -> None:
        """Takes x into the statistics, in any mode; as in :meth:`forward`."""
        if self._ranks is not None:
            self._ranks.outside(self._update_joined, x, mask)
            return
        keys, xs = self._pair(x)
        masks = self._masks(mask, keys, xs)
        _ops.fold(xs, _leaves(keys), masks, self.decay, 1.0)
        self._note(keys, xs, masks)

    def normalize(self, x: Values) -> Any:
        """Normalises with the statistics as they are, in any mode."""
        keys, xs = self._pair(x)
        return self._like(_ops.normalize(xs, _leaves(keys), self.rule))

    def inverse(self, y: Values) -> Any:
        """``y * scale + mean``: what was normalised, or, with a clip, what was left of it."""
        keys, ys = self._pair(y)
        return self._like(_ops.denormalize(ys, _leaves(keys), self.rule))

    # ------------------------------------------------------------------- statistics

    @property
    def mean(self) -> Any:
        """The mean, in the shape (or mapping of shapes) of a sample; 0 before data."""
        return self._map(lambda m: m.mean_var()[0])

    @property
    def var(self) -> Any:
        """The variance (of all values, not n - 1 of them); 1 before data."""
        return self._map(_var)

    @property
    def std(self) -> Any:
        """The standard deviation, without eps; 1 before data."""
        return self._map(lambda m: _var(m).sqrt())

    @property
    def count(self) -> Any:
        """How many samples were taken in so far, without decay; float64, ``[]``."""
        return self._map(lambda m: m.seen().clone())

    # ------------------------------------------------------------------------ ranks

    @property
    def group(self) -> Group:
        """The ranks whose batches are joined at every call; None: it is alone."""
        return None if self._ranks is None else self._ranks.group

    @group.setter
    def group(self, group: Group) -> None:
        if group is not None and self.until is not None:
            raise ValueError(
                "expected no until with a group: which samples there is room for depends "
                "on all ranks"
            )
        self._ranks = None if group is None else Ranks(group, type(self).__name__)

    def sync_(self, group: Group = None) -> None:
        """Joins what ranks have seen since they last had the same statistics.

        For ranks that go on alone, and call this now and then: all of them. After it they
        have the same bits. They begin with nothing, with one ``state_dict`` on all of
        them, or with the last ``sync_()``; who has nothing may join later.

        Args:
            group: the ranks; by default all of them.

        Raises:
            RuntimeError: a rank has died, did not come within the group's timeout or
                called something else; or ranks went on from different statistics. The
                statistics are as they were.

        Equivalent to, with ``S0`` what all had and ``k`` calls since::

            S = decay**k.max() * S0 + sum(S_r - decay**k_r * S0 for all ranks)
        """
        owner = type(self).__name__
        keys = self._keys()
        if self._ranks is not None and group in (None, self._ranks.group):
            raise RuntimeError(
                f"{owner}: expected another group for sync_() than that whose batches are "
                "joined at every call"
            )
        with torch.no_grad():
            for name, key in keys.items():
                if key.since is not None and self.decay < 1:
                    key.since.check(key.moments(), f"{owner}: sync_() of {name}")
            parts = [
                Part(
                    key.moments(),
                    None if key.since is None else key.since.base,
                    1.0 if key.since is None else float(key.since.kept),
                )
                for key in keys.values()
            ]
            what = f"decay {self.decay}"
            new = synced(group, owner, what, list(keys), parts, counts=2)
            for key, moments in zip(keys.values(), new, strict=True):
                _write(key, moments)
        self._rebase()

    def _rebase(self) -> None:
        """All that go on from here may be joined later."""
        for key in self._keys().values():
            key.since = Since(key.moments())
        if self._ranks is not None:
            self._ranks.asks = True

    def _note(self, keys: list[_Key], xs: list[Tensor], masks: list[Tensor]) -> None:
        """How much is left of what several had in common."""
        if self.decay == 1:
            return
        for k, key in enumerate(keys):
            if key.since is not None:
                masked = bool(masks) and masks[k].numel() > 0
                size = key.since.features
                samples = masks[k].sum() if masked else xs[k].numel() // size
                key.since.note(self.decay, samples)

    @torch.no_grad()
    def _update_joined(self, x: Values, mask: Any) -> None:
        """Takes in the batches of all ranks: a call of all of them."""
        named = self._keys()
        keys, refusal = list(named.values()), None
        states = [key.moments() for key in keys]
        batches: Sequence[Moments | None] = [None] * len(keys)
        try:
            plainly()
            _, xs = self._pair(x)  # in the order of the keys
            masks = self._masks(mask, keys, xs)
            _C.check_update(xs, [], masks, _leaves(keys), self.decay, 1.0)
            batches = _batches(xs, states, masks)
        except Exception as error:  # the others have to know
            refusal = error
        asked = [
            RankKey(name, state.sum.shape, state, batch)
            for name, state, batch in zip(named, states, batches, strict=True)
        ]
        device = states[0].sum.device
        try:
            found = self._ranks.join(
                asked, f"decay {self.decay}", device, refusal is not None
            )
        except RuntimeError:
            if refusal is not None:
                raise refusal from None
            raise
        totals = []
        for key, state, one in zip(keys, states, found, strict=True):
            if one.state is not None and one.state.sum is not state.sum:
                _write(key, one.state)
            totals.append(one.total.to(key.sum.device))
        _ops.merge(_leaves(keys), functional.leaves_of(totals), self.decay, 1.0)
        for key, total in zip(keys, totals, strict=True):
            if key.since is not None and self.decay < 1:
                key.since.note(self.decay, total.samples())

    def _keys(self) -> dict[str, _Key]:
        return dict(_named("stats", self._modules["stats"]))

    # ----------------------------------------------------------------------- export

    def to_module(self) -> Any:
        """What it does in eval mode now, as a plain :class:`~.export.Normalizer`.

        ``torch.export``, ``torch.jit.script`` and ``torch.onnx.export`` take that, and what
        they make of it is loaded without this package. For a mapping, a mapping of them.
        """

        def module(m: Moments) -> Normalizer:
            return Normalizer(*oracle.loc_scale(m, self.rule), clip=self.rule[2])

        return self._map(module)

    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        """A layer that does to raw values what ``linear`` does to those normalised here.

        Raises:
            ValueError: there is a clip, which no linear layer has; or other features.
            TypeError: not a linear layer, or a mapping's normaliser.
        """
        if self.rule[2] is not None:
            raise ValueError("expected no clip: a linear layer has none")
        stats = self._modules["stats"]
        if not isinstance(stats, _Key):
            raise TypeError(
                "expected the normaliser of one tensor, got one of a mapping"
            )
        return fold_into(linear, *oracle.loc_scale(stats.moments(), self.rule))

    # ------------------------------------------------------------------- state_dicts

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        keys = {
            f"{prefix}{path}.": key
            for path, key in self.named_modules()
            if isinstance(key, _Key)
        }
        expected = [path + name for path in keys for name in Moments._fields]
        absent = [name for name in expected if name not in state_dict]
        if strict:
            mine = (name for name in state_dict if name.startswith(prefix))
            known = {*expected, *(path + "kept" for path in keys)}
            unexpected += sorted(set(mine).difference(known))
        missing += absent
        if absent:
            return
        try:
            loaded = [_checked(state_dict, path, key) for path, key in keys.items()]
        except ValueError as err:
            errors.append(str(err))
            return
        with torch.no_grad():
            for key, moments in zip(keys.values(), loaded, strict=True):
                _write(key, moments)
        self._rebase()
        for path, key in keys.items():
            key.since.is_told = path + "kept" in state_dict

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # For `merge_states`: what was loaded has decayed since, but the entries do not say
        # how often.
        for path, key in self._keys().items():
            if key.since is not None and key.since.is_told:
                destination[f"{prefix}{path}.kept"] = key.since.kept.cpu().clone()

    # ---------------------------------------------------------------------- private

    def _pair(self, x: Values) -> tuple[list[_Key], list[Tensor]]:
        stats = self._modules["stats"]  # as self.stats, in a tenth of the time
        if type(stats) is _Key and isinstance(x, Tensor):
            return [stats], [x]
        keys: list[_Key] = []
        xs: list[Tensor] = []
        _pair(self.stats, x, "x", keys, xs)
        return keys, xs

    def _masks(self, mask, keys: list[_Key], xs: list[Tensor]) -> list[Tensor]:
        if mask is None and self.until is None:
            return []
        if mask is None:
            masks: list[Tensor | None] = [None] * len(xs)
        elif isinstance(mask, Mapping):
            masks = []
            _pair(self.stats, mask, "mask", [], masks)
        elif isinstance(mask, Tensor):
            masks = [mask] * len(xs)
        else:
            raise TypeError(f"expected mask as a Tensor, got {type(mask).__name__}")
        if self.until is not None:
            masks = [self._until(*of) for of in zip(masks, keys, xs, strict=True)]
        return functional.masks_of(masks, xs)

    def _until(self, mask: Tensor | None, key: _Key, x: Tensor) -> Tensor:
        """Of the samples that count those that there is room for."""
        samples = x.shape[: max(x.ndim - key.sum.ndim, 0)]
        left = self.until - key.count[-1]
        if mask is None:
            n = samples.numel()
            return torch.arange(n, device=x.device) < left.to(x.device)
        flat = mask.reshape(-1)
        return flat & (flat.cumsum(0) <= left.to(flat.device))

    def _like(self, results: list[Tensor]) -> Any:
        """Results in the order of the statistics, as a tensor or a mapping of them."""
        if type(self._modules["stats"]) is _Key:
            return results[0]
        left = iter(results)
        return _map(self.stats, lambda _: next(left))

    def _map(self, function) -> Any:
        return _map(self.stats, lambda key: function(key.moments()))

    def extra_repr(self) -> str:
        """The options."""
        eps, mode, clip, center = self.rule
        return (
            f"decay={self.decay}, eps={eps}, eps_mode={EPS_MODES[mode]!r}, "
            f"clip={clip}, center={center}, until={self.until}"
        )


def keep_from_ddp(model: nn.Module) -> nn.Module:
    """Has ``DistributedDataParallel`` leave the statistics in a model to each rank.

    Its ``broadcast_buffers`` would write rank 0's over those of the others at each
    forward call, and their samples would be lost. Call it before the model is wrapped;
    parameters and other buffers are synchronised as before.
    """
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    for prefix, module in model.named_modules():
        if getattr(module, "is_of_a_rank", False):
            ignored += [
                f"{prefix}.{name}" if prefix else name for name in module._buffers
            ]
    model._ddp_params_and_buffers_to_ignore = ignored
    return model


def _tree(shape: Shape, dtype, device) -> nn.Module:
    if isinstance(shape, Mapping):
        if not shape:
            raise ValueError(
                "expected a shape for one name at least, got an empty mapping"
            )
        return nn.ModuleDict(
            {name: _tree(child, dtype, device) for name, child in shape.items()}
        )
    if isinstance(shape, Integral) and not isinstance(shape, bool):
        shape = (shape,)
    is_shape = isinstance(shape, Sequence) and not isinstance(shape, str)
    if not is_shape or not all(isinstance(n, Integral) and n >= 0 for n in shape):
        raise TypeError(
            f"expected shape as an int, a sequence or a mapping of shapes, got {shape!r}"
        )
    return _Key(shape, dtype, device)


def _pair(node: nn.Module, x, name: str, keys: list, xs: list) -> None:
    """The tensors of a mapping beside their statistics, in the order of these."""
    if isinstance(node, _Key):
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {name} as a Tensor, got {type(x).__name__}")
        keys.append(node)
        xs.append(x)
        return
    children = dict(node.named_children())
    if not isinstance(x, Mapping):
        raise TypeError(
            f"expected {name} as a mapping with {sorted(children)}, got {type(x).__name__}"
        )
    if x.keys() != children.keys():
        raise KeyError(
            f"expected {name} with {sorted(children)}, got {sorted(map(str, x.keys()))}"
        )
    for key, child in children.items():
        _pair(child, x[key], f"{name}[{key!r}]", keys, xs)


def _batches(
    xs: list[Tensor], states: list[Moments], masks: list[Tensor]
) -> list[Moments]:
    """The moments of values beside their statistics: one operator where it can be."""
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for k, (x, state) in enumerate(zip(xs, states, strict=True)):
        alike.setdefault((state.sum.ndim, x.device), []).append(k)
    batches = list(states)
    for (ndim, _), some in alike.items():
        only = [masks[k] for k in some] if masks else []
        found = _ops.moments([xs[k] for k in some], ndim, only)
        for k, batch in zip(some, found, strict=True):
            batches[k] = batch.to(states[k].sum.device)
    return batches


def _checked(state_dict: Mapping[str, Tensor], path: str, key: _Key) -> Moments:
    names = [path + name for name in Moments._fields]
    moments = Moments(*map(state_dict.__getitem__, names))
    return check_moments(names, moments, key.sum.shape, counts=2, owner="RunningNorm")


def _write(key: _Key, moments: Moments) -> None:
    for (name, old), new in zip(key._buffers.items(), moments, strict=True):
        if old.is_meta:
            key._buffers[name] = new.to(old.dtype, copy=True)
        else:
            old.copy_(new)


def _named(path: str, node: nn.Module) -> Iterator[tuple[str, _Key]]:
    """The statistics with their paths; as named_modules, in a tenth of the time."""
    if isinstance(node, _Key):
        yield path, node
        return
    for name, child in node._modules.items():
        yield from _named(f"{path}.{name}", child)


def _map(node: nn.Module, function) -> Any:
    if isinstance(node, _Key):
        return function(node)
    return {name: _map(child, function) for name, child in node.named_children()}


def _var(moments: Moments) -> Tensor:
    return torch.where(moments.used() > 0, moments.mean_var()[1], 1.0)


def _leaves(keys: list[_Key]) -> list[Tensor]:
    if len(keys) == 1:
        return list(keys[0]._buffers.values())
    return [leaf for key in keys for leaf in key._buffers.values()]
