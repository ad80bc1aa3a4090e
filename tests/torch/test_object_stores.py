"""Object stores: what is put there is whole or not there, and everything that works on a disk works on them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from shardbook import Client, dcp, verify
from shardbook.core import directory as names
from shardbook.dcp import SaveState
from shardbook.dcp.writer import CheckpointFiles
from shardbook.errors import StorageError
from shardbook.sync import SyncOutcome, sync_directories
from tests.torch import entry_jobs
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.harness import RankPool

#: Stores have nothing to do with the kind of database.
pytestmark = [
    pytest.mark.soak_with("postgres"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning"),
]


@pytest.fixture(params=["memory", "s3", "file"])
def url(request: pytest.FixtureRequest, run: str, tmp_path: Path) -> str:
    """The URL of a place of the test's own."""
    if request.param == "file":
        return f"file://{tmp_path}"
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory:/"
    return f"{root}/{run}"


def test_ranks_save_and_load(pool: RankPool, server: str, run: str, s3: str) -> None:
    """Real ranks, by Shardbook's functions and by torch's, by ref and by URL; nothing but whole files is left."""
    start = {"run": run, "server": server}
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    url = f"{s3}/{run}"
    results, others = pool.run(entry_jobs.save_to_store, url, start, world_size=2, environment=environment)
    assert [SaveState.COMMITTED] * 2 == [result.state for result in results], results
    assert [SaveState.COMMITTED, None] == [result and result.state for result in others]
    targets = [f"{url}/step-1", f"{url}/step-2", f"{run}@1", f"{run}@2"]
    loaded = pool.run(
        entry_jobs.load_from_store,
        targets,
        {"run": f"{run}-2", "mode": "offline"},
        world_size=2,
        environment={**environment, "SHARDBOOK_SERVER": server},
    )
    assert [[], []] == loaded
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    left = [name.rpartition("/")[2] for name in store.find(url)]
    assert not [name for name in left if name.endswith((".tmp", ".record"))]
    assert 2 == left.count(names.DCP_METADATA)


@pytest.mark.parametrize("entry", ["shardbook", "torch"])
def test_one_process(session: dcp.Session, server: str, url: str, entry: str) -> None:
    """By ref, by URL and by plain DCP; a later save of the directory takes the place of the first."""
    for value in (some_state(), some_state()):
        if entry == "torch":
            writer = dcp.ShardbookWriter(f"{url}/step-1")
            torch_save(value, storage_writer=writer)
            assert writer.result is not None
            result = writer.result
        else:
            result = dcp.save(value, storage_writer=FsspecWriter(f"{url}/step-1"))
        assert (SaveState.COMMITTED, "") == (result.state, result.reason)
        assert loads(result.ref)
        assert loads(f"{url}/step-1")
        plain = blank_state()
        torch_load(plain, storage_reader=FsspecReader(f"{url}/step-1"))
        assert torch.equal(some_state()["w"], plain["w"])
        by_torch = blank_state()
        torch_load(by_torch, storage_reader=dcp.ShardbookReader(result.ref), planner=dcp.ShardbookLoadPlanner())
        assert torch.equal(some_state()["w"], by_torch["w"])
        assert verify(result.ref, client=Client(server)).is_ok


def test_offline_and_synced_later(offline: dcp.Session, server: str, run: str, url: str) -> None:
    """What was left on a store is recorded from there."""
    writer = dcp.ShardbookWriter(f"{url}/step-1")
    torch_save(some_state(), storage_writer=writer)
    dcp.save(some_state(), checkpoint_id=f"{url}/step-2")
    outcomes = [one.outcome for one in sync_directories(Client(server), [url])]
    assert [SyncOutcome.RECORDED] * 2 == outcomes
    assert {1, 2} == {Client(server).get_checkpoint(f"{run}@{step}").step for step in (1, 2)}


class TestPuts:
    """A file appears whole, in one request, and is replaced so."""

    @pytest.fixture
    def calls(self) -> Iterator[Counter[str]]:
        """What S3 is asked, by name and last part of the key."""
        counted: Counter[str] = Counter()
        kind = fsspec.get_filesystem_class("s3")
        original = kind._call_s3

        async def counting(self: Any, method: str, *args: Any, **options: Any) -> Any:
            counted[method] += 1
            counted[f"{method} {str(options.get('Key')).rpartition('/')[2]}"] += 1
            return await original(self, method, *args, **options)

        with mock.patch.object(kind, "_call_s3", counting):
            yield counted

    def test_of_a_save(self, session: dcp.Session, s3: str, run: str, calls: Counter[str]) -> None:
        """Nothing is renamed, which stores do by copying; records are put once."""
        dcp.save(some_state(), checkpoint_id=f"{s3}/{run}/step-1")
        assert [1, 1] == [calls[f"put_object {name}"] for name in ("rank-0.record", names.DCP_METADATA)]
        assert 2 == calls["put_object manifest"]  # the attempt's, and the directory's
        assert 0 == calls["copy_object"] + calls["create_multipart_upload"]

    @pytest.mark.parametrize("is_known", [True, False], ids=["plain", "own streams"])
    def test_that_fail(self, url: str, is_known: bool) -> None:
        """What was there stays, whatever the content's maker raises half-way; without a stream's help too."""
        reader = FsspecReader(f"{url}/step-1")
        if not is_known:
            reader.fs.create_stream = reader.fs.create_stream  # type: ignore[method-assign] # somebody's own
        files = CheckpointFiles.of(reader)

        def blocks() -> Iterator[bytes]:
            yield b"new" * 1000
            raise LookupError("half-way")

        for content in (b"old", [b"ol", b"d"]):
            files.write("a/file", content)
            with pytest.raises(StorageError, match="half-way"):
                files.write("a/file", blocks())
            assert (b"old", ["file"]) == (files.read("a/file"), files.names("a"))
