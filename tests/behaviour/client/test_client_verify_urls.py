"""``shardbook.verify`` of what fsspec opens: sizes come with the listing, where the filesystem lists."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

import shardbook
from shardbook.errors import NotFoundError, StorageError
from shardbook.verifying import FaultKind
from tests.behaviour.client.data_files import write_checkpoint
from tests.behaviour.client.test_client_verify import WHO, told


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A whole checkpoint in memory."""
    url = f"memory://{uuid.uuid4().hex}/step-1500"
    filesystem = fsspec.filesystem("memory")
    for name, content in write_checkpoint(tmp_path, WHO).items():
        filesystem.pipe_file(f"{url}/{name}", content)
    return url


def test_sizes_come_from_one_listing_a_directory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No question a file, and no file is opened."""
    filesystem = fsspec.filesystem("memory")
    listed: list[str] = []
    original = type(filesystem).ls

    def ls(self: Any, path: str, **options: Any) -> Any:
        if options.get("detail"):
            listed.append(path)
        return original(self, path, **options)

    monkeypatch.setattr(type(filesystem), "ls", ls)
    report = shardbook.verify(url)
    assert (True, url, 6) == (report.is_ok, report.directory, report.file_count)
    assert 1 == sum(path.endswith(WHO.prefix) for path in listed)


def test_losses_are_found(url: str) -> None:
    """Gone and cut, as on a disk."""
    filesystem = fsspec.filesystem("memory")
    filesystem.rm(f"{url}/{WHO.prefix}/__1_1.distcp")
    filesystem.pipe_file(f"{url}/{WHO.prefix}/__3_1.distcp", b"")
    assert [("missing", 1, "__1_1.distcp", 16, None), ("truncated", 3, "__3_1.distcp", 9, 0)] == told(
        shardbook.verify(url)
    )
    filesystem.rm(f"{url}/{WHO.prefix}", recursive=True)
    assert 6 == shardbook.verify(url).fault_counts[FaultKind.MISSING]


@pytest.mark.parametrize("answer", ["nothing", "error", "no sizes"])
def test_a_filesystem_that_does_not_list_is_asked_file_by_file(
    url: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some web servers list nothing, others no sizes; that is not the same as losing everything."""
    filesystem = fsspec.filesystem("memory")
    filesystem.rm(f"{url}/{WHO.prefix}/__1_1.distcp")
    original = type(filesystem).ls

    def ls(self: Any, path: str, **options: Any) -> Any:
        if not options.get("detail") or not path.endswith(WHO.prefix):
            return original(self, path, **options)
        if answer == "error":
            raise FileNotFoundError(path)
        if answer == "nothing":
            return []
        return [{**info, "size": None} for info in original(self, path, **options)]

    monkeypatch.setattr(type(filesystem), "ls", ls)
    assert [("missing", 1, "__1_1.distcp", 16, None)] == told(shardbook.verify(url))


def test_a_url_without_anything_is_not_found() -> None:
    """Object stores know no empty directories."""
    with pytest.raises(NotFoundError) as caught:
        shardbook.verify("memory://nobody/step-1")
    assert "NO_CHECKPOINT" == caught.value.reason


def test_what_a_library_raises_is_a_storage_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are kept."""

    def ls(self: Any, path: str, **options: Any) -> Any:
        raise RuntimeError("throttled")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", ls)
    with pytest.raises(StorageError, match="throttled"):
        shardbook.verify(url)
