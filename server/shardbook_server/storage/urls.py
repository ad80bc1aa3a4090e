"""URLs of databases, without what it takes to open one."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit

#: Parameters of a URL that are nobody else's business.
_SECRETS = frozenset({"password", "passfile", "sslpassword"})


def is_postgres(url: str) -> bool:
    """Returns True when a database URL names a Postgres."""
    return url.startswith(("postgresql://", "postgres://"))


def shown_url(url: str) -> str:
    """Returns a database's URL as people may see it: without user and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0]
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name not in _SECRETS]
    netloc = parts.netloc.rpartition("@")[2]
    # By hand: geturl() drops the slashes of an empty host, which SQLite's URLs have.
    query = f"?{urlencode(kept)}" if kept else ""
    return f"{parts.scheme}://{netloc}{parts.path}{query}"
