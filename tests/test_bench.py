# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark: that it runs, shows who is missing, and judges goals as it should."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.envs import (
    Compose,
    RewardSum,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

for package in ("matplotlib", "rich", "tabulate", "tqdm"):
    pytest.importorskip(package)
pytest.importorskip("bench", reason="the source folder is not on the path")

from bench import (  # noqa: E402
    accuracy,
    env,
    goals,
    gpu_check,
    measure,
    model,
    peers,
    probe,
    race,
    report,
    run,
    sanitize,
)

ROOT = Path(__file__).parents[1]

TINY = replace(
    run.QUICK,
    sizes=((1, 8), (40, 4)),
    samples=(1, 8),
    features=(1, 4),
    pairs=((1, 8),),
    some=((8, 4),),
    steps=((1, 8),),
    pendulums=(5,),
    memory=((64, 4),),
    shapes=((1, 8),),
    special=((4, 3),),
    busy=((4, 3),),
    calls=3,
    rounds=1,
    seconds=1e-4,
)


def broken(xs, ys):
    raise ModuleNotFoundError("No module named 'nothing'")


@pytest.fixture
def quick(monkeypatch):
    """A run of seconds, over some peers and one that cannot be had."""
    some = peers.without("rsl_rl", "skrl", "stable-baselines3")  # slow to import
    some.append(peers.Peer("broken", broken, accuracy.Formula(), "nothing"))
    monkeypatch.setattr(peers, "PEERS", some)
    monkeypatch.setattr(run, "QUICK", TINY)


@pytest.mark.slow
def test_run(quick, tmp_path, capsys):
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["about"]["torch"] == torch.__version__
    assert saved["about"]["nothing"] == "not installed"
    sections = {r["section"] for r in saved["records"]}
    assert sections >= {"main", "pair", "step", "accuracy", "memory", "correctness"}
    assert sections >= {"shapes", "busy", "cold"}
    assert all("name" in r or r["section"] == "correctness" for r in saved["records"])
    text = (tmp_path / "README.md").read_text()
    for title in ("every shape", "are special", "busy machine", "Cold calls"):
        assert title in text
    for out in (text, capsys.readouterr().out):
        assert "not installed: No module named" in out
        assert "Expected more than 1 value per channel" in " ".join(out.split())
    assert "| VecNorm (ours)" in text.split("## Pendulums")[1].split("##")[0]
    assert "misses by" in text or "not measured" in text
    assert (tmp_path / "results.csv").read_text().count("\n") > 50
    for figure in ("growth.png", "bandwidth.png", "pendulums.png"):
        assert f"({figure})" in text and (tmp_path / figure).stat().st_size > 10_000


def test_a_wrong_result_fails(quick, monkeypatch, tmp_path, capsys):
    def wrong(x, state, *, decay, eps, out):
        out.copy_(x)

    monkeypatch.setattr(run.F, "update_", wrong)
    monkeypatch.setattr(run, "tasks", only("correctness", run.tasks))
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "WRONG" in (tmp_path / "README.md").read_text()


def test_unwritten_outputs_are_wrong(monkeypatch):
    monkeypatch.setattr(run.F, "update_", lambda *args, **kwargs: None)
    (record,) = run.correct(8, 4, torch.float32, "auto", "cpu")
    assert not record["passed"]


def only(section, tasks):
    return lambda *args: [t for t in tasks(*args) if t.section == section]


def test_a_task_that_fails_leaves_its_reason():
    def out_of_memory():
        raise RuntimeError("CUDA out of memory\nand so on")

    (record,) = run.Task("main", "1 × 1", out_of_memory).run()
    assert record["reason"] == "RuntimeError: CUDA out of memory"
    table = report.tables([record], "cpu")[-1]
    assert "CUDA out of memory" in table.markdown()


# ------------------------------------------------------------------------- goals


def timing(section, size, name, microseconds, **more):
    n, f = size
    record = {"section": section, "samples": n, "features": f, "name": name}
    more = {"dtype": "float32", "method": "eager", **more}
    return {**record, "microseconds": microseconds, **more}


