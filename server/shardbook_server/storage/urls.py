"""URLs of databases, without what it takes to open one."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, urlencode

#: As libpq reads one: whatever stands before an ``@`` is user and password, ``?`` and ``#`` in it too.
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(?:[^/@]*@)?([^/?#@]*)(/[^?#@]*)?(?:\?([^#@]*))?")
#: What names of secret parameters have in common: password, passfile, sslpassword, sslkey, oauth_client_secret, ...
_SECRET: Final = re.compile("pass|key|secret", re.IGNORECASE)


def is_postgres(url: str) -> bool:
    """Returns True when a database URL names a Postgres."""
    return url.startswith(("postgresql://", "postgres://"))


def shown_url(url: str) -> str:
    """Returns a database's URL as people may see it: without user and password.

    Of one that is not well-formed nobody can say where its password is, so only its kind is shown.
    """
    if url.startswith("sqlite:") or not set(url) & set("=@:"):
        return url
    match = _URL.fullmatch(url)
    if match is None:
        scheme, found, _ = url.partition("://")
        return f"{scheme}://..." if found and scheme.isalnum() else "..."
    scheme, hosts, path, query = match.groups(default="")
    kept = [(name, value) for name, value in parse_qsl(query) if not _SECRET.search(name)]
    return f"{scheme}://{hosts}{path}" + (f"?{urlencode(kept)}" if kept else "")
