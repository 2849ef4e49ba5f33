# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Any sequence of what one can do with transforms, beside a model in fractions.

Several transforms live at once: copies, those that share statistics, frozen ones that
follow. After every step all statistics of all of them are compared, to the bit where
float64 can hold them. Sections 1, 2 and 5 of the contract.

More examples than in the suite, each time others::

    VECNORM_MACHINE_EXAMPLES=5000 make test TESTS=tests/test_machine.py
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from common import FIELDS, leaf_name
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from samples import batch_strided, padded, strided, transposed
from tensordict import LazyStackedTensorDict, TensorDict
from torchrl.data import Composite, Unbounded

from torchrl_vecnorm import Moments, VecNorm
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.statistics import sharing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EXAMPLES = int(os.environ.get("VECNORM_MACHINE_EXAMPLES", 0))
ALIVE = 5  # transforms at once

FEATURES = {"observation": (2,), ("agents", "reward"): (1,)}
KEYS = list(FEATURES)
# The mean of what counts in most batches, so that running means are short numbers.
MEANS = {"observation": (48, -3), ("agents", "reward"): (20,)}
ALL_FIELDS = Moments._fields
OUT_KEYS = ["normalized", ("agents", "normalized")]
SEP = VecNorm.SEP

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.int64, torch.bool)
DECAYS = (1, 0.5, 0.75)
EPS = (0.25, 4.0)


# --------------------------------------------------------------------------- the model


def fits(value: Fraction, digits: int) -> bool:
    """Whether a float with that many binary digits is the value."""
    numerator, denominator = abs(value.numerator), value.denominator
    if denominator & (denominator - 1):
        return False
    trailing = (numerator & -numerator).bit_length() - 1
    return numerator == 0 or (numerator >> trailing).bit_length() <= digits


class Exact:
    """The equations of section 1 of the contract for one key.

    Args:
        features: how many.
        counter: whether missing values are counted; if not they count as running mean.
        digits: of the floats of the state.

    As long as everything fits in the floats of the state, it is compared to the bit.
    """

    def __init__(self, features: int, counter: bool = True, digits: int = 53) -> None:
        self.counter, self.digits = counter, digits
        self.count = Fraction(0)
        self.sum, self.ssq, self.missing = ([Fraction(0)] * features for _ in range(3))
        self.left_out = [0] * features
        self.sums_rounded = self.counts_rounded = False

    def used(self, feature: int) -> Fraction:
        return self.count - self.missing[feature]

    def update(self, rows: list, decay: float, around_mean: bool = True) -> None:
        """Takes the samples that count; a value is a Fraction, or None if not finite.

        Args:
            rows: ``[samples][features]``.
            decay: of the old moments.
            around_mean: the batch is summed around the running mean, which a float
                holds only if it is a short number.
        """
        if not rows:
            return
        keep = Fraction(decay)
        for f, column in enumerate(zip(*rows, strict=True)):
            values = [v for v in column if v is not None]
            missing = len(column) - len(values)
            if around_mean and self.used(f):
                self.sums_rounded |= not self.is_short(self.sum[f] / self.used(f))
            if not self.counter:
                if missing and (self.count or values):
                    at = (
                        self.sum[f] / self.count
                        if self.count
                        else sum(values) / len(values)
                    )
                    self.sums_rounded |= not self.is_short(at)
                    values += [at] * missing
                missing = 0
            self.sum[f] = keep * self.sum[f] + sum(values)
            self.ssq[f] = keep * self.ssq[f] + sum(v * v for v in values)
            self.missing[f] = keep * self.missing[f] + missing
            self.left_out[f] += missing
        self.count = keep * self.count + len(rows)
        self._round()

    @staticmethod
    def is_short(value: Fraction) -> bool:
        return (2 * value).denominator == 1 and abs(value) <= 64

    def _round(self) -> None:
        self.sums_rounded |= not all(
            fits(v, self.digits) for v in (*self.sum, *self.ssq)
        )
        self.counts_rounded |= not all(
            fits(v, self.digits) for v in (self.count, *self.missing)
        )

    def load(self, other: Exact) -> None:
        counter, digits = self.counter, self.digits
        self.__dict__.update(copy.deepcopy(other.__dict__))
        self.counter, self.digits = counter, digits
        if other.counter and not counter:
            # As many values with the same loc and scale, none missing.
            for f in range(len(self.missing)):
                used = self.used(f)
                if used:
                    weight = self.count / used
                    self.sums_rounded |= not fits(weight, 53)
                    self.sum[f] *= weight
                    self.ssq[f] *= weight
                else:
                    self.ssq[f] = self.count
            self.missing = [Fraction(0)] * len(self.missing)
            self.left_out = [0] * len(self.left_out)
        self._round()

    def without_counter(self) -> Exact:
        """What a state_dict says that has lost its counter: nothing is missing."""
        other = copy.deepcopy(self)
        other.counter = False
        other.missing = [Fraction(0)] * len(self.missing)
        other.left_out = [0] * len(self.left_out)
        return other

    @property
    def slack(self) -> float:
        """The relative error that sums may have; float32 values are summed in float."""
        return 2.0**-18 if self.sums_rounded else 0.0

    @property
    def count_slack(self) -> float:
        return 2.0**-20 if self.counts_rounded else 0.0

    def statistic(self, f: int, eps: float) -> tuple[float, float, float, float]:
        """loc, scale, and the errors that float64 and ``slack`` allow them."""
        used = self.used(f)
        if not used:
            return 0.0, 1.0, 0.0, 0.0
        loc = self.sum[f] / used
        square = self.ssq[f] / used
        scale = max(math.sqrt(square - loc * loc), eps)
        error = self.slack + self.count_slack + 2.0**-50
        loc_error = 2 * error * math.sqrt(square)
        return float(loc), scale, loc_error, 4 * error * float(square) / scale


