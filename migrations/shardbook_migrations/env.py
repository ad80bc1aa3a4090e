"""Alembic's environment. Runs on the connection it is given, inside the transaction that is open on it.

``shardbook_server.storage.migrate`` opens both; there is no other way to run it, so no URL can go astray.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import MetaData

#: Names that constraints get when a version gives none; as in ``shardbook_server.storage.tables``.
NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


def run() -> None:
    """Runs the migrations that Alembic asked for; the caller's transaction goes on, and commits them or none."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=MetaData(naming_convention=NAMES),
        transactional_ddl=True,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


run()
