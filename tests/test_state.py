# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The transform without an environment: its state, what travels, and bad input.

Sections 2 and 5 of the contract.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import multiprocessing.synchronize
import pickle
import pydoc
import re
import sys
import threading
import warnings
from fractions import Fraction

import numpy
import pytest
import torch
import torchrl.envs
from common import (
    FIELDS,
    PATIENCE,
    Expected,
    IntegerEnv,
    assert_same_state,
    count,
    leaf,
    reference,
    snapshot,
    through_a_file,
)
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    TensorDict,
    lazy_stack,
    tensorclass,
)
from tensordict.nn import TensorDictSequential
from torch import multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    ObservationNorm,
    TransformedEnv,
)
from torchrl.testing.mocking_classes import CountingEnv

from torchrl_vecnorm import VecNorm, VecNormV2, functional
from torchrl_vecnorm.moments import Moments
from torchrl_vecnorm.statistics.store import Store

NESTED = ("agents", "observation")
KEYS = ["observation", NESTED, "reward"]
SEP = VecNorm.SEP


def batch(seed: int = 0, samples: int = 4, dtype=torch.float32) -> TensorDict:
    """A tensordict with all of KEYS."""
    generator = torch.Generator().manual_seed(seed)

    def values(*features):
        x = torch.randn(samples, *features, generator=generator, dtype=torch.float64)
        return (3 + 2 * x).to(dtype)

    return TensorDict(
        {"observation": values(3), NESTED: values(2, 3), "reward": values(1)},
        batch_size=[samples],
    )


def trained(n: int = 5, keys=KEYS, **kwargs) -> VecNorm:
    t = VecNorm(in_keys=list(keys), **kwargs)
    for seed in range(n):
        t(batch(seed))
    return t


def observations(values, dtype=torch.float32) -> TensorDict:
    """``[samples, *features]`` as the only entry."""
    values = torch.as_tensor(values, dtype=dtype)
    return TensorDict(observation=values, batch_size=values.shape[:1])


def shared_copy(t: VecNorm) -> dict[str, torch.Tensor]:
    """The extra state of ``t``, in shared memory of its own."""
    return {k: v.clone().share_memory_() for k, v in t.get_extra_state().items()}


# --------------------------------------------------------------------- the state itself


def test_nothing_is_made_before_data_came():
    t = VecNorm()
    assert t._td is None
    with pytest.warns(UserWarning, match="uninitialized"):
        assert t.get_extra_state() is None


def test_layout():
    t = trained()
    assert t._td.batch_size == torch.Size([])
    for key, features in (("observation", (3,)), (NESTED, (2, 3)), ("reward", (1,))):
        for field in FIELDS:
            value = leaf(t, key, field)
            assert value.dtype == torch.float64
            assert value.shape == ((1,) if field == "count" else features)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32],
    ids=str,
)
def test_statistics_are_float64_whatever_came(dtype):
    t = VecNorm(["observation"])
    t(observations([[1, 2], [3, 4]], dtype))
    for field in FIELDS:
        assert leaf(t, field=field).dtype == torch.float64


def test_no_parameters_and_no_buffers():
    # EnvCreator deletes top-level tensors from the state dict.
    t = trained()
    assert not list(t.parameters()) and not list(t.buffers())
    assert list(t.state_dict()) == ["_extra_state"]


@pytest.mark.parametrize(
    "lock", [None, mp.get_context("spawn").Lock()], ids=["own", "given"]
)
def test_the_lock_is_where_env_creator_looks(lock):
    t = VecNorm(lock=lock)
    assert isinstance(t.__dict__["lock"], multiprocessing.synchronize.Lock)
    assert lock is None or t.lock is lock


def test_casting_the_module_leaves_the_statistics_alone():
    t = trained()
    before = snapshot(t)
    t.half().float().double().to(torch.bfloat16).to("cpu")
    assert_same_state(snapshot(t), before)


def test_new_api_hands_over():
    t = VecNorm(in_keys=["observation"], decay=0.5, new_api=True)
    assert type(t) is VecNormV2
    assert type(VecNorm(["observation"], new_api=True)) is VecNormV2
    assert t.decay == 0.5
    for new_api in (False, None):
        assert type(VecNorm(["observation"], new_api=new_api)) is VecNorm


# ------------------------------------------------------------------------- extra state


def test_extra_state_is_a_flat_plain_dict_of_the_live_tensors():
    t = trained()
    state = t.get_extra_state()
    # An OrderedDict would lose its tensors in EnvCreator.share_memory.
    assert type(state) is dict
    assert all(type(value) is torch.Tensor for value in state.values())
    for key in KEYS:
        for field in FIELDS:
            path = (key,) if isinstance(key, str) else key
            name = SEP.join((*path[:-1], f"{path[-1]}_{field}"))
            assert state[name].data_ptr() == leaf(t, key, field).data_ptr()
    before = state["observation_count"].item()
    t(batch())
    assert state["observation_count"].item() > before


def test_keys_may_have_points():
    t = VecNorm(["a.b", ("c.d", "e")], decay=1)
    t(TensorDict({"a.b": torch.ones(2, 1), ("c.d", "e"): torch.ones(2, 1)}, [2]))
    state = t.get_extra_state()
    assert {"a.b_count", f"c.d{SEP}e_count"} < set(state)
    other = VecNorm(["a.b", ("c.d", "e")], decay=1)
    other.load_state_dict(through_a_file(t.state_dict()))
    assert_same_state(snapshot(other), snapshot(t))


def test_saving_does_not_move_the_state():
    for t in (trained(), VecNorm(["observation"])):
        if t._td is None:
            with warnings.catch_warnings(record=True):
                t.set_extra_state(shared_copy(trained(keys=["observation"])))
        addresses = {k: v.data_ptr() for k, v in t._td.items(True, True)}
        shared = {k: v.is_shared() for k, v in t._td.items(True, True)}
        through_a_file(t.state_dict()), t.consistent_state_dict(), copy.deepcopy(t)
        assert addresses == {k: v.data_ptr() for k, v in t._td.items(True, True)}
        assert shared == {k: v.is_shared() for k, v in t._td.items(True, True)}


def quietly(load, state) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(state)


def test_shared_tensors_are_adopted_under_one_lock():
    source, lock = trained(), mp.Lock()
    state = shared_copy(source)
    # Both transforms, as two workers would, update the same statistics.
    t, other = VecNorm(KEYS, lock=lock), VecNorm(KEYS)
    other.lock = lock
    for one in (t, other):
        quietly(one.set_extra_state, state)
        for name, value in one.get_extra_state().items():
            assert value.data_ptr() == state[name].data_ptr()
    t(batch()), other(batch())
    assert_same_state(snapshot(t), snapshot(other))
    assert count(t) > count(source) + 7


def test_shared_tensors_without_their_lock_are_copied():
    """By transforms with a lock each, or with another one than theirs."""
    live = VecNorm(KEYS, lock=mp.Lock(), decay=1)
    live.set_extra_state(shared_copy(trained()))
    states = [shared_copy(trained()), live.get_extra_state()]
    for state, kwargs in itertools.product(states, ({}, {"lock": mp.Lock()})):
        if state is states[0] and kwargs:
            continue  # whoever gives a lock says that it is theirs
        before = {name: value.clone() for name, value in state.items()}
        t, other = (VecNorm(KEYS, decay=1, **kwargs) for _ in range(2))
        for one in (t, other):
            with pytest.warns(UserWarning, match="are copied.*lock"):
                one.set_extra_state(state)
            one(batch())
        assert count(t) == count(other) == before["observation_count"].item() + 4
        assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("lock", [None, mp.Lock()], ids=["own", "users"])
@pytest.mark.parametrize("live", [False, True], ids=["file", "live"])
def test_private_tensors_are_copied(live, lock):
    """What the user keeps is not changed, nor moved; two that load it do not share."""
    source = trained(lock=lock, decay=1)
    state = source.state_dict()
    state = state if live else through_a_file(state)
    kept = state["_extra_state"]
    before = {name: value.clone() for name, value in kept.items()}
    t, other = (VecNorm(KEYS, lock=lock, decay=1) for _ in range(2))
    for one in (t, other):
        quietly(one.load_state_dict, state)
        assert_same_state(snapshot(one), snapshot(source))
        # So that workers that EnvCreator starts see them.
        assert all(value.is_shared() for value in one._td.values(True, True))
    t(batch()), other(batch()), other(batch())
    assert count(t) + 4 == count(other) == count(source) + 8
    for name, value in kept.items():
        assert torch.equal(value, before[name])
        assert not value.is_shared()


@pytest.mark.parametrize("users_lock", [False, True])
def test_what_env_creator_does(users_lock):
    """The lock of one is set in others, then they load its live tensors."""
    source = trained(decay=1, lock=mp.Lock() if users_lock else None)
    state = source.state_dict()
    # The same lock in the constructor says nothing: an evaluation may have it too.
    kwargs = {"lock": source.lock} if users_lock else {}
    first, second = VecNorm(KEYS, decay=1, **kwargs), trained(2, decay=1, **kwargs)
    for t in (first, second):  # the second has loaded, or seen, something before
        t.lock = source.lock
        quietly(t.load_state_dict, state)
    before = count(source)
    source(batch()), first(batch()), second(batch())
    assert count(source) == count(first) == count(second) == before + 12
    assert all(value.is_shared() for value in state["_extra_state"].values())
    # Later checkpoints are written in place.
    saved = through_a_file(trained(3, decay=1).state_dict())
    quietly(first.load_state_dict, saved)
    assert count(second) == count(source) == 12
    first(batch())
    assert count(second) == 16


