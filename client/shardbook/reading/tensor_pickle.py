"""What the pickle inside a ``torch.save`` file says of one tensor, read so that nothing in it can run.

Not one class or function of the file is looked up: the few names that ``torch.save`` writes for a strided tensor have
stand-ins here, which keep facts, and every other name is refused. Source: ``torch._tensor.Tensor.__reduce_ex__`` and
``torch.serialization._save`` of 2.13, which also read what releases since 1.6 wrote.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any, Final

from shardbook.core.dtype import dtype_names
from shardbook.errors import CorruptDataError, FailedPreconditionError

#: dtype by the class of a storage that has one.
_STORAGES: Final = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
}
_DTYPES: Final = frozenset(dtype_names())


@dataclass(frozen=True)
class PickledTensor:
    """A strided tensor as ``torch.save`` describes it.

    Attributes:
        key: Name of the record with its memory, below ``data/``.
        dtype: torch's name.
        offset: First element in the memory, elements.
        shape: Elements.
        strides: Elements, none negative; one a dimension.
        is_conjugate: The memory holds the conjugates of the values.
        is_negative: The memory holds the negatives of the values.
    """

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_conjugate: bool = False
    is_negative: bool = False


def read_tensor_pickle(content: bytes) -> PickledTensor:
    """Returns the one tensor in ``data.pkl``.

    Raises:
        FailedPreconditionError: Reason ``UNSAFE_ENTRY``: it names something else than a strided tensor is made of.
        CorruptDataError: It is damaged.
    """
    try:
        found = _TensorUnpickler(io.BytesIO(content)).load()
    except (FailedPreconditionError, CorruptDataError):
        raise
    except Exception as error:  # what damaged pickles raise has no bound
        raise CorruptDataError(f"the description of a tensor is damaged ({type(error).__name__}: {error})") from error
    return _tensor(found)


class _Global:
    """Stands for a name of torch's. Made anew for each use: a pickle may write into what it is given."""

    def __init__(self, module: str, name: str) -> None:
        self.names = (module, name)

    def __call__(self, *arguments: object) -> _Called:
        """Keeps what torch would have been called with."""
        return _Called(self.names, arguments)


class _Called:
    """A call that was not made."""

    def __init__(self, names: tuple[str, str], arguments: tuple[object, ...]) -> None:
        self.names = names
        self.arguments = arguments


class _Memory:
    """Stands for memory that another record of the file holds."""

    def __init__(self, pid: object) -> None:
        self.pid = pid


class _TensorUnpickler(pickle.Unpickler):
    """Puts stand-ins in the place of torch's names; nothing is imported, and nothing is called but stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in; called for every name in the pickle."""
        is_known = module == "torch" and (name in _STORAGES or name in _DTYPES)
        if is_known or (module, name) in _CALLED:
            return _Global(module, name)
        raise _unsafe(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Returns a stand-in for the memory that the tensor is in."""
        return _Memory(pid)


def _tensor(found: object) -> PickledTensor:
    """What was built, field by field; the pickle may have put anything anywhere."""
    if isinstance(found, _Called) and found.names == ("torch._utils", "_rebuild_parameter"):
        found = found.arguments[0] if found.arguments else None
    match found:
        case _Called(
            names=("torch._utils", "_rebuild_tensor_v2"),
            arguments=(memory, offset, shape, strides, _, _, *rest),
        ):
            key, dtype = _memory(memory)
        case _Called(
            names=("torch._utils", "_rebuild_tensor_v3"),
            arguments=(memory, offset, shape, strides, _, _, of, *rest),
        ):
            key, _ = _memory(memory)
            dtype = _dtype(of)
        case _:
            raise _unsafe(f"a {type(found).__name__.strip('_').lower()}")
    if not dtype or type(offset) is not int or offset < 0:
        raise _damaged("it has no dtype, or its offset is no offset")
    sizes, steps = _sizes(shape), _sizes(strides)
    if len(sizes) != len(steps):
        raise _damaged("its shape and strides differ in length")
    is_conjugate, is_negative = _properties(rest)
    return PickledTensor(key, dtype, offset, sizes, steps, is_conjugate, is_negative)


def _memory(memory: object) -> tuple[str, str]:
    """Key and dtype of a tensor's memory; no dtype when it is bytes."""
    match memory:
        case _Memory(pid=("storage", _Global(names=(str(), str(storage))), str(key), str(), int())):
            return key, _STORAGES.get(storage, "")
    raise _damaged("it names its memory in another form")


def _dtype(named: object) -> str:
    match named:
        case _Global(names=("torch", str(name))) if name in _DTYPES:
            return name
    raise _damaged("its dtype is none")


def _sizes(values: object) -> tuple[int, ...]:
    match values:
        case _Called(names=("torch", "Size"), arguments=(inside,)):
            values = inside
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise _damaged("its shape or strides are no sizes")
    return values


def _properties(rest: list[object]) -> tuple[bool, bool]:
    """Whether the memory holds conjugates, and negatives."""
    match rest:
        case [] | [None]:
            return False, False
        case [dict() as metadata] if metadata.keys() <= {"conj", "neg"}:
            return bool(metadata.get("conj")), bool(metadata.get("neg"))
    raise _unsafe("properties that this reader does not know")


#: Names that a tensor's pickle calls, beside those of storages and dtypes.
_CALLED: Final = frozenset(
    {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "Size"),
        ("torch", "UntypedStorage"),
        ("torch.storage", "UntypedStorage"),
        ("collections", "OrderedDict"),
    }
)


def _damaged(why: str) -> CorruptDataError:
    return CorruptDataError(f"the description of a tensor is damaged: {why}")


def _unsafe(what: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the data is no plain tensor: it names {what}; nothing in it was executed", reason="UNSAFE_ENTRY"
    )


__all__ = ["PickledTensor", "read_tensor_pickle"]
