"""`shardbook status` against a server whose saves are stuck at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardbook.cli.durations import parse, told
from shardbook.client import Client
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.structure import BlobKind
from shardbook.recording import attempt_key
from shardbook.v1 import catalog_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import BLOB_KIND_PLAN, BLOB_KIND_TABLE, AttemptLocation, Blob
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.directories import identity, record
from tests.behaviour.client.saves import register, save, start_session
from tests.behaviour.client.scripted import scripted_server

WHO = b"1" * 16


def plan(client: Client, who: AttemptIdentity, location: Path, *ranks: int) -> None:
    """Submits plans of ranks."""
    for rank in ranks:
        one = record(who, rank)
        held = {blob.kind: blob for blob in one.blobs}
        client.plan_save(
            pb.PlanSaveRequest(
                key=attempt_key(who),
                location=AttemptLocation(location=str(location), prefix=who.prefix),
                rank=rank,
                plan_digest=held[BlobKind.PLAN].digest,
                blobs=[
                    Blob(kind=BLOB_KIND_TABLE, payload=held[BlobKind.TABLE].payload),
                    Blob(kind=BLOB_KIND_PLAN, payload=held[BlobKind.PLAN].payload),
                ],
                host=f"gpu-{rank // 2}",
            )
        )


def test_a_stuck_save_says_who_is_missing(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """From the first plan to the commit: phase, ranks with hosts, and what to look at."""
    save(client, tmp_path / "5", 5, run="stuck/run", incarnation=WHO)
    session = start_session(client, "stuck/run", WHO).session
    who = identity(10, run="stuck/run", session=session, incarnation=WHO)
    plan(client, who, tmp_path, 0, 2)
    told_ = shardbook("status", "stuck/run")
    assert (0, "") == (told_.code, told_.err)
    assert "stuck/run@10.s1.a1: planning, began " in told_.out
    assert ["no plan of", "1,3"] in told_.rows
    [attempt] = shardbook("status", "stuck/run", "--json").json["status"]["parts"][0]["open"]
    assert ("planning", 2, [1, 3], None) == tuple(
        attempt[name] for name in ("phase", "planned_count", "unplanned", "write_s")
    )
    plan(client, who, tmp_path, 1, 3)
    register(client, who, tmp_path, ranks=(0, 3))
    rows = shardbook("status", "stuck/run").rows
    assert ["there", "0 on gpu-0; 3 on gpu-1"] in rows
    assert ["missing", "1 on gpu-0; 2 on gpu-1"] in rows
    [attempt] = shardbook("status", "stuck/run:default", "--json").json["status"]["parts"][0]["open"]
    assert ("writing", 2, 2) == tuple(attempt[name] for name in ("phase", "registered_count", "missing_count"))
    assert [("gpu-0", 1, "1"), ("gpu-1", 1, "2")] == [tuple(one.values()) for one in attempt["missing_hosts"]]
    client.set_alias("stuck/run@good", "stuck/run@5", protected=True)
    ran = shardbook("status", "stuck/run")
    assert ["alias", "@good: stuck/run@5, protected"] in ran.rows
    assert ["alias", "@latest: stuck/run@5"] in ran.rows
    register(client, who, tmp_path, ranks=(1, 2))
    assert "stuck/run@10.s1.a1: committing" in shardbook("status", "stuck/run").out
    client.commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(who)), timeout_s=10)
    out = shardbook("status", "stuck/run").out
    assert "stuck/run@10, " in out
    assert ["open", "nothing"] in shardbook("status", "stuck/run").rows


@pytest.mark.parametrize(
    ("known", "told_"),
    [
        ({}, "session 6"),
        ({"host": "gpu-1"}, "session 6, on gpu-1"),
        ({"user": "ada", "job_id": "4711"}, "session 6, ada, job 4711"),
        ({"user": "ada", "host": "gpu-1", "job_id": "4711"}, "session 6, ada on gpu-1, job 4711"),
    ],
    ids=["nothing", "host", "user-and-job", "all"],
)
def test_what_is_not_known_of_the_writer_is_left_out(
    known: dict[str, Any], told_: str, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: no dash stands for a user, a host or a job."""
    part = types_pb2.RunPart(part="default", session=6, **known)
    answer = pb.GetRunStatusResponse(parts=[pb.PartStatus(part=part)])
    with scripted_server(
        GetRunStatus=lambda *_: answer, ListAliases=lambda *_: catalog_pb2.ListAliasesResponse()
    ) as server:
        monkeypatch.setenv("SHARDBOOK_SERVER", server.target)
        assert ["writer", told_] in shardbook("status", "llm/8b").rows