def test_a_lock_that_is_set_makes_no_file_live():
    t, state = VecNorm(KEYS, decay=1), through_a_file(trained().get_extra_state())
    t.lock = mp.Lock()
    before = state["observation_count"].item()
    with pytest.warns(UserWarning, match="are copied"):
        t.set_extra_state(state)
    t(batch())
    assert state["observation_count"].item() == before
    assert not state["observation_count"].is_shared()


def test_keys_that_the_checkpoint_lacks_are_said():
    state = through_a_file(trained(keys=["observation"]).state_dict())
    t = VecNorm(KEYS)
    with pytest.warns(UserWarning, match=r"no statistics of.*agents.*reward.*first"):
        t.load_state_dict(state)
    assert "observation" in t.loc.keys()
    fresh = VecNorm(KEYS)
    with pytest.warns(UserWarning, match=r"no statistics of.*observation.*reward"):
        fresh.set_extra_state({})
    assert fresh._td is None
    with pytest.raises(KeyError, match="observation"):
        t.set_extra_state({})


@pytest.mark.parametrize("case", ["fresh", "initialised", "new key", "copy", "to"])
def test_loading_in_inference_mode(case):
    """Nothing could update inference tensors outside of it."""
    t = {
        "fresh": lambda: VecNorm(KEYS),
        "new key": lambda: trained(keys=["observation"], out_keys=None),
    }.get(case, trained)()
    if case == "new key":
        t = VecNorm(KEYS)
        t._reset(TensorDict(batch_size=[4]), batch().select("observation"))
    with torch.inference_mode():
        if case == "copy":
            t = copy.deepcopy(t)
        elif case == "to":
            t.to("meta")
        else:
            t.load_state_dict(trained(3).state_dict())
        saved = t.consistent_state_dict()
    assert not any(value.is_inference() for value in t._td.values(True, True))
    assert not any(value.is_inference() for value in saved.values())
    if case != "to":
        t(batch())


@pytest.mark.parametrize("shared", [False, True])
def test_an_initialised_transform_is_written_in_place(shared):
    t = VecNorm(KEYS, lock=mp.Lock() if shared else None)
    if shared:
        t.set_extra_state(shared_copy(trained(2)))
    else:
        t(batch(7))
    live = dict(t.get_extra_state())
    source = trained(5)
    t.load_state_dict(through_a_file(source.state_dict()))
    assert_same_state(snapshot(t), snapshot(source))
    for name, value in t.get_extra_state().items():
        assert value is live[name]
        assert value.is_shared() == shared


def test_a_float32_state_keeps_its_dtype():
    state = {
        k: v.float().share_memory_()
        for k, v in trained(2).get_extra_state().items()
        if not k.endswith("_nonfinite")
    }
    t = VecNorm(KEYS, lock=mp.Lock())
    t.set_extra_state(state)
    t.load_state_dict(through_a_file(trained(5).state_dict()))
    for key in KEYS:
        for field in FIELDS:
            assert leaf(t, key, field).dtype == torch.float32
    assert t.get_extra_state().keys() == state.keys()


def test_nothing_to_load():
    fresh = VecNorm(KEYS)
    fresh.set_extra_state(None)
    assert fresh._td is None
    t = trained()
    before = snapshot(t)
    with pytest.raises(KeyError):
        t.set_extra_state(None)
    assert_same_state(snapshot(t), before)


def test_loading_takes_the_lock():
    t = trained()
    state = through_a_file(trained(3).get_extra_state())
    before = snapshot(t)
    t.lock.acquire()
    thread = threading.Thread(target=t.set_extra_state, args=(state,), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert_same_state(snapshot(t), before)
    t.lock.release()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert_same_state(snapshot(t), snapshot(trained(3)))


def broken(state, name, how):
    """A checkpoint with one bad entry."""
    state = {k: v.clone() for k, v in state.items()}
    if how == "missing":
        del state[name]
    elif how == "shape":
        state[name] = torch.ones(7, dtype=torch.float64)
    elif how == "dimensions":
        state[name] = state[name].unsqueeze(0)
    else:
        state[name].fill_({"negative": -1, "nan": math.nan}[how])
    return state


@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for how in ("missing", "shape", "dimensions")
        for name in (
            "observation_sum",
            f"agents{SEP}observation_ssq",
            "reward_count",
        )
    ]
    + [
        (name, how)
        for how in ("negative", "nan")
        for name in ("observation_count", "reward_count")
    ],
)
def test_a_broken_checkpoint_is_refused(name, how, initialised):
    t = trained(3) if initialised else VecNorm(KEYS)
    before = snapshot(t)
    good = trained(5).get_extra_state()
    # Alone, a sum and its ssq of different shapes do not tell which of them is wrong.
    ambiguous = not initialised and name == "observation_sum" and how != "missing"
    match = "observation_(sum|ssq)" if ambiguous else name.replace(SEP, ".*")
    with pytest.raises((KeyError, ValueError), match=match):
        t.set_extra_state(broken(good, name, how))
    assert_same_state(snapshot(t), before)
    # And nothing is left half done: the good one loads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.set_extra_state(good)
    assert_same_state(snapshot(t), snapshot(trained(5)))


@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
def test_a_checkpoint_of_other_keys_is_refused(initialised):
    t = trained(3, ["observation"]) if initialised else VecNorm(["observation"])
    before = snapshot(t)
    with pytest.raises(KeyError, match="observation"):
        t.set_extra_state(trained(5, ["reward"]).get_extra_state())
    assert_same_state(snapshot(t), before)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_checkpoint_of_other_shapes_is_refused(key):
    t = trained(3)
    before = snapshot(t)
    other = VecNorm(KEYS)
    td = batch()
    td[key] = torch.randn(4, 7)
    other(td)
    with pytest.raises(
        ValueError, match=rf"{key if key != NESTED else 'agents'}.*\b7\b"
    ):
        t.set_extra_state(other.get_extra_state())
    assert_same_state(snapshot(t), before)


def test_a_checkpoint_that_contradicts_shapes_is_refused():
    t = VecNorm(["observation"], shapes=[torch.Size([4])])
    with pytest.raises(ValueError, match="observation"):
        t.set_extra_state(trained(5, ["observation"]).get_extra_state())
    assert t._td is None


@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
def test_save_load_continue_is_bitwise_the_same(initialised):
    t = trained(20, decay=0.99)
    resumed = trained(3, decay=0.99) if initialised else VecNorm(KEYS, decay=0.99)
    resumed.load_state_dict(through_a_file(t.state_dict()))
    for seed in range(20, 60):
        td = batch(seed)
        if seed % 10 == 0:
            td["observation"][1, 1] = math.nan
        y, expected = resumed(td.clone()), t(td.clone())
        for key in KEYS:
            torch.testing.assert_close(
                y[key], expected[key], rtol=0, atol=0, equal_nan=True
            )
        assert_same_state(snapshot(resumed), snapshot(t))


@pytest.mark.filterwarnings("ignore:VecNorm. the state_dict has no statistics of")
@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_of_the_keys_seen_so_far(shared):
    # Saved after a reset, before the first reward.
    t = VecNorm(decay=1)
    env = TransformedEnv(IntegerEnv(), t)
    env.reset()
    resumed = VecNorm(decay=1, lock=mp.Lock() if shared else None)
    if shared:
        resumed.set_extra_state(shared_copy(t))
    else:
        resumed.load_state_dict(through_a_file(t.state_dict()))
    other = TransformedEnv(IntegerEnv(), resumed)
    env.rollout(5), other.rollout(5)
    assert count(t, "reward") == 5
    assert_same_state(snapshot(resumed), snapshot(t))


def test_loading_brings_a_key_that_was_not_seen_here():
    t = VecNorm()
    TransformedEnv(IntegerEnv(), t).reset()
    source = VecNorm()
    TransformedEnv(IntegerEnv(), source).rollout(5)
    t.load_state_dict(through_a_file(source.state_dict()))
    assert_same_state(snapshot(t), snapshot(source))


@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
@pytest.mark.parametrize("optional", [*Moments._fields[3:], "all"])
def test_what_is_optional_on_load(optional, initialised):
    state = trained(5).get_extra_state()
    endings = Moments._fields[3:] if optional == "all" else (optional,)
    endings = tuple(f"_{field}" for field in endings)
    bare = {k: v for k, v in state.items() if not k.endswith(endings)}
    assert len(bare) < len(state)
    t = VecNorm(KEYS)
    if initialised:
        t = trained(3)
        t(observations_with_nan())
    t.set_extra_state(bare)
    for key in KEYS:
        for field in FIELDS:
            assert torch.equal(leaf(t, key, field), leaf(trained(5), key, field))
        torch.testing.assert_close(t.loc[key], trained(5).loc[key])
        torch.testing.assert_close(t.scale[key], trained(5).scale[key])
        assert (t.nonfinite[key] == 0).all()


def test_a_device_without_float64():
    """Its statistics are float32, all of them, and travel in both directions."""
    source = trained(3)
    source(observations_with_nan())
    state = source.get_extra_state()
    rounded = {name: value.float() for name, value in state.items()}
    fresh, there, back = VecNorm(KEYS), trained(2), trained(2)
    there._td = there._td.float()
    fresh.set_extra_state(rounded)
    there.set_extra_state(state)
    back.set_extra_state(there.get_extra_state())
    for t, dtype in ((fresh, None), (there, torch.float32), (back, torch.float64)):
        for name, value in t.get_extra_state().items():
            assert value.dtype == (dtype or torch.float64)
            assert torch.equal(value.float(), rounded[name])
        for key in KEYS:
            torch.testing.assert_close(t.loc[key], source.loc[key])
            assert torch.equal(t.nonfinite[key], source.nonfinite[key])


