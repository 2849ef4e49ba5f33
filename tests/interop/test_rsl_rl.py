# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""rsl_rl's normalisers beside ours; `make interop` runs this with 5.5.1 and with 5.4.2."""

import copy
import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest
import rsl_rl.modules as theirs
import torch
from rsl_rl.env import VecEnv
from rsl_rl.models import mlp_model
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from worlds import (
    CLOSE,
    Points,
    assert_same,
    bad_states,
    draw,
    state_error,
    through_a_file,
)

from torchrl_vecnorm.interop import rsl_rl as ours

VERSION = importlib.metadata.version("rsl-rl-lib")
REDUCES = VERSION == "5.5.1"
Empirical, Discounted = (
    ours.EmpiricalNormalization,
    ours.EmpiricalDiscountedVariationNormalization,
)


@pytest.fixture
def installed(quiet):
    ours.install()
    yield
    ours.uninstall()


@pytest.mark.parametrize("shape", [1, 5, (2, 3), []], ids=str)
@pytest.mark.parametrize("until", [None, 2000])
def test_the_same_numbers(shape, until):
    norm, other = (
        Empirical(shape, until=until),
        theirs.EmpiricalNormalization(shape, until=until),
    )
    assert_same(norm.state_dict(), other.state_dict())
    generator = np.random.default_rng(0)
    features = (shape,) if isinstance(shape, int) else tuple(shape)
    for _ in range(700):
        x = draw(generator, *features)
        training = bool(generator.random() < 0.7)
        norm.train(training), other.train(training)
        if generator.random() < 0.5:
            norm.update(x), other.update(x)
        # Theirs is float32 throughout.
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(norm(x), other(x), **close)
        torch.testing.assert_close(norm(x[0]), other(x[0]), **close)
        torch.testing.assert_close(norm.inverse(x), other.inverse(x), **close)
    assert_same(norm.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-4)
    assert norm.count == other.count
    for name in ("mean", "std"):
        value = getattr(norm, name)
        torch.testing.assert_close(value, getattr(other, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [[], 1], ids=str)
def test_the_same_discounted_numbers(shape):
    norm, other = (
        kind(shape, gamma=0.9)
        for kind in (Discounted, theirs.EmpiricalDiscountedVariationNormalization)
    )
    assert_same(norm.state_dict(), other.state_dict())
    features = () if shape == [] else (shape,)
    torch.testing.assert_close(
        norm(torch.ones(64, *features)), torch.ones(64, *features)
    )
    other(torch.ones(64, *features))
    for i in range(500):
        reward = torch.randn(64, *features) + 2
        norm.train(i % 3 != 0), other.train(i % 3 != 0)
        torch.testing.assert_close(norm(reward), other(reward), rtol=1e-4, atol=1e-4)
    assert_same(norm.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.disc_avg.avg, other.disc_avg.avg)


def test_first_reward_is_copied():
    norm, other = Discounted([]), theirs.EmpiricalDiscountedVariationNormalization([])
    reward = torch.tensor([1.0, 2.0])
    norm(reward), other(reward)
    reward.zero_()
    assert norm.disc_avg.avg.tolist() == [1, 2]
    assert other.disc_avg.avg.tolist() == [0, 0]


def test_far_from_zero():
    """Theirs, float32 throughout, has lost the deviation."""
    norm, other = Empirical(1), theirs.EmpiricalNormalization(1)
    for _ in range(200):
        x = 1e5 + torch.randn(64, 1)
        norm.update(x), other.update(x)
    assert abs(norm.std.item() - 1) < 0.05


def test_values_that_are_not_finite():
    norm, other = Empirical(2), theirs.EmpiricalNormalization(2)
    x = torch.randn(50, 2) + 3
    bad = torch.tensor([[torch.nan, 4.0], [torch.inf, 2.0]])
    for each in (norm, other):
        each.update(x), each.update(bad)
    assert other(x)[:, 0].isnan().all() and norm(x).isfinite().all()
    torch.testing.assert_close(norm.mean[0], x[:, 0].mean())
    assert norm.count == 52


def test_a_batch_of_nothing():
    norm, other = Empirical(2), theirs.EmpiricalNormalization(2)
    before = copy.deepcopy(norm.state_dict())
    norm.update(torch.zeros(0, 2))
    assert_same(norm.state_dict(), before)
    other.update(torch.zeros(0, 2))
    assert other._mean.isnan().all()


# -------------------------------------------------------- who else writes to the buffers


def write(norm: torch.nn.Module) -> None:
    norm._mean.copy_(torch.tensor([[1.0, 2.0]]))
    norm._var.fill_(4)
    norm._std.fill_(2)


def assign(norm: torch.nn.Module) -> None:
    norm._mean = torch.tensor([[1.0, 2.0]])
    norm._var = torch.full((1, 2), 4.0)
    norm._std = torch.full((1, 2), 2.0)


def past_versions(norm: torch.nn.Module) -> None:
    """As collectives do, such as the broadcast of rsl_rl's start of a training."""
    values = {"_mean": torch.tensor([[1.0, 2.0]]), "_var": 4.0, "_std": 2.0}
    for name, tensor in norm.state_dict().items():
        if name in values:
            tensor.data[:] = values[name]


def over_buffers(norm: torch.nn.Module) -> None:
    values = {"_mean": torch.tensor([[1.0, 2.0]]), "_var": 4.0, "_std": 2.0}
    for name, tensor in torch.nn.Sequential(norm).named_buffers():
        if name[2:] in values:
            tensor.data[:] = values[name[2:]]


def load(norm: torch.nn.Module) -> None:
    other = theirs.EmpiricalNormalization(2)
    write(other)
    other.count.copy_(norm.count)
    norm.load_state_dict(other.state_dict())


@pytest.mark.parametrize("how", [write, assign, past_versions, over_buffers, load])
@pytest.mark.parametrize("has_data", [False, True])
def test_buffers_are_the_state(how, has_data):
    norm, other = Empirical(2), theirs.EmpiricalNormalization(2)
    x = torch.randn(20, 2)
    if has_data:
        norm.update(x), other.update(x)
    for each in (norm, other):
        each(x), how(each)
        torch.testing.assert_close(each(x), (x - torch.tensor([1, 2])) / (2 + 1e-2))
        each.update(x + 1)
    torch.testing.assert_close(norm(x), other(x), **CLOSE)
    assert_same(norm.state_dict(), other.state_dict(), **CLOSE)


def test_copies_and_devices():
    norm = Empirical(2)
    norm.update(torch.randn(20, 2) + 5)
    x = torch.randn(4, 2)
    norm(x)
    for other in (
        copy.deepcopy(norm),
        torch.load(pickled(norm), weights_only=False),
        copy.deepcopy(norm).half(),
        copy.deepcopy(norm).to(torch.float64),
    ):
        assert_same(other.state_dict(), norm.state_dict())
        torch.testing.assert_close(other(x), norm(x), rtol=0, atol=0)
        other.update(x)
        assert other.count == 24 and norm.count == 20
    assert torch.nn.Module.to(copy.deepcopy(norm), "meta")._mean.is_meta


def pickled(module):
    import io

    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_in_inference_mode_and_out_of_it():
    norm, other = Empirical(2), theirs.EmpiricalNormalization(2)
    for i in range(6):
        with torch.inference_mode(i % 2 == 0):
            x = torch.randn(20, 2)
            torch.testing.assert_close(norm(x), other(x), **CLOSE)
            norm.update(x), other.update(x)
    with torch.inference_mode():
        inside = Empirical(2)
        for _ in range(3):
            inside.update(x)
    torch.testing.assert_close(inside(x)[:, 0].mean(), torch.tensor(0.0), **CLOSE)


def test_gradients():
    norm = Empirical(2)
    norm.update(torch.randn(20, 2) * 3)
    x = torch.randn(5, 2, requires_grad=True)
    norm(x).sum().backward()
    torch.testing.assert_close(x.grad, (1 / (norm.std + 1e-2)).expand(5, 2))


# ------------------------------------------------------------------------------ states


def test_states_both_ways():
    norm, other = Empirical(3), theirs.EmpiricalNormalization(3)
    generator = np.random.default_rng(1)
    for _ in range(5):
        norm.update(draw(generator, 3)), other.update(draw(generator, 3))
    there, here = theirs.EmpiricalNormalization(3), Empirical(3)
    there.load_state_dict(through_a_file(norm.state_dict()))
    here.load_state_dict(through_a_file(other.state_dict()))
    for a, b in ((norm, there), (here, other)):
        assert_same(a.state_dict(), b.state_dict(), rtol=1e-6, atol=0)
        x = draw(generator, 3)
        torch.testing.assert_close(a(x), b(x), **CLOSE)
        a.update(x), b.update(x)
        torch.testing.assert_close(a(x), b(x), **CLOSE)


def test_deviation_is_the_root_of_the_variance():
    """Theirs divides by what `_std` says, 1 in a checkpoint that has none."""
    state = {
        "_mean": torch.zeros(1, 2),
        "_var": torch.full((1, 2), 9.0),
        "count": torch.tensor(5),
    }
    norm, other = Empirical(2), theirs.EmpiricalNormalization(2)
    for each in (norm, other):
        each.load_state_dict(state, strict=False)
    x = torch.full((1, 2), 3.0)
    torch.testing.assert_close(norm(x), x / 3.01)
    torch.testing.assert_close(other(x), x / 1.01)
    assert norm.std.tolist() == [3, 3]
    norm.load_state_dict(state)


def test_states_that_cannot_be():
    norm = Empirical(3)
    norm.update(torch.randn(9, 3))
    for state, entry in bad_states(norm.state_dict(), "_mean", "_var", "count"):
        state_error(norm, state, entry)


def test_what_is_no_tensor():
    norm = Empirical(3)
    for x in (np.zeros((2, 3)), [[1.0, 2.0, 3.0]], 1.0):
        for call in (norm, norm.update, norm.inverse, Discounted([])):
            with pytest.raises(
                TypeError, match=r"expected (x|y|rew) as a torch\.Tensor, got"
            ):
                call(x)
    with pytest.raises(ValueError, match=r"\[3\].*\[2, 4\]"):
        norm.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="eps"):
        Empirical(3, eps=0)
    assert norm.count == 0


