"""A tensor as ``torch.save`` writes one, by numpy alone: torch loads it, with ``weights_only=True`` too."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Final

import numpy as np
import numpy.typing as npt

_REBUILD: Final = b"ctorch._utils\n_rebuild_tensor_v2\n"
_STORAGE: Final = b"ctorch\nFloatStorage\n"
_NO_HOOKS: Final = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
#: What zip archives cannot do without; the same for all, so that equal tensors have equal bytes.
_TIME: Final = (1980, 1, 1, 0, 0, 0)


def saved_tensor(values: npt.NDArray[np.float32]) -> bytes:
    """Returns the bytes of a file that holds ``values``."""
    memory = np.ascontiguousarray(values, "<f4")
    records = {
        "data.pkl": _described(memory),
        "byteorder": b"little",
        "data/0": memory.tobytes(),
        "version": b"3\n",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _TIME), content)
    return file.getvalue()


def _described(memory: npt.NDArray[np.float32]) -> bytes:
    """The pickle that says what the memory means: it names functions of torch, which is why it is put together here."""
    strides = [stride // memory.itemsize for stride in memory.strides]
    return b"".join(
        [
            pickle.PROTO + b"\x02",
            _REBUILD,
            pickle.MARK,
            pickle.MARK + _text("storage") + _STORAGE + _text("0") + _text("cpu") + _integer(memory.size),
            pickle.TUPLE + pickle.BINPERSID,
            _integer(0),
            _integers(memory.shape),
            _integers(strides),
            pickle.NEWFALSE,
            _NO_HOOKS,
            pickle.TUPLE + pickle.REDUCE + pickle.STOP,
        ]
    )


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + len(text).to_bytes(4, "little") + text.encode()


def _integer(value: int) -> bytes:
    return pickle.BININT + value.to_bytes(4, "little", signed=True)


def _integers(values: tuple[int, ...] | list[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE


__all__ = ["saved_tensor"]
