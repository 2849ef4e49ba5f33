# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The transform where it is used: environments, collectors, replay buffers.

Counts are exact, with decay 1: one for each reset and for each step.
"""

from __future__ import annotations

import sys
import threading
import warnings
from functools import partial

import pytest
import torch
from common import (
    PATIENCE,
    AgentsEnv,
    Expected,
    IntegerEnv,
    assert_same_state,
    count,
    leaf,
    leaf_name,
    reference,
    snapshot,
    started,
    through_a_file,
)
from tensordict import TensorDict, unravel_key
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import multiprocessing as mp
from torch import nn
from torchrl.collectors import (
    Collector,
    Evaluator,
    MultiAsyncCollector,
    MultiSyncCollector,
)
from torchrl.collectors._evaluator import _freeze_vecnorm, _wrap_env_factory_frozen
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import (
    Compose,
    EnvBase,
    EnvCreator,
    GymEnv,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)
from torchrl.modules import ProbabilisticActor, RandomPolicy, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss
from torchrl.testing.mocking_classes import (
    CountingEnv,
    HeterogeneousCountingEnv,
    MultiAgentCountingEnv,
    MultiKeyCountingEnv,
    NestedCountingEnv,
)
from torchrl.weight_update import WeightStrategy

from torchrl_vecnorm import RunningNorm, VecNorm

PENDULUM = "Pendulum-v1"


def pendulum(transform=None, **kwargs) -> TransformedEnv:
    if transform is None:
        transform = VecNorm(decay=1, **kwargs)
    return TransformedEnv(GymEnv(PENDULUM), transform)


def integers(**kwargs) -> TransformedEnv:
    return TransformedEnv(IntegerEnv(), VecNorm(decay=1, **kwargs))


# ------------------------------------------------------------------------- one process


def test_the_documented_example():
    torch.manual_seed(0)
    t = VecNorm(decay=0.9)
    # The documentation has "Pendulum-v0", which gymnasium does not.
    env = GymEnv(PENDULUM)
    env.set_seed(0)
    env = TransformedEnv(env, t)
    # gymnasium insists on a reset before the first step.
    env.reset()
    tds = []
    for _ in range(1000):
        td = env.rand_step()
        if td.get("done"):
            _ = env.reset()
        tds += [td]
    tds = torch.stack(tds, 0)
    assert (abs(tds.get(("next", "observation")).mean(0)) < 0.2).all()
    assert (abs(tds.get(("next", "observation")).std(0) - 1) < 0.2).all()


@pytest.mark.parametrize("wrap", [lambda t: t, Compose], ids=["bare", "Compose"])
def test_a_rollout_counts_the_reset_and_every_step(wrap):
    t = VecNorm(decay=1)
    env = pendulum(wrap(t))
    raw = GymEnv(PENDULUM)
    for e in (env, raw):
        e.set_seed(3)
    actions = raw.rollout(30)["action"]
    raw.set_seed(3)
    policy = Replay(actions)
    expected = raw.rollout(30, policy)
    rollout = env.rollout(30, policy.rewound())
    assert count(t) == 31 and count(t, "reward") == 30
    observation, reward = Expected(1), Expected(1)
    first = observation(expected["observation"][:1])
    torch.testing.assert_close(rollout["observation"][:1], first.float())
    for step in range(30):
        for key, running in (("observation", observation), ("reward", reward)):
            wanted = running(expected["next", key][step : step + 1])
            got = rollout["next", key][step : step + 1]
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


class Replay:
    """A policy that gives actions from a list."""

    def __init__(self, actions) -> None:
        self.actions, self.at = actions, 0

    def rewound(self) -> Replay:
        return Replay(self.actions)

    def __call__(self, td):
        td["action"] = self.actions[self.at]
        self.at += 1
        return td


def test_several_episodes():
    env = TransformedEnv(IntegerEnv(lengths=()), VecNorm(decay=1))
    env.base_env.lengths = torch.tensor([4])
    env.rollout(20, break_when_any_done=False)
    # 20 steps are 5 episodes of 4; nothing is reset after the last step.
    assert count(env.transform, "reward") == 20
    assert count(env.transform) == 20 + 5
    assert leaf(env.transform, field="sum").tolist() == [5 * 10, -2 * 5 * 10]


def test_beside_other_transforms():
    t = VecNorm(["observation", "episode_reward"], ["o", "r"], decay=1)
    env = TransformedEnv(
        IntegerEnv(),
        Compose(RewardSum(["reward"], ["episode_reward"]), StepCounter(), t),
    )
    rollout = env.rollout(10)
    assert count(t) == 11
    assert rollout["observation"].max() == 9
    torch.testing.assert_close(t.loc["observation"], torch.tensor([5.0, -10.0]))
    check_env_specs(env)


def test_the_environments_parent_and_clone():
    env = pendulum(Compose(VecNorm(decay=1)))
    t = env.transform[0]
    assert t.parent is not None
    other = pendulum(t.clone())
    env.rollout(3)
    # Cloned before there was anything to share.
    assert other.transform._td is None


def test_a_clone_in_another_environment_shares():
    env = pendulum()
    env.rollout(3)
    other = pendulum(env.transform.clone())
    other.rollout(5)
    assert count(env.transform) == count(other.transform) == 4 + 6


def test_a_checkpoint_of_the_environment():
    env = pendulum(Compose(StepCounter(), VecNorm(decay=0.9)))
    env.rollout(20)
    other = pendulum(Compose(StepCounter(), VecNorm(decay=0.9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an ordinary resume says nothing
        other.load_state_dict(through_a_file(env.state_dict()))
    for e in (env, other):
        e.set_seed(1)
        torch.manual_seed(1)
        e.rollout(20)
    assert_same_state(snapshot(other.transform[1]), snapshot(env.transform[1]))


# ------------------------------------------------------------------------------- specs


@pytest.mark.parametrize("out_keys", [None, ["o", "r"]], ids=["same", "other"])
@pytest.mark.parametrize(
    "make_env",
    [
        pytest.param(lambda: GymEnv(PENDULUM), id="Pendulum"),
        pytest.param(IntegerEnv, id="bounded"),
        pytest.param(lambda: IntegerEnv(lengths=(3, 4, 5)), id="batched"),
        pytest.param(CountingEnv, id="integer observations"),
        pytest.param(lambda: CountingEnv(batch_size=[4]), id="batched integers"),
    ],
)
def test_check_env_specs(make_env, out_keys):
    env = TransformedEnv(make_env(), VecNorm(out_keys=out_keys))
    check_env_specs(env)
    observation, reward = out_keys or ("observation", "reward")
    specs = env.full_observation_spec[observation], env.full_reward_spec[reward]
    for spec in specs:
        assert spec.dtype.is_floating_point
        assert not isinstance(spec, Bounded)
    if out_keys is not None:
        # Entries that are not written to are as they were.
        raw = make_env()
        assert (
            env.full_observation_spec["observation"]
            == raw.observation_spec["observation"]
        )
        assert env.full_reward_spec["reward"] == raw.full_reward_spec["reward"]


@pytest.mark.parametrize(
    ("make_env", "keys"),
    [
        pytest.param(
            AgentsEnv, [("agents", "observation"), ("agents", "reward")], id="agents"
        ),
        pytest.param(
            partial(AgentsEnv, done_each=True),
            [("agents", "observation"), ("agents", "reward")],
            id="agents that are done on their own",
        ),
        pytest.param(
            partial(NestedCountingEnv, batch_size=[2]),
            [("data", "states"), ("data", "reward")],
            id="nested",
        ),
        pytest.param(
            partial(MultiAgentCountingEnv, n_agents=2),
            [("agents", "agent_0", "observation"), ("agents", "agent_1", "reward")],
            id="deeply nested",
        ),
        pytest.param(
            MultiKeyCountingEnv,
            ["observation", ("nested_1", "observation"), ("nested_2", "reward")],
            id="several groups",
        ),
        pytest.param(
            HeterogeneousCountingEnv,
            ["state", ("lazy", "reward")],
            id="heterogeneous",
        ),
    ],
)
def test_check_env_specs_of_nested_keys(make_env, keys):
    env = TransformedEnv(make_env(), VecNorm(keys, decay=1))
    check_env_specs(env)
    for key in keys:
        spec = env.output_spec["full_observation_spec"]
        if key not in spec.keys(True, True):
            spec = env.output_spec["full_reward_spec"]
        assert spec[key].dtype.is_floating_point
        assert not isinstance(spec[key], Bounded)


def test_nested_out_keys():
    keys = [("agents", "observation"), ("agents", "reward")]
    out_keys = [("agents", "o"), ("agents", "r")]
    env = TransformedEnv(AgentsEnv(), VecNorm(keys, out_keys))
    check_env_specs(env)
    assert ("agents", "o") in env.observation_spec.keys(True)
    assert ("agents", "r") in env.full_reward_spec.keys(True)


def test_transform_observation_spec_of_a_leaf():
    spec = Bounded(-1, 1, (3,))
    out = VecNorm(["observation"]).transform_observation_spec(spec)
    assert not isinstance(out, Bounded)
    assert out.shape == spec.shape and out.dtype == spec.dtype
    integer = Bounded(0, 255, (3,), dtype=torch.uint8)
    assert (
        VecNorm(["observation"]).transform_observation_spec(integer).dtype
        == torch.float32
    )


def test_integer_observations():
    env = TransformedEnv(CountingEnv(max_steps=100), VecNorm(decay=1))
    rollout = env.rollout(10, auto_cast_to_device=False)
    assert rollout["next", "observation"].dtype == torch.float32
    assert count(env.transform) == 11


# ------------------------------------------------------------------------ many at once


def test_agents():
    keys = [("agents", "observation"), ("agents", "reward")]
    t = VecNorm(keys, decay=1)
    TransformedEnv(AgentsEnv(worlds=3, agents=2), t).rollout(10)
    # The tensordict's batch is the worlds: agents are features.
    assert count(t, keys[0]) == 3 * 11 and count(t, keys[1]) == 3 * 10
    assert t.loc[keys[0]].shape == (2, 2)
    torch.testing.assert_close(t.loc[keys[0]], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_agents_as_samples():
    keys = [("agents", "observation"), ("agents", "reward")]
    t = VecNorm(keys, shapes=[(2,), (1,)], decay=1)
    TransformedEnv(AgentsEnv(worlds=3, agents=2), t).rollout(10)
    assert count(t, keys[0]) == 6 * 11 and count(t, keys[1]) == 6 * 10
    torch.testing.assert_close(t.loc[keys[0]], torch.tensor([1.0, 0.5]))


def test_heterogeneous_agents():
    # Each agent has features of another shape; torchrl stacks them lazily.
    env = HeterogeneousCountingEnv(batch_size=[2])
    t = VecNorm([("lazy", "reward"), "state"], decay=1)
    TransformedEnv(env, t).rollout(4)
    assert count(t, "state") == 2 * 5 and count(t, ("lazy", "reward")) == 2 * 4


def test_a_batch_is_one_call():
    t = VecNorm(decay=0.5)
    env = TransformedEnv(IntegerEnv(lengths=(50, 50, 50)), t)
    env.rollout(5)
    # decay is applied once a call, whatever the number of environments.
    assert count(t, "reward") == sum(3 * 0.5**i for i in range(5))


# ----------------------------------------------------------------------- partial resets


@pytest.mark.parametrize(
    "reset", [[True, False, True], [False] * 3, [True] * 3], ids=str
)
def test_only_rows_that_are_reset_count(reset):
    t = VecNorm(decay=1)
    env = TransformedEnv(IntegerEnv(lengths=(50, 50, 50)), t)
    td = env.rollout(4)[:, -1]["next"].exclude("reward")
    before = snapshot(t)
    mask = torch.tensor(reset).unsqueeze(-1)
    if not mask.any():
        # TorchRL refuses to reset nothing at all; the transform takes it calmly.
        t._reset(TensorDict(_reset=mask, batch_size=[3]), td.clone())
    else:
        env.reset(td.set("_reset", mask))
    assert count(t) == before["observation_count"].item() + sum(reset)
    assert count(t, "reward") == 12
    total = sum(10 * i for i, row in enumerate(reset) if row)
    expected = before["observation_sum"] + torch.tensor([1, -2]) * total
    assert torch.equal(leaf(t, field="sum"), expected)


def test_nothing_reset_changes_nothing():
    t = VecNorm(["observation"], decay=0.5)
    td = TensorDict(observation=torch.ones(3, 2), batch_size=[3])
    t(td.clone())
    before = snapshot(t)
    mask = TensorDict(_reset=torch.zeros(3, 1, dtype=torch.bool), batch_size=[3])
    t._reset(mask, td.clone())
    # Not even the decay.
    assert_same_state(snapshot(t), before)


def test_all_rows_are_normalised_at_a_partial_reset():
    t = VecNorm(["observation"], decay=1)
    x = torch.tensor([[1.0], [3.0], [5.0]])
    mask = torch.tensor([[True], [True], [False]])
    y = t._reset(
        TensorDict(_reset=mask, batch_size=[3]),
        TensorDict(observation=x, batch_size=[3]),
    )
    assert y["observation"].flatten().tolist() == [-1, 1, 3]


def test_a_single_environment_that_says_that_it_is_reset():
    t = VecNorm(decay=1)
    env = TransformedEnv(IntegerEnv(), t)
    td = env.reset()
    td["_reset"] = torch.ones(1, dtype=torch.bool)
    env.reset(td)
    assert count(t) == 2


def test_partial_resets_in_a_rollout():
    t = VecNorm(decay=1)
    lengths = (2, 3, 6)
    env = TransformedEnv(IntegerEnv(lengths=lengths), t)
    env.rollout(12, break_when_any_done=False)
    # Each is reset at the start, and after each of its episodes but the last.
    resets = sum(12 // length for length in lengths)
    assert count(t, "reward") == 3 * 12
    assert count(t) == 3 * 12 + resets


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_partial_resets_of_a_serial_env(where):
    def single(length):
        env = IntegerEnv()
        env.lengths = torch.tensor([length])
        return env if where == "outside" else TransformedEnv(env, VecNorm(decay=1))

    env = SerialEnv(2, [partial(single, 2), partial(single, 3)])
    if where == "outside":
        env = TransformedEnv(env, VecNorm(decay=1))
    env.rollout(6, break_when_any_done=False)
    if where == "outside":
        assert count(env.transform) == 2 * 6 + 3 + 2
    else:
        counts = [count(e.transform) for e in env._envs]
        assert counts == [6 + 3, 6 + 2]
    env.close()


@pytest.mark.parametrize(
    "shapes", [None, [(2,)]], ids=["agents are features", "samples"]
)
def test_a_reset_of_agents(shapes):
    key = ("agents", "observation")
    t = VecNorm([key], shapes=shapes, decay=1)
    env = TransformedEnv(AgentsEnv(worlds=3, agents=2, done_each=True), t)
    td = env.reset()
    before, total = count(t, key), leaf(t, key, "sum").clone()
    mask = torch.tensor([[True, False], [False, False], [True, True]]).unsqueeze(-1)
    td["agents", "_reset"] = mask
    env.reset(td)
    x = td["agents", "observation"].new_tensor(
        [[[w, a] for a in range(2)] for w in range(3)]
    )
    if shapes is None:
        # A world is a sample, and counts when any of its agents was reset.
        assert (before, count(t, key)) == (3, 3 + 2)
        assert torch.equal(leaf(t, key, "sum"), total + x[[0, 2]].sum(0))
    else:
        assert (before, count(t, key)) == (6, 6 + 3)
        assert torch.equal(leaf(t, key, "sum"), total + x[mask.squeeze(-1)].sum(0))


def test_the_reset_of_a_world_holds_for_its_agents():
    key = ("agents", "observation")
    t = VecNorm([key], shapes=[(2,)], decay=1)
    env = TransformedEnv(AgentsEnv(worlds=3, agents=2), t)
    td = env.reset()
    td["_reset"] = torch.tensor([[True], [False], [False]])
    env.reset(td)
    assert count(t, key) == 6 + 2


class LevelsEnv(EnvBase):
    """Observations at three levels, of numbers that are new each time; done at some."""

    paths = ((), ("agents",), ("agents", "deep"))
    shapes = ((3,), (3, 2), (3, 2))

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__(batch_size=[3])
        self.levels, self.seen = levels, 0
        done = [
            {
                name: Categorical(2, dtype=torch.bool, shape=(*shape, 1))
                for name in ("done", "terminated")
            }
            if level in levels
            else {}
            for level, shape in enumerate(self.shapes)
        ]
        values = [{"observation": Unbounded((*shape, 1))} for shape in self.shapes]
        self.observation_spec = self.nested(values)
        self.done_spec = self.nested(done)
        self.reward_spec = self.action_spec = Unbounded((3, 1))

    def nested(self, parts: list[dict]) -> Composite:
        root, agents, deep = parts
        if deep:
            agents = {**agents, "deep": Composite(deep, shape=self.shapes[2])}
        if agents:
            root = {**root, "agents": Composite(agents, shape=self.shapes[1])}
        return Composite(root, shape=self.shapes[0])

    def _set_seed(self, seed) -> None:
        pass

    def _reset(self, tensordict=None) -> TensorDict:
        td = self.output_spec["full_observation_spec"].zero()
        td.update(self.output_spec["full_done_spec"].zero())
        for path in self.paths:
            value = td.get((*path, "observation"))
            self.seen += value.numel()
            value.copy_(
                torch.arange(self.seen - value.numel(), self.seen).view_as(value)
            )
        return td

    def _step(self, tensordict) -> TensorDict:
        return self._reset().set("reward", torch.zeros(3, 1))


@pytest.mark.parametrize(
    "levels", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_what_a_reset_replaces_is_what_counts(levels, seed):
    """Masks at several levels may contradict each other; torchrl's own env is the judge."""
    keys = [unravel_key((*path, "observation")) for path in LevelsEnv.paths]
    t = VecNorm(keys, shapes=[(1,)] * 3, decay=1)
    plain, env = LevelsEnv(levels), TransformedEnv(LevelsEnv(levels), t)
    masks = {}
    for level in levels:
        shape = (*LevelsEnv.shapes[level], 1)
        masks[(*LevelsEnv.paths[level], "_reset")] = (
            torch.rand(shape) > 0.5 - 0.4 * seed
        )
    masks[(*LevelsEnv.paths[levels[0]], "_reset")][seed] = True

    def reset(env):
        td = env.reset()
        for name, mask in masks.items():
            td[name] = mask.clone()
        before = td.select(*keys).clone(), snapshot(t)
        return *before, env.reset(td)

    _, before, _ = reset(env)
    old, _, new = reset(plain)
    for key in keys:
        values = new[key][new[key] != old[key]].double()
        for field, value in (("count", len(values)), ("sum", values.sum())):
            state = leaf_name(key, field)
            assert t._td[state].item() == before[state].item() + value, (key, field)


