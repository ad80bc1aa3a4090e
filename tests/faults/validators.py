"""One validator a promise: what must hold whatever was done to servers, ranks and the network between them.

A timeout counts as "maybe": the operation has happened or it has not. Validators accept both, and nothing in between.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from google.protobuf.message import Message

from shardbook import Client
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.config import ClientConfig
from shardbook.core import directory as names
from shardbook.core.blocks import decode_blocks
from shardbook.core.extents import decode_segment
from shardbook.core.head import decode_head
from shardbook.core.locate import locate
from shardbook.core.table import EntryKind
from shardbook.errors import NotFoundError, ShardbookError
from shardbook.sync import SyncedAttempt, SyncOutcome, sync_directories
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptKey
from tests.faults import jobs
from tests.torch import jobs as torch_jobs
from tests.torch.harness import RankPool

_M = TypeVar("_M", bound=Message)


# ------------------------------------------------------------------ P1


def p1_durable_acknowledgement(client: Client, key: AttemptKey, acknowledged: Iterable[int]) -> set[int]:
    """Every rank whose registration was acknowledged is there; returns the ranks that are there.

    At most 50 ranks: more missing ones are not named.
    """
    assert key.world_size <= 50
    try:
        progress = client.get_progress(pb.GetCheckpointProgressRequest(key=key)).progress
    except NotFoundError:
        there: set[int] = set()
    else:
        there = set(range(key.world_size)) - {one.rank for one in progress.missing}
        assert len(there) == progress.registered_count
    lost = set(acknowledged) - there
    assert set() == lost, f"acknowledged and lost: {sorted(lost)}"
    return there


# ------------------------------------------------------------------ P2


def p2_no_torn_checkpoint(client: Client, run: str, *, has_files: bool = True) -> list[Checkpoint]:
    """Readers see nothing of an attempt, or the whole of it; returns all attempts of a run, newest first.

    Args:
        client: A client.
        run: The run.
        has_files: Look also at the data files, which must hold every byte that an extent speaks of.
    """
    listed = list(client.list_checkpoints(run, show_all=True))
    committed = [one for one in listed if one.state is CheckpointState.COMMITTED]
    for one in committed:
        _check_whole(client, one, has_files=has_files)
    for one in listed:
        if one.state not in (CheckpointState.COMMITTED, CheckpointState.DELETED):
            with pytest.raises(ShardbookError) as caught:
                client.get_metadata(one.name)
            assert caught.value.status in {"NOT_FOUND", "FAILED_PRECONDITION"}
    live = [(one.part, one.step) for one in committed if one.live]
    assert len(set(live)) == len(live), "two live checkpoints of one step"
    assert {(one.part, one.step) for one in committed} == set(live), "a step that is committed and not live"
    assert sorted(live) == sorted((one.part, one.step) for one in client.list_checkpoints(run))
    return listed


def _check_whole(client: Client, checkpoint: Checkpoint, *, has_files: bool) -> None:
    """Every rank has extents, every element of every tensor is in one chunk, every chunk in its file."""
    stored = client.get_metadata(checkpoint.name)
    head = decode_head(stored.head)
    structure = decode_blocks(stored.blocks, head.rank_files)
    ranks = [pair for _, payload in sorted(stored.segments) for pair in decode_segment(payload)]
    assert checkpoint.world_size == len(ranks)
    located = locate(structure, ranks)
    first = 0
    for at, count in enumerate(structure.chunk_counts.tolist()):
        chunks = range(first, first + count)
        first += count
        if structure.kinds[at] == EntryKind.BYTES:
            assert 1 == count
            continue
        painted = np.zeros(structure.shapes[at], np.int64)
        for chunk in chunks:
            box = zip(structure.offsets[chunk].tolist(), structure.sizes[chunk].tolist(), strict=True)
            painted[tuple(slice(start, start + size) for start, size in box)] += 1
        assert bool((painted == 1).all()), f"{structure.fqns[at]} has holes or overlaps"
    if has_files:
        root = Path(ClientConfig().stores.path_of(checkpoint.location), checkpoint.prefix)
        for chunk in range(first):
            path = root / structure.rank_files.path(int(structure.owner[chunk]), int(structure.file[chunk]))
            assert located.start[chunk] + located.length[chunk] <= path.stat().st_size, path


# ------------------------------------------------------------------ P3


@dataclass(frozen=True)
class FileState:
    """What a file is: the same file with the same bytes, not written since."""

    digest: str
    inode: int
    changed_ns: int


def files_of(directory: Path) -> Mapping[str, FileState]:
    """Returns every file below a checkpoint directory, by relative path."""
    return {
        str(path.relative_to(directory)): FileState(
            hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_ino, path.stat().st_mtime_ns
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def p3_fenced(
    directory: Path,
    before: Mapping[str, FileState],
    opened: Sequence[str],
    own_prefix: str,
    rows: tuple[Checkpoint, Checkpoint],
) -> None:
    """A straggler of an older session has touched neither rows nor bytes of another attempt.

    Args:
        directory: The checkpoint's.
        before: Its files before the straggler went on.
        opened: What the straggler's job opened for writing, renamed to or removed.
        own_prefix: Of the straggler's attempt.
        rows: The later checkpoint before and after.
    """
    assert rows[0] == rows[1]
    after = files_of(directory)
    own = (f"{own_prefix}/", f"{names.attempt_path(own_prefix)}/")
    others = {path: state for path, state in before.items() if not path.startswith(own)}
    assert others
    assert others == {path: state for path, state in after.items() if not path.startswith(own)}
    relative = [str(Path(path).relative_to(directory)) for path in opened if Path(path).is_relative_to(directory)]
    assert relative, "the straggler wrote nothing at all, which proves nothing"
    assert [] == [path for path in relative if not path.startswith(own)]


def p3_later_save_stands(
    pool: RankPool, server: str, directory: Path, row: Checkpoint, older_prefix: str, alone: Path
) -> None:
    """After a straggler has ended, the later save of its step is what it was; the straggler's own is whole history.

    Args:
        pool: Ranks that load, two of them.
        server: Address of the server.
        directory: The checkpoint's, which holds both attempts and nothing else.
        row: The later save's checkpoint before the straggler went on, saved by ``jobs.save_other_values``.
        older_prefix: Of the straggler's attempt.
        alone: A directory that is made for that attempt by itself.
    """
    client, run = Client(server), row.ref.partition("@")[0]
    committed = [one for one in p2_no_torn_checkpoint(client, run) if one.state is CheckpointState.COMMITTED]
    assert [row.name] == [one.name for one in committed]
    assert row == client.get_checkpoint(f"{run}@latest")
    for target in (f"{run}@{row.step}", str(directory)):
        loaded = pool.run(jobs.load_other_values, target, world_size=2, environment={"SHARDBOOK_SERVER": server})
        assert [True] * 2 == loaded
    for part in (older_prefix, names.attempt_path(older_prefix)):
        shutil.copytree(directory / part, alone / part)
    assert [{str(alone): []}] * 2 == pool.run(torch_jobs.load, "fsdp", [str(alone)], world_size=2)
    outcomes = {one.prefix: one.outcome for one in sync_directories(client, [directory])}
    assert {older_prefix: SyncOutcome.SUPERSEDED, row.prefix: SyncOutcome.PRESENT} == outcomes
    assert row == client.get_checkpoint(f"{run}@latest")


# ------------------------------------------------------------------ P4


def p4_one_effect(call: Callable[[], _M], effect: Callable[[], Any]) -> _M:
    """Calling again returns the same answer and changes nothing; returns the answer."""
    first = call()
    once = effect()
    second = call()
    assert first == second
    assert once == effect()
    return first


# ------------------------------------------------------------------ P9


def p9_save_outlives_service(
    pool: RankPool, client: Client, run: str, directories: Sequence[Path], *, latest: str | None = None
) -> list[SyncedAttempt]:
    """The directories are enough, and ``sync`` brings the catalogue level, once; returns what the first one did.

    Args:
        pool: Loads the layout ``fsdp`` on two ranks.
        client: A server that is back.
        run: The run.
        directories: Checkpoint directories that were saved while it was away.
        latest: Name of the checkpoint that must stay ``latest``.
    """
    paths = [str(directory) for directory in directories]
    nothing_wrong: list[dict[str, list[str]]] = [{path: [] for path in paths}] * 2
    assert nothing_wrong == pool.run(torch_jobs.load, "fsdp", paths, world_size=2)
    assert nothing_wrong == pool.run(torch_jobs.load, "fsdp", paths, True, world_size=2)
    first = list(sync_directories(client, paths))
    assert {SyncOutcome.RECORDED, SyncOutcome.PRESENT} >= {one.outcome for one in first}
    listed = p2_no_torn_checkpoint(client, run)
    again = list(sync_directories(client, paths))
    assert [replace(one, outcome=SyncOutcome.PRESENT, message="") for one in first] == again
    assert listed == list(client.list_checkpoints(run, show_all=True))
    refs = [one.ref or "" for one in first]
    loaded = pool.run(torch_jobs.load, "fsdp", refs, world_size=2, environment={"SHARDBOOK_SERVER": client.target})
    assert [{ref: [] for ref in refs}] * 2 == loaded
    if latest is not None:
        assert latest == client.get_checkpoint(f"{run}@latest").name
    return first
