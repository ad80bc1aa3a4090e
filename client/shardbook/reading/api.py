"""``read`` and ``read_many``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shardbook._elsewhere import is_absent, read_elsewhere
from shardbook.config import ClientConfig
from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook.reading.filling import Filler
from shardbook.reading.finding import Found, Target, chunks_of
from shardbook.reading.ranges import range_reader
from shardbook.reading.region import Region
from shardbook.reading.stored import Array


def read(ref_or_path: Target, fqn: str, region: Region = None, *, config: ClientConfig | None = None) -> Array:
    """Reads a tensor, or a part of it, as a numpy array; torch is not needed.

    Only the bytes that hold the part are read, from a local directory or by range from whatever fsspec opens.
    bfloat16, the float8 types and complex32 are dtypes of ``ml_dtypes`` (extra ``[read]``).

    Args:
        ref_or_path: ``project/run@1500``, ``@latest``, ...; or a directory or URL that Shardbook, plain DCP or torch's
            Hugging Face writer saved into.
        fqn: Name of the tensor.
        region: What stands in the brackets of ``array[...]``: integers, slices without a step, an ellipsis. None for
            the whole tensor.
        config: Settings; those of the environment when None.

    Returns:
        A new, writable, row-major array of the region's shape (of no dimensions for one cell), in this machine's byte
        order; bit for bit what torch loads.

    Raises:
        NotFoundError: There is no such checkpoint, no such tensor (reason ``NO_SUCH_TENSOR``), or a data file is not
            there (``NO_DATA_FILE``).
        InvalidArgumentError: The region is none (``INVALID_REGION``); the entry is an object (``NOT_A_TENSOR``); the
            layout, dtype, transform or file format cannot be read without torch (``UNSUPPORTED_*``); or a package is
            not installed (``MISSING_PACKAGE``).
        FailedPreconditionError: A pickle of a plain DCP directory, or of the data, names something else than what it
            should be made of (``UNSAFE_METADATA``, ``UNSAFE_ENTRY``). Nothing in it was executed.
        CorruptManifestError, CorruptDataError: A file is damaged.
        OSError: The storage failed.
        ShardbookError: The service could not be asked; reading by path needs no service.
    """
    return read_many(ref_or_path, {fqn: region}, config=config)[fqn]


def read_many(
    ref_or_path: Target, wanted: Iterable[str] | Mapping[str, Region], *, config: ClientConfig | None = None
) -> dict[str, Array]:
    """Reads several tensors of a checkpoint together: one look at its metadata, and bytes of many files at once.

    Args:
        ref_or_path: As for ``read``.
        wanted: Names; or regions by name, None for the whole tensor.
        config: Settings; those of the environment when None.

    Returns:
        Arrays by name, in the order asked for. Raises as ``read`` does.
    """
    if isinstance(wanted, str):
        raise InvalidArgumentError("pass several names, or one to `read`", field="wanted")
    regions = wanted if isinstance(wanted, Mapping) else dict.fromkeys(wanted)
    return read_found(chunks_of(ref_or_path, regions, config)) if regions else {}


def read_found(found: Found) -> dict[str, Array]:
    """Reads what ``chunks_of`` found, see ``read_many``; where a file is missing, from where else the checkpoint is."""

    def read_at(place: str) -> list[Array]:
        return Filler(range_reader(place)).fill(found.tensors)

    try:
        arrays = read_at(found.directory)
    except (NotFoundError, OSError) as error:
        if not is_absent(error):
            raise
        places = (found.directory, *found.others)
        arrays = read_elsewhere(error, found.ref, places, read_at, tell_lost=found.tell_lost)
    return {one.chunks.fqn: array for one, array in zip(found.tensors, arrays, strict=True)}


__all__ = ["read", "read_found", "read_many"]
