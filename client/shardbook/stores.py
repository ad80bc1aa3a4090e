"""Named storage roots, and what the catalogue records for a checkpoint directory. No I/O.

A location is one of three: ``store:relative/path`` below a configured root, an absolute path, or a URL. It never
holds credentials: users and passwords in URLs are left out, and so are the query and fragment of web addresses,
where signed links keep theirs.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from shardbook.core.uris import STORED, check_no_credentials, credentials_in, without_user_info
from shardbook.errors import InvalidArgumentError

_STORE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_WEB: Final = re.compile(r"https?://")
#: Most stores of one configuration.
MAX_STORES: Final = 1000


def _no_roots() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Stores:
    """Storage roots by name. Immutable and thread-safe.

    Attributes:
        roots: Absolute path or URL by store name, without trailing slash.

    Raises:
        InvalidArgumentError: A name or root cannot be one, or a root holds credentials.
    """

    roots: Mapping[str, str] = field(default_factory=_no_roots)

    def __post_init__(self) -> None:
        if len(self.roots) > MAX_STORES:
            raise _bad("stores", f"{len(self.roots)} stores, the limit is {MAX_STORES}")
        checked = {name: _checked_root(name, root) for name, root in self.roots.items()}
        object.__setattr__(self, "roots", MappingProxyType(checked))

    def __reduce__(self) -> tuple[Any, ...]:
        return Stores, (dict(self.roots),)

    def __hash__(self) -> int:
        return hash(frozenset(self.roots.items()))

    def location_of(self, path: str | os.PathLike[str]) -> str:
        """Returns the location of a checkpoint directory: ``store:relative`` below a root, else the plain path or URL.

        Of several roots the longest counts. The root itself is ``store:.``. Relative paths are taken from the
        current directory; symbolic links are kept, since other hosts may mount them elsewhere.
        """
        plain = normalized(path)
        best: tuple[int, str] | None = None
        for name, root in self.roots.items():
            if plain == root:
                found = (len(root), f"{name}:.")
            elif plain.startswith(root if root.endswith("/") else root + "/"):
                found = (len(root), f"{name}:{plain[len(root) :].lstrip('/')}")
            else:
                continue
            best = max(best or found, found)
        return best[1] if best is not None else plain

    def path_of(self, location: str) -> str:
        """Returns the path or URL that a location of the catalogue means on this machine.

        Raises:
            InvalidArgumentError: Its store is not configured here, or it leaves its store.
        """
        match = STORED.fullmatch(location)
        if match is None:
            return location
        name, relative = match.groups()
        root = self.roots.get(name)
        if root is None:
            raise InvalidArgumentError(
                f"store {name!r} of {location!r} is not configured here: set SHARDBOOK_STORES={name}=ROOT, then "
                "`shardbook stores` says whether it can be reached",
                reason="UNKNOWN_STORE",
                field="stores",
            )
        if relative.startswith("/") or ".." in relative.split("/"):
            raise InvalidArgumentError(
                f"location {location!r} leaves its store", reason="INVALID_LOCATION", field="location"
            )
        return root if relative in ("", ".") else f"{root.rstrip('/')}/{relative}"

    def paths_of(self, locations: Iterable[str]) -> tuple[str, ...]:
        """Returns what the locations of one checkpoint mean on this machine, in order; at least one.

        Those whose stores are not configured here are left out.

        Raises:
            InvalidArgumentError: None of the stores is configured here, or all locations leave theirs.
        """
        listed = list(locations)
        paths = tuple(path for path in map(self.here, listed) if path is not None)
        return paths or (self.path_of(listed[0]),)

    def here(self, location: str) -> str | None:
        """Returns the path or URL that a location means on this machine; None when its store is not configured."""
        try:
            return self.path_of(location)
        except InvalidArgumentError:
            return None


def encodable(text: str) -> str:
    """Returns ``text`` with what UTF-8 does not know escaped: paths may hold any bytes, messages and logs may not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_location(location: str) -> str:
    """Returns ``location`` when the catalogue can record it.

    Raises:
        InvalidArgumentError: Its name is no Unicode, or carries a key, token or signature (``CREDENTIALS_IN_URI``).
    """
    check_no_credentials(location, "location")
    try:
        location.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidArgumentError(
            f"the catalogue cannot record {encodable(location)}: the path is not UTF-8. The directory is enough to "
            "load it; rename it, then run `shardbook sync`",
            reason="INVALID_LOCATION",
            field="location",
        ) from None
    return location


def normalized(path: str | os.PathLike[str]) -> str:
    """Returns an absolute path, or a URL without credentials; without trailing slash."""
    text = os.fspath(path)
    if "://" not in text:
        return _absolute(text)
    if text.startswith("file://"):
        return _absolute(text.removeprefix("file://"))
    if _WEB.match(text):
        text = re.split(r"[?#]", text, maxsplit=1)[0]
    text = without_user_info(text)
    scheme, _, rest = text.partition("://")
    return f"{scheme}://{rest.rstrip('/')}"


def _absolute(path: str) -> str:
    # Not resolve(): what a link points to here may be mounted elsewhere on the host that loads.
    return "/" + posixpath.normpath(Path(path).absolute().as_posix()).lstrip("/")


def _checked_root(name: str, root: str) -> str:
    if not _STORE_NAME.fullmatch(name):
        raise _bad("stores", f"{name!a} is not a store name: lower-case letters, digits, '-' and '_', at most 63")
    if not root:
        raise _bad("stores", f"store {name!r} has no root")
    if "://" not in root and not root.startswith("/"):
        raise _bad("stores", f"root of store {name!r} is neither an absolute path nor a URL")
    plain = normalized(root)
    if credentials_in(root) is not None or (_WEB.match(root) and re.search(r"[?#]", root)):
        # The root is not repeated: a log is no place for a password.
        raise InvalidArgumentError(
            f"root of store {name!r} holds credentials; give them to the storage library instead",
            reason="CREDENTIALS_IN_URI",
            field="stores",
        )
    if posixpath.basename(plain) == "..":
        raise _bad("stores", f"root of store {name!r} is not normal")
    return plain


def _bad(name: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="INVALID_SETTING", field=name)
