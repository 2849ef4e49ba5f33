# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Shared statistics when processes are killed or stopped and files are copied or cut.

``test_shared_host.py`` does the same to the lock and the journal alone, at every crash
point and faster.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import random
import shutil
import signal
import time

import pytest
import torch
from common import PATIENCE, IntegerEnv, count, started
from tensordict import TensorDict
from torch import multiprocessing as mp

from torchrl_vecnorm import VecNorm
from torchrl_vecnorm.statistics import sharing
from torchrl_vecnorm.statistics.locks import Lock

KEYS = ["observation", "reward"]
FEATURES = 96  # an update takes long enough to be killed in the middle of one


def values() -> TensorDict:
    return TensorDict(
        observation=torch.arange(FEATURES).float(), reward=torch.full((1,), 3.0)
    )


def assert_whole(t: VecNorm) -> int:
    """Every entry is that of some number of updates with `values`: that number."""
    state = t.consistent_state_dict()
    n = state["observation_count"].item()
    for key, value in values().items():
        exact = value.double()
        assert state[f"{key}_count"].item() == n
        assert torch.equal(state[f"{key}_sum"], n * exact)
        assert torch.equal(state[f"{key}_ssq"], n * exact**2)
    return int(n)


# ------------------------------------------------------------------- two ways to share


def of_a_td(tmp_path, memmap=False):
    env = IntegerEnv(features=FEATURES)
    td = VecNorm.build_td_for_shared_vecnorm(env, KEYS, memmap and tmp_path / "td")
    return lambda: VecNorm(shared_td=td, decay=1)


def of_env_creator(tmp_path):
    """What EnvCreator does: it carries the live tensors and the lock."""
    source = VecNorm(decay=1)
    source(values())
    state = source.state_dict()["_extra_state"]
    for leaf in state.values():
        leaf.zero_().share_memory_()

    def make():
        t = VecNorm(decay=1)
        t.lock = source.lock
        t.set_extra_state(state)
        return t

    return make


WAYS = {
    "shared": of_a_td,
    "memmap": lambda path: of_a_td(path, memmap=True),
    "EnvCreator": of_env_creator,
}


def update_forever(make, finished):
    t = make()
    while True:
        t(values())
        finished.add_(1)


@pytest.mark.parametrize(
    "way",
    [
        "shared",
        pytest.param("memmap", marks=pytest.mark.slow),
        pytest.param("EnvCreator", marks=pytest.mark.slow),
    ],
)
def test_workers_are_killed_at_any_moment(way, tmp_path):
    """No update is lost but those that the killed were at, and none is done in part."""
    make = WAYS[way](tmp_path)
    context = mp.get_context("fork")
    kills, slots = 60, 3
    finished = torch.zeros(kills + slots, dtype=torch.int64).share_memory_()
    workers = []

    def start():
        slot = finished[len(workers)]
        workers.append(context.Process(target=update_forever, args=(make, slot)))
        workers[-1].start()

    t = make()
    alive = []
    try:
        for _ in range(slots):
            start()
        alive = list(workers)
        for _ in range(kills):
            time.sleep(random.uniform(0.0, 0.03))
            victim = alive.pop(random.randrange(len(alive)))
            os.kill(victim.pid, signal.SIGKILL)
            victim.join(PATIENCE)
            begin = time.monotonic()
            with (
                t.lock
            ):  # of EnvCreator's: without the statistics, for whoever has both
                pass
            assert_whole(t)
            assert time.monotonic() - begin < PATIENCE
            start()
            alive.append(workers[-1])
    finally:
        for worker in alive:
            worker.kill()
            worker.join(PATIENCE)
    done, n = finished.sum().item(), assert_whole(t)
    assert n > kills
    assert done <= n <= done + len(workers)


# ------------------------------------------------------------------------ stopped owner


def stop_with_the_lock(make, taken):
    t = make()
    with t._statistics.session():
        taken.set()
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_owner_is_named(way, tmp_path):
    make = WAYS[way](tmp_path)
    context = mp.get_context("fork")
    taken = context.Event()
    owner = context.Process(target=stop_with_the_lock, args=(make, taken))
    owner.start()
    try:
        assert taken.wait(PATIENCE)
        t = make()
        t.lock_timeout = 0.2
        for _ in range(2):
            with pytest.raises(TimeoutError, match=rf"0\.2 s by process {owner.pid} "):
                t(values())
        time.sleep(0.1)
        with pytest.raises(TimeoutError, match="which is stopped: continue it"):
            t(values())
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.join(PATIENCE)
    t(values())
    assert assert_whole(t) == 1