def test_a_stuck_save_of_thousands_is_a_few_lines(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """Rule: ranges by host, ten hosts, and how many more; what is not known is told without a host."""
    session = start_session(client, "stuck/large", WHO).session
    who = identity(10, run="stuck/large", session=session, incarnation=WHO, world_size=16_384)
    register(client, who, tmp_path, ranks=(7,))
    rows = shardbook("status", "stuck/large").rows
    assert ["missing", "0-6,8-16383"] in rows
    plan(client, who, tmp_path, *range(0, 40, 2))
    [told_] = [
        row[1] for row in shardbook("status", "stuck/large").rows if row[0] == "no plan of" or row[0] == "missing"
    ]
    assert told_.startswith("0 on gpu-0; 1,3,5,9,")
    assert len(told_) < 400
    assert told_.endswith("; and 11 more on 11 hosts")


def test_max_age_answers_for_an_alarm(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """Rule: 1 when the last commit of a part is older, or there is none; 0 when all are fresh."""
    save(client, tmp_path, 5, run="alarm/run", incarnation=WHO)
    assert 0 == shardbook("status", "alarm/run", "--max-age", "1d").code
    late = shardbook("status", "alarm/run", "--max-age", "0.0001s")
    assert (1, "alarm/run: no commit within 0.0s") == (late.code, late.out.splitlines()[-1])
    start_session(client, "alarm/none", WHO)
    none = shardbook("status", "alarm/none", "--max-age", "1d", "--json")
    assert (1, ["default"], None) == (none.code, none.json["stale"], none.json["status"]["parts"][0]["last_commit"])
    assert 0 == shardbook("status", "alarm/none").code


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("status", "alarm/nothing"), 3, "shardbook runs"),
        (("status", "alarm/run@5"), 2, "shardbook show alarm/run@5"),
        (("status", "alarm/run", "--max-age", "soon"), 2, "write 90s, 30m, 2h or 1d12h"),
    ],
    ids=["absent", "checkpoint", "duration"],
)
def test_mistakes_are_answered_with_what_to_type(
    args: tuple[str, ...], code: int, said: str, client: Client, shardbook: Shardbook
) -> None:
    """Rule: the exit code says which kind, the message what to do."""
    ran = shardbook(*args)
    assert code == ran.code
    assert said in ran.err.replace("\n", " ")


@pytest.mark.parametrize("words", [("tensors",), ("cat",), ("hold", "--ttl", "1h"), ("rm",), ("rm", "--dry-run")])
def test_what_is_not_committed_yet_names_the_command_that_shows_it(
    client: Client, shardbook: Shardbook, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Exit 1, and how far the save is."""
    run = f"open/{'-'.join(words).replace('--', '')}"
    session = start_session(client, run, WHO).session
    plan(client, identity(10, run=run, session=session, incarnation=WHO), tmp_path, 0)
    command, *options = words
    ran = shardbook(command, f"{run}@10.s1.a1", *(["w"] if command == "cat" else []), *options)
    assert (1, True) == (ran.code, "OPEN" in ran.err), ran.err
    assert "try: `shardbook status PROJECT/RUN`" in ran.err


def test_durations_are_read_and_told() -> None:
    """Rule: what is told can be read, and means the same, but for what is cut off."""
    cases = {"90s": 90, "30m": 1800, "2h": 7200, "1d12h": 129_600, "0.5s": 0.5, "1h30m": 5400}
    assert list(cases.values()) == [parse(text) for text in cases]
    for text in ("", "2", "h", "2h1d", "-1h", "1e400d", "9" * 400 + "s"):
        with pytest.raises(ValueError, match="no duration"):
            parse(text)
    told_ = {0.04: "0.0s", 1.44: "1.4s", 65: "1m 5s", 3600: "1h", 3 * 3600 + 20 * 60 + 9: "3h 20m", 349_200: "4d 1h"}
    assert list(told_.values()) == [told(seconds) for seconds in told_]
