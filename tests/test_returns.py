# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Rewards over the deviation of discounted returns: the operator, and the module.

Against numpy's long double, which knows one environment after the other; and against the
oracle in plain torch, which that judges too.
"""

import copy

import numpy as np
import pytest
import torch
from samples import FLOATS, INTEGERS, data

from torchrl_vecnorm import Moments, _return_ops, oracle
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.rule import Rule

ops = torch.ops.torchrl_vecnorm
ids = {"ids": str}
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


class Exact:
    """The same in long double, one environment and one feature after the other."""

    def __init__(self, envs, features, gamma, clear, decay):
        self.gamma, self.clear, self.decay = gamma, clear, decay
        self.returns = np.zeros((envs, features), np.longdouble)
        self.used = np.zeros(features, np.longdouble)
        self.sum = np.zeros(features, np.longdouble)
        self.ssq = np.zeros(features, np.longdouble)
        self.count = np.longdouble(0)
        self.left_out = np.zeros(features)

    def step(self, reward, done, mask=None):
        envs, features = self.returns.shape
        some = [e for e in range(envs) if mask is None or mask[e]]
        if not some:
            return
        for total in (self.used, self.sum, self.ssq):
            total *= self.decay
        self.count = self.count * self.decay + len(some)
        for e in some:
            for f in range(features):
                past = self.gamma * self.returns[e, f]
                if self.clear == "before" and done[e]:
                    past *= 0
                if np.isfinite(reward[e, f]):
                    past += np.longdouble(reward[e, f])
                    self.used[f] += 1
                    self.sum[f] += past
                    self.ssq[f] += past * past
                else:
                    self.left_out[f] += 1
                self.returns[e, f] = past
                if self.clear == "after" and done[e]:
                    self.returns[e, f] = 0

    def scaled(self, reward, eps, clip):
        n = np.maximum(self.used, np.longdouble(1e-300))
        var = np.maximum(self.ssq / n - (self.sum / n) ** 2, 0)
        scale = np.sqrt(np.where(self.used > 0, var, 1) + eps)
        y = reward.astype(np.longdouble) / scale
        return y if clip is None else np.clip(y, -clip, clip)


def rewards(envs, features, dtype=torch.float32, spoiled=0.0):
    x = data(envs, features, dtype, loc=0.3, scale=1.5)
    if spoiled:
        bad = torch.rand(x.shape) < spoiled
        x[bad] = torch.tensor([torch.nan, torch.inf, -torch.inf])[
            torch.randint(3, (int(bad.sum()),))
        ].to(dtype)
    return x


def flags(envs, share=0.1):
    return torch.rand(envs) < share


def compare(state: Moments, exact: Exact, features) -> None:
    want = {"sum": exact.sum, "ssq": exact.ssq}
    size = np.sqrt(exact.ssq * exact.count)
    for name, value in want.items():
        got = getattr(state, name).reshape(-1).numpy()
        np.testing.assert_array_less(
            abs(got - value), 1e-12 * (size + abs(value)) + 1e-12
        )
    assert float(state.count[0]) == pytest.approx(float(exact.count), rel=1e-13)
    np.testing.assert_array_equal(
        state.nonfinite[1].reshape(-1).numpy(), exact.left_out
    )
    np.testing.assert_allclose(
        np.float64(exact.count - exact.used),
        state.nonfinite[0].reshape(-1).numpy(),
        rtol=1e-12,
        atol=1e-12,
    )


CASES = [
    ((1,), ()),
    ((2,), (1,)),
    ((7,), (3,)),
    ((31,), ()),
    ((257,), (1,)),
    ((4, 65), (2,)),
    ((1000,), ()),
]


@pytest.mark.parametrize("clear", ["after", "before"])
@pytest.mark.parametrize("decay", [1.0, 0.97])
@pytest.mark.parametrize("envs,features", CASES, **ids)
def test_against_long_double(envs, features, decay, clear):
    n, k = torch.Size(envs).numel(), max(torch.Size(features).numel(), 1)
    exact = Exact(n, k, 0.9, clear, decay)
    state, other = Moments.zeros(features), Moments.zeros(features)
    returns = torch.zeros(*envs, *features, dtype=torch.float64)
    theirs = returns.clone()
    rule = Rule(1e-8, 2, 5.0, False)
    for step in range(12):
        x = rewards(envs, features, spoiled=0.05)
        done, mask = flags(envs, 0.2), flags(envs, 0.8) if step % 3 == 2 else None
        y = F.scale_returns_(
            x,
            done,
            returns,
            state,
            gamma=0.9,
            clear=clear,
            decay=decay,
            clip=5.0,
            mask=mask,
        )
        plain, theirs, other = oracle.scale_returns(
            x,
            done,
            theirs,
            other,
            gamma=0.9,
            clears_before=clear == "before",
            keep=decay,
            rule=rule,
            mask=mask,
        )
        exact.step(
            x.reshape(n, k).double().numpy(),
            done.reshape(-1).tolist(),
            None if mask is None else mask.reshape(-1).tolist(),
        )
        want = exact.scaled(x.reshape(n, k).numpy(), 1e-8, 5.0).astype(np.float64)
        for got in (y, plain):
            assert got.dtype == x.dtype and got.shape == x.shape
            np.testing.assert_allclose(
                got.reshape(n, k).double().numpy(), want, rtol=2e-6, atol=1e-6
            )
        for got in (returns, theirs):
            np.testing.assert_allclose(
                got.reshape(n, k).numpy(),
                exact.returns.astype(np.float64),
                rtol=1e-13,
                atol=1e-13,
            )
        compare(state, exact, features)
        compare(other, exact, features)


def step_both(x, done, mask=None, *, steps=3, returns_dtype=torch.float64, **options):
    """Some steps of the operator, and of the oracle."""
    features = x.shape[done.ndim :]
    state, other = (Moments.zeros(features, device=x.device) for _ in range(2))
    returns = torch.zeros(x.shape, dtype=returns_dtype, device=x.device)
    theirs = returns.clone()
    options = {"gamma": 0.95, **options}
    for _ in range(steps):
        y = F.scale_returns_(x, done, returns, state, mask=mask, **options)
        want, theirs, other = oracle.scale_returns(
            x,
            done,
            theirs,
            other,
            gamma=options["gamma"],
            clears_before=options.get("clear") == "before",
            rule=Rule(1e-8, 2, 10.0, False),
            mask=mask,
        )
    tolerance = 1e-6 if returns_dtype == torch.float32 else 1e-11
    for got, expected in [(returns, theirs), *zip(state, other, strict=True)]:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, **TOLERANCE[y.dtype], equal_nan=True)
    return y, returns, state


@pytest.mark.parametrize("clear", ["after", "before"])
@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS), **ids)
@pytest.mark.parametrize("features", [(), (2,)], **ids)
def test_dtypes(features, dtype, clear):
    step_both(rewards((300,), features, dtype), flags(300), clear=clear)


@pytest.mark.parametrize("envs", [0, 1, 4095, 4096, 4097, 40_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], **ids)
def test_returns_of_either_dtype(envs, dtype):
    """Chunks, blocks, packs and their tails."""
    x = rewards((envs,), (), spoiled=0.01)
    step_both(x, flags(envs), flags(envs, 0.7), returns_dtype=dtype)
    step_both(x, flags(envs), returns_dtype=dtype)


def test_strides():
    """Columns of wider tensors, expanded flags, and dones of torchrl's shape."""
    wide = rewards((400,), (6,))
    done = flags((400, 1))
    for x in (wide[:, 2], wide[:, 1:4], wide[:, ::3], wide.mT.contiguous().mT):
        features = x.shape[1:]
        state, dense = Moments.zeros(features), Moments.zeros(features)
        returns = torch.zeros(x.shape, dtype=torch.float64)
        others = returns.clone()
        y = F.scale_returns_(x, done, returns, state)
        z = F.scale_returns_(x.contiguous(), done[:, 0].clone(), others, dense)
        assert torch.equal(y, z) and torch.equal(returns, others)
        assert all(map(torch.equal, state, dense))
    step_both(wide[:, 0], torch.ones(1, dtype=torch.bool).expand(400))
    step_both(wide[:1, 0].expand(400), flags(400))


