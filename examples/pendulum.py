# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Normalises Pendulum-v1 on the fly, side by side with torchrl's own VecNorm.

Several environments run for some thousand steps through ``TransformedEnv(env,
VecNorm(...))``. Printed are the raw and the normalised mean and standard deviation of
each feature, how far both implementations are apart on the same data, and what a call
of each costs; ``demo-output/pendulum.png`` shows the values before and after.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib
import torch
from tensordict import TensorDict
from torch.utils.benchmark import Timer
from torchrl.envs import GymEnv, SerialEnv, TransformedEnv
from torchrl.envs import VecNorm as TorchRLVecNorm
from tqdm import tqdm

from torchrl_vecnorm import VecNorm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURES = ["cos θ", "sin θ", "θ' [rad/s]", "reward"]
KEYS = ["observation", "reward"]


def torchrl_vecnorm_like(t: VecNorm) -> TorchRLVecNorm:
    """Torchrl's VecNorm with the settings of ours; its eps bounds the variance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TorchRLVecNorm(in_keys=KEYS, decay=t.decay, eps=t.eps**2, new_api=False)


def rollout(env: TransformedEnv, steps: int) -> TensorDict:
    """Random steps, environments that are done being reset on the way: [steps, B]."""
    data = []
    td = env.reset()
    for _ in tqdm(range(steps), desc="stepping Pendulum-v1", unit="step"):
        td, next_td = env.step_and_maybe_reset(env.rand_action(td))
        data.append(td["next"].select(*KEYS, *(f"{key}_norm" for key in KEYS)))
        td = next_td
    return torch.stack(data)


def table(rows: list[tuple], header: tuple) -> str:
    """Plain columns, right-aligned numbers."""
    cells = [header, *((r[0], *(f"{v:.4g}" for v in r[1:])) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def features(data: TensorDict, suffix: str = "") -> torch.Tensor:
    """Observation and reward side by side: [steps * B, 4]."""
    values = [data[key + suffix] for key in KEYS]
    return torch.cat(values, -1).flatten(0, -2)


def compare(data: TensorDict, t: VecNorm) -> float:
    """The largest difference between the two, each fed with the same raw steps."""
    ours = VecNorm(in_keys=KEYS, decay=t.decay, eps=t.eps)
    theirs = torchrl_vecnorm_like(t)
    worst = 0.0
    for step in data.unbind(0):
        a, b = ours(step.select(*KEYS)), theirs(step.select(*KEYS))
        worst = max(worst, *(float((a[k] - b[k]).abs().max()) for k in KEYS))
    return worst


def microseconds(t, td: TensorDict) -> float:
    """Median time of one call."""
    timer = Timer("t._call(td)", globals={"t": t, "td": td.clone()})
    return timer.blocked_autorange(min_run_time=0.5).median * 1e6


def picture(data: TensorDict, path: Path) -> None:
    """Raw against normalised: the first environment over time, and all values."""
    fig, axes = plt.subplots(len(FEATURES), 3, figsize=(13, 9), layout="constrained")
    raw, norm = features(data), features(data, "_norm")
    envs = data.batch_size[-1]
    for i, name in enumerate(FEATURES):
        over_time, raw_hist, norm_hist = axes[i]
        over_time.plot(raw[::envs, i][:600], label="raw", lw=0.8)
        over_time.plot(norm[::envs, i][:600], label="normalised", lw=0.8)
        over_time.set_ylabel(name)
        raw_hist.hist(raw[:, i].numpy(), bins=80)
        norm_hist.hist(norm[:, i].numpy(), bins=80, color="tab:orange")
        norm_hist.set_xlim(-4, 4)
    axes[0][0].legend()
    for axis, title in zip(
        axes[0], ("first environment over time", "raw", "normalised"), strict=True
    ):
        axis.set_title(title)
    for axis, label in zip(
        axes[-1],
        ("step of 0.05 s", "value", "value, in standard deviations from the mean"),
        strict=True,
    ):
        axis.set_xlabel(label)
    for row in axes:
        row[1].set_ylabel("samples")
    fig.suptitle(f"Pendulum-v1, {len(raw):,} random steps: before and after VecNorm")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--decay", type=float, default=0.999)
    parser.add_argument("--out", type=Path, default=Path("demo-output/pendulum.png"))
    args = parser.parse_args()

    torch.manual_seed(0)
    t = VecNorm(
        in_keys=KEYS, out_keys=[f"{key}_norm" for key in KEYS], decay=args.decay
    )
    base = SerialEnv(args.envs, lambda: GymEnv("Pendulum-v1"))
    env = TransformedEnv(base, t)
    env.set_seed(0)
    data = rollout(env, args.steps)
    env.close()

    raw, norm = features(data), features(data, "_norm")
    settled = norm[norm.shape[0] // 10 :]
    rows = [
        (name, *values)
        for name, *values in zip(
            FEATURES,
            raw.mean(0).tolist(),
            raw.std(0).tolist(),
            settled.mean(0).tolist(),
            settled.std(0).tolist(),
            strict=True,
        )
    ]
    print(f"\n{len(data)} steps of {args.envs} environments, decay {args.decay}\n")
    print("mean and standard deviation of each feature: as the environment gives it,")
    print(
        "and normalised (without the first tenth, when little was known); the aim is 0, 1"
    )
    print("reward in -16.3 to 0; θ' in rad/s\n")
    print(table(rows, ("feature", "raw mean", "raw std", "norm. mean", "norm. std")))

    print("\ncomparing with torchrl.envs.VecNorm on the same data ...", flush=True)
    print(f"largest difference of a normalised value: {compare(data, t):.2g}")

    step = data[0].select(*KEYS)
    ours, theirs = VecNorm(in_keys=KEYS), torchrl_vecnorm_like(t)
    a, b = microseconds(ours, step), microseconds(theirs, step)
    print(
        f"median time of a call: torchrl_vecnorm {a:.1f} µs, torchrl {b:.1f} µs "
        f"({b / a:.0f} times faster)"
    )
    picture(data, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
