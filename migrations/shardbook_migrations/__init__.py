"""The schema's history: an Alembic environment and its versions, shipped in the wheel.

May import SQLAlchemy and Alembic only. Versions are frozen once released: they spell out their tables instead of
importing those of the running code. Each one expands first and contracts in a later release, and says in
``schema_compat`` which revision of the server may still run beside it.
"""

from __future__ import annotations

from pathlib import Path

#: Directory that Alembic takes as its script location.
LOCATION = Path(__file__).parent