@pytest.mark.parametrize("clear", ["after", "before"])
def test_few_bad_values_among_many(clear):
    """What is asked of each row there, and taken for granted elsewhere."""
    for dtype, bad in (
        (torch.float32, torch.nan),
        (torch.float64, torch.inf),
        (torch.float64, 1e200),
    ):
        exact = Exact(4500, 1, 0.9, clear, 1.0)
        state, returns = Moments.zeros(()), torch.zeros(4500, dtype=torch.float64)
        for at in ([], [700, 4499], []):
            x, done = rewards((4500,), (), dtype), flags(4500)
            x[at] = bad
            y = F.scale_returns_(x, done, returns, state, gamma=0.9, clear=clear)
            # A reward without a square counts as one that is not finite.
            known = torch.where(x.abs() < 1e100, x.double(), torch.nan)
            exact.step(known[:, None].numpy(), done.tolist())
            torch.testing.assert_close(
                returns.numpy(), np.float64(exact.returns[:, 0]), rtol=1e-13, atol=1e-13
            )
        compare(state, exact, ())
        assert state.nonfinite[1] == 2
        want = exact.scaled(x[:, None].numpy(), 1e-8, 10.0)[:, 0].astype(np.float64)
        np.testing.assert_allclose(y.double().numpy(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("envs", [5, 5000, 100_000])
def test_same_bits_on_any_number_of_threads(envs):
    x, done = rewards((envs,), ()), flags(envs)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            state, returns = Moments.zeros(()), torch.zeros(envs, dtype=torch.float64)
            for _ in range(3):
                y = F.scale_returns_(x, done, returns, state)
            results.append([y, returns, *state])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_far_from_zero():
    """Returns of 1e5 deviations: their sums alone have lost the variance."""
    state, returns = Moments.zeros(()), torch.zeros(4000, dtype=torch.float64)
    noise = torch.randn(4000, dtype=torch.float64)
    for decay in (1.0, 0.9):
        for k in range(20):
            x = noise + 1e5 + k
            F.scale_returns_(
                x, flags(4000, 1.1), returns, state, gamma=0.0, decay=decay
            )
        F.scale_returns_(x, flags(4000, 1.1), returns, state, gamma=0.0, decay=1e-300)
        _, scale = F.loc_scale(state, eps_mode="var_add", eps=1e-8)
        assert float(scale) == pytest.approx(float(x.std(correction=0)), rel=1e-6)


def test_a_return_is_not_spoiled_for_ever():
    state, returns = Moments.zeros(()), torch.zeros(4, dtype=torch.float64)
    none = torch.zeros(4, dtype=torch.bool)
    F.scale_returns_(torch.tensor([1.0, 2.0, 3.0, 4.0]), none, returns, state)
    bad = torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf], dtype=torch.float64)
    y = F.scale_returns_(bad, none, returns, state, gamma=0.5, clip=None)
    assert y.isnan().tolist() == [True, False, False, False]
    assert y.isinf().tolist() == [False, True, False, True]
    assert returns.tolist() == [0.5, 1.0, 2.5, 2.0]
    assert state.nonfinite.tolist() == [3, 3] and state.count.item() == 8
    # Finite, but no square of it is; and a sum that overflows.
    huge = torch.full((4,), 1.7e308, dtype=torch.float64)
    F.scale_returns_(huge, none, returns, state, gamma=1.0)
    assert returns.tolist() == [0.5, 1.0, 2.5, 2.0] and state.nonfinite[1] == 7
    # What somebody else has put there.
    returns[:] = torch.tensor([torch.nan, torch.inf, 1e200, 1.0])
    F.scale_returns_(torch.ones(4), none, returns, state, gamma=0.5)
    assert returns.tolist() == [1.0, 1.0, 1.0, 1.5]


