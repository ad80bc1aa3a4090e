"""Streams that a storage writer's extensions changed, and back: DCP names them in an item's transform descriptors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

import zstandard

from shardbook.errors import CorruptDataError, InvalidArgumentError
from shardbook.reading.ranges import Buffer

#: Bytes that an item may have beyond its values; ``torch.save`` adds 1,641 at most.
_ROOM_BYTES: Final = 1 << 20


def check_transforms(descriptors: Sequence[str], fqn: str) -> None:
    """Raises InvalidArgumentError, reason ``UNSUPPORTED_TRANSFORM``, for a transform that only torch can undo."""
    for descriptor in descriptors:
        name, _, version = descriptor.partition("/")
        if name != "stream.zstd" or version.partition(".")[0] != "1":
            raise InvalidArgumentError(
                f"{fqn!a} was written through the stream transform {descriptor!a}, which only the extension that "
                "wrote it can undo: load it with torch and that extension",
                reason="UNSUPPORTED_TRANSFORM",
                field="fqn",
            )


def undo_transforms(content: Buffer, descriptors: Sequence[str], values_bytes: int) -> bytes:
    """Returns an item as it was before the transforms; at most ``values_bytes`` and some more.

    Args:
        content: The item.
        descriptors: As in DCP's storage data, checked by ``check_transforms``.
        values_bytes: Bytes of the values in it.

    Raises:
        CorruptDataError: It is damaged, or inflates to more than that.
    """
    plain = bytes(content)
    for _ in descriptors:
        out, limit = io.BytesIO(), values_bytes + _ROOM_BYTES
        try:
            with zstandard.ZstdDecompressor().stream_reader(plain, read_across_frames=True) as stream:
                while block := stream.read(min(1 << 20, limit + 1 - out.tell())):
                    out.write(block)
        except zstandard.ZstdError as error:
            raise CorruptDataError(f"a compressed item is damaged: {error}") from error
        if out.tell() > limit:
            raise CorruptDataError(f"a compressed item of {values_bytes} bytes inflates to more")
        plain = out.getvalue()
    return plain


__all__ = ["check_transforms", "undo_transforms"]
