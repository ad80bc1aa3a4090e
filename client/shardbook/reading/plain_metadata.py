"""DCP's own ``.metadata`` without torch: a pickle, read so that nothing in it can run.

As in ``shardbook.dcp.pickled`` only what DCP's metadata is made of may be named; here every name is a stand-in that
keeps facts, made anew for each file, so that nothing of this process can be reached by what a pickle writes.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import numpy as np

from shardbook.core.dtype import dtype_names
from shardbook.core.limits import INT64_MAX, MAX_NDIM
from shardbook.errors import FailedPreconditionError
from shardbook.reading.chunks import TensorChunks, bytes_entry

_T = TypeVar("_T")

_METADATA: Final = "torch.distributed.checkpoint.metadata"
#: Classes with attributes.
_RECORDS: Final = frozenset(
    {
        *(
            (_METADATA, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "StorageMeta",
                "TensorStorageMetadata",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)
#: Here, and where releases before 2.3 kept it.
_PROPERTIES: Final = frozenset(
    (module, "TensorProperties") for module in (_METADATA, "torch.distributed._shard.sharded_tensor.metadata")
)
#: Called with one argument, which is what they mean.
_WRAPPERS: Final = frozenset(
    {
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
    }
)
#: Called with whatever they are called with, and not looked at.
_IGNORED: Final = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "PurePosixPath"),
    }
)
_DTYPES: Final = frozenset(dtype_names())


class _Record:
    """An object of DCP's with its attributes; which class it is of says ``kind``."""

    kind = ""


class _Properties(_Record):
    """Properties of a tensor, which make a tuple of themselves; attributes in older releases."""

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Index(_Record):
    """A key of the storage data: as in DCP the index takes no part in equality."""

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self._key() == other._key()

    def _key(self) -> tuple[object, object]:
        return self.__dict__.get("fqn"), self.__dict__.get("offset")


def _index(fqn: str, offset: tuple[int, ...]) -> _Index:
    key = _Index()
    key.__dict__.update(fqn=fqn, offset=offset)
    return key


class _Ignored:
    """What is built, and not looked at."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass


class _Named(str):
    """A dtype or layout by its name."""

    __slots__ = ()


class _Unpickler(pickle.Unpickler):
    """Puts stand-ins in the place of DCP's names and refuses every other one."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in; called for every name in the pickle."""
        known = (module, name)
        if known not in self._made:
            self._made[known] = _stand_in(module, name)
        return self._made[known]

    def persistent_load(self, pid: Any) -> Any:
        """Refuses objects that are said to be stored elsewhere: metadata has none."""
        raise _unsafe(f"it refers to {pid!r:.80}")


def _stand_in(module: str, name: str) -> Any:
    known = (module, name)
    if known in _RECORDS:
        return type(name, (_Record,), {"kind": name})
    if known in _PROPERTIES:
        return type(name, (_Properties,), {"kind": name})
    if known == (_METADATA, "MetadataIndex"):
        return type(name, (_Index,), {"kind": name})
    if known == ("torch", "Size"):
        return type(name, (tuple,), {})
    if known in _WRAPPERS:
        return lambda value: value
    if known in _IGNORED:
        return type(name, (_Ignored,), {})
    if module == "torch" and name in _DTYPES:
        return _Named(name)
    raise _unsafe(f"it names {module}.{name}")


def read_plain_metadata(content: bytes, fqns: Iterable[str] | None = None) -> dict[str, TensorChunks | None]:
    """Returns entries of a ``.metadata`` file by name, all or some; None for a name that it lacks.

    Raises:
        FailedPreconditionError: Reason ``UNSAFE_METADATA``: it holds something else than DCP's metadata.
    """

    def read(metadata: Any) -> dict[str, TensorChunks | None]:
        wanted = list(metadata.state_dict_metadata) if fqns is None else fqns
        return {fqn: _entry(metadata, fqn) for fqn in wanted}

    return read_stand_ins(content, read)


def read_stand_ins(content: bytes, read: Callable[[Any], _T]) -> _T:
    """Returns what ``read`` makes of the metadata in a ``.metadata`` file: stand-ins with DCP's attributes.

    Raises:
        FailedPreconditionError: Reason ``UNSAFE_METADATA``: it holds something else than DCP's metadata, or ``read``
            raised what is not one of these itself.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # nothing of millions of objects is garbage, and looking for it takes as long as making them
    try:
        metadata = _Unpickler(content).load()
        if getattr(metadata, "kind", "") != "Metadata":
            raise _unsafe(f"it holds a {type(metadata).__name__}")
        return read(metadata)
    except FailedPreconditionError:
        raise
    except Exception as error:  # what damaged pickles raise has no bound
        raise _unsafe(f"it is damaged ({type(error).__name__}: {error!s:.200})") from error
    finally:
        if was_enabled:
            gc.enable()


def _entry(metadata: Any, fqn: str) -> TensorChunks | None:
    entry = metadata.state_dict_metadata.get(fqn)
    if entry is None:
        return None
    if entry.kind == "BytesStorageMetadata":
        return bytes_entry(fqn)
    dtype, layout = _properties(entry.properties)
    shape = tuple(_whole(size) for size in entry.size)
    offsets = [tuple(map(_whole, chunk.offsets)) for chunk in entry.chunks]
    sizes = [tuple(map(_whole, chunk.sizes)) for chunk in entry.chunks]
    if len(shape) > MAX_NDIM or any(len(box) != len(shape) for box in (*offsets, *sizes)):
        raise ValueError(f"chunks of {fqn!a} have other dimensions than the tensor")
    found = [metadata.storage_data[_index(fqn, offset)] for offset in offsets]
    paths = {str(info.relative_path): None for info in found}
    numbers = {path: number for number, path in enumerate(paths)}
    transforms = [tuple(map(str, getattr(info, "transform_descriptors", None) or ())) for info in found]
    lists = {names: 1 + number for number, names in enumerate(dict.fromkeys(filter(None, transforms)))}
    return TensorChunks(
        fqn=fqn,
        is_tensor=True,
        dtype=dtype,
        layout=layout,
        shape=shape,
        offsets=np.array(offsets, np.int64).reshape(-1, len(shape)) if shape else np.zeros((len(found), 0), np.int64),
        sizes=np.array(sizes, np.int64).reshape(-1, len(shape)) if shape else np.zeros((len(found), 0), np.int64),
        paths=tuple(paths),
        file=np.array([numbers[str(info.relative_path)] for info in found], np.int64),
        start=np.array([_whole(info.offset) for info in found], np.int64),
        length=np.array([_whole(info.length) for info in found], np.int64),
        transforms=tuple(lists),
        transform_index=np.array([lists.get(names, 0) for names in transforms], np.int64),
    )


def _properties(properties: Any) -> tuple[str, str]:
    """dtype and layout: of a tuple, or of attributes as older releases pickled them."""
    state = properties.__dict__.get("state")
    dtype, layout = state[:2] if isinstance(state, tuple) else (properties.dtype, properties.layout)
    if not isinstance(dtype, _Named):
        raise TypeError("a dtype is none")
    return str(dtype), str(layout).removeprefix("torch.")


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= INT64_MAX:
        raise ValueError("a size is none")
    return value


def _unsafe(why: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f".metadata is not DCP's metadata alone: {why}; nothing in it was executed", reason="UNSAFE_METADATA"
    )


__all__ = ["read_plain_metadata", "read_stand_ins"]