# --------------------------------------------------------------------------- an agent


class World(VecEnv):
    def __init__(self):
        torch.manual_seed(0)
        self.points = Points()
        self.num_envs, self.num_actions = self.points.n, 1
        self.max_episode_length = Points.steps
        self.episode_length_buf = self.points.age
        self.device, self.cfg = "cpu", {}
        self.unwrapped, self.step_dt = self, 0.02

    def get_observations(self):
        return TensorDict({"policy": self.points.look()}, [self.num_envs])

    def step(self, actions):
        obs, reward, done = self.points.move(actions)
        return TensorDict({"policy": obs}, [self.num_envs]), reward, done, {}


def runner_of(world, folder, compiled=None) -> OnPolicyRunner:
    torch.manual_seed(0)
    model = {"class_name": "MLPModel", "hidden_dims": [16], "obs_normalization": True}
    gaussian = {"class_name": "GaussianDistribution"}
    config = {
        "num_steps_per_env": 16,
        "save_interval": 100,
        "obs_groups": {
            "actor": ["policy"],
            "critic": ["policy"],
            "rnd_state": ["policy"],
        },
        "algorithm": {
            "class_name": "PPO",
            "rnd_cfg": {
                "num_outputs": 1,
                "weight": 0.1,
                "predictor_hidden_dims": [8],
                "target_hidden_dims": [8],
                "state_normalization": True,
                "reward_normalization": True,
            },
        },
        "actor": {**model, "distribution_cfg": gaussian},
        "critic": model,
        "torch_compile_mode": compiled,
    }
    return OnPolicyRunner(world, config, log_dir=str(folder), device="cpu")


