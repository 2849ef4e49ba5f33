# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A batch of environments in torch, and what the tests of several libraries share."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

#: To float32 rounding, times what the mean is away from zero: section 10 of the contract.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Points:
    """Points on a line that are to be brought to 0: observations ``[n, 4]``."""

    steps = 32

    def __init__(self, n: int = 64) -> None:
        self.n = n
        self.place = torch.randn(n) * 3
        self.speed = torch.zeros(n)
        self.age = torch.zeros(n, dtype=torch.long)

    def look(self) -> Tensor:
        """Features of quite different sizes."""
        place, speed = self.place, self.speed
        return torch.stack([place, speed * 10, place**2 + 100, place * 1e-2], dim=1)

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observations, rewards and who is at the end of an episode."""
        self.speed = 0.9 * self.speed + 0.1 * action.reshape(self.n).clamp(-1, 1)
        self.place = self.place + self.speed
        self.age += 1
        done = (self.age >= self.steps) | (self.place.abs() > 10)
        reward = -self.place.abs()
        self.place = torch.where(done, torch.randn(self.n) * 3, self.place)
        self.speed = torch.where(done, 0.0, self.speed)
        self.age[done] = 0
        return self.look(), reward, done


def draw(generator: np.random.Generator, *shape: int) -> Tensor:
    """Rows whose features have their own means and deviations, each call others."""
    n = int(generator.choice([1, 2, 3, 17, 64, 300]))
    mean = np.linspace(-20, 20, int(np.prod(shape))).reshape(shape)
    values = generator.normal(size=(n, *shape)) * generator.uniform(0.5, 5) + mean
    return torch.from_numpy(values).float()


def state_error(module: torch.nn.Module, state: dict, *names: str) -> None:
    """The state is refused, every name is in the message, and nothing was written."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state)
    for name in names:
        assert name in str(error.value)
    assert_same(module.state_dict(), before)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **close: float) -> None:
    """Two states have the same names, dtypes, shapes and (about) the same values."""
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        torch.testing.assert_close(
            value,
            b[name],
            **(close or {"rtol": 0, "atol": 0}),
            msg=lambda m, name=name: f"{name} {m}",
        )


def through_a_file(state: dict) -> dict:
    """What another session would load."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bad_states(state: dict, mean: str, var: str, count: str) -> list[tuple[dict, str]]:
    """States that no data can have given, and the entry that has to be named."""
    return [
        ({**state, var: -state[var] - 1}, var),
        ({**state, var: state[var] * torch.nan}, var),
        ({**state, mean: state[mean] + torch.inf}, mean),
        ({**state, mean: torch.zeros(7)}, mean),
        ({**state, count: -state[count] - 1}, count),
        ({**state, var: state[var].tolist()}, var),
        ({k: v for k, v in state.items() if k != count}, count),
        ({"_sumsq": torch.ones(3)}, "_sumsq"),
    ]