def assert_close(actual: float, expected: float, error: float, what) -> None:
    if not math.isfinite(expected):
        same = math.isnan(actual) if math.isnan(expected) else actual == expected
        assert same, f"{what}: expected {expected}, got {actual}"
    else:
        assert abs(actual - expected) <= error, (
            f"{what}: expected {expected} ± {error}, got {actual}"
        )


# -------------------------------------------------------------------------- the values


@dataclass
class Values:
    """The values of one key: small deviations from MEANS, in some layout."""

    dtype: torch.dtype
    layout: str
    deviations: list[int]
    holes: dict[int, float]  # values that are not finite, by position
    balanced: bool

    def tensor(self, key, samples, counts: torch.Tensor) -> torch.Tensor:
        features = FEATURES[key]
        n, means = counts.numel(), torch.tensor(MEANS[key], dtype=torch.float64)
        if self.layout == "expanded":
            x = means + self.deviations[0] * (not self.balanced)
            return x.to(self.dtype).expand(*samples, *features)
        size = n * means.numel()
        d = torch.tensor(self.deviations[:size], dtype=torch.float64)
        if self.dtype.is_floating_point:
            d = d / 2
            for at, hole in self.holes.items():
                if at < size:
                    d[at] = hole
        d = d.reshape(n, means.numel())
        if self.balanced:
            # What counts of a feature has the mean MEANS: the last value sees to it.
            for column in d.T:
                used = (counts.reshape(-1) & column.isfinite()).nonzero().flatten()
                if len(used):
                    column[used[-1]] = 0
                    column[used[-1]] = -column[used].sum()
        x = (means + d if self.dtype is not torch.bool else d > 0).to(self.dtype)
        x = x.reshape(*samples, *features)
        if self.layout == "transposed" and samples:
            return transposed(x)
        if self.layout == "batch_strided" and samples:
            return batch_strided(x)
        return {"strided": strided, "padded": padded}.get(self.layout, lambda x: x)(x)