def interrupt(pid):
    time.sleep(0.5)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)


@pytest.fixture
def ctrl_c():
    """Python hears it: not so in a program that a shell has started with ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_is_heard_and_holds_no_lock(tmp_path):
    make = of_a_td(tmp_path)
    holder, t = make(), make()
    context = mp.get_context("fork")
    killer = context.Process(target=interrupt, args=(os.getpid(),))
    killer.start()
    begin = time.monotonic()
    with holder._statistics.session(), pytest.raises(KeyboardInterrupt):
        t(values())
    assert time.monotonic() - begin < PATIENCE
    killer.join(PATIENCE)
    t(values())
    assert assert_whole(t) == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_the_owner_of_a_users_lock_is_waited_for_in_vain(frozen):
    """Nobody can take it from a process that has died: an error, not a hang."""
    lock = mp.get_context("fork").Lock()
    td = VecNorm.build_td_for_shared_vecnorm(IntegerEnv(features=FEATURES), KEYS)
    t = VecNorm(shared_td=td, lock=lock, decay=1, lock_timeout=0.2)
    t(values())
    if frozen:
        t.freeze()
    lock.acquire()
    for call in (lambda: t(values()), lambda: t._reset(TensorDict(), values())):
        with pytest.raises(TimeoutError, match=r"lock that was passed.*0\.2 s"):
            call()
    lock.release()
    assert assert_whole(t) == 1
    t(values())
    assert assert_whole(t) == (1 if frozen else 2)


LOOKS = {
    "consistent_state_dict": lambda t, state, td: t.consistent_state_dict(),
    "loc": lambda t, state, td: t.loc,
    "set_extra_state": lambda t, state, td: t.set_extra_state(state),
    "frozen": lambda t, state, td: t.frozen_copy()(td),
    "update": lambda t, state, td: t(td),
}


@pytest.mark.parametrize("what", LOOKS)
def test_the_first_thing_that_a_forked_child_does(what):
    """It has no thread pool, and torch's own operators would wait for it."""
    env = IntegerEnv(features=60_000)
    td = TensorDict(observation=torch.ones(60_000), reward=torch.ones(1))
    t = VecNorm(shared_td=VecNorm.build_td_for_shared_vecnorm(env, KEYS), decay=1)
    t(td.clone())
    state = t.consistent_state_dict()
    torch.randn(300_000).exp()  # starts the pool
    arguments = [(t, state, td.clone())]
    with started(mp.get_context("fork"), LOOKS[what], arguments):
        pass
    t(td)
    assert count(t) == (3 if what == "update" else 2)


def rewards_too(t, updates):
    # In a worker a compiled graph must not take the statistics for its own.
    assert t._statistics.store.others_update or mp.parent_process() is None
    for _ in range(updates):
        t(values())


@pytest.mark.slow
def test_a_key_that_is_new_in_the_workers(tmp_path):
    """What came before it is shared, and stays behind the lock that it was shared with."""
    t = VecNorm(decay=1)
    t._reset(TensorDict(), values().exclude("reward"))
    context = mp.get_context("spawn")
    workers = [context.Process(target=rewards_too, args=(t, 500)) for _ in range(2)]
    for worker in workers:
        worker.start()
    rewards_too(t, 500)
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert count(t) == 1501
    assert count(t, "reward") == 500


def test_the_sharing_strategy_changes_while_it_is_held():
    """Sending moves the memory to a file with a name; both ends follow."""
    before = mp.get_sharing_strategy()
    try:
        mp.set_sharing_strategy("file_descriptor")
        t = VecNorm(decay=1)
        t(values())
        mp.set_sharing_strategy("file_system")
        context = mp.get_context("spawn")
        worker = context.Process(target=rewards_too, args=(t, 500))
        worker.start()
        rewards_too(t, 500)
        worker.join(PATIENCE)
        assert worker.exitcode == 0
        assert assert_whole(t) == 1001
    finally:
        mp.set_sharing_strategy(before)


