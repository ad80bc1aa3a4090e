"""Checkpoints that were moved to another store, or have a copy there: real ranks load them."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from shardbook import Client, dcp, move
from shardbook.config import ClientConfig
from shardbook.dcp import ShardbookReader
from shardbook.errors import InvalidArgumentError
from shardbook.stores import Stores
from tests.torch import entry_jobs
from tests.torch.alone import blank_state, loads, some_state
from tests.torch.harness import RankPool
from tests.torch.test_load_alone import different

pytestmark = [
    pytest.mark.soak_with("postgres"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning"),
]


def test_a_checkpoint_is_loaded_from_where_it_is(
    session: dcp.Session,
    server: str,
    pool: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a copy: from the first place, then from the second one; moved: from there, by gloo ranks as well."""
    first, second = tmp_path / "first", tmp_path / "second"
    ref, stores = f"{session.run}@1", f"first={first},second={second}"
    monkeypatch.setenv("SHARDBOOK_STORES", stores)
    config = ClientConfig(server=server, stores=Stores({"first": str(first), "second": str(second)}))
    dcp.close()
    dcp.init(run=session.run, server=server)
    dcp.save(some_state(), checkpoint_id=first / "step-1")
    assert ("first:step-1",) == Client(server).get_checkpoint(ref).locations
    shutil.copytree(first, second)
    assert ["moved"] == [one.outcome for one in move(ref, "second", keep=True, config=config)]
    assert loads(ref)
    assert "" == caplog.text
    next(first.rglob("*.distcp")).unlink()
    assert loads(ref)
    assert f"reading from {second}/step-1" in caplog.text
    caplog.clear()
    by_torch = blank_state()
    torch_load(by_torch, storage_reader=ShardbookReader(ref), no_dist=True)
    assert [] == different(some_state(), by_torch)
    assert f"reading from {second}/step-1" in caplog.text
    shutil.rmtree(first)
    assert loads(ref)
    caplog.clear()
    assert ["moved"] == [one.outcome for one in move(ref, "second", source="first", config=config)]
    assert loads(ref)
    assert "" == caplog.text
    environment = {"SHARDBOOK_SERVER": server, "SHARDBOOK_STORES": stores}
    offline = {"run": f"{session.run}-2", "mode": "offline"}
    alike = pool.run(entry_jobs.loads_alike, ref, offline, world_size=2, environment=environment)
    assert [True, True] == alike
    # A host that knows neither store is told what to set.
    monkeypatch.delenv("SHARDBOOK_STORES")
    dcp.close()
    monkeypatch.setenv("SHARDBOOK_SERVER", server)
    with pytest.raises(InvalidArgumentError, match="SHARDBOOK_STORES=second=ROOT"):
        dcp.load(blank_state(), ref)


def test_a_checkpoint_moves_to_an_object_store_and_back(
    session: dcp.Session, server: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 lists its files with their sizes: what lacks one is not switched; loads then read from the bucket alone."""
    disk, bucket, ref = tmp_path / "disk", f"{s3}/{session.run}", f"{session.run}@1"
    monkeypatch.setenv("SHARDBOOK_STORES", f"disk={disk},bucket={bucket}")
    config = ClientConfig(server=server, stores=Stores({"disk": str(disk), "bucket": bucket}))
    dcp.close()
    dcp.init(run=session.run, server=server)
    dcp.save(some_state(), checkpoint_id=disk / "step-1")
    files = fsspec.filesystem("s3")
    files.put(f"{disk}/", f"{bucket}/", recursive=True)
    data = next(one for one in files.find(bucket) if one.endswith(".distcp"))
    content = files.cat_file(data)
    files.pipe_file(data, content[:-1])
    assert ["incomplete"] == [one.outcome for one in move(ref, "bucket", config=config)]
    files.pipe_file(data, content)
    assert ["moved"] == [one.outcome for one in move(ref, "bucket", config=config)]
    assert ("bucket:step-1",) == Client(server).get_checkpoint(ref).locations
    disk.rename(tmp_path / "aside")
    assert loads(ref)
    (tmp_path / "aside").rename(disk)
    files.rm(bucket, recursive=True)
    assert ["moved"] == [one.outcome for one in move(ref, "disk", config=config)]
    assert loads(ref)
