# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who is measured: each normaliser, called as its own users call it.

A maker takes values, one ``[N, F]`` tensor a key, and tensors of the same shapes that
the result may be written to. It may fail, because the package is not installed or
cannot do what is asked: the tables then show why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from bench.accuracy import Formula
from torchrl_vecnorm import VecNorm, VecNormV2
from torchrl_vecnorm import functional as F

DECAY, EPS = 0.9999, 1e-4

Call = Callable[[], Any]
Tensors = list[Tensor]

# The names that goals and tables speak of.
COPY = "copy_"
OPERATOR = "update_ (ours)"
TRANSFORM = "VecNorm._call (ours)"
FORWARD = "VecNorm() (ours)"
STEP = "VecNorm._step (ours)"
OURS_V2 = "VecNormV2 (ours)"
TORCHRL = "torchrl VecNorm"
TORCHRL_V2 = "torchrl VecNormV2"
OURS_TRAVELS = "VecNormV2 (ours), stateful=False"
TORCHRL_TRAVELS = "torchrl VecNormV2, stateful=False"
COMPILED_V2 = "torchrl VecNormV2, compiled"
BATCH_NORM = "F.batch_norm"


@dataclass
class Run:
    """A normaliser at work on its tensors."""

    call: Call
    read: Callable[[Any], Tensor] = lambda result: result[0]
    scale: Callable[[], Tensor] | None = None
    #: The same normaliser on other tensors, where a CUDA graph can hold its calls.
    bind: Callable[[Tensors, Tensors], Call] | None = None


@dataclass(frozen=True)
class Peer:
    """A normaliser."""

    name: str
    make: Callable[[Tensors, Tensors], Run]
    formula: Formula | None = None
    package: str | None = None


def reason(error: Exception) -> str:
    """One line that says why something did not run."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200].rstrip(": ")


# --------------------------------------------------------------------- the floor


def copy(xs: Tensors, ys: Tensors) -> Run:
    """Reads x and writes y: what no normaliser can do without."""

    def bind(xs, ys):
        if len(xs) == 1:
            return partial(ys[0].copy_, xs[0])
        return lambda: [y.copy_(x) for x, y in zip(xs, ys, strict=True)]

    return Run(bind(xs, ys), lambda _: ys[0], bind=bind)


# -------------------------------------------------------------------------- ours


def operator(xs: Tensors, ys: Tensors, decay: float = DECAY) -> Run:
    """The operator, writing where it is told."""
    states = [F.Moments.zeros(x.shape[1:], device=x.device) for x in xs]

    def bind(xs, ys):
        if len(xs) == 1:
            x, y, state = xs[0], ys[0], states[0]
            return lambda: F.update_(x, state, decay=decay, eps=EPS, out=y)
        return lambda: F.update_(xs, states, decay=decay, eps=EPS, out=ys)

    return Run(
        bind(xs, ys),
        lambda _: ys[0],
        lambda: F.loc_scale(states[0], eps=EPS)[1],
        bind,
    )


def _names(xs: Tensors) -> tuple[list[str], list[str]]:
    keys = [f"key{i}" for i in range(len(xs))]
    return keys, [f"{key}_normalized" for key in keys]


def _tensordict(xs: Tensors) -> TensorDict:
    keys, _ = _names(xs)
    values = dict(zip(keys, xs, strict=True))
    return TensorDict(values, batch_size=xs[0].shape[:1], device=xs[0].device)


def _transform(build: Callable, method: str, xs: Tensors) -> Run:
    """A transform and one of its methods, on tensordicts."""
    keys, out_keys = _names(xs)
    transform = build(keys, out_keys)
    call = getattr(transform, method)

    def bind(xs, ys):
        td = _tensordict(xs)
        return lambda: call(td)

    return Run(
        bind(xs, []),
        lambda td: td[out_keys[0]],
        lambda: transform.scale[keys[0]],
        bind,
    )


def vecnorm(keys=None, out_keys=None) -> VecNorm:
    """Our transform."""
    return VecNorm(keys, out_keys, decay=DECAY, eps=EPS)


def ours(method: str, xs: Tensors, ys: Tensors) -> Run:
    """Our transform; outputs are new tensors, as the API has it."""
    return _transform(vecnorm, method, xs)


# ----------------------------------------------------------------------- torchrl


def torchrl_vecnorm(keys=None, out_keys=None, decay=DECAY):
    """The VecNorm of torchrl with the settings of ours; its eps bounds the variance."""
    from torchrl.envs import VecNorm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VecNorm(keys, out_keys, decay=decay, eps=EPS**2, new_api=False)


def torchrl_v2(keys=None, out_keys=None):
    """The VecNormV2 of torchrl, which counts each sample only if it is told to."""
    from torchrl.envs import VecNormV2

    return VecNormV2(keys, out_keys, decay=DECAY, eps=EPS, reduce_batch_dims=True)


def torchrl(xs: Tensors, ys: Tensors, decay: float = DECAY) -> Run:
    """The class that ours stands in for."""
    return _transform(partial(torchrl_vecnorm, decay=decay), "_call", xs)


def travelling(kind: type, keys=None):
    """A VecNormV2 whose statistics are in the tensordict, of either library."""
    return kind(keys, decay=DECAY, eps=EPS, stateful=False)


def ours_v2(keys=None, out_keys=None) -> VecNormV2:
    """Ours, with the same settings."""
    return VecNormV2(keys, out_keys, decay=DECAY, eps=EPS, reduce_batch_dims=True)


def stepped(make: Callable, compiled: bool, xs: Tensors, ys: Tensors) -> Run:
    """What environments call. torchrl's V2 has no ``_call``, and waits for the GPU."""
    keys, out_keys = _names(xs)
    transform, td = make(keys, out_keys), _tensordict(xs)
    step = transform._step
    if compiled:
        # Each size counts as a recompilation, of which dynamo allows a few.
        torch.compiler.reset()
        transform._maybe_stateful_init(td)
        step = torch.compile(step, fullgraph=True, dynamic=False)
    return Run(lambda: step(td, td), lambda td: td[out_keys[0]])


