# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""On a GPU: against the oracle, the CPU, graphs and compiled code."""

import pytest
import torch
import torch.distributed as dist
from common import PATIENCE, count, started, through_a_file
from samples import FLOATS, INTEGERS, LAYOUTS, SHAPES, data, op_samples
from tensordict import TensorDict
from test_ops import TOLERANCE, assert_same, check, clone
from test_returns import flags, rewards, step_both
from torch import multiprocessing as mp

from torchrl_vecnorm import _C, Moments, RunningNorm, VecNorm, _build, _ops
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.rule import Rule

pytestmark = pytest.mark.cuda
ids = {"ids": str}


def zeros(features) -> Moments:
    return Moments.zeros(features, device="cuda")


def test_has_kernels():
    """Not the composite implementation."""
    assert _build.has_cuda
    assert torch._C._dispatch_has_kernel_for_dispatch_key(
        "torchrl_vecnorm::update", "CUDA"
    )


@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS), **ids)
@pytest.mark.parametrize("samples,features", SHAPES, **ids)
def test_update(samples, features, dtype):
    state = zeros(features)
    for _ in range(3):
        check(data(samples, features, dtype).cuda(), state)


@pytest.mark.parametrize("shape", [(1_000_003, 3), (40, 100_003), (4096, 256)], **ids)
def test_large(shape):
    check(data(shape[:1], shape[1:]).cuda(), zeros(shape[1:]), calls=2)


PATHS = ("cluster", "resident", "two_kernels")


@pytest.fixture
def path(request):
    """Which kernels update takes, where they can run the keys."""
    _C.cuda_path(request.param)
    yield request.param
    _C.cuda_path("auto")


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (4096, 64), (4097, 17), (700, 235)], **ids)
def test_paths(shape, dtype, path):
    if path == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need sm_90")
    state = zeros(shape[1:])
    for _ in range(3):
        check(data(shape[:1], shape[1:], dtype).cuda(), state)
    # Before sm_80 a block has too little shared memory for some.
    if torch.cuda.get_device_capability() >= (8, 0):
        assert _C.last_cuda_path() == path


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_paths_leave_out(path):
    """Masked rows, and values that are not finite."""
    x = data((3000,), (40,)).cuda()
    mask = torch.rand(3000, device="cuda") < 0.3
    check(x, zeros([40]), mask=mask, calls=2)
    x[torch.rand_like(x) < 0.1] = float("nan")
    check(x, zeros([40]), calls=2)
    check(x, zeros([40]), mask=mask, calls=2)


@pytest.mark.parametrize("path", ["resident", "two_kernels"], indirect=True)
@pytest.mark.parametrize(
    "shape", [(1_000_003, 64), (400_000, 256), (2_000_001, 3)], **ids
)
def test_more_than_the_chip_holds(shape, path):
    check(data(shape[:1], shape[1:]).cuda(), zeros(shape[1:]), calls=2)
    assert _C.last_cuda_path() == path


def test_paths_agree_to_the_bit_on_integers():
    """Sums of small integers are exact, in whatever order."""
    x = torch.randint(-8, 8, (5000, 48), device="cuda").float()
    results = []
    try:
        for name in PATHS:
            _C.cuda_path(name)
            state = zeros([48])
            results.append([F.update_(x, state), *state])
    finally:
        _C.cuda_path("auto")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(700, 3), (700, 40), (50, 20, 6)], **ids)
def test_strides(layout, shape):
    x = layout(data(shape[:-1], shape[-1:]))
    strided = torch.empty_strided(x.shape, x.stride(), device="cuda").copy_(x)
    check(strided, zeros(shape[-1:]), calls=2)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned(offset):
    flat = data((64 * 16 + offset,), ()).cuda()
    check(flat[offset:].view(64, 16), zeros([16]), calls=2)


@pytest.mark.parametrize("features", [(1,), (3,), (70,)], **ids)
def test_mask(features):
    mask = (torch.rand(3000) < 0.3).cuda()
    check(data((3000,), features).cuda(), zeros(features), mask=mask, calls=2)


