"""Directory trees behind a URL, as fsspec opens it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import IO, Any, Final

from shardbook._side_by_side import side_by_side
from shardbook.core.directory import DCP_METADATA, ROOT, is_prefix
from shardbook.core.exported import FileFacts
from shardbook.errors import InvalidArgumentError, ShardbookError, StorageError
from shardbook.stores import encodable, normalized

#: Filesystems of fsspec that have directories, and refuse to remove one that is not empty. Others have none, or remove
#: what is in it as well: Arrow's, and so HDFS; and some take a bucket for one.
_REFUSING: Final = frozenset({"file", "local", "memory", "sftp", "ssh", "smb", "ftp"})


@contextmanager
def storage_errors(what: str, path: str) -> Iterator[None]:
    """Raises what a filesystem says in words of its own as StorageError; OSErrors and ours pass as they are.

    Libraries behind fsspec raise anything, from ``botocore`` errors to plain ``Exception``.
    """
    try:
        yield
    except (OSError, ShardbookError):
        raise
    except Exception as error:
        told = encodable(f"cannot {what} {path}: {type(error).__name__}: {error}")
        raise StorageError(told) from error


def filesystem_of(url: str) -> tuple[Any, str]:
    """Returns the fsspec filesystem that a URL names, and its path there.

    Raises:
        InvalidArgumentError: fsspec, or the package behind the URL's scheme, is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise InvalidArgumentError(
            f"{normalized(url)} needs fsspec: pip install fsspec, and the package of its scheme",
            reason="MISSING_PACKAGE",
            field="directory",
        ) from error
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InvalidArgumentError(
            f"{normalized(url)} cannot be opened: {error}", reason="MISSING_PACKAGE", field="directory"
        ) from error
    return filesystem, str(root)


#: Under what names fsspec's filesystems say when a file was written, by kind of store.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


def facts_of(info: Mapping[str, Any]) -> FileFacts:
    """Returns what an fsspec filesystem knows of a file."""
    found = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if isinstance(found, str):
        with suppress(ValueError):
            found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        found = found.timestamp()
    return FileFacts(int(info.get("size") or 0), float(found) if isinstance(found, int | float) else None)


class FsspecTree:
    """A directory behind a URL. A file is one PUT, so that it is never seen half-written."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = filesystem_of(url)
        # Other machines write here too: nothing may be answered from memory.
        self._fs.invalidate_cache()

    def checkpoints(self, *, plain: bool = False, begun: bool = False) -> Iterator[str]:
        with storage_errors("walk", self._root):
            for folder, below, files in self._fs.walk(self._root):
                # What Shardbook keeps is named like what it keeps it of. Not every filesystem lets a walk be cut short.
                if ROOT in str(folder)[len(self._root) :].split("/"):
                    continue
                if ROOT in below or (plain and DCP_METADATA in files) or (begun and any(map(is_prefix, below))):
                    yield str(self._fs.unstrip_protocol(str(folder)))

    def files(self, path: str) -> dict[str, FileFacts]:
        inside = self._inside(path).rstrip("/")
        with storage_errors("list", path):
            self._fs.invalidate_cache()
            try:
                listed = self._fs.find(inside, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        below = {name: info for name, info in listed.items() if str(name).startswith(f"{inside}/")}
        return {str(name)[len(inside) + 1 :]: facts_of(info) for name, info in below.items()}

    def remove_empty(self, path: str) -> None:
        with suppress(Exception):
            for folder, _, _ in self._fs.walk(self._inside(path), topdown=False):
                self._remove_directory(str(folder))

    def names(self, path: str) -> list[str]:
        with storage_errors("list", path):
            try:
                listed = self._fs.ls(self._inside(path), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in listed)

    def read(self, path: str, limit_bytes: int | None = None) -> bytes | None:
        with storage_errors("read", path):
            try:
                content: bytes = self._fs.cat_file(self._inside(path), start=None, end=limit_bytes)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return content

    def facts(self, path: str) -> FileFacts | None:
        with storage_errors("look at", path):
            try:
                return facts_of(self._fs.info(self._inside(path)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def sizes(self, path: str, wanted: Collection[str], tell: Callable[[int], None]) -> dict[str, int]:
        listed = self._listed_sizes(path)
        asked = [name for name in wanted if listed.get(name, -1) is None]
        absent = [name for name in wanted if name not in listed]
        if absent and self.facts(f"{path}/{absent[0]}") is not None:  # a filesystem that cannot list
            asked += absent
        tell(len(wanted) - len(asked))

        def look(name: str) -> int | None:
            found = self.facts(f"{path}/{name}")
            tell(1)
            return None if found is None else found.size_bytes

        told = dict(zip(asked, side_by_side(look, asked), strict=True))
        known = {name: told.get(name, listed.get(name)) for name in wanted}
        return {name: size for name, size in known.items() if size is not None}

    def _listed_sizes(self, path: str) -> dict[str, int | None]:
        """Sizes of the files in a directory as its listing has them; None where it does not say."""
        with storage_errors("list", path):
            try:
                listed = self._fs.ls(self._inside(path), detail=True)
            except (FileNotFoundError, NotADirectoryError, NotImplementedError):
                return {}
        return {str(info["name"]).rpartition("/")[2]: info.get("size") for info in listed if info["type"] == "file"}

    def tail(self, path: str, size_bytes: int, count: int) -> bytes:
        with storage_errors("read", path):
            content: bytes = self._fs.cat_file(self._inside(path), start=max(0, size_bytes - count), end=size_bytes)
            return content

    @contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        with storage_errors("read", path), self._fs.open(self._inside(path), "rb") as stream:
            yield stream

    def write(self, path: str, content: bytes | Iterable[bytes]) -> None:
        with storage_errors("write", path):
            if isinstance(content, bytes):
                self._fs.pipe_file(self._inside(path), content)
                return
            # A stream that an error ends may leave what was written of it; a file that is whole is sent or is not.
            with tempfile.NamedTemporaryFile(prefix="shardbook-") as file:
                file.writelines(content)
                file.flush()
                self._fs.put_file(file.name, self._inside(path))

    def remove(self, path: str) -> bool:
        with storage_errors("remove", path):
            try:
                self._fs.rm_file(self._inside(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def remove_directory(self, path: str) -> None:
        self._remove_directory(self._inside(path))

    def _remove_directory(self, inside: str) -> None:
        known = self._fs.protocol
        if _REFUSING.isdisjoint((known,) if isinstance(known, str) else known):
            return  # an empty directory that stays harms nobody
        with suppress(Exception):
            self._fs.rmdir(inside)

    def flush(self, path: str) -> None:
        """Removals are durable when they are answered."""

    def _inside(self, path: str) -> str:
        import fsspec

        return str(fsspec.core.strip_protocol(path))


__all__ = ["FsspecTree", "facts_of", "filesystem_of", "storage_errors"]
