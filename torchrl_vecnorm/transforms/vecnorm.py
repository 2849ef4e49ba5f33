# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``VecNorm``: the statistics of keys behind TorchRL's protocol for transforms."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch import multiprocessing as mp
from torchrl.envs import VecNorm as _TorchRLVecNorm

from torchrl_vecnorm.groups import Group
from torchrl_vecnorm.statistics.locks import LOCK_TIMEOUT
from torchrl_vecnorm.statistics.names import SEP
from torchrl_vecnorm.statistics.shared_td import build_shared_td
from torchrl_vecnorm.transforms import specs
from torchrl_vecnorm.transforms.base import NormTransform
from torchrl_vecnorm.transforms.vecnorm_v2 import VecNormV2

if TYPE_CHECKING:
    from torchrl.envs import EnvBase
    from typing_extensions import Self


class _SignatureOfInit:
    """The signature of a class, or of a subclass: ``inspect`` would take __new__'s."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:  # calling it is not constructing it
            raise AttributeError("__signature__")
        return inspect.signature(MethodType(owner.__init__, owner))


class VecNorm(NormTransform):
    """Moving average normalization layer for torchrl environments.

    VecNorm keeps track of the summary statistics of a dataset to standardize it
    on-the-fly: it is ``torchrl.envs.transforms.VecNorm`` with one compiled operator
    for all keys of a call. If the transform is in 'eval' mode, the running statistics
    are not updated.

    Each call computes, with ``N`` the number of samples::

        sum   <- decay * sum   + Σ x
        ssq   <- decay * ssq   + Σ x²
        count <- decay * count + N
        loc   =  sum / count
        scale =  max(sqrt(max(ssq / count - loc², 0)), eps)
        y     =  (x - loc) / scale

    The statistics are float64. Values that are NaN or infinite are left out of them
    and counted, see :attr:`nonfinite`. Values keep their dtype; integers and bools come
    out in the default dtype.

    If multiple processes are running a similar environment, one can pass a
    TensorDictBase instance that is placed in shared memory: if so, every time the
    normalization layer is queried it will update the values for all processes that
    share the same reference. See :meth:`build_td_for_shared_vecnorm`.

    To use VecNorm at inference time and avoid updating the values with the new
    observations, one should substitute this layer by :meth:`to_observation_norm`, which
    does not follow this transform, or by :meth:`frozen_copy`, which does.

    Args:
        in_keys (sequence of NestedKey, optional): keys to be updated.
            Default: ``["observation", "reward"]``.
        out_keys (sequence of NestedKey, optional): destination keys. Defaults to
            ``in_keys``.
        shared_td (TensorDictBase, optional): a shared tensordict containing the entries
            ``<key>_sum``, ``<key>_ssq`` and ``<key>_count`` of each key, updated in
            place and in its own dtype. One on a GPU is for several transforms of one
            process.
        lock (mp.Lock, optional): a lock to prevent race conditions between processes.
            Defaults to a lock of its own. A transform that is given one shares what it
            loads from shared memory, see :meth:`set_extra_state`.
        decay (number, optional): decay rate of the moving average, in (0, 1], applied
            once a call. 1 never forgets. Default: 0.9999.
        eps (number, optional): lower bound of the running standard deviation, in the
            units of the values. Default: 1e-4.
        shapes (list of torch.Size, optional): the shape of the features of each in_key:
            the trailing dimensions of the entry, all others being samples. If not
            given, the features are all dimensions that do not belong to the
            tensordict's batch size.
        new_api (bool, optional): if ``True``, an instance of
            :class:`torchrl_vecnorm.VecNormV2` is returned.
        lock_timeout (float, optional): seconds to wait for the lock of shared statistics
            before a TimeoutError names the process that holds it. Default: 60.
        names (mapping of NestedKey to NestedKey, optional): the key under whose name the
            statistics of an in_key are kept; by default its own. in_keys of one name
            share one set of statistics: a call folds the samples of all of them into it
            in one update, and normalises all with the result.
        group (ProcessGroup, DeviceMesh or "world", optional): ranks of
            ``torch.distributed`` whose batches are joined at every call, see the guide on
            ranks; ``"world"`` is the default group. All of them have to make the same
            calls, in one order; values, keys and masks may be others, or missing. A
            transform with one cannot be pickled. For ranks that go on alone there is
            :meth:`sync_`.

    Raises:
        ValueError: ``decay`` is not in (0, 1], ``eps`` is not positive, ``shapes`` or
            ``out_keys`` do not match ``in_keys`` in length, a key is given twice or is
            the name of another's statistics, ``names`` has a key that is no in_key;
            ``shared_td`` has entries of other shapes, or values that no data can have
            given.
        TypeError: ``decay``, ``eps`` or ``lock_timeout`` is no number.
        RuntimeError: ``shared_td`` is neither in shared memory nor a memmap, its files
            are damaged, or it is on a GPU and another process's.
        KeyError: ``shared_td`` lacks the entries of a key.

    Placing a transform in an environment or a replay buffer, which TorchRL does with a
    call of ``eval()``, does not stop the updates; ``transform.eval()``, ``env.eval()``
    and :meth:`freeze` do. TorchRL does not pass ``env.eval()`` on to the environments
    inside a ``SerialEnv``, a ``ParallelEnv`` or another ``TransformedEnv``: put the
    transform around them, or give them a :meth:`frozen_copy`.

    ``in_keys``, ``out_keys``, ``shapes``, ``names``, ``decay``, ``eps`` and
    ``lock_timeout`` may be set later, and hold from the next call on.

    Examples:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> t = VecNorm(decay=0.9)
        >>> env = GymEnv("Pendulum-v1")
        >>> env = TransformedEnv(env, t)
        >>> _ = env.reset()
        >>> tds = []
        >>> for _ in range(1000):
        ...     td = env.rand_step()
        ...     if td.get("done"):
        ...         _ = env.reset()
        ...     tds += [td]
        >>> tds = torch.stack(tds, 0)
        >>> print((abs(tds.get(("next", "observation")).mean(0)) < 0.2).all())
        tensor(True)
        >>> print((abs(tds.get(("next", "observation")).std(0) - 1) < 0.2).all())
        tensor(True)
        >>> # In a replay buffer, both observations of a step with the same statistics:
        >>> t = VecNorm(
        ...     ["observation", ("next", "observation")],
        ...     names={("next", "observation"): "observation"},
        ... )

    """

    # The separator of flattened nested keys in a state_dict: keys may contain points.
    SEP = SEP

    __signature__ = _SignatureOfInit()

    # The parameters of a VecNorm, or of a subclass, are those of its __init__.
    @overload
    def __new__(
        cls, *args: Any, new_api: Literal[False] | None = None, **kwargs: Any
    ) -> Self: ...

    @overload
    def __new__(
        cls,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey] | None = None,
        *,
        new_api: Literal[True],
        lock: Any = None,
        stateful: bool = True,
        decay: float = 0.9999,
        eps: float = 1e-4,
        shared_data: TensorDictBase | None = None,
        reduce_batch_dims: bool = False,
        group: Group = None,
    ) -> VecNormV2: ...

    def __new__(cls, *args, new_api: bool | None = None, **kwargs):
        """A VecNorm, or a VecNormV2 where ``new_api`` asks for that."""
        if new_api:
            return VecNormV2(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        shared_td: TensorDictBase | None = None,
        lock: mp.Lock = None,
        decay: float = 0.9999,
        eps: float = 1e-4,
        shapes: list[torch.Size] | None = None,
        new_api: bool | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
        names: Mapping[NestedKey, NestedKey] | None = None,
        group: Group = None,
    ) -> None:
        if in_keys is None:
            in_keys = ["observation", "reward"]
        super().__init__(
            in_keys,
            out_keys,
            td=shared_td,
            lock=lock,
            decay=decay,
            eps=eps,
            shapes=shapes,
            lock_timeout=lock_timeout,
            names=names,
            group=group,
        )
        self.shapes = shapes
        self.names = names

    # ------------------------------------------------------- ----------- checkpoints

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """The statistics, for ``state_dict()``: the live tensors, flat.

        ``<key>_sum``, ``<key>_ssq``, ``<key>_count`` and ``<key>_nonfinite`` for each key
        seen so far, nested keys joined with ``VecNorm.SEP``; None before any data. Saved
        or copied, also those of a memory map become plain tensors of their own.
        """
        if self._td is None:
            warnings.warn(
                "Querying state_dict on an uninitialized VecNorm transform will return "
                "a `None` value for the summary statistics. Loading such a state_dict "
                "on an initialized VecNorm will result in an error. What loads into the "
                "tensors that are there, as torch.distributed.checkpoint does, needs "
                "some: call the transform first.",
                stacklevel=2,
            )
            return None
        return self._statistics.state_dict()

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        """Loads what :meth:`get_extra_state` gave, here or in ``torchrl.envs.VecNorm``.

        Or in ``torchrl.envs.VecNormV2`` with the same ``decay``: the state then stands
        for the same weighted mean and mean of squares. V2 subtracts the mean's square
        before it corrects the bias of a young average, so that its ``scale`` is larger at
        the beginning.

        The values are copied. A transform that has statistics writes in place, under the
        lock, so that sharing survives; where those do not count what is missing, it
        becomes values that change neither ``loc`` nor ``scale``. One that has none makes
        float64 statistics, on the CPU in shared memory, so that workers that
        ``EnvCreator`` starts later see them.

        Only what is shared under one lock becomes this transform's as it is: tensors in
        shared memory, where the transform was given its ``lock`` and did not make it
        itself; and, where the lock was set since the construction, as ``EnvCreator`` does
        it, the statistics that another transform of this process has under that lock.
        Without that lock, tensors in shared memory are copied with a warning.

        Args:
            state: entries ``<key>_sum`` and ``<key>_ssq`` ``[*features]`` and
                ``<key>_count`` ``[1]`` of each key, floating-point; the others are
                optional.

        Raises:
            KeyError: ``state`` is None or lacks an entry of a key that has statistics.
            ValueError: an entry is no tensor, has another shape, or values that no data
                can have given: negative or NaN counts, a negative variance.

        After an error, the statistics are what they were. Entries of other keys are
        ignored, and keys that are not there begin with their first values, both with a
        warning.
        """
        self._statistics.load(state)

    # ------------------------------------------------------------------------- sharing

    @staticmethod
    def build_td_for_shared_vecnorm(
        env: EnvBase,
        keys: Sequence[NestedKey] | None = None,
        memmap: bool | str | os.PathLike = False,
    ) -> TensorDictBase:
        """Creates a shared tensordict for normalization across processes.

        The tensordict carries a lock: transforms in several processes that are given it
        as ``shared_td`` lose no update.

        Args:
            env (EnvBase): example environment to be used to create the tensordict.
            keys (sequence of NestedKey, optional): entries of the step's output that
                have to be normalized; ``"next"`` stands for all floating-point ones,
                rewards among them. Default is ``["next"]``.
            memmap (bool or path): if ``True``, the resulting tensordict will be cast
                into memory map (using ``memmap_()``). Otherwise, the tensordict will be
                placed in shared memory. A path is a folder for the memory map: its
                statistics outlive all processes, and
                ``VecNorm(shared_td=TensorDict.load_memmap(path))`` goes on with them.

        Returns:
            A tensordict in shared memory to be sent to each process.

        Raises:
            KeyError: a key is not an entry of the step's output.
            ValueError: an entry stacks values of different shapes.
            FileExistsError: the folder has shared statistics already.

        Examples:
            >>> from torch import multiprocessing as mp
            >>> queue = mp.Queue()
            >>> env = make_env()
            >>> td_shared = VecNorm.build_td_for_shared_vecnorm(env,
            ...     ["next", "reward"])
            >>> assert td_shared.is_shared()
            >>> queue.put(td_shared)
            >>> # on workers
            >>> v = VecNorm(shared_td=queue.get())
            >>> env = TransformedEnv(make_env(), v)

        """
        keys = ["next"] if keys is None else keys
        keys = [keys] if isinstance(keys, (str, tuple)) else keys
        return build_shared_td(specs.step_features(env, keys), memmap)


# ``isinstance(t, torchrl.envs.VecNorm)`` is how TorchRL finds the transforms that an
# evaluator has to freeze. The class is an ABC: registering makes it true without its
# deprecation warning.
_TorchRLVecNorm.register(VecNorm)
