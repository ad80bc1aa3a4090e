"""Where a relay listens: a Unix socket that only its own user can open."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from shardbook.errors import InvalidArgumentError, UnavailableError

_SCHEME: Final = "unix:"
#: Longest path of a socket, bytes: what the kernel's address holds, with its final zero.
_MAX_PATH_BYTES: Final = 107
#: How long a socket that is there is given to answer, seconds.
_KNOCK_S: Final = 1.0


def default_address(environ: Mapping[str, str] | None = None) -> str:
    """Returns the address of this user's relay on this host: in ``$XDG_RUNTIME_DIR``, else in the temporary folder."""
    runtime = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "").strip()
    folder = Path(runtime) / "shardbook" if runtime else Path(tempfile.gettempdir()) / f"shardbook-{os.getuid()}"
    return f"{_SCHEME}//{folder / 'relay.sock'}"


def socket_path(address: str) -> Path:
    """Returns the socket of ``unix:/path`` or ``unix:///path``.

    Raises:
        InvalidArgumentError: It is another address, or no absolute path that a socket may have.
    """
    path = address.removeprefix(_SCHEME)
    if path.startswith("///"):
        path = path[2:]
    if not address.startswith(_SCHEME) or not path.startswith("/") or path.startswith("//") or path.endswith("/"):
        raise _bad(address, "a relay serves the ranks of one user on its own host: write unix:///path")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise _bad(address, f"a socket's path has at most {_MAX_PATH_BYTES} bytes")
    return Path(path)


def make_room(path: Path) -> None:
    """Makes the socket's folder, for this user alone, and removes a socket that nobody listens on any more.

    Raises:
        UnavailableError: Somebody listens there, something else is there, or the folder is not to be trusted; reason
            ADDRESS_UNAVAILABLE.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = path.parent.stat()
        # Who may rename what is in the folder may stand in for the relay, and would be sent tokens.
        trusted = folder.st_uid in (os.getuid(), 0) and (
            not folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or folder.st_mode & stat.S_ISVTX
        )
        if not trusted:
            raise _unavailable(path, f"others may write to {path.parent}: choose another folder with --listen")
        found = path.lstat() if path.is_symlink() or path.exists() else None
        if found is None:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise _unavailable(path, "something else is there: choose another path with --listen")
        if _answers(path):
            raise _unavailable(path, "another relay answers there")
        path.unlink()
    except OSError as error:
        raise _unavailable(path, error.strerror or str(error)) from error


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as knocking:
        knocking.settimeout(_KNOCK_S)
        try:
            knocking.connect(str(path))
        except OSError as error:
            # A relay that is stopped or busy is no reason to take its place.
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True


@contextmanager
def private_files() -> Iterator[None]:
    """Gives what is made within, such as a socket, to this user alone; for programs of one thread."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def remove(path: Path) -> None:
    """Removes the socket of a relay that has ended."""
    with suppress(OSError):
        path.unlink()


def _bad(address: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"cannot listen on {address}: {why}", reason="INVALID_ADDRESS", field="listen")


def _unavailable(path: Path, why: str) -> UnavailableError:
    return UnavailableError(f"cannot listen on {_SCHEME}//{path}: {why}", reason="ADDRESS_UNAVAILABLE")