def test_nothing_seen():
    """Only scaled: nothing is known of the deviation, and 1 is assumed."""
    state, returns = Moments.zeros(()), torch.zeros(3, dtype=torch.float64)
    none = torch.zeros(3, dtype=torch.bool)
    x = torch.tensor([1.0, -2.0, 3.0])
    y = F.scale_returns_(x, none, returns, state, mask=none, eps=1e-12)
    torch.testing.assert_close(y, x)
    assert not returns.any() and not any(leaf.any() for leaf in state)


# ------------------------------------------------------------------------ gradients


def test_gradient():
    x = rewards((64,), (), torch.float64).requires_grad_()
    state, returns = Moments.zeros(()), torch.zeros(64, dtype=torch.float64)
    y = F.scale_returns_(x, flags(64), returns, state, clip=0.5)
    assert not returns.requires_grad and not state.sum.requires_grad
    _, scale = F.loc_scale(state, eps=1e-8, eps_mode="var_add")
    (grad,) = torch.autograd.grad(y.sum(), x)
    inside = (x.detach() / scale).abs() <= 0.5
    torch.testing.assert_close(grad, torch.where(inside, 1 / scale, 0.0))
    z = F.scale_returns_(x.detach(), flags(64, 0), returns.clone(), state)
    assert not z.requires_grad


