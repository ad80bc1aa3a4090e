"""torch's ``Metadata`` of a checkpoint, of which only that is fetched which somebody looks at.

For planners and readers that know ``Metadata`` alone. Entries that they look at one by one cost a question each, so
``prefetch`` asks for many at once; whoever walks through all of them gets all of them. Values stay as they are made or
changed: planners edit them in place. ``LoadPlanner`` asks for boxes instead, which costs less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, overload

from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, MetadataIndex, StorageMeta

from shardbook.core.found import FoundChunks
from shardbook.core.head import MetadataHeader
from shardbook.core.wanted import Wanted
from shardbook.dcp._torch import StorageInfo
from shardbook.dcp.headers import storage_meta_of
from shardbook.dcp.metadata import build_metadata, found_entries
from shardbook.sources import ChunkSource

K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")


class LazyDict(dict[K, V]):
    """A dict that fetches what it lacks when it is looked for, and the rest when it is looked at as a whole.

    Not thread-safe, as a dict that is changed is not. Pickled, or copied deeply, with its source and what it holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_whole = False
        self._absent: set[K] = set()

    def _fetch(self, key: K) -> None:
        """Adds ``key`` where the source has it."""
        raise NotImplementedError

    def _fetch_all(self) -> dict[K, V]:
        """Returns everything that the source has, in its order."""
        raise NotImplementedError

    def _keep(self, fetched: dict[K, V]) -> None:
        """Adds what was fetched; what is there stays, with whatever was done to it, and what was removed stays away."""
        if not super().__len__() and not self._absent:
            super().update(fetched)  # thousands at once, at the first question
            return
        for key, value in fetched.items():
            if not super().__contains__(key) and key not in self._absent:
                super().__setitem__(key, value)

    def _look(self, key: K) -> bool:
        if super().__contains__(key):
            return True
        if self._is_whole or key in self._absent:
            return False
        self._fetch(key)
        found = super().__contains__(key)
        if not found:
            self._absent.add(key)
        return found

    def _complete(self) -> None:
        if self._is_whole:
            return
        held = dict(super().items())
        stored = {key: held.pop(key, value) for key, value in self._fetch_all().items() if key not in self._absent}
        super().clear()
        super().update(stored)
        super().update(held)  # added by whoever uses it
        self._is_whole = True

    def __missing__(self, key: K) -> V:
        if self._look(key):
            return super().__getitem__(key)
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return self._look(key)  # type: ignore[arg-type]

    @overload
    def get(self, key: K, default: None = None, /) -> V | None: ...
    @overload
    def get(self, key: K, default: V, /) -> V: ...
    @overload
    def get(self, key: K, default: D, /) -> V | D: ...
    def get(self, key: K, default: Any = None, /) -> Any:
        """Returns the value of ``key``."""
        return super().__getitem__(key) if self._look(key) else default

    def __setitem__(self, key: K, value: V) -> None:
        self._absent.discard(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: K) -> None:
        if not self._look(key):
            raise KeyError(key)
        self._absent.add(key)
        super().__delitem__(key)

    def pop(self, key: K, *default: Any) -> Any:
        """Removes ``key`` and returns its value."""
        if not self._look(key):
            if default:
                return default[0]
            raise KeyError(key)
        self._absent.add(key)
        return super().pop(key)

    def setdefault(self, key: K, default: Any = None, /) -> Any:
        """Returns the value of ``key``, which it gets when it has none."""
        if not self._look(key):
            self[key] = default
        return super().__getitem__(key)

    def update(self, *others: Any, **more: Any) -> None:
        """Adds values."""
        for key, value in dict(*others, **more).items():
            self[key] = value

    def clear(self) -> None:
        """Removes everything."""
        self._is_whole = True
        super().clear()

    def popitem(self) -> tuple[K, V]:
        """Removes the last entry."""
        self._complete()
        return super().popitem()

    def copy(self) -> dict[K, V]:
        """Returns everything as a plain dict."""
        self._complete()
        return dict(super().items())

    def __iter__(self) -> Iterator[K]:
        self._complete()
        return super().__iter__()

    def __reversed__(self) -> Iterator[K]:
        self._complete()
        return super().__reversed__()

    def __len__(self) -> int:
        self._complete()
        return super().__len__()

    def keys(self) -> Any:
        """Returns all keys."""
        self._complete()
        return super().keys()

    def values(self) -> Any:
        """Returns all values."""
        self._complete()
        return super().values()

    def items(self) -> Any:
        """Returns all pairs."""
        self._complete()
        return super().items()

    def __eq__(self, other: object) -> bool:
        self._complete()
        if isinstance(other, LazyDict):
            other._complete()
        return super().__eq__(other)

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {super().__len__()} fetched{'' if self._is_whole else ' so far'}>"

    def _held(self) -> dict[K, V]:
        return dict(super().items())

    def _state(self) -> tuple[dict[K, V], set[K], bool]:
        return self._held(), self._absent, self._is_whole

    def _restore(self, held: dict[K, V], absent: set[K], is_whole: bool) -> None:
        super().update(held)
        self._absent, self._is_whole = absent, is_whole


