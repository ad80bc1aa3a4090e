"""Processes forked off one that has imported what takes long: ranks and servers, which tests start by the hundred.

An import of torch takes two seconds of processor time, one of the server a whole one; a fork takes milliseconds. Real
commands, in interpreters of their own, are run by ``tests/behaviour/rpc`` and ``tests/behaviour/cli``.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


def forked(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Starts a function in a process of its own, which ends with this one; it is found by name there.

    The process that forks has made no thread and no connection, and has not imported gRPC, which loses calls in the
    children of a process that has.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ahead"])
    process: BaseProcess = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process
