# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints that are damaged, of other classes, or not plausible.

However a checkpoint was changed, it is refused with an error that names an entry and
leaves the statistics as they were, or what it loads is something that data can give.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from common import (
    FIELDS,
    PATIENCE,
    IntegerEnv,
    assert_same_state,
    reference,
    snapshot,
    started,
    through_a_file,
)
from tensordict import TensorDict
from torch import multiprocessing as mp
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrl.envs import TransformedEnv, VecNormV2

from torchrl_vecnorm import Moments, VecNorm
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.statistics import sharing

NESTED = ("agents", "observation")
KEYS = ["observation", "reward", NESTED]
SEP = VecNorm.SEP


def batch(n: int = 6) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(n, 4) + 3,
            "reward": torch.randn(n, 1),
            "agents": {"observation": torch.randn(n, 2, 3)},
        },
        batch_size=[n],
    )


def trained(calls: int = 3, spoiled: bool = False, **kwargs) -> VecNorm:
    torch.manual_seed(calls)
    t = VecNorm(KEYS, **kwargs)
    for _ in range(calls):
        td = batch()
        if spoiled:
            td["observation"][1, 2] = math.nan
        t(td)
    return t


def copied(state: dict) -> dict:
    return {name: leaf.clone() for name, leaf in state.items()}


# ------------------------------------------------------------------------ plausibility


def test_gradients_stay_outside():
    state = {
        k: v.clone().requires_grad_() for k, v in trained().get_extra_state().items()
    }
    for t in (trained(1), VecNorm(KEYS)):
        t.set_extra_state(state)
        assert not any(leaf.requires_grad for leaf in snapshot(t).values())
        assert not t.loc["observation"].requires_grad
        t(batch())


def test_a_count_without_a_dimension():
    """A ``shared_td`` made by hand may have one, and is loaded into as a whole."""
    td = TensorDict(
        {
            f"observation_{field}": torch.zeros(() if field == "count" else 4).double()
            for field in FIELDS
        }
    ).share_memory_()
    t = VecNorm(["observation"], shared_td=td, lock=mp.Lock())
    source = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other keys
        t.set_extra_state(source.get_extra_state())
    assert torch.equal(t.loc["observation"], source.loc["observation"])


def test_nothing_to_load():
    t = VecNorm(KEYS)
    with pytest.warns(UserWarning, match="no statistics of"):
        t.set_extra_state({})
    assert t._td is None and not t._statistics.store.others_update


def shared_state(**changes) -> dict:
    state = {
        "observation_sum": torch.zeros(4, dtype=torch.float64),
        "observation_ssq": torch.zeros(4, dtype=torch.float64),
        "observation_count": torch.zeros(1, dtype=torch.float64),
        "observation_nonfinite": torch.zeros(2, 4, dtype=torch.float64),
    }
    state.update({f"observation_{name}": leaf for name, leaf in changes.items()})
    return {name: leaf.share_memory_() for name, leaf in state.items()}


UNUSABLE = {
    "float16": ("sum", lambda: torch.zeros(4, dtype=torch.float16)),
    "float16 counter": ("nonfinite", lambda: torch.zeros(2, 4, dtype=torch.float16)),
    "strided": ("ssq", lambda: torch.zeros(4, 2, dtype=torch.float64)[:, 0]),
}


