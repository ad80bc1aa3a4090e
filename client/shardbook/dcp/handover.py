"""Objects that hold tensors, put into memory that another process can read, without a process group.

Pickling is the copy: the bytes of every tensor go straight into one anonymous file in memory (``memfd``), where the
other process maps them; the pickles lie behind them. One descriptor a hand-over however many tensors, nothing in
``/dev/shm``, and nothing left behind when both processes are killed: the kernel frees it with its last user.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Final

import torch

from shardbook.core.table import printable
from shardbook.dcp._torch import (
    DTensor,
    ShardedTensor,
    dtensor_parts,
    identity_of,
    rebuild_dtensor,
    rebuild_sharded_tensor,
    storage_of,
    typed_storage,
)
from shardbook.errors import InvalidArgumentError

#: Where a tensor's memory begins, bytes: what vector instructions and torch's own allocator want.
_ALIGNMENT: Final = 64
#: How deep a state dict is searched for what cannot be pickled.
_DEEPEST: Final = 50


@dataclass(frozen=True)
class Place:
    """Where something lies in the memory that was handed over, bytes."""

    start: int
    length: int


@dataclass(frozen=True)
class Packed:
    """Memory to hand over. Its descriptor is the caller's to close.

    Attributes:
        descriptor: Of the anonymous file.
        places: Where each object's pickle lies.
    """

    descriptor: int
    places: dict[str, Place]


class _Storages:
    """Memory of tensors that pickles refer to, each once, and where its copy will lie."""

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}
        #: Also keeps them alive: their addresses are keys.
        self.found: list[tuple[torch.UntypedStorage, Place]] = []
        self.size_bytes = 0

    def place(self, storage: torch.UntypedStorage) -> Place:
        identity = identity_of(storage)
        place = self._places.get(identity)
        if place is None:
            start = -(-self.size_bytes // _ALIGNMENT) * _ALIGNMENT
            place = self._places[identity] = Place(start, storage.nbytes())
            self.found.append((storage, place))
            self.size_bytes = start + place.length
        return place


class _MainModuleError(pickle.PicklingError):
    """A name of ``__main__``, which means something else in the other process."""


class _Pickler(pickle.Pickler):
    """Leaves the memory of tensors out of the pickle."""

    def __init__(self, stream: io.BytesIO, storages: _Storages) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._storages = storages

    def persistent_id(self, obj: Any) -> tuple[int, int, torch.dtype] | None:
        """Names a storage by where its copy lies."""
        storage = storage_of(obj)
        if storage is None:
            return None
        place = self._storages.place(storage[0])
        return place.start, place.length, storage[1]

    def reducer_override(self, obj: Any) -> Any:
        """Takes tensors of many processes apart, whose own pickles need a process group or a device."""
        if type(obj) is DTensor:
            return rebuild_dtensor, dtensor_parts(obj)
        if isinstance(obj, ShardedTensor):
            return rebuild_sharded_tensor, (obj.local_shards(), obj.metadata(), obj.sharding_spec())
        if isinstance(obj, (type, FunctionType)) and obj.__module__ == "__main__":
            raise _MainModuleError(
                f"{obj.__qualname__} is defined in the training script, which the save process does not run: move it "
                "into a module of its own, or use AsyncCheckpointerType.THREAD"
            )
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Finds the memory of tensors where it was handed over."""

    def __init__(self, stream: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(stream)
        self._memory = memory
        self._found: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: tuple[int, int, torch.dtype]) -> Any:
        """Returns the storage; what shares memory there shares it here."""
        start, length, dtype = pid
        if not length:
            storage = torch.UntypedStorage(0)
        elif start in self._found:
            storage = self._found[start]
        else:
            storage = self._found[start] = _view(self._memory, Place(start, length))
        return typed_storage(storage, dtype)


def pack(objects: Mapping[str, object]) -> Packed:
    """Copies objects into memory that can be handed over.

    Args:
        objects: By name, which is the field that an error names. Tensors on any device.

    Raises:
        InvalidArgumentError: An object cannot be pickled (reason ``UNPICKLABLE``); the message names it.
        OSError: There is no memory for it.
    """
    storages = _Storages()
    pickles: dict[str, memoryview] = {}
    for field, value in objects.items():
        try:
            pickles[field] = _pickled(value, storages)
        except Exception as error:
            raise _refusal(field, *_culprit(value, error)) from error
    places: dict[str, Place] = {}
    end = storages.size_bytes
    for field, content in pickles.items():
        places[field] = Place(end, len(content))
        end += len(content)
    descriptor = os.memfd_create("shardbook-save")
    try:
        os.ftruncate(descriptor, end)
        memory = mmap.mmap(descriptor, end)
        for storage, place in storages.found:
            if place.length:
                _view(memory, place).copy_(storage)
        for field, content in pickles.items():
            memory[places[field].start : places[field].start + len(content)] = content
    except BaseException:
        os.close(descriptor)
        raise
    return Packed(descriptor, places)


def unpack(packed: Packed) -> dict[str, Any]:
    """Returns the objects by name, and closes the descriptor.

    Their tensors lie in the memory itself; it is freed with the last of them. Writing to them changes this process's
    copy alone.

    Raises:
        InvalidArgumentError: One cannot be made again here (reason ``UNPICKLABLE``).
    """
    try:
        memory = mmap.mmap(packed.descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(packed.descriptor)
    objects: dict[str, Any] = {}
    for field, place in packed.places.items():
        stream = io.BytesIO(memory[place.start : place.start + place.length])
        try:
            objects[field] = _Unpickler(stream, memory).load()
        except Exception as error:
            raise _refusal(field, "", error) from error
    return objects


def _view(memory: mmap.mmap, place: Place) -> torch.UntypedStorage:
    return torch.frombuffer(memory, dtype=torch.uint8, count=place.length, offset=place.start).untyped_storage()


def _pickled(value: object, storages: _Storages) -> memoryview:
    stream = io.BytesIO()
    with torch.no_grad():  # what pickling looks at is no step of anybody's graph
        _Pickler(stream, storages).dump(value)
    return stream.getbuffer()


def _refusal(field: str, fqn: str, error: Exception) -> InvalidArgumentError:
    shown = f" at {printable(fqn)!r}" if fqn else ""
    return InvalidArgumentError(
        f"{field}{shown} cannot be handed to the save process: {type(error).__name__}: {error}",
        reason="UNPICKLABLE",
        field=field,
        metadata={"fqn": printable(fqn)} if fqn else {},
    )


def _culprit(value: object, error: Exception, path: str = "", depth: int = 0) -> tuple[str, Exception]:
    """Returns where in nested dicts and lists the first entry is that cannot be pickled, and why it cannot."""
    for key, inner in _entries(value) if depth < _DEEPEST else ():
        try:
            _pickled(inner, _Storages())
        except Exception as found:  # noqa: BLE001 - pickling runs the user's code
            return _culprit(inner, found, f"{path}.{key}" if path else str(key), depth + 1)
    return path, error


def _entries(value: object) -> list[tuple[object, object]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []
