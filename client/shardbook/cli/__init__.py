"""The ``shardbook`` command: one module per noun, ``output`` for tables and JSON. Needs the extra ``cli``.

Imports of typer and rich stay behind ``main``, so that a machine without them is told which extra to install.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def main() -> None:
    """Runs the command and exits: 0 ok, 1 negative answer, 2 usage, 3 not found, 4 unavailable, 5 denied."""
    # gRPC's own log lines (a closed connection, say) are no part of an answer.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Looked for and not imported: most of what is typed draws nothing.
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"error: the shardbook command needs {' and '.join(missing)}, which the extra [cli] brings: "
            "pip install 'shardbook[cli]'\n"
        )
        raise SystemExit(2)
    from shardbook.cli.app import run

    run()
