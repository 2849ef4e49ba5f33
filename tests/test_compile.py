# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""torch.compile through a whole call of the transform."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch._dynamo.exc import Unsupported

from torchrl_vecnorm import VecNorm
from torchrl_vecnorm import functional as F

#: Where there is much C++ to compile.
SLOW_INDUCTOR = pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
    indirect=True,
)
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


# --------------------------------------------------------------------- functional


def seen(features=3, dtype=None):
    return F.moments(torch.randn(50, features, dtype=dtype) * 2 + 1)


def clone(state):
    return F.Moments(*(leaf.clone() for leaf in state))


class Counted:
    """A backend that counts the graphs that it is given."""

    def __init__(self, backend):
        self.graphs, self.backend = 0, torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


CHANGING = {
    "decay": lambda x, s, v: F.update_(x, s, decay=v),
    "weight": lambda x, s, v: F.update_(x, s, weight=v),
    "eps": lambda x, s, v: F.update_(x, s, decay=0.9, eps=v),
    "all": lambda x, s, v: F.update_(x, s, decay=v, weight=1 - v / 2, eps=v),
    "out": lambda x, s, v: F.update_(x, s, decay=v, out=torch.empty_like(x)),
    "mask": lambda x, s, v: F.update_(x, s, decay=v, mask=x[:, 0] > 0),
    "merge": lambda x, s, v: F.merge_(s, F.moments(x), decay=v, weight=v),
    "normalize": lambda x, s, v: F.normalize(x, s, eps=v),
    "denormalize": lambda x, s, v: F.denormalize(x, s, eps=v),
}


@SLOW_INDUCTOR
@pytest.mark.parametrize("name", CHANGING)
def test_numbers_that_change(backend, name):
    """A schedule is an input of one graph, not a graph for each of its numbers."""
    counted, function = Counted(backend), CHANGING[name]
    compiled = torch.compile(function, fullgraph=True, backend=counted)
    state, other = seen(), None
    other = clone(state)
    for i in range(20):
        x, value = torch.randn(4, 3), 1 - 1 / (i + 2)
        want, got = function(x, other, value), compiled(x, state, value)
        if want is not None:
            torch.testing.assert_close(got, want)
        for a, b in zip(state, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert counted.graphs <= 2


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


TRANSFORMS = {
    "grad": lambda f: lambda v: torch.func.grad(lambda u: f(u).sum())(v),
    "vjp": lambda f: lambda v: torch.func.vjp(f, v)[1](torch.ones_like(v))[0],
    "jvp": lambda f: lambda v: torch.func.jvp(f, (v,), (torch.ones_like(v),)),
    "vmap": lambda f: lambda v: torch.func.vmap(f)(v),
    "jacrev": lambda f: lambda v: torch.func.jacrev(f)(v),
    "vmap of grad": lambda f: (
        lambda v: torch.func.vmap(torch.func.grad(lambda u: f(u).sum()))(v)
    ),
}


@SLOW_INDUCTOR
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("what", ["normalize", "denormalize", "update_"])
def test_functorch_in_a_graph(backend, what, name):
    if what == "update_" and "vmap" in name:
        pytest.skip("one state cannot be updated for each of a batch")
    function = TRANSFORMS[name]
    state = seen()
    x = torch.randn(2, 3)

    def call(v, s):
        return function(lambda u: getattr(F, what)(u, s))(v)

    ours, other = clone(state), clone(state)
    want = call(x, other)
    got = torch.compile(call, fullgraph=True, backend=backend)(x, ours)
    torch.testing.assert_close(got, want)
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b)
    # Outside of them the operators are there again.
    compiled = torch.compile(
        lambda v, s: (call(v, s), getattr(F, what)(v, s))[1],
        fullgraph=True,
        backend=backend,
    )
    ours = clone(state)
    got, want = compiled(x, ours), getattr(F, what)(x, clone(other))
    torch.testing.assert_close(got, want)


PURE = {
    "normalize": lambda v, s: F.normalize(v, s),
    "denormalize": lambda v, s: F.denormalize(v, s),
    "moments": lambda v, s: F.moments(v).sum.to(v.dtype).expand_as(v).clone(),
    "loc": lambda v, s: F.loc_scale(s)[0].to(v.dtype).expand_as(v).clone(),
}


@pytest.mark.parametrize("name", PURE)
def test_a_branch(backend, name):
    function, state = PURE[name], seen()

    def call(v):
        yes, no = lambda u: function(u, state), lambda u: u.clone()
        return torch.cond(v.sum() > 0, yes, no, (v,))

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for x in (torch.rand(4, 3), -torch.rand(4, 3)):
        torch.testing.assert_close(compiled(x), call(x))


@SLOW_INDUCTOR
@pytest.mark.parametrize("name", PURE)
def test_a_nested_region(backend, name):
    function, state = PURE[name], seen()
    region = torch.compiler.nested_compile_region(lambda v: function(v, state))

    def call(v):
        return region(region(v))

    x = torch.randn(4, 3, requires_grad=name in ("normalize", "denormalize"))
    got = torch.compile(call, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(got, function(function(x, state), state))
    if x.requires_grad:
        (grad,) = torch.autograd.grad(got.sum(), x)
        (want,) = torch.autograd.grad(function(function(x, state), state).sum(), x)
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)  # neither matters
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Policy(torch.nn.Module):
        def forward(self, v):
            return F.normalize(v, state)

    state, x = seen(), torch.randn(4, 3)
    program = torch.export.export(Policy(), (x,), strict=strict)
    torch.testing.assert_close(program.module()(2 * x), F.normalize(2 * x, state))


@SLOW_INDUCTOR
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant):
    """The backward pass would fold the batch in again: refused as the graph is made."""
    state, x = seen(), torch.randn(4, 3, requires_grad=True)
    before, batch = clone(state), F.moments(torch.randn(4, 3))
    checkpoint = torch.utils.checkpoint.checkpoint

    def call(v, what):
        return checkpoint(lambda u: what(u).pow(2).sum(), v, use_reentrant=reentrant)

    for what in (
        lambda u: F.update_(u, state, decay=1),
        lambda u: (F.merge_(state, batch), F.normalize(u, state))[1],
    ):
        with pytest.raises(RuntimeError, match="in forward passes only"):
            torch.compile(call, fullgraph=True, backend=backend)(x, what)
        for a, b in zip(state, before, strict=True):
            assert torch.equal(a, b)
    what = lambda u: F.normalize(u, state)  # noqa: E731
    loss = torch.compile(call, fullgraph=True, backend=backend)(x, what)
    (grad,) = torch.autograd.grad(loss, x)
    (want,) = torch.autograd.grad(what(x).pow(2).sum(), x)
    torch.testing.assert_close(grad, want)


@SLOW_INDUCTOR
@pytest.mark.parametrize("name", [*CHANGING, "loc_scale"])
def test_numbers_that_change_into_none(backend, name):
    """What eager calls refuse, a graph that takes any number refuses as it runs."""
    function = CHANGING.get(name, lambda x, s, v: F.loc_scale(s, eps=v))
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    state, x = seen(), torch.randn(4, 3)
    for value in (0.9, 0.8, 0.7, 0.6):
        compiled(x, state, value)
    before = clone(state)
    for value in (-0.5, 0.0, math.nan):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"expected (decay|eps|wei)"
        ):
            compiled(x, state, value)
        for a, b in zip(state, before, strict=True):
            assert torch.equal(a, b)
