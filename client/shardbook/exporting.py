"""``export_metadata``: DCP's own ``.metadata`` of a checkpoint, made anew; no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from shardbook._attempts import TreeFiles
from shardbook._described import Target, read_directory, told_as_ours
from shardbook._targets import METADATA_S, checkpoint_named
from shardbook._trees import open_tree
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.core.fold import FoldedAttempt
from shardbook.errors import InvalidArgumentError
from shardbook.stores import normalized


def export_metadata(
    target: Target,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    config: ClientConfig | None = None,
    client: Client | None = None,
) -> int:
    """Writes DCP's own ``.metadata`` of a checkpoint to a file, as a whole or not at all; returns its bytes.

    Put into the checkpoint's directory, it is what plain ``torch.distributed.checkpoint`` loads from there. It is
    streamed: no object stands for a chunk.

    Args:
        target: ``project/run@1500``, ``@latest``, ...; or a directory or URL that Shardbook saved into.
        output: Path or URL of the file. Its directory is there.
        force: Replace a file that is there.
        config: Settings; those of the environment when None.
        client: The server, for refs; by default the one that ``config`` names.

    Raises:
        InvalidArgumentError: The file is there (reason ``FILE_EXISTS``).
        NotFoundError: There is no such checkpoint, or no such directory.
        UnsupportedMetadataError: The checkpoint has what DCP cannot pickle.
        StorageError, PermissionDeniedError: The storage failed.
        ShardbookError: The service could not be asked.
    """
    path = os.fspath(output)
    folder, _, name = (path if "://" in path else normalized(path)).rpartition("/")
    settings = ClientConfig.from_env() if config is None else config
    with told_as_ours(f"cannot write {path}"):
        tree = open_tree(folder or "/")
        if not force and tree.facts(f"{folder}/{name}") is not None:
            raise InvalidArgumentError(
                f"{path} is there already: pass --force to replace it", reason="FILE_EXISTS", field="output"
            )
        content = _Counted(_metadata_of(target, settings, client))
        tree.write(f"{folder}/{name}", content)
    return content.size_bytes


class _Counted:
    """Blocks on their way to a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self.size_bytes += len(block)
            yield block


def _metadata_of(target: Target, config: ClientConfig, client: Client | None) -> Iterator[bytes]:
    name = checkpoint_named(target)
    if name is not None:
        asked = client or Client(config.server, token=config.token, timeout_s=config.timeout_s)
        stored = asked.get_metadata(name, deadline_s=METADATA_S)
        return stored.dcp_metadata(config.stores.here(stored.checkpoint.location.location))
    path = os.fspath(target)  # type: ignore[arg-type]  # a CheckpointName names itself
    found = read_directory(TreeFiles(open_tree(path), normalized(path)))
    if isinstance(found, FoldedAttempt):
        return found.dcp_metadata(found.header(normalized(path)))
    return iter((found,))


__all__ = ["export_metadata"]
