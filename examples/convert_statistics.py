# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Carries the statistics of a checkpoint of another library into a VecNorm, and back.

    python examples/convert_statistics.py model_1500.pt --key actor_state_dict.obs_normalizer
    python examples/convert_statistics.py vecnormalize.pkl --key obs_rms

writes vecnorm.pt, the state of a VecNorm that goes on from there; nothing of rsl_rl or of
Stable-Baselines3 is imported. After some training with that,

    python examples/convert_statistics.py model_1500.pt --key … --back

writes a copy of the checkpoint with what the VecNorm has learnt. A file of Stable-Baselines3 has
to be written by that: ``interop.write(carried, like=env, key="obs_rms"); env.save(file)``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from torchrl_vecnorm import VecNorm, interop

KEY = "observation"


def vecnorm(eps: float = 1e-4) -> VecNorm:
    """The transform that the environment will have."""
    return VecNorm(in_keys=[KEY], decay=1.0, eps=eps)


def forth(file: Path, key: str | None, library: str | None, out: Path) -> VecNorm:
    """A VecNorm with the statistics of a checkpoint, and its state in a file."""
    carried = interop.read(file, library, key=key)
    transform = vecnorm(carried.eps)
    with warnings.catch_warnings():
        # Of what `report` says in numbers.
        warnings.filterwarnings("ignore", message=".*outputs will differ")
        interop.write(carried, like=transform)
    torch.save(transform.state_dict(), out)
    report(carried, transform)
    return transform


def report(carried: interop.Carried, transform: VecNorm) -> None:
    """How far the outputs are from those of the library, which has eps elsewhere."""
    mean, var = carried.moments.mean_var()
    steps = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=mean.dtype)
    x = mean + steps.reshape(-1, *[1] * mean.ndim) * var.sqrt()
    ours = interop.read(transform, key=KEY)
    far = (ours.normalize(x) - carried.normalize(x)).abs().max().item()
    print(f"{carried.moments.count[0].item():.0f} samples of {tuple(mean.shape)}")
    print(f"within 3 deviations outputs differ by {far:.1e} at most: {carried.rule()}")


def back(
    file: Path, key: str | None, library: str | None, state: Path, out: Path
) -> None:
    """A copy of a checkpoint, with what a VecNorm knows."""
    transform = vecnorm()
    transform.load_state_dict(torch.load(state))
    carried = interop.read(transform, key=KEY)
    checkpoint = torch.load(file, map_location="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*outputs will differ")
        torch.save(interop.write(carried, library, like=checkpoint, key=key), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="of rsl_rl, Stable-Baselines3, …")
    parser.add_argument("--key", help="which statistics, where there are several")
    parser.add_argument("--library", help="whose, where several have the same names")
    parser.add_argument("--state", type=Path, default=Path("vecnorm.pt"))
    parser.add_argument("--back", action="store_true", help="from the VecNorm")
    arguments = parser.parse_args()
    given = arguments.file, arguments.key, arguments.library, arguments.state
    if arguments.back:
        written = arguments.file.with_stem(arguments.file.stem + "_vecnorm")
        back(*given, written)
        print(written)
    else:
        forth(*given)
        print(arguments.state)