def test_goals_on_the_cpu():
    at = (4096, 64)
    records = [
        timing("main", at, peers.COPY, 100.0),
        timing("main", at, peers.OPERATOR, 160.0),
        timing("main", at, peers.TORCHRL, 1600.0),
        timing("main", at, peers.BATCH_NORM, 480.0),
        timing("pair", (1, 8), peers.TRANSFORM, 10.0),
        timing("pair", (1, 8), peers.TORCHRL, 249.0),
        timing("step", (1, 8), env.IDENTITY, 50.0),
        timing("step", (1, 8), env.OURS, 58.0),
    ]
    beside = {"processes": 2, "quiet": 10.0}
    found = {g.what: g for g in goals.evaluate(records, "cpu")}
    cold, v2 = 2, 2 * len(goals.V2) + 1
    assert len(found) == 3 * len(goals.CPU) + len(race.sizes()) + v2 + cold + 3
    verdicts = [g.verdict for g in found.values()]
    assert verdicts[:3] == ["met", "met", "misses by 0.5 (14%)"]
    assert set(verdicts[3:-3]) == {"not measured"}
    assert verdicts[-3:] == ["misses by 0.1 (0%)", "met", "not measured"]
    more = [
        timing("pair", at, peers.STEP, 10.0),
        timing("pair", at, peers.OURS_V2, 12.0),
        timing("pair", at, peers.TORCHRL_V2, 96.0),
        timing("busy", at, peers.OPERATOR, 36.0, **beside),
        timing("shapes", (1, 28224), peers.TORCHRL, 31.0, kind="update"),
        timing("shapes", (1, 28224), peers.TRANSFORM, 10.0, kind="update"),
    ]
    found = {g.what: g.verdict for g in goals.evaluate(more, "cpu")}
    assert found["4096 × 64: update_ beside 2 busy processes / quiet"].startswith(
        "miss"
    )
    assert found["1 × 28224: VecNorm._call, times faster than torchrl's"] == "met"
    of_v2 = [
        v for what, v in found.items() if "VecNormV2._step" in what and "4096" in what
    ]
    assert of_v2 == ["met", "misses by 0.05 (4%)"]


def test_a_nan_misses_the_goal_of_precision():
    record = {"section": "precision", "name": peers.OPERATOR, "dtype": "float32"}
    records = [{**record, "ratio": 1e5, "scale": e} for e in (1e-6, math.nan, 1e-7)]
    assert goals.evaluate(records[:1], "cpu")[-1].met
    assert not goals.evaluate(records, "cpu")[-1].met


def test_the_table_in_the_readme():
    """It is what the committed results make of it."""
    text = report.README.read_text()
    folder = re.search(r"<!-- precision: from (.*) -->", text).group(1)
    results = report.README.parent / "bench" / "results" / folder / "results.json"
    records = json.loads(results.read_text())["records"]
    assert report.readme(text, records, folder) == text
    assert re.search(r"^\| +100,000 +\| +\de-\d\d +\|", text, re.MULTILINE)


def test_one_section_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUICK", replace(run.QUICK, precision=(((2, 3), (1, 3)),)))
    other = {"section": "memory", "name": "x", "of_x": 1.0, "samples": 1, "features": 1}
    old = {"section": "precision", "name": "x"}
    text = json.dumps({"about": {"device": "d"}, "records": [other, old]})
    (tmp_path / "results.json").write_text(text)
    arguments = ["--quick", "--only", "precision", "--out", str(tmp_path)]
    assert run.main([*arguments, "--device", "cpu"]) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["about"]["device"] == "d" and "precision measured" in saved["about"]
    first, *rest = saved["records"]
    assert first == other and old not in rest
    assert {r["calls"] for r in rest} == {1, 3}
    assert "Precision of y" in (tmp_path / "README.md").read_text()