@dataclass
class Batch:
    """What one call is given, for transforms with ``shapes`` and without."""

    samples: tuple[int, ...]
    td_dims: int  # of the tensordict, where ``shapes`` allow it to have fewer
    values: dict
    masked: str  # "", "root" or "agents": where the mask is
    mask: list[bool]
    lazy: bool

    def dims(self, has_shapes: bool) -> int:
        return min(self.td_dims, len(self.samples)) if has_shapes else len(self.samples)

    def counts(self, key) -> torch.Tensor:
        """Which samples count where there is a mask: ``[*samples]``."""
        if not self.masked or (self.masked == "agents" and key == "observation"):
            return torch.ones(self.samples, dtype=torch.bool)
        return self.mask_of(self.samples)

    def mask_of(self, batch_size: tuple[int, ...]) -> torch.Tensor:
        """Samples beyond the batch of the smallest tensordict share its mask."""
        outer = batch_size[: self.td_dims]
        mask = torch.tensor(self.mask[: math.prod(outer)], dtype=torch.bool)
        mask = mask.reshape(outer + (1,) * (len(batch_size) - len(outer)))
        return mask.expand(batch_size)

    def build(self, has_shapes: bool, use_mask: bool) -> TensorDict:
        everything = torch.ones(self.samples, dtype=torch.bool)
        td = TensorDict(batch_size=self.samples[: self.dims(has_shapes)])
        for key, values in self.values.items():
            counts = self.counts(key) if use_mask else everything
            td[key] = values.tensor(key, self.samples, counts)
        if self.lazy and td.batch_dims and td.batch_size[0]:
            return LazyStackedTensorDict.lazy_stack(list(td.unbind(0)))
        return td

    def masks(self, has_shapes: bool, name: str) -> TensorDict:
        dims = self.dims(has_shapes)
        td = TensorDict(batch_size=self.samples[:dims])
        if self.masked:
            mask = self.mask_of(self.samples[:dims])
            path = (name,) if self.masked == "root" else ("agents", name)
            td[path] = mask[..., None] if self.lazy else mask
        return td


SAMPLES = ((), (1,), (3,), (4,), (2, 2), (3, 2), (0,), (2, 0))
LARGEST = 6  # samples


@st.composite
def values(draw, size: int) -> Values:
    # Mostly float32, so that the short way of a repeated call is taken too.
    dtype = draw(st.sampled_from((torch.float32,) * 5 + FLOATS + INTEGERS))
    return Values(
        dtype,
        draw(
            st.sampled_from(
                (
                    "contiguous",
                    "contiguous",
                    "transposed",
                    "strided",
                    "padded",
                    "batch_strided",
                    "expanded",
                )
            )
        ),
        draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size)),
        draw(
            st.dictionaries(
                st.integers(0, size - 1),
                st.sampled_from((math.nan, math.inf, -math.inf)),
                max_size=2,
            )
        ),
        draw(st.integers(0, 9)) < 9,
    )


@st.composite
def batches(draw) -> Batch:
    return Batch(
        draw(st.sampled_from(SAMPLES)),
        draw(st.integers(0, 2)),
        {key: draw(values(LARGEST * math.prod(FEATURES[key]))) for key in KEYS},
        draw(st.sampled_from(("", "root", "root", "agents"))),
        draw(st.lists(st.booleans(), min_size=LARGEST, max_size=LARGEST)),
        draw(st.integers(0, 5)) == 5,
    )


def rows_of(x: torch.Tensor, features, counts=None) -> list:
    """The samples that count, as the model takes them."""
    x = x.reshape(-1, math.prod(features))
    if counts is not None:
        x = x[counts.reshape(-1)]
    return [
        [Fraction(v) if math.isfinite(v) else None for v in row] for row in x.tolist()
    ]


# ---------------------------------------------------------------------- the transforms


@dataclass(eq=False)
class Living:
    """A transform, and what is known of it."""

    transform: VecNorm
    # Shared by all that share a tensordict; an Exact by all that share its tensors.
    stats: dict
    has_shapes: bool
    # "": private; "tensordict" and "memmap": as built; "tensors": as EnvCreator does it
    shared: str = ""
    dtypes: dict = field(default_factory=dict)
    training: bool = True
    frozen: bool = False

    @property
    def updating(self) -> bool:
        return self.training and not self.frozen

    def beside(self, transform: VecNorm, stats: dict, **changes) -> Living:
        known = dict(self.__dict__, transform=transform, stats=stats)
        return Living(**known | {"dtypes": dict(self.dtypes)} | changes)


def live(t: VecNorm, key) -> Moments | None:
    """The live statistics of a key. Reading them through the API undoes what calls remember."""
    if t._td is None or t._td.get(leaf_name(key, "sum"), None) is None:
        return None
    return Moments(*(t._td.get(leaf_name(key, f), None) for f in ALL_FIELDS))


