# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""torch.compile through the functions on tensors."""

import math

import pytest
import torch
from samples import NUMBERS_ARE_INPUTS

from torchrl_vecnorm import functional as F

#: Where there is much C++ to compile.
SLOW_INDUCTOR = pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
    indirect=True,
)


@pytest.fixture(autouse=True, params=["aot_eager", "inductor"])
def backend(request):
    torch._dynamo.reset()
    return request.param


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


@NUMBERS_ARE_INPUTS
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
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name not in ("jvp", "vmap of grad"))
        )
        for name in TRANSFORMS
    ],
)
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


@pytest.mark.skipif(
    not hasattr(torch.compiler, "nested_compile_region"),
    reason="this torch has no nested regions",
)
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
        def __init__(self):
            super().__init__()
            for name, leaf in state._asdict().items():
                self.register_buffer(name, leaf)

        def forward(self, v):
            return F.normalize(v, F.Moments(*self.buffers()))

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


@pytest.mark.parametrize(
    "name,backend",
    [
        *(
            pytest.param(name, "aot_eager", marks=[pytest.mark.slow] * (name != "all"))
            for name in CHANGING
        ),
        pytest.param(
            "loc_scale", "aot_eager", marks=[NUMBERS_ARE_INPUTS, pytest.mark.slow]
        ),
        pytest.param("all", "inductor", marks=pytest.mark.slow),
    ],
    indirect=["backend"],
)
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
