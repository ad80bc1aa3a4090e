"""What a location may say: never credentials, never a way out of its place. Both sides hold to it; no I/O.

No message here repeats what it refuses: an error ends in logs, and a log is no place for a password.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

from shardbook.errors import InvalidArgumentError

#: ``store:relative/path``.
STORED: Final = re.compile(r"([a-z0-9][a-z0-9_-]{0,62}):(?!//)(.*)", re.DOTALL)
#: ``scheme://user:password@``; also inside chained URLs such as ``zip://a.zip::s3://key:secret@bucket``.
_USER_INFO: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)@")
#: Azure writes ``container@account`` where others write a user.
_CONTAINER_SCHEMES: Final = frozenset({"abfs", "abfss", "wasb", "wasbs"})
_PARAMETER: Final = re.compile(r"[?&;#]([^=&;?#/]+)=")
#: What the names of parameters that carry a secret hold, in lower case and without ``-`` and ``_``.
_SECRET_PARTS: Final = (
    "accesskey",
    "accountkey",
    "apikey",
    "auth",
    "credential",
    "passwd",
    "password",
    "secret",
    "sharedkey",
    "signature",
    "token",
)
#: Names that are one by themselves: Azure's ``sig``, S3's ``key`` in fsspec's URLs, and the like.
_SECRET_NAMES: Final = frozenset({"awsaccesskeyid", "googleaccessid", "key", "keyid", "pass", "pwd", "sas", "sig"})


def without_user_info(url: str) -> str:
    """Returns a URL without users and passwords."""
    return _USER_INFO.sub(_without_user, url)


def _without_user(match: re.Match[str]) -> str:
    scheme, user = match.groups()
    if scheme.lower() in _CONTAINER_SCHEMES:
        return f"{scheme}://{user.partition(':')[0]}@"
    return f"{scheme}://"


def credentials_in(text: str) -> str | None:
    """Returns what kind of credentials a location or URL carries, in words; None for none, and for local paths."""
    if text.startswith("/"):
        return None
    if without_user_info(text) != text:
        return "user information"
    # Twice: a URL within a URL is quoted once more.
    for found in _PARAMETER.finditer(unquote(unquote(text))):
        name = found[1].strip().lower().replace("-", "").replace("_", "")
        if name in _SECRET_NAMES or any(part in name for part in _SECRET_PARTS):
            return "a key, token or signature"
    return None


def check_no_credentials(text: str, field: str) -> str:
    """Returns ``text`` when it carries no credentials.

    Raises:
        InvalidArgumentError: It does (reason ``CREDENTIALS_IN_URI``).
    """
    kind = credentials_in(text)
    if kind is not None:
        raise InvalidArgumentError(
            f"a location must not carry credentials, and this one has {kind}: give them to the storage library "
            "instead, in its own configuration or environment",
            reason="CREDENTIALS_IN_URI",
            field=field,
        )
    return text


def check_stays_inside(location: str, field: str) -> str:
    """Returns ``location`` when it names what it seems to: no ``..`` in it, and nothing absolute within a store.

    Raises:
        InvalidArgumentError: It leaves its place (reason ``INVALID_LOCATION``).
    """
    stored = STORED.fullmatch(location)
    below = location if stored is None else stored[2]
    # In a local path a quoted dot is a name like any other.
    plain = below if location.startswith("/") else unquote(below)
    if ".." in below.split("/") or ".." in plain.split("/") or (stored is not None and plain.startswith("/")):
        raise InvalidArgumentError("a location must not leave its place", reason="INVALID_LOCATION", field=field)
    return location


__all__ = ["STORED", "check_no_credentials", "check_stays_inside", "credentials_in", "without_user_info"]