# ---------------------------------------------------------------- other torch code


def _each(calls: list[Call]) -> Call:
    """One normaliser a key, for those that know of one tensor only."""
    if len(calls) == 1:
        only = calls[0]
        return lambda: [only()]
    return lambda: [call() for call in calls]


def batch_norm(xs: Tensors, ys: Tensors) -> Run:
    """Normalises with the batch alone: less to do, the same passes over memory."""

    def running(x, value):
        half = x.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else x.dtype
        return torch.full(x.shape[1:], value, dtype=dtype, device=x.device)

    stats = [(running(x, 0.0), running(x, 1.0)) for x in xs]

    def bind(xs, ys):
        return _each(
            [
                partial(torch.nn.functional.batch_norm, x, *s, training=True)
                for x, s in zip(xs, stats, strict=True)
            ]
        )

    return Run(bind(xs, ys), bind=bind)


def rsl_rl(xs: Tensors, ys: Tensors) -> Run:
    """Its algorithms call ``update``, then the module."""
    from rsl_rl.modules import EmpiricalNormalization

    norms = [EmpiricalNormalization(x.shape[1:]).to(x.device) for x in xs]

    def one(norm, x):
        norm.update(x)
        return norm(x)

    return Run(
        _each([partial(one, m, x) for m, x in zip(norms, xs, strict=True)]),
        scale=lambda: norms[0]._std[0] + norms[0].eps,
    )


def skrl(xs: Tensors, ys: Tensors) -> Run:
    """As its agents call it while they learn."""
    from skrl.resources.preprocessors.torch import RunningStandardScaler

    norms = [RunningStandardScaler(x.shape[1], device=x.device) for x in xs]

    def scale():
        norm = norms[0]
        return norm.running_variance.float().sqrt() + norm.epsilon

    return Run(
        _each([partial(m, x, train=True) for m, x in zip(norms, xs, strict=True)]),
        scale=scale,
    )


# ------------------------------------------------------------------------- numpy


def _arrays(xs: Tensors) -> list[np.ndarray]:
    if xs[0].device.type != "cpu":
        raise ValueError("numpy code, for the CPU")
    return [x.numpy() for x in xs]