@pytest.mark.parametrize("how", ["adopted", "shared_td"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_shared_tensors_that_no_call_could_update(case, how):
    """They would stay where they are: said before the first call."""
    name, make = UNUSABLE[case]
    state = shared_state(**{name: make()})
    with pytest.raises(ValueError, match=f"observation_{name}.*expected contiguous"):
        if how == "adopted":
            VecNorm(["observation"], lock=mp.Lock()).set_extra_state(state)
        else:
            VecNorm(["observation"], shared_td=TensorDict(state))


def test_some_tensors_are_shared():
    """Nobody else has the others: all become our own."""
    state = shared_state()
    state["observation_ssq"] = state["observation_ssq"].clone()
    t = VecNorm(["observation"], decay=1, lock=mp.Lock())
    with pytest.warns(UserWarning, match="are copied"):
        t.set_extra_state(state)
    assert not t._statistics.store.others_update
    t(batch().select("observation"))
    assert state["observation_sum"].eq(0).all() and state["observation_count"] == 0


def test_tensors_that_overlap():
    memory = torch.zeros(7, dtype=torch.float64).share_memory_()
    state = shared_state()
    state |= {"observation_sum": memory[:4], "observation_ssq": memory[3:]}
    with pytest.raises(ValueError, match="one piece of memory"):
        VecNorm(["observation"], lock=mp.Lock()).set_extra_state(state)
    VecNorm(["observation"]).set_extra_state(through_a_file(state))  # copied


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.9999, 0.9997])
def test_our_own_checkpoint_after_much_that_is_missing(decay):
    """A constant feature, then NaN for so long that hardly a value is left."""
    t = VecNorm(["o"], decay=decay)
    t(TensorDict(o=torch.full((3, 1), 5.0), batch_size=[3]))
    nan = TensorDict(o=torch.full((3, 1), math.nan), batch_size=[3])
    for _ in range(5000):
        t(TensorDict(o=torch.full((3, 1), 5.0), batch_size=[3]))
    other = VecNorm(["o"], decay=decay)
    for i in range(int(20.5 / -math.log(decay))):
        t(nan.copy())
        if i % 97 == 0:
            other.load_state_dict(t.state_dict())


@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("observation_nonfinite", 0.5, "whole numbers"),
        ("observation_sum", math.nan, "finite sums.*nan"),
        ("observation_sum", math.inf, "finite sums.*inf"),
        ("observation_sum", 1e9, "ssq · count ≥ sum²"),
        ("observation_ssq", math.nan, "sums of squares that are finite.*nan"),
        ("observation_ssq", -1.0, "not negative.*-1"),
        ("observation_ssq", 0.0, "ssq · count ≥ sum²"),
        ("observation_count", math.nan, "counts that are finite.*nan"),
        ("observation_count", math.inf, "counts that are finite.*inf"),
        ("observation_count", -3.0, "not negative.*-3"),
        ("observation_count", 0.0, "ssq · count ≥ sum²"),
        ("observation_nonfinite", math.nan, "counts that are finite.*nan"),
        ("observation_nonfinite", -1.0, "not negative.*-1"),
        ("observation_nonfinite", 0.5, "whole numbers.*0.5"),
        (f"agents{SEP}observation_sum", math.nan, "finite sums.*nan"),
    ],
)
def test_values_that_no_data_can_give(entry, value, expected, fresh):
    t = VecNorm(KEYS) if fresh else trained(5)
    before = snapshot(t)
    state = copied(trained().get_extra_state())
    state[entry].view(-1)[-1] = value
    named = entry.replace(SEP, ".*").replace("_sum", "_s").replace("_count", "_.*")
    with pytest.raises(ValueError, match=f"{named}.*expected.*{expected}"):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), before)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "a tensor, got NoneType"),
        (3.0, "a tensor, got float"),
        (torch.ones(4, dtype=torch.int64), "floating-point values, got torch.int64"),
        (torch.ones(4, dtype=torch.complex64), "floating-point.*complex64"),
        (torch.ones(4).to_sparse(), "dense.*sparse"),
        (torch.ones(4, device="meta"), "dense"),
    ],
)
def test_entries_that_are_no_statistics(value, match):
    t = trained(5)
    before = snapshot(t)
    state = copied(trained().get_extra_state())
    state["observation_sum"] = value
    with pytest.raises(ValueError, match=match):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), before)


def half_updated() -> tuple[dict, dict]:
    """Shared statistics in the middle of an update, and as they are after it."""
    after = copied(trained().get_extra_state())
    state = {name: leaf.clone().share_memory_() for name, leaf in after.items()}
    state["observation_sum"].mul_(100)
    return state, after


def test_adopted_in_the_middle_of_an_update():
    """Taken as they are while somebody has the lock: who has it puts them right."""
    state, _ = half_updated()
    lock = mp.Lock()
    t = VecNorm(KEYS, lock=lock)
    with pytest.raises(ValueError, match=r"observation_ssq.*ssq · count ≥ sum²"):
        t.set_extra_state(state)
    assert t._td is None
    with lock:
        t.set_extra_state(state)
    assert torch.equal(t._td["observation_sum"], state["observation_sum"])


