"""Listings of checkpoints: where, in which order, a page at a time, whatever the table has grown to.

No page skips rows that it has counted: it begins behind the key where the one before ended. Two ways lead to one:

- *Few match.* A condition is asked first how many rows its index holds for it, up to a bound. Where that is few, those
  are looked up, judged and sorted.
- *Many match.* The index of the order is walked and each row is judged, until the page is full: as every condition
  holds of many, that is soon. Where it is not, because they hold of other rows each, or of those at the other end, the
  walk pauses after a stretch and the conditions are asked again: fewer rows to look up than are left to walk past?

The planner is left no other: conditions on labels and metrics are lookups by key (``filters``), so neither database can
turn a page into a join of everything.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from sqlalchemy import Connection

from shardbook_server.storage.keyset import Key, merged
from shardbook_server.storage.listing_statements import Listing, Statements

#: Rows that are looked up and sorted rather than found in order: what takes a few milliseconds.
FEW: Final = 1_500
#: The same of a condition on a column, whose index leads to the rows themselves.
FEW_BY_COLUMN: Final = 2_000
#: Rows that may meet a condition and are found before the walk, so that it need not judge the others.
SOME: Final = 5_000
#: Rows that are walked before the conditions are asked again.
STRETCH: Final = 1_000
#: The same where the walk knows which rows may meet a condition: to pass one costs a fraction of judging it.
GUIDED_STRETCH: Final = 6_000
#: Rows that are looked up when walking would take more.
MANY: Final = 25_000
#: Rows that a walk passes for what looking one up costs, when it knows which may meet a condition.
_PASSED: Final = 8
#: Listings whose statements are kept.
_KEPT: Final = 256


def page(connection: Connection, listing: Listing, after: Key | None, count: int) -> list[Key]:
    """Returns the keys of ``count`` rows behind ``after``, in order; the last value of each is a checkpoint's key."""
    return kept(connection.dialect.name, listing).page(connection, after, count)


@lru_cache(maxsize=_KEPT)
def kept(dialect: str, listing: Listing) -> _Pages:
    """Returns what reads a listing's pages: making its statements takes longer than the database does for a page."""
    return _Pages(Statements(dialect, listing))


class _Pages:
    """Reads the pages of one listing. Thread-safe."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements

    def page(self, connection: Connection, after: Key | None, count: int) -> list[Key]:
        candidates = self._statements.candidates
        counts = self._count(connection, SOME, thoroughly=False)
        few = {at: rows for at, rows in counts.items() if rows <= (FEW if candidates[at].is_said else FEW_BY_COLUMN)}
        if few:
            fewest = min(few, key=few.__getitem__)
            return self._look_up(connection, {fewest: few[fewest]}, after, count)
        return self._walk(connection, counts, after, count)

    def _count(self, connection: Connection, most: int, *, thoroughly: bool) -> dict[int, int]:
        """Returns how many rows may meet conditions, of each that at most so many may meet.

        Args:
            connection: Of the page.
            most: How many are counted.
            thoroughly: Count also where much of an index has to be read for it.
        """
        asked, counting = self._statements.counts[thoroughly]
        if not asked:
            return {}
        counts = connection.execute(counting, {"few": most + 1}).one()
        return {at: rows for at, rows in zip(asked, counts, strict=True) if rows <= most}

    def _look_up(self, connection: Connection, sets: dict[int, int], after: Key | None, count: int) -> list[Key]:
        """Looks up the rows that are in each of some sets, of which the sizes are known."""
        if 0 in sets.values():
            return []
        ats = tuple(sorted(sets, key=sets.__getitem__))
        values = {"few": max(sets.values())}
        return self._statements.looking_up(ats).read(connection, count, after=after, values=values)

    def _walk(self, connection: Connection, counts: dict[int, int], after: Key | None, count: int) -> list[Key]:
        """Walks along the order; where there are some, the keys that may meet a condition are read before."""
        guide = min(counts, key=counts.__getitem__) if counts else None
        values = {} if guide is None else {"few": counts[guide]}
        stretch = STRETCH if guide is None else GUIDED_STRETCH
        pages: list[list[Key]] = []
        for branch in self._statements.branches:
            listed = self._statements.walking(branch, guide)
            passed = self._statements.passing(branch)
            pause = None if passed is None else passed.find(connection, stretch, after=after)
            page = listed.read(connection, count, after=after, until=pause, values=values)
            if pause is not None and len(page) < count:
                # As it went so far.
                left = stretch * (count - len(page)) // max(len(page), 1)
                sets = self._sets(connection, counts, left if guide is None else left // _PASSED)
                if sets:
                    return self._look_up(connection, sets, after, count)
                page += listed.read(connection, count - len(page), after=pause, values=values)
            pages.append(page)
        return merged(pages, self._statements.downs, count)

    def _sets(self, connection: Connection, counts: dict[int, int], most: int) -> dict[int, int]:
        """Returns candidates with their sizes, one of at most so many rows; none where all have more."""
        for enough in (MANY // 3, MANY):
            if not counts:
                counts = self._count(connection, min(most, enough), thoroughly=True)
            if counts or most <= enough:
                break
        return counts if counts and min(counts.values()) <= most else {}
