# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Statistics read and written: torchrl's and gymnasium's classes, files, and bad input.

Other libraries are beside this in ``interop/test_round_trips.py``.
"""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import VecNorm as TheirV1
from torchrl.envs import VecNormV2 as TheirV2
from torchrl.modules import PopArtValueNorm, RunningValueNorm

from torchrl_vecnorm import RunningNorm, VecNorm, VecNormV2, interop
from torchrl_vecnorm import functional as F
from torchrl_vecnorm.interop.conversions import FORMATS

RATIOS = [1.0, 100.0, 1e4]


def draw(n: int, ratio: float, *features: int) -> torch.Tensor:
    return (torch.randn(n, *features, dtype=torch.float64) + ratio) * 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------- torchrl's transforms


def transform(cls, decay: float = 0.99, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        options = {"new_api": False, **options} if cls is TheirV1 else options
        return cls(in_keys=["obs", ("agents", "pos")], decay=decay, **options)


def call(t, obs: torch.Tensor, pos: torch.Tensor) -> TensorDict:
    td = TensorDict({"obs": obs, "agents": {"pos": pos}}, batch_size=obs.shape[:1])
    return t._step(td, td.clone())


def trained(cls, ratio: float, decay: float = 0.99, calls: int = 4, **options):
    t = transform(cls, decay, **options)
    if cls is TheirV2 or cls is VecNormV2:
        start = TensorDict({"obs": torch.zeros(300, 3).double(),
                            "agents": {"pos": torch.zeros(300, 2).double()}}, [300])  # fmt: skip
        t._maybe_stateful_init(start) if cls is TheirV2 else None
    for _ in range(calls):
        call(t, draw(300, ratio, 3), draw(300, -ratio, 2))
    return t


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("cls", [TheirV1, VecNorm], ids=["theirs", "ours"])
def test_v1(cls, ratio):
    t = trained(cls, ratio)
    x = {"obs": draw(50, ratio, 3), ("agents", "pos"): draw(50, -ratio, 2)}
    frozen = t.freeze()
    want = call(frozen, *x.values())
    for key, name in (("obs", "obs"), (("agents", "pos"), "pos")):
        for source in (t, t.get_extra_state()):
            carried = interop.read(source, key=name)
            y = carried.running_norm().eval()(x[key])
            # Differences of float64 sums.
            torch.testing.assert_close(
                y, want[key], rtol=1e-14 * ratio**2 + 1e-9, atol=1e-14 * ratio**2 + 1e-9
            )
        assert torch.equal(
            carried.moments.count, t.get_extra_state()["obs_count"].double()
        )
        # Into another, which knows another state.
        other = trained(cls, 0.0)
        call(other, *x.values())
        interop.write(carried, like=other, key=name)
        got = call(other.freeze(), *x.values())
        torch.testing.assert_close(got[key], want[key], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got["obs"], want["obs"])  # the other key is what it was


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("cls", [TheirV2, VecNormV2], ids=["theirs", "ours"])
def test_v2(cls, decay, ratio):
    # 200 calls: what its scale lacks before is gone.
    t = trained(
        cls, ratio, decay, calls=200 if decay < 1 else 4, reduce_batch_dims=True
    )
    x = (draw(300, ratio, 3), draw(300, -ratio, 2))
    want = call(t.freeze(), *x)["obs"]
    close = {"rtol": 2e-15 * ratio**2 + 1e-9, "atol": 2e-15 * ratio**2 + 1e-9}
    for source, options in ((t, {}), (t.get_extra_state(), {"decay": decay})):
        carried = interop.read(source, key="obs", **options)
        y = carried.running_norm().eval()(x[0])
        torch.testing.assert_close(y, want, **close)
    other = trained(cls, 0.0, decay, reduce_batch_dims=True)
    interop.write(carried, like=other, key="obs")
    got = call(other.freeze(), *x)["obs"]
    torch.testing.assert_close(got, want, **close)
    with pytest.raises(ValueError, match="pass decay="):
        interop.read(t.get_extra_state(), key="obs")


def test_what_v2_divides_by_is_doubted():
    """N(100, 1) at decay 0.99: torchrl's scale is 36 times the deviation after 200 calls."""
    t = transform(TheirV2, 0.99, reduce_batch_dims=False)
    rows = torch.randn(200, 4, 3, dtype=torch.float64) + 100
    for row in rows:
        td = TensorDict({"obs": row, "agents": {"pos": row}}, [4])
        t._maybe_stateful_init(td) if t._loc is None else None
        t._step(td, td.clone())
    with pytest.warns(UserWarning, match="times the deviation"):
        carried = interop.read(t, key="obs")
    # Ours is what it should be.
    scale = F.loc_scale(carried.moments)[1]
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0.3, atol=0)
    assert t.scale["obs"].mean() > 20


