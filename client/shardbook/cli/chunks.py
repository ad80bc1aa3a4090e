"""``shardbook chunks``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardbook.cli import output, progress
from shardbook.cli.failures import asking_storage
from shardbook.cli.options import DEFAULT_LIMIT, DEFAULT_TIMEOUT_S, AsJson, Limit, Plain, Server, Timeout, rows_at_most
from shardbook.cli.wanted import Target, found_in
from shardbook.errors import InvalidArgumentError

if TYPE_CHECKING:
    from shardbook.reading.finding import Found, WantedTensor

EXAMPLES = """\b
Examples:
  shardbook chunks llm/8b-v3@latest model.embed.weight
  shardbook chunks llm/8b-v3@1500 'model.embed.weight[0:10]'
  shardbook chunks /ckpt/step-1500 model.embed.weight 0:10,: --json | jq -r '.chunks[].file'"""
_COLUMNS = (
    ("OFFSETS", False),
    ("SIZES", False),
    ("RANK", True),
    ("FILE", False),
    ("FROM BYTE", True),
    ("BYTES", True),
)
#: Columns that a narrow terminal does without, the first one first.
_EXPENDABLE = ("RANK",)


@dataclass(frozen=True)
class PrintedChunk:
    """A chunk of a tensor.

    Attributes:
        offsets: First element in each dimension.
        sizes: Elements in each dimension.
        rank: Rank that wrote it, by the name of its file; null when that tells none.
        file: The file, relative to the checkpoint's directory.
        offset_bytes: First byte in the file.
        size_bytes: Bytes in the file.
        transforms: What has to be undone after reading, in the words of DCP's writers.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int | None
    file: str
    offset_bytes: int
    size_bytes: int
    transforms: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        lists = {name: list(getattr(self, name)) for name in ("offsets", "sizes", "transforms")}
        return {**vars(self), **lists}


def list_chunks(
    ref: Target,
    tensor: Annotated[str, typer.Argument(metavar="TENSOR", help="Its name; a part of it, as in 'w[0:10]'.")],
    region: Annotated[str | None, typer.Argument(metavar="[REGION]", help="The part alone: 0:10,:.")] = None,
    limit: Limit = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List the chunks of a tensor: what each holds, who wrote it, and where its bytes are.

    A directory or URL is read without any server.
    """
    from shardbook.core.table import printable
    from shardbook.reading.region import parse_tensor

    fqn, cells = parse_tensor(tensor)
    if region is not None:
        if cells is not None:
            raise InvalidArgumentError(f"{tensor} names a part already, and {region} another one", field="region")
        fqn, cells = parse_tensor(f"{tensor}[{region.strip('[]')}]")
    with asking_storage(), progress.shown("looking", is_wanted=not (is_plain or as_json)):
        found = found_in(ref, {fqn: cells}, server, timeout_s)
    rows = found.tensors[0].chunks.touching(found.tensors[0].selection.box).tolist()
    shown = rows[: rows_at_most(limit) or None]
    chunks = list(_chunks(found.tensors[0], shown))
    if as_json:
        _print_json(found, chunks, more=len(shown) < len(rows))
        return
    one = found.tensors[0].chunks
    shape = ", ".join(map(str, one.shape))
    of = f"{output.count(len(rows))} of {output.count(len(one.length))} chunks"
    output.print_line(f"{printable(one.fqn)}: {one.dtype} [{shape}], {of}, in {found.directory}", is_plain=is_plain)
    output.print_table(_COLUMNS, map(_row, chunks), expendable=_EXPENDABLE, is_plain=is_plain)
    if len(shown) < len(rows) and limit is None:
        output.print_line(f"only the first {DEFAULT_LIMIT} chunks: --limit 0 shows all", is_plain=is_plain)


def _chunks(wanted: WantedTensor, rows: list[int]) -> Iterator[PrintedChunk]:
    """The chunks that are shown: as many as somebody asked to look at."""
    from shardbook.core.footprint import rank_of_file

    one = wanted.chunks
    for row in rows:
        path, transform = one.paths[int(one.file[row])], int(one.transform_index[row])
        yield PrintedChunk(
            offsets=tuple(one.offsets[row].tolist()),
            sizes=tuple(one.sizes[row].tolist()),
            rank=rank_of_file(path),
            file=path,
            offset_bytes=int(one.start[row]),
            size_bytes=int(one.length[row]),
            transforms=one.transforms[transform - 1] if transform else (),
        )


def _print_json(found: Found, chunks: list[PrintedChunk], *, more: bool) -> None:
    one = found.tensors[0].chunks
    output.print_json(
        {
            "tensor": {
                "fqn": one.fqn,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "chunk_count": len(one.length),
            },
            "directory": found.directory,
            "chunks": [chunk.to_json() for chunk in chunks],
            "more": more,
        }
    )


def _row(chunk: PrintedChunk) -> tuple[str, ...]:
    return (
        "[" + ", ".join(map(str, chunk.offsets)) + "]",
        "[" + ", ".join(map(str, chunk.sizes)) + "]",
        "-" if chunk.rank is None else str(chunk.rank),
        chunk.file,
        output.count(chunk.offset_bytes),
        output.count(chunk.size_bytes),
    )


__all__ = ["EXAMPLES", "PrintedChunk", "list_chunks"]
