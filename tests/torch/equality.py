"""Compares torch's checkpoint metadata deeply: types, values, attributes, index hints, key and chunk order."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex


def differences(expected: object, actual: object, path: str = "metadata") -> list[str]:
    """Returns where two objects differ, as paths; empty when they are equal in every respect.

    The order of ``storage_data`` is not looked at: nothing depends on it, and it is the order of the ranks' results.
    """
    if type(expected) is not type(actual):
        return [f"{path}: {type(expected).__name__} became {type(actual).__name__}"]
    if isinstance(expected, dict) and isinstance(actual, dict):
        return _of_dicts(expected, actual, path)
    if isinstance(expected, torch.Size) and isinstance(actual, torch.Size):
        return [] if tuple(expected) == tuple(actual) else [f"{path}: {expected} became {actual}"]
    if isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        if len(expected) != len(actual):
            return [f"{path}: {len(expected)} items became {len(actual)}"]
        pairs = enumerate(zip(expected, actual, strict=True))
        return [found for at, (one, other) in pairs for found in differences(one, other, f"{path}[{at}]")]
    if hasattr(expected, "__dict__") and type(expected).__module__.startswith("torch.distributed"):
        return _of_attributes(vars(expected), vars(actual), path)
    return [] if expected == actual else [f"{path}: {expected!r} became {actual!r}"]


def _of_dicts(expected: dict[Any, Any], actual: dict[Any, Any], path: str) -> list[str]:
    if any(isinstance(key, MetadataIndex) for key in expected):
        # The hint takes no part in equality, so keys are compared by all of their attributes.
        left = {key: (vars(key), value) for key, value in expected.items()}
        right = {key: (vars(key), value) for key, value in actual.items()}
        if left.keys() != right.keys():
            return [f"{path}: keys differ: {set(left) ^ set(right)}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}[{key}]")]
    if list(expected) != list(actual):
        return [f"{path}: keys {list(expected)!r} became {list(actual)!r}"]
    return [found for key in expected for found in differences(expected[key], actual[key], f"{path}[{key!r}]")]


def _of_attributes(expected: dict[str, Any], actual: dict[str, Any], path: str) -> list[str]:
    if expected.keys() != actual.keys():
        return [f"{path}: attributes {sorted(expected)} became {sorted(actual)}"]
    return [found for name in expected for found in differences(expected[name], actual[name], f"{path}.{name}")]


def without_identity(metadata: Metadata) -> Metadata:
    """Returns ``metadata`` without what is new in every save: ids, and the attempt's directory in paths."""
    if metadata.storage_meta is not None:
        metadata.storage_meta.save_id = metadata.storage_meta.load_id = None
        metadata.storage_meta.checkpoint_id = None
    for info in (metadata.storage_data or {}).values():
        info.relative_path = info.relative_path.rpartition("/")[2]
    return metadata