def test_transforms_of_one_tensordict_without_a_lock(tmp_path):
    """Each has its own keys and leaves those of the other alone."""
    td = TensorDict()
    for key, value in values().items():
        for field, shape in (("sum", value.shape), ("ssq", value.shape), ("count", 1)):
            td[f"{key}_{field}"] = torch.zeros(shape, dtype=torch.float64)
    td.share_memory_()
    first, second = (VecNorm([key], shared_td=td, decay=1) for key in KEYS)
    for t in (first, second, first):
        t(values())
    with first._statistics.session():
        first._statistics.store.attached.state.load()
        second(values())
        first._statistics.store.attached.state.commit()
    assert (count(first), count(second, "reward")) == (2, 2)


def test_a_journal_without_room_is_said():
    """The lock has left, with a journal for one key; then another one is there."""
    t = VecNorm(decay=1)
    t._reset(TensorDict(), values().exclude("reward"))
    t.lock.is_carried = True
    t(values())
    state = t.state_dict()["_extra_state"]
    for leaf in state.values():
        leaf.share_memory_()
    with pytest.warns(RuntimeWarning, match="no room for .*reward_sum.* before it is"):
        t(values())
    assert (count(t), count(t, "reward")) == (3, 2)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_a_copy_has_a_journal(copied, recwarn):
    t = VecNorm(decay=1)
    t(values())
    t = copied(t)
    for leaf in t.state_dict()["_extra_state"].values():
        leaf.share_memory_()
    t(values())
    assert t._statistics.store.attached.state.has_journal
    assert not [w for w in recwarn if w.category is RuntimeWarning]
    assert assert_whole(t) == 2


@pytest.mark.parametrize("device", ["meta"])
def test_a_default_device(device):
    with torch.device(device):
        t = VecNorm()
    assert t.lock.control.device.type == "cpu"


def test_adopted_in_inference_mode(tmp_path):
    t = of_env_creator(tmp_path)()
    with torch.inference_mode():
        t(values())
    state = {name: leaf.clone() for name, leaf in t.consistent_state_dict().items()}
    t.set_extra_state(state)
    assert assert_whole(t) == 1


def test_a_lock_keeps_its_promises_as_a_lock():
    lock = Lock()
    assert lock.acquire()
    assert not lock.acquire(block=False)
    assert not lock.acquire(timeout=0.05)
    lock.release()
    with lock:
        assert not lock.acquire(False)
    assert lock.acquire(False)
    lock.release()


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_the_timeout_is_positive(bad):
    with pytest.raises(ValueError, match="lock_timeout"):
        VecNorm(lock_timeout=bad)


# ------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path):
    """A memory map with two updates."""
    env = IntegerEnv(features=FEATURES)
    td = VecNorm.build_td_for_shared_vecnorm(env, KEYS, tmp_path / "statistics")
    t = VecNorm(shared_td=td, decay=1)
    t(values())
    t(values())
    return tmp_path / "statistics"


def attached(folder, **kwargs) -> VecNorm:
    return VecNorm(shared_td=TensorDict.load_memmap(folder), decay=1, **kwargs)