def test_goals_on_a_gpu():
    at = (1_000_000, 256)
    records = []
    for section, dtype, ours in [
        ("main", "float32", 1.5),
        ("dtypes", "bfloat16", 1.79),
        ("dtypes", "float16", 1.81),
    ]:
        more = {"method": "graph", "dtype": dtype}
        records += [
            # The host's clock is not asked where there is a graph.
            timing(section, at, peers.COPY, 1.0, dtype=dtype),
            timing(section, at, peers.OPERATOR, 100.0, dtype=dtype),
            timing(section, at, peers.COPY, 1000.0, **more),
            timing(section, at, peers.OPERATOR, 1000.0 * ours, **more),
        ]
    records += [
        timing("pair", at, peers.TRANSFORM, 10.0),
        timing("pair", at, peers.TORCHRL, 29.0),
    ]
    found = {g.what: g.verdict for g in goals.evaluate(records, "cuda")}
    mine = [v for what, v in found.items() if "1000000" in what and "256" in what]
    assert mine == ["met", "met", "misses by 0.01 (1%)", "misses by 0.1 (3%)"]
    paths = [
        timing("paths", at, name, 3.0, method="graph", path=path, ran="two_kernels")
        for path in measure.PATHS
        for name in (peers.COPY, peers.OPERATOR)
    ]
    text = "\n".join(t.markdown() for t in report.tables(records + paths, "cuda"))
    assert "H200" in text and "CUDA kernels" in text
    assert "3.00 (1.00) two_kernels" in text  # where another was asked for


def test_an_error_is_no_number():
    records = [timing("main", (1, 8), peers.OPERATOR, None, reason="ValueError: no")]
    assert goals.find(records, section="main") is None


# ---------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda p: p.name)
def test_formulas(peer):
    """Each peer computes what its formula says, up to rounding."""
    if peer.formula is None or peer.name == peers.COMPILED_V2:
        pytest.skip("has none, or takes long to compile")
    try:
        found = accuracy.errors(peer.make, peer.formula, 1.0, 5, "cpu")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    for errors in found.values():
        assert errors["rounding"] < 1e-5
        assert errors["scale"] is None or errors["scale"] < 1e-5


def test_an_error_that_is_not_finite_shows():
    def wrong(xs, ys):
        return peers.Run(lambda: [xs[0] * torch.inf])

    found = accuracy.errors(wrong, accuracy.Formula(), 1.0, 1, "cpu")
    assert found[1]["rounding"] != found[1]["rounding"]
    assert report.number(found[1]["rounding"]) == "NaN"


# ----------------------------------------------------------------------- measure


def test_buffers_outgrow_the_cache():
    cache = 60 * 2**20
    for n_bytes in (2**21, 10**7, 2**28):
        sets = measure.buffer_sets(n_bytes, cache)
        assert sets >= 2 and sets * n_bytes > 3 * cache
    assert measure.buffer_sets(64, cache) == measure.MOST_BUFFERS


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux"
)
def test_memory_sees_a_temporary():
    x = torch.ones(1 << 24)
    assert measure.peak_memory(lambda: x + 1, "cpu") == pytest.approx(x.nbytes, rel=0.1)
    assert measure.peak_memory(lambda: x.add_(1), "cpu") < x.nbytes / 10


