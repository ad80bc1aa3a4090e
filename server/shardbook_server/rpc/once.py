"""Writes of the catalogue as calls: made once by the id of their request, and answered with a message."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.call import current_call
from shardbook_server.service.requests import RequestService, parse_request_id
from shardbook_server.storage.requests import RequestKey

R = TypeVar("R", bound=Message)

#: What a name begins with; a name that is none is refused by whoever reads the rest of it.
_PROJECT: Final = re.compile(r"projects/([a-zA-Z0-9._-]{1,128})/")


class Writes:
    """Runs writes in the write lane; belongs to the event loop's thread."""

    def __init__(self, bridge: Bridge, requests: RequestService) -> None:
        self._bridge = bridge
        self._requests = requests

    async def once(self, name: str, request: Any, about: str, answer: type[R], write: Callable[[], R]) -> R:
        """Returns what ``write`` answers, or answered when the same request was made before.

        Args:
            name: The call's name in ``failpoints.POINTS``.
            request: A message with a ``request_id``, which may be empty.
            about: Name of what it is about, of whose project it is.
            answer: Class of the answer.
            write: Calls the service, in a thread, and makes its answer a message.

        Raises:
            InvalidArgumentError: The id is none, or was used for something else.
            ShardbookError: What the service raised.
        """
        if not request.request_id:
            return await self._bridge.write(name, write)
        call = current_call()
        request_id = parse_request_id(request.request_id)
        project = _PROJECT.match(about)
        key = RequestKey("" if project is None else project[1], call.principal, call.method, request_id)
        digest = _digest(request)
        made = await self._bridge.write(name, self._requests.once, key, digest, lambda: write().SerializeToString())
        return answer.FromString(made)


def _digest(request: Message) -> bytes:
    """Returns the digest of what a request asks, whoever serialized it and under whichever id."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("request_id")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()
