# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Environments to step through: one that does nothing, so that a step costs what its
transforms cost, and one that people know, thousands at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs import VecNormV2 as TheirV2
from torchrl.envs.transforms import Compose, RewardSum, StepCounter, Transform

from bench import peers
from torchrl_vecnorm import VecNormV2

BARE, IDENTITY, OURS = "no transform", "identity transform", "VecNorm (ours)"
#: A step as it is, and as one graph of torch.compile.
EAGER, COMPILED = "eager", "compiled"


class Still(EnvBase):
    """Returns the same tensors at every step."""

    def __init__(self, n: int, features: int, device: str) -> None:
        super().__init__(batch_size=[n], device=device)
        self.observation_spec = Composite(
            observation=Unbounded((n, features)), shape=[n], device=device
        )
        self.action_spec = Unbounded((n, 1), device=device)
        self.reward_spec = Unbounded((n, 1), device=device)
        self.done_spec = Categorical(2, dtype=torch.bool, shape=(n, 1), device=device)
        no = torch.zeros(n, 1, dtype=torch.bool, device=device)
        self.first = {
            "observation": torch.randn(n, features, device=device),
            "done": no,
            "terminated": no,
        }
        self.next = {**self.first, "reward": torch.randn(n, 1, device=device)}

    def _set_seed(self, seed) -> None:
        pass

    def _reset(self, tensordict=None, **kwargs) -> TensorDict:
        return TensorDict(self.first, self.batch_size, device=self.device)

    def _step(self, tensordict) -> TensorDict:
        return TensorDict(self.next, self.batch_size, device=self.device)


class Pendulum(EnvBase):
    """Gymnasium's Pendulum-v1, ``n`` of them, that swing on for ever.

    Steps write into one tensor, ``state`` [n, 2] (angle, speed), and wait for no GPU: a
    CUDA graph can hold them.
    """

    def __init__(self, n: int, device: str) -> None:
        super().__init__(batch_size=[n], device=device)
        high = torch.tensor([1.0, 1.0, 8.0], device=device).expand(n, 3)
        self.observation_spec = Composite(
            observation=Bounded(-high, high), shape=[n], device=device
        )
        self.action_spec = Bounded(-2.0, 2.0, (n, 1), device=device)
        self.reward_spec = Unbounded((n, 1), device=device)
        self.done_spec = Categorical(2, dtype=torch.bool, shape=(n, 1), device=device)
        self.state = torch.zeros(n, 2, device=device)
        no = torch.zeros(n, 1, dtype=torch.bool, device=device)
        self.done = {"done": no, "terminated": no}

    def _set_seed(self, seed) -> None:
        torch.manual_seed(seed)

    def _observe(self, **more) -> TensorDict:
        angle, speed = self.state.split(1, -1)
        observation = torch.cat([angle.cos(), angle.sin(), speed], -1)
        found = {"observation": observation, **self.done, **more}
        return TensorDict(found, self.batch_size, device=self.device)

    def _reset(self, tensordict=None, **kwargs) -> TensorDict:
        self.state[:, 0].uniform_(-math.pi, math.pi)
        self.state[:, 1].uniform_(-1, 1)
        return self._observe()

    def _step(self, tensordict) -> TensorDict:
        angle, speed = self.state.split(1, -1)
        torque = tensordict["action"].clamp(-2, 2)
        from_top = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = from_top**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
        self.state.copy_(torch.cat([angle + speed * 0.05, speed], -1))
        return self._observe(reward=-cost)


KEYS = ["observation", "reward"]


def _each(
    step: Callable[[Callable[[EnvBase], EnvBase]], Callable],
) -> tuple[dict[str, Callable], dict[str, str]]:
    """What ``step`` makes of each transform, and why some cannot be had."""
    transforms = {
        BARE: None,
        IDENTITY: partial(Transform, in_keys=[], out_keys=[]),
        OURS: partial(peers.vecnorm, KEYS),
        peers.TORCHRL: partial(peers.torchrl_vecnorm, KEYS),
        peers.TORCHRL_V2: partial(peers.torchrl_v2, KEYS),
    }
    calls, reasons = {}, {}
    for name, make in transforms.items():

        def transformed(env: EnvBase, make=make) -> EnvBase:
            return env if make is None else TransformedEnv(env, make())

        try:
            calls[name] = step(transformed)
        except Exception as error:
            reasons[name] = peers.reason(error)
    return calls, reasons


def steps(
    n: int, features: int, device: str
) -> tuple[dict[str, Callable], dict[str, str]]:
    """A step of `Still` with each transform, and why some cannot be had."""

    def step(transformed) -> Callable:
        env = transformed(Still(n, features, device))
        td = env.rand_action(env.reset())
        env.step(td)
        return lambda: env.step(td)

    return _each(step)


def pendulums(n: int, device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """A random action and a step of `Pendulum`, likewise."""

    def step(transformed) -> Callable:
        env = transformed(Pendulum(n, device))
        td = env.reset()

        def act() -> TensorDict:
            # rand_action() asks the GPU whether its numbers are in bounds.
            td["action"] = torch.empty(n, 1, device=device).uniform_(-2, 2)
            return env.step(td)

        act()
        return act

    return _each(step)


def whole_steps(n: int, how: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """`step_and_maybe_reset` of `Pendulum`, with the transforms that people have beside
    either `VecNormV2`, and why some cannot be had. Compiled, it has no graph break: an
    environment that resets itself needs no question on the host.
    """
    torch._dynamo.reset()  # it compiles a function for so many environments only
    calls, reasons = {}, {}
    for name, make in [
        (BARE, None),
        (peers.OURS_V2, partial(peers.ours_v2, KEYS)),
        (peers.TORCHRL_V2, partial(peers.torchrl_v2, KEYS)),
        # torchrl's takes an observation only.
        (peers.OURS_TRAVELS, partial(peers.travelling, VecNormV2, KEYS[:1])),
        (peers.TORCHRL_TRAVELS, partial(peers.travelling, TheirV2, KEYS[:1])),
    ]:
        try:
            last = () if make is None else (make(),)
            some = Compose(StepCounter(), RewardSum(), *last)
            env = TransformedEnv(Pendulum(n, "cpu"), some)
            env._torchrl_native_autoreset = True
            calls[name] = stepping(env, how)
        except Exception as error:
            reasons[name] = peers.reason(error)
    return calls, reasons


def stepping(env: EnvBase, how: str) -> Callable[[], TensorDict]:
    """Steps of an environment with the same action, one a call: the step's output."""
    td = env.reset()
    action = env.full_action_spec.rand()
    if how == COMPILED:
        env.compile(warmup=1, fullgraph=True)

    def step() -> TensorDict:
        nonlocal td
        td.update(action)
        done, td = env.step_and_maybe_reset(td)
        return done

    for _ in range(5):
        step()
    return step
