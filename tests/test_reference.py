# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Against torchrl's own VecNorm, "the reference".

First where both agree: the same statistics and values, step for step; checkpoints and
shared tensordicts that go both ways. Then every row of section 4 of the contract, the
places where the reference departs from its documentation or is wrong. Each of those
tests shows the departure first, and then what is right.
"""

from __future__ import annotations

import math
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
import torchrl.envs
from common import (
    FIELDS,
    PATIENCE,
    AgentsEnv,
    Expected,
    IntegerEnv,
    assert_agree,
    assert_same_state,
    count,
    leaf,
    leaf_name,
    reference,
    snapshot,
    started,
    through_a_file,
)
from tensordict import TensorDict
from torch import multiprocessing as mp
from torchrl.data import Bounded
from torchrl.envs import Compose, GymEnv, TransformedEnv, check_env_specs

from torchrl_vecnorm import VecNorm

# The reference floors the variance, we floor the standard deviation.
EPS = 1e-4
OUR_EPS = math.sqrt(EPS)

FEATURES = {"observation": (3,), ("agents", "observation"): (2, 3), "reward": (1,)}
KEYS = list(FEATURES)


def batches(batch_size, n, seed=0, dtype=torch.float64):
    """``n`` tensordicts; means and deviations differ, one feature is constant."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        td = TensorDict(batch_size=batch_size)
        for i, (key, features) in enumerate(FEATURES.items()):
            x = torch.randn(*batch_size, *features, generator=generator, dtype=dtype)
            td[key] = (i + 1) * x + 3 * i
        td["observation"][..., 0] = 0.5
        yield td


def pair(keys=KEYS, **kwargs):
    """Ours and the reference, told to do the same."""
    ours = VecNorm(in_keys=list(keys), eps=OUR_EPS, **kwargs)
    return ours, reference(in_keys=list(keys), eps=EPS, **kwargs)


def by_hand(keys=KEYS, dtype=torch.float32) -> TensorDict:
    """A shared tensordict in the reference's layout."""
    td = TensorDict(batch_size=[])
    for key in keys:
        for field in FIELDS:
            shape = (1,) if field == "count" else FEATURES[key]
            td[leaf_name(key, field)] = torch.zeros(shape, dtype=dtype)
    return td.share_memory_()


def vectors(*values, dtype=torch.float32) -> TensorDict:
    """One observation with one feature for each value."""
    return TensorDict(
        observation=torch.tensor(values, dtype=dtype).unsqueeze(-1),
        batch_size=[len(values)],
    )


