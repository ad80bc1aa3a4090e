"""The commands against the real server: a run from its first session to a recovery after an outage."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shardbook.client import Client
from shardbook.core.head import decode_head
from shardbook.errors import InvalidArgumentError, RanksMissingError, SessionFencedError
from shardbook.recording import attempt_key
from shardbook.stores import Stores
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.app import Server
from shardbook_server.service.checks import check_location
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.directories import CheckpointDirectory, identity, manifest
from tests.behaviour.client.saves import register, save, start_session

FIRST, SECOND, THIRD = b"1" * 16, b"2" * 16, b"3" * 16


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client, and the setting that the commands read."""
    monkeypatch.setenv("SHARDBOOK_SERVER", server.address)
    return Client(server.address)


def test_saves_are_listed_and_described(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """Three saves of a run: runs, ls, show and tensors tell them."""
    for step in (10, 20, 30):
        save(client, tmp_path / f"step-{step}", step, run="tell/run", incarnation=FIRST)
    rows = shardbook("runs", "tell").rows
    assert ["tell/run", "30", "3", "yes", "1", "node-0", "ada"] == rows[1][:7]
    listed = shardbook("ls", "tell/run").rows
    assert [["30", "committed", "tell/run@30", "latest", "4", "1", "4", "96 B"], ["20"], ["10"]] == [
        listed[1][:8],
        listed[2][:1],
        listed[3][:1],
    ]
    assert shardbook("show", "tell/run@latest").out == shardbook("show", "tell/run@30").out
    assert 3 == shardbook("show", "tell/run@40").code
    assert 3 == shardbook("ls", "tell/nothing").code
    tensors = shardbook("tensors", "tell/run@20", "--json").json
    assert {
        "tensors": [
            {
                "fqn": "model.w",
                "is_tensor": True,
                "dtype": "float32",
                "shape": [8, 3],
                "chunk_count": 4,
                "size_bytes": 96,
            }
        ],
        "more": False,
    } == tensors
    assert [] == shardbook("tensors", "tell/run@20", "--prefix", "optim.", "--json").json["tensors"]


def test_pages_are_followed(client: Client, tmp_path: Path) -> None:
    """Whatever the page size, a list is whole and in order."""
    for step in range(1, 6):
        save(client, tmp_path / str(step), step, run="pages/run", incarnation=FIRST)
    for page_size in (1, 2, 5, 1000):
        found = client.list_checkpoints("pages/run", page_size=page_size)
        assert [5, 4, 3, 2, 1] == [checkpoint.step for checkpoint in found]


def test_metadata_of_the_service_is_that_of_the_manifest(client: Client, tmp_path: Path) -> None:
    """What the server assembled is what the directory's own fold says, byte for byte."""
    made = save(client, tmp_path, 10, run="meta/run", incarnation=FIRST)
    stored = client.get_metadata("meta/run@10")
    expected = manifest(identity(10, run="meta/run", session=1, incarnation=FIRST))
    assert (list(expected.blocks), expected.segments) == (
        stored.blocks,
        tuple(payload for _, payload in stored.segments),
    )
    assert decode_head(expected.head).rank_files.distinct == decode_head(stored.head).rank_files.distinct
    assert made.name == stored.checkpoint.name
    assert [] == client.get_metadata("meta/run@10", "optim.").blocks


def test_missing_ranks_are_named_by_the_commit(client: Client, tmp_path: Path) -> None:
    """A commit with a rank missing names it, and goes through once the rank is there."""
    session = start_session(client, "miss/run", FIRST).session
    who = identity(10, run="miss/run", session=session, incarnation=FIRST)
    register(client, who, tmp_path, ranks=(0, 1, 3))
    request = pb.CommitCheckpointRequest(key=attempt_key(who))
    with pytest.raises(RanksMissingError, match="2"):
        client.commit_when_complete(request, timeout_s=0.2)
    progress = client.wait_until_registered(attempt_key(who), timeout_s=0.1).progress
    assert [2] == [rank.rank for rank in progress.missing]
    register(client, who, tmp_path, ranks=(2,))
    assert 10 == client.commit_when_complete(request, timeout_s=10).checkpoint.step
    assert client.wait_until_closed(attempt_key(who), timeout_s=5).HasField("checkpoint")


@pytest.mark.parametrize("form", ["records", "manifest"])
def test_sync_brings_in_what_an_outage_left(form: str, client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """A numbered session's save and an offline one, from records or manifests; the second run changes nothing."""
    run = f"outage/{form}"
    save(client, tmp_path / "10", 10, run=run, incarnation=FIRST)
    during = identity(20, run=run, session=1, incarnation=FIRST)
    offline = identity(30, run=run, session=0, incarnation=SECOND)
    for who in (during, offline):
        directory = CheckpointDirectory(tmp_path / str(who.step))
        directory.add_records(who) if form == "records" else directory.add_manifest(who)
    assert ["recorded", "recorded"] == [row[0] for row in shardbook("sync", str(tmp_path)).rows[1:3]]
    # Where torch is installed, a directory that lacks what plain DCP reads gets it.
    assert (tmp_path / "30" / ".metadata").exists()
    again = shardbook("sync", str(tmp_path), "--json")
    assert (0, 2) == (again.code, again.json["counts"]["present"])
    found = {c["step"]: c for c in shardbook("ls", run, "--json").json["checkpoints"]}
    assert [(30, 0, True), (20, 1, True), (10, 1, False)] == [
        (step, found[step]["session"], found[step]["recovered"]) for step in (30, 20, 10)
    ]
    assert {"COMMITTED"} == {one["state"] for one in found.values()}
    # An offline save never moves `latest` once a numbered session exists; the current session's does.
    assert 20 == shardbook("show", f"{run}@latest", "--json").json["checkpoint"]["step"]
    assert ["model.w"] == [t["fqn"] for t in shardbook("tensors", f"{run}@20", "--json").json["tensors"]]


def test_sync_lists_news_in_the_order_of_steps(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """What the catalogue had is counted, and listed on request only; step-2 comes before step-10."""
    for step in (10, 2, 1):
        CheckpointDirectory(tmp_path / f"step-{step}").add_manifest(identity(step, run="order/run", session=0))
    first = shardbook("sync", str(tmp_path))
    assert ["step-1", "step-2", "step-10"] == [Path(row[2]).name for row in first.rows[1:4]]
    assert "3 recorded" == first.out.splitlines()[-1]
    assert "3 present\n" == shardbook("sync", str(tmp_path)).out
    assert ["present"] * 3 == [row[0] for row in shardbook("sync", str(tmp_path), "--all").rows[1:4]]
    attempts = shardbook("sync", str(tmp_path), "--json").json["attempts"]
    assert [1, 2, 10] == [attempt["step"] for attempt in attempts]


def test_sync_works_after_a_newer_session(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """History is recorded past the fence, without touching what the newer session did."""
    save(client, tmp_path / "10", 10, run="newer/run", incarnation=FIRST)
    left = identity(20, run="newer/run", session=1, incarnation=FIRST)
    CheckpointDirectory(tmp_path / "20").add_records(left)
    save(client, tmp_path / "15", 15, run="newer/run", incarnation=SECOND)
    with pytest.raises(SessionFencedError):
        register(client, left, tmp_path / "20")
    assert 0 == shardbook("sync", str(tmp_path / "20")).code
    assert 15 == shardbook("show", "newer/run@latest", "--json").json["checkpoint"]["step"]
    assert (1, True) == (
        shardbook("show", "newer/run@20", "--json").json["checkpoint"]["session"],
        shardbook("show", "newer/run@20", "--json").json["checkpoint"]["recovered"],
    )


def test_step_that_a_newer_session_saved_is_superseded(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """What the newer session committed stays; sync says so and is content."""
    start_session(client, "super/run", FIRST)
    CheckpointDirectory(tmp_path / "old").add_manifest(identity(20, run="super/run", session=1, incarnation=FIRST))
    save(client, tmp_path / "new", 20, run="super/run", incarnation=SECOND)
    ran = shardbook("sync", str(tmp_path), "--json")
    assert (0, ["superseded"]) == (ran.code, [attempt["outcome"] for attempt in ran.json["attempts"]])
    assert 2 == shardbook("show", "super/run@20", "--json").json["checkpoint"]["session"]


def test_attempt_that_stopped_between_registration_and_commit_is_completed(
    client: Client, shardbook: Shardbook, tmp_path: Path
) -> None:
    """The coordinator died before the commit: its directory is whole, so the attempt is."""
    session = start_session(client, "half/run", FIRST).session
    who = replace(identity(10, run="half/run", incarnation=FIRST), session=session)
    register(client, who, tmp_path, ranks=(0, 2))
    CheckpointDirectory(tmp_path).add_records(who)
    assert 0 == shardbook("sync", str(tmp_path)).code
    assert "COMMITTED" == shardbook("show", "half/run@10", "--json").json["checkpoint"]["state"]


def test_large_world_is_synced_in_parts(
    client: Client, shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts arrive with what they need and make one checkpoint."""
    monkeypatch.setattr("shardbook.recording._PART_BYTES", 5_000)
    who = identity(10, run="large/run", world_size=300)
    CheckpointDirectory(tmp_path).add_manifest(who)
    ran = shardbook("sync", str(tmp_path), "--json")
    assert (0, "recorded", "") == (ran.code, ran.json["attempts"][0]["outcome"], ran.json["attempts"][0]["message"])
    assert (300, 300) == (
        shardbook("show", "large/run@10", "--json").json["checkpoint"]["world_size"],
        shardbook("tensors", "large/run@10", "--json").json["tensors"][0]["chunk_count"],
    )
    assert list(manifest(who).segments) == [payload for _, payload in client.get_metadata("large/run@10").segments]


@pytest.mark.parametrize(
    "url",
    ["s3://key:secret@bucket/x", "sftp://me@host/x", "abfss://box@acct.example/x", "abfss://box:key@acct.example/x"],
)
def test_every_location_of_a_client_is_one_for_the_server(url: str) -> None:
    """What the client makes of a directory's URL is never refused; with its credentials it always is."""
    location = Stores().location_of(url)
    assert location == check_location(location, "location")
    if location != url:
        with pytest.raises(InvalidArgumentError):
            check_location(url, "location")


def test_command_is_installed(client: Client, tmp_path: Path) -> None:
    """The command of a fresh process talks to the server, exits by its code and writes no traceback."""
    save(client, tmp_path, 10, run="fresh/run", incarnation=THIRD)
    command = [sys.executable, "-m", "shardbook.cli", "ls", "fresh/run", "--server", client.target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)
    assert "fresh/run@10" in done.stdout