def stable_baselines3(xs: Tensors, ys: Tensors) -> Run:
    """``RunningMeanStd`` with what ``VecNormalize`` does around it."""
    from stable_baselines3.common.running_mean_std import RunningMeanStd

    arrays = _arrays(xs)
    stats = [RunningMeanStd(shape=a.shape[1:]) for a in arrays]

    def one(rms, x):
        rms.update(x)
        y = np.clip((x - rms.mean) / np.sqrt(rms.var + 1e-8), -10.0, 10.0)
        return y.astype(np.float32)

    return Run(
        _each([partial(one, s, a) for s, a in zip(stats, arrays, strict=True)]),
        lambda result: torch.from_numpy(result[0]),
        lambda: torch.from_numpy(np.sqrt(stats[0].var + 1e-8)),
    )


def gymnasium(xs: Tensors, ys: Tensors) -> Run:
    """The wrapper around a vector environment that returns an array it has."""
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
    from gymnasium.wrappers.vector import NormalizeObservation

    class Prepared(VectorEnv):
        def __init__(self, array: np.ndarray) -> None:
            n = self.num_envs = len(array)
            self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
            self.single_observation_space = gym.spaces.Box(
                -np.inf, np.inf, array.shape[1:], array.dtype
            )
            self.single_action_space = gym.spaces.Box(-1, 1)
            self.observation_space = batch_space(self.single_observation_space, n)
            self.action_space = batch_space(self.single_action_space, n)
            no = np.zeros(n, bool)
            self.returned = (array, np.zeros(n), no, no, {})

        def step(self, actions):
            return self.returned

    envs = [NormalizeObservation(Prepared(a)) for a in _arrays(xs)]

    def scale():
        return torch.from_numpy(np.sqrt(envs[0].obs_rms.var + envs[0].epsilon))

    return Run(
        _each([partial(env.step, None) for env in envs]),
        lambda result: torch.from_numpy(result[0][0]),
        scale,
    )


# ------------------------------------------------------------------------ the list


def _at_least(eps: float):
    return lambda var, mean, mass: np.maximum(np.sqrt(var), eps)


def _plus(eps: float):
    return lambda var, mean, mass: np.sqrt(var) + eps


def _under_the_root(eps: float):
    return lambda var, mean, mass: np.sqrt(var + eps)


def _v2_scale(var, mean, mass):
    # It takes loc² away before it corrects loc for the weights that are missing.
    return np.maximum(np.sqrt(var + (1 - mass) * mean**2), EPS)


def decayed(decay: float) -> Formula:
    """The formula of the contract: ours, and torchrl's VecNorm."""
    return Formula(_at_least(EPS), decay=decay)


_DECAYED = decayed(DECAY)
_V2 = Formula(_v2_scale, decay=DECAY, decays_each_sample=True)
_OURS_V2 = Formula(_at_least(EPS), decay=DECAY, decays_each_sample=True)

PEERS = [
    Peer(COPY, copy),
    Peer(OPERATOR, operator, _DECAYED),
    Peer(TRANSFORM, partial(ours, "_call"), _DECAYED),
    Peer(FORWARD, partial(ours, "__call__")),
    Peer(STEP, partial(stepped, vecnorm, False)),
    Peer(OURS_V2, partial(stepped, ours_v2, False), _OURS_V2),
    Peer(TORCHRL, torchrl, _DECAYED, "torchrl"),
    Peer(TORCHRL_V2, partial(stepped, torchrl_v2, False), _V2, "torchrl"),
    Peer(COMPILED_V2, partial(stepped, torchrl_v2, True), _V2, "torchrl"),
    Peer(BATCH_NORM, batch_norm, Formula(_under_the_root(1e-5), decay=0.0), "torch"),
    Peer("rsl_rl", rsl_rl, Formula(_plus(1e-2)), "rsl-rl-lib"),
    Peer("skrl", skrl, Formula(_plus(1e-8), prior=1.0, unbiased=True, clip=5), "skrl"),
    Peer(
        "stable-baselines3",
        stable_baselines3,
        Formula(_under_the_root(1e-8), prior=1e-4, clip=10),
        "stable-baselines3",
    ),
    Peer(
        "gymnasium",
        gymnasium,
        Formula(_under_the_root(1e-8), prior=1e-4),
        "gymnasium",
    ),
]


def select(*names: str) -> list[Peer]:
    """Some of the peers."""
    return [peer for peer in PEERS if peer.name in names]


def without(*names: str) -> list[Peer]:
    """All peers but these."""
    return [peer for peer in PEERS if peer.name not in names]