class LazyEntries(LazyDict[str, STORAGE_TYPES]):
    """``Metadata.state_dict_metadata``: each entry's shape, dtype and chunks."""

    def __init__(self, owner: LazyMetadata) -> None:
        super().__init__()
        self._owner = owner

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (self._owner, "state_dict_metadata")

    def _fetch(self, key: str) -> None:
        if self._owner.has_everything:
            self._complete()
        elif isinstance(key, str):
            self._owner.prefetch([key])

    def _fetch_all(self) -> dict[str, STORAGE_TYPES]:
        return self._owner.everything().state_dict_metadata


class LazyStorage(LazyDict[MetadataIndex, StorageInfo]):
    """``Metadata.storage_data``: where each chunk lies."""

    def __init__(self, owner: LazyMetadata) -> None:
        super().__init__()
        self._owner = owner

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (self._owner, "storage_data")

    def _fetch(self, key: MetadataIndex) -> None:
        if self._owner.has_everything:
            self._complete()
        elif isinstance(key, MetadataIndex):
            self._owner.prefetch([key.fqn])

    def _fetch_all(self) -> dict[MetadataIndex, StorageInfo]:
        stored: dict[MetadataIndex, StorageInfo] = self._owner.everything().storage_data
        return stored


class LazyMetadata(Metadata):
    """A checkpoint's metadata, see the module. Not thread-safe; picklable as its source is."""

    def __init__(self, source: ChunkSource) -> None:
        """Fetches nothing.

        Args:
            source: Who is asked.
        """
        self.source = source
        self._everything: Metadata | None = None
        self._fetched: set[str] = set()
        self._planner_data: Any = None
        self._has_planner_data = False
        self._storage_meta: StorageMeta | None = None
        self._has_storage_meta = False
        self._version: str | None = None
        self._has_version = False
        self.state_dict_metadata = self._entries = LazyEntries(self)
        self.storage_data = self._places = LazyStorage(self)

    def query(self, wanted: Wanted) -> FoundChunks:
        """Returns the chunks that meet the wanted boxes; one question."""
        return self.source.query(wanted)

    def note_places(self, places: dict[MetadataIndex, StorageInfo]) -> None:
        """Keeps where chunks lie that are about to be read, so that the reader need not ask again."""
        self._places._keep(places)  # noqa: SLF001

    def prefetch(self, fqns: Iterable[str]) -> None:
        """Fetches the entries of some names, as far as they are there, and where their chunks lie; one question."""
        absent = [fqn for fqn in dict.fromkeys(fqns) if fqn not in self._fetched]
        if not absent:
            return
        found, places = found_entries(self.source.query(Wanted.all_of(absent)))
        self._fetched.update(absent)
        self._entries._keep(found)  # noqa: SLF001
        self._places._keep(places)  # noqa: SLF001

    @property
    def has_everything(self) -> bool:
        """True when nothing needs to be asked any more."""
        return self._everything is not None

    def everything(self) -> Metadata:
        """Returns all of it, made at the first call: the cost of the whole."""
        if self._everything is None:
            structure, located = self.source.columns()
            self._everything = build_metadata(structure, located, self.source.prefix, self.source.header)
        return self._everything

    @property
    def planner_data(self) -> Any:
        """Where each entry is in the nested state dict; one question, at the first look."""
        if not self._has_planner_data:
            paths = self.source.key_paths()
            self.planner_data = None if paths is None else dict(paths)
        return self._planner_data

    @planner_data.setter
    def planner_data(self, value: Any) -> None:
        self._planner_data, self._has_planner_data = value, True

    @property
    def version(self) -> str | None:
        """DCP's version of the format."""
        return self._version if self._has_version else self._header.version

    @version.setter
    def version(self, value: str | None) -> None:
        self._version, self._has_version = value, True

    @property
    def storage_meta(self) -> StorageMeta | None:
        """What the storage says of itself; made once, so that it can be changed."""
        if not self._has_storage_meta:
            self.storage_meta = storage_meta_of(self._header.storage_meta)
        return self._storage_meta

    @storage_meta.setter
    def storage_meta(self, value: StorageMeta | None) -> None:
        self._storage_meta, self._has_storage_meta = value, True

    @property
    def _header(self) -> MetadataHeader:
        return self.source.header

    def __reduce__(self) -> tuple[object, ...]:
        kept = {name: value for name, value in vars(self).items() if name not in _OF_ITSELF}
        return _rebuild, (self.source,), (kept, self._entries._state(), self._places._state())  # noqa: SLF001

    def __setstate__(self, state: tuple[dict[str, Any], Any, Any]) -> None:
        kept, entries, places = state
        vars(self).update(kept)
        self._entries._restore(*entries)  # noqa: SLF001
        self._places._restore(*places)  # noqa: SLF001


#: What a copy makes for itself.
_OF_ITSELF = frozenset(("source", "state_dict_metadata", "storage_data", "_entries", "_places", "_everything"))


def _rebuild(source: ChunkSource) -> LazyMetadata:
    return LazyMetadata(source)
