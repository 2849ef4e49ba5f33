# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What both transforms promise, whatever they forget by: sections 1, 3, 4, 5 and 7 of the
contract, by the same tests."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from common import through_a_file
from tensordict import LazyStackedTensorDict, TensorDict

from torchrl_vecnorm import VecNorm, VecNormV2

MAKES = {
    "VecNorm": VecNorm,
    "VecNormV2": VecNormV2,
    "VecNormV2, reduced": partial(VecNormV2, reduce_batch_dims=True),
}


@pytest.fixture(params=MAKES)
def make(request):
    """One of the classes, as a function of in_keys and options."""
    return MAKES[request.param]


def batch(n: int = 6, dtype=torch.float32) -> TensorDict:
    x = torch.randn(n, 3, dtype=torch.float64) * 4 + 7
    return TensorDict(a=x.to(dtype), b=torch.randn(n, 1), batch_size=[n])


def state_of(t) -> dict[str, torch.Tensor]:
    return {name: v.clone() for name, v in (t.get_extra_state() or {}).items()}


def assert_unchanged(t, before: dict[str, torch.Tensor]) -> None:
    now = t.get_extra_state()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


def trained(make, **options):
    t = make(["a", "b"], **options)
    for _ in range(3):
        t(batch())
    return t


# --------------------------------------------------------------- 1: what a call computes


@pytest.mark.parametrize("decay", [0.9, 1])
def test_the_same_bits_on_every_run(make, decay):
    def run():
        torch.manual_seed(3)
        t = make(["a", "b"], decay=decay)
        return [t(batch(500))["a"] for _ in range(4)], state_of(t)

    (ys, state), (other_ys, other) = run(), run()
    assert all(map(torch.equal, ys, other_ys))
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool]
)
def test_dtypes(make, dtype):
    t = make(["a"])
    for _ in range(2):
        y = t(batch(dtype=dtype).select("a"))["a"]
    assert y.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert t.loc["a"].dtype == t.scale["a"].dtype == y.dtype
    sums = {v.dtype for name, v in state_of(t).items() if "sum" in name}
    assert sums == {torch.float64}


def test_gradients_take_the_statistics_as_constants(make):
    t = trained(make)
    td = batch()
    td["a"].requires_grad_()
    x = td["a"]
    t(td)["a"].sum().backward()
    scale = t.scale["a"]
    torch.testing.assert_close(x.grad, (1 / scale).expand_as(x), rtol=1e-5, atol=0)
    assert not any(v.requires_grad for v in t.get_extra_state().values())


@pytest.mark.parametrize("how", ["eval", "freeze"])
def test_no_updates(make, how):
    t = trained(make)
    before = state_of(t)
    getattr(t, how)()
    td = batch()
    y = t(td.clone())["a"]
    assert_unchanged(t, before)
    torch.testing.assert_close(y, (td["a"] - t.loc["a"]) / t.scale["a"])


def test_frozen_before_any_data(make):
    t = make(["a"]).freeze()
    td = batch()
    with pytest.warns(UserWarning, match="no statistics yet"):
        assert torch.equal(t(td.clone())["a"], td["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(t(td.clone())["a"], td["a"])


# ------------------------------------------------------------------- 2: what travels


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), "file"]
)
def test_going_on_is_not_having_stopped(make, copied):
    t = trained(make, decay=0.9)
    if copied == "file":
        other = make(["a", "b"], decay=0.9)
        other.load_state_dict(through_a_file(t.state_dict()))
    else:
        other = copied(t)
    for _ in range(2):
        td = batch()
        y = t(td.clone())
        assert (y == other(td)).all()
    assert_unchanged(other, state_of(t))


# --------------------------------------------------------------------- 4, 5: bad input


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_left_out(make, value):
    t = trained(make)
    td = batch()
    td["a"][2, 1] = value
    y = t(td)["a"]
    assert not y[2, 1].isfinite() and y.isfinite().sum() == y.numel() - 1
    assert t.loc["a"].isfinite().all() and t.scale["a"].isfinite().all()
    assert t.nonfinite["a"].sum() == 1


def test_squares_that_overflow(make):
    t = make(["a"], decay=1)
    x = torch.tensor([[1e30], [3e30]])
    for _ in range(3):
        y = t(TensorDict(a=x.clone(), batch_size=[2]))["a"]
    assert y.isfinite().all() and t.scale["a"].isfinite().all()


