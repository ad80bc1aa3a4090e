"""What the service answers about committed checkpoints, kept on this host: what many readers ask is fetched once.

Committed metadata never changes, so an answer is kept in two pieces: what the checkpoint's structure says, by its
digest, and what the checkpoint's own extents say, by its commit. The next checkpoint of a run lacks the second alone.
What a name means is asked every time: it moves, checkpoints are deleted, the service may deny what it once allowed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from shardbook._disk_cache import DiskCache, cache_directory
from shardbook._reading import ChunkPages
from shardbook.chunks import CheckpointChunks
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.columns import unframe
from shardbook.core.digest import digest_of
from shardbook.core.found import decode_part, merge
from shardbook.core.names import CheckpointName
from shardbook.core.places import decode_places, together
from shardbook.core.wanted import Wanted, encode_wanted
from shardbook.errors import InternalError, InvalidArgumentError
from shardbook.stored_metadata import StoredMetadata
from shardbook.v1.types_pb2 import Checkpoint

T = TypeVar("T")

#: How long a reader waits for another one of its host to fetch what both want; then it asks by itself, seconds.
SHARE_WAIT_S: Final = 10.0
_FIRST_RANK: Final = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class Resolved:
    """What a name means.

    Attributes:
        checkpoint: The checkpoint.
        metadata_header: Payload of ``shardbook.core.head``.
    """

    checkpoint: Checkpoint
    metadata_header: bytes

    @property
    def shared_name(self) -> str:
        """Names what its structure says."""
        return f"s{self.checkpoint.structure_digest.hex()}"

    @property
    def own_name(self) -> str:
        """Names what its extents say.

        By its commit, so that neither another service nor a restored database can mean anything else by it.
        """
        one = self.checkpoint
        commit = f"{one.name}\0{one.commit_time.seconds}.{one.commit_time.nanos:09}\0".encode()
        return f"c{digest_of(commit + one.incarnation + one.structure_digest).hex()}"


@dataclass(frozen=True)
class _Kept:
    """An answer in two pieces.

    Attributes:
        shared: What the structure says.
        own: What the checkpoint's extents say.
    """

    shared: list[bytes]
    own: list[bytes]


@dataclass(frozen=True)
class _Question(Generic[T]):
    """Something that is asked of checkpoints.

    Attributes:
        group: Names it.
        fetch: Asks the service; is given what is held of a structure, by that structure's digest.
        read: Makes the answer of its pieces; raises InvalidArgumentError or ValueError for pieces of no answer.
    """

    group: str
    fetch: Callable[[CheckpointName, bytes, list[bytes]], tuple[Resolved, _Kept]]
    read: Callable[[Resolved, _Kept], T]


@dataclass(frozen=True)
class Answers:
    """Asks the cache and the service. Thread-safe; picklable as the client is.

    Attributes:
        client: The service.
        cache: Where answers are kept; None keeps none.
        deadline_s: Seconds for each call.
    """

    client: Client
    cache: DiskCache | None
    deadline_s: float

    @classmethod
    def of(cls, config: ClientConfig, deadline_s: float, client: Client | None = None) -> Answers:
        """Returns what the settings say; ``client`` asks where it is given."""
        if client is None:
            client = Client(config.server, token=config.token, timeout_s=config.timeout_s)
        directory = cache_directory(config.cache_dir)
        if not (config.cache and config.cache_bytes and directory):
            return cls(client, None, deadline_s)
        return cls(client, DiskCache(directory, config.cache_bytes), deadline_s)

    def chunks(self, name: CheckpointName, wanted: Wanted) -> CheckpointChunks:
        """Returns what ``Client.query_chunks`` does, and raises as it does."""
        if self.cache is None or not wanted.fqns:
            return self.client.query_chunks(name, wanted, deadline_s=self.deadline_s)
        payload = encode_wanted(wanted)

        def fetch(name: CheckpointName, _digest: bytes, held: list[bytes]) -> tuple[Resolved, _Kept]:
            pages = self.client._query_apart(name, payload, held, deadline_s=self.deadline_s)  # noqa: SLF001
            if not pages.is_apart:
                raise _ServerIsOldError
            return _resolved(pages), _Kept(pages.found, pages.places)

        def read(resolved: Resolved, kept: _Kept) -> CheckpointChunks:
            place, header, own_name = resolved.checkpoint.location, resolved.metadata_header, resolved.checkpoint.name
            pairs = [(one, other) for one, other in zip(kept.shared, kept.own, strict=True) if one or other]
            parts = [together(decode_part(one), decode_places(other), place.prefix) for one, other in pairs]
            others = tuple(resolved.checkpoint.other_locations)
            return CheckpointChunks(merge(wanted, parts), place.location, place.prefix, header, b"", own_name, others)

        try:
            return self._answer(self.cache, name, _Question(_group("chunks", unframe(payload)), fetch, read))
        except _ServerIsOldError:
            return self.client.query_chunks(name, wanted, deadline_s=self.deadline_s)

    def everything(self, name: CheckpointName) -> StoredMetadata:
        """Returns what ``Client.get_metadata`` does of all entries, and raises as it does."""
        if self.cache is None:
            return self.client.get_metadata(name, deadline_s=self.deadline_s)

        def fetch(name: CheckpointName, digest: bytes, held: list[bytes]) -> tuple[Resolved, _Kept]:
            stored = self.client._get_metadata(name, held_digest=digest, deadline_s=self.deadline_s)  # noqa: SLF001
            shared = [stored.head, *stored.blocks] if stored.head else held
            own = [_FIRST_RANK.pack(first) + payload for first, payload in stored.segments]
            return Resolved(stored.checkpoint, stored.metadata_header), _Kept(shared, own)

        def read(resolved: Resolved, kept: _Kept) -> StoredMetadata:
            size, (head, *blocks) = _FIRST_RANK.size, kept.shared
            segments = tuple((_FIRST_RANK.unpack(one[:size])[0], one[size:]) for one in kept.own)
            return StoredMetadata(resolved.checkpoint, head, resolved.metadata_header, segments, blocks)

        return self._answer(self.cache, name, _Question(_group("everything", str(name.part).encode()), fetch, read))

    def _answer(self, cache: DiskCache, name: CheckpointName, question: _Question[T]) -> T:
        """Answers from the cache what it holds; of those who lack the same at the same time one asks, others wait."""
        if not cache.holds(question.group):
            with cache.alone(question.group, SHARE_WAIT_S):
                if not cache.holds(question.group):
                    # Of no checkpoint: there is no need to know first which one is meant.
                    return self._fetched(cache, name, question, b"", [])
        resolved = _resolved(self.client._query_apart(name, _NOTHING, (), deadline_s=self.deadline_s))  # noqa: SLF001
        found = _look(cache, question, resolved)
        if found is not None:
            return found
        with cache.alone(question.group, SHARE_WAIT_S):
            found = _look(cache, question, resolved)
            if found is not None:
                return found
            exact = CheckpointName.parse(resolved.checkpoint.name)
            held = cache.get(question.group, resolved.shared_name) or []
            digest = resolved.checkpoint.structure_digest if held else b""
            return self._fetched(cache, exact, question, digest, held)

    @staticmethod
    def _fetched(cache: DiskCache, name: CheckpointName, question: _Question[T], digest: bytes, held: list[bytes]) -> T:
        resolved, kept = question.fetch(name, digest, held)
        try:
            answer = question.read(resolved, kept)
        except (InvalidArgumentError, ValueError) as error:
            raise InternalError(f"the server's answer cannot be read: {error}", reason="MALFORMED_ANSWER") from error
        if kept.shared != held:
            cache.put(question.group, resolved.shared_name, kept.shared)
        cache.put(question.group, resolved.own_name, kept.own)
        return answer


class _ServerIsOldError(Exception):
    """The server does not know how to answer apart."""


#: Asks what a name means, and nothing else.
_NOTHING: Final = encode_wanted(Wanted.all_of(()))


def _resolved(pages: ChunkPages) -> Resolved:
    return Resolved(pages.checkpoint, pages.metadata_header)


def _group(kind: str, content: bytes) -> str:
    return digest_of(kind.encode() + b"\0" + content).hex()


def _look(cache: DiskCache, question: _Question[T], resolved: Resolved) -> T | None:
    """Returns the answer that is kept for a checkpoint; what does not make one is removed."""
    own = cache.get(question.group, resolved.own_name)
    shared = None if own is None else cache.get(question.group, resolved.shared_name)
    if own is None or shared is None:
        return None
    try:
        return question.read(resolved, _Kept(shared, own))
    except (InvalidArgumentError, ValueError, struct.error):
        # Whole, and yet no answer: of another release.
        cache.drop(question.group, resolved.own_name)
        cache.drop(question.group, resolved.shared_name)
        return None


__all__ = ["SHARE_WAIT_S", "Answers"]