class Clipped(VecNorm):
    """Extends the transform as torchrl's documentation says, with a copy on the way."""

    def _call(self, next_tensordict):
        td = super()._call(next_tensordict.copy())
        for key in set(self.out_keys).intersection(td.keys()):
            next_tensordict.set(key, td.get(key).clamp(-0.5, 0.5))
        return next_tensordict


class Counted(VecNorm):
    """Extends the methods around it."""

    resets = steps = 0

    def _reset(self, tensordict, tensordict_reset):
        self.resets += 1
        return super()._reset(tensordict, tensordict_reset)

    def _step(self, tensordict, next_tensordict):
        self.steps += 1
        return super()._step(tensordict, next_tensordict)


class Tolerant(VecNorm):
    """Has a `_call` and a `_reset` that are torchrl's."""

    def _call(self, next_tensordict):
        if not self.missing_tolerance:
            assert "reward" in next_tensordict.keys()
        return super()._call(next_tensordict)


@pytest.mark.parametrize("cls", [VecNorm, Clipped, Counted, Tolerant])
@pytest.mark.parametrize("wrap", [lambda t: t, Compose], ids=["bare", "Compose"])
def test_subclasses_see_what_the_transform_sees(cls, wrap):
    t = cls(decay=1)
    env = TransformedEnv(IntegerEnv(lengths=(2, 3, 6)), wrap(t))
    rollout = env.rollout(12, break_when_any_done=False)
    assert count(t, "reward") == 3 * 12
    assert count(t) == 3 * 12 + 6 + 4 + 2
    if cls is Clipped:
        for td in (rollout, rollout["next"]):
            assert td["observation"].abs().max() == 0.5
    if cls is Counted:
        # All at the start, then the first and the second now and then.
        assert (t.resets, t.steps) == (1 + 7, 12)


