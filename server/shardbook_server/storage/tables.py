"""Tables of what is saved; ``metadata`` has those of the other modules named ``*_tables`` too.

The migrations build the same schema (a test compares them); numbers of states and kinds are stored. Keys are integers
and digests are BLOBs, so that rows stay small. Ids of content and of checkpoints are never reused (AUTOINCREMENT,
identity columns): packed lists and caches name them. Times are microseconds since the epoch by the database's clock.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    func,
    literal_column,
    text,
)

from shardbook_server.storage import (  # noqa: F401 - ``metadata`` has their tables
    columns,
    event_tables,
    lineage_tables,
    request_tables,
    retention_tables,
)
from shardbook_server.storage.columns import CLUSTERED as _CLUSTERED
from shardbook_server.storage.columns import NEVER_REUSED as _NEVER_REUSED
from shardbook_server.storage.columns import STRICT as _STRICT
from shardbook_server.storage.columns import Digest, Int64, Name, Number, Small

#: Of all tables, those of the other modules too.
metadata = columns.metadata

#: One row: what belongs to the database as a whole.
catalog = Table(
    "catalog",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", LargeBinary(16), nullable=False),
    Column("cursor", Int64, nullable=False),
    Column("token_key", LargeBinary(32), nullable=False),
    Column("reap_time_us", Int64, nullable=False),
    **_STRICT,
)

#: One row: the oldest server revision that may still serve this schema.
schema_compat = Table(
    "schema_compat",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("oldest", Text, nullable=False),
    **_STRICT,
)

projects = Table(
    "projects",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("name", Name, nullable=False, unique=True),
    **_STRICT,
)

runs = Table(
    "runs",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("name", Name, nullable=False),
    Column("create_time_us", Int64, nullable=False),
    UniqueConstraint("project_id", "name"),
    **_STRICT,
)

#: ``session`` is the current one (0: none yet), ``last_session`` the highest number ever seen: numbers only grow.
#: ``latest_id`` is a checkpoint; no foreign key, the two tables would refer to each other.
parts = Table(
    "parts",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("run_id", ForeignKey("runs.id"), nullable=False),
    Column("name", Name, nullable=False),
    Column("session", Int64, nullable=False),
    Column("last_session", Int64, nullable=False),
    Column("latest_id", Int64),
    UniqueConstraint("run_id", "name"),
    # Listings ordered by part.
    Index("ix_parts_name", "name", "id"),
    **_STRICT,
)

sessions = Table(
    "sessions",
    metadata,
    Column("part_id", ForeignKey("parts.id"), primary_key=True, autoincrement=False),
    Column("number", Int64, primary_key=True, autoincrement=False),
    Column("incarnation", LargeBinary(16), nullable=False),
    Column("job_id", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("user", Text, nullable=False),
    Column("start_time_us", Int64, nullable=False),
    UniqueConstraint("part_id", "incarnation"),
    **_CLUSTERED,
)

#: The lease of a part's current session. ``ended`` is set once the reaper has dealt with its end.
leases = Table(
    "leases",
    metadata,
    Column("part_id", ForeignKey("parts.id"), primary_key=True, autoincrement=False),
    Column("session", Int64, nullable=False),
    Column("seen_time_us", Int64, nullable=False),
    Column("expire_time_us", Int64, nullable=False),
    Column("ended", Small, nullable=False),
    Index("ix_leases_running", "expire_time_us", sqlite_where=text("ended = 0"), postgresql_where=text("ended = 0")),
    **_STRICT,
)

#: ``staged`` is 1 while plans and registrations may lie in staging: OPEN, or EXPIRED and still revivable.
#: ``explicit`` is 1 when some rank gave lengths that do not follow from its structure.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("part_id", ForeignKey("parts.id"), nullable=False),
    Column("session", Int64, nullable=False),
    Column("step", Int64, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("incarnation", LargeBinary(16), nullable=False),
    Column("world_size", Integer, nullable=False),
    Column("registration_count", Integer, nullable=False),
    Column("state", Small, nullable=False),
    Column("live", Small, nullable=False),
    Column("staged", Small, nullable=False),
    Column("recovered", Small, nullable=False),
    Column("explicit", Small, nullable=False),
    Column("location", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("create_time_us", Int64, nullable=False),
    Column("commit_time_us", Int64),
    Column("write_time_us", Int64),
    Column("structure_id", ForeignKey("checkpoint_structures.id")),
    Column("size_bytes", Int64, nullable=False),
    Column("metadata_header", LargeBinary, nullable=False),
    Column("failure", Text, nullable=False),
    Column("failed_rank", Integer),
    Column("failed_host", Text),
    Column("failed_phase", Text),
    # When it was deleted, and when what is kept of it may go; the latter is none again once that is gone.
    Column("delete_time_us", Int64),
    Column("purge_time_us", Int64),
    # Bits, see ``storage.checkpoints``.
    Column("flags", Small, nullable=False, server_default=text("0")),
    # Also the order of listings: newest session and step first.
    UniqueConstraint("part_id", "session", "step", "attempt", "incarnation", name="uq_checkpoints_attempt"),
    Index(
        "uq_checkpoints_live",
        "part_id",
        "step",
        unique=True,
        sqlite_where=text("live = 1"),
        postgresql_where=text("live = 1"),
    ),
    Index("ix_checkpoints_staged", "part_id", sqlite_where=text("staged = 1"), postgresql_where=text("staged = 1")),
    # Whoever drops a structure is asked whether a checkpoint has it.
    Index("ix_checkpoints_structure_id", "structure_id"),
    # Orders of listings across runs; what is live is listed apart from what is not.
    Index("ix_checkpoints_by_session", "live", "session", "step", "id"),
    Index("ix_checkpoints_by_step", "live", "step", "id"),
    Index(
        "ix_checkpoints_by_time",
        "live",
        text("coalesce(write_time_us, create_time_us)"),
        "id",
        # Or Postgres would look into the table for each entry.
        postgresql_include=["write_time_us", "create_time_us"],
    ),
    Index("ix_checkpoints_by_size", "live", "size_bytes", "id"),
    Index("ix_checkpoints_by_world", "live", "world_size", "id"),
    Index("ix_checkpoints_by_state", "live", "state", "id"),
    Index("ix_checkpoints_by_part", "part_id", "id"),
    # What is deleted and not purged yet.
    Index(
        "ix_checkpoints_purge",
        "purge_time_us",
        sqlite_where=text("purge_time_us IS NOT NULL"),
        postgresql_where=text("purge_time_us IS NOT NULL"),
    ),
    # Who deletes files asks what else lies there. A whole location is longer than an index takes.
    Index("ix_checkpoints_location", text("substr(location, 1, 256)")),
    **_NEVER_REUSED,
)

#: Where a checkpoint is beside ``checkpoints.location``, by position from 1; none for one that is in one place.
locations = Table(
    "locations",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("location", Text, nullable=False),
    # Who else has files in a directory; the beginning is enough, and an entry of an index has its limit.
    Index("ix_locations_location", text("substr(location, 1, 256)")),
    **_CLUSTERED,
)

#: What people and jobs call checkpoints. The index is for filters and orders, across runs.
labels = Table(
    "labels",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("name", Name, primary_key=True),
    Column("value", Name, nullable=False),
    Index("ix_labels_value", "name", "value", "checkpoint_id"),
    **_CLUSTERED,
)

#: Measured values. ``part_id`` is the checkpoint's: for the best of a part.
metrics = Table(
    "metrics",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("name", Name, primary_key=True),
    Column("part_id", ForeignKey("parts.id"), nullable=False),
    Column("value", Number, nullable=False),
    Index("ix_metrics_value", "name", "value", "checkpoint_id"),
    Index("ix_metrics_part", "part_id", "name", "value", "checkpoint_id"),
    **_CLUSTERED,
)

#: What else is known of a checkpoint, each as JSON: a person's note, who wrote it, how long that took.
descriptions = Table(
    "descriptions",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("note", Text, nullable=False),
    Column("writer", Text, nullable=False),
    Column("timing", Text, nullable=False),
    **_STRICT,
)

#: What the ranks of a committed checkpoint took and wrote, as packed columns.
rank_stats = Table(
    "rank_stats",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("payload", LargeBinary, nullable=False),
    **_STRICT,
)

#: Names of checkpoints that can be moved; ``latest`` is in ``parts``. One that follows a metric has its name, and may
#: mean no checkpoint yet.
aliases = Table(
    "aliases",
    metadata,
    Column("part_id", ForeignKey("parts.id"), primary_key=True, autoincrement=False),
    Column("name", Name, primary_key=True),
    Column("checkpoint_id", ForeignKey("checkpoints.id")),
    Column("metric", Text, nullable=False),
    Column("direction", Small, nullable=False),
    Column("protected", Small, nullable=False),
    Column("update_time_us", Int64, nullable=False),
    Index("ix_aliases_checkpoint_id", "checkpoint_id"),
    **_CLUSTERED,
)

#: Blobs of all three kinds (table, plan, structure). The counts are those of ``StructureInfo``; a plan has its
#: items alone (0 from releases before), a table nothing.
rank_structures = Table(
    "rank_structures",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("kind", Small, nullable=False),
    Column("digest", Digest, nullable=False),
    Column("reference_id", ForeignKey("rank_structures.id")),
    Column("entry_count", Integer, nullable=False),
    Column("item_count", Integer, nullable=False),
    Column("variable_count", Integer, nullable=False),
    Column("fixed_bytes", Int64, nullable=False),
    Column("last_used_day", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("project_id", "kind", "digest"),
    Index("ix_rank_structures_reference_id", "reference_id"),
    **_NEVER_REUSED,
)

#: ``digest`` is over the ordered digests of the ranks' structures; both id lists are packed columns.
checkpoint_structures = Table(
    "checkpoint_structures",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("digest", Digest, nullable=False),
    Column("tensor_count", Int64, nullable=False),
    Column("chunk_count", Int64, nullable=False),
    Column("bytes_entry_count", Int64, nullable=False),
    Column("last_used_day", Integer, nullable=False),
    Column("warnings", Text, nullable=False),
    Column("rank_structure_ids", LargeBinary, nullable=False),
    Column("tensor_ids", LargeBinary, nullable=False),
    Column("head", LargeBinary, nullable=False),
    UniqueConstraint("project_id", "digest"),
    **_NEVER_REUSED,
)

#: Entries of checkpoint structures, content-addressed one by one. ``fqn_text`` is printable; ``shape`` is JSON;
#: ``fixed_bytes`` is the sum of the chunks' expected lengths.
structure_tensors = Table(
    "structure_tensors",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("digest", Digest, nullable=False),
    Column("kind", Small, nullable=False),
    Column("dtype", Small, nullable=False),
    Column("shape", Text, nullable=False),
    Column("chunk_count", Int64, nullable=False),
    Column("fixed_bytes", Int64, nullable=False),
    Column("fqn", LargeBinary, nullable=False),
    Column("fqn_text", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    UniqueConstraint("project_id", "digest"),
    **_NEVER_REUSED,
)

#: Decisions about plans, by the ordered digests of the plans: what each rank drops, in segments of ranks.
save_plans = Table(
    "save_plans",
    metadata,
    Column("project_id", ForeignKey("projects.id"), primary_key=True, autoincrement=False),
    Column("digest", Digest, primary_key=True),
    Column("first_rank", Integer, primary_key=True, autoincrement=False),
    Column("last_used_day", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    **_STRICT,
)

#: Staging: who planned what while the attempt is open.
plan_submissions = Table(
    "plan_submissions",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("plan_id", ForeignKey("rank_structures.id"), nullable=False),
    Column("lowest_rank", Small, nullable=False),
    Column("host", Text, nullable=False),
    **_CLUSTERED,
)

#: Staging: what ranks wrote while the attempt is open; insert-only. Folded into segments at commit.
registrations = Table(
    "registrations",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("structure_id", ForeignKey("rank_structures.id"), nullable=False),
    Column("explicit", Small, nullable=False),
    Column("size_bytes", Int64, nullable=False),
    Column("extents", LargeBinary, nullable=False),
    Column("volatile", LargeBinary, nullable=False),
    # Milliseconds by phase; none from ranks of an older release, or in an older server.
    Column("phases", LargeBinary),
    **_CLUSTERED,
)

extent_segments = Table(
    "extent_segments",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("first_rank", Integer, primary_key=True, autoincrement=False),
    Column("payload", LargeBinary, nullable=False),
    **_STRICT,
)

#: When a checkpoint was saved: what was recorded afterwards says when it was written. As an index has it.
SAVE_TIME: Final = func.coalesce(checkpoints.c.write_time_us, checkpoints.c.create_time_us)

#: Beginning of a location, as an index has it.
LOCATION_START: Final = func.substr(checkpoints.c.location, literal_column("1"), literal_column("256"))
OTHER_LOCATION_START: Final = func.substr(locations.c.location, literal_column("1"), literal_column("256"))

# Conditions of the partial indexes. The values are spelled out: no planner uses such an index for a bound parameter.
IS_LIVE: Final = checkpoints.c.live == literal_column("1")
IS_STAGED: Final = checkpoints.c.staged == literal_column("1")
IS_RUNNING: Final = leases.c.ended == literal_column("0")
