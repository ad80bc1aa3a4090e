"""Etags: short words for what something is like, so that nobody changes what somebody else has changed meanwhile.

They are made from the content (AIP-154), so that they are the same on every replica and after a restart, and nothing
has to be stored. Which content: what people can change, and the state; not what time or others' saves do to it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from shardbook.core.refusals import changed_since
from shardbook.errors import AbortedError
from shardbook_server.service.views import CheckpointInfo

_CHARS: Final = 22


def checkpoint_etag(info: CheckpointInfo) -> str:
    """Returns the etag of a checkpoint with all that is said of it."""
    return etag_of(
        info.checkpoint_id,
        int(info.state),
        info.location.location,
        info.location.prefix,
        list(info.other_locations),
        dict(info.labels),
        dict(info.metrics),
        info.note,
        info.data_missing,
        int(info.file_deletion),
    )


def etag_of(*content: object) -> str:
    """Returns the etag of content that JSON can say; in quotes, as RFC 9110 has it."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:_CHARS]}"'


def check_etag(asked: str, current: str, what: str, field: str) -> None:
    """Refuses to change what is not as the caller saw it; an empty ``asked`` sees everything as it is.

    Raises:
        AbortedError: It was changed since (``ETAG_MISMATCH``).
    """
    if asked and asked != current:
        raise AbortedError(changed_since(what), field=field)
