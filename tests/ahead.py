"""What ``tests.forks`` imports before it forks: all that ranks and servers need, but for what imports gRPC."""

from __future__ import annotations

import importlib
import sys
from typing import Final

_OF_RANKS: Final = (
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "shardbook.core.assembly",
    "shardbook.v1.metadata_pb2",
    "shardbook.v1.registration_pb2",
)
_OF_SERVERS: Final = (
    "psycopg",
    "shardbook.v1.relay_pb2",
    "shardbook_server.cli",
    "shardbook_server.logs",
    "shardbook_server.metrics.state",
    "shardbook_server.service.services",
    "shardbook_server.storage.migrate",
    "shardbook_server.web.http",
    "shardbook_server.web.ops",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite",
    "uvicorn",
    "uvloop",
)

for name in (*_OF_RANKS, *_OF_SERVERS):
    importlib.import_module(name)

assert "grpc" not in sys.modules, "gRPC was imported before a fork"
