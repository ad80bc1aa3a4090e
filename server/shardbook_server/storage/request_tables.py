"""Which writes of the catalogue were made, so that one that is made again has no second effect."""

from __future__ import annotations

from sqlalchemy import Column, Index, LargeBinary, Table

from shardbook_server.storage.columns import CLUSTERED, Digest, Int64, Name, metadata

#: By who asked what with which id. ``answer`` is empty within the transaction that makes it. ``project`` is a name: the
#: request may be about one that is none.
requests = Table(
    "requests",
    metadata,
    Column("project", Name, primary_key=True),
    Column("principal", Name, primary_key=True),
    Column("method", Name, primary_key=True),
    Column("request_id", LargeBinary(16), primary_key=True),
    Column("content_digest", Digest, nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Column("time_us", Int64, nullable=False),
    Index("ix_requests_time_us", "time_us"),
    **CLUSTERED,
)
