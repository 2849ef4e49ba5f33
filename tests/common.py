# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What several of the test files need: the reference, environments, processes."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch
import torchrl.envs
from samples import through_a_file as through_a_file  # needs torch alone
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

FIELDS = ("sum", "ssq", "count")

#: Seconds that another process may take. Importing torchrl takes most of it.
PATIENCE = 120.0


# -------------------------------------------------------------------- the reference


def reference(*args, **kwargs):
    """torchrl's own VecNorm, without its deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # It takes torch 2.13 for older than 2.8.
        warnings.filterwarnings("ignore", "VecNorm with shared memory")
        return torchrl.envs.VecNorm(*args, new_api=False, **kwargs)


# --------------------------------------------------------------------- the statistics


def leaf_name(key: NestedKey, field: str) -> NestedKey:
    """Where a statistic of a key is kept, as section 2 of the contract says."""
    if isinstance(key, str):
        return f"{key}_{field}"
    return (*key[:-1], f"{key[-1]}_{field}")


def leaf(transform, key: NestedKey = "observation", field: str = "count"):
    """A statistic of either class, the live tensor."""
    return transform._td.get(leaf_name(key, field))


def count(transform, key: NestedKey = "observation") -> float:
    return leaf(transform, key).item()


def snapshot(transform) -> dict[NestedKey, torch.Tensor] | None:
    """All statistics of either class, copied."""
    if transform._td is None:
        return None
    return {k: v.clone() for k, v in transform._td.items(True, True)}


def assert_same_state(actual: dict | None, expected: dict | None) -> None:
    """Two snapshots agree to the bit."""
    assert (actual is None) == (expected is None)
    if expected is None:
        return
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=0, equal_nan=True, msg=str(name)
        )


def assert_agree(actual, expected, keys, *, rtol: float, count_rtol: float) -> None:
    """The statistics of two transforms agree; the reference's count is float32."""
    for key in keys:
        for field in FIELDS:
            torch.testing.assert_close(
                leaf(actual, key, field).double(),
                leaf(expected, key, field).double(),
                rtol=count_rtol if field == "count" else rtol,
                atol=rtol,
                msg=lambda text, key=key, field=field: f"{key} {field}: {text}",
            )


class Expected:
    """The equations of section 1 of the contract for one key, by the letter."""

    def __init__(self, decay: float = 0.9999, eps: float = 1e-4) -> None:
        self.decay, self.eps = decay, eps
        self.sum = self.ssq = self.count = 0.0

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        """Takes ``[samples, *features]``."""
        x = samples.double()
        if len(x):
            self.sum = self.decay * self.sum + x.sum(0)
            self.ssq = self.decay * self.ssq + x.pow(2).sum(0)
            self.count = self.decay * self.count + len(x)
        return (x - self.loc) / self.scale

    @property
    def loc(self) -> torch.Tensor:
        return self.sum / self.count

    @property
    def scale(self) -> torch.Tensor:
        var = self.ssq / self.count - self.loc**2
        return var.clamp_min(0).sqrt().clamp_min(self.eps)


# ----------------------------------------------------------------------- environments


class IntegerEnv(EnvBase):
    """Small integers, so that sums over any number of steps are exact.

    Environment ``i`` starts at ``10 * i`` and counts its steps from there; it is done
    after ``lengths[i]`` of them. Reward and observation have bounds.
    """

    def __init__(self, lengths: tuple[int, ...] = (), features=2, **kwargs) -> None:
        shape = [len(lengths)] if lengths else []
        super().__init__(batch_size=shape, **kwargs)
        self.lengths = torch.tensor(lengths or 1_000_000).reshape(*shape, 1)
        self.start = 10.0 * torch.arange(max(1, len(lengths))).reshape(*shape, 1)
        self.steps = torch.zeros(*shape, 1)
        self.factors = torch.tensor([1.0, -2.0]).repeat(features // 2)
        self.observation_spec = Composite(
            observation=Bounded(-1e6, 1e6, (*shape, features)), shape=shape
        )
        self.reward_spec = Bounded(-1e6, 1e6, (*shape, 1))
        self.action_spec = Bounded(-1, 1, (*shape, 1))
        self.done_spec = Categorical(2, dtype=torch.bool, shape=(*shape, 1))

    def _set_seed(self, seed) -> None:
        pass

    def _observe(self) -> TensorDict:
        at = self.start + self.steps
        done = self.steps >= self.lengths
        return TensorDict(
            {
                "observation": at * self.factors,
                "done": done,
                "terminated": done,
            },
            batch_size=self.batch_size,
        )

    def _reset(self, tensordict=None, **kwargs) -> TensorDict:
        which = None if tensordict is None else tensordict.get("_reset", None)
        if which is None:
            which = torch.ones_like(self.steps, dtype=torch.bool)
        self.steps = torch.where(which.reshape(self.steps.shape), 0.0, self.steps)
        return self._observe()

    def _step(self, tensordict) -> TensorDict:
        self.steps = self.steps + 1
        return self._observe().set("reward", self.steps.clone())


class AgentsEnv(EnvBase):
    """Worlds with agents: nested keys, and done once a world or once an agent.

    Observations are ``[worlds, agents, 2]``: the number of the world, and of the agent.
    """

    def __init__(
        self, worlds: int = 3, agents: int = 2, done_each: bool = False
    ) -> None:
        super().__init__(batch_size=[worlds])
        both = (worlds, agents)
        self.done_each = done_each
        self.done_shape = (*both, 1) if done_each else (worlds, 1)
        self.observation_spec = Composite(
            agents=Composite(observation=Bounded(-100, 100, (*both, 2)), shape=both),
            shape=[worlds],
        )
        self.reward_spec = Composite(
            agents=Composite(reward=Bounded(-100, 100, (*both, 1)), shape=both),
            shape=[worlds],
        )
        self.action_spec = Composite(
            agents=Composite(action=Unbounded((*both, 1)), shape=both), shape=[worlds]
        )
        done = Categorical(2, dtype=torch.bool, shape=self.done_shape)
        if done_each:
            done = Composite(
                agents=Composite(
                    done=done.clone(), terminated=done.clone(), shape=both
                ),
                shape=[worlds],
            )
        self.done_spec = done

    def _set_seed(self, seed) -> None:
        pass

    def _observe(self) -> TensorDict:
        worlds, agents = self.full_reward_spec["agents", "reward"].shape[:2]
        world, agent = torch.meshgrid(
            torch.arange(worlds), torch.arange(agents), indexing="ij"
        )
        td = TensorDict(batch_size=[worlds])
        td["agents"] = TensorDict(
            {"observation": torch.stack([world, agent], -1).float()},
            batch_size=[worlds, agents],
        )
        for name in ("done", "terminated"):
            key = ("agents", name) if self.done_each else name
            td[key] = torch.zeros(self.done_shape, dtype=torch.bool)
        return td

    def _reset(self, tensordict=None, **kwargs) -> TensorDict:
        return self._observe()

    def _step(self, tensordict) -> TensorDict:
        td = self._observe()
        td["agents", "reward"] = td["agents", "observation"].sum(-1, keepdim=True)
        return td


# -------------------------------------------------------------------------- processes


@contextmanager
def started(context, target, arguments):
    """Runs ``target(*args)`` in one process for each of ``arguments``.

    On the way out the processes have ended well; whatever happens, they have ended.
    """
    processes = [context.Process(target=target, args=args) for args in arguments]
    try:
        for process in processes:
            process.start()
        yield processes
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