def observations_with_nan() -> TensorDict:
    td = batch()
    td["observation"][0, 0] = math.nan
    return td


def test_consistent_state_dict():
    t = trained()
    live, taken = t.get_extra_state(), t.consistent_state_dict()
    assert type(taken) is dict and taken.keys() == live.keys()
    for name, value in taken.items():
        assert value is not live[name]
        assert torch.equal(value, live[name])
    before = snapshot(t)
    t(batch())
    fresh = trained(1)
    fresh.set_extra_state(taken)
    assert_same_state(snapshot(fresh), before)


def test_consistent_state_dict_is_taken_under_the_lock():
    t = trained()
    taken = []
    t.lock.acquire()
    thread = threading.Thread(
        target=lambda: taken.append(t.consistent_state_dict()), daemon=True
    )
    thread.start()
    thread.join(0.2)
    assert not taken
    t.lock.release()
    thread.join(PATIENCE)
    assert taken


def test_consistent_state_dict_before_any_data():
    with pytest.warns(UserWarning, match="uninitialized"):
        assert VecNorm().consistent_state_dict() is None


# ------------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(lambda t: pickle.loads(pickle.dumps(t)), id="pickle"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda t: through_a_file(t, weights_only=False), id="torch.save"),
    ],
)
@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
def test_a_copy_is_the_same_and_independent(copied, initialised):
    out_keys = ["o", ("a", "o"), "r"]
    kwargs = {"decay": 0.9, "eps": 1e-2, "out_keys": out_keys}
    t = trained(**kwargs) if initialised else VecNorm(KEYS, **kwargs)
    other = copied(t)
    assert (other.decay, other.eps) == (0.9, 1e-2)
    assert (other.in_keys, other.out_keys) == (t.in_keys, t.out_keys)
    assert_same_state(snapshot(other), snapshot(t))
    before = snapshot(t)
    y = other(batch(9))
    assert_same_state(snapshot(t), before)
    expected = t(batch(9))
    for key in out_keys:
        assert torch.equal(y[key], expected[key])
    assert_same_state(snapshot(other), snapshot(t))
    assert isinstance(other.lock, multiprocessing.synchronize.Lock)


@pytest.mark.parametrize("mode", ["frozen", "eval"])
def test_a_copy_keeps_the_mode(mode):
    t = trained()
    t = t.freeze() if mode == "frozen" else t.eval()
    for other in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t), t.clone()):
        assert other.frozen == t.frozen and other.training == t.training


def test_a_clone_shares_the_statistics():
    t = trained(decay=1)
    clone = t.clone()
    for name, value in clone.get_extra_state().items():
        assert value.data_ptr() == t.get_extra_state()[name].data_ptr()
    # Whoever shares the statistics has to share the lock.
    assert clone.lock is t.lock
    before = count(t)
    clone(batch())
    assert count(t) == before + 4


@pytest.mark.parametrize("lock", [None, mp.Lock()], ids=["own", "users"])
@pytest.mark.parametrize(
    "copied", [copy.copy, VecNorm.clone, VecNorm.frozen_copy], ids=lambda f: f.__name__
)
def test_what_shares_the_statistics_shares_the_lock(copied, lock):
    t = trained(decay=1, lock=lock)
    other = copied(t)
    assert other.lock is t.lock
    assert leaf(other).data_ptr() == leaf(t).data_ptr()
    before = count(t)
    other.unfreeze()
    with t.lock:
        thread = threading.Thread(target=other, args=(batch(),), daemon=True)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and count(t) == before
    thread.join(PATIENCE)
    assert count(t) == before + 4


def test_a_frozen_copy_follows_and_does_not_update():
    t = trained(decay=0.9)
    frozen = t.frozen_copy()
    assert frozen.frozen and not t.frozen
    for seed in range(3):
        expected = t(batch(seed))
        before = snapshot(t)
        y = frozen(batch(seed))
        assert_same_state(snapshot(t), before)
        for key in KEYS:
            assert torch.equal(y[key], expected[key])
    # Also through a checkpoint.
    t.load_state_dict(through_a_file(trained(9).state_dict()))
    assert torch.equal(frozen.loc[NESTED], t.loc[NESTED])


def test_a_frozen_copy_needs_data():
    with pytest.raises(RuntimeError, match="initialized"):
        VecNorm().frozen_copy()


# --------------------------------------------------------------- frozen, and eval mode


def test_freeze_and_unfreeze():
    t = trained()
    before = snapshot(t)
    assert t.freeze() is t
    y = t(batch(9))
    assert_same_state(snapshot(t), before)
    loc, scale = t.loc, t.scale
    for key in KEYS:
        expected = (batch(9)[key] - loc[key]) / scale[key]
        torch.testing.assert_close(y[key], expected)
    assert t.unfreeze() is t
    t(batch(9))
    assert count(t) > before["observation_count"].item()


@pytest.mark.parametrize("mode", ["frozen", "eval"])
def test_no_update_and_no_nan_in_a_key_that_was_not_seen(mode):
    t = VecNorm(decay=1)
    TransformedEnv(IntegerEnv(), t).reset()
    before = snapshot(t)
    t = t.freeze() if mode == "frozen" else t.eval()
    reward = torch.tensor([[1.0], [2.0]])
    with pytest.warns(UserWarning, match="no statistics yet") as record:
        for _ in range(2):
            td = TensorDict(observation=torch.ones(2, 2), reward=reward, batch_size=[2])
            assert torch.equal(t(td)["reward"], reward)
    assert len(record) == 1
    assert_same_state(snapshot(t), before)


def test_the_identity_gives_integers_in_the_default_dtype():
    t = VecNorm(["observation"]).freeze()
    with pytest.warns(UserWarning, match="no statistics yet"):
        y = t(observations([[1], [2]], torch.int64))["observation"]
    assert torch.equal(y, torch.tensor([[1.0], [2.0]]))


@pytest.mark.filterwarnings("ignore:VecNorm has no statistics yet")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda t: TransformedEnv(IntegerEnv(), t), id="TransformedEnv"),
        pytest.param(lambda t: TransformedEnv(IntegerEnv(), Compose(t)), id="Compose"),
        pytest.param(
            lambda t: TransformedEnv(IntegerEnv(), Compose(Compose(t))),
            id="nested Compose",
        ),
        pytest.param(
            lambda t: IntegerEnv().append_transform(t), id="env.append_transform"
        ),
        pytest.param(
            lambda t: TransformedEnv(IntegerEnv()).append_transform(t),
            id="TransformedEnv.append_transform",
        ),
        pytest.param(
            lambda t: TransformedEnv(IntegerEnv()).insert_transform(0, t),
            id="TransformedEnv.insert_transform",
        ),
        pytest.param(lambda t: Compose().append(t), id="Compose.append"),
        pytest.param(lambda t: Compose().insert(0, t), id="Compose.insert"),
        pytest.param(
            lambda t: Compose().append(Compose(t)), id="Compose.append(Compose)"
        ),
        pytest.param(
            lambda t: setattr(TransformedEnv(IntegerEnv()), "transform", t),
            id="env.transform = t",
        ),
        pytest.param(
            lambda t: ReplayBuffer(storage=LazyTensorStorage(4), transform=t),
            id="ReplayBuffer",
        ),
        pytest.param(
            lambda t: TensorDictReplayBuffer(
                storage=LazyTensorStorage(4), transform=Compose(t)
            ),
            id="TensorDictReplayBuffer",
        ),
        pytest.param(
            lambda t: ReplayBuffer(storage=LazyTensorStorage(4)).append_transform(t),
            id="ReplayBuffer.append_transform",
        ),
        pytest.param(
            lambda t: ReplayBuffer(storage=LazyTensorStorage(4)).append_transform(
                t, invert=True
            ),
            id="ReplayBuffer.append_transform(invert)",
        ),
        pytest.param(
            lambda t: ReplayBuffer(storage=LazyTensorStorage(4)).insert_transform(0, t),
            id="ReplayBuffer.insert_transform",
        ),
    ],
)
def test_placing_a_transform_is_not_the_users_eval(place, training):
    # TorchRL calls eval() on whatever it is given.
    t = VecNorm(["observation"], decay=1).train(training)
    kept = place(t)
    assert t.training is training
    t.reset_parent()
    t(observations([[1.0, 2.0]]))
    assert (t._td is not None) is training
    del kept


def test_wrapping_an_environment_twice_is_not_the_users_eval():
    env = TransformedEnv(IntegerEnv(), VecNorm(["observation"], decay=1))
    # The inner transform is cloned into a new Compose.
    outer = TransformedEnv(env, Compose(), auto_unwrap=True)
    assert outer.transform[0].training
    outer.rollout(3)
    assert count(outer.transform[0]) == 4


@pytest.mark.parametrize("how", ["eval", "train(False)"])
@pytest.mark.parametrize(
    "stopped", ["transform", "env", "Compose", "container", "Sequential", "policy"]
)
def test_eval_by_the_user_stops_the_updates(stopped, how):
    t = VecNorm(["observation"], decay=1)
    what = {
        "transform": lambda: t,
        "env": lambda: TransformedEnv(IntegerEnv(), t),
        "Compose": lambda: Compose(t),
        "container": lambda: TransformedEnv(IntegerEnv(), Compose(Compose(t))),
        "Sequential": lambda: torch.nn.Sequential(t),
        "policy": lambda: TensorDictSequential(t),
    }[stopped]()
    t(observations([[1.0, 2.0], [3.0, 5.0]]))
    result = what.eval() if how == "eval" else what.train(False)
    assert result is what
    assert not t.training
    before = snapshot(t)
    y = t(observations([[2.0, 5.0]]))["observation"]
    assert_same_state(snapshot(t), before)
    torch.testing.assert_close(y, torch.tensor([[0.0, 1.0]]))
    what.train()
    assert t.training
    t(observations([[2.0, 5.0]]))
    assert count(t) == 3