@pytest.mark.filterwarnings("ignore:VecNorm. the statistics are copied")
@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
def test_copied_in_the_middle_of_an_update(fresh):
    """A copy is from before or after it."""
    t = VecNorm(KEYS) if fresh else trained(5)
    before = snapshot(t)
    state, after = half_updated()
    with pytest.raises(ValueError, match=r"observation_ssq.*ssq · count ≥ sum²"):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), before)
    finish = threading.Timer(
        0.005, lambda: state["observation_sum"].copy_(after["observation_sum"])
    )
    finish.start()
    t.set_extra_state(state)
    finish.join()
    assert_same_state(snapshot(t), snapshot(trained()))


def test_more_missing_than_left_out():
    state = copied(trained(spoiled=True).get_extra_state())
    state["observation_nonfinite"][0, 1] = 2
    for t in (trained(5), VecNorm(KEYS)):
        with pytest.raises(
            ValueError, match=r"observation_nonfinite.*ever left out.*2"
        ):
            t.set_extra_state(state)


@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
@pytest.mark.parametrize(
    "made",
    [
        dict,
        OrderedDict,
        MappingProxyType,
        TensorDict,
        pytest.param(lambda state: TensorDict(state).unflatten_keys(SEP), id="nested"),
    ],
)
def test_a_dict_of_another_kind(made, fresh):
    t, source = VecNorm(KEYS) if fresh else trained(5), trained()
    t.set_extra_state(made(source.get_extra_state()))
    assert_same_state(snapshot(t), snapshot(source))


@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
@pytest.mark.parametrize("state", ["text", 3, [1, 2], ("a", 1), torch.ones(2)], ids=str)
def test_no_dict(state, fresh):
    t = VecNorm(KEYS) if fresh else trained()
    with pytest.raises(ValueError, match=f"dict of tensors.*{type(state).__name__}"):
        t.set_extra_state(state)


@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
def test_a_file_that_is_mapped_when_it_is_loaded(fresh, tmp_path):
    """It stays as it is, and is not needed any more."""
    source = trained()
    torch.save(source.state_dict(), tmp_path / "saved.pt")
    t = VecNorm(KEYS) if fresh else trained(5)
    t.load_state_dict(torch.load(tmp_path / "saved.pt", mmap=True))
    data = (tmp_path / "saved.pt").read_bytes()
    td = batch()
    t(td.clone()), source(td.clone())
    assert (tmp_path / "saved.pt").read_bytes() == data
    (tmp_path / "saved.pt").write_bytes(bytes(len(data)))
    assert_same_state(snapshot(t), snapshot(source))


@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
def test_distributed_checkpoints(fresh, tmp_path):
    source = trained(3, spoiled=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        distributed_checkpoint.save({"t": source.state_dict()}, checkpoint_id=tmp_path)
        t = VecNorm(KEYS)
        if fresh:
            # There is nothing to load into: as a file of torch.save.
            dcp_to_torch_save(tmp_path, tmp_path / "saved.pt")
            saved = torch.load(tmp_path / "saved.pt")
        else:
            t = trained(5)
            saved = {"t": t.state_dict()}
            distributed_checkpoint.load(saved, checkpoint_id=tmp_path)
    t.load_state_dict(saved["t"])
    assert_same_state(snapshot(t), snapshot(source))
    torch.manual_seed(0)
    td = batch()
    assert all(torch.equal(t(td.clone())[k], source(td.clone())[k]) for k in KEYS)


def test_entries_of_nobody_are_said():
    t, source = trained(5), trained()
    state = {**source.get_extra_state(), "velocity_sum": torch.ones(2)}
    with pytest.warns(UserWarning, match=r"entries \['velocity_sum'\].*ignored"):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), snapshot(source))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.set_extra_state(source.get_extra_state())


@pytest.mark.filterwarnings("ignore:VecNorm wasn't initialized")  # by torchrl's
def test_all_missing_and_the_reference_goes_on():
    """Sums that are not zero beside counts that all seem missing: torchrl's updates."""
    t = VecNorm(["observation"], decay=0.9)
    t(TensorDict(observation=torch.full((10, 2), math.nan), batch_size=[10]))
    theirs = reference(["observation"], decay=0.9)
    bare = copied(t.get_extra_state())
    missing = bare.pop("observation_nonfinite")
    theirs.set_extra_state(bare)
    theirs._call(TensorDict(observation=torch.ones(1, 2), batch_size=[1]))
    state = {**theirs.get_extra_state(), "observation_nonfinite": missing}
    VecNorm(["observation"]).set_extra_state(copied(state))
    t.set_extra_state(state)
    assert t.scale["observation"].isfinite().all()