def test_from_theirs_to_ours_and_back():
    """A checkpoint of an environment, whichever class wrote it."""
    theirs = trained(TheirV1, 3.0)
    carried = interop.read(
        {"transforms.0._extra_state": theirs.get_extra_state()}, key="obs"
    )
    ours = trained(VecNorm, 0.0)
    with pytest.warns(
        UserWarning, match="eps_mode='std_floor' where it was 'var_floor'"
    ):
        interop.write(carried, like=ours, key="obs")
    torch.testing.assert_close(ours.loc["obs"], theirs.loc["obs"])
    torch.testing.assert_close(ours.scale["obs"], theirs.scale["obs"])
    with pytest.warns(UserWarning, match="outputs will differ"):
        interop.write(interop.read(ours, key="obs"), like=theirs, key="obs")


def test_before_any_data():
    for cls in (VecNorm, TheirV1):
        with pytest.raises(ValueError, match="expected statistics of 'obs', got none"):
            interop.read(transform(cls), key="obs")
        # Of two keys one alone cannot be loaded.
        with pytest.raises(ValueError, match="that has seen data"):
            interop.write(F.moments(torch.randn(9, 3)), like=transform(cls), key="obs")
    one = VecNorm(in_keys=["obs"], decay=0.9)
    interop.write(F.moments(torch.arange(6.0).reshape(2, 3)), like=one)
    assert one.loc["obs"].tolist() == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("cls", [PopArtValueNorm, RunningValueNorm])
def test_values(cls):
    """In float64, which they take too, at any distance from zero."""
    for ratio in RATIOS:
        norm = cls(shape=3).double()
        for _ in range(5):
            norm.update(draw(300, ratio, 3))
        x = draw(50, ratio, 3)
        carried = interop.read(norm)
        close = {"rtol": 1e-13 * ratio**2 + 1e-9, "atol": 1e-13 * ratio**2 + 1e-9}
        torch.testing.assert_close(carried.normalize(x), norm.normalize(x), **close)
        back = interop.write(carried, like=cls(shape=3).double())
        torch.testing.assert_close(back.normalize(x), norm.normalize(x), **close)


# ----------------------------------------------------------------------------- our own


def test_running_norm():
    policy = nn.Sequential(
        RunningNorm({"a": 3, "b": (2, 2)}, decay=0.9, clip=4.0), nn.Identity()
    )
    for _ in range(3):
        policy[0]({"a": torch.randn(9, 3), "b": torch.randn(9, 2, 2) + 5})
    carried = interop.read(policy, key="b")
    norm = carried.running_norm(decay=0.9)
    x = torch.randn(7, 2, 2) + 5
    want = policy[0].normalize({"a": torch.zeros(3), "b": x})["b"]
    torch.testing.assert_close(norm.normalize(x), want, rtol=0, atol=0)
    torch.testing.assert_close(norm.count, policy[0].count["b"])
    # A state dict, of which the other entries stay as they are.
    state = policy.state_dict()
    with pytest.warns(UserWarning, match="clip=None where it was 4.0"):
        new = interop.write(carried, like=state, key="b")
    assert list(new) == list(state)
    assert all(torch.equal(new[k], state[k]) for k in state)
    assert interop.read(new, key="0.stats.b").rule() == {
        "eps": 1e-4, "eps_mode": "std_floor", "clip": None, "center": True}  # fmt: skip


