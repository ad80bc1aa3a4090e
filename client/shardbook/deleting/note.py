"""The note ``.shardbook/{prefix}/deleted``: the attempt is being deleted, and these are its files.

From the moment it is there no reader or publisher of Shardbook counts the attempt. It is the last thing to go, so that
a deletion that was interrupted is found again and knows what is left to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from shardbook.core import limits
from shardbook.core.container import read_container, write_container
from shardbook.core.manifest import AttemptIdentity
from shardbook.errors import CorruptManifestError

_KIND: Final = "note of a deletion"


@dataclass(frozen=True)
class DeletionNote:
    """What is being deleted.

    Attributes:
        identity: The attempt.
        files: Its data files, relative to the checkpoint's directory; all in the attempt's own directory.

    Raises:
        CorruptManifestError: A file lies elsewhere.
    """

    identity: AttemptIdentity
    files: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.files:
            check_inside(name, self.identity.prefix)

    def to_bytes(self) -> bytes:
        """Returns the content of the note's file."""
        names = json.dumps([name.removeprefix(f"{self.identity.prefix}/") for name in self.files]).encode()
        return write_container(_KIND, {"identity": self.identity.to_json(), "files": names})

    @classmethod
    def of(cls, content: bytes, prefix: str) -> DeletionNote:
        """Returns the note in ``content``; raises CorruptManifestError when it is damaged, or not of this attempt."""
        sections = read_container(content, _KIND)
        try:
            identity = AttemptIdentity.from_json(sections["identity"])
            if identity.prefix != prefix:
                raise CorruptManifestError(f"a {_KIND} in {prefix} is of {identity.prefix}")
            names = json.loads(sections["files"])
            return cls(identity, tuple(f"{identity.prefix}/{name}" for name in names))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptManifestError(f"a {_KIND} is damaged: {error}") from error


def check_inside(name: str, prefix: str) -> str:
    """Returns the path of a data file when it lies in the attempt's directory; in none above it, anyway.

    Raises:
        CorruptManifestError: It does not: what is deleted is never named by a file that somebody else may have written.
    """
    parts = name.split("/")
    is_inside = not prefix or parts[0] == prefix
    if not is_inside or any(part in ("", ".", "..") for part in parts) or len(name) > limits.MAX_FILE_NAME_BYTES:
        raise CorruptManifestError(f"{name[:200]!a} is no file of the checkpoint")
    return name


__all__ = ["DeletionNote", "check_inside"]
