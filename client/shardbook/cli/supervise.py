"""Runs a command for a watcher, and ends it when the watcher is gone. A script of its own: nothing of Shardbook.

``supervise.py FD GRACE_S COMMAND...``: each byte read from FD is a signal for the command's process group; when FD
ends, so has the watcher, however it died, and the command gets SIGTERM and after GRACE_S seconds SIGKILL, with all
that it started. Exits as the command does, 128 + N where signal N ended it, 127 where it cannot be started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

CANNOT_START = 127


def main() -> int:
    """Runs the command; returns the exit code."""
    descriptor, grace_s, argv = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(descriptor, False)
    try:
        process = subprocess.Popen(argv, start_new_session=True)  # noqa: S603 - it is what is asked for
    except OSError as error:
        sys.stderr.write(f"error: cannot start {argv[0]}: {error.strerror}\n")
        return CANNOT_START
    gone = threading.Event()
    threading.Thread(target=_listen, args=(descriptor, grace_s, process.pid, gone), daemon=True).start()
    code = process.wait()
    if gone.is_set():
        _signal(process.pid, signal.SIGKILL)
    return 128 - code if code < 0 else code


def _listen(descriptor: int, grace_s: float, group: int, gone: threading.Event) -> None:
    while told := os.read(descriptor, 1):
        _signal(group, told[0])
    gone.set()
    _signal(group, signal.SIGTERM)
    time.sleep(grace_s)
    _signal(group, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    # It may have ended just now.
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
