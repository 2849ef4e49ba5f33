# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which calls update the statistics: train, eval, freeze."""

from __future__ import annotations

from torchrl.envs.transforms import Transform
from typing_extensions import Self

from torchrl_vecnorm.transforms.placing import called_by_torchrl


class Switching(Transform):
    """A transform whose updates can be switched off, and back on."""

    frozen: bool = False

    def freeze(self) -> Self:
        """Freezes the VecNorm, avoiding the stats to be updated when called.

        See :meth:`unfreeze`.
        """
        self.frozen = True
        return self

    def unfreeze(self) -> Self:
        """Unfreezes the VecNorm.

        See :meth:`freeze`.
        """
        self.frozen = False
        return self

    def train(self, mode: bool = True) -> Self:
        """Sets training mode (statistics are updated) or eval mode (they are not).

        TorchRL calls ``eval()`` on every transform that it puts into an environment or
        a replay buffer. That is not the user's wish, and is ignored.
        """
        if not mode and called_by_torchrl():
            return self
        return super().train(mode)
