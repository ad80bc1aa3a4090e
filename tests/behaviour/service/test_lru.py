"""The cache in which the server keeps what it decoded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardbook_server.service.lru import BoundedCache


@given(st.integers(0, 30), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20), st.booleans()), max_size=40))
def test_it_keeps_what_was_used_last_within_its_bound(capacity: int, steps: list[tuple[int, int, bool]]) -> None:
    """Against a list in order of use: the heaviest run of last used values that fits, and never more."""
    cache: BoundedCache[int, int] = BoundedCache(capacity)
    used: list[tuple[int, int]] = []  # (key, weight), used last at the end
    for key, weight, is_put in steps:
        known = dict(used)
        if is_put:
            cache.put(key, weight, weight)
            used = [one for one in used if one[0] != key]
            if weight <= capacity:
                used.append((key, weight))
            while sum(one for _, one in used) > capacity:
                used.pop(0)
        else:
            assert known.get(key) == cache.get(key)
            if key in known:
                used = [*(one for one in used if one[0] != key), (key, known[key])]
        assert len(used) == len(cache)
        assert sum(one for _, one in used) <= capacity
    cache.clear()
    assert 0 == len(cache)