def test_samples_agree_with_the_cpu():
    for sample in op_samples():
        here = F.leaves_of(sample.states)
        there = F.leaves_of([clone(s).to("cuda") for s in sample.states])
        x = [v.cuda() for v in sample.x]
        mask = [m.cuda() for m in sample.mask]
        ours = _ops.update(sample.x, here, sample.mask, 0.9, 1.0, Rule(1e-4))
        theirs = _ops.update(x, there, mask, 0.9, 1.0, Rule(1e-4))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.cpu(), **TOLERANCE[a.dtype])
        for left, right in zip(here, there, strict=True):
            for a, b in zip(left, right, strict=True):
                torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-6)


EVERY_HALF = torch.arange(-(2**15), 2**15).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_converted_as_torch_does(dtype):
    """Every one of them to float, and floats of every size to them, bit for bit."""
    x = EVERY_HALF.view(dtype)
    # A zero comes out as +0.
    x = (x[x.isfinite()] + 0).cuda()[:, None].expand(-1, 8).contiguous()
    state = zeros([8])
    state.count.fill_(1)  # loc 0, scale 1: y = x
    for name, value in state._asdict().items():
        if name in ("ssq", "central"):
            value.fill_(1)
    y = F.normalize(x, state)
    assert torch.equal(y.view(torch.int16), x.view(torch.int16))
    # Rounding: x * 2^-k of all exponents is what torch makes of the float.
    for power in range(-30, 16):
        scale = zeros([8])
        scale.count.fill_(1)
        for name, value in scale._asdict().items():
            if name in ("ssq", "central"):
                value.fill_(4.0**power)
        want = (x.float() * torch.tensor(2.0**-power, device="cuda")).to(dtype)
        got = F.normalize(x, scale, eps=1e-30)
        assert torch.equal(got.view(torch.int16), want.view(torch.int16)), power