def test_the_representation_tells_what_was_left_out():
    assert "nonfinite" not in repr(VecNorm())
    assert "nonfinite" not in repr(trained())
    assert "nonfinite={'observation': 3, 'reward': 0, " in repr(trained(spoiled=True))


# ------------------------------------------------------------------------- memory maps

COPIES = {
    "torch.save": through_a_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.fixture(params=[True, "folder"], ids=["no folder", "folder"])
def mapped(request, tmp_path):
    """An environment whose statistics are in a memory map."""
    memmap = request.param if request.param is True else tmp_path / "statistics"
    td = VecNorm.build_td_for_shared_vecnorm(IntegerEnv(), memmap=memmap)
    env = TransformedEnv(IntegerEnv(), VecNorm(shared_td=td, decay=1))
    env.rollout(9)
    return env


@pytest.mark.parametrize("how", COPIES)
def test_a_state_dict_of_a_memory_map(mapped, how):
    """Plain tensors of their own, which outlive the files; the live dict stays live."""
    live = mapped.state_dict()
    taken = COPIES[how](live)
    before = snapshot(mapped.transform)
    state = taken["_extra_state"]
    assert all(type(leaf) is torch.Tensor for leaf in state.values())
    assert all(torch.equal(leaf, before[name]) for name, leaf in state.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = TransformedEnv(IntegerEnv(), VecNorm(decay=1))
        other.load_state_dict(taken)
        other.rollout(3)
    state["observation_count"].fill_(99)
    assert_same_state(snapshot(mapped.transform), before)
    mapped.rollout(4)
    assert live["_extra_state"]["observation_count"].item() == 10 + 5
    mapped.load_state_dict(COPIES[how](other.state_dict()))
    assert live["_extra_state"]["observation_count"].item() == 10 + 4


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("of", ["transform", "environment"])
def test_a_copy_of_a_memory_map(mapped, of, how):
    before = snapshot(mapped.transform)
    if how == "torch.save":
        load = partial(through_a_file, weights_only=False)
    else:
        load = COPIES[how]
    if of == "environment":
        other = load(mapped)
    else:
        other = TransformedEnv(IntegerEnv(), load(mapped.transform))
    other.rollout(3)
    assert_same_state(snapshot(mapped.transform), before)
    state = other.transform.get_extra_state()
    assert state["observation_count"].item() == 14
    assert all(type(leaf) is torch.Tensor for leaf in state.values())
    # Shared next, it is shared under its own lock, not under a copy of the original's.
    assert not other.transform._statistics.store.others_update
    assert set(before) - set(other.transform._td.keys(True, True)) == {sharing.CONTROL}


def count_a_rollout(queue, of_state, lock):
    t = given = queue.get(timeout=PATIENCE)
    if of_state:
        t = VecNorm(decay=1, lock=lock)
        t.set_extra_state(given)
    TransformedEnv(IntegerEnv(), t).rollout(4)


@pytest.mark.parametrize("of_state", [False, True], ids=["transform", "state_dict"])
def test_a_memory_map_is_sent_as_such(mapped, of_state, method="fork"):
    context = mp.get_context(method)
    queue, lock = context.Queue(), context.Lock()
    with started(context, count_a_rollout, [(queue, of_state, lock)]):
        t = mapped.transform
        queue.put(t.get_extra_state() if of_state else t)
    assert t.get_extra_state()["observation_count"].item() == 10 + 5


# ----------------------------------------------------------------------- other sources


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_file_without_code(spoiled):
    """What is saved is tensors alone, and goes on to the bit."""
    t = trained(3, spoiled)
    loaded = through_a_file(t.state_dict(), weights_only=True)
    resumed = VecNorm(KEYS)
    resumed.load_state_dict(loaded)
    for _ in range(3):
        td = batch()
        a, b = t(td.clone()), resumed(td.clone())
        assert all(torch.equal(a[key], b[key]) for key in KEYS)
    assert_same_state(snapshot(resumed), snapshot(t))


def load_and_go_on(file, results):
    t = VecNorm(KEYS)
    t.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    torch.manual_seed(9)
    t(batch())
    results.put({k: v.tolist() for k, v in t.get_extra_state().items()})


@pytest.mark.parametrize("state", [Moments.zeros([2, 3]), F.moments(torch.ones(4, 2))])
@pytest.mark.parametrize("nonfinite", [True, False], ids=["counted", "uncounted"])
def test_moments_in_a_file_without_code(state, nonfinite):
    """The package is imported, and that is all that torch needs to know."""
    if not nonfinite:
        state = state._replace(nonfinite=None)
    loaded = through_a_file({"state": [state]}, weights_only=True)["state"][0]
    assert type(loaded) is Moments
    for leaf, expected in zip(loaded, state, strict=True):
        assert leaf is None if expected is None else torch.equal(leaf, expected)


def test_another_process_goes_on():
    t = trained(3, spoiled=True)
    file = io.BytesIO()
    torch.save(t.state_dict(), file)
    context = mp.get_context("spawn")
    results = context.Queue()
    with started(context, load_and_go_on, [(file.getvalue(), results)]):
        resumed = results.get(timeout=PATIENCE)
    torch.manual_seed(9)
    t(batch())
    assert resumed == {k: v.tolist() for k, v in t.get_extra_state().items()}


@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999, 1.0])
def test_checkpoints_of_v2(decay, batched, fresh):
    """The weighted mean and deviation of the samples that V2 has seen."""
    keys = ["observation", NESTED]
    v2 = VecNormV2(keys, decay=decay, reduce_batch_dims=batched)
    n, calls = 5 if batched else 1, 40
    seen = []
    for _ in range(calls):
        td = batch(n).exclude("reward")
        td["observation"].mul_(2).add_(7)
        td = td if batched else td[0]
        seen.append(td.clone())
        v2._step(td, td.clone())
    t = VecNorm(keys, decay=decay)
    if not fresh:
        t(batch().exclude("reward"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "VecNorm: ")
        t.load_state_dict(through_a_file(v2.state_dict(), weights_only=True))
    for key in keys:
        x = torch.stack([td[key] for td in seen]).double()
        age = torch.arange(calls - 1, -1, -1, dtype=torch.float64)
        # A batch is averaged there: its samples are of one age, and weigh as many.
        weight = decay ** (n * age)
        weight = weight.reshape(-1, *(1 for _ in x.shape[1:]))
        if batched:
            x, weight = x.flatten(0, 1), weight.repeat_interleave(n, 0).flatten(0, 1)
            weight = weight.reshape(-1, *(1 for _ in x.shape[1:]))
        loc = (weight * x).sum(0) / weight.sum()
        scale = ((weight * (x - loc) ** 2).sum(0) / weight.sum()).sqrt()
        torch.testing.assert_close(t.loc[key].double(), loc, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(t.scale[key].double(), scale, rtol=1e-3, atol=1e-5)
        samples = n * calls
        mass = samples if decay == 1 else (1 - decay**samples) / (1 - decay)
        name = key if isinstance(key, str) else SEP.join(key)
        count = t.get_extra_state()[f"{name}_count"]
        assert count.item() == pytest.approx(mass, rel=1e-9)
    t(batch().exclude("reward"))


def test_an_environment_of_v2():
    env = TransformedEnv(IntegerEnv(), VecNormV2(["observation", "reward"], decay=0.9))
    env.rollout(20)
    ours = TransformedEnv(IntegerEnv(), VecNorm(decay=0.9))
    ours.load_state_dict(env.state_dict())
    torch.testing.assert_close(
        ours.transform.loc["observation"], env.transform.loc["observation"]
    )
    ours.rollout(3)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("count", None, KeyError, "count.*observation"),
        ("count", torch.tensor(-1), ValueError, "count.*observation.*negative"),
        ("count", torch.ones(2), ValueError, "count.*observation.*one number"),
        ("loc", torch.full((4,), math.nan), ValueError, "loc.*observation.*finite"),
        ("loc", torch.ones(7), ValueError, "loc.*observation.*4.*7"),
        ("var", torch.full((4,), -1.0), ValueError, "var.*observation.*negative"),
        ("var", torch.full((4,), 1e-3), ValueError, "var.*observation.*sum²"),
    ],
)
def test_a_damaged_checkpoint_of_v2(name, value, error, match):
    v2 = VecNormV2(["observation"], decay=0.9)
    td = TensorDict(observation=torch.full((4,), 3.0) + torch.randn(4))
    v2._step(td, td.clone())
    v2._step(td, td.clone())
    t = VecNorm(["observation"], decay=0.9)
    t(TensorDict(observation=torch.randn(4)))
    before = snapshot(t)
    entry = f"{name}{VecNormV2.SEP}observation"
    state = {**v2.get_extra_state(), entry: value}
    if value is None:
        del state[entry]
    with pytest.raises(error, match=match):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), before)


