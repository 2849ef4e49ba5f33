# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""``VecNormV2``: section 8 of the contract.

Against sums in long double, against torchrl's own class where that is right, and against
our own ``VecNorm`` where both keep the same.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchrl.envs
from common import (
    PATIENCE,
    IntegerEnv,
    assert_same_state,
    snapshot,
    started,
    through_a_file,
)
from tensordict import TensorDict
from torch import multiprocessing as mp
from torch.fx.experimental.proxy_tensor import make_fx
from torchrl.envs import (
    EnvCreator,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)

from torchrl_vecnorm import VecNorm, VecNormV2

KEYS = ["observation", ("agents", "reward")]
SHAPES = {"observation": (3,), ("agents", "reward"): (1,)}


def batch(seed: int, size=(4,), dtype=torch.float64) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    td = TensorDict(batch_size=size)
    for i, key in enumerate(KEYS):
        x = torch.randn(*size, *SHAPES[key], generator=generator, dtype=torch.float64)
        td[key] = ((i + 1) * x + 3 * i).to(dtype)
    return td


def theirs(*args, **kwargs):
    """torchrl's class."""
    return torchrl.envs.VecNormV2(*args, **kwargs)


class Exact:
    """The equations of section 8 for one key, by the letter, in long double."""

    def __init__(self, decay: float, reduced: bool, eps: float = 1e-4) -> None:
        self.decay, self.reduced, self.eps = np.longdouble(decay), reduced, eps
        self.first = self.second = np.longdouble(0)
        self.count = 0

    def __call__(self, x: torch.Tensor) -> None:
        """Takes ``[samples, *features]``."""
        x = x.double().numpy().astype(np.longdouble)
        n = len(x) if self.reduced else 1
        total, squares = x, x * x
        if self.reduced:
            total, squares = total.sum(0), squares.sum(0)
        self.count += n
        keep, weight = np.longdouble(1), np.longdouble(1)
        if self.decay < 1:
            keep = self.decay**n
            weight = (1 - keep) / n
        self.first = keep * self.first + weight * total
        self.second = keep * self.second + weight * squares

    @property
    def weight(self):
        return self.count if self.decay == 1 else 1 - self.decay**self.count

    @property
    def loc(self) -> np.ndarray:
        return self.first / self.weight

    @property
    def scale(self) -> np.ndarray:
        var = self.second / self.weight - self.loc**2
        return np.maximum(np.sqrt(np.maximum(var, 0)), self.eps)


# ------------------------------------------------------------------------- arithmetic


def check_against_exact(
    calls, decay, reduced, mean=0.0, dtype=torch.float64, rtol=1e-9
):
    t = VecNormV2(["a"], decay=decay, reduce_batch_dims=reduced)
    exact = Exact(decay, reduced)
    generator = torch.Generator().manual_seed(0)
    for _ in range(calls):
        x = torch.randn(5, 2, generator=generator, dtype=torch.float64) + mean
        x = (x if dtype.is_floating_point else 10 * x).to(dtype)
        td = t(TensorDict(a=x, batch_size=[5]))
        exact(x)
    state = t._statistics.store.moments(t._statistics.keys[0].names)
    loc, var = state.mean_var()
    scale = np.maximum(np.sqrt(var.numpy()), t.eps)
    np.testing.assert_allclose(loc.numpy(), exact.loc.astype(float), rtol, rtol)
    if calls > 1 or reduced:
        np.testing.assert_allclose(scale, exact.scale.astype(float), max(rtol, 1e-3))
    assert t._count["a"].item() == exact.count
    if decay < 1:
        weight = float(exact.weight)
        assert state.samples().item() == pytest.approx(weight, rel=1e-9)
    assert td["a"].isfinite().all()
    assert td["a"].dtype == (dtype if dtype.is_floating_point else torch.float32)
    return td["a"], (x.double().numpy() - exact.loc) / exact.scale


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999, 1 - 1e-8, 1])
@pytest.mark.parametrize("calls", [1, 2, 300])
def test_against_long_double(calls, decay, reduced):
    y, expected = check_against_exact(calls, decay, reduced)
    if calls > 1:
        np.testing.assert_allclose(y.numpy(), expected.astype(float), 1e-6, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999, 1])