@pytest.mark.parametrize(
    "shape", [(1, 28224), (8, 28224), (64, 28224), (500, 5000), (4096, 28)], **ids
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_wide_features_and_images(shape, dtype):
    state = zeros(shape[1:])
    for _ in range(2):
        check(data(shape[:1], shape[1:], dtype).cuda(), state)


def test_more_than_two_billion_values():
    n = 2**31 // 64 + 1000
    if torch.cuda.mem_get_info()[0] < 16 * n * 64 // 2:
        pytest.skip("needs 17 GB of memory")
    x = torch.randn(n, 64, dtype=torch.bfloat16, device="cuda")
    x[-1] = 100
    state = zeros([64])
    y = F.update_(x, state)
    assert state.count.item() == n
    sums = sum(part.double().sum(0) for part in x.split(2**22))
    torch.testing.assert_close(state.sum, sums, rtol=1e-6, atol=1e-3)
    assert (y[-1] > 50).all()
    F.update_(x, state, out=x)
    assert (x[-1] > 50).all()


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_place_with_nan(path, dtype):
    x = data((3000,), (40,), dtype).cuda()
    x[torch.rand(3000, 40, device="cuda") < 0.01] = float("nan")
    one, other = zeros([40]), zeros([40])
    want = F.update_(x, one)
    F.update_(x, other, out=x)
    assert torch.equal(want.nan_to_num(-1), x.nan_to_num(-1))
    assert_same(one, other)


def test_33_keys():
    xs = [data((50,), (k % 5 + 1,)).cuda() for k in range(33)]
    states, alone = ([zeros(x.shape[1:]) for x in xs] for _ in range(2))
    ys = F.update_(xs, states)
    for x, y, s, a in zip(xs, ys, states, alone, strict=True):
        assert torch.equal(F.update_(x, a), y)
        assert_same(s, a)


def test_deterministic():
    x = data((200_000,), (64,)).cuda()
    results = []
    for _ in range(5):
        state = zeros([64])
        results.append([F.update_(x, state), F.update_(x, state), *state])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_is_allocated_beside_the_outputs():
    """After two calls; and 10,000 leave nothing behind."""
    x, state = data((4096,), (64,)).cuda(), zeros([64])
    y = torch.empty_like(x)
    for _ in range(2):
        F.update_(x, state, out=y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(10_000):
        F.update_(x, state, out=y)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for name in ("allocation.all.allocated", "allocated_bytes.all.current"):
        assert after[name] == before[name], name


def test_many_states_leave_nothing_behind():
    x = data((64,), (8,)).cuda()

    def some(n):
        for _ in range(n):
            state = zeros([8])
            for _ in range(3):
                F.update_(x, state)

    some(50)
    before = torch.cuda.memory_allocated()
    some(500)
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_frozen_call_moves_nothing():
    t = VecNorm(["observation"], decay=1)
    t(batch())
    leaves = dict(t._td.items())
    frozen = t.frozen_copy()
    frozen(batch().cpu())
    t.eval()(batch().cpu())
    assert all(t._td[key] is leaf for key, leaf in leaves.items())
    assert all(leaf.is_cuda for leaf in leaves.values())


def captures_first(results):
    """In a process that has run no kernel of ours."""
    x, state = torch.randn(64, 8, device="cuda"), zeros([8])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.normalize(x, state)
        back = F.denormalize(y, state)
    graph.replay()
    results.put(torch.equal(y, x) and torch.equal(back, x))


def test_a_capture_may_come_first():
    context = mp.get_context("spawn")
    results = context.Queue()
    with started(context, captures_first, [(results,)]):
        assert results.get(timeout=PATIENCE)


def test_nothing_reads_the_host():
    x, state = data((4096,), (64,)).cuda(), zeros([64])
    F.update_(x, state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        F.update_(x, state, mask=x[:, 0] > 3)
        F.normalize(x, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch() -> TensorDict:
    return TensorDict(
        {"observation": torch.randn(512, 17), "reward": torch.randn(512, 1)}, [512]
    ).cuda()


def test_graph():
    """1,000 replays give what 1,000 calls give, to the bit."""
    eager, captured = VecNorm(), VecNorm()
    td, static = batch(), batch()
    source = td.clone()
    static.copy_(source)
    for t, d in ((eager, td), (captured, static)):
        t(d.copy_(source))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured(static.clone())
    # Capturing records, it does not run.
    noise = torch.randn(512, 17, device="cuda")
    for i in range(1000):
        source["observation"] = noise * (i % 7)
        static.copy_(source)
        graph.replay()
        want = eager(source.clone())
    for key in want.keys():
        assert torch.equal(out[key], want[key])
    for key in eager._td.keys():
        assert torch.equal(eager._td[key], captured._td[key])


def test_streams():
    """Each state has a workspace of its own."""
    x = data((65536,), (64,)).cuda()
    alone = zeros([64])
    want = F.update_(x, alone)
    streams = [torch.cuda.Stream() for _ in range(4)]
    states = [zeros([64]) for _ in streams]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for state in states:
            for leaf in state:
                leaf.zero_()
        torch.cuda.synchronize()
        for stream, state in zip(streams, states, strict=True):
            with torch.cuda.stream(stream):
                results.append(F.update_(x, state))
        torch.cuda.synchronize()
    assert all(torch.equal(want, y) for y in results)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(mode):
    eager, other = VecNorm(), VecNorm()
    source = batch()
    eager(source.clone()), other(source.clone())
    compiled = torch.compile(other, fullgraph=True, mode=mode)
    for _ in range(4):
        source = batch()
        want, got = eager(source.clone()), compiled(source.clone())
        for key in want.keys():
            torch.testing.assert_close(want[key], got[key])


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile_functional_again_and_again(mode):
    """States that are born anew, as torch.compile's own graphs have them."""

    def fresh(x):
        state = F.Moments(*(torch.zeros_like(leaf) for leaf in zeros([8])))
        return F.update_(x, state), state.count

    compiled = torch.compile(fresh, mode=mode)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(300, 8, device="cuda")
        y, count = (t.clone() for t in compiled(x))
        want = F.update_(x, zeros([8]))
        torch.testing.assert_close(y, want)
        assert count.item() == 300


def test_compiled_before_any_eager_call():
    """A first call that is compiled: its statistics are those of the graph, not of its pool."""
    eager, other = VecNorm(), VecNorm()
    compiled = torch.compile(other)
    for _ in range(4):
        source = batch()
        want, got = eager(source.clone()), compiled(source.clone())
        for key in want.keys():
            torch.testing.assert_close(want[key], got[key])


def test_resident_beside_a_long_kernel():
    """A grid whose blocks wait for each other gets its processors in the end."""
    x, state = data((65536,), (64,)).cuda(), zeros([64])
    want = F.update_(x, zeros([64]))
    other = torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        a = torch.randn(8192, 8192, device="cuda")
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
    y = F.update_(x, state)
    torch.cuda.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_one_state_on_two_streams(path):
    """In turn: its workspace goes along."""
    x, state, alone = data((20000,), (64,)).cuda(), zeros([64]), zeros([64])
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                F.update_(x, state)
            torch.cuda.current_stream().wait_stream(stream)
        F.update_(x, alone), F.update_(x, alone)
    torch.cuda.synchronize()
    assert_same(state, alone)


def test_gradients():
    x, state = data((300,), (5,)).cuda().requires_grad_(), zeros([5])
    F.update_(x, state).sum().backward()
    _, scale = F.loc_scale(state)
    torch.testing.assert_close(x.grad, (1 / scale).float().expand_as(x))


def test_the_state_follows():
    t = VecNorm()
    t(batch().cpu())
    t(batch())
    assert t._td["observation_sum"].is_cuda
    assert t._td["observation_count"].item() == pytest.approx(1024, rel=1e-4)
    t.to("cpu")
    assert t._td["observation_sum"].device.type == "cpu"


def test_a_checkpoint_of_the_cpu_goes_on_here():
    source, t = VecNorm(["observation"], decay=1), VecNorm(["observation"], decay=1)
    source(batch().cpu())
    t.load_state_dict(through_a_file(source.state_dict()))
    for n in range(2, 6):
        t(batch())
        assert count(t) == 512 * n


def test_keys_on_two_devices():
    t = VecNorm(["observation", "reward"], decay=1)
    t(batch().cpu())
    for n in range(2, 6):
        td = batch()
        td = TensorDict(
            {"observation": td["observation"], "reward": td["reward"].cpu()}, [512]
        )
        t(td)
        assert count(t) == count(t, "reward") == 512 * n
        assert td["observation"].is_cuda and not td["reward"].is_cuda


def test_a_frozen_copy_on_the_cpu_follows():
    t = VecNorm(["observation"], decay=1)
    t(batch())
    frozen = t.frozen_copy()
    for _ in range(3):
        frozen(batch().cpu())
        td = batch()
        t(td.apply(lambda x: x + 5))
        assert torch.equal(frozen.loc["observation"].cpu(), t.loc["observation"].cpu())


def test_shared_statistics_stay_on_the_cpu():
    source = VecNorm(["observation"])
    source(batch().cpu())
    shared = source._td.clone().share_memory_()
    t = VecNorm(["observation"], shared_td=shared)
    td = batch()
    y = t(td.clone())["observation"]
    assert y.is_cuda and t._td["observation_sum"].device.type == "cpu"
    want = source(td.cpu())["observation"]
    torch.testing.assert_close(y.cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    x = data((300,), (5,)).to("cuda:1")
    check(x, Moments.zeros([5], device="cuda:1"))


# --------------------------------------------------------------------------- returns


@pytest.mark.parametrize("clear", ["after", "before"])
@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS), **ids)
@pytest.mark.parametrize(
    "envs,features",
    [(1, ()), (4096, ()), (4097, (1,)), (700, (3,)), (300_000, (2,))],
    **ids,
)
def test_returns(envs, features, dtype, clear):
    """In one block, and in more."""
    x, done = rewards((envs,), features, dtype).cuda(), flags(envs).cuda()
    step_both(x, done, clear=clear)
    mask = flags(envs, 0.7).cuda()
    step_both(x, done, mask, clear=clear, returns_dtype=torch.float32)


def test_returns_leave_out():
    for envs in (3000, 30_000):
        x = rewards((envs,), (), spoiled=0.05).cuda()
        step_both(x, flags(envs).cuda(), flags(envs, 0.7).cuda())


@pytest.mark.parametrize("envs", [4096, 100_000])
def test_returns_in_a_graph(envs):
    """Replays give what calls give, to the bit, and nothing reads the host."""
    x, done = rewards((envs,), ()).cuda(), flags(envs).cuda()
    states = [zeros(()) for _ in range(2)]
    returns = [torch.zeros(envs, dtype=torch.float64, device="cuda") for _ in states]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state, of in zip(states, returns, strict=True):
            F.scale_returns_(x, done, of, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.scale_returns_(x, done, returns[0], states[0])
    for _ in range(100):
        x.copy_(torch.randn_like(x))
        graph.replay()
        want = F.scale_returns_(x, done, returns[1], states[1])
    assert torch.equal(y, want) and torch.equal(*returns)
    assert_same(*states)


# ------------------------------------------------------------------ several processes


def test_a_group_of_one_rank_in_a_graph(tmp_path):
    """With NCCL: replays give what calls give, and these what calls without it give."""
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1
    )
    try:
        x = torch.randn(512, 17, dtype=torch.float64, device="cuda")
        alone, eager, captured = (
            RunningNorm(17, group=group, device="cuda")
            for group in (None, "world", "world")
        )
        for norm in (alone, eager, captured):
            norm(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = captured(x)
        for _ in range(100):
            x.copy_(torch.randn_like(x))
            graph.replay()
            want = eager(x)
            torch.testing.assert_close(want, alone(x))
        assert torch.equal(y, want)
        assert torch.equal(captured.mean, eager.mean)
        assert torch.equal(captured.count, eager.count)
        torch.testing.assert_close(eager.var, alone.var, rtol=1e-12, atol=0)
    finally:
        dist.destroy_process_group()


def is_refused(queue, results):
    try:
        VecNorm(["o"], shared_td=queue.get(timeout=PATIENCE))
        results.put("taken")
    except RuntimeError as error:
        results.put(str(error))


def test_statistics_on_a_gpu_are_one_processs_own():
    td = TensorDict(zeros([2])._asdict(), batch_size=[])
    td = TensorDict({f"o_{name}": leaf for name, leaf in td.items()})
    first, second = (VecNorm(["o"], shared_td=td, decay=1) for _ in range(2))
    for t in (first, second):
        t(TensorDict(o=torch.ones(2, device="cuda")))
    assert td["o_count"].item() == 2
    context = mp.get_context("spawn")
    queue, results = context.Queue(), context.Queue()
    with started(context, is_refused, [(queue, results)]):
        queue.put(td)
        assert "expected CPU tensors" in results.get(timeout=PATIENCE)
    with pytest.raises(RuntimeError, match="expected CPU tensors"):
        context.Process(target=count_alone, args=(first, results)).start()


def count_alone(t, results):
    t(TensorDict(o=torch.ones(2, device="cuda")))
    results.put(count(t, "o"))


def test_a_private_transform_is_sent_as_a_copy():
    t = VecNorm(["o"], decay=1)
    t(TensorDict(o=torch.ones(2, device="cuda")))
    context = mp.get_context("spawn")
    results = context.Queue()
    with started(context, count_alone, [(t, results)]):
        assert results.get(timeout=PATIENCE) == 2
    assert count(t, "o") == 1