def test_functorch_and_forward_mode():
    x, done = rewards((32,), (), torch.float64), flags(32)
    state, returns = Moments.zeros(()), torch.zeros(32, dtype=torch.float64)
    state2, returns2 = Moments.zeros(()), returns.clone()
    want = F.scale_returns_(x, done, returns, state)

    def f(x):
        return F.scale_returns_(x, done, returns2, state2)

    grad = torch.func.grad(lambda x: f(x).sum())(x)
    _, scale = F.loc_scale(state, eps=1e-8, eps_mode="var_add")
    torch.testing.assert_close(grad, (1 / scale).expand(32))
    torch.testing.assert_close(returns2, returns)
    returns2.zero_()
    for leaf in state2:
        leaf.zero_()
    y, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(tangent, (1 / scale).expand(32))


def test_refused_in_a_backward_pass():
    state, returns = Moments.zeros(()), torch.zeros(3, dtype=torch.float64)
    done = torch.zeros(3, dtype=torch.bool)
    x = torch.ones(3, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: F.scale_returns_(x, done, returns, state).square(),
        x,
        use_reentrant=False,
    )
    with pytest.raises(RuntimeError, match="forward passes only"):
        y.sum().backward()
    assert state.count == 3


# ------------------------------------------------------------------------ bad input


def good():
    return {
        "reward": torch.ones(4),
        "done": torch.zeros(4, dtype=torch.bool),
        "returns": torch.zeros(4, dtype=torch.float64),
        "state": Moments.zeros(()),
    }