@pytest.mark.parametrize("method", ["_reset", "_step"])
def test_subclasses_honour_masks(method):
    t = Clipped(["observation"], decay=1)
    mask = TensorDict({method: torch.tensor([[True], [False], [True]])}, [3])
    for n in (1, 2, 3):
        td = TensorDict(
            observation=torch.tensor([[1.0], [50.0], [3.0]]), batch_size=[3]
        )
        y = getattr(t, method)(mask, td)["observation"]
        assert y.flatten().tolist() == [-0.5, 0.5, 0.5]
        assert (count(t), leaf(t, field="sum").item()) == (2 * n, 4 * n)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1), (4, 2)])
def test_a_mask_has_parts(shape, dtype):
    """An environment is reset if any part of it is."""
    mask = torch.zeros(shape, dtype=dtype)
    mask.view(4, -1)[[0, 2], -1] = 1
    t = VecNorm(["observation"], decay=1.0)
    for _ in range(2):  # by the long way and by the short one
        td = TensorDict(observation=torch.arange(4.0)[:, None], batch_size=[4])
        t._reset(TensorDict(_reset=mask, batch_size=[4]), td)
    assert t._td["observation_count"] == 4
    assert t._td["observation_sum"] == 2 * (0 + 2)


def test_threads_do_not_see_each_others_masks():
    t = Clipped(["observation"], decay=1)
    none = TensorDict(_reset=torch.zeros(4, 1, dtype=torch.bool), batch_size=[4])
    calls = 200

    def work(call):
        for _ in range(calls):
            call(TensorDict(observation=torch.ones(4, 1), batch_size=[4]))

    threads = [
        threading.Thread(target=work, args=(call,), daemon=True)
        for call in (t, partial(t._reset, none)) * 2
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(interval)
    assert count(t) == 2 * 4 * calls


# ------------------------------------------------------------- batches of environments


def test_serial_env():
    env = SerialEnv(2, integers)
    env.rollout(10)
    assert [count(e.transform) for e in env._envs] == [11, 11]
    env.close()
    t = VecNorm(decay=1)
    env = TransformedEnv(SerialEnv(2, IntegerEnv), t)
    env.rollout(10)
    assert count(t) == 22
    env.close()


def test_serial_env_shares_through_env_creator():
    creator = EnvCreator(integers)
    env = SerialEnv(2, creator)
    env.rollout(10)
    # The shadow environment of EnvCreator does a reset and a step.
    assert count(creator().transform) == 2 + 2 * 11
    assert count(creator().transform, "reward") == 1 + 2 * 10
    env.close()


def test_eval_of_a_batch_of_environments():
    """torchrl does not pass it on to workers, of its own transforms neither."""
    env = SerialEnv(2, integers)
    env.rollout(3)
    env.eval()
    assert all(e.transform.training for e in env._envs)
    env.close()
    # What to do: the transform around the batch,
    env = TransformedEnv(SerialEnv(2, IntegerEnv), VecNorm(decay=1))
    env.rollout(3)
    env.eval()
    env.rollout(3)
    assert count(env.transform) == 8
    # or frozen copies in the workers.
    t = env.transform
    evaluating = SerialEnv(2, lambda: TransformedEnv(IntegerEnv(), t.frozen_copy()))
    evaluating.rollout(3)
    assert count(t) == 8
    evaluating.close()
    env.close()


def test_eval_of_the_workers_of_a_parallel_env():
    creator = EnvCreator(integers)
    t = creator().transform
    env = ParallelEnv(2, creator, mp_start_method="fork")
    try:
        env.rollout(3)
        before = count(t)
        env.eval()
        env.rollout(3)
        assert count(t) == before + 8
        env.transform.eval()
        env.rollout(3)
        assert count(t) == before + 8
        env.transform.train()
        env.rollout(3)
        assert count(t) == before + 16
    finally:
        env.close()


def test_eval_of_an_inner_environment():
    env = TransformedEnv(integers(), StepCounter(), auto_unwrap=False)
    inner = env.base_env.transform
    env.eval()
    assert inner.training
    env.base_env.eval()
    env.rollout(3)
    assert inner._td is None


def test_parallel_env_outside():
    t = VecNorm(decay=1)
    env = TransformedEnv(ParallelEnv(2, IntegerEnv, mp_start_method="fork"), t)
    try:
        env.rollout(10)
        assert count(t) == 22 and count(t, "reward") == 20
    finally:
        env.close()


def test_parallel_env_shares_through_env_creator():
    creator = EnvCreator(integers)
    main = creator()
    t = main.transform
    assert all(value.is_shared() for value in t._td.values(True, True))
    env = ParallelEnv(2, creator, mp_start_method="spawn")
    try:
        env.rollout(10)
        steps = 10
        # Sums are exact: no update was lost.
        assert count(t) == 2 + 2 * (1 + steps)
        assert count(t, "reward") == 1 + 2 * steps
        sums = 1 + 2 * sum(range(1, steps + 1))
        assert leaf(t, field="sum").tolist() == [sums, -2 * sums]
        assert leaf(t, "reward", "sum").item() == sums

        # A checkpoint that comes later is written in place, where the workers see it.
        saved = through_a_file(env.state_dict())
        env.rollout(5)
        main.load_state_dict(saved["worker1"])
        assert count(t) == 2 + 2 * (1 + steps)
        env.rollout(5)
        assert count(t) == 2 + 2 * (1 + steps) + 2 * 6

        # In the workers too. After it torchrl 0.14.1 does not wait for them any more.
        env.load_state_dict(saved)
        assert count(t) == 2 + 2 * (1 + steps)
    finally:
        env.close()


@pytest.mark.parametrize(
    ("method", "workers"),
    [
        pytest.param("spawn", 5, marks=pytest.mark.slow),
        *(("fork", workers) for workers in (2, 3, 4, 5)),
    ],
)
def test_every_worker_of_a_parallel_env_counts(method, workers):
    creator = EnvCreator(integers)
    t = creator().transform
    env = ParallelEnv(workers, creator, mp_start_method=method)
    try:
        env.rollout(10)
    finally:
        env.close()
    assert count(t) == 2 + workers * 11
    assert count(t, "reward") == 1 + workers * 10
    sums = 1 + workers * sum(range(1, 11))
    assert leaf(t, field="sum").tolist() == [sums, -2 * sums]


def test_a_worker_that_is_killed_stops_nobody():
    creator = EnvCreator(integers)
    env = ParallelEnv(3, creator, mp_start_method="fork")
    other = creator()
    try:
        env.rollout(10)
        for worker in env._workers[:2]:
            worker.kill()
            worker.join()
        other.rollout(10)
        assert count(other.transform) == 2 + 3 * 11 + 11
    finally:
        env._workers[2].kill()


@pytest.mark.slow
def test_a_checkpoint_from_before_the_workers_started():
    source = integers()
    source.rollout(99)
    creator = EnvCreator(integers)
    main = creator()
    main.load_state_dict(through_a_file(source.state_dict()))
    env = ParallelEnv(2, creator, mp_start_method="spawn")
    try:
        env.rollout(10)
        assert count(main.transform) == 100 + 2 * 11
    finally:
        env.close()


def resumed(file) -> TransformedEnv:
    env = integers()
    env.load_state_dict(torch.load(file))
    return env


@pytest.mark.filterwarnings("error:VecNorm. the statistics are copied")
@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_resuming_a_run_with_env_creator(method, tmp_path):
    """Every environment loads the checkpoint by itself before it is made to share."""
    source = integers()
    source.rollout(99)
    torch.save(source.state_dict(), tmp_path / "saved.pt")
    creator = EnvCreator(partial(resumed, tmp_path / "saved.pt"))
    state = creator.state_dict()["_extra_state"]
    assert all(value.is_shared() for value in state.values())
    assert state["observation_count"].item() == 102
    t = creator().transform
    env = ParallelEnv(2, creator, mp_start_method=method)
    try:
        env.rollout(10)
    finally:
        env.close()
    assert count(t) == 102 + 2 * 11
    assert count(t, "reward") == 100 + 2 * 10
    # In this process too.
    env = SerialEnv(2, creator)
    env.rollout(10)
    env.close()
    assert count(t) == 102 + 4 * 11
    saved = torch.load(tmp_path / "saved.pt")["_extra_state"]
    assert saved["observation_count"].item() == 100


def warnings_of(creator, results):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t = creator().transform
    t(IntegerEnv().reset().set("reward", torch.ones(1)))
    results.put(([str(w.message) for w in said], count(t)))


def test_env_creator_that_was_not_called_before_a_fork():
    """Its tensors are private then: what cannot be shared is said."""
    creator = EnvCreator(integers)
    context = mp.get_context("fork")
    results = context.Queue()
    with started(context, warnings_of, [(creator, results)] * 2):
        for _ in range(2):
            said, counted = results.get(timeout=PATIENCE)
            assert any("not shared" in text for text in said)
            assert counted == 3
    assert count(creator().transform) == 2


def test_env_creator_with_a_lock_of_the_users():
    lock = mp.Lock()
    creator = EnvCreator(partial(integers, lock=lock))
    t = creator().transform
    env = SerialEnv(2, creator)
    env.rollout(10)
    env.close()
    assert count(t) == 2 + 2 * 11 and t.lock is lock


def test_an_evaluation_that_loads_leaves_the_training_alone():
    """Also where the training has its statistics in shared memory."""
    train, other = integers(), integers()
    train.rollout(5)
    other.load_state_dict(through_a_file(train.state_dict()))
    creator = EnvCreator(integers)
    for env in (train, other, creator(), creator()):
        t = env.transform
        before = count(t)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluation = integers()
            evaluation.load_state_dict(env.state_dict())
        evaluation.rollout(7)
        assert count(t) == before
        assert count(evaluation.transform) == before + 8
        env.rollout(3)
        assert count(t) == before + 4


# -------------------------------------------------------------------------- collectors


def test_collector():
    creator = EnvCreator(integers)
    collector = Collector(creator, None, frames_per_batch=20, total_frames=60)
    t = creator().transform
    for i, data in enumerate(collector, 1):
        assert data.shape == (20,)
        assert count(t, "reward") == 1 + 20 * i
        # One reset at the start; none in between.
        assert count(t) == 2 + 1 + 20 * i
    collector.shutdown()
    assert i == 3


def test_collector_with_resets():
    t = VecNorm(decay=1)
    env = TransformedEnv(IntegerEnv(lengths=(4, 5)), t)
    collector = Collector(env, None, frames_per_batch=40, total_frames=40)
    for data in collector:
        assert data.shape == (2, 20)
    # Each is reset at the start and whenever it is done, also after the last step.
    assert count(t, "reward") == 40
    assert count(t) == 40 + (1 + 5) + (1 + 4)
    collector.shutdown()


def test_collector_of_a_parallel_env():
    creator = EnvCreator(integers)
    t = creator().transform
    env = ParallelEnv(2, creator, mp_start_method="fork")
    collector = Collector(env, None, frames_per_batch=20, total_frames=40)
    try:
        for data in collector:
            assert data.shape == (2, 10)
        assert count(t) == 2 + 2 + 40
    finally:
        collector.shutdown()


@pytest.fixture
def start_method():
    """Sets it for all processes, as collectors have no argument for it."""
    before = mp.get_start_method(allow_none=True)
    yield partial(mp.set_start_method, force=True)
    mp.set_start_method(before, force=True)


@pytest.mark.parametrize(
    "method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"]
)
def test_multi_sync_collector(start_method, method):
    start_method(method)
    creator = EnvCreator(integers)
    t = creator().transform
    collector = MultiSyncCollector(
        [creator, creator], None, frames_per_batch=40, total_frames=120
    )
    try:
        frames = sum(data.numel() for data in collector)
    finally:
        collector.shutdown()
    assert frames == 120
    # Both workers went on to the same statistics. (With the reference too: 125 for 3.)
    assert count(t) == 2 + 2 + 120
    assert count(t, "reward") == 1 + 120