def test_eval_of_the_environment_is_kept_while_it_runs():
    t = VecNorm(decay=1)
    env = TransformedEnv(IntegerEnv(), t)
    env.rollout(3)
    env.eval()
    before = snapshot(t)
    env.rollout(3)
    assert_same_state(snapshot(t), before)
    env.train()
    env.rollout(3)
    assert count(t, "reward") == 6


# ------------------------------------------------------- loc, scale and what uses them


def test_loc_and_scale_are_those_of_the_equation():
    t = trained(0, ["observation"], decay=0.9, eps=1e-2)
    expected = Expected(0.9, 1e-2)
    for seed in range(30):
        y = t(batch(seed))["observation"]
        torch.testing.assert_close(y, expected(batch(seed)["observation"]).float())
        torch.testing.assert_close(t.loc["observation"], expected.loc.float())
        torch.testing.assert_close(t.scale["observation"], expected.scale.float())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_loc_and_scale_have_the_dtype_of_the_values(dtype):
    t = VecNorm(["observation"])
    y = t(observations([[1, 2], [3, 4]], dtype))["observation"]
    assert (
        y.dtype == t.loc["observation"].dtype == t.scale["observation"].dtype == dtype
    )


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_integers_come_out_in_the_default_dtype(dtype, default):
    old = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        t = VecNorm(["observation"])
        y = t(observations([[0], [1]], dtype))["observation"]
        assert y.dtype == t.loc["observation"].dtype == default
        assert y.flatten().tolist() == [-1, 1]
    finally:
        torch.set_default_dtype(old)


def test_loc_and_scale_before_any_value_was_seen():
    t = VecNorm(["observation"])
    t.set_extra_state(trained(3, ["observation"]).get_extra_state())
    assert t.loc["observation"].dtype == t.scale["observation"].dtype == torch.float32
    t(observations(torch.ones(2, 3), torch.float64))
    assert t.loc["observation"].dtype == torch.float64


def test_dtypes_are_those_of_the_last_values():
    """Also after calls that are not like most."""
    t = VecNorm(KEYS)
    for _ in range(2):
        t(batch())
    t._reset(TensorDict({}, [4]), batch(dtype=torch.float64).exclude("observation"))
    assert t.loc["reward"].dtype == torch.float64
    t(batch())
    assert t.loc["reward"].dtype == t.scale["reward"].dtype == torch.float32


def test_clones_have_their_own_dtypes():
    t = VecNorm(KEYS)
    for _ in range(2):
        t(batch())
    clone = t.clone()
    clone(batch(dtype=torch.float64))
    for one, dtype in ((t, torch.float32), (clone, torch.float64)):
        assert one.loc["reward"].dtype == one.scale["reward"].dtype == dtype


def test_the_default_dtype_changes():
    t = VecNorm(["observation"])
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            for _ in range(2):
                y = t(observations([[0], [1]], torch.int32))["observation"]
            assert y.dtype == t.loc["observation"].dtype == dtype
        finally:
            torch.set_default_dtype(torch.float32)


def test_keys_have_their_own_dtypes():
    t = VecNorm()
    t(TensorDict(observation=torch.ones(2).double(), reward=torch.ones(1)))
    assert t.loc["observation"].dtype == torch.float64
    assert t.loc["reward"].dtype == torch.float32


def test_standard_normal():
    assert VecNorm().standard_normal is True


@pytest.mark.parametrize(
    "out_keys", [None, ["o", ("a", "o"), "r"]], ids=["same", "other"]
)
def test_denorm_is_the_inverse(out_keys):
    t = trained(out_keys=out_keys)
    td = batch(9)
    y = t(td.clone())
    if out_keys is not None:
        y = y.select(*out_keys)
    given = y.clone()
    original = t.denorm(y)
    for key in KEYS:
        torch.testing.assert_close(original[key], td[key])
        assert original[key].dtype == td[key].dtype
    # A copy: what was given is as it was.
    assert original is not y
    assert (y == given).all() and set(y.keys(True, True)) == set(given.keys(True, True))


def test_denorm_skips_what_is_not_there():
    t = trained(out_keys=["o", ("a", "o"), "r"])
    original = t.denorm(t(batch(9)).select("r"))
    assert set(original.keys(True, True)) == {"r", "reward"}


def test_denorm_needs_data():
    with pytest.raises(RuntimeError, match="initialized"):
        VecNorm().denorm(batch())


def test_denorm_of_a_rollout():
    t = VecNorm(["observation"], ["normalized"], decay=1)
    env = TransformedEnv(IntegerEnv(), t)
    rollout = env.rollout(10)
    # With the statistics of the end, for all steps.
    original = t.denorm(rollout)
    loc, scale = t.loc["observation"], t.scale["observation"]
    torch.testing.assert_close(
        original["observation"], rollout["normalized"] * scale + loc
    )


def test_to_observation_norm_of_one_key():
    t = trained(keys=["observation"], out_keys=["o"])
    norm = t.to_observation_norm()
    assert type(norm) is ObservationNorm
    y = norm(batch(9))
    assert y["o"].dtype == torch.float32
    torch.testing.assert_close(y["o"], t.freeze()(batch(9))["o"])
    # It does not follow, but can be brought up to date.
    t.unfreeze()(batch(10))
    assert not torch.equal(norm.loc, t.loc["observation"])
    norm.load_state_dict(t.to_observation_norm().state_dict())
    assert torch.equal(norm.loc, t.loc["observation"])


def test_to_observation_norm_of_several_keys():
    out_keys = ["o", ("a", "o"), "r"]
    t = trained(out_keys=out_keys)
    norm = t.to_observation_norm()
    assert type(norm) is Compose and len(norm) == 3
    y, expected = norm(batch(9)), t.freeze()(batch(9))
    for key in out_keys:
        torch.testing.assert_close(y[key], expected[key])


def test_to_observation_norm_says_that_it_rounds():
    t = VecNorm(["near", "far"])
    x = torch.randn(50, 2, dtype=torch.float64)
    t(TensorDict({"near": (x + 100).float(), "far": (x + 3e6).float()}, [50]))
    with pytest.warns(
        UserWarning, match="'far': .* rounds loc to torch.float32"
    ) as seen:
        t.to_observation_norm()
    assert len(seen) == 1


def test_to_observation_norm_names_the_key_that_was_not_seen():
    t = VecNorm()
    TransformedEnv(IntegerEnv(), t).reset()
    with pytest.raises(RuntimeError, match="reward"):
        t.to_observation_norm()


# ------------------------------------------------------------------------- construction


@pytest.mark.parametrize("decay", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match="decay"):
        VecNorm(decay=decay)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-4, math.nan, -math.inf])
def test_eps_outside_its_range(eps):
    with pytest.raises(ValueError, match="eps"):
        VecNorm(eps=eps)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"in_keys": ["a", "b"], "out_keys": ["c"]}, "out_keys"),
        ({"in_keys": ["a"], "out_keys": ["c", "d"]}, "out_keys"),
        ({"in_keys": ["a", "b"], "shapes": [torch.Size([3])]}, "shapes"),
        ({"in_keys": ["a"], "shapes": [(3,), (1,)]}, "shapes"),
        ({"in_keys": ["a", "b", "a"]}, "'a'"),
        ({"in_keys": ["a", ("a",)]}, "'a'"),
        ({"in_keys": [("x", "a"), ("x", "a")]}, "'a'"),
        ({"in_keys": ["a", "b"], "out_keys": ["c", "c"]}, "'c'"),
        ({"in_keys": ["a", "a_sum"]}, "a_sum"),
        ({"in_keys": ["a_ssq", "a"]}, "a_ssq"),
        ({"in_keys": [("x", "a"), ("x", "a_count")]}, "a_count"),
        ({"in_keys": ["a", ("a_sum", "b")]}, "a_sum"),
    ],
    ids=str,
)
def test_construction_checks(kwargs, match):
    with pytest.raises(ValueError, match=match):
        VecNorm(**kwargs)


@pytest.mark.parametrize("name", ["decay", "eps", "lock_timeout"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, ValueError) for value in (0, -0.1, math.nan, -math.inf)),
        (torch.tensor(math.nan), ValueError),
        *((value, TypeError) for value in (None, "0.9", [0.9], 0.9j)),
        (numpy.array([0.9]), TypeError),
        (torch.tensor([0.9]), TypeError),
        (torch.tensor(0.9, device="meta"), TypeError),
    ],
    ids=str,
)
def test_numbers_that_are_none(name, value, error):
    with pytest.raises(error, match=name):
        VecNorm(**{name: value})
    t = trained()
    before, old = snapshot(t), getattr(t, name)
    with pytest.raises(error, match=name):
        setattr(t, name, value)
    assert getattr(t, name) == old
    assert_same_state(snapshot(t), before)


@pytest.mark.parametrize(
    "half",
    [0.5, Fraction(1, 2), numpy.float32(0.5), torch.tensor(0.5)],
    ids=lambda value: type(value).__name__,
)
def test_numbers_hold_from_the_next_call_on(half):
    t, expected = VecNorm(["observation"], decay=1), Expected(1)
    for seed in range(2):
        t(batch(seed)), expected(batch(seed)["observation"])
    t.decay = t.eps = half
    expected.decay = expected.eps = 0.5
    for seed in range(2, 4):
        x = 0.1 * batch(seed)["observation"]
        y = t(observations(x))["observation"]
        torch.testing.assert_close(y, expected(x).float())
    assert count(t) == expected.count
    copied = pickle.loads(pickle.dumps(t))
    assert copied.decay == copied.eps == t.clone().decay == 0.5