shared = torch.zeros(64, dtype=torch.float64)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"gamma": 1.1}, ValueError, "expected gamma in .0, 1., got 1.1"),
        ({"gamma": float("nan")}, ValueError, "expected gamma"),
        ({"gamma": "high"}, TypeError, "expected gamma as a number"),
        ({"decay": 0.0}, ValueError, "expected decay in"),
        ({"eps": 0.0}, ValueError, "expected eps positive"),
        ({"clip": -1.0}, ValueError, "expected clip positive"),
        ({"clear": "never"}, ValueError, "expected clear as one of after, before, got"),
        ({"eps_mode": "no"}, ValueError, "expected eps_mode"),
        ({"reward": [torch.ones(4)]}, TypeError, "expected reward as Tensor"),
        ({"reward": torch.ones(4, dtype=torch.complex64)}, TypeError, "dense real"),
        ({"reward": torch.ones(5)}, ValueError, "returns of the shape of the rewards"),
        ({"state": Moments.zeros([3])}, ValueError, "expected features of shape .3."),
        ({"done": torch.zeros(4)}, ValueError, "expected bool dones of shape .4."),
        (
            {"done": torch.zeros(5, dtype=torch.bool)},
            ValueError,
            r"expected bool dones of shape \[4\].*got Bool \[5\]",
        ),
        ({"done": None}, TypeError, "expected done as Tensor, got NoneType"),
        ({"returns": torch.zeros(4).half()}, TypeError, "expected returns as dense"),
        ({"returns": torch.zeros(4, dtype=torch.int64)}, TypeError, "returns as dense"),
        (
            {"returns": torch.zeros(8, dtype=torch.float64)[::2]},
            ValueError,
            "contiguous returns",
        ),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "expected a bool mask"),
        (
            {"reward": shared[:4], "returns": shared[2:6]},
            ValueError,
            "expected rewards apart from the returns",
        ),
        (
            {"done": shared.view(torch.bool)[:4], "returns": shared[:4]},
            ValueError,
            "expected dones apart from the returns",
        ),
        (
            {"mask": shared.view(torch.bool)[:4], "returns": shared[:4]},
            ValueError,
            "expected a mask apart from the returns",
        ),
        (
            {"state": Moments.zeros(())._replace(sum=shared[0]), "returns": shared[:4]},
            ValueError,
            "expected returns apart from all states",
        ),
    ],
)
def test_refused(change, error, match):
    """By name, with what came; and nothing has changed."""
    args = good() | change
    before = copy.deepcopy({k: args[k] for k in ("returns", "state")})
    with pytest.raises(error, match=match):
        F.scale_returns_(**args)
    assert torch.equal(args["returns"], before["returns"])
    assert all(map(torch.equal, args["state"], before["state"]))


def test_one_key_is_refused_and_none_changes():
    states = [Moments.zeros(()), Moments.zeros(())]
    xs = [torch.ones(3), torch.ones(4)]
    returns = [torch.zeros(3, dtype=torch.float64) for _ in xs]
    done = [torch.zeros(len(x), dtype=torch.bool) for x in xs]
    args = [xs, done, returns, F.leaves_of(states), [], 0.9, False, 1.0]
    with pytest.raises(ValueError, match="key 1: expected returns of the shape"):
        _return_ops.scale_returns(*args, (1e-8, 2, None, False))
    assert not returns[0].any() and not states[0].count.any()
    returns[1] = returns[0]
    args[0] = [xs[0], xs[0].clone()]
    args[1] = [done[0], done[0]]
    with pytest.raises(ValueError, match="apart from the returns of key"):
        _return_ops.scale_returns(*args, (1e-8, 2, None, False))
    assert not returns[0].any() and not states[0].count.any()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_output_is_refused_and_nothing_changes(requires_grad):
    args = operator_args(requires_grad)
    args[4][1] = torch.empty(5, 3, dtype=torch.float64)
    before = copy.deepcopy(args[2:4])
    with pytest.raises(ValueError, match="key 1: expected an output of shape"):
        ops.scale_returns(*args)
    for got, want in zip(args[2:4], before, strict=True):
        assert all(map(torch.equal, got, want))


def test_two_keys_are_one_call_each():
    states = [Moments.zeros(()), Moments.zeros([2])]
    xs = [rewards((30,), ()), rewards((20,), (2,), torch.float64)]
    returns = [torch.zeros(x.shape, dtype=torch.float64) for x in xs]
    done = [flags(30), flags(20)]
    rule = (1e-8, 2, 10.0, False)
    alone = [Moments.zeros(()), Moments.zeros([2])]
    others = [r.clone() for r in returns]
    for _ in range(3):
        ys = _return_ops.scale_returns(
            xs, done, returns, F.leaves_of(states), [], 0.9, False, 1.0, rule
        )
        for i, y in enumerate(ys):
            assert torch.equal(
                F.scale_returns_(xs[i], done[i], others[i], alone[i], gamma=0.9), y
            )
    assert all(map(torch.equal, F.leaves_of(states), F.leaves_of(alone)))