def test_of_one_number():
    """Returns have statistics of no dimensions."""
    carried = interop.read({"mean": 3.0, "var": 4.0, "count": 8}, "gymnasium")
    assert carried.moments.sum.shape == () and carried.moments.sum == 24
    x = torch.tensor([3.0, 5.0])
    torch.testing.assert_close(
        carried.running_norm().eval()(x), torch.tensor([0.0, 1.0])
    )


def test_every_format_has_entries():
    """What is written without anything to be like is what is read."""
    moments = F.moments(draw(200, 3.0, 4))
    for of in FORMATS:
        made = interop.write(moments, of.library, decay=0.99)
        if of.library.startswith("torchrl.VecNorm"):
            made = {of.name(field, "obs"): value for field, value in made.items()}
        if of.library == "rllib":
            made = {"running_stats": [made]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = 200 if of.library == "d3rlpy" else None
            carried = interop.read(made, of.library, decay=0.99, count=count)
        for a, b in zip(carried.moments.mean_var(), moments.mean_var(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        # Written again, it is the same.
        again = interop.write(carried.moments, of.library, decay=0.99)
        for a, b in zip(again.values(), made.values() if of.library != "rllib" else
                        made["running_stats"][0].values(), strict=True):  # fmt: skip
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=2e-7, atol=2e-7)


# ------------------------------------------------------------------------------- gymnasium


class World(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return np.float32(np.random.normal(size=3) + 5), {}

    def step(self, action):
        return np.float32(np.random.normal(size=3) + 5), 1.0, False, False, {}


def test_gymnasium_wrappers():
    np.random.seed(0)
    env = gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(World()))
    env.reset()
    for _ in range(50):
        env.step(0)
    rewards, observations = env, env.env
    carried = interop.read(observations)
    assert carried.rule() == {
        "eps": 1e-8,
        "eps_mode": "var_add",
        "clip": None,
        "center": True,
    }
    observations.update_running_mean = False
    x = np.random.normal(size=3) + 5
    y = carried.normalize(torch.from_numpy(x))
    np.testing.assert_allclose(y, observations.observation(x), rtol=1e-6)
    scaled = interop.read(rewards)
    assert not scaled.center
    y = scaled.normalize(torch.tensor(2.0, dtype=torch.float64))
    want = 2.0 / np.sqrt(rewards.return_rms.var + rewards.epsilon)
    np.testing.assert_allclose(y, want, rtol=1e-12)


# ----------------------------------------------------------------------------------- files


def test_files_of_torch(tmp_path):
    norm = RunningNorm(3)
    norm(torch.randn(9, 3))
    torch.save({"model": norm.state_dict(), "frames": np.float64(3)}, tmp_path / "a.pt")
    carried = interop.read(tmp_path / "a.pt")
    for a, b in zip(carried.moments, interop.read(norm).moments, strict=True):
        assert torch.equal(a, b)
    torch.save(norm, tmp_path / "whole.pt")  # would run what is in it
    with pytest.raises(ValueError, match=r"whole\.pt.*RunningNorm"):
        interop.read(str(tmp_path / "whole.pt"))


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """By the format's own description."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        data = array.tobytes()
        header[name] = {"dtype": {"float32": "F32", "int64": "I64"}[str(array.dtype)],
                        "shape": list(array.shape),
                        "data_offsets": [len(body), len(body) + len(data)]}  # fmt: skip
        body += data
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def lerobot_file(tmp_path, **other):
    stats = {
        "observation.state.mean": np.float32([1, 2, 3]),
        "observation.state.std": np.float32([1, 2, 4]),
        "observation.state.count": np.int64([50]),
        **other,
    }
    file = tmp_path / "normalizer.safetensors"
    file.write_bytes(safetensors(stats))
    return file


def test_safetensors(tmp_path):
    carried = interop.read(lerobot_file(tmp_path))
    mean, var = carried.moments.mean_var()
    assert mean.tolist() == [1, 2, 3] and var.tolist() == [1, 4, 16]
    assert carried.moments.count == 50 and carried.eps_mode == "std_add"


def test_safetensors_that_are_cut(tmp_path):
    data = lerobot_file(tmp_path).read_bytes()
    for length in (0, 4, 8, 40, len(data) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            interop.read(cut)


def test_pickles(tmp_path):
    np.random.seed(0)
    env = gym.wrappers.NormalizeObservation(World())
    for _ in range(9):
        env.reset()
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "rms.pkl").write_bytes(pickle.dumps(env.obs_rms, protocol))
        carried = interop.read(tmp_path / "rms.pkl")
        for a, b in zip(carried.moments, interop.read(env).moments, strict=True):
            assert torch.equal(a, b)


ran = []


class Runs:
    """What a pickle calls when it is loaded. Here nothing that would harm."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (Runs(ran.append, 1), "builtins.getattr"),
        (Runs(print, "it ran"), "builtins.print"),
        (Runs(os.getcwd), "posix.getcwd|nt.getcwd"),
        (Runs(eval, "ran.append(2)"), "builtins.eval"),
        ({"mean": Runs(print, "it ran")}, "builtins.print"),
        (nn.Linear(1, 1), "torch.nn.*Linear"),
        (Runs(torch.load, "file"), "torch.serialization.load"),
        (Runs(np.load, "file"), "numpy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pickles_are_not_run(held, name, tmp_path, capsys):
    file = tmp_path / "held.pkl"
    for protocol in (0, 2, 5):
        file.write_bytes(pickle.dumps(held, protocol))
        with pytest.raises(ValueError, match=rf"held\.pkl.*({name}).*not run"):
            interop.read(file)
    assert ran == [] and capsys.readouterr().out == ""


def test_pickles_that_are_cut(tmp_path):
    env = gym.wrappers.NormalizeObservation(World())
    whole = pickle.dumps(env.obs_rms)
    file = tmp_path / "cut.pkl"
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pkl"):
            interop.read(file)
    generator = np.random.default_rng(0)
    for _ in range(300):  # any byte another one: an error, or statistics
        data = bytearray(whole)
        data[generator.integers(len(data))] = generator.integers(256)
        file.write_bytes(data)
        try:
            carried = interop.read(file)
        except ValueError:
            continue
        assert carried.moments.central.isfinite().all()
    with pytest.raises(FileNotFoundError):
        interop.read(tmp_path / "none.pkl")


# ------------------------------------------------------------------------------- bad input


def states() -> dict[str, dict]:
    """A state of each library that has names of its own."""
    moments = F.moments(draw(200, 3.0, 4))
    made = {}
    for of in FORMATS:
        entries = interop.write(moments, of.library, decay=0.99)
        if of.library.startswith("torchrl.VecNorm"):
            entries = {of.name(field, "obs"): v for field, v in entries.items()}
        if of.library != "rllib":
            made[of.library] = entries
    return made


def as_arrays(value):
    return torch.as_tensor(value) if not isinstance(value, dict) else value


@pytest.mark.parametrize(
    "library", [of.library for of in FORMATS if of.library != "rllib"]
)
def test_what_no_data_can_have_given(library):
    state = states()[library]
    options = {"decay": 0.99, "count": 200 if library == "d3rlpy" else None}

    def refused(bad: dict, *names: str):
        with pytest.raises(ValueError, match="|".join(map(re.escape, names))) as error:
            interop.read(bad, library, **options)
        assert library.split(".")[0] in str(error.value) or "mapping" in str(
            error.value
        )

    assert interop.read(state, library, **options) if "skrl" not in library and (
        "sample" not in library) else True  # fmt: skip
    for name, value in state.items():
        if isinstance(value, dict):
            continue  # brax's count
        value = torch.as_tensor(value)
        short = name.rpartition(".")[2]
        if not (library == "lerobot" and short == "count"):
            refused({k: v for k, v in state.items() if k != name}, name, "mapping")
        if short in ("num_batches", "nonfinite"):
            continue
        refused({**state, name: value.double() * torch.nan}, short)
        refused({**state, name: "1"}, short, "mapping")
        if value.numel() > 1:
            refused({**state, name: torch.zeros(7)}, short, "shape", "root")
        else:
            refused({**state, name: -value.double() - 1}, short)
            refused({**state, name: torch.ones(3)}, short)
        if any(part in name for part in ("var", "ssq", "squares", "_sq", "m2", "std")):
            refused({**state, name: -value.double() - 10}, short, "std")


def test_brax_counts():
    state = states()["brax"]
    for bad in ({"hi": 0, "lo": -1}, {"hi": torch.nan, "lo": 0}, -3, "3"):
        with pytest.raises(ValueError, match="brax: entry 'count"):
            interop.read({**state, "count": bad})
    # Another deviation than that of either mode.
    with pytest.raises(ValueError, match=r"brax: entry 'std'.*in either mode"):
        interop.read({**state, "std": np.asarray(state["std"]) * 2})


def test_rllib_arrays():
    made = interop.write(F.moments(draw(9, 1.0, 2)), "rllib")
    for bad in ("", "AAAA", "not base64 !", made["mean_array"][:-9]):
        with pytest.raises(ValueError, match="rllib: entry 'mean_array'"):
            interop.read({"running_stats": [{**made, "mean_array": bad}]})
    # An array of objects would be a pickle.
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    import base64
    import zlib

    packed = base64.b64encode(zlib.compress(file.getvalue())).decode()
    with pytest.raises(ValueError, match=r"mean_array.*allow_pickle"):
        interop.read({"running_stats": [{**made, "mean_array": packed}]})
    with pytest.raises(ValueError, match="that divides"):
        interop.read({"running_stats": [made], "de_std_to_one": False})


def test_which_library():
    """State dicts with the same names, and others that are not known."""
    state = states()["rl_games"]
    with pytest.raises(ValueError, match=r"rl_games and sample_factory.*pass library="):
        interop.read(state)
    with pytest.raises(ValueError, match=r"stable_baselines3.*gymnasium.*tianshou"):
        interop.read({"mean": np.zeros(3), "var": np.ones(3), "count": 3.0})
    assert interop.read(state, "rl_games").clip == 5
    with pytest.raises(ValueError, match=r"expected library as one of .*got 'keras'"):
        interop.read(state, "keras")
    for source in (
        {},
        {"weight": torch.ones(3)},
        7,
        [1.0],
        nn.Linear(1, 1),
        None,
        "no file",
    ):
        error = FileNotFoundError if isinstance(source, str) else ValueError
        with pytest.raises(error):
            interop.read(source)
    with pytest.raises(
        ValueError, match="for those of skrl there is no 'current_count'"
    ):
        interop.read(
            {k: v for k, v in states()["skrl"].items() if k != "current_count"}
        )
    with pytest.raises(ValueError, match=r"there is no 'actor\.running_var'"):
        interop.read(
            {"actor.running_mean": torch.zeros(3), "actor.count": 3}, "rl_games"
        )


def test_which_of_several():
    two = {
        f"{who}.{k}": v
        for who in ("actor", "critic")
        for k, v in states()["rsl_rl"].items()
    }
    checkpoint = {"iter": 7, "model_state_dict": two, "optimizer": [{"lr": 1e-3}]}
    with pytest.raises(ValueError, match=r"'model_state_dict.actor'.*pass key="):
        interop.read(checkpoint)
    with pytest.raises(ValueError, match=r"expected key as one of .*got 'value'"):
        interop.read(checkpoint, key="value")
    carried = interop.read(checkpoint, key="critic")
    moments = F.moments(draw(50, -8.0, 4))
    new = interop.write(moments, like=checkpoint, key="critic")
    # A copy, of which the rest is what it was.
    assert checkpoint["model_state_dict"]["critic._mean"].mean() > 0
    assert new["model_state_dict"]["critic._mean"].mean() < -10
    assert new["model_state_dict"]["actor._mean"] is two["actor._mean"]
    assert new["iter"] == 7 and new["optimizer"] is checkpoint["optimizer"]
    assert carried.moments.sum.mean() > 0


def test_moments_that_cannot_be_written():
    good = F.moments(draw(50, 1.0, 4))
    state = states()["skrl"]
    bad = [
        good._replace(ssq=-good.ssq),
        good._replace(count=good.count * torch.nan),
        good._replace(sum=good.sum[:2]),
    ]
    for moments in bad:
        with pytest.raises(ValueError, match="write: entry 'moments"):
            interop.write(moments, like=state)
    with pytest.raises(TypeError, match="Moments, got dict"):
        interop.write(state, like=state)
    with pytest.raises(TypeError, match="library= or like="):
        interop.write(good)
    with pytest.raises(ValueError, match=r"'torchrl\.VecNorm', 'torchrl\.VecNormV2'"):
        interop.write(good, "torchrl")
    many = good._replace(count=good.count * 1e9, sum=good.sum * 1e9, ssq=good.ssq * 1e9)
    with pytest.raises(ValueError, match=r"count.*int32"):
        interop.write(many, "imitation.RunningNorm")
    with pytest.raises(ValueError, match=r"expected decay in \(0, 1\], got 2"):
        interop.write(good, "torchrl.VecNormV2", decay=2)


def test_counts_are_whole_where_they_have_to_be():
    moments = F.moments(draw(3, 1.0, 2))
    less = moments._replace(*(None,) * 0, count=moments.count * 0.3, sum=moments.sum * 0.3,
                            ssq=moments.ssq * 0.3)  # fmt: skip
    made = interop.write(less, "rsl_rl")
    assert made["count"] == 1 and made["count"].dtype == torch.int64
    assert interop.write(less, "skrl")["current_count"] == pytest.approx(0.9)


def test_another_rule_is_a_warning():
    carried = interop.read(states()["rsl_rl"])
    with pytest.warns(
        UserWarning, match="skrl has eps=1e-08 where it was 0.01, clip=5.0"
    ):
        interop.write(carried, "skrl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interop.write(carried._replace(eps=1e-8, clip=5.0), "skrl")
        interop.write(carried, "rsl_rl")


def test_imports_no_library():
    """Neither the libraries, nor torchrl, nor tensordict."""
    code = (
        "import sys; from torchrl_vecnorm import interop; import torch;"
        "interop.read({'_mean': torch.zeros(1, 3), '_var': torch.ones(1, 3),"
        "'_std': torch.ones(1, 3), 'count': torch.tensor(3)});"
        "assert not {'torchrl', 'tensordict', 'gymnasium', 'jax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sums_of_float32_that_have_lost_the_variance():
    """torchrl's, far from zero: squares a little below what the sums say are no variance."""
    total, count = torch.tensor([1e6, 1e6]), torch.tensor([100.0])
    squares = (total * total / count) * torch.tensor([1 - 1e-4, 1 + 1e-4])
    state = {"obs_sum": total, "obs_ssq": squares, "obs_count": count}
    carried = interop.read(state)
    assert carried.moments.central[0] == 0 and carried.moments.central[1] > 0
    assert carried.running_norm().eval()(total / count)[0] == 0
    with pytest.raises(ValueError, match="obs_ssq"):
        interop.read({**state, "obs_ssq": squares / 2})
