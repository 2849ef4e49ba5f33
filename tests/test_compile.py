# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""torch.compile through a whole call of the transform."""

import pytest
import torch
from samples import NUMBERS_ARE_INPUTS
from tensordict import TensorDict
from test_graphs import SLOW_INDUCTOR, Counted
from torch._dynamo.exc import Unsupported

from torchrl_vecnorm import VecNorm

KEYS = ["observation", "reward", ("agents", "observation")]


@pytest.fixture(autouse=True, params=["aot_eager", "inductor"])
def backend(request):
    torch._dynamo.reset()
    return request.param


def batch(n=5):
    return TensorDict(
        {
            "observation": torch.randn(n, 3),
            "reward": torch.randn(n, 1),
            "agents": {"observation": torch.randn(n, 2, 4)},
        },
        [n],
    )


def assert_same_call(eager, compiled, td, *args):
    """Both calls give the same entries, the first one through self._call."""
    a, b = td.clone(), td.clone()
    eager(*args, a)
    compiled(*args, b)
    for key in a.keys(True, True):
        torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-6)


def assert_same_state(a: VecNorm, b: VecNorm):
    for key in a._td.keys(True, True):
        torch.testing.assert_close(a._td[key], b._td[key], rtol=1e-12, atol=1e-12)


@SLOW_INDUCTOR
def test_call(backend):
    eager, other = VecNorm(KEYS, decay=0.9), VecNorm(KEYS, decay=0.9)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    for n in (5, 5, 7, 11):  # from nothing, known, and with other batch sizes
        assert_same_call(eager, compiled, batch(n))
        assert_same_state(eager, other)
    for t in (eager, other):
        t.freeze()
    assert_same_call(eager, compiled, batch())
    for t in (eager, other):
        t.unfreeze().eval()
    assert_same_call(eager, compiled, batch())
    assert_same_state(eager, other)


def test_nothing_seen(backend):
    frozen = VecNorm(KEYS).freeze()
    td = batch()
    want = td.clone()
    torch.compile(frozen, fullgraph=True, backend=backend)(td)
    assert (td == want).all()


def test_reset(backend):
    eager, other = VecNorm(KEYS), VecNorm(KEYS)
    compiled = torch.compile(other._reset, fullgraph=True, backend=backend)
    masks = TensorDict({"_reset": torch.tensor([[True], [False], [True]])}, [3])
    for _ in range(2):
        td = batch(3).exclude("reward")
        assert_same_call(eager._reset, compiled, td, masks)
        assert_same_state(eager, other)
    assert eager._td["observation_count"] == 1.9998 + 2


class Doubled(VecNorm):
    """Extends the transform, with a copy on the way."""

    def _call(self, next_tensordict):
        td = super()._call(next_tensordict.copy())
        for key in self.out_keys:
            if td.get(key, None) is not None:
                next_tensordict.set(key, 2 * td.get(key))
        return next_tensordict


@SLOW_INDUCTOR
@pytest.mark.parametrize("method", ["_reset", "_step"])
def test_a_subclass(backend, method):
    eager, other = VecNorm(KEYS), Doubled(KEYS)
    compiled = torch.compile(getattr(other, method), fullgraph=True, backend=backend)
    masks = TensorDict({method: torch.tensor([[True], [False], [True]])}, [3])
    for _ in range(3):
        td = batch(3)
        expected = getattr(eager, method)(masks, td.clone())
        y = compiled(masks, td.clone())
        for key in KEYS:
            torch.testing.assert_close(y[key], 2 * expected[key], rtol=1e-6, atol=1e-6)
        assert_same_state(eager, other)