def test_names_that_only_look_alike_do_not_collide():
    keys = ["a", ("a", "b"), ("x", "a_sum"), "a_summary"]
    VecNorm(keys[:1] + keys[2:])
    VecNorm([("x", "a"), "a_sum"])


def test_one_key_may_be_given_without_a_list():
    t = VecNorm(in_keys="observation")
    assert t.in_keys == t.out_keys == ["observation"]
    t(observations([[1.0], [2.0]]))


def set_in_keys(t):
    t.in_keys = ["reward", NESTED]


def set_one_key(t):
    t.in_keys, t.out_keys = "reward", "r"


def set_out_keys(t):
    t.out_keys = ["o", ("a", "o")]


def change_in_place(t):
    t.in_keys[1] = "reward"
    t.out_keys[0] = "o"


def swap_in_place(t):
    t.in_keys.reverse()
    t.out_keys.reverse()


@pytest.mark.parametrize(
    "change",
    [set_in_keys, set_one_key, set_out_keys, change_in_place, swap_in_place],
)
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_keys_that_are_set_later(change, calls):
    keys = ["observation", NESTED]
    ours, theirs = VecNorm(keys, decay=1), reference(keys, decay=1, eps=1e-8)
    for seed in range(calls + 3):
        if seed == calls:
            change(ours), change(theirs)
        td, wanted = batch(seed), theirs(batch(seed))
        assert ours(td) is td
        assert set(td.keys(True, True)) == set(wanted.keys(True, True))
        for key in wanted.keys(True, True):
            torch.testing.assert_close(td[key], wanted[key], rtol=1e-4, atol=1e-4)
    for key in ours.in_keys:
        assert count(ours, key) == count(theirs, key)
        torch.testing.assert_close(ours.loc[key], theirs.loc[key], rtol=1e-4, atol=1e-4)
    assert set(ours.loc.keys(True, True)) == set(ours.in_keys)
    original = ours.denorm(td)
    for key in ours.in_keys:
        torch.testing.assert_close(original[key], batch(seed)[key])


def test_shapes_that_are_set_later():
    t = VecNorm([NESTED], decay=1)
    t.shapes = [(3,)]
    t(batch())
    assert count(t, NESTED) == 8
    t.shapes[0] = (2, 3)
    before = snapshot(t)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
        t(batch())
    assert_same_state(snapshot(t), before)


def test_keys_that_are_set_later_are_checked():
    t = trained()
    before = snapshot(t)
    for name, value in (
        ("in_keys", ["observation", "reward"]),
        ("out_keys", ["o"]),
        ("in_keys", ["observation", "observation", "reward"]),
        ("shapes", [(3,)]),
        ("names", {"velocity": "observation"}),
    ):
        old = getattr(t, name)
        setattr(t, name, value)
        with pytest.raises(ValueError, match=name):
            t(batch(9))
        setattr(t, name, old)
        assert_same_state(snapshot(t), before)
    t(batch(9))


def test_a_shared_td_without_a_key_that_is_set_later():
    td = trained(keys=["observation"])._td.clone().share_memory_()
    t = VecNorm(["observation"], shared_td=td)
    t(batch())
    t.in_keys, t.out_keys = ["observation", "reward"], ["observation", "reward"]
    before = snapshot(t)
    with pytest.raises(KeyError, match=r"reward.*observation_sum"):
        t(batch())
    assert_same_state(snapshot(t), before)


def test_the_defaults_of_the_documentation():
    t = VecNorm()
    assert t.in_keys == t.out_keys == ["observation", "reward"]
    assert (t.decay, t.eps, t.shapes) == (0.9999, 1e-4, None)
    assert "decay=0.9999," in repr(t) and "eps=0.0001," in repr(t)


@pytest.mark.parametrize("decay", [0.99999, 1 - 2**-53, 0.1, 1])
@pytest.mark.parametrize("eps", [1e-5, 1e-300, 2.0])
def test_the_representation_has_the_numbers_as_they_are(decay, eps):
    text = repr(VecNorm(decay=decay, eps=eps))
    shown = re.fullmatch(r"VecNorm\(decay=(\S+), eps=(\S+), in_keys=.*\)", text)
    assert [float(number) for number in shown.groups()] == [decay, eps]


def test_the_parameters_are_shown():
    """To inspect, help() and editors: torchrl's, and three more."""
    ours = inspect.signature(VecNorm).parameters
    theirs = inspect.signature(torchrl.envs.VecNorm.__init__).parameters
    assert list(ours) == [*list(theirs)[1:], "lock_timeout", "names", "group"]
    for name, parameter in ours.items():
        if name in theirs:
            assert parameter.kind is theirs[name].kind
            assert parameter.default == theirs[name].default
    assert "VecNorm(in_keys: " in pydoc.render_doc(VecNorm, renderer=pydoc.plaintext)


def test_a_subclass_shows_parameters_of_its_own():
    class Clipped(VecNorm):
        def __init__(self, limit, *, in_keys=None):
            super().__init__(in_keys)

    class Same(Clipped):
        pass

    for cls in (Clipped, Same):
        assert str(inspect.signature(cls)) == "(limit, *, in_keys=None)"
    # What calling a transform takes is not what making one takes.
    call = inspect.signature(torch.nn.Identity())
    assert inspect.signature(Clipped(3)) == call


def test_keys_of_one_name_in_a_state_dict():
    with pytest.raises(ValueError, match="same name in a state_dict"):
        VecNorm([f"a{SEP}b", ("a", "b")])


# ------------------------------------------------- one set of statistics, several keys

BOTH = ["observation", ("next", "observation")]
ONE = {BOTH[1]: "observation"}


def transitions(seed: int = 0) -> TensorDict:
    return TensorDict(
        {
            "observation": batch(seed)["observation"],
            "next": {"observation": 1 + batch(seed + 100)["observation"]},
        },
        [4],
    )


def of_both(td: TensorDict) -> torch.Tensor:
    return torch.cat([td[key] for key in BOTH])


@pytest.mark.parametrize("placed", ["private", "shared", "elsewhere"])
def test_keys_of_one_name_are_one_batch(placed, request):
    t, expected = VecNorm(BOTH, names=ONE, decay=0.9), Expected(0.9)
    if placed == "shared":
        zeros = Moments.zeros([3])
        td = TensorDict(
            {f"observation_{f}": v for f, v in zeros._asdict().items() if v is not None}
        )
        t = VecNorm(BOTH, names=ONE, decay=0.9, shared_td=td.share_memory_())
    if placed == "elsewhere":
        request.getfixturevalue("other_device")
    for seed in range(5):
        y = t(transitions(seed))
        wanted = expected(of_both(transitions(seed)))
        torch.testing.assert_close(of_both(y), wanted.float())
    assert count(t) == pytest.approx(expected.count)
    torch.testing.assert_close(leaf(t, field="sum"), expected.sum)
    for key in BOTH:
        torch.testing.assert_close(t.loc[key], expected.loc.float())
        torch.testing.assert_close(t.scale[key], expected.scale.float())
        assert (t.nonfinite[key] == 0).all()
    original = t.denorm(y.clone())
    torch.testing.assert_close(of_both(original), of_both(transitions(4)))
    before = snapshot(t)
    frozen = t.frozen_copy()
    for other in (frozen, t.to_observation_norm()):
        y = other(transitions(9))
        wanted = (of_both(transitions(9)) - expected.loc) / expected.scale
        torch.testing.assert_close(of_both(y), wanted.float())
    assert_same_state(snapshot(t), before)


def test_one_of_the_keys_of_a_name():
    """At a reset there is no next observation, and masks hold for each key."""
    t, expected = VecNorm(BOTH, names=ONE, decay=0.5), Expected(0.5)
    td = TensorDict(observation=batch()["observation"], batch_size=[4])
    mask = torch.tensor([[True], [False], [True], [False]])
    t._reset(TensorDict(_reset=mask, batch_size=[4]), td)
    expected(batch()["observation"][::2])
    t._step(TensorDict(_step=mask, batch_size=[4]), transitions(3))
    expected(torch.cat([transitions(3)[key][::2] for key in BOTH]))
    assert count(t) == expected.count
    torch.testing.assert_close(leaf(t, field="sum"), expected.sum)
    empty = transitions(4)[:0]
    before = snapshot(t)
    t(empty)
    assert_same_state(snapshot(t), before)


@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
def test_a_checkpoint_of_keys_of_one_name(initialised):
    t = VecNorm(BOTH, names=ONE)
    t(transitions())
    saved = through_a_file(t.state_dict())
    one = VecNorm(["observation"])
    one(batch())
    assert set(saved["_extra_state"]) == set(one.get_extra_state())
    other = VecNorm(BOTH, names=ONE)
    if initialised:
        other(transitions(1))
    other.load_state_dict(saved)
    assert_same_state(snapshot(other), snapshot(t))
    one.load_state_dict(saved)
    assert torch.equal(one.loc["observation"], t.loc["observation"])
    for copied in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert torch.equal(
            of_both(copied.freeze()(transitions(2))),
            of_both(t.frozen_copy()(transitions(2))),
        )


