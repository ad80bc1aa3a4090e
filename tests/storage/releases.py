"""The release after this one, for tests of upgrades: these migrations and one more, and a process that runs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardbook_migrations
from shardbook_server.storage import migrate

#: Revision of this release's schema, also while a process is made one of the next.
THIS = migrate.HEAD
#: Revision of that release's schema. It expands only: servers of this release may go on beside it.
NEXT = f"{int(THIS) + 1:04}"
#: Environment variable: path of a file that the migration makes once it is half-way, and there it stays.
HOLD = "TEST_HOLD_MIGRATION"
_VERSION = f'''"""A note on every checkpoint, and an index to find it by."""

import os
import pathlib
import time

import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{migrate.HEAD}"


def upgrade():
    op.add_column("checkpoints", sa.Column("note", sa.Text))
    op.create_index("ix_checkpoints_note", "checkpoints", ["note"])
    op.execute("UPDATE checkpoints SET note = 'from before'")
    if "{HOLD}" in os.environ:
        pathlib.Path(os.environ["{HOLD}"]).touch()
        time.sleep(600)
    op.execute("UPDATE schema_compat SET oldest = '{migrate.HEAD}'")


def downgrade():
    op.drop_index("ix_checkpoints_note", "checkpoints")
    op.drop_column("checkpoints", "note")
'''


def write_next_release(folder: Path) -> Path:
    """Makes the migrations of that release below ``folder``; returns where Alembic finds them."""
    location = folder / "migrations"
    shutil.copytree(shardbook_migrations.LOCATION, location, ignore=shutil.ignore_patterns("__pycache__"))
    (location / "versions" / f"{NEXT}_note.py").write_text(_VERSION)
    return location


def become_next_release(patch: pytest.MonkeyPatch, location: Path) -> None:
    """Makes this process one of that release, as far as migrations go."""
    patch.setattr(shardbook_migrations, "LOCATION", location)
    patch.setattr(migrate, "HEAD", NEXT)


def start_upgrade(url: str, location: Path) -> subprocess.Popen[str]:
    """Starts a process of that release that upgrades ``url`` and prints the revision."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.storage.releases", url, str(location)], stdout=subprocess.PIPE, text=True
    )


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as forever:
        become_next_release(forever, Path(sys.argv[2]))
        print(migrate.upgrade(sys.argv[1]))
