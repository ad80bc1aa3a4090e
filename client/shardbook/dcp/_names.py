"""torch's enums and the numbers that stand for them in stored formats.

torch has no table of its own dtypes, layouts and memory formats; their ``str`` is the only stable name they have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from shardbook.core import dtype as codes
from shardbook.core.table import printable
from shardbook.errors import UnsupportedMetadataError

_T = TypeVar("_T")

_DTYPES: dict[torch.dtype, int] = {}
_LAYOUTS: dict[torch.layout, int] = {}
_MEMORY_FORMATS: dict[torch.memory_format, int] = {}
_DTYPE_OF: dict[int, torch.dtype] = {}
_LAYOUT_OF: dict[int, torch.layout] = {}
_MEMORY_FORMAT_OF: dict[int, torch.memory_format] = {}


def _fill() -> None:
    for name in codes.dtype_names():
        dtype = getattr(torch, name, None)  # older releases lack some
        if isinstance(dtype, torch.dtype):
            _DTYPES[dtype] = codes.dtype_code(name)
            _DTYPE_OF[codes.dtype_code(name)] = dtype
    for code in range(codes.LAYOUT_COUNT):
        layout = getattr(torch, codes.layout_name(code), None)
        if isinstance(layout, torch.layout):
            _LAYOUTS[layout] = code
            _LAYOUT_OF[code] = layout
    for code in range(codes.MEMORY_FORMAT_COUNT):
        memory_format = getattr(torch, codes.memory_format_name(code), None)
        if isinstance(memory_format, torch.memory_format):
            _MEMORY_FORMATS[memory_format] = code
            _MEMORY_FORMAT_OF[code] = memory_format


_fill()


def unsupported(fqn: str, value: object, what: str) -> UnsupportedMetadataError:
    """Returns the error for ``value``, which belongs to ``fqn`` and has no exact wire form."""
    kind = type(value)
    return UnsupportedMetadataError(
        f"{what} of {printable(fqn)!r} is a {kind.__module__}.{kind.__qualname__} that has no exact wire form",
        field="metadata",
        metadata={"fqn": printable(fqn), "type": f"{kind.__module__}.{kind.__qualname__}"},
    )


def dtype_code(dtype: object, fqn: str) -> int:
    """Returns the code of a dtype; raises UnsupportedMetadataError for one that has none."""
    code = _DTYPES.get(dtype) if isinstance(dtype, torch.dtype) else None
    if code is None:
        raise unsupported(fqn, dtype, f"the dtype ({dtype})")
    return code


def layout_code(layout: object, fqn: str) -> int:
    """Returns the code of a layout; raises UnsupportedMetadataError for one that has none."""
    code = _LAYOUTS.get(layout) if isinstance(layout, torch.layout) else None
    if code is None:
        raise unsupported(fqn, layout, f"the layout ({layout})")
    return code


def memory_format_code(memory_format: object, fqn: str) -> int:
    """Returns the code of a memory format; raises UnsupportedMetadataError for one that has none."""
    code = _MEMORY_FORMATS.get(memory_format) if isinstance(memory_format, torch.memory_format) else None
    if code is None:
        raise unsupported(fqn, memory_format, f"the memory format ({memory_format})")
    return code


def dtype_of(code: int, fqn: str) -> torch.dtype:
    """Returns the dtype of a code; raises UnsupportedMetadataError when this torch lacks it."""
    return _known(_DTYPE_OF, code, codes.dtype_name, fqn)


def layout_of(code: int, fqn: str) -> torch.layout:
    """Returns the layout of a code; raises UnsupportedMetadataError when this torch lacks it."""
    return _known(_LAYOUT_OF, code, codes.layout_name, fqn)


def memory_format_of(code: int, fqn: str) -> torch.memory_format:
    """Returns the memory format of a code; raises UnsupportedMetadataError when this torch lacks it."""
    return _known(_MEMORY_FORMAT_OF, code, codes.memory_format_name, fqn)


def _known(table: dict[int, _T], code: int, name: Callable[[int], str], fqn: str) -> _T:
    value = table.get(code)
    if value is not None:
        return value
    try:
        wanted = f"torch.{name(code)}"
    except IndexError:
        wanted = f"code {code} of a newer release of shardbook"
    raise UnsupportedMetadataError(
        f"{printable(fqn)!r} needs {wanted}, which torch {torch.__version__} lacks",
        field="metadata",
        metadata={"fqn": printable(fqn), "type": wanted},
    )
