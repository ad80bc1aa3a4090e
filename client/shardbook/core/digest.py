"""Content addresses: SHA-256 of canonical uncompressed bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from shardbook.errors import InvalidArgumentError

#: Length of every digest, bytes.
DIGEST_BYTES = 32


def digest_of(content: bytes | memoryview) -> bytes:
    """Returns the SHA-256 of ``content``, 32 bytes."""
    return hashlib.sha256(content).digest()


def ordered_digest(domain: str, digests: Iterable[bytes]) -> bytes:
    """Returns the digest of a sequence of digests; ``domain`` keeps unlike sequences apart."""
    hasher = hashlib.sha256(domain.encode() + b"\0")
    for digest in digests:
        hasher.update(digest)
    return hasher.digest()


#: Part of a structure's address: raise the number when assembly gives another result for the same ranks.
_STRUCTURE_DOMAIN = "checkpoint-structure/1"


def structure_digest(digests: Iterable[bytes]) -> bytes:
    """Returns the digest of a checkpoint's structure: that of its ranks' structures, in rank order."""
    return ordered_digest(_STRUCTURE_DOMAIN, digests)


def check_digest(digest: bytes, field: str) -> bytes:
    """Returns ``digest`` when it has the length of one; else raises InvalidArgumentError for ``field``."""
    if len(digest) != DIGEST_BYTES:
        raise InvalidArgumentError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}", field=field)
    return digest