def everything(living: Living) -> tuple:
    """All that a call that fails must not change."""
    t = living.transform
    leaves = {}
    if t._td is not None:
        for name, value in t._td.items(True, True):
            if name != sharing.CONTROL:
                leaves[name] = value.detach().numpy().tobytes(), value.data_ptr()
    return leaves, t._td is None, t.training, t.frozen, dict(t._statistics.dtypes)


def entry_name(key, name: str) -> str:
    path = leaf_name(key, name)
    return path if isinstance(path, str) else SEP.join(path)


# The specs of an environment with both keys.
ENV = SimpleNamespace(
    batch_size=torch.Size([]),
    full_observation_spec=Composite(observation=Unbounded(2)),
    full_reward_spec=Composite(agents=Composite(reward=Unbounded(1))),
)


def by_hand(dtype: torch.dtype) -> TensorDict:
    """The reference's layout."""
    td = TensorDict(batch_size=[])
    for key, features in FEATURES.items():
        for name in FIELDS:
            shape = (1,) if name == "count" else features
            td[leaf_name(key, name)] = torch.zeros(shape, dtype=dtype)
    return td.share_memory_()


@dataclass
class Checkpoint:
    file: bytes
    stats: dict

    def load(self) -> dict:
        return torch.load(io.BytesIO(self.file), weights_only=True)["_extra_state"]


# --------------------------------------------------------------------------- the rules

arguments = st.fixed_dictionaries(
    {"decay": st.sampled_from(DECAYS), "eps": st.sampled_from(EPS)}
)
positions = st.integers(0, len(KEYS) - 1)


