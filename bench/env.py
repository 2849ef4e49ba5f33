# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""An environment that does nothing, so that a step costs what its transforms cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import Transform

from bench import peers

BARE, IDENTITY, OURS = "no transform", "identity transform", "VecNorm (ours)"


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


KEYS = ["observation", "reward"]


def _step(
    n: int, features: int, device: str, transform: Callable[[], Transform] | None
) -> Callable:
    env = Still(n, features, device)
    if transform is not None:
        env = TransformedEnv(env, transform())
    td = env.rand_action(env.reset())
    env.step(td)
    return lambda: env.step(td)


def steps(
    n: int, features: int, device: str
) -> tuple[dict[str, Callable], dict[str, str]]:
    """A step of the environment with each transform, and why some cannot be had."""
    transforms = {
        BARE: None,
        IDENTITY: partial(Transform, in_keys=[], out_keys=[]),
        OURS: partial(peers.vecnorm, KEYS),
        peers.TORCHRL: partial(peers.torchrl_vecnorm, KEYS),
        peers.TORCHRL_V2: partial(peers.torchrl_v2, KEYS),
    }
    calls, reasons = {}, {}
    for name, transform in transforms.items():
        try:
            calls[name] = _step(n, features, device, transform)
        except Exception as error:
            reasons[name] = peers.reason(error)
    return calls, reasons