# -------------------------------------------------------------------------- mutations

SPECIAL = (math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 0.5, 5e-324, 1e308, -1e200)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex128,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
OBJECTS = (None, 3, 2.5, "x", [1.0], {}, {"a": torch.ones(1)}, TensorDict(), object())


def change_value(r: random.Random, state: dict, name) -> None:
    flat = state[name].view(-1)
    flat[r.randrange(len(flat))] = r.choice(SPECIAL)


def change_bits(r: random.Random, state: dict, name) -> None:
    bits = state[name].view(-1).view(torch.int64)
    bits[r.randrange(len(bits))] ^= 1 << r.randrange(63)


def change_all(r: random.Random, state: dict, name) -> None:
    state[name].mul_(r.choice((-1.0, 0.0, 1e-30, 1e30, 3.0)))


def change_dtype(r: random.Random, state: dict, name) -> None:
    state[name] = state[name].to(r.choice(DTYPES))


def change_shape(r: random.Random, state: dict, name) -> None:
    value = state[name]
    state[name] = r.choice(
        (
            value.reshape(-1),
            value[..., None],
            value[None],
            value.reshape(-1)[:-1],
            value.sum(),
            value.mT if value.ndim > 1 else value.repeat(2),
            value.new_empty(0),
        )
    )


