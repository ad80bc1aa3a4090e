"""What belongs to a checkpoint as a whole: torch's attributes as a ``MetadataHeader``, and back, exactly."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Final

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from shardbook.core.head import MetadataHeader, StorageMetaHeader
from shardbook.dcp._names import unsupported
from shardbook.errors import UnsupportedMetadataError

_META: Final = frozenset(("checkpoint_id", "save_id", "load_id"))
#: Attributes of torch's ``Metadata`` in the order of its fields.
METADATA_ATTRIBUTES = MetadataHeader().attributes


def storage_meta_of(header: StorageMetaHeader | None) -> StorageMeta | None:
    """Returns torch's object, attribute by attribute."""
    if header is None:
        return None
    meta = StorageMeta.__new__(StorageMeta)
    text = header.checkpoint_id
    meta.checkpoint_id = Path(text) if text is not None and header.checkpoint_id_is_path else text
    meta.save_id = header.save_id
    meta.load_id = header.load_id
    if header.modules is not None:
        meta.modules = list(header.modules)
    return meta


def header_of(metadata: Metadata) -> MetadataHeader:
    """Returns what belongs to the whole of ``metadata``; raises UnsupportedMetadataError where it has no exact form."""
    if type(metadata) is not Metadata:
        raise unsupported("metadata", metadata, "the object")
    attributes = tuple(metadata.__dict__)
    if "state_dict_metadata" not in attributes or not set(attributes) <= set(METADATA_ATTRIBUTES):
        raise UnsupportedMetadataError(f"the metadata has other attributes: {attributes}", field="metadata")
    version = metadata.version
    if version is not None and type(version) is not str:
        raise unsupported("version", version, "the value")
    return MetadataHeader(
        attributes=attributes,
        has_storage_data=metadata.storage_data is not None,
        version=version,
        storage_meta=_storage_meta_header(metadata.storage_meta),
    )


def plain_storage_meta(meta: StorageMeta | None) -> StorageMetaHeader | None:
    """Returns DCP's own fields of what a storage writer says of itself.

    What a subclass adds is left out: without it plain DCP can load the checkpoint, without the file it cannot.
    """
    if meta is None:
        return None
    given = {name: getattr(meta, name, None) for name in _META}
    return StorageMetaHeader(
        **{name: None if value is None else str(value) for name, value in given.items()},
        checkpoint_id_is_path=isinstance(meta.checkpoint_id, PurePath),
        modules=tuple(map(str, getattr(meta, "modules", ()))),
    )


def _storage_meta_header(meta: StorageMeta | None) -> StorageMetaHeader | None:
    if meta is None:
        return None
    if type(meta) is not StorageMeta or meta.__dict__.keys() - {"modules"} != _META:
        raise unsupported("storage_meta", meta, "the value")
    checkpoint_id = meta.checkpoint_id
    is_path = type(checkpoint_id) is type(Path())
    if not is_path and checkpoint_id is not None and type(checkpoint_id) is not str:
        raise unsupported("storage_meta", checkpoint_id, "the checkpoint_id")
    for value in (meta.save_id, meta.load_id):
        if value is not None and type(value) is not str:
            raise unsupported("storage_meta", value, "an id")
    modules = meta.__dict__.get("modules")
    if "modules" in meta.__dict__ and (type(modules) is not list or any(type(name) is not str for name in modules)):
        raise unsupported("storage_meta", modules, "the value of modules")
    return StorageMetaHeader(
        checkpoint_id=None if checkpoint_id is None else str(checkpoint_id),
        checkpoint_id_is_path=is_path,
        save_id=meta.save_id,
        load_id=meta.load_id,
        modules=None if modules is None else tuple(modules),
    )
