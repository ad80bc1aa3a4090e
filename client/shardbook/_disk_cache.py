"""Files that a user's processes on a host keep for each other: bounded, checksummed, and never a reason to fail.

An entry is a list of payloads in a group, which is the question that they answer. Whatever is wrong with the disk or an
entry is a miss. The directory belongs to one user and is closed to others; nothing in it is ever executed.

::

    {directory}/shardbook-v1-{uid}/usage   bytes taken, behind the lock of whoever writes
    {directory}/shardbook-v1-{uid}/{group}/lock   held by whoever fetches the group's answer
    {directory}/shardbook-v1-{uid}/{group}/{name}   8 bytes magic, SHA-256 of all that follows and of the name, payloads
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardbook.core.container import pack_list, unpack_list
from shardbook.core.mounts import network_type
from shardbook.errors import CorruptManifestError
from shardbook.stores import encodable

_LOG = logging.getLogger(__name__)

_MAGIC: Final = b"SBCACHE1"
_HEAD_BYTES: Final = len(_MAGIC) + 32
_LOCK: Final = "lock"
_USAGE: Final = "usage"
_TEMPORARY: Final = ".new-"
_USAGE_DIGITS: Final = 20
#: What an entry takes beside its bytes: its part of a block, of a directory and of inodes, about.
ENTRY_BYTES: Final = 4096
#: How long a writer waits for another one, seconds; then its entry is not kept.
_WRITE_WAIT_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.05

#: Directories of which this process has said that they cannot be used.
_told: set[str] = set()


def cache_directory(configured: str = "", mount_table: str | None = None) -> str | None:
    """Returns where this user's cache is.

    Args:
        configured: What the user chose; by default the XDG cache directory, or the machine's temporary one where that
            lies on a network file system: locks and small files of thousands of ranks are no load for one.
        mount_table: Content of ``/proc/self/mountinfo``; read when None.

    Returns:
        A directory, or None for a user without a home.
    """
    chosen = configured or os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    try:
        directory = Path(chosen).expanduser()
    except RuntimeError:
        return None
    if configured:
        return str(directory)
    if mount_table is None:
        mount_table = _mount_table()
    is_shared = network_type(os.path.realpath(directory), mount_table) is not None
    return tempfile.gettempdir() if is_shared else str(directory)


def _mount_table() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


@dataclass(frozen=True)
class DiskCache:
    """Entries of this user in one directory, on any filesystem that has locks. Thread-safe, process-safe, picklable.

    The entry that was used longest ago goes first, counted by processes of all hosts that share the directory.

    Attributes:
        directory: Where they are kept; made when it is not there.
        max_bytes: Most bytes that they take, each with ``ENTRY_BYTES`` added.
    """

    directory: str
    max_bytes: int

    @property
    def root(self) -> Path:
        """This user's own directory."""
        return Path(self.directory) / f"shardbook-v1-{os.geteuid()}"

    def holds(self, group: str) -> bool:
        """Returns True when there is any entry of a group."""
        try:
            return any(_is_entry(path.name) for path in (self.root / group).iterdir()) and self._is_ours()
        except OSError:
            return False

    def get(self, group: str, name: str) -> list[bytes] | None:
        """Returns an entry, or None; one that is damaged is removed."""
        path = self.root / group / name
        try:
            content = path.read_bytes()
            if not self._is_ours():
                return None
            with suppress(OSError):  # a read-only cache has no order, and serves
                _touch(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(error)
            return None
        payloads = _unsealed(group, name, content)
        if payloads is None:
            _LOG.info("%s is damaged and was removed", encodable(str(path)))
            self.drop(group, name)
        return payloads

    def put(self, group: str, name: str, payloads: Sequence[bytes]) -> None:
        """Keeps an entry, if it can; it is there as a whole or not at all."""
        content = _sealed(group, name, payloads)
        cost = len(content) + ENTRY_BYTES
        if cost > self.max_bytes:
            return
        try:
            self._make_root()
            with self._writing() as usage:
                if usage is not None:
                    self._make_room(usage, cost)
                    _write(self.root / group, name, content)
        except OSError as error:
            self._tell(error)

    def drop(self, group: str, name: str) -> None:
        """Removes an entry."""
        with suppress(OSError):
            (self.root / group / name).unlink()

    @contextmanager
    def alone(self, group: str, wait_s: float) -> Iterator[bool]:
        """Keeps others who ask for this from a group for the block, so that one of them fetches its answer.

        The lock is the process's: it falls when that dies, however it does.

        Args:
            group: The group.
            wait_s: Seconds to wait for whoever has it; then the block runs all the same.

        Returns:
            Whether the others are kept away; False too where there can be no lock.
        """
        file = None
        try:
            self._make_root()
            (self.root / group).mkdir(mode=0o700, exist_ok=True)
            file = os.open(self.root / group / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            pass  # the group was removed meanwhile, as one without entries: nobody is lost but time
        except OSError as error:
            self._tell(error)
        if file is None:
            yield False
            return
        with _held(file, wait_s) as is_held:
            yield is_held

    def _make_root(self) -> None:
        """Makes the directory; raises OSError where it cannot be this user's alone."""
        with suppress(FileExistsError):
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700)
        if not self._is_ours():
            raise PermissionError(f"{self.root} is not a directory of this user's that is closed to others")

    def _is_ours(self) -> bool:
        """Whoever else could write here could say where a checkpoint's bytes are."""
        found = os.lstat(self.root)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077

    @contextmanager
    def _writing(self) -> Iterator[int | None]:
        """Yields the file of the usage, locked; None where it cannot be had: without it nothing would be bounded."""
        file = os.open(self.root / _USAGE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with _held(file, _WRITE_WAIT_S) as is_held:
            yield file if is_held else None

    def _make_room(self, usage: int, cost: int) -> None:
        """Removes what is too much with an entry more, and notes it before it is written: never too little is noted."""
        text = os.pread(usage, _USAGE_DIGITS, 0)
        used = int(text) if text.isdigit() else self.max_bytes
        if used + cost > self.max_bytes:
            # Somewhat more than needed, since finding out what is there costs a look at every entry.
            used = self._shrink(min(self.max_bytes * 7 // 8, self.max_bytes - cost))
        os.pwrite(usage, f"{used + cost:0{_USAGE_DIGITS}}".encode(), 0)

    def _shrink(self, target_bytes: int) -> int:
        """Removes entries, those used longest ago first, until the rest takes at most ``target_bytes``; returns that.

        Who calls is the only writer, so what is half written is of writers that died.
        """
        entries: list[tuple[int, int, Path]] = []
        groups = [Path(entry.path) for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        for group in groups:
            for entry in list(os.scandir(group)):
                if entry.name.startswith(_TEMPORARY):
                    Path(entry.path).unlink()
                elif _is_entry(entry.name):
                    found = entry.stat(follow_symlinks=False)
                    entries.append((found.st_mtime_ns, found.st_size + ENTRY_BYTES, Path(entry.path)))
        used = sum(cost for _, cost, _ in entries)
        for _, cost, path in sorted(entries):
            if used <= target_bytes:
                break
            path.unlink(missing_ok=True)
            used -= cost
        for group in groups:
            if not any(_is_entry(path.name) for path in group.iterdir()):
                _remove_group(group)
        return used

    def _tell(self, error: OSError) -> None:
        """Logs, once in a process, that the cache does not work."""
        if self.directory not in _told:
            _told.add(self.directory)
            _LOG.warning(
                "answers are not kept in %s, which costs time alone: %s (SHARDBOOK_CACHE_DIR names another place)",
                encodable(self.directory),
                encodable(str(error)),
            )


@contextmanager
def _held(file: int, wait_s: float) -> Iterator[bool]:
    """Locks a file for the block and closes it; yields whether that came about within the wait."""
    end_s = time.monotonic() + wait_s
    pause_s = _FIRST_PAUSE_S
    is_held = False
    try:
        while not is_held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held = True
            except BlockingIOError:
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    break
                time.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except OSError:
                break  # a filesystem without locks
        yield is_held
    finally:
        if is_held:
            # Said, and not left to the close: a child forked meanwhile has the file open, too.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _remove_group(group: Path) -> None:
    """Removes a group without entries, unless somebody is about to fetch one."""
    with suppress(OSError):
        file = os.open(group / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with _held(file, 0.0) as is_held:
            if is_held:
                (group / _LOCK).unlink()
                group.rmdir()


def _is_entry(name: str) -> bool:
    return name != _LOCK and not name.startswith(_TEMPORARY)


def _touch(path: Path) -> None:
    now_ns = time.time_ns()  # finer than what the kernel would note by itself
    os.utime(path, ns=(now_ns, now_ns))


def _write(group: Path, name: str, content: bytes) -> None:
    group.mkdir(mode=0o700, exist_ok=True)
    file, path = tempfile.mkstemp(prefix=_TEMPORARY, dir=group)
    temporary = Path(path)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(content)
        _touch(temporary)
        temporary.replace(group / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _digest(group: str, name: str, body: bytes | memoryview) -> bytes:
    hasher = hashlib.sha256(f"{group}/{name}\0".encode())
    hasher.update(body)
    return hasher.digest()


def _sealed(group: str, name: str, payloads: Sequence[bytes]) -> bytes:
    body = pack_list(payloads)
    return b"".join([_MAGIC, _digest(group, name, body), body])


def _unsealed(group: str, name: str, content: bytes) -> list[bytes] | None:
    body = memoryview(content)[_HEAD_BYTES:]
    if content[: len(_MAGIC)] != _MAGIC or content[len(_MAGIC) : _HEAD_BYTES] != _digest(group, name, body):
        return None
    try:
        return unpack_list(bytes(body))
    except CorruptManifestError:
        return None


__all__ = ["ENTRY_BYTES", "DiskCache", "cache_directory"]
