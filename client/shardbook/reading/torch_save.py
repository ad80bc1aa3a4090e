"""Items that ``torch.save`` wrote: a zip archive whose records are stored as they are, one of them the tensor's memory.

Only the archive's directory, its few small records and the wanted part of the memory are read. The archive's checksums
are not looked at: torch can leave them out (``torch.serialization.set_crc32_options``), and reads such files.
"""

from __future__ import annotations

import struct
import zipfile
from typing import Final

from shardbook.errors import CorruptDataError, FailedPreconditionError, InvalidArgumentError
from shardbook.reading.stored import StoredTensor
from shardbook.reading.tensor_pickle import PickledTensor, read_tensor_pickle
from shardbook.reading.window import Window, WindowFile

#: How a zip archive begins, and a file of torch before 1.6.
MAGIC: Final = b"PK\x03\x04"
_LEGACY_MAGIC: Final = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
#: Of torch's 1,513 to 1,641 bytes around a tensor's memory, most lie before it, its directory behind it.
HEAD_BYTES: Final = 4096
TAIL_BYTES: Final = 4096
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")
_MAX_PICKLE_BYTES: Final = 1 << 20


def stored_tensor(window: Window, shape: tuple[int, ...], dtype: str, itemsize: int) -> StoredTensor:
    """Returns where an item has its tensor.

    Args:
        window: The item.
        shape: What the checkpoint's metadata says of the chunk, elements.
        dtype: torch's name, likewise.
        itemsize: Bytes of an element.

    Raises:
        CorruptDataError: The archive is damaged, or holds another tensor.
        FailedPreconditionError: It holds something else (reason ``UNSAFE_ENTRY``).
        InvalidArgumentError: It is compressed (``UNSUPPORTED_FORMAT``).
    """
    records = _records(window)
    described = _described(window, records)
    if described.shape != shape or described.dtype != dtype:
        raise window.corrupt(
            f"it holds {described.dtype} of {list(described.shape)}, "
            f"the checkpoint's metadata says {dtype} of {list(shape)}"
        )
    memory = records.get(f"data/{described.key}")
    if memory is None:
        raise window.corrupt("it lacks its tensor's memory")
    start, size_bytes = _content_of(window, memory)
    order = records.get("byteorder")
    byteorder = b"little" if order is None else _read(window, order)
    if byteorder not in (b"little", b"big"):
        raise window.corrupt(f"unknown byte order {byteorder!r}")
    return StoredTensor(
        start=start,
        size_bytes=size_bytes - size_bytes % itemsize,
        offset=described.offset,
        strides=described.strides,
        is_big_endian=byteorder == b"big",
        is_conjugate=described.is_conjugate,
        is_negative=described.is_negative,
    )


def check_not_legacy(window: Window, beginning: bytes) -> None:
    """Raises InvalidArgumentError, reason ``UNSUPPORTED_FORMAT``, for a file as torch wrote it before 1.6."""
    if beginning[:2] == b"\x80\x02" and _LEGACY_MAGIC in beginning:
        raise InvalidArgumentError(
            f"{window.path!a} at byte {window.base} is in torch.save's format before 1.6, a bare pickle: load it with "
            "torch and save it again",
            reason="UNSUPPORTED_FORMAT",
            field="fqn",
        )


def _records(window: Window) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by their names below its one folder."""
    try:
        with zipfile.ZipFile(WindowFile(window)) as archive:
            found = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError) as error:
        raise window.corrupt(f"it is no whole archive ({error})") from error
    pickles = [name for name in found if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise window.corrupt(f"it has {len(pickles)} descriptions of tensors")
    folder = pickles[0].removesuffix("data.pkl")
    return {name.removeprefix(folder): info for name, info in found.items() if name.startswith(folder)}


def _described(window: Window, records: dict[str, zipfile.ZipInfo]) -> PickledTensor:
    content = _read(window, records["data.pkl"])
    try:
        return read_tensor_pickle(content)
    except CorruptDataError as error:
        raise window.corrupt(error.message) from error
    except FailedPreconditionError as error:
        raise FailedPreconditionError(
            f"{window.path!a} at byte {window.base}: {error.message}", reason=error.reason
        ) from error


def _read(window: Window, record: zipfile.ZipInfo) -> bytes:
    start, size_bytes = _content_of(window, record)
    if size_bytes > _MAX_PICKLE_BYTES:
        raise window.corrupt(f"its record {record.filename!a} is too long")
    return bytes(window.read(start, size_bytes))


def _content_of(window: Window, record: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte, in the item, and length of what a record holds."""
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
        raise InvalidArgumentError(
            f"{window.path!a} at byte {window.base}: its archive is compressed, which torch.save never does",
            reason="UNSUPPORTED_FORMAT",
            field="fqn",
        )
    header = window.read(record.header_offset, _LOCAL_HEADER.size)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if magic != MAGIC:
        raise window.corrupt(f"its record {record.filename!a} does not begin where the archive says")
    start = record.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    window.range(start, record.file_size)
    return start, record.file_size


__all__ = ["HEAD_BYTES", "MAGIC", "TAIL_BYTES", "check_not_legacy", "stored_tensor"]
