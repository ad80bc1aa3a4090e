"""Which save planners work without a global plan, and what they save that a load will refuse."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from shardbook.core.table import printable
from shardbook.errors import UnsupportedPlannerError

#: Methods that make a plan of everybody's plans; nobody has everybody's plans here.
_GLOBAL_METHODS: Final = ("create_global_plan", "_create_global_plan", "_dedup_save_plans")


class UnsafeEntryWarning(UserWarning):
    """An entry was saved that ``load`` will refuse, because loading it would run code chosen by the file."""


def check_planner(planner: SavePlanner) -> DefaultSavePlanner:
    """Returns ``planner`` when each rank can plan for itself with it.

    Raises:
        UnsupportedPlannerError: It needs everybody's plans, or caches them; the message says why.
    """
    name = type(planner).__qualname__
    if not isinstance(planner, DefaultSavePlanner):
        raise UnsupportedPlannerError(
            f"{name} does not derive from DefaultSavePlanner, so what its global plan would do is not known",
            field="planner",
        )
    for method in _own_global_methods(planner):
        raise UnsupportedPlannerError(
            f"{name} has a {method} of its own, which needs the plans of all ranks on one of them; Shardbook "
            "leaves out duplicates without that: change the local plan in create_local_plan or finish_plan",
            field="planner",
        )
    check_no_caching(planner)
    return planner


def _own_global_methods(planner: DefaultSavePlanner) -> list[str]:
    return [
        method
        for method in _GLOBAL_METHODS
        if getattr(type(planner), method) is not getattr(DefaultSavePlanner, method) or method in vars(planner)
    ]


def plans_as_dcp(planner: SavePlanner) -> bool:
    """Returns True when the global plan is DCP's own: then the ranks' plans say all that its metadata does."""
    return isinstance(planner, DefaultSavePlanner) and not _own_global_methods(planner)


def check_no_caching(planner: SavePlanner) -> None:
    """Refuses planners that give an attempt the plan, and the directory, of an earlier one.

    Raises:
        UnsupportedPlannerError: It is one.
    """
    if getattr(planner, "_enable_plan_caching", False):
        raise UnsupportedPlannerError(
            "enable_plan_caching keeps plans in the class, where another state dict of the same planner finds them; "
            "the server remembers plans by content, also across restarts: leave it out",
            field="planner",
        )


def set_up_planner(
    planner: SavePlanner, state_dict: dict[str, Any], storage_meta: StorageMeta | None, *, is_coordinator: bool
) -> None:
    """Calls ``set_up_planner`` as DCP does, also on planners from before it had ``storage_meta``."""
    if "storage_meta" in inspect.signature(planner.set_up_planner).parameters:
        planner.set_up_planner(state_dict=state_dict, storage_meta=storage_meta, is_coordinator=is_coordinator)
        return
    old: Any = planner.set_up_planner
    old(state_dict, is_coordinator)


def unused_planner(planner: DefaultSavePlanner) -> DefaultSavePlanner:
    """Returns a planner without what ``set_up_planner`` and the rest left in it for an earlier save, tensors above all.

    One that has made no plan is returned as it is, another one as a shallow copy.
    """
    if "state_dict" not in vars(planner):
        return planner
    unused = copy.copy(planner)
    for name in ("state_dict", "plan", "global_plan", "metadata"):
        vars(unused).pop(name, None)
    unused.mappings = {}
    return unused


def warn_of_unsafe_entries(planner: SavePlanner, items: Sequence[WriteItem], known: set[str]) -> None:
    """Warns of bytes entries that ``load`` will refuse; once a name and session.

    The pickle of each entry is scanned for the names it would import; nothing is loaded.

    Args:
        planner: Resolves the items, which torch promises to be repeatable.
        items: The plan that is about to be written.
        known: Names already looked at; new ones are added.
    """
    for item in items:
        fqn = item.index.fqn
        if item.type is not WriteItemType.BYTE_IO or fqn in known:
            continue
        known.add(fqn)
        content = planner.resolve_data(item)
        names = _unsafe_names(content) if isinstance(content, io.BytesIO) else []
        if names:
            warnings.warn(
                f"{printable(fqn)!r} needs {', '.join(names[:5])} to be loaded: `load` refuses it unless "
                "torch.serialization.add_safe_globals allows that, or weights_only=False is passed; save plain "
                "values, tensors, lists and dicts instead",
                UnsafeEntryWarning,
                stacklevel=2,
            )


def _unsafe_names(content: io.BytesIO) -> list[str]:
    """Returns the names that a saved entry would import beyond those that are always allowed."""
    content.seek(0)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(content))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return []  # not written by torch.save: what a planner of the user's own makes of it is its own business