def test_keys_of_one_name_have_one_shape():
    td = transitions()
    td["next", "observation"] = torch.ones(4, 2)
    for seen in (False, True):
        t = VecNorm(BOTH, names=ONE)
        if seen:
            t(transitions())
        before = snapshot(t)
        with pytest.raises(
            ValueError, match=r"'next', 'observation'.*\(3,\).*'observation'.*\(2,\)"
        ):
            t(td)
        assert_same_state(snapshot(t), before)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"in_keys": ["a"], "names": {"b": "a"}}, "'b'"),
        ({"in_keys": ["a", "b"], "names": {"b": "a_sum"}}, "a_sum"),
        ({"in_keys": ["a", "b"], "names": {"b": ("a_sum", "c")}}, "a_sum"),
        ({"in_keys": [("a", "b"), "c"], "names": {"c": f"a{SEP}b"}}, "same name"),
        (
            {"in_keys": ["a", "b"], "shapes": [(1,), (2,)], "names": {"b": "a"}},
            "'a' and 'b'",
        ),
    ],
    ids=str,
)
def test_names_that_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        VecNorm(**kwargs)


def test_a_name_of_its_own():
    t = VecNorm(["observation"], names={"observation": ("kept", "here")}, decay=1)
    t(batch())
    assert set(t.get_extra_state()) >= {f"kept{SEP}here_sum", f"kept{SEP}here_count"}
    assert count(t, ("kept", "here")) == 4
    y = t(batch())["observation"]
    torch.testing.assert_close(
        y, trained(0, ["observation"], decay=1)(batch())["observation"]
    )


# ---------------------------------------------------------------- shapes of the values


@pytest.mark.parametrize("shape", [torch.Size([3]), (3,), [3]], ids=str)
def test_shapes_say_what_the_features_are(shape):
    x = torch.randn(5, 4, 3)
    t = VecNorm(["observation"], shapes=[shape], decay=1)
    y = t(TensorDict(observation=x, batch_size=[5]))["observation"]
    assert count(t) == 20
    torch.testing.assert_close(t.loc["observation"], x.mean((0, 1)))
    torch.testing.assert_close(y, Expected()(x.flatten(0, 1)).float().view_as(x))


def test_shapes_that_hold_batch_dimensions():
    # Features may include what the tensordict calls its batch.
    x = torch.randn(5, 4, 3)
    t = VecNorm(["observation"], shapes=[(4, 3)], decay=1)
    t(TensorDict(observation=x, batch_size=[5, 4]))
    assert count(t) == 5
    torch.testing.assert_close(t.loc["observation"], x.mean(0))


def test_a_scalar_feature():
    t = VecNorm(["observation"], decay=1)
    x = torch.tensor([1.0, 2.0, 3.0])
    y = t(TensorDict(observation=x, batch_size=[3]))["observation"]
    torch.testing.assert_close(y, (x - 2) / (2 / 3) ** 0.5)
    assert leaf(t, field="sum").shape == ()


def test_batch_sizes_and_dtypes_may_change():
    t = VecNorm(["observation"], decay=0.9)
    expected = Expected(0.9)
    calls = [((), torch.float32), ((3,), torch.float64), ((2, 2), torch.float16)]
    calls += [((1,), torch.int32), ((0,), torch.float32), ((5,), torch.bfloat16)]
    for size, dtype in calls:
        x = (torch.randn(*size, 3) * 5 + 20).to(dtype)
        y = t(TensorDict(observation=x, batch_size=size))["observation"]
        wanted = expected(x.reshape(-1, 3)).view(x.shape)
        assert y.dtype == (dtype if dtype.is_floating_point else torch.float32)
        tolerance = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
        torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(leaf(t, field="sum"), expected.sum)
    torch.testing.assert_close(leaf(t, field="ssq"), expected.ssq)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.clone(), id="contiguous"),
        pytest.param(lambda x: x.t().contiguous().t(), id="transposed"),
        pytest.param(lambda x: torch.cat([x, x], 1)[:, ::2], id="strided"),
        pytest.param(lambda x: x.flip(0), id="flipped"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded samples"),
        pytest.param(lambda x: x[:, :1].expand_as(x), id="expanded features"),
    ],
)
def test_strides(view):
    x = view(torch.randn(6, 4))
    t = VecNorm(["observation"], decay=1)
    y = t(TensorDict(observation=x, batch_size=[6]))["observation"]
    expected = Expected(1)
    torch.testing.assert_close(y, expected(x).float())
    torch.testing.assert_close(leaf(t, field="sum"), expected.sum)


def test_the_values_that_came_are_not_changed():
    td = batch()
    values = {key: td[key] for key in KEYS}
    trained()(td)
    for key, value in values.items():
        assert torch.equal(value, batch()[key])


def test_lazily_stacked_values():
    tds = [TensorDict(observation=torch.full((3,), float(i))) for i in range(4)]
    lazy = LazyStackedTensorDict.lazy_stack([td.clone() for td in tds])
    t = VecNorm(["observation"], decay=1)
    y = t(lazy)
    assert y is lazy
    expected = Expected(1)(torch.stack([td["observation"] for td in tds]))
    torch.testing.assert_close(lazy["observation"], expected.float())


def test_a_locked_tensordict_takes_nothing_new():
    td = batch().lock_()
    t = VecNorm(["observation"], ["o"])
    with pytest.raises(RuntimeError, match="locked"):
        t(td)


# --------------------------------------------------------------------------- bad input


def wrong(name: str) -> tuple[TensorDict, type[Exception], str]:
    """A call whose second key is bad, what it raises and what the message names."""
    td = batch(9)
    if name == "missing":
        return td.exclude("reward"), KeyError, "reward.*observation"
    value = {
        "shape": torch.ones(4, 5),
        "dimensions": torch.ones(4, 1, 1),
        "scalar": torch.ones(4),
        "complex": torch.ones(4, 1, dtype=torch.complex64),
        "sparse": torch.ones(4, 1).to_sparse(),
    }[name]
    kind = TypeError if name in ("complex", "sparse") else ValueError
    return td.set("reward", value), kind, "reward"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", ["missing", "shape", "dimensions", "scalar", "complex", "sparse"]
)
def test_all_or_nothing(name, training):
    td, kind, match = wrong(name)
    t = trained().train(training)
    before, given = snapshot(t), td.clone()
    with pytest.raises(kind, match=match):
        t(td)
    assert_same_state(snapshot(t), before)
    # Nor were values replaced.
    assert torch.equal(td["observation"], given["observation"])
    assert t.lock.acquire(block=False)
    t.lock.release()
    y = t(batch(9))["observation"]
    assert torch.equal(y, trained().train(training)(batch(9))["observation"])


@pytest.mark.parametrize("name", ["missing", "complex", "sparse"])
def test_all_or_nothing_at_the_first_call(name):
    td, kind, match = wrong(name)
    t = VecNorm(KEYS)
    with pytest.raises(kind, match=match):
        t(td)
    assert t._td is None


def test_a_wrong_shape_names_both():
    t = trained(keys=["observation"])
    with pytest.raises(ValueError, match=r"observation.*\b3\b.*\b7\b"):
        t(observations(torch.ones(2, 7)))
    t = VecNorm(["observation"], shapes=[torch.Size([3])])
    with pytest.raises(ValueError, match=r"observation.*\b3\b.*\b7\b"):
        t(observations(torch.ones(2, 7)))
    assert t._td is None


def test_a_missing_key_is_skipped_at_reset():
    t = VecNorm(decay=1)
    reset = TensorDict(observation=torch.ones(2))
    out = t._reset(TensorDict(), reset)
    assert set(out.keys()) == {"observation"}
    assert count(t) == 1
    with pytest.raises(KeyError, match=r"reward.*observation"):
        t._step(TensorDict(), TensorDict(observation=torch.ones(2)))
    assert count(t) == 1


def test_a_step_that_lacks_a_key():
    env = TransformedEnv(IntegerEnv(), VecNorm(["observation", "velocity"]))
    td = env.reset()
    with pytest.raises(KeyError, match="velocity"):
        env.rand_step(td)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.ones(4, 1, dtype=torch.int64), TypeError),
        (torch.ones(4, 1, dtype=torch.complex64), TypeError),
        (torch.ones(4, 2), ValueError),
    ],
    ids=["integers", "complex", "shape"],
)
def test_denorm_names_the_key(value, error):
    with pytest.raises(error, match=r"^VecNorm: key 'reward'"):
        trained().denorm(batch().set("reward", value))


@pytest.mark.parametrize("training", [True, False])
def test_errors_of_operators_name_the_key(monkeypatch, training):
    t = trained().train(training)
    name = "update_" if training else "normalize"

    def refuses(*args, **kwargs):
        raise ValueError("key 2: expected something, got key 1's")

    monkeypatch.setattr(functional, name, refuses)
    t._statistics.binding = None
    with pytest.raises(
        ValueError, match=r"key 'reward'.*key \('agents', 'observation'\)"
    ):
        t(batch())


@pytest.mark.parametrize(
    "value",
    [
        torch.quantize_per_tensor(torch.ones(4, 1), 1.0, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(1)] * 4),
        torch.nested.nested_tensor([torch.ones(1)] * 4, layout=torch.jagged),
        NonTensorData("a", batch_size=[4]),
        TensorDict({}, [4]),
    ],
    ids=["quantized", "nested", "jagged", "non-tensor", "tensordict"],
)
def test_what_is_no_value(value):
    t = trained()
    before = snapshot(t)
    for call in (t, t.denorm):
        td = batch()
        # Some of them know no way into a tensordict but this.
        td._tensordict["reward"] = value
        with pytest.raises(TypeError, match="reward"):
            call(td)
    assert_same_state(snapshot(t), before)


# ----------------------------------------------------------- values that are not finite


def test_nonfinite_counts_per_key_and_feature():
    t = trained(2, decay=0.9)
    assert (t.nonfinite["observation"] == 0).all()
    for bad in (math.nan, math.inf, -math.inf):
        td = batch()
        td["observation"][0, 1] = td["observation"][2, 1] = bad
        td[NESTED][3, 1, 2] = bad
        t(td)
    nonfinite = t.nonfinite
    assert nonfinite["observation"].dtype == torch.int64
    assert nonfinite["observation"].tolist() == [0, 6, 0]
    assert nonfinite[NESTED].tolist() == [[0, 0, 0], [0, 0, 3]]
    assert nonfinite["reward"].tolist() == [0]


