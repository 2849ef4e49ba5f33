# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The examples run, and what trains learns; ``make demo`` runs the longer one."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

import torchrl_vecnorm

EXAMPLES = Path(__file__).parents[1] / "examples"
#: That which is tested, for processes that are started elsewhere.
PACKAGE = str(Path(torchrl_vecnorm.__file__).parents[1])
pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="away from the source tree"
)


def run(name: str, *arguments) -> str:
    """What an example prints."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": PACKAGE},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def load(name: str):
    """An example as a module, without the seconds of a process of its own."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_workers():
    output = run("workers", "--workers", 2, "--steps", 100)
    steps = re.search(r"2 workers, one killed half-way: (\d+) steps", output)
    # All of the one, some of the other.
    assert 100 <= int(steps[1]) <= 200
    assert "scale" in output


def test_ppo_tensors(tmp_path):
    """One episode; its checkpoint has moments of every step."""
    example = load("ppo_tensors")
    example.train(4, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    counts = saved["observed"].count, saved["returned"]["stats.count"][0]
    for count, calls in zip(counts, (201, 200), strict=True):
        expected = example.PENDULUMS * sum(0.9999**i for i in range(calls))
        assert count.item() == pytest.approx(expected, rel=1e-12)
    assert -1900 < example.evaluate(tmp_path / "checkpoint.pt") < 0


@pytest.mark.slow
def test_ppo_tensors_learns(tmp_path):
    """To swing up, which random torques do not: about -1,200 an episode."""
    example = load("ppo_tensors")
    first, *_, last = example.train(16, tmp_path / "checkpoint.pt")
    assert last > first + 300
    assert example.evaluate(tmp_path / "checkpoint.pt") > first + 300


def test_atari_like_pixels():
    """What the transform makes of bytes, against plain torch."""
    example = load("atari_like")
    env = example.make_env(games=3)
    raw = example.TransformedEnv(
        example.Catch(3), example.CatFrames(4, dim=-3, in_keys=["pixels"])
    )
    seen = []
    for e in (env, raw):
        e.set_seed(0)
        seen.append(e.rollout(9, lambda td: td.set("action", torch.ones(3, dtype=int)),
                              break_when_any_done=False)["pixels"])  # fmt: skip
    normalised, pixels = seen
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 9, 4, 84, 84)
    # The first call has seen three frames, of which one pixel's statistics are these.
    first = pixels[:, 0].double()
    scale = first.std(0, correction=0).clamp_min(16)
    expected = ((first - first.mean(0)) / scale).float()
    torch.testing.assert_close(normalised[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_atari_like():
    example = load("atari_like")
    env = example.make_env(example.GAMES)
    ((seen, caught),) = example.train(env, example.FRAMES)
    assert seen == example.FRAMES and 0 <= caught <= 1
    assert env.transform[1].loc["pixels"].shape == (4, 84, 84)


def test_export_policy(tmp_path):
    """Actions of 1 or so, one observation 34,000 deviations from zero."""
    far = load("export_policy").main(tmp_path)
    assert far["torch.export"] < 2e-5
    assert far.get("onnx", 0.0) < 2e-5
    assert far["folded"] < 1e-2  # digits that a layer's float32 has not
    assert (tmp_path / "policy.pt2").exists()


def test_convert_statistics(tmp_path):
    """As rsl_rl has them, into a VecNorm, that learns, and back."""
    example = load("convert_statistics")
    x = torch.randn(5000, 3, dtype=torch.float64) * 2 + 30
    entries = {"_mean": x.mean(0)[None], "_var": x.var(0, correction=0)[None],
               "_std": x.std(0, correction=0)[None], "count": torch.tensor(5000)}  # fmt: skip
    model = {
        f"obs_normalizer.{k}": v.float() if v.ndim else v for k, v in entries.items()
    }
    checkpoint = {"actor_state_dict": model, "iter": 7}
    torch.save(checkpoint, tmp_path / "model_7.pt")
    arguments = tmp_path / "model_7.pt", None, None, tmp_path / "vecnorm.pt"
    transform = example.forth(*arguments)
    scale = transform.scale["observation"]
    torch.testing.assert_close(transform.loc["observation"].double(), x.mean(0))
    torch.testing.assert_close(scale.double(), x.std(0, correction=0))

    more = x + 20
    batch = TensorDict({"observation": more}, [5000])
    transform._step(batch, batch.clone())
    torch.save(transform.state_dict(), tmp_path / "vecnorm.pt")
    example.back(*arguments, tmp_path / "back.pt")
    new = torch.load(tmp_path / "back.pt")
    assert (
        new["iter"] == 7 and new["actor_state_dict"]["obs_normalizer.count"] == 10_000
    )
    both = torch.cat([x, more])
    for name, value in (("_mean", both.mean(0)), ("_std", both.std(0, correction=0))):
        got = new["actor_state_dict"][f"obs_normalizer.{name}"]
        assert got.dtype == torch.float32 and got.shape == (1, 3)
        torch.testing.assert_close(got[0].double(), value, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_ppo_stops_resumes_and_evaluates(tmp_path):
    """As the README says, with a Ctrl-C from the terminal: for all processes of it."""
    arguments = [sys.executable, "-u", EXAMPLES / "ppo.py", "--out", tmp_path]
    # A job in the background ignores it, and so would all that it starts.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        first = [process.stdout.readline() for _ in range(3)]
        assert all("frames" in line for line in first), first
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stdout.read()
    signal.signal(signal.SIGINT, ignored)
    assert process.returncode == 0, rest
    assert "--resume goes on" in rest and "Traceback" not in rest

    begin = torch.load(tmp_path / "ppo.pt")["frames"]
    assert begin >= 3 * 1024
    output = run("ppo", "--out", tmp_path, "--resume", "--frames", begin + 3 * 1024)
    saved = torch.load(tmp_path / "ppo.pt")
    assert saved["frames"] == begin + 3 * 1024
    # One call for each step of the four environments, and some resets on the way.
    counts = [v for k, v in saved["env"].items() if "_extra_state" in k and v]
    count = counts[0]["observation_count"].item()
    assert 0.8 * saved["frames"] < count < 1.5 * saved["frames"]
    returns = [float(r) for r in re.findall(r"return (\d+)", output)]
    assert returns[-1] > 2 * float(re.search(r"return (\d+)", first[0])[1])

    output = run("ppo", "--out", tmp_path, "--evaluate")
    assert float(re.search(r"mean return of 10: (\d+)", output)[1]) > 20


@pytest.mark.slow
def test_mjlab_ppo(tmp_path):
    pytest.importorskip("mjlab")
    arguments = ["--num-envs", 8, "--batches", 2, "--out", tmp_path]
    output = run("mjlab_ppo", *arguments)
    assert len(re.findall(r"reward of a step \d", output)) == 2
    saved = torch.load(tmp_path / "mjlab_ppo.pt")["env"]
    (state,) = (v for k, v in saved.items() if "_extra_state" in k and v)
    assert state["actor_sum"].shape == state["critic_sum"].shape == (5,)


@pytest.fixture
def torchrun(tmp_path):
    """Starts an example with some ranks; what is left of it is killed in the end."""
    started = []

    def start(ranks: int, *arguments) -> subprocess.Popen:
        command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [EXAMPLES / "torchrun_ppo.py", "--out", tmp_path, *arguments]
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            env=os.environ | {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_torchrun_ppo_goes_on_with_other_ranks(torchrun, tmp_path):
    """A rank is killed; the checkpoint counts once on three ranks."""
    path = tmp_path / "torchrun_ppo.pt"
    first = torchrun(2, "--iterations", 10_000)
    while not path.exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text()
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    _, errors = first.communicate(timeout=120)
    assert first.returncode != 0 and "SIGKILL" in errors
    done = torch.load(path)["iteration"]
    second = torchrun(3, "--iterations", done + 1, "--resume")
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"{(done + 1) * 51 * 240} observations seen" in output


@pytest.mark.slow
def test_ray_collectors():
    """Each has the samples of both, once: 60 of each an iteration, and a reset."""
    pytest.importorskip("ray", "2.60")
    output = run("ray_collectors", "--iterations", 2, "--frames", 60)
    counts = re.findall(r"counts \[(\d+), (\d+)\], together (\d+)", output)
    assert len(counts) == 2
    decayed = [sum(0.999**i for i in range(n)) for n in (61, 121)]
    for (one, other, both), alone in zip(counts, decayed, strict=True):
        assert one == other and int(both) == pytest.approx(2 * alone, abs=1)
    assert "all collectors have the same statistics: True" in output