def test_ten_thousand_calls(decay, reduced):
    check_against_exact(10_000, decay, reduced)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1])
def test_far_from_zero(decay, reduced):
    """float32 values, mean / std = 1e5."""
    check_against_exact(100, decay, reduced, 1e5, torch.float32)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
)
@pytest.mark.parametrize("reduced", [False, True])
def test_dtypes(dtype, reduced):
    check_against_exact(20, 0.9, reduced, 5.0, dtype)


def test_the_reference_takes_loc_away_before_it_divides():
    """N(100, 1): torchrl's scale is some 40 times too large for long."""
    ours, reference = (make(["a"], decay=0.99) for make in (VecNormV2, theirs))
    for i in range(200):
        x = 100 + torch.randn(1, generator=torch.Generator().manual_seed(i)).double()
        td = TensorDict(a=x)
        ours(td.clone()), reference._step(td.clone(), td.clone())
    assert reference.scale["a"].item() > 10
    assert 0.8 < ours.scale["a"].item() < 1.2


@pytest.mark.parametrize("reduced", [False, True])
def test_first_call_constants_and_no_data(reduced):
    t = VecNormV2(["a"], decay=0.99, reduce_batch_dims=reduced)
    x = TensorDict(a=torch.full((4, 2), 7.0), batch_size=[4])
    with pytest.warns(UserWarning, match="no statistics yet"):
        assert torch.equal(t.freeze()(x.clone())["a"], x["a"])
    t.unfreeze()
    for _ in range(3):
        assert t(x.clone())["a"].abs().max() < 1e-6
    assert t.scale["a"].unique().item() == pytest.approx(1e-4)


def test_forgotten_at_once():
    """0.9 to the power of the samples is no float any more."""
    t = VecNormV2(["a"], decay=0.9, reduce_batch_dims=True)
    for mean in (100.0, 0.0):
        x = torch.randn(10_000, 1, dtype=torch.float64) + mean
        t(TensorDict(a=x, batch_size=[10_000]))
    torch.testing.assert_close(t.loc["a"], x.mean(0))
    assert t._count["a"].item() == 20_000


@pytest.mark.parametrize("reduced", [False, True])
def test_values_that_are_not_finite(reduced):
    t, expected = (VecNormV2(["a"], decay=0.9, reduce_batch_dims=reduced) for _ in "ab")
    for i in range(5):
        x = batch(i)["observation"]
        expected(TensorDict(a=x[:, :2], batch_size=[4]))
        x[2, 2] = math.nan
        t(TensorDict(a=x, batch_size=[4]))
    assert torch.equal(t.loc["a"][..., :2], expected.loc["a"])
    assert t.nonfinite["a"].sum() == 5 and t.scale["a"].isfinite().all()


# --------------------------------------------------------------------- partial resets


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("decay", [0.9, 1])
@pytest.mark.parametrize("reduced", [False, True])
def test_only_rows_that_are_reset_count(reduced, decay, compiled):
    t, expected = (
        VecNormV2(KEYS, decay=decay, reduce_batch_dims=reduced) for _ in "ab"
    )
    mask = torch.tensor([True, False, False, True])
    td = TensorDict(_reset=mask.unsqueeze(-1), batch_size=[4])
    t(batch(0)), expected(batch(0))
    before = t.loc["observation"].clone()
    torch._dynamo.reset()
    reset = torch.compile(t._reset, backend="aot_eager", fullgraph=True)
    (reset if compiled else t._reset)(td, batch(1))
    if reduced:
        expected(batch(1)[mask])
        for key in KEYS:
            torch.testing.assert_close(t.loc[key], expected.loc[key])
            torch.testing.assert_close(t.scale[key], expected.scale[key])
            assert t._count[key] == expected._count[key] == 6
        return
    assert torch.equal(t.loc["observation"][~mask], before[~mask])
    # Whoever was not reset goes on as if nothing had happened.
    other = expected.clone()
    expected(batch(1))
    for one in (t, expected, other):
        one(batch(2))
    for rows, right in ((mask, expected), (~mask, other)):
        for key in KEYS:
            torch.testing.assert_close(t.loc[key][rows], right.loc[key][rows])
            torch.testing.assert_close(t.scale[key][rows], right.scale[key][rows])