@pytest.mark.parametrize(
    "method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"]
)
def test_multi_async_collector(start_method, method):
    start_method(method)
    creator = EnvCreator(integers)
    t = creator().transform
    collector = MultiAsyncCollector(
        [creator, creator], None, frames_per_batch=40, total_frames=120
    )
    try:
        frames = sum(data.numel() for data in collector)
    finally:
        collector.shutdown()
    assert frames == 120
    # The workers have gone on for a while: every frame counted once for each key.
    made = count(t, "reward") - 1
    assert made >= 120
    assert count(t) == 2 + 2 + made
    sums = leaf(t, "reward", "sum").item()
    assert leaf(t, field="sum").tolist() == [sums, -2 * sums]


# --------------------------------------------------------------------------- evaluators


@pytest.mark.parametrize("wrap", [lambda t: t, Compose], ids=["bare", "Compose"])
def test_an_evaluator_freezes_it(wrap):
    t = VecNorm(decay=1)
    env = TransformedEnv(IntegerEnv(), wrap(t))
    env.rollout(5)
    before = snapshot(t)
    assert _freeze_vecnorm(env) is env
    assert t.frozen
    env.rollout(5)
    assert_same_state(snapshot(t), before)


def test_an_evaluator_follows_the_training_environment():
    creator = EnvCreator(integers)
    frozen = _wrap_env_factory_frozen(creator)()
    train = creator()
    train.rollout(5)
    assert frozen.transform.frozen and not train.transform.frozen
    frozen.rollout(7)
    assert count(train.transform) == count(frozen.transform) == 2 + 6