class FakeGraph:
    """Runs when it is captured, and not again."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeGraph.replays

    def elapsed_time(self, other):
        return 2.0 * (other.at - self.at)  # two milliseconds a replay


@pytest.fixture
def fake_gpu(monkeypatch):
    """What runs on a GPU runs on the CPU, and what asks for one gets an answer."""
    path = ["auto"]
    anything = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "Stream": lambda: anything,
        "current_stream": lambda: anything,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph: nullcontext(),
        "synchronize": lambda: None,
        "get_device_properties": lambda i: SimpleNamespace(L2_cache_size=1000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    random = measure.random
    monkeypatch.setattr(
        measure, "random", lambda n, f, t, device: random(n, f, t, "cpu")
    )
    paths = SimpleNamespace(
        cuda_path=lambda name: path.__setitem__(0, name), last_cuda_path=lambda: path[0]
    )
    monkeypatch.setattr(measure, "_C", paths)


def test_graphs(fake_gpu):
    records = run.timed(TINY, "main", [(40, 4)], "cuda")
    graph = {r["name"]: r for r in records if r["method"] == "graph"}
    assert len(records) > len(graph) >= 5
    for name in (peers.COPY, peers.OPERATOR, peers.TRANSFORM, peers.TORCHRL):
        assert graph[name]["buffers"] == 3
        assert graph[name]["microseconds"] == pytest.approx(2000 / 3)
        assert len(graph[name]["rounds"]) == 3 * TINY.rounds
    assert "reason" in graph[peers.TORCHRL_V2]


def test_pendulums_in_graphs(fake_gpu, monkeypatch, tmp_path):
    pendulums = env.pendulums
    monkeypatch.setattr(env, "pendulums", lambda n, device: pendulums(n, "cpu"))
    records = run.pendulum(TINY, 5, "cuda")
    graph = {r["name"]: r for r in records if r["method"] == "graph"}
    assert graph[env.OURS]["microseconds"] == graph[env.BARE]["microseconds"] == 2000
    assert graph[peers.TORCHRL_V2]["reason"] == measure.NO_GRAPH
    assert any(
        r["name"] == peers.TORCHRL_V2 and "microseconds" in r
        for r in records
        if r["method"] == "eager"
    )
    title = "Pendulums, in a CUDA graph"
    (graphs,) = (t for t in report.tables(records, "cuda") if t.title == title)
    (ours,) = (row for row in graphs.rows if row[0] == env.OURS)
    assert ours[1] == "0.00250 (100%)"  # 5 in two milliseconds
    assert report.figures(tmp_path, "no GPU", records, "cuda") == ["pendulums.png"]


def test_paths(fake_gpu):
    records = run.paths(TINY, 40, 4)
    ours = [r for r in records if r["name"] == peers.OPERATOR]
    assert [(r["path"], r["ran"]) for r in ours] == [(p, p) for p in measure.PATHS]
    assert {r["method"] for r in records} == {"graph"}
    assert measure.last_path() == "auto"
    (table,) = (t for t in report.tables(records, "cuda") if t.title == "CUDA kernels")
    assert [row[0] for row in table.rows] == [peers.COPY, *measure.PATHS]


# ---------------------------------------------------------------- the environments


def test_the_pendulum_is_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium")
    theirs = [gymnasium.make("Pendulum-v1").unwrapped for _ in range(3)]
    ours = env.Pendulum(3, "cpu")
    ours.set_seed(0)
    td = ours.reset()
    for i, other in enumerate(theirs):
        other.reset()
        other.state = ours.state[i].double().numpy()
    for _ in range(50):
        td["action"] = torch.empty(3, 1).uniform_(-3, 3)  # more than it can do
        after = ours.step(td)["next"]
        for i, other in enumerate(theirs):
            observation, reward, *_ = other.step(td["action"][i].double().numpy())
            for key, want in [("observation", observation), ("reward", [reward])]:
                want = torch.as_tensor(want, dtype=torch.float32)
                torch.testing.assert_close(after[key][i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [env.BARE, env.OURS])
def test_steps_of_pendulums_wait_for_no_gpu(name):
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
            )
            return function(*args, **(kwargs or {}))

    calls, reasons = env.pendulums(5, "cpu")
    assert not reasons
    with Waits():
        calls[name]()


@pytest.mark.slow
@pytest.mark.parametrize("make", [peers.ours_v2, peers.vecnorm])
def test_a_compiled_step_is_an_eager_one(make):
    """torchrl's whole step and reset as one graph, our transform in it."""
    found = {}
    for how in (env.EAGER, env.COMPILED):
        torch.manual_seed(0)
        torch._dynamo.reset()
        transform = make(env.KEYS)
        some = Compose(StepCounter(), RewardSum(), transform)
        whole = TransformedEnv(env.Pendulum(8, "cpu"), some)
        whole._torchrl_native_autoreset = True
        step = env.stepping(whole, how)
        for _ in range(10):
            last = step()["next"]
        loc = transform.loc
        found[how] = [last[k] for k in env.KEYS] + [loc[k] for k in env.KEYS]
    for eager, compiled in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_environments_are_environments():
    for one in (env.Still(5, 2, "cpu"), env.Pendulum(5, "cpu")):
        check_env_specs(one)


