"""Directory trees that ``shardbook sync`` walks: this machine's filesystem, or whatever fsspec opens."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Final, Protocol

from shardbook._fsspec_tree import FsspecTree
from shardbook._side_by_side import side_by_side
from shardbook.core.directory import DCP_METADATA, ROOT, is_prefix
from shardbook.core.exported import FileFacts
from shardbook.errors import NotFoundError
from shardbook.stores import normalized

#: Files that one thread looks at before it takes more.
_LOOK_FILES: Final = 64


class Tree(Protocol):
    """Small files below a directory. Paths are absolute, or URLs; ``names`` and ``read`` treat absence as empty."""

    def checkpoints(self, *, plain: bool = False, begun: bool = False) -> Iterator[str]:
        """Yields the directories, this one included, in which Shardbook left files, in alphabetical order.

        With ``plain``, those with DCP's own ``.metadata`` too; with ``begun``, those with an attempt's directory.
        """
        ...

    def files(self, path: str) -> dict[str, FileFacts]:
        """Returns the files below a directory, by path relative to it; none when it is not there, or is a link.

        As they are now, whatever was listed before. Links below count as files, and are not followed.
        """
        ...

    def remove_empty(self, path: str) -> None:
        """Removes a directory and those below it, as far as they are empty; nothing where there are none."""
        ...

    def names(self, path: str) -> list[str]:
        """Returns the names in a directory, sorted; none when it is not there."""
        ...

    def read(self, path: str, limit_bytes: int | None = None) -> bytes | None:
        """Returns a file's content, or its first bytes; None when it is not there."""
        ...

    def facts(self, path: str) -> FileFacts | None:
        """Returns size and age of a file; None when it is not there."""
        ...

    def sizes(self, path: str, wanted: Collection[str], tell: Callable[[int], None]) -> dict[str, int]:
        """Returns the bytes of the files called ``wanted`` in a directory; those that are not there are left out.

        One listing, not a question a file, where the filesystem lists sizes. ``tell`` hears of how many files more is
        known, from whichever thread.
        """
        ...

    def tail(self, path: str, size_bytes: int, count: int) -> bytes:
        """Returns the last ``count`` bytes of a file of ``size_bytes``."""
        ...

    def open(self, path: str) -> AbstractContextManager[IO[bytes]]:
        """Opens a file for reading, until the block ends; raises FileNotFoundError when it is not there."""
        ...

    def write(self, path: str, content: bytes | Iterable[bytes]) -> None:
        """Writes a file durably and as a whole, in place of an older one; makes its directory where it lacks."""
        ...

    def remove(self, path: str) -> bool:
        """Removes a file; False when it is not there."""
        ...

    def remove_directory(self, path: str) -> None:
        """Removes a directory alone if it is empty; one that is not, or that cannot be removed, stays."""
        ...

    def flush(self, path: str) -> None:
        """Makes durable what was removed from a directory, where the filesystem has to be asked."""
        ...


def open_tree(path: str | os.PathLike[str]) -> Tree:
    """Returns the tree at a path or URL.

    Raises:
        NotFoundError: There is no such directory.
        InvalidArgumentError: A URL, and fsspec or the package behind its scheme is not installed.
    """
    plain = os.fspath(path)
    if "://" in plain and not plain.startswith("file://"):
        return FsspecTree(plain)
    root = Path(normalized(plain))
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory", reason="NO_DIRECTORY", field="directory")
    return _LocalTree(root)


def in_blocks(content: bytes | Iterable[bytes]) -> Iterable[bytes]:
    """Returns content as blocks, whichever of both it is."""
    return (content,) if isinstance(content, bytes) else content


def _file_size(path: str) -> int | None:
    """Bytes of a file; None where there is none, or something else."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a hundred thousand of them
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


class _LocalTree:
    """A directory of this machine, network mounts included. Links to directories are not followed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def checkpoints(self, *, plain: bool = False, begun: bool = False) -> Iterator[str]:
        for folder, below, files in os.walk(self._root):
            if ROOT in below or (plain and DCP_METADATA in files) or (begun and any(map(is_prefix, below))):
                yield folder
            # Data directories hold a file or more a rank, and nothing to find.
            below[:] = sorted(name for name in below if name != ROOT and not is_prefix(name))

    def files(self, path: str) -> dict[str, FileFacts]:
        def fail(error: OSError) -> None:
            # An attempt that cannot be looked at as a whole is no attempt without files.
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        found: dict[str, FileFacts] = {}
        if Path(path).is_symlink():
            return found
        for folder, below, names in os.walk(path, onerror=fail):
            links = [name for name in below if Path(folder, name).is_symlink()]
            for name in [*names, *links]:
                full = Path(folder, name)
                with suppress(FileNotFoundError):
                    facts = full.lstat()
                    found[full.relative_to(path).as_posix()] = FileFacts(facts.st_size, facts.st_mtime)
        return found

    def remove_empty(self, path: str) -> None:
        for folder, _, _ in os.walk(path, topdown=False):
            with suppress(OSError):  # not empty, or gone
                Path(folder).rmdir()

    def names(self, path: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, path: str, limit_bytes: int | None = None) -> bytes | None:
        try:
            with Path(path).open("rb") as file:
                return file.read(-1 if limit_bytes is None else limit_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def facts(self, path: str) -> FileFacts | None:
        try:
            found = Path(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileFacts(found.st_size, found.st_mtime)

    def sizes(self, path: str, wanted: Collection[str], tell: Callable[[int], None]) -> dict[str, int]:
        there = sorted(set(self.names(path)) & set(wanted))
        tell(len(wanted) - len(there))

        def look(names: Sequence[str]) -> list[tuple[str, int]]:
            found = [(name, _file_size(f"{path}/{name}")) for name in names]
            tell(len(names))
            return [(name, size) for name, size in found if size is not None]

        looks = side_by_side(look, [there[at : at + _LOOK_FILES] for at in range(0, len(there), _LOOK_FILES)])
        return dict(chain.from_iterable(looks))

    def tail(self, path: str, size_bytes: int, count: int) -> bytes:
        with Path(path).open("rb") as file:
            file.seek(max(0, size_bytes - count))
            return file.read(count)

    def open(self, path: str) -> AbstractContextManager[IO[bytes]]:
        return Path(path).open("rb")

    def write(self, path: str, content: bytes | Iterable[bytes]) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with temporary.open("xb") as file:
                file.writelines(in_blocks(content))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self.flush(str(target.parent))

    def remove(self, path: str) -> bool:
        try:
            Path(path).unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def remove_directory(self, path: str) -> None:
        with suppress(OSError):
            Path(path).rmdir()

    def flush(self, path: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
