"""Finding, describing and naming checkpoints by command, against the real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardbook.client import Client
from shardbook.core.description import pack_said
from shardbook.errors import FailedPreconditionError, InvalidArgumentError
from shardbook.recording import attempt_key, description_of
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.directories import identity
from tests.behaviour.client.saves import register, save, start_session


@pytest.fixture
def runs(client: Client, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A project of the test's own with two runs, whose steps have a loss."""
    project: str = request.node.name.partition("[")[0].replace("_", "-")[:100]
    for number, name in enumerate(("8b-a", "8b-b", "70b")):
        incarnation = bytes([number + 1]) * 16
        session = start_session(client, f"{project}/{name}", incarnation).session
        for step in (10, 20):
            who = identity(step, run=f"{project}/{name}", incarnation=incarnation)
            who = type(who)(**{**vars(who), "session": session})
            register(client, who, tmp_path / name / f"step-{step}")
            said = pack_said({"size": name.partition("-")[0]}, {"loss": number + step / 100}, "", {"host": "node-3"})
            client.commit_when_complete(
                pb.CommitCheckpointRequest(key=attempt_key(who), description=description_of(said)), timeout_s=20
            )
    return project


def refs(shardbook: Shardbook, *args: str) -> list[str]:
    """What a listing shows, in its order."""
    ran = shardbook("ls", *args, "--json")
    assert (0, "") == (ran.code, ran.err)
    return [one["ref"] for one in ran.json["checkpoints"]]


def test_the_best_of_all_runs_is_one_command(runs: str, shardbook: Shardbook) -> None:
    """By pattern, in the order of a metric, which gets a column."""
    assert [f"{runs}/8b-a@10"] == refs(shardbook, f"{runs}/*", "--order-by", "metrics.loss", "--limit", "1")
    worst = ["70b@20", "70b@10", "8b-b@20", "8b-b@10", "8b-a@20", "8b-a@10"]
    assert [f"{runs}/{one}" for one in worst] == refs(shardbook, f"{runs}/*", "-o", "metrics.loss desc")
    assert [f"{runs}/8b-b@20", f"{runs}/8b-a@20"] == refs(shardbook, f"{runs}/8b-*", "-f", "step = 20")
    assert [f"{runs}/70b@20"] == refs(shardbook, "*/*0b", "-f", f"project = {runs} AND step > 10")
    assert [f"{runs}/70b@10"] == refs(shardbook, f"{runs}/70b", "-f", "labels.size:70 AND metrics.loss < 2.15")
    assert [] == refs(shardbook, f"{runs}/*:optim")
    table = shardbook("ls", f"{runs}/8b-*", "--order-by", "metrics.loss, labels.size", "-n", "1")
    assert ["STEP", "STATE", "REF", "ALIASES", "loss", "size", "WORLD"] == table.rows[0][:7]
    assert ["10", "committed", f"{runs}/8b-a@10", "-", "0.1", "8b", "4"] == table.rows[1][:7]


def test_a_filter_that_cannot_be_read_is_a_usage_error(runs: str, shardbook: Shardbook) -> None:
    """Exit 2, with the place; the same for an order and a pattern."""
    ran = shardbook("ls", f"{runs}/8b-*", "--filter", "step >> 1")
    assert (2, "error: character 7 of the filter: '>' is not expected here\n") == (ran.code, ran.err)
    assert 2 == shardbook("ls", f"{runs}/*", "--order-by", "color").code
    assert 2 == shardbook("ls", "a b/*").code
    assert "--all` shows" in shardbook("ls", f"{runs}/*", "-f", "step = 77").out


def test_what_was_changed_since_is_not_changed(runs: str, shardbook: Shardbook) -> None:
    """With the etag that --json showed: exit 1, and it is as the other left it; with the new one it goes through."""
    ref, run = f"{runs}/8b-a@10", f"{runs}/8b-a"

    def of(*args: str, kind: str = "checkpoint") -> str:
        ran = shardbook(*args, "--json")
        assert (0, "") == (ran.code, ran.err)
        found = ran.json[kind]
        etag: str = (found[0] if isinstance(found, list) else found)["etag"]
        return etag

    first = of("show", ref)
    second = of("label", ref, "stage=eval", "--etag", first)
    for change in (("label", ref, "stage=x"), ("metric", ref, "loss=9"), ("note", ref, "x"), ("rm", ref)):
        ran = shardbook(*change, "--etag", first)
        assert (1, True) == (ran.code, "was changed since it was read: read it again, then decide again\n" in ran.err)
    assert second == of("show", ref)
    made = of("alias", "golden", ref, kind="aliases")
    moved = of("alias", "golden", f"{run}@20", "--etag", made, kind="aliases")
    assert 1 == shardbook("alias", "golden", ref, "--etag", made).code
    assert 1 == shardbook("alias", "golden", run, "--metric", "loss", "--min", "--etag", made).code
    assert 1 == shardbook("alias", "golden", run, "--delete", "--etag", made).code
    assert 0 == shardbook("alias", "golden", run, "--delete", "--etag", moved).code
    assert 0 == shardbook("rm", ref, "--etag", second).code


