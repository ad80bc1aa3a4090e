"""What a schema is made of, read back from the database; and schemas that claim to be another revision."""

from __future__ import annotations

import re

from sqlalchemy import Connection, text

from tests.databases import opened

#: Everything that Postgres keeps about a table: columns with collation and identity, constraints, indexes.
_POSTGRES = """
SELECT c.relname || '.' || a.attname,
       format_type(a.atttypid, a.atttypmod) || ' notnull=' || a.attnotnull
       || ' identity=' || CAST(a.attidentity AS text)
       || ' default=' || coalesce(pg_get_expr(d.adbin, d.adrelid), '') || ' collation=' || coalesce(l.collname, '')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'public'
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
LEFT JOIN pg_collation l ON l.oid = a.attcollation
WHERE c.relkind = 'r'
UNION ALL SELECT conrelid::regclass || ' ' || conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
"""


def schema_of(connection: Connection) -> dict[str, str]:
    """Every table, column, constraint and index by name, as the database spells it, without layout."""
    if connection.dialect.name == "postgresql":
        found = {row[0]: row[1] for row in connection.execute(text(_POSTGRES))}
    else:
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        found = {name: re.sub(r"\s+", " ", sql).replace('"', "").strip() for name, sql in rows}
    return {name: definition for name, definition in found.items() if not name.startswith(("alembic", "sqlite_"))}


def schema_at(url: str) -> dict[str, str]:
    """The same of a database by its URL."""
    with opened(url) as database, database.read() as connection:
        return schema_of(connection)


def set_version(url: str, revision: str, oldest: str | None = None) -> None:
    """Makes a schema claim another revision, and that servers from ``oldest`` on may serve it."""
    with opened(url) as database, database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
        if oldest is not None:
            connection.execute(text("UPDATE schema_compat SET oldest = :oldest"), {"oldest": oldest})