def change_layout(r: random.Random, state: dict, name) -> None:
    value = state[name]
    state[name] = r.choice(
        (
            value.to_sparse(),
            value.to("meta"),
            value.clone().requires_grad_(),
            value.reshape(-1)[:1].expand(value.numel()).reshape(value.shape),
            torch.stack([value, value], -1)[..., 0],
        )
    )


def change_object(r: random.Random, state: dict, name) -> None:
    state[name] = r.choice(OBJECTS)


def drop(r: random.Random, state: dict, name) -> None:
    del state[name]


def rename(r: random.Random, state: dict, name) -> None:
    to = r.choice(
        (
            name[:-1],
            name + "x",
            name.upper(),
            7,
            ("a", "b"),
            f"loc{VecNormV2.SEP}{name}",
        )
    )
    state[to] = state.pop(name)


def swap(r: random.Random, state: dict, name) -> None:
    other = r.choice(list(state))
    state[name], state[other] = state[other], state[name]


def alias(r: random.Random, state: dict, name) -> None:
    state[name] = state[r.choice(list(state))]


MUTATIONS = (
    *(change_value, change_bits, change_bits, change_all, change_dtype, change_shape),
    *(change_layout, change_object, drop, rename, swap, alias),
)


def is_valid(state: dict) -> bool:
    """Whether data can have given it, by the definitions."""
    for name, total in state.items():
        if not name.endswith("_sum"):
            continue
        squares, count, missing = (
            state.get(name[: -len("sum")] + field)
            for field in ("ssq", "count", "nonfinite")
        )
        if missing is None:
            missing = torch.zeros(2, *total.shape)
        total, squares, count, missing = (
            leaf.double() for leaf in (total, squares, count, missing)
        )
        if count.shape != (1,) or squares.shape != total.shape:
            return False
        leaves = (total, squares, count, missing)
        if not all(leaf.isfinite().all() for leaf in leaves):
            return False
        if not all((leaf >= 0).all() for leaf in leaves[1:]):
            return False
        if (missing[1] % 1 != 0).any():
            return False
        used = count - missing[0]
        used = torch.where(used > 0, used, count)
        # The variance, with what float32 sums may have rounded.
        square = squares / used
        negative = (total / used) ** 2 > 1.02 * square
        if torch.where(used > 0, negative, (total != 0) | (squares != 0)).any():
            return False
    return True