EPISODE = 9


def episodes(transform=None) -> TransformedEnv:
    env = IntegerEnv(lengths=(EPISODE,))
    return TransformedEnv(env, transform or VecNorm(decay=1))


def episodes_of(folder) -> TransformedEnv:
    return episodes(VecNorm(shared_td=TensorDict.load_memmap(folder), decay=1))


def random_policy(env=None) -> RandomPolicy:
    return RandomPolicy((env or episodes()).action_spec)


def evaluator(env, backend, **kwargs) -> Evaluator:
    return Evaluator(
        env,
        policy_factory=random_policy,
        max_steps=EPISODE,
        num_trajectories=2,
        backend=backend,
        collector_kwargs={"traj_format": "cat"},
        **kwargs,
    )


def reward_of_an_episode(t) -> float:
    """By the statistics as they are. Rewards are 1, 2, 3, ..."""
    raw = torch.arange(1, EPISODE + 1)
    return ((raw - t.loc["reward"]) / t.scale["reward"]).sum().item()


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_an_evaluator_in_another_process(start_method, method, tmp_path):
    start_method(method)
    if method == "fork":
        make = EnvCreator(episodes)
    else:
        # The evaluator pickles an EnvCreator by value: a spawned process has copies of
        # the statistics, of torchrl's class too. Those in files are the same for all.
        VecNorm.build_td_for_shared_vecnorm(
            episodes(Compose()), ["next"], memmap=tmp_path / "statistics"
        )
        make = partial(episodes_of, tmp_path / "statistics")
    train = make()
    t = train.transform
    evaluating = evaluator(make, "process")
    try:
        train.rollout(2)
        for steps in (3, 7):
            train.rollout(steps)
            before = snapshot(t)
            reward = evaluating.evaluate()["eval/reward"]
            assert reward == pytest.approx(reward_of_an_episode(t), rel=1e-5)
            assert_same_state(snapshot(t), before)
    finally:
        evaluating.shutdown()


