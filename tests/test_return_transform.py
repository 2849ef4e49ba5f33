# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""VecNormReturn in TorchRL's environments, against the formula one environment at a time."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchrl.envs
from common import AgentsEnv, IntegerEnv, through_a_file
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import (
    Compose,
    EnvCreator,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)

from torchrl_vecnorm import VecNorm, VecNormReturn

LENGTHS = (3, 5, 1_000, 4)


def make_env(*args, lengths=LENGTHS, **kwargs) -> TransformedEnv:
    return TransformedEnv(IntegerEnv(lengths), VecNormReturn(*args, **kwargs))


class Expected:
    """The returns of some environments, and the moments of all that were seen."""

    def __init__(self, n: int, gamma: float = 0.99) -> None:
        self.returns, self.gamma, self.seen = [0.0] * n, gamma, []

    def step(self, rewards, ends, clear="after", mask=None) -> list[float]:
        for i, (reward, end) in enumerate(zip(rewards, ends, strict=True)):
            if mask is not None and not mask[i]:
                continue
            past = 0.0 if end and clear == "before" else self.gamma * self.returns[i]
            self.returns[i] = past + reward
            self.seen.append(self.returns[i])
            if end and clear == "after":
                self.returns[i] = 0.0
        return [max(-10.0, min(10.0, reward / self.scale)) for reward in rewards]

    @property
    def scale(self) -> float:
        seen = torch.tensor(self.seen, dtype=torch.float64)
        return (seen.var(correction=0) + 1e-8).sqrt().item()


def follow(env, expected: Expected, steps: int, clear="after", td=None) -> TensorDict:
    """Steps with resets of what is done, as a collector takes them."""
    td = env.reset() if td is None else td
    for _ in range(steps):
        counted = env.base_env.steps[:, 0] + 1
        td, root = env.step_and_maybe_reset(env.rand_action(td))
        ends = td["next", "done"][:, 0].tolist()
        want = expected.step(counted.tolist(), ends, clear)
        torch.testing.assert_close(td["next", "reward"][:, 0], torch.tensor(want))
        for i, end in enumerate(ends):
            if end:  # it was reset
                expected.returns[i] = 0.0
        td = root
    returns = env.transform._returns["reward"][:, 0]
    torch.testing.assert_close(
        returns, torch.tensor(expected.returns, dtype=torch.float64)
    )
    return td


@pytest.mark.parametrize("clear", ["after", "before"])
def test_steps_and_partial_resets(clear):
    env, expected = make_env(gamma=0.9, clear=clear), Expected(4, 0.9)
    follow(env, expected, 23, clear)
    torch.testing.assert_close(env.transform.scale["reward"].item(), expected.scale)


def test_a_reset_clears_the_returns_alone():
    env, expected = make_env(), Expected(4)
    follow(env, expected, 7)
    scale = env.transform.scale["reward"]
    td = env.reset()
    assert not env.transform._returns["reward"].any()
    assert torch.equal(env.transform.scale["reward"], scale)
    expected.returns = [0.0] * 4
    td = follow(env, expected, 2, td=td)
    # Some of them.
    which = torch.tensor([True, False, False, True])
    env.reset(td.set("_reset", which[:, None]))
    returns = env.transform._returns["reward"][:, 0]
    assert returns.bool().tolist() == [False, True, True, False]


def test_a_partial_step():
    """Environments that stood still have nothing to say."""
    env, expected = make_env(lengths=(100,) * 3), Expected(3)
    td = env.reset()
    for step in range(4):
        mask = torch.tensor([True, step % 2 == 0, False])
        # Not through a batched environment, which steps all that it has.
        reward = torch.full((3, 1), step + 1.0)
        out = TensorDict(
            {"reward": reward, "done": torch.zeros(3, 1, dtype=torch.bool)}, [3]
        )
        env.transform._step(td.clone().set("_step", mask[:, None]), out)
        want = expected.step(reward[:, 0].tolist(), [False] * 3, mask=mask.tolist())
        torch.testing.assert_close(out["reward"][:, 0], torch.tensor(want))
    assert env.transform._moments["reward"].count.item() == 6