def test_a_trace_asks_for_no_count():
    """How many rows are reset is for the graph to find out, each time."""
    t = trained(reduced=True)

    def call(x, mask):
        values = TensorDict(batch_size=[4])
        values[KEYS[0]] = x
        return t._reset(TensorDict(_reset=mask, batch_size=[4]), values)[KEYS[0]]

    x = batch(0)["observation"]
    graph = make_fx(call)(x, torch.ones(4, 1, dtype=torch.bool))
    expected = t.clone()
    for some in ([True, False, True, True], [False, True, False, False]):
        mask = torch.tensor(some).unsqueeze(-1)
        values = TensorDict(observation=x, batch_size=[4])
        y = expected._reset(TensorDict(_reset=mask, batch_size=[4]), values)
        torch.testing.assert_close(graph(x, mask), y["observation"])


def test_a_partial_reset_takes_the_short_way(monkeypatch):
    t = trained(reduced=True)
    td = TensorDict(_reset=torch.tensor([[1], [0], [0], [1]]).bool(), batch_size=[4])
    t._reset(td, batch(0, dtype=torch.float32))
    before = t._count["observation"].item()

    def long_way(*args, **kwargs):
        raise AssertionError("the long way")

    monkeypatch.setattr(t._statistics, "normalize", long_way)
    t._reset(td, batch(1, dtype=torch.float32))
    assert t._count["observation"].item() == before + 2


@pytest.mark.parametrize("how", ["all keys", "one key", "one is missing", "no row"])
@pytest.mark.parametrize("decay", [0.9, 1])
def test_how_many_count_at_each_reset(decay, how):
    """Of other keys, of none, and at the first call of all."""
    t, expected = (
        VecNormV2(KEYS, decay=decay, reduce_batch_dims=True) for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    if how == "no row":
        t(batch(9)), expected(batch(9))
    for i in range(6):
        mask = torch.rand(4, generator=generator) < (0 if how == "no row" else 0.5)
        td, values = TensorDict(batch_size=[4]), batch(i)
        # A mask of the agents says nothing of what is not theirs: no row of it is reset.
        name = ("agents", "_reset") if how == "one key" else "_reset"
        td[name] = mask.unsqueeze(-1)
        said = KEYS[1:] if how == "one key" else KEYS
        if how == "one is missing":
            said = KEYS[:1]
            values = values.exclude(KEYS[1])
        expected._reset(TensorDict(), values[mask].select(*said))
        given = values.clone()
        y = t._reset(td, given)
        for key in said:
            assert torch.equal(t._count[key], expected._count[key])
            torch.testing.assert_close(t.loc[key], expected.loc[key])
            torch.testing.assert_close(t.scale[key], expected.scale[key])
            right = (values[key] - t.loc[key]) / t.scale[key]
            torch.testing.assert_close(y[key], right)
        if i == 2:  # from here on there are statistics of all keys
            t(batch(8)), expected(batch(8))


# ------------------------------------------------------------------------ checkpoints


def same(a, b, rtol: float) -> None:
    for key in KEYS:
        torch.testing.assert_close(a.loc[key], b.loc[key], rtol=rtol, atol=rtol)
        torch.testing.assert_close(a.scale[key], b.scale[key], rtol=rtol, atol=rtol)


def trained(decay=0.9, reduced=False, calls=20, dtype=torch.float32) -> VecNormV2:
    t = VecNormV2(KEYS, decay=decay, reduce_batch_dims=reduced)
    for i in range(calls):
        t(batch(i, dtype=dtype))
    return t


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1])
def test_checkpoints_of_the_reference(decay, reduced):
    """There and back again, and on."""
    ours = trained(decay, reduced)
    options = dict(decay=decay, reduce_batch_dims=reduced)
    reference = theirs(KEYS, **options)
    for i in range(20):
        td = batch(i, dtype=torch.float32)
        reference._step(td, td.clone())
    here, there = VecNormV2(KEYS, **options), theirs(KEYS, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not shared
        here.load_state_dict(copy.deepcopy(reference.state_dict()))
        there.load_state_dict(copy.deepcopy(ours.state_dict()))
    for i in range(20, 25):
        td = batch(i, dtype=torch.float32)
        ours(td.clone()), here(td.clone())
        reference._step(td, td.clone()), there._step(td, td.clone())
    same(here, ours, 1e-3)
    assert (here._count == ours._count).all() and (here._count == there._count).all()
    for name in ("_loc", "_var"):
        for key in KEYS:
            expected = getattr(reference, name)[key]
            torch.testing.assert_close(
                getattr(there, name)[key], expected, rtol=1e-4, atol=1e-5
            )


@pytest.mark.filterwarnings("ignore:VecNorm wasn't initialized")
@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(lambda t: pickle.loads(pickle.dumps(t)), id="pickle"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(VecNormV2.clone, id="clone"),
        pytest.param(lambda t: loaded(VecNormV2(KEYS, decay=0.9), t), id="new"),
        pytest.param(lambda t: loaded(trained(calls=3), t), id="in place"),
    ],
)
def test_save_load_continue(copied):
    t = trained()
    other = copied(t)
    y, z = t(batch(50)), other(batch(50))
    assert all(torch.equal(y[key], z[key]) for key in KEYS)
    assert_same_state(snapshot(other), snapshot(t))


