"""Notices every collective, point-to-point message, barrier and store operation of torch.distributed in a process.

Three nets, since no single one is enough: Python's own functions and the methods of ProcessGroup are wrapped; the
groups' sequence numbers climb with every collective that C++ code runs by itself; and the store that the group was
made with is one of ours, so that what C++ asks of it is seen too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

#: Functions of torch.distributed that say something to other ranks.
_FUNCTIONS: Final = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "new_subgroups",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
    "split_group",
)
#: Methods of ProcessGroup that do.
_METHODS: Final = (
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)

_seen: list[str] | None = None
#: C++ holds the store, but not its Python half.
_stores: list[dist.Store] = []


def _note(what: str) -> None:
    if _seen is not None:
        _seen.append(what)


class CountingStore(dist.Store):
    """A store that notes what is asked of it, by Python or by C++, and hands it on."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self._inner = inner

    def set(self, key: str, value: Any) -> None:
        """Notes and hands on."""
        _note(f"store.set({key})")
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        """Notes and hands on."""
        _note(f"store.get({key})")
        return self._inner.get(key)

    def add(self, key: str, amount: int) -> int:
        """Notes and hands on."""
        _note(f"store.add({key})")
        return self._inner.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        """Notes and hands on."""
        _note(f"store.check({keys})")
        return self._inner.check(keys)

    def wait(self, *arguments: Any) -> None:
        """Notes and hands on."""
        _note(f"store.wait({arguments[0]})")
        self._inner.wait(*arguments)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        """Notes and hands on."""
        _note(f"store.compare_set({key})")
        return self._inner.compare_set(key, expected, desired)

    def delete_key(self, key: str) -> bool:
        """Notes and hands on."""
        _note(f"store.delete_key({key})")
        return self._inner.delete_key(key)

    def num_keys(self) -> int:
        """Notes and hands on."""
        _note("store.num_keys()")
        return self._inner.num_keys()


def counting_store(path: str, world_size: int) -> dist.Store:
    """Returns a store in a file that the detector sees through."""
    inner = dist.FileStore(path, world_size)
    inner.set_timeout(timedelta(seconds=60))
    store = CountingStore(inner)
    _stores.append(store)
    return store


@contextmanager
def detector() -> Iterator[list[str]]:
    """Yields the list to which everything is added that this process says to other ranks inside the block."""
    global _seen  # noqa: PLW0603 - the nets are wherever torch looks for its functions
    undo: list[tuple[Any, str, Any]] = []
    for owner in (dist, distributed_c10d):
        for name in _FUNCTIONS:
            if hasattr(owner, name):
                undo.append((owner, name, getattr(owner, name)))
                setattr(owner, name, _noting(f"{owner.__name__}.{name}", getattr(owner, name)))
    for name in _METHODS:
        if name in vars(c10d.ProcessGroup):
            # As it is in the class: what getattr returns would not bind when it is put back.
            undo.append((c10d.ProcessGroup, name, vars(c10d.ProcessGroup)[name]))
            setattr(c10d.ProcessGroup, name, _noting(f"ProcessGroup.{name}", getattr(c10d.ProcessGroup, name)))
    before = _sequence_numbers()
    seen: list[str] = []
    _seen = seen
    try:
        yield seen
    finally:
        seen.extend(
            f"sequence number of {name}: {before.get(name, 0)} became {number}"
            for name, number in _sequence_numbers().items()
            if number != before.get(name, 0)
        )
        _seen = None
        for owner, name, original in undo:
            setattr(owner, name, original)


def _noting(name: str, original: Any) -> Any:
    def noted(*arguments: Any, **options: Any) -> Any:
        _note(name)
        return original(*arguments, **options)

    return noted


def _sequence_numbers() -> dict[str, int]:
    groups: dict[Any, str] = dict(distributed_c10d._world.pg_names)  # the stubs lack the method that is asked for
    return {name: group._get_sequence_number_for_group() for group, name in groups.items()}