def test_labels_metrics_and_notes(runs: str, shardbook: Shardbook) -> None:
    """Set, shown, removed; `show` tells all of it."""
    ref = f"{runs}/8b-a@20"
    assert [["owner", "ada"], ["size", "8b"], ["stage", "eval=1"]] == shardbook(
        "label", ref, "stage=eval=1", "owner=ada"
    ).rows
    assert {"size": "8b", "owner": "ada"} == shardbook("label", ref, "--remove", "stage", "--json").json["checkpoint"][
        "labels"
    ]
    assert [["loss", "0.2"], ["mmlu", "0.625"]] == shardbook("metric", ref, "mmlu=0.625").rows
    assert "before the rate was halved\n" == shardbook("note", ref, "before the rate was halved").out
    shown = shardbook("show", ref).out
    for fact in ("label owner", "metric mmlu", "0.625", "before the rate", "on node-3", "aliases", "commit time"):
        assert fact in shown
    ran = shardbook("note", ref, "--value", '{"shots": 5}', "--json")
    assert {"shots": 5} == ran.json["checkpoint"]["note"]
    assert '{"shots": 5}\n' == shardbook("note", ref).out
    assert "no note" in shardbook("note", ref, "--clear").out
    assert "no metrics" in shardbook("metric", ref, "--remove", "mmlu", "--remove", "loss").out
    checkpoint = shardbook("show", ref, "--json").json["checkpoint"]
    assert ({}, None, "node-3") == (checkpoint["metrics"], checkpoint["note"], checkpoint["writer"]["host"])


@pytest.mark.parametrize(
    "args",
    [
        ("label", "REF", "novalue"),
        ("label", "REF", "a b=c"),
        ("label", "REF", "a=1", "a=2"),
        ("metric", "REF", "loss=low"),
        ("metric", "REF", "loss=nan"),
        ("note", "REF", "text", "--clear"),
        ("note", "REF", "--value", "{"),
        ("note", "REF", "--value", ""),
        ("note", "REF", ""),
        ("alias", "RUN", "--delete"),
        ("alias", "RUN", "--protect"),
        ("alias", "RUN", "--no-protect"),
        ("alias", "RUN", "--metric", "loss"),
        ("alias", "RUN", "--min"),
        ("alias", "RUN", "--max"),
        ("alias", "RUN", "--force"),
        ("alias", "RUN", "--etag", "a"),
        ("alias", "1500", "REF"),
        ("alias", "latest", "REF"),
        ("alias", "best", "RUN", "--metric", "loss"),
        ("alias", "best", "RUN", "--metric", "loss", "--min", "--max"),
        ("alias", "best", "REF", "--min"),
        ("alias", "a", "b", "c"),
    ],
)
def test_usage_errors(client: Client, shardbook: Shardbook, args: tuple[str, ...]) -> None:
    """Exit 2, and nothing is asked of the server that it would refuse."""
    told = {"REF": "llm/8b@1", "RUN": "llm/8b"}
    ran = shardbook(*(told.get(arg, arg) for arg in args))
    assert 2 == ran.code, ran.err
    assert "" == ran.out


def test_usage_errors_name_what_is_missing(client: Client, shardbook: Shardbook) -> None:
    """The word, or the option that does it."""
    assert "NAME is missing" in shardbook("alias", "llm/8b", "--delete").err
    assert "--clear removes the note" in shardbook("note", "llm/8b@1", "").err


def test_a_moved_alias_stays_protected_unless_told_otherwise(runs: str, shardbook: Shardbook) -> None:
    """--force moves it, --no-protect takes the protection away; a new one has none."""
    run = f"{runs}/8b-a"

    def protected(*args: str) -> bool:
        ran = shardbook("alias", "prod", *args, "--json")
        assert 0 == ran.code, ran.err
        is_so: bool = ran.json["aliases"][0]["protected"]
        return is_so

    assert not protected(f"{run}@10")
    assert protected(f"{run}@10", "--protect")
    assert protected(f"{run}@20", "--force")
    assert 1 == shardbook("alias", "prod", f"{run}@10").code
    assert not protected(f"{run}@20", "--force", "--no-protect")
    assert not protected(f"{run}@10")