def loaded(target: VecNormV2, source: VecNormV2) -> VecNormV2:
    before = {} if target._td is None else dict(target._td.items(True, True))
    target.load_state_dict(through_a_file(source.state_dict()))
    for name, leaf in before.items():
        assert target._td[name] is leaf  # in place
    return target


@pytest.mark.parametrize("decay", [0.9, 1])
def test_from_and_to_our_other_class(decay):
    """One sample a call: there both forget alike."""
    t = trained(decay)
    v1 = VecNorm(KEYS, decay=decay, shapes=[(4, *SHAPES[key]) for key in KEYS])
    back = VecNormV2(KEYS, decay=decay)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v1.set_extra_state(t.consistent_state_dict())
    same(v1, t, 1e-6)
    v1(batch(30)), t(batch(30))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "VecNorm wasn't initialized")
        back.set_extra_state(v1.consistent_state_dict())
    v1(batch(31)), t(batch(31)), back(batch(31))
    same(v1, t, 1e-6), same(back, t, 1e-6)
    assert (back._count == t._count).all()


@pytest.mark.parametrize("value", [math.nan, -1.0, None, "shape"])
@pytest.mark.parametrize("field", ["sum", "ssq", "weight", "nonfinite", "central"])
def test_bad_checkpoints(field, value):
    if field == "sum" and value == -1.0:
        return  # a sum may be
    t = trained()
    before = snapshot(t)
    state = t.consistent_state_dict()
    name = f"{field}{VecNormV2.SEP}observation"
    if value is None:
        del state[name]
    elif value == "shape":
        state[name] = state[name][..., :1][:1]
    else:
        state[name].flatten()[0] = value
    with pytest.raises((KeyError, ValueError), match=name):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), before)


def test_empty_states():
    t = VecNormV2(KEYS)
    with pytest.warns(UserWarning, match="uninitialized"):
        empty = t.state_dict()
    assert not t.initialized and not empty["initialized"]
    t.load_state_dict(empty)
    t(batch(0))
    assert t.initialized and t.state_dict()["initialized"]
    with pytest.raises(RuntimeError, match="void state-dict"):
        t.load_state_dict(empty)


# ----------------------------------------------------------------------- environments


@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("batched", [False, True])
def test_specs(batched, stateful):
    env = IntegerEnv((3, 5)) if batched else IntegerEnv()
    keys = ["observation", "reward"]
    env = TransformedEnv(env, VecNormV2(keys, stateful=stateful))
    check_env_specs(env)
    env = env.append_transform(VecNormV2(["reward"], ["again"], stateful=stateful))
    check_env_specs(env)


