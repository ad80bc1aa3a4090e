"""What a save says of its checkpoint, with the service and without it."""

from __future__ import annotations

import logging
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

import shardbook
from shardbook import Client, dcp
from shardbook.core import directory as names
from shardbook.core.description import unpack_said
from shardbook.core.manifest import Manifest
from shardbook.dcp import SaveState
from shardbook.errors import InvalidArgumentError
from shardbook.sync import SyncOutcome, sync_directories
from tests.torch.alone import loads, some_state

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")

SAID: dict[str, Any] = {
    "labels": {"stage": "pretrain"},
    "metrics": {"val_loss": 1.5, "tokens": 10},
    "note": {"why": ["é", None]},
}


def test_the_catalogue_has_what_was_said(
    session: dcp.Session, server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Labels, finite metrics, the note, who wrote it, and what the rank took; a diverged loss is no reason to fail."""
    metrics = {**SAID["metrics"], "diverged": math.nan}
    with caplog.at_level(logging.WARNING, "shardbook"):
        result = dcp.save(some_state(), checkpoint_id=tmp_path / "1", **{**SAID, "metrics": metrics})
    assert SaveState.COMMITTED == result.state
    assert ["diverged"] == [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    found = Client(server).get_checkpoint(result.ref)
    assert (SAID["labels"], SAID["metrics"], SAID["note"]) == (found.labels, found.metrics, found.note)
    assert (socket.gethostname(), shardbook.__version__) == (found.writer.host, found.writer.client_version)
    assert torch.__version__.startswith(found.writer.torch_version[:4])
    assert found.timing is not None
    assert ["plan", "write", "register"] == [one.phase for one in found.timing.phases]
    assert 0 < sum(one.slowest_s for one in found.timing.phases) < 60
    Client(server).follow_metric(f"{session.run}@best", "val_loss", "min")
    assert loads(f"{session.run}@best")
    [rank] = Client(server).list_ranks(result.ref)
    assert found.size_bytes == rank.size_bytes == found.timing.largest_rank_bytes


def test_a_save_in_the_background_says_it_too(session: dcp.Session, server: str, tmp_path: Path) -> None:
    """By a thread; what is handed to it may change afterwards."""
    labels = {"stage": "pretrain"}
    response = dcp.async_save(some_state(), checkpoint_id=tmp_path / "1", labels=labels)
    labels["stage"] = "other"
    assert {"stage": "pretrain"} == Client(server).get_checkpoint(response.result(30).ref).labels


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"labels": {"a b": "x"}}, "labels"),
        ({"labels": {"a": 1}}, "labels.a"),
        ({"metrics": {"loss": "low"}}, "metrics.loss"),
        ({"note": object()}, "note"),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is_written(
    offline: dcp.Session, tmp_path: Path, said: dict[str, object], field: str
) -> None:
    """A mistake in the script, told by the name of the argument."""
    with pytest.raises(InvalidArgumentError) as caught:
        dcp.save(some_state(), checkpoint_id=tmp_path / "1", **said)  # type: ignore[arg-type]
    assert [field] == [violation.field for violation in caught.value.violations]
    assert not list((tmp_path / "1").glob("*/__0_0.distcp"))


def test_the_directory_keeps_what_was_said_and_sync_brings_it_along(
    offline: dcp.Session, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the manifest, where any reader finds it; recorded with the attempt."""
    result = dcp.save(some_state(), checkpoint_id=tmp_path / "7", **SAID)
    assert SaveState.UNREGISTERED == result.state
    assert loads(tmp_path / "7")
    manifest = Manifest.from_bytes((tmp_path / "7" / names.manifest_path(result.prefix)).read_bytes())
    labels, metrics, note, writer = unpack_said(manifest.said)
    assert (SAID["labels"], SAID["metrics"], '{"why":["\\u00e9",null]}') == (labels, metrics, note)
    assert socket.gethostname() == writer["host"]
    [synced] = sync_directories(Client(server), [tmp_path / "7"])
    assert SyncOutcome.RECORDED == synced.outcome
    found = Client(server).get_checkpoint(f"{offline.run}@7")
    assert (SAID["labels"], SAID["metrics"], SAID["note"]) == (found.labels, found.metrics, found.note)
    assert socket.gethostname() == found.writer.host


def test_torchs_own_save_says_it_too(session: dcp.Session, server: str, tmp_path: Path) -> None:
    """By ``ShardbookWriter``: what was given, who wrote it with what, and what the phases took."""
    writer = dcp.ShardbookWriter(tmp_path / "9", checksum="none", **SAID)
    torch_save(some_state(), storage_writer=writer)
    assert writer.result is not None
    found = Client(server).get_checkpoint(writer.result.ref)
    assert (SAID["labels"], SAID["metrics"], SAID["note"]) == (found.labels, found.metrics, found.note)
    assert (socket.gethostname(), shardbook.__version__) == (found.writer.host, found.writer.client_version)
    assert torch.__version__.startswith(found.writer.torch_version[:4])
    assert found.timing is not None
    assert ["plan", "write", "register"] == [one.phase for one in found.timing.phases]
    assert 0 < sum(one.slowest_s for one in found.timing.phases) < 60
    assert loads(tmp_path / "9")


def test_torchs_own_save_leaves_it_with_the_directory(offline: dcp.Session, server: str, tmp_path: Path) -> None:
    """So that ``sync`` brings it along."""
    torch_save(some_state(), storage_writer=dcp.ShardbookWriter(tmp_path / "9", **SAID))
    [synced] = sync_directories(Client(server), [tmp_path / "9"])
    assert SyncOutcome.RECORDED == synced.outcome
    found = Client(server).get_checkpoint(f"{offline.run}@9")
    assert (SAID["labels"], SAID["metrics"], SAID["note"]) == (found.labels, found.metrics, found.note)


def test_a_writer_refuses_what_cannot_be_said(session: dcp.Session, tmp_path: Path) -> None:
    """When it is made, before anything is planned."""
    with pytest.raises(InvalidArgumentError) as caught:
        dcp.ShardbookWriter(tmp_path / "9", labels={"a b": "x"})
    assert ["labels"] == [violation.field for violation in caught.value.violations]
