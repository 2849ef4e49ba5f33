# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Other libraries: drop-ins for their normalisers, and their statistics read and written.

:func:`read` and :func:`write` carry statistics between libraries, and import none of them.
The drop-ins are one module a library.

Each has the names, constructors, methods, buffers and files of the library's own
classes, and gives their numbers; what differs is in the docstrings and the guide. A module
imports its library, and is imported only by who asks:
``from torchrl_vecnorm.interop.skrl import RunningStandardScaler``.
"""

from torchrl_vecnorm.interop.conversions import Carried, read, write

__all__ = ["Carried", "read", "write"]