def try_to_load(t: VecNorm, state, good: dict) -> bool:
    """Whether it was loaded. If not, nothing has changed; what was loaded is valid."""
    before = None if t._td is None else {k: v.clone() for k, v in good.items()}
    try:
        t.set_extra_state(state)
    except (KeyError, ValueError) as error:
        assert "VecNorm" in str(error) or "tensordict" in str(error)
        if before is None:
            assert t._td is None
        else:
            now = t.get_extra_state()
            assert now.keys() == before.keys()
            assert all(torch.equal(now[k], v) for k, v in before.items())
        return False
    assert is_valid(t.get_extra_state())
    return True


@pytest.fixture
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("fresh", [False, True], ids=["initialised", "fresh"])
def test_mutated_entries(request, fresh):
    cases = request.config.getoption("--mutations")
    if fresh:
        cases //= 20  # each takes shared memory of its own
    r = random.Random(0)
    sources = [copied(trained(3, s).get_extra_state()) for s in (False, True)]
    t = trained(5)
    good = copied(t.get_extra_state())
    loaded = 0
    for _ in range(cases):
        if fresh:
            t = VecNorm(KEYS)
        state = copied(r.choice(sources))
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            name = r.choice([name for name in state if isinstance(name, str)])
            # An earlier mutation may have left nothing that this one can change.
            with suppress(RuntimeError, TypeError, AttributeError, ValueError):
                r.choice(MUTATIONS)(r, state, name)
        if try_to_load(t, state, good):
            loaded += 1
            if not fresh:
                t.set_extra_state(good)
    # Both happen: a bit of a mantissa harms nobody.
    assert cases * 0.05 < loaded < cases * 0.6


def change_byte(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        at = r.randrange(len(changed))
        how = r.random()
        if how < 0.1:
            at -= at % 8
            value = r.choice((math.nan, math.inf, -1.0, 0.0, 1e300))
            changed[at : at + 8] = struct.pack("<d", value)
        elif how < 0.5:
            changed[at] ^= 1 << r.randrange(8)
        elif how < 0.8:
            changed[at] = r.randrange(256)
        else:
            other = r.randrange(len(changed))
            changed[at], changed[other] = changed[other], changed[at]
    return bytes(changed)


def change_size(r: random.Random, data: bytes) -> bytes:
    """Cuts, or doubles a part."""
    at = r.randrange(len(data))
    n = r.choice((1, 8, 64, len(data)))
    return (
        data[:at] + (data[at + n :] if r.random() < 0.5 else data[at:][:n]) + data[at:]
    )


def change_record(r: random.Random, data: bytes, name: str) -> bytes:
    """Bytes of a file in the file: with its checksum, as a zip library writes it."""
    old, new = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        chosen = r.choice([n for n in old.namelist() if name in n and old.read(n)])
        for record in old.namelist():
            content = old.read(record)
            archive.writestr(
                record, change_byte(r, content) if record == chosen else content
            )
    return new.getvalue()


def is_same(state, other: dict) -> bool:
    return (
        isinstance(state, dict)
        and state.keys() == other.keys()
        and all(
            isinstance(leaf, torch.Tensor)
            and leaf.dtype == other[name].dtype
            and leaf.shape == other[name].shape
            and torch.equal(leaf.isnan(), other[name].isnan())
            and torch.equal(leaf.nan_to_num(), other[name].nan_to_num())
            for name, leaf in state.items()
        )
    )


def by_hand(dtype: torch.dtype) -> VecNorm:
    """As torchrl keeps them: without a counter, shared; there in float32."""
    td = trained(5)._td.to(dtype)
    for name in list(td.keys(True, True)):
        if (name if isinstance(name, str) else name[-1]).endswith("_nonfinite"):
            del td[name]
    return VecNorm(KEYS, shared_td=td.share_memory_())


def float32_by_hand() -> VecNorm:
    return by_hand(torch.float32)


def with_a_journal() -> VecNorm:
    td = VecNorm.build_td_for_shared_vecnorm(IntegerEnv(features=4))
    t = VecNorm(KEYS[:2], shared_td=td)
    t(batch())
    return t


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("target", [trained, float32_by_hand, with_a_journal])
def test_mutated_files(request, target):
    """Bytes of a file: changed, cut, doubled."""
    r = random.Random(0)
    original = trained(3, True).get_extra_state()
    file = io.BytesIO()
    torch.save(original, file)
    data = file.getvalue()
    t = target()
    good = copied(t.get_extra_state())
    in_bytes = read = loaded = 0
    cases = request.config.getoption("--mutations") // 20
    for _ in range(cases):
        how = r.random()
        if how < 0.5:
            changed = change_record(r, data, "/data/")
        elif how < 0.7:
            changed = change_record(r, data, "data.pkl")
        elif how < 0.9:
            changed = change_byte(r, data)
        else:
            changed = change_size(r, data)
        in_bytes += how < 0.9
        try:
            state = torch.load(io.BytesIO(changed), weights_only=True)
        except Exception:  # of torch's many
            continue
        read += how < 0.9 and not is_same(state, original)
        if try_to_load(t, state, good):
            loaded += 1
            t.set_extra_state(good)
    # Or it is torch that is tested.
    assert read > in_bytes / 3
    assert cases * 0.05 < loaded < cases * 0.75


@pytest.mark.parametrize(
    ("entry", "value"),
    [("observation_ssq", 1e40), ("observation_count", 1e40), ("reward_count", 1e-307)],
)
def test_values_that_float32_cannot_hold(entry, value):
    t = float32_by_hand()
    before = snapshot(t)
    state = copied(trained().get_extra_state())
    state[entry].view(-1)[-1] = value
    with pytest.raises(ValueError, match=entry):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), before)