@pytest.mark.parametrize("decay", [0.9, 1])
def test_values_that_are_not_finite_are_left_out(decay):
    t = VecNorm(["observation"], decay=decay)
    finite = [Expected(decay), Expected(decay)]
    for seed in range(20):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)) + 3
        x[seed % 6, 0] = (math.nan, math.inf, -math.inf)[seed % 3]
        y = t(observations(x))["observation"]
        for feature, expected in enumerate(finite):
            used = x[:, feature].isfinite()
            wanted = expected(x[used, feature])
            torch.testing.assert_close(
                y[used, feature].double(), wanted, rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                t.loc["observation"][feature].double(),
                expected.loc,
                rtol=1e-5,
                atol=1e-5,
            )
        # They come out as IEEE gives it.
        torch.testing.assert_close(
            y[~x.isfinite()], x[~x.isfinite()], rtol=0, atol=0, equal_nan=True
        )
    # The samples, not the values.
    assert count(t) == pytest.approx(sum(6 * decay**i for i in range(20)))


def test_nothing_but_nan():
    t = VecNorm(["observation"], decay=0.9)
    x = torch.tensor([[math.nan, 1.0], [math.nan, 3.0]])
    y = t(observations(x))["observation"]
    assert y[:, 0].isnan().all()
    assert y[:, 1].tolist() == [-1, 1]
    assert (
        t.loc["observation"].isfinite().all()
        and t.scale["observation"].isfinite().all()
    )
    y = t(observations([[5.0, 1.0], [7.0, 3.0]]))["observation"]
    torch.testing.assert_close(y[:, 0], torch.tensor([-1.0, 1.0]))
    assert t.nonfinite["observation"].tolist() == [2, 0]


def test_a_state_without_the_counter_takes_them_for_the_running_mean():
    shared = TensorDict(
        observation_sum=torch.zeros(1),
        observation_ssq=torch.zeros(1),
        observation_count=torch.zeros(1),
    ).share_memory_()
    t = VecNorm(["observation"], shared_td=shared, decay=1)
    t(observations([[1.0], [3.0]]))
    y = t(observations([[math.nan], [5.0]]))["observation"]
    # 1 and 3, then their mean 2 in place of the NaN, and 5.
    assert shared["observation_sum"].item() == 1 + 3 + 2 + 5
    assert shared["observation_ssq"].item() == 1 + 9 + 4 + 25
    assert shared["observation_count"].item() == 4
    assert y[0].isnan() and y[1].isfinite()
    assert "observation" not in t.nonfinite.keys()


def test_squares_beyond_float32():
    t = VecNorm(["observation"], decay=1)
    y = t(observations([[1e30], [3e30]]))["observation"]
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]))
    assert leaf(t, field="ssq").item() == pytest.approx(1e61, rel=1e-6)
    assert t.nonfinite["observation"].item() == 0


# ------------------------------------------------------------------------ tensorclasses


@tensorclass
class Step:
    observation: torch.Tensor
    normalized: torch.Tensor | None = None
    inner: Sample | None = None
    text: str = "a"


def steps(x):
    inner = Sample(3 * x, batch_size=[4])
    return Step(x.clone(), inner=inner, text="b", batch_size=[4])


@pytest.mark.parametrize(
    "make",
    [
        steps,
        lambda x: torch.stack([steps(x)[i] for i in range(4)]),
        lambda x: lazy_stack([steps(x)[i] for i in range(4)]),
        lambda x: LazyStackedTensorDict(*[steps(x)[i] for i in range(4)]),
        lambda x: TensorDict({"a": steps(x), "b": NonTensorData(1)}, [4])["a"],
    ],
    ids=["plain", "stack", "lazy_stack", "LazyStackedTensorDict", "entry"],
)
@pytest.mark.parametrize("key", ["observation", ("inner", "observation")])
@pytest.mark.parametrize("out_key", [None, "normalized"])
def test_tensorclasses(make, key, out_key):
    out_keys = None if out_key is None else [out_key]
    ours, theirs = (cls([key], out_keys, decay=1) for cls in (VecNorm, reference))
    for seed in range(3):
        x = batch(seed)["observation"]
        value, expected = make(x), theirs(make(x))
        y = ours(value)
        assert y is value
        name = key if out_key is None else out_key
        torch.testing.assert_close(
            y.get(name), expected.get(name), rtol=1e-4, atol=1e-4
        )
    assert count(ours, key) == count(theirs, key) == 12


@pytest.mark.parametrize("nested", [False, True])
def test_tensorclasses_in_a_replay_buffer(nested):
    key = ("a", "observation") if nested else "observation"
    t = VecNorm([key], decay=1)
    buffer = ReplayBuffer(storage=LazyTensorStorage(4), transform=t, batch_size=8)
    x = batch()["observation"]
    value = Sample(x.clone(), batch_size=[4])
    buffer.extend(TensorDict({"a": value}, [4]) if nested else value)
    for n in (8, 16):
        y = buffer.sample().get(key)
        assert count(t, key) == n
    raw = t.loc[key] + t.scale[key] * y
    assert (torch.cdist(raw, x).min(-1).values < 1e-5).all()


# --------------------------------------------------------------- a tensordict as module


def test_the_tensordict_that_came_is_returned():
    td = batch()
    t = VecNorm(KEYS, ["o", ("a", "o"), "r"])
    assert t(td) is td
    assert {"o", ("a", "o"), "r", *KEYS} == set(td.keys(True, True))


def test_inside_a_module():
    t = VecNorm(["observation"], ["normalized"], decay=1)
    module = TensorDictSequential(t)
    td = module(observations([[1.0], [3.0]]))
    assert td["normalized"].flatten().tolist() == [-1, 1]