def normalizers(runner) -> list[torch.nn.Module]:
    return [runner.alg.actor.obs_normalizer, runner.alg.critic.obs_normalizer]


def test_install_and_uninstall(quiet):
    own = theirs.EmpiricalNormalization
    assert mlp_model.EmpiricalNormalization is own and own is not Empirical
    ours.install()
    try:
        assert mlp_model.EmpiricalNormalization is Empirical
        assert theirs.EmpiricalNormalization is Empirical
    finally:
        ours.uninstall()
    assert mlp_model.EmpiricalNormalization is own is theirs.EmpiricalNormalization


def test_training_and_its_checkpoints(tmp_path, quiet):
    runners = {}
    for name in ("ours", "theirs"):
        if name == "ours":
            ours.install()
        try:
            runners[name] = runner_of(World(), tmp_path / name)
        finally:
            ours.uninstall()
        runners[name].learn(6)
        runners[name].save(str(tmp_path / f"{name}.pt"))
    kinds = {k: type(normalizers(r)[0]) for k, r in runners.items()}
    assert kinds == {"ours": Empirical, "theirs": theirs.EmpiricalNormalization}
    rnd = runners["ours"].alg.rnd
    assert type(rnd.state_normalizer) is Empirical
    assert type(rnd.reward_normalizer) is Discounted
    for a, b in zip(*map(normalizers, runners.values()), strict=True):
        assert a.count == b.count == 6 * 16 * 64
        # The same world, but for rounding, which training enlarges.
        torch.testing.assert_close(a.mean[2], b.mean[2], rtol=0.02, atol=0)
    for name, other in (("ours", "theirs"), ("theirs", "ours")):
        if other == "ours":
            ours.install()
        try:
            resumed = runner_of(World(), tmp_path / f"{name} resumed")
        finally:
            ours.uninstall()
        resumed.load(str(tmp_path / f"{name}.pt"))
        pairs = zip(normalizers(runners[name]), normalizers(resumed), strict=True)
        for a, b in pairs:
            assert type(b) is kinds[other]
            assert_same(a.state_dict(), b.state_dict(), rtol=1e-6, atol=0)
        resumed.learn(1)


