"""Types of columns, names of indexes, and the ways in which SQLite stores a table."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import REAL, BigInteger, Double, Integer, LargeBinary, MetaData, SmallInteger, Text
from sqlalchemy.types import TypeEngine

#: Names of indexes and constraints.
NAMING: Final = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
#: All tables.
metadata = MetaData(naming_convention=NAMING)
#: 64-bit integer; SQLite's STRICT tables know it as INTEGER.
Int64 = BigInteger().with_variant(Integer(), "sqlite")
#: Small number or flag (0 or 1).
Small = SmallInteger().with_variant(Integer(), "sqlite")
Digest = LargeBinary(32)
#: 64-bit floating point number; SQLite's STRICT tables know it as REAL.
Number: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")
#: Name that listings are ordered by: by code point, as SQLite does, whatever the database's language.
Name = Text().with_variant(Text(collation="C"), "postgresql")

STRICT: Final[dict[str, Any]] = {"sqlite_strict": True}
#: For narrow rows found by their key only; wide ones would spill to overflow pages.
CLUSTERED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_with_rowid": False}
NEVER_REUSED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_autoincrement": True}
