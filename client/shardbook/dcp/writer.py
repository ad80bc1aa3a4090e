"""Storage writers that Shardbook can fence, and the files it keeps beside theirs, through their own filesystem.

DCP's writers put a rank's files where ``storage_data`` says: a prefix. Shardbook gives every attempt a directory of its
own there, so that no attempt ever opens a file of another one for writing, not even a straggler of a killed job.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from shardbook._fsspec_tree import facts_of, storage_errors
from shardbook._side_by_side import side_by_side
from shardbook._trees import in_blocks
from shardbook.core.exported import FileFacts
from shardbook.dcp._torch import FileSystem, plain_fsspec
from shardbook.errors import UnsupportedWriterError
from shardbook.stores import normalized

#: fsspec protocols on which a file appears whole at its close, under its final name, and a rename is a slow copy.
_SINGLE_PUT: Final = frozenset(
    ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "r2", "http", "https", "memory")
)
_LOCAL: Final = frozenset(("file", "local"))


def check_writer(writer: StorageWriter) -> FileSystemWriter:
    """Returns ``writer`` when its files can be fenced and located.

    Raises:
        UnsupportedWriterError: They cannot; the message says why.
    """
    if isinstance(writer, HuggingFaceStorageWriter):
        raise _refused(
            writer,
            "it reports offset 0 for every tensor, bytes entries corrupt its files, and its reader lists only the "
            "checkpoint's own directory; save with FileSystemWriter and convert, or use DCP's own save for exports",
        )
    if not isinstance(writer, FileSystemWriter):
        raise _refused(
            writer,
            "only FileSystemWriter and FsspecWriter, subclasses included, write into a prefix; ShardbookWriter is for "
            "torch's own save: pass the writer that it is made around",
        )
    if writer.serialization_format is not SerializationFormat.TORCH_SAVE:
        raise _refused(writer, f"with serialization_format={writer.serialization_format.name} it reports no offsets")
    return writer


def reported(future: Future[list[WriteResult]]) -> list[WriteResult]:
    """Waits for a storage writer; returns what it reports."""
    future.wait()
    return list(future.value())


def _refused(writer: StorageWriter, why: str) -> UnsupportedWriterError:
    return UnsupportedWriterError(
        f"{type(writer).__qualname__} cannot be used with Shardbook: {why}", field="storage_writer"
    )


def _put(stream: Any, content: bytes | Iterable[bytes]) -> None:
    for block in in_blocks(content):
        stream.write(block)


@dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """Small files of a checkpoint directory, by paths relative to it. Thread-safe as far as the filesystem is.

    Everything raises OSError where the storage fails: StorageError for what a filesystem says in words of its own.

    Attributes:
        fs: A storage writer's or reader's filesystem.
        root: Its path of the checkpoint.
    """

    fs: FileSystemBase
    root: str | os.PathLike[str]

    @classmethod
    def of(cls, storage: Any) -> CheckpointFiles:
        """Returns the files of a FileSystemWriter or FileSystemReader."""
        return cls(storage.fs, storage.path)

    @property
    def place(self) -> str:
        """What two objects have in common when they are about one directory of one process."""
        return normalized(self.root) if self.is_local else f"{sorted(self._protocols)}:{self.root}"

    def beside(self, name: str) -> CheckpointFiles | None:
        """Returns the files of a sibling directory, of the parent for no name; None where there is none above."""
        parent = os.path.dirname(os.fspath(self.root).rstrip("/"))  # noqa: PTH120 - also of URLs
        if not parent and not self.is_local:
            return None
        return CheckpointFiles(self.fs, self.fs.init_path(f"{parent or '.'}/{name}" if name else parent or "."))

    def read(self, path: str, limit_bytes: int | None = None) -> bytes | None:
        """Returns the content of a file, its first bytes when a limit is given; None when it is not there."""
        with storage_errors("read", path):
            try:
                with self.fs.create_stream(self._full(path), "rb") as stream:
                    content: bytes = stream.read(-1 if limit_bytes is None else limit_bytes)
                    return content
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_many(self, paths: Iterable[str]) -> list[bytes | None]:
        """Returns the contents of files, in order."""
        return side_by_side(self.read, paths)

    def write(self, path: str, content: bytes | Iterable[bytes]) -> None:
        """Writes a file that is either not there or whole, durably; replaces an older one in one step.

        Temporary file, fsync and rename; a single PUT on object stores. Of content in blocks no more than one is in
        memory; the last one is asked for before the file is there.
        """
        with storage_errors("write", path):
            self.make_directory(path.rpartition("/")[0])
            if self._protocols & _SINGLE_PUT:
                self._put_object(path, content)
                return
            temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
            try:
                self._write_through(temporary, content)
                if not self.is_local and self.fs.exists(self._full(path)):
                    self.fs.rm_file(self._full(path))  # as DCP does: not every filesystem renames onto a file
                self.fs.rename(self._full(temporary), self._full(path))
            except BaseException:
                self._remove(temporary)
                raise
            self.sync_directory(path.rpartition("/")[0])

    def _put_object(self, path: str, content: bytes | Iterable[bytes]) -> None:
        """Puts an object, which is there as a whole or as it was before.

        Not through a stream of fsspec's: one that an error ends sends what it was given, in place of what was there.
        """
        store, full = plain_fsspec(self.fs), self._full(path)
        if isinstance(content, bytes) and store is not None:
            store.pipe_file(full, content)
            return
        with tempfile.NamedTemporaryFile(prefix="shardbook-") as file:
            file.writelines(in_blocks(content))
            file.flush()
            if store is not None:
                store.put_file(file.name, full)
                return
            file.seek(0)
            with self.fs.create_stream(full, "wb") as stream:
                shutil.copyfileobj(file, stream)

    def _write_through(self, path: str, content: bytes | Iterable[bytes]) -> None:
        with self.fs.create_stream(self._full(path), "wb") as stream:
            _put(stream, content)
            stream.flush()
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):
                os.fsync(stream.fileno())

    def facts(self, path: str) -> FileFacts | None:
        """Returns size and age of a file; None when it is not there or the filesystem does not say."""
        full = self._full(path)
        with storage_errors("look at", path):
            try:
                if isinstance(self.fs, FileSystem):
                    found = Path(full).stat()
                    return FileFacts(found.st_size, found.st_mtime)
                info = getattr(getattr(self.fs, "fs", None), "info", None)
                if info is None:
                    return None
                self._forget_listings()
                return facts_of(info(full))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def tail(self, path: str, size_bytes: int, count: int) -> bytes:
        """Returns the last ``count`` bytes of a file of ``size_bytes``."""
        with storage_errors("read", path), self.fs.create_stream(self._full(path), "rb") as stream:
            stream.seek(max(0, size_bytes - count))
            content: bytes = stream.read(count)
            return content

    def read_range(self, path: str, first: int, count: int) -> bytes:
        """Returns ``count`` bytes of a file from ``first`` on, fewer where it ends.

        Raises:
            OSError: The storage failed, or the file is not there.
        """
        with storage_errors("read", path):
            cat_file = getattr(getattr(self.fs, "fs", None), "cat_file", None)
            if cat_file is not None:  # what a stream reads ahead may be many times as much
                content: bytes = cat_file(self._full(path), start=first, end=first + count)
                return content
            with self.fs.create_stream(self._full(path), "rb") as stream:
                stream.seek(first)
                part: bytes = stream.read(count)
                return part

    def exists(self, path: str) -> bool:
        """Returns True when a file or directory is there."""
        with storage_errors("look at", path):
            self._forget_listings()
            return bool(self.fs.exists(self._full(path)))

    def names(self, path: str) -> list[str]:
        """Returns the names in a directory, sorted; none when it is not there or cannot be listed."""
        lister = getattr(self.fs, "ls", None)
        if lister is None:
            return []
        with storage_errors("list", path):
            self._forget_listings()
            try:
                listed = lister(self._full(path) if path else self.root)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in listed)

    def remove(self, paths: Iterable[str]) -> None:
        """Removes files, many at a time; those that are gone already, or cannot be removed, are left alone."""
        side_by_side(self._remove, paths)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(OSError), storage_errors("remove", path):
            self.fs.rm_file(self._full(path))

    def make_directory(self, path: str) -> None:
        """Makes a directory and those above it."""
        with storage_errors("make", path):
            self.fs.mkdir(self._full(path) if path else self.root)

    @property
    def is_local(self) -> bool:
        """True for this machine's own filesystem, network mounts included."""
        return isinstance(self.fs, FileSystem) or bool(self._protocols & _LOCAL)

    @property
    def is_in_process(self) -> bool:
        """True for a filesystem that only this process sees."""
        return "memory" in self._protocols

    @property
    def _protocols(self) -> frozenset[str]:
        protocol = getattr(getattr(self.fs, "fs", None), "protocol", ())
        return frozenset((protocol,) if isinstance(protocol, str) else protocol)

    def _full(self, path: str) -> str | os.PathLike[str]:
        return self.fs.concat_path(self.root, path)

    def _forget_listings(self) -> None:
        """Fsspec remembers directories; other ranks write into them."""
        forget = getattr(getattr(self.fs, "fs", None), "invalidate_cache", None)
        if forget is not None:
            forget()

    def sync_directory(self, path: str) -> None:
        """Makes a rename durable; object stores have nothing to sync."""
        if not isinstance(self.fs, FileSystem):
            return
        descriptor = os.open(self._full(path) if path else self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