def test_an_environment_begins_with_statistics_of_nothing():
    t = VecNormV2(["observation", "reward"])
    assert t._loc is None and not t.initialized
    TransformedEnv(IntegerEnv(), t)
    assert t.initialized and t._loc["observation"].eq(0).all()
    assert t._count["reward"] == 0
    assert t.scale["observation"].eq(1).all()


def test_stateless_is_the_same():
    """Step for step, through partial resets: torchrl's class begins anew there."""
    rollouts, transforms = [], []
    for stateful in (True, False):
        t = VecNormV2(["observation"], ["normal"], decay=0.9, stateful=stateful)
        env = TransformedEnv(IntegerEnv((3, 5)), t)
        rollouts.append(env.rollout(12, break_when_any_done=False))
        transforms.append(t)
    torch.testing.assert_close(
        rollouts[0]["next", "normal"], rollouts[1]["next", "normal"]
    )
    count = rollouts[1]["next", "_vecnorm_count", "observation"][:, -1]
    # 12 steps and the resets: at the beginning, then of each after its own steps.
    assert count[:, 0].tolist() == [13 + 3, 13 + 2]
    torch.testing.assert_close(
        rollouts[1]["next", "_vecnorm_loc", "observation"][:, -1]
        / (1 - 0.9 ** count.double()),
        transforms[0].loc["observation"].double(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_stateless_has_no_statistics():
    t = VecNormV2(["observation"], stateful=False)
    assert sorted(t.in_keys[1:]) == ["_vecnorm_count", "_vecnorm_loc", "_vecnorm_var"]
    assert t.get_extra_state() == {} and "initialized" not in t.state_dict()
    for name in ("loc", "scale"):
        with pytest.raises(RuntimeError, match="stateful"):
            getattr(t, name)
    with pytest.raises(NotImplementedError):
        t.denorm(TensorDict())
    with pytest.raises(NotImplementedError):
        VecNormV2(["a"], stateful=False, shared_data=TensorDict())
    with pytest.raises(RuntimeError, match="reduce_batch_dims"):
        VecNormV2(["a"], stateful=False, reduce_batch_dims=True)


def make_env():
    keys = ["observation", "reward"]
    return TransformedEnv(IntegerEnv(), VecNormV2(keys, decay=0.9))


def work(creator, steps, queue):
    env = creator()
    env.rollout(steps)
    queue.put(True)


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_env_creator_loses_no_update(method):
    creator = EnvCreator(make_env)
    local = creator()
    context = mp.get_context(method)
    queue = context.Queue()
    arguments = [(creator, 200, queue)] * 2
    with started(context, work, arguments):
        for _ in arguments:
            queue.get(timeout=PATIENCE)
    t = local.transform
    # Of the creator a reset and a step, of each worker a reset and its steps.
    assert t._count["observation"] == 2 + 2 * 201
    assert t._count["reward"] == 1 + 2 * 200
    # What torchrl's class would have is shared too.
    state = creator.state_dict()["_extra_state"]
    assert state[f"count{VecNormV2.SEP}observation"] == 2 + 2 * 201
    loc = state[f"loc{VecNormV2.SEP}observation"]
    assert torch.equal(loc, t._loc["observation"])


def test_batched_envs():
    env = TransformedEnv(
        SerialEnv(2, IntegerEnv), VecNormV2(["observation"], reduce_batch_dims=True)
    )
    env.rollout(10)
    assert env.transform._count["observation"] == 2 * 11
    assert isinstance(env.transform, torchrl.envs.VecNormV2)


# --------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("reduced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_whole(reduced):
    """Also the first call."""
    torch._dynamo.reset()
    t, expected = (VecNormV2(KEYS, decay=0.9, reduce_batch_dims=reduced) for _ in "ab")
    call = torch.compile(t, fullgraph=True, backend="aot_eager")
    for i in range(4):
        y, z = call(batch(i)), expected(batch(i))
        assert all(torch.allclose(y[key], z[key]) for key in KEYS)
    for i in range(2):  # of another size, and in eager mode between
        for size in ((6,), (4,)) if reduced else ((4,),):
            call(batch(i, size)), expected(batch(i, size))
            t(batch(i, size)), expected(batch(i, size))
    # Where sizes are symbolic, in plain torch.
    for name, leaf in snapshot(expected).items():
        torch.testing.assert_close(snapshot(t)[name], leaf)


def test_compiled_whole_without_statistics():
    torch._dynamo.reset()
    t = VecNormV2(KEYS, decay=0.9, stateful=False)
    expected = VecNormV2(KEYS, decay=0.9)
    step = torch.compile(t._step, fullgraph=True, backend="aot_eager")
    td = TensorDict(batch_size=[4])
    for i in range(4):
        following = step(td, batch(i))
        z = expected(batch(i))
        assert all(torch.allclose(following[key], z[key]) for key in KEYS)
        td = following


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1])
def test_without_statistics_far_from_zero(decay, compiled):
    """mean / std = 1e5, where a weight of a relative 1e-12 off shows.

    That is what torch.compile makes of ``expm1`` on a CPU up to torch 2.13: ``exp - 1``.
    """
    torch._dynamo.reset()
    step = VecNormV2(["a"], decay=decay, stateful=False)._step
    if compiled:
        step = torch.compile(step, fullgraph=True)
    exact = Exact(decay, reduced=False)
    generator = torch.Generator().manual_seed(0)
    td = TensorDict(batch_size=[5])
    for _ in range(100):
        x = torch.randn(5, 7, generator=generator, dtype=torch.float64) + 1e5
        td = step(td, TensorDict(a=x, batch_size=[5]))
        exact(x)
        if exact.count > 1:
            expected = (x.numpy() - exact.loc) / exact.scale
            np.testing.assert_allclose(td["a"], expected.astype(float), 0, 1e-3)


