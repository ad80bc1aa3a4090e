"""numpy's dtypes for torch's, by name; those that numpy lacks come from ``ml_dtypes``, which is an extra."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from shardbook.errors import InvalidArgumentError

_INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NUMPY: Final = frozenset(("bool", *_INTEGERS, "float16", "float32", "float64", "complex64", "complex128"))
#: One element a byte or more, as torch has them. torch's int4 and float4_e2m1fn_x2 are packed otherwise.
_ML_DTYPES: Final = frozenset(
    ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "complex32")
)
#: torch's name by the name in a safetensors header.
_SAFETENSORS: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_TO_SAFETENSORS: Final = {name: code for code, name in _SAFETENSORS.items()}


def numpy_dtype(name: str, fqn: str = "") -> np.dtype[Any]:
    """Returns the dtype of arrays for a torch dtype, in this machine's byte order.

    Args:
        name: torch's name, such as ``bfloat16``.
        fqn: Tensor that errors name.

    Raises:
        InvalidArgumentError: Reason ``MISSING_PACKAGE``: it takes ``ml_dtypes``, of the extra ``[read]``; or
            ``UNSUPPORTED_DTYPE``: there is no such dtype for arrays.
    """
    if name in _NUMPY:
        return np.dtype(name)
    about = f"{fqn!a} is {name}" if fqn else name
    if name not in _ML_DTYPES:
        raise InvalidArgumentError(
            f"{about}, for which numpy has no dtype: load it with shardbook.dcp",
            reason="UNSUPPORTED_DTYPE",
            field="fqn",
        )
    try:
        import ml_dtypes
    except ImportError:
        found = None
    else:
        found = getattr(ml_dtypes, name, None)
    if found is None:
        raise InvalidArgumentError(
            f"{about}, which numpy has from a current ml_dtypes, of the extra [read]: pip install 'shardbook[read]'",
            reason="MISSING_PACKAGE",
            field="fqn",
        )
    dtype: np.dtype[Any] = np.dtype(found)
    return dtype


def is_plain(dtype: np.dtype[Any]) -> bool:
    """Returns True for a dtype of numpy itself, which every reader of ``.npy`` files knows."""
    return dtype.name in _NUMPY


def from_safetensors(code: str) -> str | None:
    """Returns torch's name of a dtype in a safetensors header; None for one that is not known here."""
    return _SAFETENSORS.get(code)


def to_safetensors(name: str) -> str | None:
    """Returns the name in a safetensors header of a torch dtype; None for one that the format lacks."""
    return _TO_SAFETENSORS.get(name)


__all__ = ["from_safetensors", "is_plain", "numpy_dtype", "to_safetensors"]