def test_missing_values_where_nobody_counts_them():
    """They count as ones that change neither loc nor scale."""
    source, t = VecNorm(KEYS), float32_by_hand()
    td = batch(60)
    td["observation"][::2, 0] = math.nan
    td["reward"][:] = math.inf
    source(td)
    t.set_extra_state(source.get_extra_state())
    for key in KEYS:
        for of in ("loc", "scale"):
            torch.testing.assert_close(getattr(t, of)[key], getattr(source, of)[key])
    for name, leaf in t.get_extra_state().items():
        if name.endswith("_count"):
            assert leaf == 60


def test_missing_values_that_make_up_too_much():
    """As large as the one that there is, a million of them are infinite."""
    t = by_hand(torch.float64)
    before = snapshot(t)
    state = copied(trained().get_extra_state())
    state["reward_ssq"][:] = 1e305
    state["reward_count"][:] = 1e6
    state["reward_nonfinite"][:] = 1e6 - 1
    with pytest.raises(ValueError, match=r"reward_ssq.*finite"):
        t.set_extra_state(state)
    assert_same_state(snapshot(t), before)


def test_a_cut_pickle_of_a_transform():
    data = pickle.dumps(trained())
    for at in range(0, len(data), 97):
        with pytest.raises(Exception):  # noqa: B017
            pickle.loads(data[:at])


def test_a_pickle_of_before_the_statistics_were_an_object():
    """Written by 0.1.0 when all of it was in the module ``torchrl_vecnorm.vecnorm``.

    Two calls with ``arange(8).reshape(4, 2) + i`` and rewards ``i``, decay 0.9. Another build
    wrote it: a compiler that joins multiplications and additions rounds once less than one
    that does not.
    """

    def assert_near(actual: dict, expected: dict) -> None:
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=1e-12, atol=0, equal_nan=True, msg=name
            )

    file = Path(__file__).parent / "pickles" / "vecnorm_0.1.0.pickle"
    t = pickle.loads(file.read_bytes())
    keys = ["observation", ("agents", "reward")]
    expected = VecNorm(keys, decay=0.9)
    for i in range(3):
        td = TensorDict(
            observation=torch.arange(8.0).reshape(4, 2) + i,
            agents=TensorDict(reward=torch.full((4, 1), float(i)), batch_size=[4]),
            batch_size=[4],
        )
        y = expected(td.clone())
        if i == 1:
            assert_near(snapshot(t), snapshot(expected))
    assert type(t) is VecNorm
    torch.testing.assert_close(
        t(td)["observation"], y["observation"], rtol=1e-6, atol=0
    )
    assert_near(snapshot(t), snapshot(expected))
    again = pickle.loads(pickle.dumps(t))
    assert_same_state(snapshot(again), snapshot(t))
    assert again.__dict__.keys() == expected.__dict__.keys()
