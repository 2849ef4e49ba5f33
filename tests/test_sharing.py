# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics that several processes update: section 3 of the contract.

Values are small integers and decay is 1, so that sums are exact in whatever order the
processes come, and a single update that was lost shows.
"""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from common import (
    FIELDS,
    PATIENCE,
    AgentsEnv,
    IntegerEnv,
    assert_same_state,
    count,
    leaf,
    leaf_name,
    snapshot,
    started,
    through_a_file,
)
from tensordict import TensorDict
from torch import multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.envs import GymEnv, TransformedEnv
from torchrl.testing.mocking_classes import CountingEnv

from torchrl_vecnorm import VecNorm
from torchrl_vecnorm.moments import Moments, moved, packed
from torchrl_vecnorm.statistics import compute, engine
from torchrl_vecnorm.statistics.control import _STATE as STATE
from torchrl_vecnorm.statistics.sharing import CONTROL

# A spawned process imports torchrl, which takes longer than its work.
WORKERS = {"fork": 3, "spawn": 2}
FEATURES = 2
# An update of this many features takes long enough to be interrupted: without a lock,
# some hundred of the updates below are lost.
WIDE = 512


def by_hand(*keys, features=(FEATURES,), dtype=torch.float64) -> TensorDict:
    """A private tensordict in the reference's layout."""
    td = TensorDict(batch_size=[])
    for key in keys:
        for field in FIELDS:
            shape = (1,) if field == "count" else features
            td[leaf_name(key, field)] = torch.zeros(shape, dtype=dtype)
    return td


def built(keys=None, memmap=False, env=None) -> TensorDict:
    return VecNorm.build_td_for_shared_vecnorm(env or IntegerEnv(), keys, memmap=memmap)


def entries(*keys) -> set:
    return {leaf_name(key, field) for key in keys for field in FIELDS}


def present(td) -> set:
    """The entries that the reference knows of."""
    fields = tuple(f"_{field}" for field in FIELDS)
    names = td.keys(True, True)
    last = {name: name if isinstance(name, str) else name[-1] for name in names}
    return {name for name in names if last[name].endswith(fields)}


# ----------------------------------------------------------------------- what is built