def test_a_deepcopy_beside_a_thread_is_whole():
    t = VecNorm(["observation"], decay=1)
    features = 500
    done = threading.Event()

    def update():
        while not done.is_set():
            t._statistics.binding = None  # the way that gives other threads their turn
            t(observations(torch.full((1, features), 3.0)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=update, daemon=True)
    thread.start()
    try:
        while t._td is None:
            pass
        for _ in range(200):
            copied = copy.deepcopy(t)
            n = count(copied)
            assert (leaf(copied, field="sum") == 3 * n).all()
            assert (leaf(copied, field="ssq") == 9 * n).all()
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join(PATIENCE)


def test_threads_lose_no_update():
    t = VecNorm(["observation"], decay=1)
    t(observations([[1.0]]))

    def update():
        for _ in range(500):
            t(observations([[1.0]]))

    threads = [threading.Thread(target=update, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert count(t) == leaf(t, field="sum").item() == 2001


def test_a_checkpoint_of_scalar_features():
    t, other = VecNorm(["r"]), VecNorm(["r"])
    td = TensorDict({"r": torch.randn(5)}, [5])
    t(td.clone())
    for _ in range(2):  # fresh, then initialised
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.load_state_dict(copy.deepcopy(t.state_dict()))
        assert torch.equal(other(td.clone())["r"], copy.deepcopy(t)(td.clone())["r"])


def test_statistics_from_inference_mode():
    """They can be loaded into, and updated, outside of it."""
    t, td = VecNorm(["r"]), TensorDict({"r": torch.randn(5, 2)}, [5])
    with torch.inference_mode():
        t(td.clone())
    t(td.clone())
    t.load_state_dict(copy.deepcopy(t.state_dict()))


def test_a_locked_tensordict_leaves_the_statistics_alone():
    t, td = VecNorm(["r"], ["n"]), TensorDict({"r": torch.randn(5, 2)}, [5])
    for _ in range(2):
        t(td.clone())
    before = t._td.clone()
    with pytest.raises(RuntimeError, match="locked"):
        t(td.clone().lock_())
    assert (t._td == before).all()


def test_what_cannot_be_written_leaves_the_statistics_alone():
    nested = TensorDict({"r": torch.randn(5, 2), "a": {"o": torch.randn(5, 2)}}, [5])
    for out_keys, error, match in [
        (["r", ("a", "o")], RuntimeError, "locked"),
        (["r", ("a", "b", "o")], RuntimeError, "locked"),
        (["n", ("r", "o")], KeyError, "expected a tensordict at .'r'.*got Tensor"),
    ]:
        t = VecNorm(["r", ("a", "o")], out_keys)
        td = nested.clone()
        if error is RuntimeError:
            t(td.clone())
            td["a"].lock_()
        before = snapshot(t)
        for _ in range(2):
            with pytest.raises(error, match=match):
                t(td)
            assert_same_state(snapshot(t), before)
            assert torch.equal(td["r"], nested["r"])


class Full(TensorDict):
    """Takes no reward, which is the last of KEYS."""

    error = RuntimeError

    def set(self, key, value, *args, **kwargs):
        if key == "reward":
            raise self.error("full")
        return super().set(key, value, *args, **kwargs)


class Interrupted(Full):
    error = KeyboardInterrupt


@tensorclass
class Sample:
    observation: torch.Tensor


def part_of(td):
    return torch.cat([td, td])._get_sub_tensordict(slice(0, len(td)))


def halves_locked(td):
    return lazy_stack([half.clone().lock_() for half in td.unbind(0)])


#: Tensordicts that say only when it is tried that they take no output, and out_keys.
UNWRITABLE = {
    "an entry": (lambda td: Full(td, batch_size=[4]), None),
    "an interrupt": (lambda td: Interrupted(td, batch_size=[4]), None),
    "a part": (part_of, None),
    "locked parts": (halves_locked, None),
    "other batch": (lambda td: td.set("x", TensorDict({}, [4, 2])), ("x", "o")),
    "a tensorclass": (lambda td: Sample(td["observation"], batch_size=[4]), "o"),
}


@pytest.mark.parametrize("placed", ["first call", "private", "shared", "mapped"])
@pytest.mark.parametrize("name", UNWRITABLE)
@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["eager", "compiled"],
)
def test_an_output_that_is_not_taken_leaves_the_statistics_alone(
    name, placed, compiled
):
    make, out_key = UNWRITABLE[name]
    keys, out_keys = KEYS, None
    if out_key is not None:
        keys, out_keys = ["observation"], [out_key]
    t = VecNorm(keys, out_keys, decay=1)
    if placed != "first call":
        for _ in range(2):
            t(batch().set("x", TensorDict({}, [4])))
    if placed in ("shared", "mapped"):
        td = t._td.clone()
        td = td.share_memory_() if placed == "shared" else td.memmap_()
        lock = mp.get_context("spawn").Lock()
        t = VecNorm(keys, out_keys, shared_td=td, lock=lock, decay=1)
    before = snapshot(t)
    td = make(TensorDict(batch(9), batch_size=[4]))
    torch._dynamo.reset()
    call = torch.compile(t, backend="aot_eager") if compiled else t
    with pytest.raises((RuntimeError, AttributeError, KeyboardInterrupt)):
        call(td)
    assert_same_state(snapshot(t), before)
    t(batch().set("x", TensorDict({}, [4])))
    assert count(t) == (12 if before else 4)


def test_values_on_two_devices_are_all_or_nothing(monkeypatch):
    """Each device has a call of its own, and the second one fails."""
    t = trained()
    before = snapshot(t)
    update_, calls = functional.update_, []

    def fails(*args, **kwargs):
        calls.append(update_(*args, **kwargs))
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(functional, "update_", fails)
    t._statistics.binding = None
    with pytest.raises(RuntimeError, match="CUDA error"):
        t(batch(9))
    assert calls
    assert_same_state(snapshot(t), before)


def differentiated(t, td):
    torch.func.grad(lambda x: t(td.set("observation", x))["observation"].sum())(
        td["observation"]
    )


def pushed_forward(t, td):
    x = td["observation"]
    torch.func.jvp(lambda x: t(td.set("observation", x))["observation"], (x,), (x,))


def with_fake_values(t, td):
    with FakeTensorMode() as mode:
        td = td.apply(mode.from_tensor)
    expected = td.clone()
    y = t(td)
    for key in KEYS:
        assert isinstance(y[key], FakeTensor)
        assert y[key].shape == expected[key].shape
        assert y[key].dtype == expected[key].dtype


def under_fake_tensor_mode(t, td):
    with FakeTensorMode():
        y = t(batch())
        for key in KEYS:
            assert isinstance(y[key], FakeTensor) and y[key].shape == td[key].shape
        if t._td is not None:
            original = t.denorm(y.select(*KEYS))
            assert all(isinstance(original[key], FakeTensor) for key in KEYS)


def traced(mode):
    def trace(t, td):
        def call(x):
            return t(td.set("observation", x))["observation"]

        make_fx(call, tracing_mode=mode)(td["observation"])

    return trace


def exported(t, td):
    class Module(torch.nn.Module):
        def forward(self, x):
            return t(td.set("observation", x))["observation"]

    torch.export.export(Module(), (td["observation"],), strict=False)


@pytest.mark.parametrize("known", [False, True], ids=["first call", "later"])
@pytest.mark.parametrize(
    ("how", "samples"),
    [
        (differentiated, 4),
        (pushed_forward, 4),
        (traced("real"), 4),
        (under_fake_tensor_mode, 0),
        (with_fake_values, 0),
        (traced("fake"), 0),
        (traced("symbolic"), 0),
        (exported, 0),
        (lambda t, td: torch.vmap(t)(td), 0),
        (lambda t, td: t(td.to("meta")), 0),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_calls_that_are_looked_into(how, samples, known):
    """They count as other calls do, or not at all, and the next one is right."""
    keys = KEYS if how in (under_fake_tensor_mode, with_fake_values) else KEYS[:1]
    t = VecNorm(keys, decay=1)
    expected = Expected(1)
    if known:
        for seed in range(2):
            t(batch(seed))
            expected(batch(seed)["observation"])
    try:
        how(t, batch(7))
    except Exception:
        assert samples == 0  # an error is right where torch cannot follow
    if samples:
        expected(batch(7)["observation"])
    y = t(batch(8))["observation"]
    torch.testing.assert_close(y, expected(batch(8)["observation"]).float())
    for field in FIELDS:
        value = leaf(t, field=field)
        assert type(value) is torch.Tensor
        torch.testing.assert_close(
            value, torch.as_tensor(getattr(expected, field)).double().view_as(value)
        )


def test_an_exported_transform_does_not_update():
    """A frozen one becomes the graph of its normalisation."""
    t = trained(keys=["observation"]).freeze()

    class Module(torch.nn.Module):
        def forward(self, x):
            return t(TensorDict(observation=x, batch_size=[4]))["observation"]

    x = batch(9)["observation"]
    before = snapshot(t)
    y = torch.export.export(Module(), (x,), strict=False).module()(x)
    torch.testing.assert_close(y, (x - t.loc["observation"]) / t.scale["observation"])
    assert_same_state(snapshot(t), before)


def test_a_meta_tensor_is_no_value():
    t = trained()
    before = snapshot(t)
    td = batch()
    td["reward"] = td["reward"].to("meta")
    with pytest.raises(TypeError, match=r"reward.*on meta"):
        t(td)
    assert_same_state(snapshot(t), before)


# ----------------------------------------------------- statistics that follow the values


@pytest.fixture
def other_device(monkeypatch):
    """Values are on another device than the statistics: as far as a CPU can tell."""

    def follow(self, state, device):
        return Moments(*(None if leaf is None else leaf.clone() for leaf in state))

    monkeypatch.setattr(Store, "follow", follow)


@pytest.mark.usefixtures("other_device")
def test_the_first_update_after_a_move_is_not_lost():
    # A checkpoint that was adopted is in shared memory, where updates are committed.
    t = VecNorm(["observation"], decay=1)
    t(observations(torch.ones(4, 3)))
    resumed = VecNorm(["observation"], decay=1)
    resumed.load_state_dict(through_a_file(t.state_dict()))
    for n in range(2, 6):
        resumed._statistics.binding = None
        resumed(observations(torch.ones(4, 3)))
        assert count(resumed) == leaf(resumed, field="sum")[0] == 4 * n


@pytest.mark.usefixtures("other_device")
def test_a_frozen_copy_follows_a_move():
    t = VecNorm(["observation", "reward"], decay=1)
    td = TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1))
    td.batch_size = [4]
    t(td.clone())
    frozen = t.frozen_copy()
    for _ in range(3):
        t._statistics.binding = None
        t(td.clone().apply(lambda x: x + 5))
        for key in ("observation", "reward"):
            assert torch.equal(frozen.loc[key], t.loc[key])


@pytest.mark.usefixtures("other_device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["frozen", "frozen copy", "eval"])
def test_only_an_update_moves_the_statistics(how, compiled):
    t = trained()
    live = dict(t._td.items(True, True))
    called = {
        "frozen": VecNorm.freeze,
        "frozen copy": VecNorm.frozen_copy,
        "eval": VecNorm.eval,
    }[how](t)
    called._statistics.binding = None
    torch._dynamo.reset()
    call = torch.compile(called, backend="aot_eager") if compiled else called
    y = call(batch(9))
    for key in KEYS:
        expected = (batch(9)[key] - t.loc[key]) / t.scale[key]
        torch.testing.assert_close(y[key], expected)
    for name, value in t._td.items(True, True):
        assert value is live[name]


def test_to_decides_where_loaded_statistics_are():
    t, td = VecNorm(["r"]), TensorDict({"r": torch.randn(5, 2)}, [5])
    t(td.clone())
    loaded = VecNorm(["r"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_state_dict(copy.deepcopy(t.state_dict()))
    assert loaded.to("meta")._td["r_sum"].device.type == "meta"


@pytest.mark.parametrize("memmap", [False, True])
def test_given_statistics_stay_where_they_are(memmap):
    td = VecNorm.build_td_for_shared_vecnorm(CountingEnv(), memmap=memmap)
    t = VecNorm(["reward"], shared_td=td)
    assert t.to("meta")._td is td


def test_a_frozen_copy_follows_keys_seen_later():
    t = VecNorm()
    td = TensorDict({"observation": torch.randn(5, 2), "reward": torch.ones(5, 1)}, [5])
    t._reset(TensorDict({}, [5]), td.select("observation"))
    frozen = t.frozen_copy()
    t(td.clone())
    assert "reward" in frozen.loc.keys()


def test_fresh_shared_statistics_are_identity_with_a_warning():
    td = VecNorm.build_td_for_shared_vecnorm(CountingEnv())
    t = VecNorm(["reward"], shared_td=td).freeze()
    data = TensorDict({"reward": torch.randn(5, 1)}, [5])
    with pytest.warns(UserWarning, match="no statistics"):
        assert torch.equal(t(data.clone())["reward"], data["reward"])


def test_an_eval_that_torchrl_means():
    """Only placing a transform is not the user's wish."""
    t = VecNorm()
    namespace = {"__name__": "torchrl.trainers.trainers"}
    exec("def validate(policy):\n    policy.eval()\n", namespace)
    namespace["validate"](torch.nn.Sequential(t))
    assert not t.training