# --------------------------------------------------------------------------- weight sync


@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
def test_weight_sync_takes_the_statistics_along(fresh):
    train, other = pendulum(), pendulum()
    train.rollout(5)
    if not fresh:
        other.rollout(3)
        address = leaf(other.transform).data_ptr()
    strategy = WeightStrategy()
    weights = strategy.extract_weights(train.transform)
    strategy.apply_weights(other.transform, weights)
    assert_same_state(snapshot(other.transform), snapshot(train.transform))
    if not fresh:
        assert leaf(other.transform).data_ptr() == address


@pytest.mark.filterwarnings("ignore:VecNorm has no statistics yet")
def test_weight_sync_of_an_evaluator():
    train = episodes()
    evaluating = evaluator(episodes, "thread")
    try:
        for steps in (5, 7):
            train.rollout(steps)
            weights = WeightStrategy().extract_weights(train.transform)
            # The collector appends a StepCounter.
            result = evaluating.evaluate(weights_dict={"env.transform[0]": weights})
            expected = reward_of_an_episode(train.transform)
            assert result["eval/reward"] == pytest.approx(expected, rel=1e-5)
    finally:
        evaluating.shutdown()


def test_an_environment_for_inference():
    env = pendulum()
    env.rollout(20)
    before = snapshot(env.transform)
    loc, scale = env.transform.loc, env.transform.scale
    for transform in (env.transform.to_observation_norm(), env.transform.frozen_copy()):
        other = pendulum(transform)
        other.set_seed(0)
        raw = GymEnv(PENDULUM)
        raw.set_seed(0)
        expected = (raw.reset()["observation"] - loc["observation"]) / scale[
            "observation"
        ]
        torch.testing.assert_close(other.reset()["observation"], expected)
    assert_same_state(snapshot(env.transform), before)


