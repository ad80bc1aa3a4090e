"""DCP's own ``.metadata`` from columns: a pickle of torch's ``Metadata``, streamed, without torch or its objects.

Unpickled, it is what DCP would have written, object by object; only the order of ``storage_data`` is ours, and equal
immutable objects (sizes, offsets, names) may be one object. Every block is a frame, and whole in itself::

    preamble      names of classes and attributes, distinct properties, three empty dicts: all into the memo
    blocks        some thousand chunks each, into the dicts: see shardbook.core.pickled_chunks
    planner_data  into its dict
    end           Metadata, which takes the dicts from the memo
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final

import numpy as np

from shardbook.core import dtype as codes
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.columns import Int64Array
from shardbook.core.head import MetadataHeader, StorageMetaHeader
from shardbook.core.locate import Located
from shardbook.core.pickle_rows import (
    APPENDS,
    BUILD,
    DICT,
    FALSE,
    LIST,
    MARK,
    MEMOIZE,
    NEW,
    NONE,
    POP,
    REDUCE,
    SETITEMS,
    STACK_GLOBAL,
    START,
    STOP,
    TRUE,
    TUPLE,
    TUPLE1,
    Memo,
    framed,
    get,
    integer,
    optional_text,
    text,
)
from shardbook.core.pickled_chunks import ChunkWriter, Vocabulary
from shardbook.core.table import EntryKind, KeyPath, KeyPaths, printable
from shardbook.errors import UnsupportedMetadataError

_METADATA: Final = "torch.distributed.checkpoint.metadata"
#: Classes and attributes; what every chunk names comes first, where the memo costs two bytes.
_CLASSES: Final = {
    "Size": "torch",
    "ChunkStorageMetadata": _METADATA,
    "MetadataIndex": _METADATA,
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "TensorStorageMetadata": _METADATA,
    "TensorProperties": _METADATA,
    "BytesStorageMetadata": _METADATA,
}
_ATTRIBUTES: Final = (
    *("offsets", "sizes", "fqn", "index", "offset", "relative_path", "length", "transform_descriptors"),
    *("properties", "size", "chunks"),
)
_DICTS: Final = ("state_dict_metadata", "storage_data", "planner_data")
#: Memory formats that DCP can pickle: the first of ours, under the same numbers.
_PICKLED_FORMATS: Final = 3
#: Entries of planner_data in a frame.
_FRAME_PATHS: Final = 4096
_FLAGS: Final = (FALSE, TRUE)


def pickled_metadata(
    structure: CheckpointStructure, located: Located, prefix: str, header: MetadataHeader
) -> Iterator[bytes]:
    """Returns the content of ``.metadata`` in blocks of about a megabyte.

    Nothing is refused after the first block, so a file that is begun becomes whole.

    Args:
        structure: Entries and chunks.
        located: Where they lie.
        prefix: Directory of the data files, relative to the checkpoint's; empty when they lie in it.
        header: What belongs to the whole.

    Raises:
        UnsupportedMetadataError: A code that this release does not know, or a memory format that DCP cannot pickle.
    """
    unknown = set(header.attributes) - set(MetadataHeader().attributes)
    if unknown:
        raise UnsupportedMetadataError(f"the metadata has other attributes: {sorted(unknown)}", field="metadata")
    tensors = structure.kinds != EntryKind.BYTES
    for what, column, count, name in (
        ("dtype", structure.dtypes, codes.DTYPE_COUNT, None),
        ("layout", structure.layouts, codes.LAYOUT_COUNT, None),
        ("memory format", structure.memory_formats, _PICKLED_FORMATS, codes.memory_format_name),
    ):
        wrong = np.flatnonzero(tensors & (column >= count))
        if len(wrong):
            raise _unsupported(structure.fqns[int(wrong[0])], what, int(column[wrong[0]]), name)
    return _blocks(structure, located, prefix, header)


def _unsupported(fqn: str, what: str, code: int, name: Callable[[int], str] | None) -> UnsupportedMetadataError:
    named = f"code {code} of a newer release of shardbook"
    if name is not None and code < codes.MEMORY_FORMAT_COUNT:
        named = f"torch.{name(code)}"
    return UnsupportedMetadataError(
        f"{printable(fqn)!r} has the {what} {named}: DCP's .metadata cannot hold it",
        field="metadata",
        metadata={"fqn": printable(fqn), "type": named},
    )


def _blocks(structure: CheckpointStructure, located: Located, prefix: str, header: MetadataHeader) -> Iterator[bytes]:
    memo = Memo()
    preamble: list[bytes] = []

    def keep(pushes: bytes) -> bytes:
        preamble.append(pushes + MEMOIZE + POP)
        return get(memo.take())

    push = {name: keep(_global(module, name)) for name, module in _CLASSES.items()}
    push |= {name: keep(text(name)) for name in _ATTRIBUTES}
    push |= {f"{name} dict": keep(DICT) for name in _DICTS}
    properties, which = _properties(structure, located, push["TensorProperties"], keep)
    transforms = [_texts(names) for names in located.transforms]
    yield START + framed(preamble)
    chunks = ChunkWriter(structure, located, prefix, Vocabulary(push, properties, which, transforms), memo)
    yield from chunks.blocks(with_storage=header.has_storage_data)
    if structure.key_paths is not None:
        yield from _key_paths(structure.key_paths, push["planner_data dict"], structure.fqns, chunks.fqn_places, memo)
    yield framed((_whole(structure, push, header), STOP))


def _global(module: str, name: str) -> bytes:
    return text(module) + text(name) + STACK_GLOBAL


def _texts(names: Iterable[str]) -> bytes:
    """Pushes a list of names: a new one each time, since whoever unpickles may edit it."""
    return b"".join((LIST, MARK, *map(text, names), APPENDS))


def _dtype(code: int) -> bytes:
    return _global("torch", codes.dtype_name(code))


def _layout(code: int) -> bytes:
    return _global("torch.serialization", "_get_layout") + text(f"torch.{codes.layout_name(code)}") + TUPLE1 + REDUCE


def _memory_format(code: int) -> bytes:
    return _global(_METADATA, "_MEM_FORMAT_ENCODING") + integer(code) + TUPLE1 + REDUCE


def _properties(
    structure: CheckpointStructure, located: Located, new: bytes, keep: Callable[[bytes], bytes]
) -> tuple[list[bytes], Int64Array]:
    """Returns what pushes each distinct set of properties, and which of them an entry has, (T,).

    Their values are singletons of torch and come from the memo; the objects do not, planners may edit them.
    """
    tensors = structure.kinds != EntryKind.BYTES
    columns = (structure.dtypes, structure.layouts, structure.memory_formats)
    values = [
        {code: keep(push(code)) for code in np.unique(column[tensors]).tolist()}
        for column, push in zip(columns, (_dtype, _layout, _memory_format), strict=True)
    ]
    packed = np.zeros(structure.entry_count, dtype=np.int64)
    for place, column in enumerate((*columns, located.requires_grad, located.pin_memory)):
        packed |= column.astype(np.int64) << 8 * place
    distinct, inverse = np.unique(packed[tensors], return_inverse=True)
    which = np.zeros(structure.entry_count, dtype=np.int64)
    which[tensors] = inverse
    properties = []
    for one in distinct.tolist():
        dtype, layout, memory_format, grad, pin = one.to_bytes(5, "little")
        state = (values[0][dtype], values[1][layout], _FLAGS[grad], values[2][memory_format], _FLAGS[pin])
        properties.append(b"".join((new, NEW, MARK, *state, TUPLE, BUILD)))
    return properties, which


def _key_paths(
    key_paths: KeyPaths, push_dict: bytes, fqns: tuple[str, ...], fqn_places: Int64Array, memo: Memo
) -> Iterator[bytes]:
    """Fills planner_data; names that are in the memo already, or come again, are taken from it."""
    segments: dict[str, bytes] = {}

    def path_of(path: KeyPath) -> Iterator[bytes]:
        yield MARK
        for segment in path:
            if isinstance(segment, int):
                yield integer(segment)
            elif segment in segments:
                yield segments[segment]
            else:
                segments[segment] = get(memo.take())
                yield text(segment) + MEMOIZE
        yield TUPLE

    # Keys are the fqns in their order, as DCP's planner has it, or others.
    known = iter(zip(fqns, fqn_places.tolist(), strict=True))
    remaining = iter(key_paths)
    while batch := list(islice(remaining, _FRAME_PATHS)):
        parts = [push_dict, MARK]
        for key, path in batch:
            fqn, place = next(known, (None, 0))
            parts.append(get(place) if key == fqn else text(key))
            parts.extend(path_of(path))
        yield framed((*parts, SETITEMS, POP))


def _whole(structure: CheckpointStructure, push: dict[str, bytes], header: MetadataHeader) -> bytes:
    """Pushes the ``Metadata``, its attributes in the order of the header."""
    values = {
        "state_dict_metadata": push["state_dict_metadata dict"],
        "planner_data": NONE if structure.key_paths is None else push["planner_data dict"],
        "storage_data": push["storage_data dict"] if header.has_storage_data else NONE,
        "storage_meta": NONE if header.storage_meta is None else _storage_meta(header.storage_meta),
        "version": optional_text(header.version),
    }
    return _instance("Metadata", {name: values[name] for name in header.attributes})


def _storage_meta(meta: StorageMetaHeader) -> bytes:
    checkpoint_id = optional_text(meta.checkpoint_id)
    if meta.checkpoint_id_is_path and meta.checkpoint_id is not None:
        checkpoint_id = _global("pathlib", "PosixPath") + checkpoint_id + TUPLE1 + REDUCE
    values = {
        "checkpoint_id": checkpoint_id,
        "save_id": optional_text(meta.save_id),
        "load_id": optional_text(meta.load_id),
    }
    if meta.modules is not None:
        values["modules"] = _texts(meta.modules)
    return _instance("StorageMeta", values)


def _instance(name: str, values: dict[str, bytes]) -> bytes:
    state = b"".join(text(attribute) + pushes for attribute, pushes in values.items())
    return b"".join((_global(_METADATA, name), NEW, DICT, MARK, state, SETITEMS, BUILD))