@pytest.mark.parametrize("how", ["eval", "freeze"])
def test_switched_off(how):
    env, expected = make_env(), Expected(4)
    td = follow(env, expected, 5)
    before = copy.deepcopy(env.transform.state_dict())
    env.eval() if how == "eval" else env.transform.freeze()
    td = env.step(env.rand_action(td))
    want = env.base_env.steps / env.transform.scale["reward"]
    torch.testing.assert_close(td["next", "reward"], want.float().clamp(-10, 10))
    assert_same(env.transform.state_dict(), before)
    # A reset ends episodes all the same.
    env.reset()
    assert not env.transform._returns["reward"].any()
    env.train() if how == "eval" else env.transform.unfreeze()
    expected.returns = [0.0] * 4
    follow(env, expected, 3)


def assert_same(a, b):
    for x, y in zip(a.values(), b.values(), strict=True):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            assert all(torch.equal(v, y[k]) for k, v in x.items())


def test_placing_is_not_switching_off():
    t = VecNormReturn()
    env = TransformedEnv(IntegerEnv(LENGTHS), Compose(RewardSum(), t))
    assert t.training
    env.rollout(3)
    assert t._moments["reward"].count.item() == 12


def test_agents():
    """Each end clears what it speaks of; agents are environments that share a scale."""
    key = ("agents", "reward")
    for done_each in (False, True):
        t = VecNormReturn([key])
        env = TransformedEnv(AgentsEnv(done_each=done_each), t)
        check_env_specs(env)
        env.reset()
        env.rollout(4)
        assert t._returns[key].shape == (3, 2, 1) and t.scale[key].shape == (1,)
        td = env.step(env.rand_action(env.reset()))
        done = ("next", "agents", "done") if done_each else ("next", "done")
        out = td["next"].clone()
        out[done[1:]] = torch.zeros_like(out[done[1:]])
        out[done[1:]][1, 0] = True
        t._step(td, out)
        cleared = ~t._returns[key][..., 0].bool()
        # The first agent of the first world has had no reward.
        assert cleared[1, 0] and bool(cleared[1, 1]) is not done_each
        assert not cleared[2].any()


def test_several_keys_and_out_keys():
    """Of several rewards each has its own scale; they are scaled in one call."""
    t = VecNormReturn(["reward", "cost"], ["r", "c"], done_keys=["over", "done"])
    td = TensorDict(
        reward=torch.tensor([[1.0], [2.0]]),
        cost=torch.randn(2, 3),
        over=torch.tensor([[True], [False]]),
        terminated=torch.tensor([[False], [False]]),
        done=torch.tensor([[False], [True]]),
        batch_size=[2],
    )
    t._step(TensorDict(batch_size=[2]), td)
    assert td["r"].shape == (2, 1) and td["c"].shape == (2, 3)
    assert t._returns["reward"].flatten().tolist() == [0.0, 2.0]
    assert t._returns["cost"].bool().all(1).tolist() == [True, False]
    assert t.scale["cost"].shape == (3,)
    td["reward"], td["cost"] = td["reward"], td["cost"].to(torch.complex64)
    before = copy.deepcopy(t.get_extra_state())
    with pytest.raises(TypeError, match="dense real"):
        t._step(TensorDict(batch_size=[2]), td)
    assert all(torch.equal(v, before[k]) for k, v in t.get_extra_state().items())