class Machine(RuleBasedStateMachine):
    transforms = Bundle("transforms")
    checkpoints = Bundle("checkpoints")

    def __init__(self) -> None:
        super().__init__()
        self.living: list[Living] = []
        self.folders: list[tempfile.TemporaryDirectory] = []

    def teardown(self) -> None:
        self.living.clear()
        for folder in self.folders:
            folder.cleanup()

    def born(self, living: Living) -> Living:
        self.living.append(living)
        return living

    def has_room(self) -> bool:
        return len(self.living) < ALIVE

    # ---------------------------------------------------------------- making and ending

    @initialize(target=transforms, kwargs=arguments, has_shapes=st.booleans())
    def first(self, kwargs, has_shapes):
        return self.make(kwargs, has_shapes, False)

    def make(self, kwargs, has_shapes, out_keys, **more) -> Living:
        kwargs = kwargs | more
        if has_shapes:
            kwargs["shapes"] = [torch.Size(s) for s in FEATURES.values()]
        if out_keys:
            kwargs["out_keys"] = list(OUT_KEYS)
        return self.born(Living(VecNorm(KEYS, **kwargs), {}, has_shapes))

    @precondition(has_room)
    @rule(
        target=transforms,
        kwargs=arguments,
        has_shapes=st.booleans(),
        out_keys=st.booleans(),
    )
    def fresh(self, kwargs, has_shapes, out_keys):
        return self.make(kwargs, has_shapes, out_keys)

    @precondition(has_room)
    @rule(
        target=transforms,
        kwargs=arguments,
        has_shapes=st.booleans(),
        kind=st.sampled_from(("shared", "memmap", torch.float64, torch.float32)),
    )
    def shared(self, kwargs, has_shapes, kind):
        if kind == "shared":
            td = VecNorm.build_td_for_shared_vecnorm(ENV, ["next"])
        elif kind == "memmap":
            self.folders.append(tempfile.TemporaryDirectory())
            folder = os.path.join(self.folders[-1].name, "statistics")
            td = VecNorm.build_td_for_shared_vecnorm(ENV, memmap=folder)
        else:
            td = by_hand(kind)
        living = self.make(kwargs, has_shapes, False, shared_td=td)
        living.shared = "memmap" if kind == "memmap" else "tensordict"
        for key, features in FEATURES.items():
            living.stats[key] = Exact(
                math.prod(features),
                counter=isinstance(kind, str),
                digits=24 if kind is torch.float32 else 53,
            )
        return living

    @precondition(has_room)
    @rule(target=transforms, source=transforms, kwargs=arguments)
    def share_the_tensordict(self, source, kwargs):
        """Another transform for the same shared tensordict, or its files."""
        td = source.transform._td
        if source.shared == "memmap":
            # A tensordict that was loaded does not tell where from, its tensors do.
            file = td.get(sharing.CONTROL).filename
            td = TensorDict.load_memmap(os.path.dirname(file))
        elif source.shared != "tensordict":
            td = None
        more = {} if td is None else {"shared_td": td, "lock": source.transform.lock}
        living = self.make(kwargs, source.has_shapes, False, **more)
        if td is not None:
            living.stats, living.shared = source.stats, source.shared
        return living

    @precondition(has_room)
    @rule(target=transforms, source=transforms, kwargs=arguments)
    def share_as_env_creator(self, source, kwargs):
        """The state's tensors go into shared memory, and with the lock to another one."""
        more = {}
        state = None
        if source.stats and source.shared != "memmap":
            state = source.transform.get_extra_state()
            for leaf in state.values():
                leaf.share_memory_()
            more = {"lock": source.transform.lock}
            source.shared = source.shared or "tensors"
        living = self.make(kwargs, source.has_shapes, False, **more)
        if state is not None:
            living.transform.set_extra_state(state)
            living.stats, living.shared = dict(source.stats), "tensors"
        return living

    @precondition(has_room)
    @rule(target=transforms, source=transforms)
    def clone(self, source):
        # Without statistics there is nothing yet to share.
        stats = source.stats if source.stats else {}
        clone = source.beside(source.transform.clone(), stats)
        return self.born(clone)

    @precondition(has_room)
    @rule(target=transforms, source=transforms)
    def frozen_copy(self, source):
        if not source.stats:
            with pytest.raises(RuntimeError, match="initialized"):
                source.transform.frozen_copy()
            return self.make({"decay": 1, "eps": EPS[0]}, source.has_shapes, True)
        frozen = source.transform.frozen_copy()
        return self.born(source.beside(frozen, source.stats, frozen=True))

    @precondition(has_room)
    @rule(
        target=transforms,
        source=transforms,
        how=st.sampled_from(("deepcopy", "pickle", "torch.save")),
    )
    def copy(self, source, how):
        t = source.transform
        if source.shared == "memmap":
            how = "deepcopy"  # others copy the names of the files
        if how == "deepcopy":
            other = copy.deepcopy(t)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(t))
        else:
            file = io.BytesIO()
            torch.save(t, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert (other.decay, other.eps) == (t.decay, t.eps)
        assert (other.in_keys, other.out_keys) == (t.in_keys, t.out_keys)
        for key in source.stats:
            for a, b in zip(live(t, key), live(other, key), strict=True):
                assert (a is None) == (b is None)
                assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
        stats = copy.deepcopy(source.stats)
        return self.born(source.beside(other, stats, shared=""))

    @rule(living=consumes(transforms))
    def forget(self, living):
        self.living.remove(living)

    # ------------------------------------------------------------------------ switching

    @rule(living=transforms, frozen=st.booleans())
    def freeze(self, living, frozen):
        living.frozen = frozen
        if frozen:
            living.transform.freeze()
        else:
            living.transform.unfreeze()

    @rule(living=transforms, training=st.booleans())
    def train(self, living, training):
        living.training = training
        if training:
            living.transform.train()
        else:
            living.transform.eval()

    @rule(
        living=transforms,
        where=st.sampled_from(("cpu", torch.float16, torch.float64, "half", "double")),
    )
    def move(self, living, where):
        if where in ("half", "double"):
            getattr(living.transform, where)()
        else:
            assert living.transform.to(where) is living.transform

    # ---------------------------------------------------------------------------- calls

    @rule(living=transforms, batch=batches(), times=st.integers(1, 3))
    def call(self, living, batch, times):
        for _ in range(times):
            td = batch.build(living.has_shapes, use_mask=False)
            self.feed(living, td, KEYS, {}, living.transform)

    @rule(living=transforms, batch=batches(), name=st.sampled_from(("step", "reset")))
    def partial(self, living, batch, name):
        if name == "step" and batch.masked:
            batch.masked = "root"  # the only one that a step has
        td = batch.build(living.has_shapes, use_mask=True)
        masks = batch.masks(living.has_shapes, f"_{name}")
        counts = {key: batch.counts(key) for key in KEYS}
        run = getattr(living.transform, f"_{name}")
        self.feed(living, td, KEYS, counts, lambda td: run(masks, td))

    @rule(living=transforms, batch=batches(), missing=st.sets(positions, min_size=1))
    def reset_without_keys(self, living, batch, missing):
        td = batch.build(living.has_shapes, use_mask=True)
        masks = batch.masks(living.has_shapes, "_reset")
        for i in missing:
            del td[KEYS[i]]
        keys = [key for i, key in enumerate(KEYS) if i not in missing]
        counts = {key: batch.counts(key) for key in keys}
        reset = living.transform._reset
        self.feed(living, td, keys, counts, lambda td: reset(masks, td))

    def feed(self, living: Living, td, keys, counts: dict, run) -> None:
        t = living.transform
        given = {key: td[key].clone() for key in keys}
        names = set(td.keys(True, True))
        assert run(td) is td
        out_keys = dict(zip(t.in_keys, t.out_keys, strict=True))
        assert set(td.keys(True, True)) == names | {out_keys[key] for key in keys}
        for key, x in given.items():
            features = FEATURES[key]
            stats = living.stats.get(key)
            if living.updating and x.numel():
                if stats is None:
                    stats = living.stats[key] = Exact(math.prod(features))
                stats.update(rows_of(x, features, counts.get(key)), t.decay)
            y = td[out_keys[key]]
            dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
            assert (y.dtype, y.shape) == (dtype, x.shape)
            living.dtypes[key] = dtype
            self.check_normalized(x, y, stats or Exact(math.prod(features)), t.eps)
            if out_keys[key] != key:
                assert torch.equal(td[key].nan_to_num(7), x.nan_to_num(7))

    def check_normalized(self, x, y, stats: Exact, eps: float) -> None:
        n = len(stats.sum)
        resolution = torch.finfo(y.dtype).eps
        statistics = [stats.statistic(f, eps) for f in range(n)]
        pairs = zip(x.reshape(-1, n).tolist(), y.reshape(-1, n).tolist(), strict=True)
        for x_row, y_row in pairs:
            for v, w, (loc, scale, loc_error, scale_error) in zip(
                x_row, y_row, statistics, strict=True
            ):
                expected = (v - loc) / scale
                size = abs(expected)
                error = resolution * (4 * size + (abs(v) + abs(loc)) / scale)
                error += loc_error / scale + size * scale_error / scale
                assert_close(w, expected, error, f"y of {v}")

    # ------------------------------------------------------------------- calls that fail

    @rule(
        living=transforms,
        batch=batches(),
        position=positions,
        kind=st.sampled_from(
            (
                *("shape", "dimensions", "missing", "complex", "sparse"),
                *("locked", "nested locked"),
            )
        ),
        how=st.sampled_from(("call", "step", "reset")),
    )
    def bad_call(self, living, batch, position, kind, how):
        key = KEYS[position]
        batch.lazy = False
        td = batch.build(living.has_shapes, use_mask=how != "call")
        if kind in ("shape", "dimensions"):
            if not living.has_shapes and key not in living.stats:
                kind = "complex"  # any shape is right
            elif living.has_shapes:
                kind = "shape"  # more dimensions are more samples
        batch.masked = "root" if batch.masked else ""
        if kind == "missing" and how == "reset":
            how = "step"
        error, match = TypeError, ["complex64"]
        if kind == "locked":
            error, match = RuntimeError, ["locked"]
            td.lock_()
        elif kind == "nested locked":
            # Where the last value is written.
            t = living.transform
            out_key = t.out_keys[t.in_keys.index(KEYS[1])]
            error, match = RuntimeError, ["locked", repr(out_key)]
            td["agents"].lock_()
        elif kind == "missing":
            error, match = KeyError, [str(KEYS[1 - position])]
            del td[key]
        elif kind == "complex":
            td[key] = td[key].to(torch.complex64)
        elif kind == "sparse":
            error, match = TypeError, ["torch.sparse_coo"]
            td[key] = td[key].contiguous().to_sparse()
        else:
            wrong = td[key].unsqueeze(-1)
            if kind == "shape":
                wrong = torch.cat([td[key], td[key][..., :1]], -1)
            got = wrong.shape[len(batch.samples) :]
            error, match = ValueError, [str(FEATURES[key]), str(tuple(got))]
            td[key] = wrong
        if "locked" not in kind:
            match.append(repr(key))
        self.refuse(living, td, error, match, how, batch)

    def refuse(self, living, td, error, match, how, batch) -> None:
        t = living.transform
        run = t
        if how != "call":
            masks = batch.masks(living.has_shapes, f"_{how}")

            def run(td):
                return getattr(t, f"_{how}")(masks, td)

        before = [everything(one) for one in self.living]
        entries = dict(td.items(True, True))
        with pytest.raises(error) as raised:
            run(td)
        # Not a subclass: a KeyError is no ValueError, and neither hides an accident.
        assert raised.type is error
        message = str(raised.value.args[0])
        for text in match:
            assert text in message, f"{text!r} is not in {message!r}"
        after = dict(td.items(True, True))
        assert after.keys() == entries.keys()
        assert all(after[name] is value for name, value in entries.items())
        assert [everything(one) for one in self.living] == before
        assert t.lock.acquire(block=False)
        t.lock.release()

    # ---------------------------------------------------------------------- checkpoints

    @rule(
        target=checkpoints,
        living=transforms,
        how=st.sampled_from(("state_dict", "consistent", "without counter")),
    )
    def save(self, living, how):
        t = living.transform
        saved = t.state_dict()
        if how == "consistent" or living.shared == "memmap":
            # The live tensors of a memory map are pickled as the names of its files.
            saved["_extra_state"] = t.consistent_state_dict()
        if saved["_extra_state"] is None:
            assert not living.stats
        stats = copy.deepcopy(living.stats)
        if how == "without counter" and living.stats:
            # As the reference saves it.
            state = saved["_extra_state"]
            for name in [name for name in state if name.endswith("nonfinite")]:
                del state[name]
            stats = {key: one.without_counter() for key, one in stats.items()}
        file = io.BytesIO()
        torch.save(saved, file)
        checkpoint = Checkpoint(file.getvalue(), stats)
        loaded = checkpoint.load()
        if saved["_extra_state"] is not None:
            assert type(loaded) is dict
            assert loaded.keys() == saved["_extra_state"].keys()
            for name, value in saved["_extra_state"].items():
                assert loaded[name].dtype == value.dtype
                assert torch.equal(loaded[name], value)
        return checkpoint

    @rule(living=transforms, checkpoint=checkpoints)
    def load(self, living, checkpoint):
        t = living.transform
        state = checkpoint.load()
        lacking = [key for key in living.stats if key not in checkpoint.stats]
        if lacking:
            self.refuse_to_load(
                living, state, KeyError, "" if state is None else lacking
            )
            return
        t.load_state_dict({"_extra_state": state})
        if not checkpoint.stats:
            return
        if not living.stats:
            living.stats = {}
        for key, stats in checkpoint.stats.items():
            if key not in living.stats:
                living.stats[key] = Exact(math.prod(FEATURES[key]))
            living.stats[key].load(stats)
            if stats.counter and living.stats[key].counter and not stats.sums_rounded:
                for name, leaf in zip(ALL_FIELDS, live(t, key), strict=True):
                    if leaf.dtype == torch.float64:
                        assert torch.equal(leaf, state[entry_name(key, name)])

    def refuse_to_load(self, living, state, error, names) -> None:
        before = [everything(one) for one in self.living]
        with pytest.raises(error) as raised:
            living.transform.set_extra_state(state)
        for name in names:
            last = name if isinstance(name, str) else name[-1]
            assert last in str(raised.value)
        assert [everything(one) for one in self.living] == before

    @rule(
        living=transforms,
        checkpoint=checkpoints,
        position=positions,
        name=st.sampled_from(ALL_FIELDS),
        how=st.sampled_from(
            ("missing", "shape", "dimensions", "negative", "nan", "none")
        ),
    )
    def load_a_broken_one(self, living, checkpoint, position, name, how):
        state = checkpoint.load()
        if how == "none" or not state:
            if living.stats:
                self.refuse_to_load(living, None, KeyError, [])
            return
        key = KEYS[position] if KEYS[position] in checkpoint.stats else KEYS[0]
        if key not in checkpoint.stats:
            key = KEYS[1]
        if name in ("nonfinite", "central") and (
            how == "missing" or not checkpoint.stats[key].counter
        ):
            name = "count"
        if how in ("negative", "nan") and name in ("sum", "ssq"):
            name = "count"
        entry = entry_name(key, name)
        error = ValueError
        if how == "missing":
            error = KeyError
            del state[entry]
        elif how == "shape":
            state[entry] = torch.ones(7, dtype=torch.float64)
        elif how == "dimensions":
            state[entry] = state[entry].unsqueeze(0)
        else:
            state[entry].view(-1)[-1] = {"negative": -1, "nan": math.nan}[how]
        # Where nothing else is known, a sum and its ssq do not tell which one is wrong.
        known = living.has_shapes or key in living.stats
        names = [entry] if known or name != "sum" else []
        self.refuse_to_load(living, state, error, names)

    # ----------------------------------------------------------------------- the moments

    @rule(living=transforms, batch=batches())
    def merge(self, living, batch):
        """Moments of a batch, merged into the statistics."""
        t = living.transform
        td = batch.build(has_shapes=False, use_mask=True)
        keys = list(living.stats)
        if not keys:
            return
        x = [td[key] for key in keys]
        masks = [batch.counts(key) for key in keys] if batch.masked else None
        F.merge_(
            [live(t, key) for key in keys], F.moments(x, 1, mask=masks), decay=t.decay
        )
        for key in keys:
            rows = rows_of(td[key], FEATURES[key], batch.counts(key))
            living.stats[key].update(rows, t.decay, around_mean=False)

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def flags(self):
        for one in self.living:
            assert one.transform.training == one.training
            assert one.transform.frozen == one.frozen

    @invariant()
    def statistics(self):
        for one in self.living:
            t = one.transform
            loc, scale, nonfinite = t.loc, t.scale, t.nonfinite
            seen = set(one.stats)
            assert set(loc.keys(True, True)) == set(scale.keys(True, True)) == seen
            counted = {key for key, stats in one.stats.items() if stats.counter}
            assert set(nonfinite.keys(True, True)) == counted
            for key in KEYS:
                moments = live(t, key)
                assert (moments is None) == (key not in seen)
                if moments is None:
                    continue
                stats = one.stats[key]
                self.check_moments(key, moments, stats)
                dtype = one.dtypes.get(key, torch.get_default_dtype())
                assert loc[key].dtype == scale[key].dtype == dtype
                resolution = torch.finfo(dtype).eps
                pairs = zip(loc[key].tolist(), scale[key].tolist(), strict=True)
                for f, (a, b) in enumerate(pairs):
                    mean, std, error, std_error = stats.statistic(f, t.eps)
                    assert_close(a, mean, error + resolution * abs(mean), "loc")
                    assert_close(b, std, std_error + resolution * std, "scale")
                if stats.counter:
                    assert nonfinite[key].dtype == torch.int64
                    assert nonfinite[key].tolist() == stats.left_out

    def check_moments(self, key, moments: Moments, stats: Exact) -> None:
        dtype = torch.float64 if stats.digits == 53 else torch.float32
        assert moments.sum.dtype == moments.ssq.dtype == moments.count.dtype == dtype
        slack, count_slack = stats.slack, stats.count_slack
        count = moments.count.item()
        expected = float(stats.count)
        assert_close(count, expected, count_slack * expected, (key, "count"))
        assert (moments.nonfinite is not None) == stats.counter
        missing = [0.0] * len(stats.sum)
        if stats.counter:
            missing, left_out = moments.nonfinite.reshape(2, -1).tolist()
            assert left_out == stats.left_out
        for f, (s, q, m) in enumerate(
            zip(moments.sum.tolist(), moments.ssq.tolist(), missing, strict=True)
        ):
            total, square, used = stats.sum[f], stats.ssq[f], stats.used(f)
            assert_close(
                s, float(total), slack * math.sqrt(square * used), (key, "sum")
            )
            assert_close(q, float(square), slack * float(square), (key, "ssq"))
            expected = float(stats.missing[f])
            assert_close(m, expected, count_slack * expected, (key, "missing"))
            assert q * (count - m) * (1 + 4 * (slack + count_slack)) >= s * s


class TestMachine(Machine.TestCase):
    settings = settings(
        max_examples=EXAMPLES or 60,
        stateful_step_count=25,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