# ----------------------------------------------------------------- buffers, and modules


@pytest.mark.parametrize("how", ["transform", "append_transform"])
def test_replay_buffer(how):
    t = VecNorm([("next", "observation"), "reward"], decay=1)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100),
        batch_size=16,
        transform=t if how == "transform" else None,
    )
    if how == "append_transform":
        buffer.append_transform(t)
    data = TensorDict(
        {
            ("next", "observation"): torch.randn(100, 3) + 5,
            "reward": torch.randn(100, 1),
        },
        batch_size=[100],
    )
    buffer.extend(data)
    assert t._td is None
    expected = Expected(1)
    for i in range(1, 5):
        sample = buffer.sample()
        assert count(t, "reward") == count(t, ("next", "observation")) == 16 * i
        raw = data["next", "observation"][sample["index"]]
        wanted = expected(raw)
        torch.testing.assert_close(sample["next", "observation"], wanted.float())
    # What is in the storage stays as it was.
    assert torch.equal(
        buffer._storage[:]["next", "observation"], data["next", "observation"]
    )


def test_replay_buffer_in_eval_mode():
    t = VecNorm(["observation"], decay=1)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), batch_size=5, transform=t
    )
    buffer.extend(TensorDict(observation=torch.randn(10, 3), batch_size=[10]))
    buffer.sample()
    t.eval()
    buffer.sample()
    assert count(t) == 5