@SLOW_INDUCTOR
def test_keys_of_one_name(backend):
    keys, names = (
        ["observation", ("next", "observation")],
        {("next", "observation"): "observation"},
    )
    eager, other = (VecNorm(keys, names=names, decay=0.9) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    for _ in range(3):
        td = (
            batch()
            .select("observation")
            .set(("next", "observation"), torch.randn(5, 3))
        )
        grads = []
        for t in (eager, compiled):
            x = td["observation"].clone().requires_grad_()
            y = t(td.clone().set("observation", x))
            total = y["observation"].pow(3).sum() + y["next", "observation"].sum()
            grads.append(torch.autograd.grad(total, x)[0])
        torch.testing.assert_close(*grads)
        assert_same_state(eager, other)
    assert other._td["observation_count"].item() == pytest.approx(10 * 2.71)


@SLOW_INDUCTOR
@pytest.mark.slow
def test_keys_and_numbers_that_are_set_later(backend):
    eager, other = VecNorm(["observation"]), VecNorm(["observation"])
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    for _ in range(3):
        assert_same_call(eager, compiled, batch())
        for t in (eager, other):
            t.decay *= 0.5
            t.out_keys[0] += "x"
            if len(t.in_keys) < 2:
                t.in_keys.append("reward")
                t.out_keys.append("r")
    assert_same_state(eager, other)


@SLOW_INDUCTOR
def test_gradients(backend):
    eager, other = VecNorm(KEYS), VecNorm(KEYS)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    for _ in range(2):
        td = batch()
        grads = []
        for t in (eager, compiled):
            x = td["observation"].clone().requires_grad_()
            y = t(td.clone().set("observation", x))["observation"]
            grads.append(torch.autograd.grad(y.pow(3).sum(), x)[0])
        torch.testing.assert_close(*grads)


def test_shared_statistics_stay_outside(backend):
    """A compiled graph may work on copies: statistics that others update must not."""
    shared = VecNorm(["observation"])
    shared(batch())
    td = shared._td.clone().share_memory_()
    eager = VecNorm(["observation"], shared_td=td.clone().share_memory_())
    other = VecNorm(["observation"], shared_td=td)
    compiled = torch.compile(other, backend=backend)
    assert_same_call(eager, compiled, batch())
    assert_same_state(eager, other)
    torch._dynamo.reset()
    with pytest.raises(Unsupported, match="need their lock"):
        torch.compile(other, fullgraph=True, backend=backend)(batch())


def spoil(td, how):
    """Only the last key is bad: those before it must not have been updated."""
    key = ("agents", "observation")
    x = td[key]
    if how == "shape":
        td[key] = torch.cat([x, x], -1)
        return ValueError, r"agents.*\(2, 4\).*\(2, 8\)"
    if how == "missing":
        del td[key]
        return KeyError, "agents.*observation"
    if how == "complex":
        td[key] = x.to(torch.complex64)
        return TypeError, "agents.*complex64"
    td.lock_()
    return RuntimeError, "locked"


@SLOW_INDUCTOR
@pytest.mark.parametrize("how", ["shape", "missing", "complex", "locked"])
@pytest.mark.parametrize("is_shared", [False, True], ids=["private", "shared"])
def test_bad_input(backend, is_shared, how):
    eager, other = VecNorm(KEYS), VecNorm(KEYS)
    for t in (eager, other):
        torch.manual_seed(0)
        t(batch())
    if is_shared:
        other = VecNorm(KEYS, shared_td=other._td.share_memory_())
    compiled = torch.compile(other, backend=backend)
    assert_same_call(eager, compiled, batch())
    before = {k: v.clone() for k, v in other._td.items(True, True)}
    td = batch()
    error, match = spoil(td, how)
    entries = dict(td.items(True, True))
    with pytest.raises(error, match=match):
        compiled(td)
    for key, value in before.items():
        assert torch.equal(other._td[key], value)
    assert all(td[key] is value for key, value in entries.items())
    assert_same_call(eager, compiled, batch())
    assert_same_state(eager, other)


def test_dtypes_are_those_of_the_last_values(backend):
    t = VecNorm(KEYS)
    for _ in range(2):
        t(batch())
    torch.compile(t, fullgraph=True, backend=backend)(batch().double())
    assert t.loc["reward"].dtype == torch.float64
    t(batch())
    assert t.loc["reward"].dtype == t.scale["reward"].dtype == torch.float32


@SLOW_INDUCTOR
@pytest.mark.parametrize(
    "first",
    [
        "a call",
        pytest.param("an eager call", marks=pytest.mark.slow),
        pytest.param("loading", marks=pytest.mark.slow),
    ],
)
def test_statistics_from_inference_mode(backend, first):
    """A graph that is run under it makes tensors that torch refuses to write to later."""
    eager, other, saved = VecNorm(KEYS), VecNorm(KEYS), VecNorm(KEYS)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    saved(batch())
    with torch.inference_mode():
        assert_same_call(eager, other if "eager" in first else compiled, batch())
        assert_same_call(eager, compiled, batch())
    for _ in range(2):
        assert_same_call(eager, compiled, batch())
        assert_same_state(eager, other)
    if first == "loading":
        for t in (eager, other):
            t.load_state_dict(saved.state_dict())
    for call in (other, compiled):
        assert_same_call(eager, call, batch())
        assert_same_state(eager, other)
    other.load_state_dict(saved.state_dict())
    assert_same_state(saved, other)


@NUMBERS_ARE_INPUTS
@SLOW_INDUCTOR
def test_a_decay_of_a_transform_that_changes(backend):
    counted = Counted(backend)
    eager, other = VecNorm(KEYS), VecNorm(KEYS)
    compiled = torch.compile(other, fullgraph=True, backend=counted)
    for i in range(20):
        eager.decay = other.decay = 1 - 1 / (i + 2)
        assert_same_call(eager, compiled, batch())
        assert_same_state(eager, other)
    assert counted.graphs <= 4  # the first call, and one with the state known
