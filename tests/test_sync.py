# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics that are joined now and then, against the formula in fractions."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from common import reference, through_a_file
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import run
from tensordict import TensorDict

from torchrl_vecnorm import RunningNorm, VecNorm, VecNormV2, merge_states

KINDS = ["RunningNorm", "VecNorm", "VecNormV2"]
DECAYS = [0.5, 0.9, 0.9999, 1.0]


# ------------------------------------------------------------------------ one of each kind


def make(kind: str, decay: float, **options):
    if kind == "RunningNorm":
        return RunningNorm(2, decay=decay, **options)
    if kind == "VecNorm":
        return VecNorm(["a"], decay=decay, **options)
    return VecNormV2(["a"], decay=decay, reduce_batch_dims=True, **options)


def feed(norm, rows: list[tuple[float, float]]) -> None:
    x = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
    if isinstance(norm, RunningNorm):
        norm(x)
    else:
        norm(TensorDict({"a": x}, [len(x)]))


def state_of(norm) -> dict:
    if isinstance(norm, RunningNorm):
        return norm.state_dict()
    return norm.state_dict().get("_extra_state") or {}


def load(norm, state: dict) -> None:
    if isinstance(norm, RunningNorm):
        norm.load_state_dict(state)
    elif state:
        norm.set_extra_state(state)


def read(norm):
    """Sums, sums of squares, the count and the variance."""
    if isinstance(norm, RunningNorm):
        moments = norm.stats.moments()
    else:
        moments = next((m for _, m in norm._statistics.seen()), None)
        if moments is None:
            return [0, 0], [0, 0], 0, [0, 0]
    var = moments.mean_var()[1]
    return (
        moments.sum.tolist(),
        moments.ssq.tolist(),
        moments.samples().item(),
        var.tolist(),
    )


# ------------------------------------------------------------------------- the formula


@dataclass
class Exact:
    """Statistics as fractions, that know how often they were called since ``base``."""

    decay: Fraction
    by_sample: bool
    numbers: list[Fraction] = field(default_factory=lambda: [Fraction(0)] * 5)
    base: list[Fraction] | None = None
    calls: int = 0
    seen: int = 0

    def feed(self, rows: list[tuple[float, float]]) -> None:
        if not rows:
            return
        n = len(rows)
        keep = self.decay ** (n if self.by_sample else 1)
        weight = (1 - keep) / n if self.by_sample and self.decay < 1 else Fraction(1)
        columns = [[Fraction(row[i]) for row in rows] for i in range(2)]
        new = [*map(sum, columns), *(sum(v * v for v in c) for c in columns), n]
        self.numbers = [
            keep * old + weight * v for old, v in zip(self.numbers, new, strict=True)
        ]
        self.calls += n if self.by_sample else 1
        self.seen += n

    def load(self, numbers: list[Fraction], seen: int) -> None:
        self.numbers, self.base = numbers, numbers if any(numbers) else None
        self.calls, self.seen = 0, seen


def joined(ranks: list[Exact]) -> tuple[list[Fraction], int]:
    base = next((r.base for r in ranks if r.base is not None), [Fraction(0)] * 5)
    d, most = ranks[0].decay, max((r.calls for r in ranks if r.base), default=0)
    numbers = [d**most * v for v in base]
    before = None
    seen = 0
    for r in ranks:
        mine = r.base or [Fraction(0)] * 5
        numbers = [
            total + v - d**r.calls * old
            for total, v, old in zip(numbers, r.numbers, mine, strict=True)
        ]
        seen += r.calls if r.by_sample else 0
        if r.base is not None and r.by_sample:
            before = r.seen - r.calls
    seen += before or 0
    if ranks[0].by_sample and d < 1 and numbers[4]:
        # Weights add up to 1 - decay**count, as for one that has seen all of them.
        scale = (1 - d**seen) / numbers[4]
        numbers = [scale * v for v in numbers]
    return numbers, seen


