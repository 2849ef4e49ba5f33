# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who calls ``eval()``: a user, or TorchRL as it places a transform."""

from __future__ import annotations

import sys

_PLACING = {
    "__init__",
    "_maybe_make_transform",
    "append",
    "append_transform",
    "insert",
    "insert_transform",
    "transform",
}


def called_by_torchrl() -> bool:
    """Whether ``train()`` was called by TorchRL's code that places a transform.

    ``eval()`` reaches us through nn.Module, then comes whoever called it. The setter
    ``TransformedEnv.transform``, ``Compose.append`` and ``insert``, and replay buffers
    do so for themselves; everybody else means it.
    """
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != "torch.nn.modules.module":
            name = frame.f_code.co_name
            return module.startswith("torchrl.") and name in _PLACING
        frame = frame.f_back
    return False