# --------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("decay", [0.9, 0.9999, 1])
def test_state_for_state(decay):
    ours, theirs = pair(decay=decay)
    for td in batches((4,), 300):
        y, expected = ours(td.clone()), theirs(td.clone())
        # Its count is float32, and so is its decay there: 2.6e-8 a call for 0.9999.
        assert_agree(ours, theirs, KEYS, rtol=1e-10, count_rtol=3e-5)
        for key in KEYS:
            torch.testing.assert_close(y[key], expected[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_size", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1])
def test_state_for_state_in_float64(decay, batch_size):
    ours, theirs = pair(decay=decay)
    # With a float64 count nothing keeps the two apart.
    theirs._td = by_hand(dtype=torch.float64)
    for td in batches(batch_size, 200):
        y, expected = ours(td.clone()), theirs(td.clone())
        assert_agree(ours, theirs, KEYS, rtol=1e-10, count_rtol=1e-12)
        for key in KEYS:
            torch.testing.assert_close(y[key], expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", [0.9, 1])
def test_state_for_state_on_float32_data(decay):
    ours, theirs = pair(decay=decay)
    for td in batches((4,), 300, dtype=torch.float32):
        y, expected = ours(td.clone()), theirs(td.clone())
        assert_agree(ours, theirs, KEYS, rtol=1e-4, count_rtol=1e-5)
        for key in KEYS:
            assert y[key].dtype == expected[key].dtype == torch.float32
            torch.testing.assert_close(y[key], expected[key], rtol=1e-3, atol=1e-3)


def test_the_state_is_laid_out_as_the_references():
    ours, theirs = pair()
    for td in batches((2, 3), 1):
        ours(td.clone()), theirs(td.clone())
    assert ours._td.batch_size == theirs._td.batch_size == torch.Size([])
    for name, expected in theirs._td.items(True, True):
        assert ours._td.get(name).shape == expected.shape, name
        assert ours._td.get(name).dtype == torch.float64, name


def test_shapes_agree_where_only_the_batch_is_reduced():
    shapes = [torch.Size(FEATURES[key]) for key in KEYS]
    ours, theirs = pair(shapes=shapes)
    for td in batches((4,), 100):
        y, expected = ours(td.clone()), theirs(td.clone())
        for key in KEYS:
            torch.testing.assert_close(y[key], expected[key], rtol=1e-4, atol=1e-4)
    assert_agree(ours, theirs, KEYS, rtol=1e-10, count_rtol=1e-5)


def test_frozen_after_data():
    ours, theirs = pair()
    for td in batches((4,), 50):
        ours(td.clone()), theirs(td.clone())
    copies = ours.frozen_copy(), theirs.frozen_copy()
    before = snapshot(ours)
    for td in batches((4,), 20, seed=1):
        for mine, its in ((ours.freeze(), theirs.freeze()), copies):
            y, expected = mine(td.clone()), its(td.clone())
            for key in KEYS:
                torch.testing.assert_close(y[key], expected[key], rtol=1e-4, atol=1e-4)
    assert_same_state(snapshot(ours), before)
    ours.unfreeze(), theirs.unfreeze()
    for td in batches((4,), 50, seed=2):
        ours(td.clone()), theirs(td.clone())
    assert_agree(ours, theirs, KEYS, rtol=1e-10, count_rtol=1e-5)


def test_loc_scale_and_what_is_made_of_them():
    out_keys = ["o", ("a", "o"), "r"]
    ours, theirs = pair(out_keys=out_keys)
    for td in batches((4,), 100):
        td, expected = ours(td.clone()), theirs(td.clone())
    for key in KEYS:
        for name in ("loc", "scale"):
            mine, its = getattr(ours, name)[key], getattr(theirs, name)[key]
            assert mine.dtype == its.dtype
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    td, expected = (
        t.denorm(td.select(*out_keys)) for t in (ours, theirs) for td in [expected]
    )
    norms = ours.to_observation_norm(), theirs.to_observation_norm()
    assert all(type(norm) is Compose for norm in norms)
    y, y_expected = norms[0](td.clone()), norms[1](td.clone())
    for key, out_key in zip(KEYS, out_keys, strict=True):
        torch.testing.assert_close(td[key], expected[key], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            y[out_key], y_expected[out_key], rtol=1e-4, atol=1e-4
        )
    # The parameters of the one load in the other.
    norms[0].load_state_dict(norms[1].state_dict())


def test_side_by_side_on_pendulum():
    ours = VecNorm(["observation"], ["ours"], decay=0.99, eps=OUR_EPS)
    theirs = reference(["observation"], ["theirs"], decay=0.99, eps=EPS)
    env = TransformedEnv(GymEnv("Pendulum-v1"), Compose(ours, theirs))
    env.set_seed(0)
    rollout = env.rollout(500, break_when_any_done=False)
    torch.testing.assert_close(rollout["ours"], rollout["theirs"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        rollout["next", "ours"], rollout["next", "theirs"], rtol=1e-3, atol=1e-3
    )
    assert_agree(ours, theirs, ["observation"], rtol=1e-4, count_rtol=1e-5)


def test_isinstance_of_the_reference():
    # This is how TorchRL finds the transforms that an evaluator has to freeze.
    assert isinstance(VecNorm(), torchrl.envs.VecNorm)
    assert issubclass(VecNorm, torchrl.envs.VecNorm)
    assert not isinstance(reference(), VecNorm)


def test_no_deprecation_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VecNorm()
        VecNorm(new_api=False)


# ------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
@pytest.mark.parametrize("saved_by", ["reference", "ours"])
@pytest.mark.filterwarnings("ignore:VecNorm wasn't initialized")
def test_checkpoints_both_ways(saved_by, initialised):
    ours, theirs = pair(decay=0.99)
    source, target = (theirs, ours) if saved_by == "reference" else (ours, theirs)
    for td in batches((4,), 100):
        source(td)
    if initialised:
        for td in batches((4,), 30, seed=1):
            target(td)
    dtype = None if target._td is None else leaf(target).dtype
    result = target.load_state_dict(through_a_file(source.state_dict()))
    assert not result.missing_keys and not result.unexpected_keys
    assert dtype in (None, leaf(target).dtype)
    if target is ours:
        # The reference's count is float32; ours never is, unless it is shared so.
        assert all(value.dtype == torch.float64 for value in snapshot(ours).values())
    assert_agree(target, source, KEYS, rtol=1e-10, count_rtol=1e-6)
    for td in batches((4,), 200, seed=2):
        y, expected = target(td.clone()), source(td.clone())
        assert_agree(target, source, KEYS, rtol=1e-10, count_rtol=1e-5)
        for key in KEYS:
            torch.testing.assert_close(y[key], expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("initialised", [False, True], ids=["fresh", "initialised"])
@pytest.mark.filterwarnings("ignore:VecNorm wasn't initialized")
def test_checkpoint_to_the_reference_and_back(initialised):
    """What the reference does not know of must not mislead us when it comes back."""
    first, theirs = pair(decay=0.99)
    for td in batches((4,), 100):
        first(td)
    theirs.load_state_dict(through_a_file(first.state_dict()))
    for td in batches((4,), 300, seed=1):
        theirs(td)
    back, _ = pair(decay=0.99)
    if initialised:
        for td in batches((4,), 10, seed=2):
            back(td)
    back.load_state_dict(through_a_file(theirs.state_dict()))
    for key in KEYS:
        for name in ("loc", "scale"):
            mine, its = getattr(back, name)[key], getattr(theirs, name)[key]
            torch.testing.assert_close(mine.double(), its, rtol=1e-5, atol=1e-5)
    for td in batches((4,), 20, seed=3):
        y, expected = back(td.clone()), theirs(td.clone())
        for key in KEYS:
            torch.testing.assert_close(y[key], expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:VecNorm wasn't initialized")
def test_checkpoint_of_an_environment():
    def make_env(transform):
        return TransformedEnv(GymEnv("Pendulum-v1"), Compose(transform))

    ours, theirs = pair(["observation", "reward"])
    old, new = make_env(theirs), make_env(ours)
    old.set_seed(0)
    old.rollout(50)
    new.load_state_dict(through_a_file(old.state_dict()))
    assert_agree(ours, theirs, ["observation", "reward"], rtol=1e-6, count_rtol=1e-6)
    new.rollout(20)
    assert count(ours) > count(theirs) + 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_shared_tensordict_that_both_update(dtype):
    keys = ["observation", "reward"]  # the reference cannot be given nested ones
    shared = by_hand(keys, dtype)
    address = {name: value.data_ptr() for name, value in shared.items()}
    ours, theirs = pair(keys, shared_td=shared, decay=0.99)
    expected = {key: Expected(0.99, OUR_EPS) for key in keys}
    for i, td in enumerate(batches((4,), 400)):
        wanted = {key: expected[key](td[key]) for key in keys}
        y = (ours, theirs)[i % 2](td)
        for key in keys:
            torch.testing.assert_close(y[key], wanted[key], rtol=1e-3, atol=1e-3)
    assert set(shared.keys(True, True)) == {
        leaf_name(key, field) for key in keys for field in FIELDS
    }
    for name, value in shared.items():
        # In place and in its own dtype: other processes hold these very tensors.
        assert value.data_ptr() == address[name]
        assert value.dtype == dtype
        assert value.is_shared()
    for key in keys:
        torch.testing.assert_close(
            ours.loc[key].double(), expected[key].loc, rtol=1e-4, atol=1e-4
        )


# --------------------------------------------- section 4 of the contract, row after row


def test_eval_mode_is_honoured():
    ours, theirs = pair(["observation"])
    for t in (ours, theirs):
        t(vectors(1, 2, 3))
        t.eval()
        t(vectors(10, 20, 30))
    assert count(theirs) > 3.5
    assert count(ours) == 3
    ours.train()(vectors(10, 20, 30))
    assert count(ours) > 3.5


def test_eps_floors_the_standard_deviation():
    constant = vectors(5, 5, 5)
    for eps in (1e-4, 1e-2, 0.25):
        ours, theirs = (
            VecNorm(["observation"], eps=eps),
            reference(["observation"], eps=eps),
        )
        ours(constant.clone()), theirs(constant.clone())
        torch.testing.assert_close(
            theirs.scale["observation"], torch.tensor([math.sqrt(eps)])
        )
        torch.testing.assert_close(ours.scale["observation"], torch.tensor([eps]))
        same = VecNorm(["observation"], eps=math.sqrt(eps))
        same(constant.clone())
        torch.testing.assert_close(same.scale, theirs.scale)
    # Between eps and its root, the documented floor leaves the deviation as it is.
    ours, theirs = VecNorm(["observation"]), reference(["observation"])
    x = vectors(-1e-3, 1e-3)
    ours(x.clone()), theirs(x.clone())
    torch.testing.assert_close(theirs.scale["observation"], torch.tensor([1e-2]))
    torch.testing.assert_close(ours.scale["observation"], torch.tensor([1e-3]))


def test_one_scale_everywhere():
    # Above 1 the reference's second clamp shows: 4 in forward, 2 elsewhere.
    eps = 4.0
    x = vectors(-1, 1)
    theirs = reference(["observation"], ["y"], eps=eps)
    y = theirs(x.clone())
    torch.testing.assert_close(y["y"], x["observation"] / 4)
    torch.testing.assert_close(theirs.denorm(y)["observation"], x["observation"] / 2)

    ours = VecNorm(["observation"], ["y"], eps=eps)
    y = ours(x.clone())
    torch.testing.assert_close(y["y"], x["observation"] / 4)
    torch.testing.assert_close(ours.scale["observation"], torch.tensor([4.0]))
    torch.testing.assert_close(ours.denorm(y)["observation"], x["observation"])
    norm = ours.to_observation_norm()
    torch.testing.assert_close(norm(x.clone())["y"], y["y"])


@pytest.mark.parametrize("decay", [0.9, 0.9999, 1])
@pytest.mark.parametrize("samples", [1, 1000])
def test_a_mean_far_from_zero(samples, decay):
    ours = VecNorm(["observation"], decay=decay)
    theirs = reference(["observation"], decay=decay)
    exact = Expected(decay)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(300):
        x = 1e4 + torch.randn(samples, 2, generator=generator)
        wanted = exact(x)
        y = ours(TensorDict(observation=x, batch_size=[samples]))["observation"]
        theirs(TensorDict(observation=x, batch_size=[samples]))
        # A float32 of 1e4 has steps of 1e-3, which is what y can be wrong by.
        torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3)
        if exact.count > 1:
            torch.testing.assert_close(
                ours.scale["observation"].double(), exact.scale, rtol=1e-3, atol=0
            )
            error = theirs.scale["observation"].double() / exact.scale - 1
            worst = max(worst, error.abs().max().item())
    assert worst > 0.5


@pytest.mark.filterwarnings("ignore:VecNorm wasn't initialized")
def test_the_count_goes_beyond_2_to_the_24():
    n = 2**24
    state = {
        "observation_sum": torch.zeros(1),
        "observation_ssq": torch.full((1,), float(n)),
        "observation_count": torch.full((1,), float(n)),
    }
    ours, theirs = pair(["observation"], decay=1)
    for t in (ours, theirs):
        t.set_extra_state(deepcopy(state))
        for _ in range(10):
            t(vectors(1))
    assert count(theirs) == n
    assert count(ours) == n + 10


def test_shapes_that_reduce_more_than_the_batch():
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    ours, theirs = pair(["observation"], shapes=[torch.Size([3])])
    for t in (ours, theirs):
        t(TensorDict(observation=x, batch_size=[5]))
    assert count(theirs) == 5
    assert count(ours) == 20
    torch.testing.assert_close(ours.loc["observation"], x.mean((0, 1)))


def test_a_partial_reset_counts_the_rows_that_were_reset():
    counts = {}
    for name, t in zip(("ours", "theirs"), pair(["observation"], decay=1), strict=True):
        env = TransformedEnv(IntegerEnv(lengths=(50, 50, 50, 50)), t)
        td = env.reset()
        td["_reset"] = torch.tensor([False, True, True, False]).unsqueeze(-1)
        env.reset(td)
        counts[name] = count(t)
        if name == "ours":
            # Environment i starts at 10 * i.
            assert leaf(t, field="sum").tolist() == [60 + 30, -2 * (60 + 30)]
    assert counts == {"ours": 4 + 2, "theirs": 4 + 4}


def test_frozen_before_any_data_is_the_identity():
    ours, theirs = pair(["observation"])
    assert theirs.freeze()(vectors(1, 2, 3))["observation"].isnan().all()
    ours.freeze()
    with pytest.warns(UserWarning, match="no statistics yet") as record:
        for _ in range(3):
            y = ours(vectors(1, 2, 3))
            torch.testing.assert_close(y, vectors(1, 2, 3), rtol=0, atol=0)
    assert len(record) == 1
    assert ours._td is None


def test_eval_mode_before_any_data_is_the_identity():
    ours, theirs = pair(["observation"])
    # Eval mode means nothing to the reference, which learns.
    assert theirs.eval()(vectors(1, 2, 3))["observation"][1] == 0
    with pytest.warns(UserWarning, match="no statistics yet") as record:
        for _ in range(3):
            y = ours.eval()(vectors(1, 2, 3))
            torch.testing.assert_close(y, vectors(1, 2, 3), rtol=0, atol=0)
    assert len(record) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_poisons_nothing(bad):
    ours, theirs = pair(["observation"], decay=1)
    x = torch.tensor([[1.0, 2.0], [bad, 4.0], [3.0, 6.0]])
    for t in (ours, theirs):
        y = t(TensorDict(observation=x.clone(), batch_size=[3]))["observation"]
        for _ in range(10):
            later = t(TensorDict(observation=x[[0, 2]], batch_size=[2]))["observation"]
        if t is theirs:
            assert later[:, 0].isnan().all()
            continue
        # As IEEE gives it: (bad - loc) / scale.
        torch.testing.assert_close(y[1, 0], torch.tensor(bad), equal_nan=True)
        torch.testing.assert_close(y[[0, 2], 0], torch.tensor([-1.0, 1.0]))
        # The other value of that row counted.
        torch.testing.assert_close(y[:, 1].mean(), torch.tensor(0.0))
        torch.testing.assert_close(later[:, 0], torch.tensor([-1.0, 1.0]))
        torch.testing.assert_close(t.loc["observation"], torch.tensor([2.0, 4.0]))
        assert t.nonfinite["observation"].tolist() == [1, 0]


def test_integers_do_not_throw():
    x = vectors(1, 2, 3, dtype=torch.int64)
    ours, theirs = pair(["observation"], decay=0.9)
    with pytest.raises(RuntimeError, match="can't be cast"):
        theirs(x.clone())
    y = ours(x.clone())["observation"]
    assert y.dtype == torch.get_default_dtype()
    torch.testing.assert_close(y.flatten(), torch.tensor([-1, 0, 1]) * 1.5**0.5)


def test_integers_do_not_wrap():
    x = vectors(100, 200, 250, dtype=torch.uint8)
    ours, theirs = pair(["observation"], decay=1)
    theirs(x.clone())
    assert leaf(theirs, field="sum").item() == (100 + 200 + 250) % 256
    ours(x.clone())
    assert leaf(ours, field="sum").item() == 550
    assert leaf(ours, field="ssq").item() == 100**2 + 200**2 + 250**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_neither_overflows_nor_stagnates(dtype):
    x = vectors(300, 500, dtype=dtype)
    ours, theirs = pair(["observation"], decay=1)
    for t in (ours, theirs):
        for _ in range(300):
            y = t(x.clone())["observation"]
        scale = t.scale["observation"].item()
        if t is theirs:
            assert not abs(scale - 100) < 5
            continue
        assert scale == 100
        assert y.dtype == t.loc["observation"].dtype == dtype
        assert y.flatten().tolist() == [-1, 1]
        assert leaf(t, field="sum").item() == 300 * (300 + 500)
        assert leaf(t, field="ssq").item() == 300 * (300**2 + 500**2)
    # One batch is enough for float16.
    x = vectors(*[300, 500] * 1000, dtype=dtype)
    ours, theirs = pair(["observation"], decay=1)
    ours(x.clone()), theirs(x.clone())
    assert leaf(ours, field="sum").item() == 800_000
    assert leaf(theirs, field="sum").item() != 800_000


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(torch.ones(2, 4), id="shape"),
        pytest.param(torch.ones(2, 1, dtype=torch.complex64), id="complex"),
    ],
)
def test_the_lock_is_released_after_an_exception(wrong):
    ours, theirs = pair(["observation"])
    for t in (ours, theirs):
        t(vectors(1, 2))
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            t(TensorDict(observation=wrong.clone(), batch_size=[2]))
    assert not theirs.lock.acquire(block=False)
    assert ours.lock.acquire(block=False)
    ours.lock.release()
    ours(vectors(1, 2))


def hold_the_locks(ours, theirs, held, done):
    ours.lock.acquire()
    theirs.lock.acquire()
    held.set()
    done.wait(PATIENCE)
    ours.lock.release()
    theirs.lock.release()


def test_an_explicit_lock_reaches_a_spawned_worker():
    context = mp.get_context("spawn")
    lock, its_lock = context.Lock(), context.Lock()
    ours, theirs = VecNorm(lock=lock), reference(lock=its_lock)
    held, done = context.Event(), context.Event()
    with started(context, hold_the_locks, [(ours, theirs, held, done)]):
        try:
            assert held.wait(PATIENCE)
            # The worker of the reference holds a lock that nobody else has.
            assert its_lock.acquire(block=False)
            assert not lock.acquire(block=False)
        finally:
            done.set()
    assert lock.acquire(block=False)


def test_a_pickle_that_cannot_hold_the_lock_has_one_of_its_own():
    # Locks can only be handed to a process that is being started.
    for copied in (pickle.loads(pickle.dumps(VecNorm())), deepcopy(VecNorm())):
        assert copied.lock.acquire(block=False)
        copied.lock.release()
        copied(TensorDict(observation=torch.ones(2), reward=torch.ones(1)))


def test_no_graph_grows_from_call_to_call():
    ours, theirs = pair(["observation"])
    for t in (ours, theirs):
        for _ in range(3):
            x = torch.randn(4, 2, requires_grad=True)
            t(TensorDict(observation=x, batch_size=[4]))
    assert leaf(theirs, field="sum").requires_grad
    for field in FIELDS:
        assert not leaf(ours, field=field).requires_grad
        assert leaf(ours, field=field).grad_fn is None
    # y is differentiable in x, with the statistics as constants.
    y = ours(TensorDict(observation=x, batch_size=[4]))["observation"]
    y.sum().backward()
    torch.testing.assert_close(x.grad, (1 / ours.scale["observation"]).expand_as(x))


def test_loc_gives_the_keys_seen():
    ours, theirs = pair(["observation", "reward"])
    for t in (ours, theirs):
        # Rewards are not there at a reset.
        TransformedEnv(IntegerEnv(), t).reset()
    with pytest.raises((KeyError, TypeError)):
        theirs.loc  # noqa: B018
    assert list(ours.loc.keys()) == list(ours.scale.keys()) == ["observation"]
    fresh = VecNorm()
    assert fresh.loc.is_empty() and fresh.scale.is_empty()


def test_specs_of_the_reward_follow():
    ours, theirs = pair(["observation", "reward"])
    for t in (ours, theirs):
        env = TransformedEnv(IntegerEnv(), t)
        bounded = isinstance(env.reward_spec, Bounded)
        assert bounded == (t is theirs)
        assert not isinstance(env.observation_spec["observation"], Bounded)


def test_reward_out_keys_pass_check_env_specs():
    keys = ["observation", "reward"]
    for t in pair(keys, out_keys=["obs_norm", "reward_norm"]):
        env = TransformedEnv(IntegerEnv(), t)
        if t.__class__ is VecNorm:
            check_env_specs(env)
            assert "reward_norm" in env.full_reward_spec.keys()
            assert isinstance(env.full_reward_spec["reward"], Bounded)
            assert not isinstance(env.full_reward_spec["reward_norm"], Bounded)
        else:
            with pytest.raises(Exception, match="reward_norm"):
                check_env_specs(env)


def test_a_nested_key_in_a_shared_tensordict():
    key = ("agents", "observation")
    shared = by_hand([key])
    with pytest.raises(TypeError):
        reference([key], shared_td=shared)
    ours = VecNorm([key], shared_td=shared, decay=1)
    td = TensorDict(batch_size=[4])
    td[key] = torch.ones(4, 2, 3)
    ours(td)
    assert shared["agents", "observation_count"].item() == 4
    assert (shared["agents", "observation_sum"] == 4).all()


def test_an_empty_batch_changes_nothing():
    empty = TensorDict(observation=torch.ones(0, 1), batch_size=[0])
    ours, theirs = pair(["observation"], decay=0.5)
    for t in (ours, theirs):
        t(vectors(1, 2, 3))
        before = snapshot(t)
        y = t(empty.clone())["observation"]
        assert y.shape == (0, 1)
        if t is theirs:
            assert count(t) == 0.5 * 3 + 1
        else:
            assert_same_state(snapshot(t), before)
    # Also as the first that was seen, where the reference raises.
    ours, theirs = pair(["observation"])
    with pytest.raises((IndexError, RuntimeError)):
        theirs(empty.clone())
    ours(empty.clone())
    torch.testing.assert_close(
        ours(vectors(1, 3))["observation"], vectors(-1, 1)["observation"]
    )


@pytest.mark.filterwarnings("ignore")
def test_it_compiles_as_one_graph():
    keys = ["observation", "reward"]

    def step(t):
        def normalized(observation, reward):
            td = TensorDict(
                observation=observation, reward=reward, batch_size=observation.shape[:1]
            )
            t(td)
            return td["observation"], td["reward"]

        return normalized

    torch.compiler.reset()
    ours, theirs = pair(keys)
    eager, _ = pair(keys)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
    for t in (ours, theirs, eager):
        step(t)(*data[0])
    with pytest.raises(Exception):  # noqa: B017
        torch.compile(step(theirs), fullgraph=True, backend="aot_eager")(*data[1])
    compiled = torch.compile(step(ours), fullgraph=True, backend="aot_eager")
    for x in data[1:]:
        for y, expected in zip(compiled(*x), step(eager)(*x), strict=True):
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
        assert_same_state(snapshot(ours), snapshot(eager))


def test_agents_env_is_sound():
    # The reference agrees on nested keys of a real environment, too.
    key = ("agents", "observation")
    ours, theirs = pair([key], decay=1)
    for t in (ours, theirs):
        TransformedEnv(AgentsEnv(), t).rollout(10)
    assert_agree(ours, theirs, [key], rtol=1e-5, count_rtol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_updates_of_the_reference_in_between(shared):
    """It does not know of our counter, and must not spoil what is read with it."""
    ours = VecNorm(["observation"], decay=0.9)
    theirs = torchrl.envs.VecNorm(["observation"], decay=0.9, new_api=False)

    def batch(n):
        return TensorDict({"observation": torch.randn(n, 2) + 5}, [n])

    for _ in range(5):
        ours(batch(10))
    ours(TensorDict({"observation": torch.full((900, 2), float("nan"))}, [900]))
    if shared:
        theirs._td = ours._td
        other = ours
    else:
        theirs.load_state_dict(ours.state_dict())
        other = VecNorm(["observation"], decay=0.9)
    for _ in range(300):
        theirs(batch(1))
    if not shared:
        other.load_state_dict(theirs.state_dict())
    assert ((other.loc["observation"] - 5).abs() < 1.5).all()
    assert (other.scale["observation"] < 3).all()
