"""Which place in a store a checkpoint's files have been copied to. No I/O."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from shardbook.core.uris import STORED, check_no_credentials, check_stays_inside
from shardbook.errors import InvalidArgumentError
from shardbook.stores import Stores, normalized


@dataclass(frozen=True)
class Place:
    """A directory in a store.

    Attributes:
        store: Name of the store; empty for a path or URL outside all of them.
        path: Relative to its root, empty for the root; else the path or URL.
    """

    store: str
    path: str

    @classmethod
    def parse(cls, text: str, field: str) -> Place:
        """Returns what people write: ``STORE``, ``STORE/PATH`` or ``STORE:PATH``; or an absolute path or a URL.

        Raises:
            InvalidArgumentError: It carries credentials (``CREDENTIALS_IN_URI``) or leaves its place.
        """
        check_no_credentials(text, field)
        if text.startswith("/") or "://" in text:
            check_stays_inside(text, field)
            return cls("", normalized(text))
        stored = STORED.fullmatch(text)
        store, path = stored.groups() if stored is not None else (text.partition("/")[0], text.partition("/")[2])
        check_stays_inside(f"{store}:{path}", field)
        plain = posixpath.normpath(path) if path else "."
        return cls(store, "" if plain == "." else plain)

    def location(self, relative: str) -> str:
        """Returns the location of what lies below it; ``relative`` is empty for itself."""
        return f"{self.store}:{posixpath.join(self.path, relative).rstrip('/') or '.'}"


def target_of(text: str, stores: Stores) -> Place:
    """Returns the place to move to.

    Raises:
        InvalidArgumentError: It is in no store that is configured here (``UNKNOWN_STORE``), or no place.
    """
    place = Place.parse(text, "to")
    if not place.store:
        known = ", ".join(stores.roots) or "none yet"
        raise InvalidArgumentError(
            f"--to takes the name of a store, STORE or STORE/PATH, so that every client finds it: known here: {known}. "
            "Name the root with SHARDBOOK_STORES=NAME=ROOT, then `shardbook stores`",
            reason="UNKNOWN_STORE",
            field="to",
        )
    stores.path_of(place.location(""))
    return place


def relative_to(location: str, source: Place | None, stores: Stores) -> str | None:
    """Returns where a location lies below a place: what was copied along; None when it does not.

    Args:
        location: As the catalogue has it.
        source: The place that was copied; None for the root of the store that the location is in.
        stores: What it means here.
    """
    match = STORED.fullmatch(location) or STORED.fullmatch(stores.location_of(location))
    if source is None:
        return None if match is None else _relative(match[2])
    if source.store:
        if match is None or match[1] != source.store:
            return None
        return _below(_relative(match[2]), source.path)
    here = stores.here(location)
    return None if here is None else _below(here, source.path)


def _relative(path: str) -> str:
    return "" if path == "." else path


def _below(path: str, above: str) -> str | None:
    if not above or path == above:
        return "" if path == above else path
    start = above if above.endswith("/") else above + "/"
    return path[len(start) :] if path.startswith(start) else None


__all__ = ["Place", "relative_to", "target_of"]