def test_an_etag_needs_no_quotes_and_another_one_names_the_next_command(runs: str, shardbook: Shardbook) -> None:
    """A shell takes the quotes away that belong to it."""
    ref = f"{runs}/8b-a@10"
    etag = shardbook("show", ref, "--json").json["checkpoint"]["etag"]
    assert 0 == shardbook("label", ref, "stage=eval", "--etag", etag.strip('"')).code
    ran = shardbook("label", ref, "stage=x", "--etag", etag.strip('"'))
    assert 1 == ran.code
    assert "try: `shardbook show REF --json`" in ran.err
    assert "`shardbook alias RUN --json`" in ran.err


def test_numbers_are_shown_as_they_are(runs: str, shardbook: Shardbook) -> None:
    """Short where that says all of it."""
    ref = f"{runs}/8b-a@20"
    given = {"a": "123456789012", "b": "1.8734567891", "c": "1e-05", "d": "2.50"}
    rows = shardbook("metric", ref, *(f"{name}={value}" for name, value in given.items())).rows
    shown = {"a": "123456789012", "b": "1.8734567891", "c": "1e-05", "d": "2.5", "loss": "0.2"}
    assert shown == {row[0]: row[1] for row in rows}
    out = shardbook("show", ref).rows
    assert shown == {row[0].removeprefix("metric "): row[1] for row in out if row[0].startswith("metric ")}


def test_aliases(runs: str, shardbook: Shardbook) -> None:
    """By hand and by metric; protected ones need --force; each resolves as a ref."""
    run = f"{runs}/8b-a"
    assert [f"{run}@best", f"{run}@10", "min loss", "no"] == shardbook(
        "alias", "best", "--metric", "loss", "--min", run
    ).rows[1][:4]
    shardbook("metric", f"{run}@20", "loss=0.01")
    assert f"{run}@20" == shardbook("show", f"{run}@best", "--json").json["checkpoint"]["ref"]
    assert "yes" == shardbook("alias", "golden", f"{run}@10", "--protect").rows[1][3]
    refused = shardbook("alias", "golden", f"{run}@20")
    assert 1 == refused.code
    assert "--force" in refused.err
    assert 1 == shardbook("alias", "golden", run, "--delete").code
    listed = shardbook("alias", run, "--json").json["aliases"]
    assert [("best", False), ("golden", True), ("latest", False)] == [
        (one["ref"].partition("@")[2], one["protected"]) for one in listed
    ]
    assert ["best, latest", "golden"] == [row[3] for row in shardbook("ls", run).rows[1:]]
    assert [["20"], ["10"], ["20"]] == [row[1].split("@")[1:] for row in shardbook("alias", run).rows[1:]]
    assert [["20.s1.a1"], ["10.s1.a1"], ["20.s1.a1"]] == [one["checkpoint_ref"].split("@")[1:] for one in listed]
    assert 0 == shardbook("alias", "golden", run, "--delete", "--force").code
    gone = shardbook("show", f"{run}@golden")
    assert 3 == gone.code
    assert f"shardbook alias {run}" in gone.err


def test_projects(runs: str, shardbook: Shardbook) -> None:
    """By name, with their runs."""
    assert [runs, "3"] in shardbook("projects").rows
    assert {"name": f"projects/{runs}", "ref": runs, "run_count": 3} in shardbook("projects", "--json").json["projects"]


def test_ranks_are_shown_when_asked_for(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """What each took and wrote."""
    save(client, tmp_path, 1, run="ranks/run", incarnation=b"7" * 16)
    ran = shardbook("show", "ranks/run@1", "--ranks", "--json")
    assert [24, 24, 24, 24] == [one["size_bytes"] for one in ran.json["ranks"]]
    assert ["3", "24 B", "0.000", "0.000", "0.000"] == shardbook("show", "ranks/run@1", "--ranks").rows[-1]


def test_the_client_says_the_same(client: Client, runs: str) -> None:
    """The library's own calls, with values for texts."""
    ref = f"{runs}/70b@10"
    changed = client.update_checkpoint(ref, labels={"a": "b", "size": None}, metrics={"x": 1}, note=[1, None])
    assert ({"a": "b"}, 1.0, [1, None]) == (dict(changed.labels), changed.metrics["x"], changed.note)
    assert changed == client.get_checkpoint(ref)
    assert json.loads(json.dumps(changed.to_json()))["note"] == [1, None]
    assert client.update_checkpoint(ref, note=None).note is None
    with pytest.raises(InvalidArgumentError):
        client.update_checkpoint(ref)
    alias = client.set_alias(f"{runs}/70b@keep", ref, protected=True)
    assert (f"{runs}/70b@10.s1.a1", True) == (alias.checkpoint_ref, alias.protected)
    with pytest.raises(FailedPreconditionError):
        client.delete_alias(alias.ref)
    client.delete_alias(alias.name, force=True)
    assert ["latest"] == [one.ref.partition("@")[2] for one in client.list_aliases(f"{runs}/70b")]
    found = client.list_checkpoints(f"{runs}/*", filter='labels.a = "b"', order_by="step")
    assert [ref] == [one.ref for one in found]