def test_ends_without_done():
    ends = {"terminated": [True, False], "truncated": [False, True]}
    td = TensorDict(
        reward=torch.ones(2, 1),
        **{k: torch.tensor(v)[:, None] for k, v in ends.items()},
        batch_size=[2],
    )
    t, b = VecNormReturn(), VecNormReturn(clear="before")
    for _ in range(2):
        for of in (t, b):
            of._step(TensorDict(batch_size=[2]), td.clone())
    assert not t._returns["reward"].any()
    # A truncation does not clear before: resets do.
    assert b._returns["reward"].flatten().tolist() == [1.0, pytest.approx(1.99)]
    with pytest.raises(KeyError, match=r"key 'reward': expected one of .*'done'"):
        t._step(TensorDict(), TensorDict(reward=torch.ones(2, 1), batch_size=[2]))
    with pytest.raises(KeyError, match="'reward' not found"):
        t._step(TensorDict(), TensorDict(r=torch.ones(2, 1), batch_size=[2]))


def test_other_environments_need_a_reset():
    t = make_env().transform
    end = {"done": torch.zeros(2, 1, dtype=torch.bool)}
    t._step(TensorDict(), TensorDict(reward=torch.ones(2, 1), **end, batch_size=[2]))
    other = TensorDict(
        reward=torch.ones(3, 1), done=torch.zeros(3, 1) > 0, batch_size=[3]
    )
    with pytest.raises(ValueError, match=r"key 'reward': expected rewards of .*\(2, 1"):
        t._step(TensorDict(), other)
    t._reset(TensorDict(batch_size=[3]), TensorDict(batch_size=[3]))
    t._step(TensorDict(), other)
    assert t._moments["reward"].count.item() == 5


def step_of(reward, done=None) -> TensorDict:
    """What an environment gives."""
    done = torch.zeros(len(reward), 1, dtype=torch.bool) if done is None else done
    return TensorDict(reward=reward, done=done, batch_size=[len(reward)])


@pytest.mark.parametrize("first", ["rollout", "load", "to"])
def test_what_inference_mode_has_begun_goes_on_outside(first):
    env, other = make_env(), make_env()
    other.rollout(3)
    with torch.inference_mode():
        if first == "rollout":
            env.rollout(3)
        elif first == "load":
            env.load_state_dict(other.state_dict())
        else:
            (env := other).to("cpu")
    env.rollout(2)
    assert env.transform._moments["reward"].count.item() == 5 * 4
    with torch.inference_mode():
        env.rollout(2)
    env.reset()
    assert not env.transform._returns["reward"].any()


