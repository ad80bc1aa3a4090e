"""A log that cannot be written costs lines, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_WRITES = """
import os, sys, structlog
from shardbook_server.logs import configure_logging
from shardbook_server.settings import Settings
configure_logging(Settings(log_json=True))
log = structlog.get_logger("x")
log.warning("first")
{trouble}
log.warning("second", text="\\udcff")
print("went on", flush=True)
"""


@pytest.mark.parametrize(
    "trouble", ["sys.stderr.close()", "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"], ids=["closed", "disk full"]
)
def test_what_cannot_be_logged_is_lost_and_work_goes_on(trouble: str, tmp_path: Path) -> None:
    """Rule: the poller, the reaper and calls do not end because a log line does."""
    result = subprocess.run(
        [sys.executable, "-c", _WRITES.format(trouble=trouble)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "went on" in result.stdout
    assert '"event": "first"' in result.stderr
