# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The operators as a transform calls them: bound, past the dispatcher."""

import pytest
import torch
from samples import FLOATS, INTEGERS, LAYOUTS, data
from tensordict import TensorDict
from test_ops import clone, ids, traced

from torchrl_vecnorm import Moments, VecNorm
from torchrl_vecnorm import functional as F


def called(t: VecNorm, x: torch.Tensor) -> torch.Tensor:
    return t(TensorDict({"a": x}, x.shape[:1]))["a"]


def bound(x: torch.Tensor) -> VecNorm:
    t = VecNorm(["a"], decay=0.9)
    for _ in range(2):
        called(t, x)
    assert t._statistics.binding is not None
    return t


@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS), **ids)
@pytest.mark.parametrize(
    "layout", [torch.clone, *LAYOUTS], ids=lambda layout: layout.__name__
)
@pytest.mark.parametrize("updating", [True, False])
def test_a_bound_call_is_the_operator(dtype, layout, updating):
    x = layout(data((12,), (3, 4), dtype))
    t = bound(x)
    state = clone(Moments(*(t._td[f"a_{name}"] for name in Moments._fields)))
    if updating:
        want = F.update_(x, state, decay=0.9)
    else:
        t.freeze()
        want = F.normalize(x, state)
    y = called(t, x)
    assert torch.equal(y, want) and y.dtype == want.dtype
    assert y.stride() == want.stride()
    for name, leaf in state._asdict().items():
        assert torch.equal(t._td[f"a_{name}"], leaf), name


def test_who_listens_hears_a_bound_call():
    x = data((4,), (3,))
    t = bound(x)
    with torch.profiler.profile() as profile:
        called(t, x)
    assert "torchrl_vecnorm::update" in [e.name for e in profile.events()]
    value = x.clone().requires_grad_()
    called(t, value).sum().backward()
    torch.testing.assert_close(value.grad, (1 / t.scale["a"]).expand(4, 3))
    with torch.no_grad():
        assert not called(t, value).requires_grad
    assert t._td["a_count"].item() == pytest.approx(4 * sum(0.9**k for k in range(5)))


def test_a_bound_call_changes_the_version_of_its_leaves():
    x = data((4,), (3,))
    t = bound(x)
    before = [leaf._version for leaf in t._td.values()]
    called(t, x)
    after = [leaf._version for leaf in t._td.values()]
    assert all(a > b for a, b in zip(after, before, strict=True))
    t.freeze()
    called(t, x)
    assert [leaf._version for leaf in t._td.values()] == after


def test_leaves_of_a_bound_call_that_move():
    """set_() and share_memory_() give a tensor other memory."""
    x = data((4,), (3,))
    t, other = bound(x), bound(x)
    t._td["a_sum"].share_memory_()
    old = t._td["a_ssq"].detach()
    t._td["a_ssq"].set_(old.clone())
    kept = old.clone()
    for one in (t, other):
        called(one, x)
    assert torch.equal(old, kept)
    for name in ("a_sum", "a_ssq", "a_count"):
        assert torch.equal(t._td[name], other._td[name]), name


def test_values_of_a_bound_call_that_are_its_leaves():
    t = VecNorm(["a"], decay=0.9)
    for _ in range(2):
        called(t, data((4,), (3,)).double())
    before = t._td.clone()
    with pytest.raises(ValueError, match="expected values apart from all states"):
        called(t, t._td["a_nonfinite"])
    assert (before == t._td).all()


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_an_error_after_an_update_repeats_nothing():
    """The gradient needs the scale, and torch cannot compute it."""
    t = VecNorm(["a"], decay=1)
    td = TensorDict({"a": data((2,), (3,)).requires_grad_()}, [2])
    for _ in range(2):
        t(td.clone())
    library = torch.library.Library("aten", "IMPL")
    library.impl("where.self", torch.library.fallthrough_kernel, "CPU")
    try:
        with pytest.raises(NotImplementedError, match="where"):
            t(td.clone())
    finally:
        library._destroy()
    assert t._td["a_count"] == 6


def test_a_state_of_torchrls_layout_is_bound():
    zeros = TensorDict(
        {"a_sum": torch.zeros(3), "a_ssq": torch.zeros(3), "a_count": torch.zeros(1)}
    )
    t = VecNorm(["a"], shared_td=zeros.share_memory_())
    t(TensorDict({"a": data((4,), (3,))}, [4]))
    binding = t._statistics.binding
    assert binding is not None
    assert t._statistics.normalize_again(TensorDict({"a": data((4,), (3,))}, [4]), True)
    t(TensorDict({"a": data((4,), (3,))}, [4]))
    assert t._statistics.binding is binding
    # One that comes later is seen.
    t._td.unlock_()["a_nonfinite"] = torch.zeros(2, 3, dtype=torch.float64)
    assert not t._statistics.normalize_again(
        TensorDict({"a": data((4,), (3,))}, [4]), True
    )


def test_forward_mode_of_a_bound_transform():
    t, x = VecNorm(["a"]), data((4,), (3,))
    for _ in range(2):
        t(TensorDict({"a": x}, [4]))
    _, tangent = torch.func.jvp(
        lambda v: t(TensorDict({"a": v}, [4]))["a"], (x,), (torch.ones(4, 3),)
    )
    torch.testing.assert_close(tangent, (1 / t.scale["a"]).expand(4, 3))
    assert t._td["a_count"].item() == pytest.approx(4 * (1 + 0.9999 + 0.9999**2))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traces_of_a_transform():
    t, x = VecNorm(["a"], decay=1), data((4,), (3,))

    def call(v):
        return t(TensorDict({"a": v}, [v.shape[0]]))["a"]

    for _ in range(2):
        call(x)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record"):
        traced(call, x)
    assert t._td["a_count"] == 8
    t.freeze()
    torch.testing.assert_close(traced(call, x)(3 * x), call(3 * x))
    call(x)  # bound meanwhile
    torch.testing.assert_close(traced(call, x)(3 * x), call(3 * x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """The backward pass runs the forward pass again: an update would count twice."""
    t, x = VecNorm(["a"], decay=1), data((4,), (3,)).requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda v: called(t, v).pow(2).sum(), x, use_reentrant=reentrant
    )
    with pytest.raises(RuntimeError, match=r"expected updates .* in forward passes"):
        loss.backward()
    assert t._td["a_count"] == 4