def test_a_state_that_counts_nothing():
    """In the layout of torchrl's class a reward that is left out is one at the mean."""
    state = Moments.zeros(())._replace(nonfinite=None, central=None)
    x = torch.tensor([1.0, 2.0, torch.nan, 6.0])
    returns = torch.zeros(4, dtype=torch.float64)
    F.scale_returns_(x, torch.zeros(4, dtype=torch.bool), returns, state)
    assert (state.sum.item(), state.count.item()) == (12.0, 4.0)


# -------------------------------------------------------- the dispatcher, the compiler


def operator_args(requires_grad=False):
    torch.manual_seed(0)
    x = [rewards((33,), ()), rewards((5,), (2,), torch.float64)]
    for v in x:
        v.requires_grad_(requires_grad)
    returns = [torch.zeros(v.shape, dtype=torch.float64) for v in x]
    state = F.leaves_of([Moments.zeros(()), Moments.zeros([2])])
    y = [torch.empty_like(v.detach()) for v in x]
    mask = [torch.empty(0, dtype=torch.bool), flags(5)]
    return (x, [flags(33), flags(5)], returns, state, y, mask, 0.9, False, 1.0, 1e-8, 2)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    torch.library.opcheck(ops.scale_returns, operator_args(requires_grad))


def test_past_the_dispatcher():
    """Where nothing listens a call does not go through it, and does what it does."""
    x, done = rewards((50,), ()), flags(50)

    def call():
        state, returns = Moments.zeros(()), torch.zeros(50, dtype=torch.float64)
        y = F.scale_returns_(x, done, returns, state)
        return [y, returns, *state], [t._version for t in (returns, *state)]

    written, versions = call()
    with torch.profiler.profile() as profile:
        others, other_versions = call()
    assert "torchrl_vecnorm::scale_returns" in [e.name for e in profile.events()]
    assert all(map(torch.equal, written, others)) and versions == other_versions
    assert versions == [1] * 6
    with torch.inference_mode():
        y = F.scale_returns_(x, done, torch.zeros_like(written[1]), Moments.zeros(()))
    assert y.is_inference() and torch.equal(y, written[0])


def test_any_other_device():
    """What runs where there is no kernel."""
    args, others = operator_args(), operator_args()
    ops.scale_returns(*args)
    _return_ops._scale_returns(*others)
    written = [[t for at in (2, 3, 4) for t in of[at]] for of in (args, others)]
    for a, b in zip(*written, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "requires_grad", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_compile(requires_grad):
    """Without a graph break; a discount that changes is an input of the graph."""

    def step(x, done, returns, state, gamma):
        return F.scale_returns_(x * 2, done, returns, state, gamma=gamma)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    states = [Moments.zeros(()), Moments.zeros(())]
    returns = [torch.zeros(50, dtype=torch.float64) for _ in states]
    for gamma in (0.9, 0.9, 0.8, 0.7):
        x, done = rewards((50,), ()).requires_grad_(requires_grad), flags(50)
        y = compiled(x, done, returns[0], states[0], gamma)
        want = step(x, done, returns[1], states[1], gamma)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(returns[0], returns[1])
        torch.testing.assert_close(states[0].ssq, states[1].ssq)
        if requires_grad:
            grads = [torch.autograd.grad(v.sum(), x)[0] for v in (y, want)]
            torch.testing.assert_close(*grads)


def test_a_state_without_dimensions_is_kept_by_a_graph():
    """Where a decay changes, a compiled update is plain torch."""
    compiled = torch.compile(
        lambda x, state, decay: F.update_(x, state, decay=decay),
        fullgraph=True,
        backend="aot_eager",
    )
    states = [Moments.zeros(()), Moments.zeros(())]
    for decay in (0.9, 0.8, 0.7):
        x = rewards((50,), ())
        y = compiled(x, states[0], decay)
        torch.testing.assert_close(y, F.update_(x, states[1], decay=decay))
        torch.testing.assert_close(states[0].ssq, states[1].ssq)


def test_trace_is_refused():
    args = good()
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
        torch.jit.trace(
            lambda x: F.scale_returns_(**(args | {"reward": x})), args["reward"]
        )