def agree(norm, numbers: list[Fraction], far: float) -> None:
    total, squares, count, var = read(norm)
    n = float(numbers[4])
    assert abs(count - n) <= 1e-12 * n
    for i in range(2):
        exact, square = numbers[i], numbers[2 + i]
        assert abs(total[i] - float(exact)) <= 1e-12 * float(square * numbers[4]) ** 0.5
        assert abs(squares[i] - float(square)) <= 1e-12 * float(square)
        if n:
            mean = exact / numbers[4]
            expected = float(square / numbers[4] - mean * mean)
            assert abs(var[i] - expected) <= 1e-12 * (1 + far * (1 + far * 1e-4))


# ----------------------------------------------------------------------- any schedule

ROWS = st.lists(
    st.tuples(*[st.integers(-6, 6).map(lambda v: v / 2)] * 2), min_size=0, max_size=3
)
ROUND = st.fixed_dictionaries(
    {
        "calls": st.lists(st.lists(ROWS, max_size=4), min_size=1, max_size=4),
        "file": st.booleans(),
        "joiners": st.integers(0, 2),
    }
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    decay=st.sampled_from(DECAYS),
    far=st.sampled_from([0.0, 1000.0]),
    rounds=st.lists(ROUND, min_size=1, max_size=4),
)
def test_any_schedule_of_calls_merges_saves_and_loads(kind, decay, far, rounds):
    base, numbers, seen = None, [Fraction(0)] * 5, 0
    for one in rounds:
        # As many ranks as this round has; the last of them begin with nothing.
        states, models = [], []
        for i, calls in enumerate(one["calls"]):
            norm = make(kind, decay)
            model = Exact(Fraction(decay), kind == "VecNormV2")
            if base is not None and i < max(len(one["calls"]) - one["joiners"], 1):
                load(norm, base)
                model.load(numbers, seen)
            for rows in calls:
                rows = [(x + far, y - far) for x, y in rows]
                feed(norm, rows)
                model.feed(rows)
            states.append(state_of(norm))
            models.append(model)
        merged = merge_states(states, base)
        numbers, seen = joined(models)
        if not any(numbers):
            base = None
            continue
        base = through_a_file(merged) if one["file"] else merged
        after = make(kind, decay)
        load(after, base)
        agree(after, numbers, far)


# --------------------------------------------------------------------------- real ranks


def _syncs(rank, size, kind, decay):
    torch.manual_seed(0)
    norm, reports = make(kind, decay), []
    by_state, merged = make(kind, decay), None
    model = [Exact(Fraction(decay), kind == "VecNormV2") for _ in range(size)]
    for i in range(6):
        for r in range(size):
            for _ in range((r + i) % 4):  # ranks make other numbers of calls
                rows = [tuple(v) for v in torch.randn((r + i) % 3, 2).tolist()]
                model[r].feed(rows)
                if r == rank:
                    feed(norm, rows)
                    feed(by_state, rows)
        alone = [None] * size
        torch.distributed.all_gather_object(alone, state_of(by_state))
        merged = merge_states([s for s in alone if s], merged)
        load(by_state, merged)
        norm.sync_()
        numbers, seen = joined(model)
        for one in model:
            one.load(numbers, seen)
        agree(norm, numbers, 0)
        state = {
            name: leaf.clone()
            for name, leaf in state_of(norm).items()
            if not name.startswith(("loc", "var"))  # in the dtype of the values here
        }
        for name, leaf in state.items():
            assert torch.allclose(merged[name], leaf, 1e-12, 1e-12), name
        reports.append(state)
    return [{k: v.numpy().tobytes() for k, v in s.items()} for s in reports]


