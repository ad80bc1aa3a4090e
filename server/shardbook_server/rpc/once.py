"""Writes of the catalogue as calls: made once by the id of their request, and answered with a message."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final, ParamSpec, TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.call import current_call
from shardbook_server.service.requests import RequestService, parse_request_id
from shardbook_server.storage.requests import RequestKey

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Message)

#: What a name begins with; a name that is none is refused by whoever reads the rest of it.
_PROJECT: Final = re.compile(r"projects/([a-zA-Z0-9._-]{1,128})/")


class Writes:
    """Runs writes in the write lane; belongs to the event loop's thread."""

    def __init__(self, bridge: Bridge, requests: RequestService) -> None:
        self._bridge = bridge
        self._requests = requests

    async def once(
        self,
        name: str,
        request: Any,
        told: Callable[[T], R],
        call: Callable[P, T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Returns what a service's method answers, or answered when the same request was made before.

        Args:
            name: The call's name in ``failpoints.POINTS``.
            request: A message with a ``request_id``, which may be empty.
            told: Makes the method's answer a message; in the thread, too.
            call: The service's method.
            *args: Passed on.
            **kwargs: Passed on.

        Raises:
            InvalidArgumentError: The id is none, or was used for something else.
            ShardbookError: What the service raised.
        """
        if not request.request_id:
            return told(await self._bridge.write(name, call, *args, **kwargs))
        key = _key(request)
        made = await self._bridge.write(
            name, self._requests.once, key, _digest(request), lambda: told(call(*args, **kwargs)).SerializeToString()
        )
        return cast("R", _answer_to(request.DESCRIPTOR).FromString(made))


def _key(request: Any) -> RequestKey:
    call = current_call()
    request_id = parse_request_id(request.request_id)
    project = _PROJECT.match(_about(request))
    return RequestKey("" if project is None else project[1], call.principal, call.method, request_id)


def _about(request: Any) -> str:
    """Returns the name of what a request is about."""
    for field in ("name", "parent", "subject"):
        if hasattr(request, field):
            return str(getattr(request, field))
    if hasattr(request, "moves"):
        return request.moves[0].name if request.moves else ""
    return str(request.alias.name if hasattr(request, "alias") else request.checkpoint.name)


def _digest(request: Message) -> bytes:
    """Returns the digest of what a request asks, whoever serialized it and under whichever id."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("request_id")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


@cache
def _answer_to(request: Descriptor) -> type[Message]:
    """Returns the class of a call's answer, which is named like its request and stands beside it."""
    name = request.name.removesuffix("Request") + "Response"
    return GetMessageClass(request.file.message_types_by_name[name])