# ------------------------------------------------------------------------- model


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda gpu: gpu.name)
def test_the_plan_is_the_quickest_by_the_model(gpu):
    """Or close to it: the thresholds of the planner come from the model."""
    for n, f in (*goals.CUDA_SMALL, *goals.CUDA):
        for dtype in model.DTYPES:
            chosen = model.predict(n, f, dtype, gpu)
            assert chosen.microseconds > chosen.copy
            for path in model.PATHS[1:]:
                other = model.predict(n, f, dtype, gpu, path)
                if other is not None:
                    assert chosen.microseconds < 1.15 * other.microseconds, (
                        n,
                        f,
                        dtype,
                    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_model_knows_what_sizes_mean():
    predict = model.predict
    assert predict(1, 28224).blocks <= model.H200.processors
    assert predict(1, 28224).state > 0.8 * predict(1, 28224).megabytes
    assert predict(4096, 64).path == "cluster"
    assert predict(65536, 64).path == "resident"
    assert predict(1_000_000, 256).path == "two_kernels"
    assert predict(65536, 64, path="cluster") is None  # it does not fit
    assert predict(65536, 257).ratio > predict(65536, 256).ratio  # one value at a time
    assert predict(65536, 64, gpu=model.GPUS[1]).path == "resident"
    assert predict(4096, 64, gpu=model.GPUS[1]).cluster == 1  # no clusters on sm_80


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_model_says_that_it_is_one(capsys):
    assert model.main(["--gpu", "H200"]) == 0
    out = capsys.readouterr().out
    assert "not measured" in out and "65536 × 256 float32" in out


# --------------------------------------------------------------------- gpu-check


def test_no_gpu():
    ran = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "no CUDA GPU" in ran.stderr and len(ran.stderr.splitlines()) == 1


def test_steps_do_not_stop_each_other(monkeypatch, tmp_path):
    def crash(limit, folder, log):
        raise OSError("no compiler")

    def slow(limit, folder, log):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        finished = gpu_check.run(command, 0.1, {}, log)
        assert finished.code is None
        return gpu_check.judge_tests(tmp_path / "none.xml", finished)

    def fine(limit, folder, log):
        return gpu_check.PASSED, "a | b"

    monkeypatch.setattr(gpu_check, "build", crash)
    monkeypatch.setattr(gpu_check, "tests", slow)
    for name in ("probe", "figures", "kernels", "rest"):
        monkeypatch.setattr(gpu_check, name, fine)
    monkeypatch.setattr(gpu_check, "is_fresh", lambda: False)
    monkeypatch.setattr(gpu_check, "compute_sanitizer", lambda: None)
    outcomes = gpu_check.check(tmp_path, list(gpu_check.SECONDS))
    assert [o.step for o in outcomes] == list(gpu_check.SECONDS)
    states = {o.step: o.state for o in outcomes}
    for step, state in states.items():
        want = gpu_check.PASSED
        if step in gpu_check.TOOLS:
            want = gpu_check.DID_NOT_RUN
        elif step in ("build", "tests"):
            want = gpu_check.FAILED
        assert state == want, step
    text = (tmp_path / "gpu-check.md").read_text()
    assert "OSError: no compiler" in text and "out of time" in text


class FakeGpu:
    """Stands in for the processes of gpu-check: they end well, badly, or not at all."""

    def __init__(self, end: str, built: bool):
        self.end, self.built = end, built
        self.commands = []

    def __call__(self, command, limit, env, log):
        self.commands.append((command, limit))
        what = " ".join(map(str, command))
        if "--short" in what and not self.built:
            return gpu_check.Finished(1, "ImportError")
        code = {"well": 0, "badly": 1, "never": None}[self.end]
        if self.end != "never":
            if command[0] == "nvcc" and self.end == "well":
                Path(command[-1]).write_text("")
            if "bench.run" in what:
                folder = Path(command[command.index("--out") + 1])
                check = {"section": "correctness", "passed": self.end == "well"}
                ours = timing("main", (4096, 64), peers.OPERATOR, 9.0, method="graph")
                records = [check, ours]
                (folder / "results.json").write_text(
                    json.dumps({"about": {"device": "NVIDIA H200"}, "records": records})
                )
            for word in command:
                if str(word).startswith("--junitxml="):
                    bad = "<failure/>" if code else ""
                    Path(word.partition("=")[2]).write_text(
                        f'<suite><testcase classname="t" name="n">{bad}</testcase></suite>'
                    )
        errors = 0 if self.end == "well" else 3
        output = (
            f"probe: H200\n{sanitize.DONE}\n{errors} differences\n"
            f"RACECHECK SUMMARY: {errors} hazards displayed ({errors} errors, 0 warnings)\n"
            f"ERROR SUMMARY: {errors} errors\n"
        )
        return gpu_check.Finished(code, output)


@pytest.mark.parametrize("built", [True, False], ids=["prebuilt", "not built"])
@pytest.mark.parametrize("end", ["well", "badly", "never"])
def test_stages_on_a_fake_gpu(end, built, monkeypatch, tmp_path, tmp_path_factory):
    fake = FakeGpu(end, built)
    check = tmp_path_factory.mktemp("build") / "check"
    monkeypatch.setattr(gpu_check, "CHECK", check)
    which = shutil.which
    monkeypatch.setattr(
        shutil,
        "which",
        lambda name, **how: name if name == "nvcc" else which(name, **how),
    )
    monkeypatch.setattr(gpu_check, "run", fake)
    monkeypatch.setattr(gpu_check, "compute_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    outcomes = gpu_check.check(tmp_path, list(gpu_check.SECONDS))
    states = {o.step: o.state for o in outcomes}
    assert list(states) == list(gpu_check.SECONDS)
    compiled = any("build_ext" in command for command, _ in fake.commands)
    if built and end == "well":
        assert not compiled
    elif not built:
        assert compiled
    assert max(limit for _, limit in fake.commands) <= gpu_check.TOTAL
    # The sanitizers look at the kernels alone, where these were compiled.
    looked = [c for c, _ in fake.commands if c[0] == "compute-sanitizer"]
    assert len(looked) == len(gpu_check.TOOLS)
    assert all((str(check) in c) == (end == "well") for c in looked)
    for step, state in states.items():
        if end == "well":
            assert state == gpu_check.PASSED, step
        elif end == "never" and step in gpu_check.TOOLS:
            assert state == gpu_check.DID_NOT_RUN
        elif step != "initcheck":  # what it reports has to name our kernels
            assert state == gpu_check.FAILED, step
    text = (tmp_path / "gpu-check.md").read_text()
    assert all(f"| {step} |" in text for step in states)
    if end != "never":
        assert "| 4096 × 64 float32 auto | " in text  # predicted beside measured
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_stage_alone_leaves_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "run", FakeGpu("badly", True))
    gpu_check.check(tmp_path, ["tests"])
    monkeypatch.setattr(gpu_check, "run", FakeGpu("well", True))
    gpu_check.check(tmp_path, ["probe"])
    text = (tmp_path / "gpu-check.md").read_text()
    assert "| probe | passed" in text and "| tests | FAILED" in text


def test_what_has_no_time_left_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "TOTAL", 1)
    (outcome,) = gpu_check.check(tmp_path, ["probe"])
    assert outcome.state == gpu_check.DID_NOT_RUN and "no time" in outcome.detail