def die_with_the_lock(folder):
    t = attached(folder)
    t(values())
    with t._statistics.session():
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_statistics_outlive_their_processes(folder, method):
    context = mp.get_context(method)
    process = context.Process(target=die_with_the_lock, args=(folder,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    t = attached(folder, lock_timeout=1)
    assert assert_whole(t) == 3
    t(values())
    assert assert_whole(attached(folder)) == 4


def test_a_copy_made_while_the_lock_was_held(folder, tmp_path):
    """The copy is free. The original is not: a second look at it breaks no live lock."""
    t = attached(folder)
    with t._statistics.session():
        shutil.copytree(folder, tmp_path / "copy")
        other = attached(tmp_path / "copy", lock_timeout=0.2)
        other(values())
        assert assert_whole(other) == 3
        with pytest.raises(TimeoutError, match=f"process {os.getpid()} "):
            attached(folder, lock_timeout=0.2)(values())
    assert assert_whole(t) == 2


def test_a_live_lock_under_another_name(folder):
    """Who does not know the file's name, or knows another, breaks no live lock either."""
    t = attached(folder)
    leaves = {}
    for name, leaf in sharing.leaves_of(t._td).items():
        file = str(folder / f"{name}.memmap")
        plain = torch.from_file(file, True, leaf.numel(), dtype=leaf.dtype)
        leaves[name] = plain.reshape(leaf.shape)
    size = t._td[sharing.CONTROL].numel()
    leaves[sharing.CONTROL] = torch.from_file(
        str(folder / f"{sharing.CONTROL}.memmap"), True, size, dtype=torch.uint8
    )
    link = folder.parent / "link"
    link.symlink_to(folder)
    with t._statistics.session():
        for td in (TensorDict(leaves), TensorDict.load_memmap(link)):
            other = VecNorm(shared_td=td, decay=1, lock_timeout=0.1)
            with pytest.raises(TimeoutError):
                other(values())
    other(values())
    assert assert_whole(t) == 3


def test_a_folder_that_was_renamed_and_made_anew(folder):
    """The name is another file's now: the old one's lock is not taken for a copy's."""
    td = TensorDict.load_memmap(folder)
    t = VecNorm(shared_td=td, decay=1)
    with t._statistics.session():
        folder.rename(folder.parent / "old")
        env = IntegerEnv(features=FEATURES)
        VecNorm.build_td_for_shared_vecnorm(env, KEYS, folder)
        other = VecNorm(shared_td=td, decay=1, lock_timeout=0.1)
        with pytest.raises(TimeoutError):
            other(values())
    other(values())
    assert assert_whole(t) == 3


def test_a_folder_in_use_is_left_alone(folder):
    with pytest.raises(FileExistsError, match="statistics already"):
        VecNorm.build_td_for_shared_vecnorm(IntegerEnv(), KEYS, folder)
    assert assert_whole(attached(folder)) == 2


def test_statistics_set_to_zero_are_no_loss(folder):
    for leaf in sharing.leaves_of(TensorDict.load_memmap(folder)).values():
        leaf.zero_()
    t = attached(folder)
    t(values())
    assert assert_whole(t) == 1


def test_a_clone_made_while_the_lock_was_held(folder):
    td = TensorDict.load_memmap(folder)
    t = VecNorm(shared_td=td, decay=1)
    with t._statistics.session():
        other = VecNorm(shared_td=td.clone().share_memory_(), decay=1, lock_timeout=0.2)
        other(values())
    assert assert_whole(other) == 3
    assert assert_whole(t) == 2


@pytest.mark.parametrize("part", [0, 0.1, 0.5])
@pytest.mark.parametrize("entry", ["observation_sum", "reward_count", sharing.CONTROL])
def test_a_truncated_file(folder, entry, part):
    """Mapping it makes it as long as it was, so that its length tells nothing."""
    file = folder / f"{entry}.memmap"
    os.truncate(file, int(part * file.stat().st_size))
    with pytest.raises(RuntimeError, match=f"entry '{entry}': "):
        attached(folder)


@pytest.mark.parametrize("entry", ["observation_sum", sharing.CONTROL])
def test_a_file_is_truncated_while_it_is_mapped(folder, entry):
    """Reading it would be the end of the process."""
    td = TensorDict.load_memmap(folder)
    os.truncate(folder / f"{entry}.memmap", 0)
    with pytest.raises(RuntimeError, match=f"entry '{entry}': .*truncated"):
        VecNorm(shared_td=td)


def test_the_lock_of_a_folder_is_missing(folder):
    (folder / f"{sharing.CONTROL}.memmap").unlink()
    td = TensorDict.load_memmap(folder)
    assert sharing.CONTROL not in td.keys()
    with pytest.raises(KeyError, match=f"{sharing.CONTROL}.*is missing"):
        VecNorm(shared_td=td)
    t = VecNorm(shared_td=td, lock=mp.Lock(), decay=1)
    t(values())
    assert count(t) == 3


@pytest.mark.parametrize("entry", ["observation_sum", "reward_nonfinite"])
def test_a_missing_entry(folder, entry):
    td = TensorDict.load_memmap(folder)
    td = td.exclude(entry)
    with pytest.raises(KeyError, match=entry):
        VecNorm(shared_td=td.share_memory_())


def test_an_entry_of_another_shape(folder):
    td = TensorDict.load_memmap(folder).clone()
    td["observation_nonfinite"] = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"observation_nonfinite.*\[2, 96\].*\[2, 3\]"
    ):
        VecNorm(shared_td=td.share_memory_())


def test_a_control_block_of_something_else(folder):
    td = TensorDict.load_memmap(folder)
    td[sharing.CONTROL].fill_(7)
    with pytest.raises(RuntimeError, match=r"no lock of this version.*restore a copy"):
        VecNorm(shared_td=td)
    for control in (torch.zeros(500), torch.zeros(3, dtype=torch.uint8)):
        td = td.clone().set(sharing.CONTROL, control).share_memory_()
        with pytest.raises(RuntimeError, match=f"entry '{sharing.CONTROL}'"):
            VecNorm(shared_td=td)


DAMAGES = ("bit", "bits", "word", "zeros", "ones", "cut", "swap")


def damage(r: random.Random, files: dict) -> None:
    """Changes one of the files, where it is: a copy would have its lock made anew."""
    [control] = [file for file in files if file.name.startswith(sharing.CONTROL)]
    file = control if r.random() < 0.7 else r.choice(sorted(files))
    data = bytearray(files[file])
    # Of the control block, in the lock, in front of the journal, or anywhere.
    begin, end = r.choice(((80, 120), (0, 800), (0, len(data))))
    if len(data) < end:
        begin, end = 0, len(data)
    at = r.randrange(begin, end)
    n = r.choice((1, 8, 64, len(data)))
    how = r.choice(DAMAGES)
    if how in ("bit", "bits"):
        for _ in range(1 if how == "bit" else 5):
            data[r.randrange(begin, end)] ^= 1 << r.randrange(8)
    elif how == "word":
        at -= at % 8
        data[at : at + 8] = r.randbytes(8)
    elif how in ("zeros", "ones"):
        n = min(n, len(data) - at)
        data[at : at + n] = (b"\0" if how == "zeros" else b"\xff") * n
    elif how == "cut":
        del data[at:]
    else:
        other = r.choice(sorted(files))
        other.write_bytes(data)
        data = files[other]
    file.write_bytes(data)


def test_damaged_files(folder):
    """Whatever happened to them: an error that says what to do, or plausible statistics."""
    files = {file: file.read_bytes() for file in folder.glob("*.memmap")}
    r = random.Random(0)
    refused = 0
    for _ in range(300):
        damage(r, files)
        try:
            t = attached(folder, lock_timeout=0.05)
        except (KeyError, RuntimeError, ValueError) as error:
            assert type(error) in (KeyError, RuntimeError, ValueError), repr(error)
            assert str(folder) in str(error) and "restore a copy" in str(error)
            refused += 1
        else:
            # Nobody can say of a lock that is held that its owner is none.
            with contextlib.suppress(TimeoutError):
                t(values())
                state = t.consistent_state_dict()
                assert all(leaf.isfinite().all() for leaf in state.values())
            del t  # or nothing could be cut
        for file, data in files.items():
            file.write_bytes(data)
    assert 100 < refused < 290
    assert assert_whole(attached(folder)) == 2


# ---------------------------------------------------------------- how tensors are sent


def count_up(queue, updates):
    t = VecNorm(shared_td=queue.get(timeout=PATIENCE), decay=1)
    for _ in range(updates):
        t(values())


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("fork", "file_descriptor"),
        ("fork", "file_system"),
        *(
            pytest.param(*how, marks=pytest.mark.slow)
            for how in [
                ("spawn", "file_descriptor"),
                ("spawn", "file_system"),
                ("forkserver", "file_descriptor"),
                ("forkserver", "file_system"),
            ]
        ),
    ],
)
def test_sharing_strategies(strategy, method):
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy(strategy)
    try:
        env = IntegerEnv(features=FEATURES)
        td = VecNorm.build_td_for_shared_vecnorm(env, KEYS)
        context = mp.get_context(method)
        queue = context.Queue()
        workers = [
            context.Process(target=count_up, args=(queue, 500)) for _ in range(2)
        ]
        for worker in workers:
            worker.start()
            queue.put(td)
        for worker in workers:
            worker.join(PATIENCE)
        assert [worker.exitcode for worker in workers] == [0, 0]
        t = VecNorm(shared_td=td, decay=1)
        assert assert_whole(t) == 1000
        assert count(t, "reward") == 1000
    finally:
        mp.set_sharing_strategy(before)
