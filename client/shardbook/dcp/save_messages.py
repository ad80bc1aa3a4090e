"""What a trainer and its save process say to each other, pickled, over a socket pair that nobody else holds.

From the trainer ``Hello`` first, then a ``SaveRequest`` a save, each followed by the descriptor of the memory that
holds the state dict. From the save process everything else.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from shardbook.config import ClientConfig
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.describing import Said
from shardbook.dcp.handover import Place
from shardbook.dcp.prepared import SaveOptions
from shardbook.dcp.results import SaveResult
from shardbook.dcp.runtime import Member
from shardbook.dcp.session import Session


@dataclass(frozen=True)
class Hello:
    """The session that the save process saves in, and how it is to behave.

    Attributes:
        session: The trainer's.
        config: Its settings.
        alone: Its place without a process group.
        joined: Its place among those that called ``init`` with it.
        began_s: When ``init`` was called, by ``time.monotonic``, which all processes of a host share.
        parent_pid: The trainer.
        log_levels: Levels of loggers by name, the root logger's by the empty name.
        thread_count: How many threads torch may compute with.
    """

    session: Session
    config: ClientConfig
    alone: Member
    joined: Member
    began_s: float
    parent_pid: int
    log_levels: dict[str, int]
    thread_count: int


@dataclass(frozen=True)
class SaveRequest:
    """One save. Memory with ``state_dict``, ``storage_writer`` and ``planner`` comes behind it.

    Attributes:
        number: By which answers name it.
        attempt: Counted by the trainer.
        checkpoint_id: As the user gave it.
        options: How the save is to end.
        sessions: Numbers of the incarnation's sessions by part, as the trainer knows them.
        lease_ttl_s: How long a lease lives, seconds; 0 when the trainer does not know.
        directory: What relative paths start from.
        places: Where the objects lie in the memory.
        said: What the caller says of the checkpoint; of the options' own it says nothing more.
    """

    number: int
    attempt: Attempt
    checkpoint_id: str | os.PathLike[str] | None
    options: SaveOptions
    sessions: dict[str, int]
    lease_ttl_s: float
    directory: str
    places: dict[str, Place]
    said: Said


@dataclass(frozen=True)
class Taken:
    """The save process has the memory of a save, and begins with it."""

    number: int


@dataclass(frozen=True)
class Registered:
    """The service has this rank's registration of a save."""

    number: int


@dataclass(frozen=True)
class KeepLease:
    """The trainer is to renew the lease of a part, whose session has begun in the save process perhaps.

    Attributes:
        part: The part.
        sessions: Numbers by part, as the save process knows them.
        lease_ttl_s: How long a lease lives, seconds; 0 when nobody knows.
    """

    part: str
    sessions: dict[str, int]
    lease_ttl_s: float


@dataclass(frozen=True)
class Logged:
    """A line for the trainer's log."""

    record: logging.LogRecord


@dataclass(frozen=True)
class Answer:
    """How a save ended.

    Attributes:
        number: The request's.
        result: What ``save`` would have returned; None when it raised.
        error: What it would have raised.
        traceback: Of the error, in the save process.
    """

    number: int
    result: SaveResult | None = None
    error: BaseException | None = None
    traceback: str = ""