def test_output_is_in_the_log_before_the_end(tmp_path):
    log = tmp_path / "log"
    script = (
        "import sys, time; print('half a result', flush=True); "
        "seen = open(sys.argv[1]).read(); print('seen' if 'half' in seen else 'lost')"
    )
    finished = gpu_check.run([sys.executable, "-c", script, str(log)], 20, {}, log)
    assert finished.code == 0 and finished.output.split()[-1] == "seen"
    assert "exit status 0" in log.read_text()


def test_probe(monkeypatch, capsys):
    assert probe.probe("cpu", short=True) == probe.probe("cpu", short=False) == 0
    update = probe.F.update_

    def wrong(x, state):
        y = update(x, state)
        return y + 1 if x.dtype is torch.float16 and len(calls) % 2 else y

    calls = []
    monkeypatch.setattr(probe.F, "update_", lambda x, s: calls.append(0) or wrong(x, s))
    assert probe.probe("cpu", short=False) == 1
    assert "float16" in capsys.readouterr().out


def test_the_record_of_tests(tmp_path):
    file = tmp_path / "test_them.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip(reason='later')\n"
        "def test_skip(): pass\n"
    )
    xml = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(file), f"--junitxml={xml}"]
    finished = gpu_check.run(command, 60, {}, tmp_path / "log")
    state, detail = gpu_check.judge_tests(xml, finished)
    assert state == gpu_check.FAILED
    assert detail.startswith("1 passed, 1 failed, 1 skipped; skipped: later (1)")
    assert detail.endswith("test_them::test_bad")