def test_an_error_begins_nothing():
    """Named, and the next call may be of another shape."""
    t = VecNormReturn()
    for bad, match in (
        (step_of(torch.zeros(4, 3).cfloat()), "key 'reward': expected dense real"),
        (
            step_of(torch.zeros(4, 3), torch.zeros(4)),
            "key 'reward': expected bool dones",
        ),
        (
            TensorDict(reward=torch.zeros(4, 3), done=torch.zeros(3, 1) > 0),
            "key 'reward': expected 'done' of a shape",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=match) as error:
            t._step(TensorDict(), bad)
        assert "VecNormReturn: " in str(error.value)
        assert not t.get_extra_state() and not t._begun
    t._step(TensorDict(), step_of(torch.ones(4, 1)))
    with pytest.raises(ValueError, match="VecNormReturn: key 'reward': expected feat"):
        t(TensorDict(reward=torch.zeros(4, 3), batch_size=[4]))


@pytest.mark.parametrize("done", [(4,), (4, 1), (4, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_shapes_and_dtypes(done, dtype):
    """Of rewards that are columns, or expanded; ends of any shape that begins with [4]."""
    t = VecNormReturn()
    for reward in (torch.randn(4, 6)[:, ::3], torch.ones(1, 1).expand(4, 2)):
        td = step_of(reward.to(dtype), torch.ones(done, dtype=torch.bool))
        t._step(TensorDict(), td)
        assert td["reward"].dtype == dtype and not t._returns["reward"].any()
    assert t._moments["reward"].count.item() == 8


@pytest.mark.parametrize("envs", [(), (0,), (1,), (2, 3)], ids=str)
def test_any_number_of_environments(envs):
    t = VecNormReturn()
    for feature in ((1,), ()):
        td = TensorDict(
            reward=torch.ones((*envs, *feature)),
            done=torch.zeros(*envs, 1, dtype=torch.bool),
            batch_size=envs,
        )
        t._step(TensorDict(batch_size=envs), td)
        assert t._returns["reward"].shape == (*envs, *feature)
        assert t._moments["reward"].count.item() == torch.Size(envs).numel()
        t = VecNormReturn()


def test_gradients_and_numbers_that_change():
    t, reward = VecNormReturn(clip=None), torch.randn(4, 1, requires_grad=True)
    td = step_of(reward * 2)
    t._step(TensorDict(), td)
    td["reward"].sum().backward()
    torch.testing.assert_close(
        reward.grad, (2 / t.scale["reward"]).float().expand(4, 1)
    )
    assert not t._returns["reward"].requires_grad
    before = t._returns["reward"].clone()
    t.decay, t.gamma = 0.5, 0.25
    t._step(TensorDict(), step_of(torch.ones(4, 1)))
    assert t._moments["reward"].count.item() == 2 + 4
    torch.testing.assert_close(t._returns["reward"], 0.25 * before + 1)
    for name in ("decay", "gamma"):
        setattr(t, name, 2.0)
        with pytest.raises(ValueError, match=f"expected {name} in"):
            t._step(TensorDict(), step_of(torch.ones(4, 1)))
        setattr(t, name, 0.5)
    assert t._moments["reward"].count.item() == 6


def test_compile():
    """From the first step on, without a graph break."""
    eager, other = VecNormReturn(), VecNormReturn()
    compiled = torch.compile(other._step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        td = step_of(torch.randn(4, 1), torch.rand(4, 1) < 0.3)
        root, a, b = TensorDict(batch_size=[4]), td.clone(), td.clone()
        torch.testing.assert_close(
            compiled(root, a)["reward"], eager._step(root, b)["reward"]
        )
    assert_same(eager.state_dict(), other.state_dict())


@pytest.mark.parametrize("make", [make_env, partial(make_env, lengths=())])
def test_specs(make):
    env = make(["reward"], ["scaled"])
    check_env_specs(env)
    assert "scaled" in env.full_reward_spec and env.reward_keys == ["reward", "scaled"]
    check_env_specs(make())


def test_offline():
    """A replay buffer's samples are in no order: they are scaled, and nothing changes."""
    env = make_env()
    env.rollout(5)
    before = copy.deepcopy(env.transform.get_extra_state())
    t = env.transform.clone()
    td = t(TensorDict(reward=torch.ones(7, 5, 1), batch_size=[7, 5]))
    want = (1 / t.scale["reward"]).float().expand(7, 5, 1)
    torch.testing.assert_close(td["reward"], want)
    after = env.transform.get_extra_state()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    # Nothing was seen.
    td = VecNormReturn()(TensorDict(reward=torch.ones(3, 1), batch_size=[3]))
    torch.testing.assert_close(td["reward"], torch.ones(3, 1))


# --------------------------------------------------------------- copies, checkpoints


def test_checkpoint():
    """Going on after a load is to the bit what going on without it would have been."""
    env, other = make_env(), make_env()
    td = env.rollout(7, break_when_any_done=False)
    state = through_a_file(env.state_dict())
    assert "reward_returns" in state["_extra_state"]
    other.load_state_dict(state)
    out = TensorDict(
        reward=torch.randn(4, 1), done=torch.rand(4, 1) < 0.5, batch_size=[4]
    )
    for _ in range(3):
        a, b = out.clone(), out.clone()
        env.transform._step(td, a)
        other.transform._step(td, b)
        assert torch.equal(a["reward"], b["reward"])
    assert_same(env.transform.state_dict(), other.transform.state_dict())
    # Into other environments: the statistics, and returns that begin anew.
    small = make_env(lengths=(3,))
    small.load_state_dict(state)
    small.rollout(3)
    assert small.transform._returns["reward"].shape == (1, 1)
    assert small.transform._moments["reward"].count.item() == 7 * 4 + 3


def test_loading_writes_in_place_or_nothing():
    env = make_env()
    env.rollout(5)
    t = env.transform
    good, live = through_a_file(t.get_extra_state()), t.get_extra_state()
    before = copy.deepcopy(live)
    for change, error, match in (
        ({"reward_ssq": -good["reward_ssq"]}, ValueError, "reward_ssq"),
        ({"reward_sum": torch.zeros(2)}, ValueError, "reward_sum"),
        ({"reward_sum": None}, KeyError, "reward_sum"),
        ({"reward_returns": torch.full((4, 1), torch.inf)}, ValueError, "finite"),
        ({"reward_returns": torch.zeros(4, 3)}, ValueError, "expected features"),
        ({"other_sum": torch.zeros(1)}, KeyError, "no in_key.*other_sum"),
    ):
        with pytest.raises(error, match=match):
            t.set_extra_state({**good, **change})
        assert all(torch.equal(v, before[k]) for k, v in live.items())
    with pytest.raises(KeyError, match="reward_sum"):
        t.set_extra_state({})
    good["reward_count"] += 1
    t.set_extra_state(good)
    assert live["reward_count"] == before["reward_count"] + 1
    assert t._moments["reward"].count is live["reward_count"]
    VecNormReturn().load_state_dict(VecNormReturn().state_dict())


def test_copies():
    env, expected = make_env(), Expected(4)
    follow(env, expected, 5)
    t = env.transform
    for copied in (t.clone(), copy.copy(t), t.frozen_copy()):
        assert copied._moments is t._moments and not copied._returns
    assert t.frozen_copy().frozen and not t.frozen
    for copied in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert_same(copied.state_dict(), t.state_dict())
        assert copied._returns["reward"] is not t._returns["reward"]
    assert t.half()._moments["reward"].sum.dtype == torch.float64


@pytest.mark.parametrize(
    "kind", [SerialEnv, pytest.param(ParallelEnv, marks=pytest.mark.slow)]
)
def test_around_several_environments(kind):
    env = TransformedEnv(kind(2, partial(IntegerEnv, (3,))), VecNormReturn())
    try:
        env.rollout(6, break_when_any_done=False)
        assert env.transform._moments["reward"].count.item() == 12
    finally:
        env.close(raise_if_closed=False)


@pytest.mark.slow
def test_in_workers():
    """Each has statistics of its own, which begin with those of EnvCreator's trial."""
    env = ParallelEnv(2, EnvCreator(partial(make_env, lengths=(3,))))
    try:
        td = env.rollout(6, break_when_any_done=False)
        assert td["next", "reward"].isfinite().all()
        states = env.state_dict()
        for worker in ("worker0", "worker1"):
            assert states[worker]["_extra_state"]["reward_count"].item() == 7
    finally:
        env.close(raise_if_closed=False)


def test_collector():
    env = make_env(lengths=(3, 5))
    collector = Collector(env, env.rand_action, frames_per_batch=8, total_frames=24)
    frames = sum(td.numel() for td in collector)
    assert env.transform._moments["reward"].count.item() == frames == 24


def test_with_observations():
    env = TransformedEnv(
        IntegerEnv(LENGTHS), Compose(VecNorm(["observation"]), VecNormReturn())
    )
    check_env_specs(env)
    assert isinstance(env.transform[1], torchrl.envs.VecNorm)  # evaluators freeze it


@pytest.mark.parametrize(
    "options,match",
    [
        ({"gamma": 2.0}, "expected gamma in"),
        ({"decay": 0.0}, "expected decay in"),
        ({"clear": "x"}, "expected clear"),
        ({"in_keys": ["a", "a"]}, "expected in_keys that differ"),
        ({"out_keys": ["a", "b"]}, "expected out_keys to match"),
        ({"done_keys": []}, "expected done_keys to match"),
    ],
)
def test_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        VecNormReturn(**options)


def test_repr():
    assert repr(VecNormReturn(gamma=0.9)).startswith("VecNormReturn(gamma=0.9, clear='")
