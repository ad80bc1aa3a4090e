"""Where the chunks of tensors are: from the catalogue, a manifest, ``.metadata``, or headers of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from shardbook._answers import Answers
from shardbook._attempts import FoundAttempt, TreeFiles
from shardbook._lost import tell_lost
from shardbook._newest import incomplete_attempts, read_newest
from shardbook._targets import METADATA_S, checkpoint_named
from shardbook._trees import open_tree
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.directory import DCP_METADATA
from shardbook.core.fold import FoldedAttempt, unfold
from shardbook.core.names import CheckpointName
from shardbook.core.wanted import Wanted
from shardbook.errors import InvalidArgumentError, NotFoundError, UnavailableError
from shardbook.reading.chunks import TensorChunks, of_columns, of_found
from shardbook.reading.hugging_face import SUFFIX, read_folder
from shardbook.reading.plain_metadata import read_plain_metadata
from shardbook.reading.ranges import range_reader
from shardbook.reading.region import Region, Selection, select
from shardbook.stores import encodable, normalized

#: A checkpoint: a ref, its name, or a directory or URL.
Target = str | os.PathLike[str] | CheckpointName


@dataclass(frozen=True, eq=False)
class WantedTensor:
    """Cells of a tensor that somebody wants.

    Attributes:
        chunks: The tensor, with at least the chunks that the cells are in.
        selection: The cells.
    """

    chunks: TensorChunks
    selection: Selection


@dataclass(frozen=True, eq=False)
class Found:
    """Tensors of one checkpoint.

    Attributes:
        directory: Path or URL that data files are relative to.
        tensors: In the order in which they were asked for.
        tell_lost: Tells the catalogue that a data file is not there.
    """

    directory: str
    tensors: tuple[WantedTensor, ...]
    tell_lost: Callable[[], None] = lambda: None


class _Metadata(Protocol):
    """Whatever knows where the chunks of one checkpoint are."""

    directory: str

    def chunks(self, fqns: list[str]) -> Mapping[str, TensorChunks | None]:
        """Returns entries by name; None for a name that the checkpoint lacks."""
        ...

    def tell_lost(self) -> None:
        """Tells whoever keeps the metadata that a data file is not there; best effort."""
        ...


def chunks_of(
    target: Target, regions: Mapping[str, Region], config: ClientConfig | None = None, client: Client | None = None
) -> Found:
    """Returns where the cells of tensors are.

    Args:
        target: The checkpoint.
        regions: By fqn.
        config: Settings; those of the environment when None.
        client: Asks the service; one that the settings name when None.

    Raises:
        NotFoundError: There is no such checkpoint, or it has no such entry (reason ``NO_SUCH_TENSOR``).
        InvalidArgumentError: An entry is no tensor (``NOT_A_TENSOR``), is not strided (``UNSUPPORTED_LAYOUT``), or a
            region is none (``INVALID_REGION``).
        FailedPreconditionError: ``.metadata`` is not DCP's metadata alone (``UNSAFE_METADATA``).
        CorruptManifestError: What Shardbook left in a directory is damaged.
        ShardbookError: The service could not be asked.
    """
    metadata = _metadata_of(target, ClientConfig.from_env() if config is None else config, client)
    found = metadata.chunks(list(regions))
    wanted = [_checked(found.get(fqn), fqn, target) for fqn in regions]
    selections = [select(region, one.shape, one.fqn) for one, region in zip(wanted, regions.values(), strict=True)]
    return Found(metadata.directory, tuple(map(WantedTensor, wanted, selections)), metadata.tell_lost)


def _checked(chunks: TensorChunks | None, fqn: str, target: Target) -> TensorChunks:
    where = encodable(str(target))
    if chunks is None:
        raise NotFoundError(
            f"{where} has no entry {fqn!a}: `shardbook tensors REF` lists them", reason="NO_SUCH_TENSOR", field="fqn"
        )
    if not chunks.is_tensor:
        raise InvalidArgumentError(
            f"{fqn!a} of {where} is no tensor but an object that torch.save pickled (a bytes entry): "
            "load it with shardbook.dcp.load, which runs nothing in it",
            reason="NOT_A_TENSOR",
            field="fqn",
        )
    if chunks.layout != "strided":
        raise InvalidArgumentError(
            f"{fqn!a} of {where} has the layout {chunks.layout}, and only strided tensors are arrays: "
            "load it with shardbook.dcp.load",
            reason="UNSUPPORTED_LAYOUT",
            field="fqn",
        )
    return chunks


def _metadata_of(target: Target, config: ClientConfig, client: Client | None) -> _Metadata:
    name = checkpoint_named(target)
    if name is not None:
        return _Catalogue(name, config, client)
    assert not isinstance(target, CheckpointName)  # noqa: S101 - it has a name
    plain = os.fspath(target)
    directory = plain if "://" in plain and not plain.startswith("file://") else normalized(plain)
    files = TreeFiles(open_tree(directory), directory.rstrip("/"))
    return _Directory(files)


class _Catalogue:
    """A committed checkpoint of the catalogue."""

    def __init__(self, name: CheckpointName, config: ClientConfig, client: Client | None) -> None:
        self._name = name
        self._config = config
        self._answers = Answers.of(config, METADATA_S, client)
        self._full_name = ""
        self.directory = ""

    def chunks(self, fqns: list[str]) -> dict[str, TensorChunks | None]:
        try:
            answer = self._answers.chunks(self._name, Wanted.all_of(fqns))
        except UnavailableError as error:
            raise UnavailableError(
                f"{error.message} A checkpoint's directory can be read without a server: pass its path",
                reason=error.reason,
                metadata=error.metadata,
            ) from error
        self._full_name = answer.name
        self.directory = self._config.stores.path_of(answer.location)
        return {fqn: of_found(answer.found, number) for number, fqn in enumerate(fqns)}

    def tell_lost(self) -> None:
        tell_lost(self._answers.client, self._full_name, self.directory)


class _Directory:
    """A directory, as Shardbook, plain DCP or torch's Hugging Face writer left it."""

    def __init__(self, files: TreeFiles) -> None:
        self._files = files
        self.directory = files.directory

    def chunks(self, fqns: list[str]) -> Mapping[str, TensorChunks | None]:
        found = read_newest(self._files, lambda one: _part_of(one, fqns))
        if found is not None:
            prefix = found.manifest.identity.prefix
            rows = enumerate(found.structure.fqns)
            return {fqn: of_columns(found.structure, found.located, prefix, row) for row, fqn in rows}
        content = self._files.read(DCP_METADATA)
        if content is not None:
            return read_plain_metadata(content, fqns)
        names = [name for name in self._files.names("") if name.endswith(SUFFIX)]
        if names:
            return read_folder(range_reader(self.directory), names, fqns)
        raise self._nothing_there()

    def tell_lost(self) -> None:
        """There is nobody to tell."""

    def _nothing_there(self) -> NotFoundError:
        begun = incomplete_attempts(self._files)
        where = encodable(normalized(self.directory))
        if begun:
            told = ", ".join(f"{prefix} ({count} ranks)" for prefix, count in begun.items())
            return NotFoundError(f"no whole checkpoint in {where}: attempts without all of their ranks: {told}")
        return NotFoundError(f"no checkpoint in {where}", reason="NO_DIRECTORY")


def _part_of(one: FoundAttempt, fqns: Iterable[str]) -> FoldedAttempt | None:
    """An attempt with the wanted entries alone: what one tensor needs must not cost what all of them do."""
    manifest = one.manifest()
    if manifest is None:
        return None
    wanted = set(fqns)
    kept = [number for number, fqn in enumerate(manifest.fqns) if fqn in wanted]
    blocks = tuple(manifest.blocks[number] for number in kept)
    return unfold(replace(manifest, blocks=blocks, fqns=tuple(manifest.fqns[number] for number in kept)))


__all__ = ["Found", "Target", "WantedTensor", "chunks_of"]