OURS = "=========     at void vecnorm::cuda::update<float>(Params)+0x70"
TORCH = "=========     at void at::native::fill<float>(int)+0x70"
READ = "========= Uninitialized __global__ memory read of size 4 bytes"
COPY = "========= Host API uninitialized memory access"


@pytest.mark.parametrize(
    "tool,code,lines,state",
    [
        ("memcheck", 0, [sanitize.DONE, "========= ERROR SUMMARY: 0 errors"], "passed"),
        ("memcheck", 1, [sanitize.DONE, "========= ERROR SUMMARY: 2 errors"], "FAILED"),
        ("synccheck", 1, ["Traceback", "========= ERROR SUMMARY: 0 errors"], "FAILED"),
        ("memcheck", 255, ["========= Error: Device not supported"], "did not run"),
        ("memcheck", None, ["(33, 17): auto"], "did not run"),
        (
            "racecheck",
            0,
            [
                sanitize.DONE,
                "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            ],
            "passed",
        ),
        (
            "racecheck",
            1,
            [
                sanitize.DONE,
                "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)",
            ],
            "FAILED",
        ),
        (
            "initcheck",
            1,
            [READ, TORCH, sanitize.DONE, "========= ERROR SUMMARY: 1 error"],
            "passed",
        ),
        (
            "initcheck",
            1,
            [
                READ,
                TORCH,
                READ,
                OURS,
                sanitize.DONE,
                "========= ERROR SUMMARY: 2 errors",
            ],
            "FAILED",
        ),
        (
            "initcheck",
            1,
            [COPY, sanitize.DONE, "========= ERROR SUMMARY: 1 error"],
            "FAILED",
        ),
    ],
)
def test_what_a_sanitizer_says(tool, code, lines, state):
    finished = gpu_check.Finished(code, "\n".join(lines))
    assert gpu_check.judge_sanitizer(tool, finished, sanitize.DONE)[0] == state


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_what_a_sanitizer_looks_at_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "CHECK", tmp_path / "check")
    log = tmp_path / "log"
    built = gpu_check.build_check("9.0", 500, log)
    assert built == (gpu_check.PASSED, ""), log.read_text()
    assert "warning" not in log.read_text()
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [gpu_check.CHECK, "few"], capture_output=True, text=True, env=hidden
    )
    assert ran.returncode == 2 and "there is no GPU" in ran.stdout


def test_the_driver_of_the_sanitizer(capsys):
    """On the CPU it compares the CPU with itself, which it has to survive."""
    sanitize.drive("cpu")
    assert len(capsys.readouterr().out.splitlines()) > 20


@pytest.mark.slow
def test_race(monkeypatch, capsys):
    """Against itself, each in a process of its own."""
    monkeypatch.setattr(race, "sizes", lambda: [(2, 3)])
    records = race.race(ROOT, rounds=1, seconds=1e-4)
    assert {(r["build"], r["name"]) for r in records} == {
        (build, name) for build in (race.THIS, race.OTHER) for name in race.WHO
    }
    assert all(r["microseconds"] > 0 for r in records)
    monkeypatch.setattr(race, "race", lambda *args: records)
    assert run.main(["--against", str(ROOT)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