def test_values_without_statistics_that_no_sum_holds():
    """As where there are statistics: left out."""
    step = VecNormV2(["a"], decay=0.9, stateful=False)._step
    td = TensorDict(batch_size=[3])
    for i in range(4):
        x = torch.tensor([i, 2.0 * i, -i], dtype=torch.float64)
        x[i % 2] = 1e200
        td = step(td, TensorDict(a=x, batch_size=[3]))
    assert td["_vecnorm_count", "a"].tolist() == [2, 2, 4]
    assert td["_vecnorm_var", "a"].max() < 100


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize("decay", [0, 1.5, math.nan, -0.1])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay"):
        VecNormV2(["a"], decay=decay)


def test_another_batch_size_is_refused():
    """Where each element of a batch has statistics of its own."""
    t = trained()
    before = snapshot(t)
    for size in ((3,), (2, 4)):
        with pytest.raises(ValueError, match="expected features of shape"):
            t(batch(0, size))
    assert_same_state(snapshot(t), before)


def test_shared_data_is_where_it_begins():
    source = trained()
    td = TensorDict(
        {name: getattr(source, f"_{name}") for name in ("loc", "var", "count")}
    )
    t = VecNormV2(KEYS, decay=0.9, shared_data=td)
    same(t, source, 1e-5)
    t(batch(1)), source(batch(1))
    same(t, source, 1e-5)


def test_frozen_copy_and_denorm():
    t = trained(dtype=torch.float64)
    frozen = t.frozen_copy()
    y = frozen(batch(7))
    t(batch(8))
    assert torch.equal(frozen(batch(7))["observation"], y["observation"])
    torch.testing.assert_close(frozen.denorm(y)["observation"], batch(7)["observation"])
    norm = frozen.to_observation_norm()
    z = norm(batch(7))
    assert all(torch.allclose(z[key], y[key]) for key in KEYS)
    with pytest.raises(RuntimeError, match="initialized"):
        VecNormV2(KEYS).frozen_copy()


def test_a_decay_that_is_set():
    t, expected = VecNormV2(["a"], decay=0.9), Exact(0.9, False)
    for decay in (0.9, 0.9, 0.5, 0.5):
        t.decay = decay
        expected.decay = np.longdouble(decay)
        x = batch(1)["observation"]
        t(TensorDict(a=x, batch_size=[4])), expected(x)
    np.testing.assert_allclose(
        t._loc["a"].numpy() / t._statistics.td["weight", "a"][0].item(),
        t.loc["a"].numpy(),
    )
    assert t._count["a"] == 4
