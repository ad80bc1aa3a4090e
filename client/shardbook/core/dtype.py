"""Stable numbers for torch's dtypes, layouts and memory formats, without torch.

The numbers are part of the stored formats: entries are only ever appended. Names are torch's own, without
``torch.``. Source of the list: ``torch`` 2.13, every public ``torch.dtype`` and ``torch.layout``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shardbook.errors import InvalidArgumentError

#: (name, bits of one element), by code; code 0 is "not a tensor".
_DTYPES: tuple[tuple[str, int], ...] = (
    ("", 0),
    ("float32", 32),
    ("float64", 64),
    ("float16", 16),
    ("bfloat16", 16),
    ("complex32", 32),
    ("complex64", 64),
    ("complex128", 128),
    ("uint8", 8),
    ("int8", 8),
    ("int16", 16),
    ("int32", 32),
    ("int64", 64),
    ("bool", 8),
    ("uint16", 16),
    ("uint32", 32),
    ("uint64", 64),
    ("float8_e4m3fn", 8),
    ("float8_e4m3fnuz", 8),
    ("float8_e5m2", 8),
    ("float8_e5m2fnuz", 8),
    ("float8_e8m0fnu", 8),
    ("float4_e2m1fn_x2", 8),
    ("qint8", 8),
    ("quint8", 8),
    ("qint32", 32),
    ("quint4x2", 8),
    ("quint2x4", 8),
    ("bits1x8", 8),
    ("bits2x4", 8),
    ("bits4x2", 8),
    ("bits8", 8),
    ("bits16", 16),
    ("uint1", 8),
    ("uint2", 8),
    ("uint3", 8),
    ("uint4", 8),
    ("uint5", 8),
    ("uint6", 8),
    ("uint7", 8),
    ("int1", 8),
    ("int2", 8),
    ("int3", 8),
    ("int4", 8),
    ("int5", 8),
    ("int6", 8),
    ("int7", 8),
    ("bit", 8),
)
_LAYOUTS: tuple[str, ...] = (
    "strided",
    "sparse_coo",
    "sparse_csr",
    "sparse_csc",
    "sparse_bsr",
    "sparse_bsc",
    "_mkldnn",
    "jagged",
)
_MEMORY_FORMATS: tuple[str, ...] = ("contiguous_format", "channels_last", "preserve_format", "channels_last_3d")

_DTYPE_CODES = {name: code for code, (name, _) in enumerate(_DTYPES) if name}
_LAYOUT_CODES = {name: code for code, name in enumerate(_LAYOUTS)}
_MEMORY_FORMAT_CODES = {name: code for code, name in enumerate(_MEMORY_FORMATS)}

DTYPE_COUNT = len(_DTYPES)
LAYOUT_COUNT = len(_LAYOUTS)
MEMORY_FORMAT_COUNT = len(_MEMORY_FORMATS)

#: Bytes of one element by dtype code, as ``torch.dtype.itemsize`` has it; 0 for "not a tensor".
ITEMSIZES: npt.NDArray[np.int64] = np.array([bits // 8 for _, bits in _DTYPES], dtype=np.int64)
ITEMSIZES.setflags(write=False)


def dtype_code(name: str) -> int:
    """Returns the code of a dtype; raises InvalidArgumentError for a name not in the list."""
    return _code(_DTYPE_CODES, name, "dtype")


def dtype_name(code: int) -> str:
    """Returns the name of a dtype code; empty for 0, which is no tensor."""
    return _DTYPES[code][0]


def layout_code(name: str) -> int:
    """Returns the code of a ``torch.layout``."""
    return _code(_LAYOUT_CODES, name, "layout")


def layout_name(code: int) -> str:
    """Returns the name of a layout code."""
    return _LAYOUTS[code]


def memory_format_code(name: str) -> int:
    """Returns the code of a ``torch.memory_format``."""
    return _code(_MEMORY_FORMAT_CODES, name, "memory format")


def memory_format_name(code: int) -> str:
    """Returns the name of a memory format code."""
    return _MEMORY_FORMATS[code]


def dtype_names() -> tuple[str, ...]:
    """Returns every dtype name that has a code."""
    return tuple(_DTYPE_CODES)


def _code(codes: dict[str, int], name: str, what: str) -> int:
    try:
        return codes[name]
    except KeyError:
        raise InvalidArgumentError(f"unknown {what} {name!r}", field=what.replace(" ", "_")) from None