def test_a_checkpoint_loads_after_a_rollout(tmp_path, quiet):
    """Into a runner that has trained: theirs has made tensors in inference mode of it."""
    ours.install()
    try:
        runner = runner_of(World(), tmp_path)
    finally:
        ours.uninstall()
    other = runner_of(World(), tmp_path / "theirs")
    for each in (runner, other):
        each.learn(1)
        each.save(str(tmp_path / "checkpoint.pt"))
        if each is runner:
            each.load(str(tmp_path / "checkpoint.pt"))
        else:
            with pytest.raises(RuntimeError, match="inference"):
                each.load(str(tmp_path / "checkpoint.pt"))


def test_exports(tmp_path, installed):
    runner = runner_of(World(), tmp_path)
    runner.learn(2)
    policy = runner.get_inference_policy()
    obs = runner.env.get_observations()
    want = policy(obs)
    runner.export_policy_to_jit(str(tmp_path), "policy.pt")
    scripted = torch.jit.load(str(tmp_path / "policy.pt"))
    torch.testing.assert_close(scripted(obs["policy"]), want, **CLOSE)
    runner.export_policy_to_onnx(str(tmp_path), "policy.onnx")
    onnx = pytest.importorskip("onnx")
    nodes = [n.op_type for n in onnx.load(str(tmp_path / "policy.onnx")).graph.node]
    assert "Sub" in nodes and "Div" in nodes
    traced = torch.jit.trace(policy.obs_normalizer, obs["policy"])
    torch.testing.assert_close(
        traced(obs["policy"] + 1), policy.obs_normalizer(obs["policy"] + 1), **CLOSE
    )


@pytest.mark.parametrize("until", [None, 100])
def test_compiled(until):
    norm, other = Empirical(3, until=until), Empirical(3, until=until)
    options = {"backend": "aot_eager", "fullgraph": True}
    forward = torch.compile(norm, **options)
    update = torch.compile(norm.update, **options)
    for _ in range(4):
        x = torch.randn(50, 3) + 2
        update(x), other.update(x)
        for call in (forward, norm):
            torch.testing.assert_close(call(x), other(x), **CLOSE)
    assert norm.count == other.count == (100 if until else 200)


def test_training_compiled(tmp_path, installed):
    runner = runner_of(World(), tmp_path, compiled="default")
    runner.learn(2)
    assert normalizers(runner)[0].count == 2 * 16 * 64


# -------------------------------------------------------------------------- processes

RANK = """
import sys
import torch
import torch.distributed as dist
from torchrl_vecnorm.interop.rsl_rl import EmpiricalNormalization as Ours
from rsl_rl.modules import EmpiricalNormalization as Theirs

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
norms = {"ours": Ours(3), "theirs": Theirs(3)}
calls = []
reduce = dist.all_reduce
dist.all_reduce = lambda tensor, *a, **k: (calls.append(tensor.numel()), reduce(tensor, *a, **k))
counts = {}
for name, norm in norms.items():
    torch.manual_seed(rank)
    if name == "ours":  # as rsl_rl begins a training
        norm._mean.fill_(rank)
        norm(torch.zeros(1, 3))
        for tensor in norm.state_dict().values():
            dist.broadcast(tensor, 0)
        assert norm(torch.zeros(1, 3)).abs().max() == 0
    for step in range(5):
        norm.update(torch.randn(10 + 7 * rank + step, 3) * (rank + 1) + 100)
    counts[name] = len(calls)
    calls.clear()
assert counts == {"ours": 5, "theirs": 15}, counts
torch.testing.assert_close(
    dict(norms["ours"].state_dict()), dict(norms["theirs"].state_dict()), rtol=1e-4, atol=1e-4
)
# The same bits on both ranks, and those of one process that has seen it all.
mine = torch.cat([v.double().flatten() for v in norms["ours"].state_dict().values()])
both = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert torch.equal(*both)
parts = []
for r in range(2):
    torch.manual_seed(r)
    parts.append([torch.randn(10 + 7 * r + step, 3) * (r + 1) + 100 for step in range(5)])
rows = torch.cat([x for part in parts for x in part]).double()
assert norms["ours"].count == len(rows)
torch.testing.assert_close(norms["ours"].mean.double(), rows.mean(0), rtol=1e-6, atol=0)
torch.testing.assert_close(norms["ours"].std.double(), rows.std(0, correction=0), rtol=1e-5, atol=0)
# A rank without samples, and one with NaN, take part.
norms["ours"].update(torch.zeros(0, 3) if rank else torch.full((2, 3), torch.nan))
assert norms["ours"].count == len(rows) + 2 and norms["ours"].mean.isfinite().all()
dist.barrier()
"""


@pytest.mark.skipif(not REDUCES, reason="5.4.2 leaves each rank to itself")
def test_one_collective_joins_the_ranks():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