@pytest.mark.parametrize("kind", KINDS)
def test_sync_is_the_formula(kind):
    for size, decay in ((2, 0.9), (3, 1.0)):
        found = run(size, _syncs, kind, decay)
        assert all(one == found[0] for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", DECAYS)
def test_sync_is_the_formula_on_8_ranks(kind, decay):
    found = run(8, _syncs, kind, decay)
    assert all(one == found[0] for one in found)


def _resume(rank, size, kind, saved):
    norm = make(kind, 1.0)
    if not (saved is None or (size == 3 and rank == 2)):  # the last one joins
        load(norm, {k: torch.tensor(v) for k, v in saved.items()})
    for _ in range(2):
        feed(norm, [(1.0, 2.0)] * (rank + 1))
        norm.sync_()
        norm.sync_()  # nothing new
    return {k: v.tolist() for k, v in state_of(norm).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_counts_once_on_any_number_of_ranks(kind):
    saved, expected = None, 0
    for size in (2, 1, 3, 4):
        found = run(size, _resume, kind, saved)
        assert all(one == found[0] for one in found)
        saved, expected = found[0], expected + 2 * sum(range(size + 1))
        norm = make(kind, 1.0)
        load(norm, {k: torch.tensor(v) for k, v in saved.items()})
        assert read(norm)[2] == expected


def _apart(rank, size):
    norm = VecNorm(["a"], decay=0.9)
    feed(norm, [(1.0, 2.0)] * (rank + 1))
    load(norm, {k: v.clone() for k, v in state_of(norm).items()})  # each its own
    before = {k: v.clone() for k, v in state_of(norm).items()}
    with pytest.raises(RuntimeError, match=r"key 'a'.*went on from the same"):
        norm.sync_()
    assert all(torch.equal(v, before[k]) for k, v in state_of(norm).items())
    other = VecNorm(["a" if rank else "b"])
    with pytest.raises(RuntimeError, match=r"sync_\(\) of .* on all ranks"):
        other.sync_()
    shapes = RunningNorm(1 + rank)
    with pytest.raises(ValueError, match=r"one shape on all ranks.*\(1,\), \(2,\)"):
        shapes.sync_()
    empty = VecNorm(["a"])
    empty.sync_()
    assert empty._td is None
    if rank == 1:
        feed(empty, [(1.0, 2.0)] * 3)
    empty.sync_()
    return empty._td["a_count"].item()


def test_what_cannot_be_joined_is_said():
    assert run(2, _apart) == [3, 3]


def _masked(rank, size):
    norm = RunningNorm(1, decay=0.5)
    norm(torch.ones(4, 1))
    norm.sync_()
    assert norm.stats.count[0].item() == 4 * size
    # All are masked, or there are none: that is no call.
    norm(torch.ones(2, 1), mask=torch.zeros(2, dtype=torch.bool))
    norm(torch.ones(0, 1))
    norm(torch.ones(2, 1), mask=torch.tensor([rank == 0, False]))
    norm.sync_()
    first = norm.stats.count[0].item()
    t = VecNorm(["a", "r"], decay=0.5)
    td = TensorDict({"a": torch.ones(4, 1), "r": torch.ones(4, 1)}, [4])
    t(td.clone())
    t.sync_()
    for _ in range(2):  # by the short way too
        t(td.clone())
    t._reset(None, td.select("a"))  # no reward: it does not decay
    which = torch.tensor([True, rank == 0, False, False])
    t._reset(TensorDict({"_reset": which}, [4]), td.select("a"))
    t.sync_()
    return first, t._td["a_count"].item(), t._td["r_count"].item()


def test_calls_that_change_nothing_are_no_calls():
    first = 8 * 0.5 + 1  # of rank 1 nothing has decayed: k is the larger one
    a = 8 * 0.5**4 + 2 * (4 * 0.5**3 + 4 * 0.5**2 + 4 * 0.5) + 2 + 1
    r = 8 * 0.5**2 + 2 * (4 * 0.5 + 4)
    assert run(2, _masked) == [(first, a, r)] * 2


def test_statistics_that_others_update_are_not_guessed_about():
    norm = RunningNorm(1, decay=0.9)
    norm(torch.ones(3, 1))
    norm.load_state_dict(norm.state_dict())
    norm.stats.count[0] += 5  # as a copy of it, or torch's own, would
    with pytest.raises(RuntimeError, match="others update these statistics too"):
        norm.sync_()


# --------------------------------------------------------------------------- merge_states


def test_states_in_states_and_what_else_is_there():
    def env_state(n, steps):
        t = VecNorm(["a"])
        if n:
            feed(t, [(float(n), 1.0)] * n)
        other = {"steps": torch.tensor(steps), "name": "x"}
        return {"transforms.0._extra_state": t.get_extra_state(), "other": other}

    with pytest.warns(UserWarning, match="uninitialized"):
        states = [env_state(n, n) for n in (0, 2, 3)]
    merged = merge_states(states)
    assert merged["transforms.0._extra_state"]["a_count"].item() == 5
    assert merged["transforms.0._extra_state"]["a_sum"].tolist() == [13, 5]
    assert merged["other"] == states[0]["other"]
    merged["transforms.0._extra_state"]["a_sum"].zero_()  # copies
    assert states[1]["transforms.0._extra_state"]["a_sum"].tolist() == [4, 2]


def test_states_of_torchrls_own_class():
    theirs = [reference(["a"], decay=1.0) for _ in range(2)]
    for i, one in enumerate(theirs):
        feed(one, [(1.0, 2.0)] * (i + 2))
    first = merge_states([one.get_extra_state() for one in theirs])
    assert first["a_count"].item() == 5 and first["a_count"].dtype == torch.float32
    for one in theirs:
        one.set_extra_state({k: v.clone() for k, v in first.items()})
        feed(one, [(1.0, 2.0)])
    again = merge_states([one.get_extra_state() for one in theirs], first)
    assert again["a_count"].item() == 7


def test_states_that_make_no_sense():
    def state(n, size=2):
        norm = RunningNorm(size)
        norm(torch.ones(n, size))
        return norm.state_dict()

    with pytest.raises(ValueError, match="at least one state"):
        merge_states([])
    with pytest.raises(ValueError, match="expected state_dicts"):
        merge_states([state(1), 3])
    with pytest.raises(ValueError, match=r"'stats.sum': expected shape \(2,\) in all"):
        merge_states([state(1), state(1, 3)])
    with pytest.raises(ValueError, match=r"'stats.kept', as merge_states gives"):
        merge_states([state(7), state(3)], state(5))
    base = merge_states([state(5)])
    less = state(3) | {"stats.kept": torch.ones(())}
    with pytest.raises(
        ValueError, match=r"'stats.count': .*went on from base.* 5, got"
    ):
        merge_states([base, less], base)
    bad = state(1)
    bad["stats.count"] = -bad["stats.count"]
    with pytest.raises(ValueError, match=r"'stats.count'.*not negative"):
        merge_states([state(1), bad])


@pytest.mark.parametrize("kind", ["VecNorm", "VecNormV2", "RunningNorm"])
def test_what_is_noted_of_a_call_takes_no_operators(kind):
    """A run that goes on from a checkpoint is as fast as one that begins."""

    def operators(norm) -> list[str]:
        for _ in range(3):
            feed(norm, [(1.0, 2.0), (3.0, 5.0)])
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profile:
            feed(norm, [(1.0, 2.0), (3.0, 5.0)])
        return sorted(event.name for event in profile.events())

    begins, goes_on = make(kind, 0.9), make(kind, 0.9)
    feed(begins, [(1.0, 2.0), (4.0, 6.0)])
    load(goes_on, state_of(begins))
    assert operators(goes_on) == operators(begins)


def test_a_pickle_from_before_goes_on():
    norm = make("VecNorm", 0.9)
    begins = make("VecNorm", 0.9)
    feed(begins, [(1.0, 2.0), (4.0, 6.0)])
    load(norm, state_of(begins))
    for since in norm._statistics.store.since.values():
        del since.features
    again = pickle.loads(pickle.dumps(norm))
    for one in (again, begins):
        feed(one, [(3.0, 5.0)])
    assert read(again) == read(begins)
