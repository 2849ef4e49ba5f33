# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Ranks of torch.distributed for tests: forked, so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

#: Seconds until a rank that is waited for is given up, and a test of them.
TIMEOUT, PATIENCE = 30.0, 100.0

#: What a rank that was killed has for a result.
KILLED = "killed"


def start(rank: int, size: int, folder: str, name: str, timeout: float) -> None:
    """Makes this process a rank; a second group of the same run needs another name."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{name}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


def _work(rank, size, folder, timeout, function, args, pipe):
    code = 1
    try:
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        if timeout:
            start(rank, size, folder, "first", timeout)
        pipe.send((True, function(rank, size, *args)))
        code = 0
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        pipe.close()
        sys.stdout.flush()
        # Without what Python does at its end: gloo's threads may wait for the dead.
        os._exit(code)


def run(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    folder: str | None = None,
) -> list[Any]:
    """What ``function(rank, size, *args)`` gives on each of some ranks.

    A rank that was killed gives KILLED; an error in one is one here. With a timeout of 0
    the function makes its groups itself, with :func:`start`.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as made:
        started = []
        for rank in range(size):
            ours, theirs = fork.Pipe(duplex=False)
            call = (rank, size, folder or made, timeout, function, args, theirs)
            process = fork.Process(target=_work, args=call)
            process.start()
            theirs.close()
            started.append((process, ours))
        results, errors = [], []
        try:
            for rank, (process, pipe) in enumerate(started):
                if not pipe.poll(PATIENCE):
                    errors.append(f"rank {rank} has said nothing in {PATIENCE} s")
                    continue
                try:
                    good, result = pipe.recv()
                except EOFError:
                    process.join()
                    assert process.exitcode == -signal.SIGKILL, process.exitcode
                    good, result = True, KILLED
                (results if good else errors).append(result)
        finally:
            for process, _ in started:
                process.kill()
                process.join()
    assert not errors, "\n".join(errors)
    return results