def test_a_plain_module():
    t = VecNorm(["observation"], decay=1)
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    td = TensorDict(observation=x, batch_size=[2])
    assert t(td) is td
    assert td["observation"].tolist() == [[-1, -1], [1, 1]]
    # On a rollout, time is one more batch dimension.
    rollout = IntegerEnv(lengths=(50, 50)).rollout(10)
    t(rollout)
    assert count(t) == 2 + 20


class Critic(nn.Module):
    """Normalises what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RunningNorm(3)
        self.layer = nn.Linear(4, 1)

    def forward(self, observation, action):
        return self.layer(torch.cat([self.norm(observation), action], -1))


def _statistics_of_critics(batch: TensorDict, vmapped: bool) -> dict[str, torch.Tensor]:
    """Of two critics and their targets, in SAC's loss; each has seen the batch."""
    torch.manual_seed(0)
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(nn.Linear(3, 2), NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    loss = SACLoss(
        actor,
        ValueOperator(Critic(), in_keys=["observation", "action"]),
        action_spec=Bounded(-1, 1, (1,)),
        deactivate_vmap=not vmapped,
    )
    losses = loss(batch)
    losses["loss_qvalue"].backward()
    return {k: v for k, v in loss.state_dict().items() if ".stats." in k}


def test_critics_that_a_loss_stacks():
    """They are called through vmap, and learn what they learn one after the other."""
    end = torch.zeros(32, 1, dtype=torch.bool)
    root = {"observation": torch.randn(32, 3) + 5, "action": torch.rand(32, 1)}
    following = {"observation": torch.randn(32, 3), "reward": torch.randn(32, 1)}
    following |= {"done": end, "terminated": end}
    batch = TensorDict({**root, "next": following}, [32])
    got = _statistics_of_critics(batch, vmapped=True)
    want = _statistics_of_critics(batch, vmapped=False)
    assert len(want) == 10
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)
        assert not name.endswith("count") or (value > 0).all()


def test_it_works_where_the_reference_did():
    """Side by side through the same collector."""
    counts = []
    for t in (VecNorm(decay=1), reference(decay=1)):
        collector = Collector(
            pendulum(t), None, frames_per_batch=50, total_frames=500, device="cpu"
        )
        for _ in collector:
            pass
        collector.shutdown()
        counts.append((count(t), count(t, "reward")))
    # 500 frames are two and a half episodes.
    assert counts == [(500 + 3, 500)] * 2