@pytest.mark.parametrize(
    "value,error,message",
    [
        (torch.randn(6, 4), ValueError, "key 'b': expected features of shape"),
        (torch.randn(6, 1, dtype=torch.complex64), TypeError, "key 'b'.*complex"),
        (torch.randn(6, 1).to_sparse(), TypeError, "key 'b'"),
        (None, KeyError, "'b' is not in the tensordict, which has"),
    ],
    ids=["shape", "complex", "sparse", "missing"],
)
def test_all_or_nothing(make, value, error, message):
    """The second key is refused: the first has not changed either."""
    t = trained(make)
    before = state_of(t)
    td = batch().exclude("b") if value is None else batch().set("b", value)
    with pytest.raises(error, match=message):
        t(td)
    assert_unchanged(t, before)


def test_keys_that_are_missing_at_a_reset(make):
    t = trained(make)
    before = state_of(t)
    reset = t._reset(TensorDict(batch_size=[6]), batch().exclude("b"))
    assert "b" not in reset.keys()
    changed = {n for n, v in state_of(t).items() if not torch.equal(v, before[n])}
    assert changed and all("b" not in name.split(t.SEP)[-1][:1] for name in changed)


def test_only_rows_that_are_reset_count(make):
    t = trained(make, decay=1)
    other = copy.deepcopy(t)
    td = batch()
    mask = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)
    wild = td.clone()
    wild["a"][~mask] = 1e6
    for one, values in ((t, td), (other, wild)):
        one._reset(TensorDict({"_reset": mask[:, None]}, [6]), values.clone())
    for name, value in state_of(t).items():
        torch.testing.assert_close(state_of(other)[name], value, msg=name)


@pytest.mark.parametrize("name", ["VecNorm", "VecNormV2, reduced"])
def test_an_empty_batch_changes_nothing(name):
    """Where each element of a batch has statistics of its own it is of another shape."""
    t = trained(MAKES[name])
    before = state_of(t)
    t(batch(0))
    assert_unchanged(t, before)


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, math.nan])
def test_decay(make, decay):
    with pytest.raises(ValueError, match="decay"):
        make(["a"], decay=decay)


@pytest.mark.parametrize("eps", [0, -1e-4, math.nan, math.inf])
def test_eps(make, eps):
    with pytest.raises(ValueError, match="eps"):
        make(["a"], eps=eps)


@pytest.mark.parametrize("option", ["decay", "eps"])
@pytest.mark.parametrize("value", ["0.9", [0.9], None])
def test_numbers_that_are_none(make, option, value):
    with pytest.raises(TypeError, match=option):
        make(["a"], **{option: value})


@pytest.mark.parametrize("keys,out_keys", [(["a", "a"], None), (["a", "b"], ["c"])])
def test_keys(make, keys, out_keys):
    with pytest.raises(ValueError):
        make(keys, out_keys)


def test_values_in_any_layout(make):
    """Lazily stacked and strided values are what dense ones are."""
    t, lazy, strided = (make(["a"]) for _ in range(3))
    for _ in range(3):
        td = batch().select("a")
        y = t(td.clone())["a"]
        stack = LazyStackedTensorDict(*td.clone().unbind(0), stack_dim=0)
        assert torch.equal(lazy(stack)["a"], y)
        wide = torch.zeros(6, 6)
        wide[:, ::2] = td["a"]
        assert torch.equal(strided(td.set("a", wide[:, ::2]))["a"], y)


def damaged(state: dict, name: str, how: str) -> dict:
    state = {n: v.clone() for n, v in state.items()}
    if how == "another shape":
        state[name] = torch.zeros(*state[name].shape, 2, dtype=state[name].dtype)
    elif how == "NaN":
        state[name] = torch.full_like(state[name], math.nan)
    else:
        del state[name]
    return state


@pytest.mark.parametrize("how", ["another shape", "NaN", "missing"])
def test_a_damaged_checkpoint_changes_nothing(make, how):
    t, source = trained(make), state_of(trained(make))
    before = state_of(t)
    name = next(n for n in source if "a" in n and "sum" in n)
    with pytest.raises((ValueError, KeyError), match="a"):
        t.set_extra_state(damaged(source, name, how))
    assert_unchanged(t, before)
