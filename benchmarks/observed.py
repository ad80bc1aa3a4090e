"""The server's command, writing down how large each of its batches is: ``python -m benchmarks.observed FILE serve``.

The floor beside a measurement inserts the same groups of rows, so it has to know them; ``/metrics`` has only a
histogram. A line costs some microseconds a batch. The process begins with the soft limit of open files that shells
and systemd give, so that a server which cannot raise it shows.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from shardbook_server.cli import main
from shardbook_server.metrics.recorder import Recorder

_SHELL_FILES = 1024


def _observe(path: Path) -> None:
    file = path.open("a", buffering=1)
    counted = Recorder.batch

    def batch(self: Recorder, kind: str, count: int) -> None:
        file.write(f"{kind} {count}\n")
        counted(self, kind, count)

    Recorder.batch = batch  # type: ignore[method-assign]


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_SHELL_FILES, hard), hard))
    _observe(Path(sys.argv.pop(1)))
    main()