@pytest.mark.parametrize("memmap", [False, True])
def test_build(memmap):
    td = built(["next", "reward"], memmap)
    assert td.is_memmap() if memmap else td.is_shared()
    assert td.batch_size == torch.Size([])
    assert present(td) == entries("observation", "reward")
    for key, features in (("observation", (2,)), ("reward", (1,))):
        for field in FIELDS:
            value = td[leaf_name(key, field)]
            assert value.shape == ((1,) if field == "count" else features)
            assert value.dtype == torch.float64
            assert (value == 0).all()
    t = VecNorm(shared_td=td)
    t(TensorDict(observation=torch.ones(2), reward=torch.ones(1)))
    assert td["observation_count"].item() == td["reward_sum"].item() == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (None, {"observation", "reward"}),
        (["next", "reward"], {"observation", "reward"}),
        (["next"], {"observation", "reward"}),
        (["observation"], {"observation"}),
        (["reward"], {"reward"}),
        ([("next", "observation")], {"observation"}),
        ([("next", "reward"), "observation"], {"observation", "reward"}),
        (["observation", ("next", "observation")], {"observation"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_keys(keys, expected):
    assert present(built(keys)) == entries(*expected)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["next"], {("agents", "observation"), ("agents", "reward")}),
        ([("agents", "observation")], {("agents", "observation")}),
        ([("next", "agents", "reward")], {("agents", "reward")}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_nested_keys(keys, expected):
    env = AgentsEnv(worlds=3, agents=2)
    td = built(keys, env=env)
    assert present(td) == entries(*expected)
    t = VecNorm(sorted(expected), shared_td=td, decay=1)
    TransformedEnv(AgentsEnv(worlds=3, agents=2), t).rollout(4)
    for key in expected:
        assert t.loc[key].shape[0] == 2
        assert count(t, key) == 3 * (5 if key[-1] == "observation" else 4)


def test_next_stands_for_what_is_floating_point():
    # Observations are integers here.
    assert present(built(["next"], env=CountingEnv())) == entries("reward")
    td = built(["observation"], env=CountingEnv())
    assert present(td) == entries("observation")
    assert td["observation_sum"].dtype == torch.float64


def test_batched_environments_share_their_features():
    td = built(["next", "reward"], env=IntegerEnv(lengths=(9, 9, 9)))
    assert td["observation_sum"].shape == (2,)
    t = VecNorm(shared_td=td, decay=1)
    TransformedEnv(IntegerEnv(lengths=(9, 9, 9)), t).rollout(4)
    assert count(t) == 3 * 5


def test_a_transformed_environment():
    # The keys are those that come out of the environment that is given.
    env = TransformedEnv(IntegerEnv(), VecNorm(out_keys=["o", "r"]))
    td = built(["o", "reward"], env=env)
    assert present(td) == entries("o", "reward")


@pytest.mark.parametrize(
    "key", ["velocity", ("next", "velocity"), ("agents", "observation")], ids=str
)
def test_unknown_keys(key):
    name = key if isinstance(key, str) else key[-1]
    with pytest.raises(KeyError, match=f"{name}.*"):
        built([key])


def test_building_leaves_the_environment_alone():
    t = VecNorm(decay=1)
    env = TransformedEnv(IntegerEnv(), t)
    env.rollout(3)
    before = snapshot(t)
    built(["next"], env=env)
    assert_same_state(snapshot(t), before)


# ----------------------------------------------------------------- what is taken as it


@pytest.mark.parametrize("memmap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensordict_made_by_hand(dtype, memmap):
    td = by_hand("observation", dtype=dtype)
    td = td.memmap_() if memmap else td.share_memory_()
    address = {name: value.data_ptr() for name, value in td.items()}
    first = VecNorm(["observation"], shared_td=td, decay=1)
    second = VecNorm(["observation"], shared_td=td, decay=1)
    for t in (first, second):
        t(TensorDict(observation=torch.tensor([1.0, 2.0])))
    assert td["observation_sum"].tolist() == [2, 4]
    assert td["observation_count"].item() == 2
    assert td["observation_sum"].dtype == dtype
    assert {name: value.data_ptr() for name, value in td.items()} == address
    torch.testing.assert_close(first.loc["observation"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("memmap", [False, True])
def test_a_nested_key_in_the_constructor(memmap):
    key = ("agents", "observation")
    td = by_hand(key)
    td = td.memmap_() if memmap else td.share_memory_()
    t = VecNorm([key], shared_td=td, decay=1)
    t(TensorDict({key: torch.ones(5, FEATURES)}, batch_size=[5]))
    assert td["agents", "observation_sum"].tolist() == [5, 5]


def test_a_private_tensordict_is_refused():
    with pytest.raises(RuntimeError, match="shared memory or a memmap"):
        VecNorm(["observation"], shared_td=by_hand("observation"))


def test_statistics_on_anothers_gpu_are_refused(monkeypatch):
    """Who else has them cannot be locked out. Where a tensor came from is faked here."""
    sent = []
    monkeypatch.setattr(
        "torchrl_vecnorm.statistics.sharing._C.came_from_another_process",
        lambda leaf: any(leaf is other for other in sent),
    )
    td = built(["next"])
    source = VecNorm(decay=1)
    TransformedEnv(IntegerEnv(), source).rollout(3)
    state = source.state_dict()
    sent += [td["reward_sum"], state["_extra_state"]["reward_sum"]]
    with pytest.raises(RuntimeError, match=r"reward.*killed.*on the CPU.*clone"):
        VecNorm(shared_td=td)
    t = VecNorm(decay=1)
    with pytest.raises(RuntimeError, match=r"reward.*killed.*on the CPU.*clone"):
        t.load_state_dict(state)
    assert t._td is None
    t.load_state_dict({"_extra_state": source.consistent_state_dict()})
    assert count(t) == 4


BAD_VALUES = [
    ("sum", math.nan, "finite sums, got nan"),
    ("sum", math.inf, "finite sums, got inf"),
    ("ssq", math.nan, "not negative, got nan"),
    ("ssq", -1.0, "not negative, got -1"),
    ("ssq", 1.0, "ssq · count ≥ sum²"),
    ("count", math.nan, "not negative, got nan"),
    ("count", -1.0, "not negative, got -1"),
    ("nonfinite", math.nan, "not negative, got nan"),
    ("nonfinite", 0.5, "whole numbers, got 0.5"),
]


def filled(td: TensorDict, key) -> TensorDict:
    """With the statistics of two samples of 3."""
    for field, value in (("sum", 6), ("ssq", 18), ("count", 2)):
        td[leaf_name(key, field)].fill_(value)
    return td


@pytest.mark.parametrize("memmap", [False, True], ids=["shared", "memmap"])
@pytest.mark.parametrize(("field", "value", "expected"), BAD_VALUES)
@pytest.mark.parametrize("make", [built, by_hand])
@pytest.mark.parametrize("key", ["observation", ("agents", "observation")], ids=str)
def test_values_that_no_data_can_give(key, make, field, value, expected, memmap):
    if make is built:
        env = IntegerEnv() if isinstance(key, str) else AgentsEnv()
        td = filled(built([key], memmap, env), key)
    else:
        td = filled(by_hand(key), key)
        td[leaf_name(key, "nonfinite")] = torch.zeros(2, FEATURES).double()
        td = td.memmap_() if memmap else td.share_memory_()
    kwargs = {"lock": mp.Lock()} if make is by_hand else {}
    VecNorm([key], shared_td=td, **kwargs)
    entry = td[leaf_name(key, field)]
    entry.view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"observation_.*expected .*{expected}"):
        VecNorm([key], shared_td=td, **kwargs)


@pytest.mark.parametrize("field", [*FIELDS, "nonfinite"])
@pytest.mark.parametrize("adopted", [False, True], ids=["shared_td", "adopted"])
def test_shapes_that_do_not_fit(field, adopted):
    td = by_hand("observation")
    td["observation_nonfinite"] = torch.zeros(2, FEATURES).double()
    td[f"observation_{field}"] = torch.zeros(7).double()
    td = td.share_memory_()
    with pytest.raises(ValueError, match=r"observation_(sum|ssq|count|nonf).*shape"):
        if adopted:
            VecNorm(["observation"], lock=mp.Lock()).set_extra_state(dict(td.items()))
        else:
            VecNorm(["observation"], shared_td=td, lock=mp.Lock())


def test_features_of_another_shape_than_shapes():
    td = built(["observation"])
    with pytest.raises(ValueError, match=r"observation_sum.*shape \(3,\), got \(2,\)"):
        VecNorm(["observation"], shared_td=td, shapes=[torch.Size([3])])


@pytest.mark.parametrize("users_lock", [False, True])
def test_given_in_the_middle_of_an_update(users_lock):
    """Whoever has the lock puts it right; values that are wrong by themselves are not."""
    td = filled(built(["observation"]), "observation")
    lock = mp.Lock() if users_lock else None
    t = VecNorm(["observation"], shared_td=td, lock=lock)
    with t._statistics.session():
        td["observation_ssq"].fill_(1)
        other = VecNorm(["observation"], shared_td=td, lock=lock)
        td["observation_ssq"].fill_(math.nan)
        with pytest.raises(ValueError, match="observation_ssq"):
            VecNorm(["observation"], shared_td=td, lock=lock)
        td["observation_ssq"].fill_(18)
    assert other.loc["observation"].tolist() == [3, 3]


@pytest.mark.parametrize("key", ["reward", ("agents", "reward")], ids=str)
@pytest.mark.parametrize("field", [*FIELDS, "all"])
def test_missing_entries(key, field):
    td = by_hand("observation", key)
    for name in FIELDS if field == "all" else [field]:
        del td[leaf_name(key, name)]
    with pytest.raises(KeyError, match="reward"):
        VecNorm(["observation", key], shared_td=td.share_memory_())


def test_values_of_another_shape_are_refused():
    td = built(["observation"])
    t = VecNorm(["observation"], shared_td=td)
    with pytest.raises(ValueError, match=r"observation.*2.*3"):
        t(TensorDict(observation=torch.ones(3)))
    assert (td["observation_count"] == 0).all()
    # The lock that lives in the tensordict was given back.
    VecNorm(["observation"], shared_td=td)(TensorDict(observation=torch.ones(2)))
    assert td["observation_count"].item() > 0


def test_loading_a_checkpoint_keeps_the_sharing():
    td = built(["next"])
    address = td["observation_sum"].data_ptr()
    first, second = VecNorm(shared_td=td, decay=1), VecNorm(shared_td=td, decay=1)
    source = VecNorm(decay=1)
    TransformedEnv(IntegerEnv(), source).rollout(7)
    first.load_state_dict(source.state_dict())
    assert count(second) == 8
    assert td["observation_sum"].data_ptr() == address
    second(TensorDict(observation=torch.ones(2), reward=torch.ones(1)))
    assert count(first) == 9


def test_a_frozen_one_reads_what_others_write():
    td = built(["next"])
    frozen, live = VecNorm(shared_td=td).freeze(), VecNorm(shared_td=td, decay=1)
    TransformedEnv(IntegerEnv(), live).rollout(4)
    x = TensorDict(observation=torch.tensor([2.0, -4.0]), reward=torch.tensor([2.5]))
    y = frozen(x.clone())
    assert count(live) == 5
    torch.testing.assert_close(y["observation"], torch.zeros(2))
    torch.testing.assert_close(y["reward"], torch.zeros(1))


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda t: pickle.loads(pickle.dumps(t)), id="pickle"),
    ],
)
def test_a_copy_is_on_its_own(copied):
    t = VecNorm(shared_td=built(["next"]), decay=1)
    values = TensorDict(observation=torch.ones(2), reward=torch.ones(1))
    t(values.clone())
    other = copied(t)
    other(values.clone())
    assert (count(t), count(other)) == (1, 2)


# --------------------------------------------------------------------------- the lock


def test_a_users_lock_is_honoured():
    lock = mp.get_context("spawn").Lock()
    td = by_hand("observation").share_memory_()
    t = VecNorm(["observation"], shared_td=td, lock=lock)
    assert t.lock is lock
    values = TensorDict(observation=torch.ones(2))
    lock.acquire()
    thread = threading.Thread(target=t, args=(values,), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert td["observation_count"].item() == 0
    lock.release()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert td["observation_count"].item() == 1
    assert lock.acquire(block=False)


def test_threads_with_a_transform_each():
    td = built(["observation"])

    def update():
        t = VecNorm(["observation"], shared_td=td, decay=1)
        for _ in range(500):
            t(TensorDict(observation=torch.ones(2)))

    threads = [threading.Thread(target=update, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert td["observation_count"].item() == 2000
    assert td["observation_sum"].tolist() == [2000, 2000]


# -------------------------------------------------------------------------- processes


def work_as_printed(queue, results):
    """What the documentation has on its workers."""
    v = VecNorm(shared_td=queue.get(timeout=PATIENCE))
    env = TransformedEnv(GymEnv("Pendulum-v1"), v)
    rollout = env.rollout(50)
    results.put(rollout["next", "observation"].isfinite().all().item())


@pytest.mark.parametrize(
    ("method", "memmap"),
    [
        ("fork", False),
        ("fork", True),
        pytest.param("spawn", False, marks=pytest.mark.slow),
    ],
)
def test_the_documented_example(method, memmap):
    context = mp.get_context(method)
    queue, results = context.Queue(), context.Queue()
    env = GymEnv("Pendulum-v1")
    td_shared = VecNorm.build_td_for_shared_vecnorm(
        env, ["next", "reward"], memmap=memmap
    )
    assert td_shared.is_memmap() if memmap else td_shared.is_shared()
    arguments = [(queue, results)] * 2
    with started(context, work_as_printed, arguments):
        for _ in arguments:
            queue.put(td_shared)
        assert [results.get(timeout=PATIENCE) for _ in arguments] == [True, True]

    def decayed(calls):
        return (1 - 0.9999**calls) / (1 - 0.9999)

    # One sample a call, so the count does not depend on who came first.
    assert td_shared["observation_count"].item() == pytest.approx(
        decayed(2 * 51), rel=1e-12
    )
    assert td_shared["reward_count"].item() == pytest.approx(decayed(2 * 50), rel=1e-12)


def values_of(worker: int, step: int) -> TensorDict:
    """Two samples of small integers."""
    x = torch.tensor([[step % 7, worker], [step % 5, -step % 3]], dtype=torch.float32)
    return TensorDict(
        observation=x.repeat(1, WIDE // 2), reward=x[:, :1] + worker, batch_size=[2]
    )


def wide_by_hand() -> TensorDict:
    td = by_hand("observation", features=(WIDE,))
    return td.update(by_hand("reward", features=(1,))).share_memory_()


PERIOD = 7 * 5 * 3  # of `values_of`, in steps


def work(queue, worker, lock, barrier, updates):
    t = VecNorm(shared_td=queue.get(timeout=PATIENCE), lock=lock, decay=1)
    work_with(t, worker, barrier, updates)


def work_with(t, worker, barrier, updates):
    steps = [values_of(worker, step) for step in range(min(updates, PERIOD))]
    # All at once.
    barrier.wait(PATIENCE)
    for step in range(updates):
        t(steps[step % PERIOD].copy())


def assert_exact(td, workers: int, updates: int) -> None:
    """Every sample of every worker is in the sums."""
    periods, rest = divmod(updates, PERIOD)
    times = [periods + (s < rest) for s in range(PERIOD)]
    times = torch.tensor(times, dtype=torch.float64).repeat_interleave(2)
    for key in ("observation", "reward"):
        count = total = squares = 0
        for worker in range(workers):
            x = torch.cat([values_of(worker, s)[key] for s in range(PERIOD)]).double()
            count += times.sum()
            total = total + times @ x
            squares = squares + times @ x.pow(2)
        assert td[f"{key}_count"].item() == count == 2 * workers * updates
        assert torch.equal(td[f"{key}_sum"].double(), total)
        assert torch.equal(td[f"{key}_ssq"].double(), squares)


@pytest.fixture
def workers(request):
    """How many processes each start method gets."""
    chosen = request.config.getoption("--workers")
    return dict.fromkeys(WORKERS, chosen) if chosen else WORKERS


@pytest.fixture
def updates(request):
    """How many each process makes."""
    return request.config.getoption("--updates")


@pytest.mark.parametrize(
    ("method", "memmap"),
    [
        pytest.param("fork", False, id="fork-shared"),
        pytest.param("fork", True, id="fork-memmap"),
        pytest.param("spawn", False, id="spawn-shared"),
        pytest.param("spawn", True, id="spawn-memmap", marks=pytest.mark.slow),
    ],
)
def test_no_update_is_lost(method, memmap, workers, updates):
    context = mp.get_context(method)
    queue, barrier = context.Queue(), context.Barrier(workers[method])
    td = built(["next", "reward"], memmap, IntegerEnv(features=WIDE))
    # No lock is given: each worker's transform has one of its own.
    arguments = [
        (queue, worker, None, barrier, updates) for worker in range(workers[method])
    ]
    # Longer than `started` would wait for them.
    with started(context, work, arguments) as processes:
        for _ in arguments:
            queue.put(td)
        for process in processes:
            process.join()
    assert_exact(td, len(arguments), updates)
    assert all((value == 0).all() for value in VecNorm(shared_td=td).nonfinite.values())


def test_no_update_is_lost_under_a_users_lock(updates, method="fork"):
    # A tensordict in the reference's layout has no lock in it.
    context = mp.get_context(method)
    td = wide_by_hand()
    queue, barrier, lock = (
        context.Queue(),
        context.Barrier(WORKERS[method]),
        context.Lock(),
    )
    arguments = [
        (queue, worker, lock, barrier, updates) for worker in range(WORKERS[method])
    ]
    with started(context, work, arguments):
        for _ in arguments:
            queue.put(td)
    assert_exact(td, len(arguments), updates)


@pytest.mark.slow
def test_a_transform_that_is_sent_to_workers(updates, method="spawn"):
    # Whole, with its lock.
    context = mp.get_context(method)
    td = wide_by_hand()
    t = VecNorm(shared_td=td, lock=context.Lock(), decay=1)
    barrier = context.Barrier(WORKERS[method])
    arguments = [(t, worker, barrier, updates) for worker in range(WORKERS[method])]
    with started(context, work_with, arguments):
        pass
    assert_exact(td, len(arguments), updates)
    assert leaf(t).data_ptr() == td["observation_count"].data_ptr()


def work_with_one_from_a_queue(queue, barrier, updates):
    t = queue.get(timeout=PATIENCE)
    assert t._statistics.store.others_update
    work_with(t, 1, barrier, updates)


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_a_transform_that_comes_through_a_queue(updates, method):
    # Its statistics are in shared memory then: its lock has to come too.
    context = mp.get_context(method)
    t = VecNorm(decay=1)
    t(values_of(0, 0))
    queue, barrier = context.Queue(), context.Barrier(3)
    with started(
        context, work_with_one_from_a_queue, [(queue, barrier, updates)] * 2
    ) as processes:
        for _ in processes:
            queue.put(t)
        work_with(t, 1, barrier, updates)
        for process in processes:
            process.join(PATIENCE)
    assert count(t) == count(t, "reward") == 2 * (3 * updates + 1)
    assert (t.nonfinite["observation"] == 0).all()


def load_and_work(queue, state, worker, barrier, updates, counts, lock=None):
    state = queue.get(timeout=PATIENCE) if state is None else state
    t = VecNorm(decay=1, lock=lock)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t.set_extra_state(state)
    assert any("are copied" in str(w.message) for w in said) == (lock is None)
    work_with(t, worker, barrier, updates)
    barrier.wait(PATIENCE)
    counts.put((worker, count(t), count(t, "reward")))


@pytest.mark.parametrize("live", [False, True], ids=["file", "live"])
@pytest.mark.parametrize("way", ["queue", "arguments"])
def test_processes_that_load_one_state_dict(way, live, updates, method="fork"):
    """Sent, its tensors are in shared memory, and each process has a lock of its own."""
    context = mp.get_context(method)
    source = VecNorm(decay=1)
    source(values_of(0, 0))
    state = source.get_extra_state()
    state = state if live else through_a_file(state)
    for value in state.values() if way == "arguments" else ():
        value.share_memory_()  # what spawn does
    queue, counts, barrier = context.Queue(), context.Queue(), context.Barrier(3)
    given = None if way == "queue" else state
    arguments = [(queue, given, i, barrier, updates, counts) for i in range(2)]
    with started(context, load_and_work, arguments):
        for _ in arguments if given is None else ():
            queue.put(state)
        work_with(source, 2, barrier, updates)
        barrier.wait(PATIENCE)
        counted = [counts.get(timeout=PATIENCE)[1:] for _ in arguments]
    first = 2 + 2 * updates
    assert counted == [(first, first)] * 2
    assert count(source) == count(source, "reward") == first


def test_processes_that_load_one_state_dict_under_one_lock(updates, method="fork"):
    context = mp.get_context(method)
    lock = context.Lock()
    source = VecNorm(decay=1, lock=lock)
    source(values_of(0, 0))
    queue, counts, barrier = context.Queue(), context.Queue(), context.Barrier(3)
    arguments = [(queue, None, i, barrier, updates, counts, lock) for i in range(2)]
    with started(context, load_and_work, arguments):
        for _ in arguments:
            queue.put(source.get_extra_state())
        work_with(source, 2, barrier, updates)
        barrier.wait(PATIENCE)
        counted = [counts.get(timeout=PATIENCE)[1:] for _ in arguments]
    total = 2 + 3 * 2 * updates
    assert counted == [(total, total)] * 2
    assert count(source) == count(source, "reward") == total


@pytest.mark.filterwarnings("error:VecNorm. the statistics are copied")
@pytest.mark.parametrize("memmap", [False, True], ids=["shared", "memmap"])
def test_a_transform_whose_lock_cannot_be_sent(memmap):
    """A lock of multiprocessing does not go through a queue: nor do the statistics."""
    td = by_hand("observation", features=(WIDE,)).update(
        by_hand("reward", features=(1,))
    )
    td = td.memmap_() if memmap else td.share_memory_()
    t = VecNorm(shared_td=td, lock=mp.Lock(), decay=1)
    t(values_of(0, 0))
    data = bytes(ForkingPickler.dumps(t))  # what a queue does
    with pytest.warns(UserWarning, match="are copied"):
        other = pickle.loads(data)
    assert not other._statistics.store.others_update
    t(values_of(0, 0)), other(values_of(0, 0)), other(values_of(0, 0))
    assert (count(t), count(other), count(other, "reward")) == (4, 6, 6)
    # That of `build_td_for_shared_vecnorm` is in the tensordict.
    td = built(["next"], memmap)
    t = VecNorm(shared_td=td, lock=mp.Lock(), decay=1)
    other = pickle.loads(bytes(ForkingPickler.dumps(t)))
    for one in (t, other):
        TransformedEnv(IntegerEnv(), one).rollout(3)
    assert count(t) == count(other) == td["observation_count"].item() == 8


def read(queue, done, reads):
    t = VecNorm(["observation"], shared_td=queue.get(timeout=PATIENCE)).freeze()
    threes = TensorDict(observation=torch.full((WIDE,), 3.0))
    torn = dict.fromkeys(("state", "loc", "scale", "y"), 0)
    for _ in range(reads):
        # One sample of threes a call: sum, ssq and count go together.
        state = t.consistent_state_dict()
        n = state["observation_count"]
        torn["state"] += not (
            (state["observation_sum"] == 3 * n).all()
            and (state["observation_ssq"] == 9 * n).all()
        )
        torn["loc"] += not (t.loc["observation"] == 3).all()
        torn["scale"] += not (t.scale["observation"] == torch.tensor(t.eps)).all()
        # All but the first go the short way.
        for _ in range(10):
            torn["y"] += not (t(threes.copy())["observation"] == 0).all()
    done.put(torn)


@pytest.mark.parametrize("memmap", [False, True], ids=["shared", "memmap"])
def test_a_reader_never_sees_half_an_update(memmap, request):
    reads = request.config.getoption("--updates") // 2
    context = mp.get_context("fork")
    queue, done = context.Queue(), context.Queue()
    td = built(["observation"], memmap, IntegerEnv(features=WIDE))
    t = VecNorm(["observation"], shared_td=td, decay=1)
    threes = TensorDict(observation=torch.full((WIDE,), 3.0))
    t(threes.copy())
    with started(context, read, [(queue, done, reads)]) as (reader,):
        queue.put(td)
        while done.empty() and reader.is_alive():
            for _ in range(100):
                t(threes.copy())
        torn = done.get(timeout=PATIENCE)
    assert torn == dict.fromkeys(torn, 0)


def test_moments_travel_in_one_copy():
    """To another device, and back: one that has no numbers, as there is no third."""
    many = []
    for features in ((3,), (2, 4), ()):
        m = Moments.zeros(features, counts_all=len(features) == 1)
        many.append(Moments(*(torch.rand_like(leaf) for leaf in m)))
    many[1] = many[1]._replace(nonfinite=None)
    for before, after in zip(many, packed(many, torch.clone), strict=True):
        assert (before.nonfinite is None) == (after.nonfinite is None)
        for a, b in zip(before, after, strict=True):
            assert a is b is None or torch.equal(a, b)
    meta = torch.device("meta")
    with Copies() as copies:
        there = moved(many, [meta] * len(many))
    assert copies.made == 1
    shapes = [[leaf is not None and leaf.shape for leaf in m] for m in many]
    assert shapes == [[leaf is not None and leaf.shape for leaf in m] for m in there]
    assert all(leaf.device == meta for m in there for leaf in m if leaf is not None)
    # As they are where they are; float32 stays that, a leaf at a time.
    assert all(
        m is n
        for m, n in zip(many, moved(many, [torch.device("cpu")] * 3), strict=True)
    )
    few = Moments(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    (other,) = moved([few], [meta])
    assert other.sum.dtype == torch.float32 and other.sum.device == meta


class Copies(TorchDispatchMode):
    """Counts tensors that go to a device."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("updating", [True, False])
def test_staging(monkeypatch, updating):
    """Values elsewhere than the statistics: moments travel, the result is the same.

    There is one device here, so the path is entered by hand.
    """
    td = TensorDict(
        {"observation": torch.randn(20, 3), "reward": torch.randn(20, 1)}, [20]
    )
    direct, staged = VecNorm(decay=0.9), VecNorm(decay=0.9)
    for t in (direct, staged):
        t(td.clone())
    staged._statistics.binding = None
    for t in (direct, staged):
        t.train(updating)
    a = direct(td.clone())
    monkeypatch.setattr(engine, "compute", compute._compute_from_moments)
    b = staged(td.clone())
    for key in td.keys():
        torch.testing.assert_close(a[key], b[key])
    for name in direct._td.keys():
        torch.testing.assert_close(
            direct._td[name], staged._td[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("memmap", [False, True])
def test_how_shared_statistics_are_written(memmap):
    """Where they are in memory; through copies in a file, whose journal has the last."""
    td = built(["observation"], memmap)
    transform = VecNorm(["observation"], shared_td=td)
    batch = TensorDict({"observation": torch.randn(4, 2)}, [4])
    for _ in range(3):
        transform(batch.clone())
    words = td[CONTROL].view(torch.int64)
    assert words[STATE].item() == (0 if memmap else 2)  # kClean, kReplaced
