"""``shardbook lineage``, and what imports record; against the real server, on both databases."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from shardbook.client import Client
from shardbook.lineage import LineageKind
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.directories import CheckpointDirectory, identity
from tests.behaviour.client.saves import save

_numbers = itertools.count(1)


@pytest.fixture
def project(client: Client, tmp_path: Path) -> str:
    """A project of the test's own: a base run of two steps, and one that is fine-tuned of it."""
    name = f"lineage-{next(_numbers)}"
    for number, (run, steps) in enumerate((("base", (10, 20)), ("chat", (1, 2)))):
        for step in steps:
            incarnation = bytes([number + 1]) * 16
            save(client, tmp_path / run / str(step), step, run=f"{name}/{run}", incarnation=incarnation)
    return name


def be_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes standard output a terminal without colours."""
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "120"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)


def test_a_family_is_shown_as_a_tree(project: str, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways from the checkpoint; a way back to what was unfolded already is not followed again."""
    be_a_terminal(monkeypatch)
    base, chat = f"{project}/base", f"{project}/chat"
    for ref, kind, other in (
        (f"{base}@10", "resumed-from", "hub/7b"),
        (f"{base}@20", "resumed-from", f"{base}@10"),
        (f"{chat}@1", "fine-tuned-from", f"{base}@20"),
        (f"{chat}@1", "converted-from", f"{base}@10"),
        (f"{chat}@2", "resumed_from", f"{chat}@1"),
        (f"{chat}@1", "evaluated-by", "mmlu 5-shot"),
    ):
        ran = shardbook("lineage", ref, kind, other)
        assert (0, "") == (ran.code, ran.err)
    assert [
        f"{chat}@1",
        "├── comes from",
        f"│   ├── fine-tuned from {base}@20",
        f"│   │   └── resumed from {base}@10",
        "│   │       └── resumed from hub/7b",
        f"│   └── converted from {base}@10 (see there)",
        "└── came of it",
        f"    ├── resumed as {chat}@2",
        "    └── evaluated by mmlu 5-shot",
    ] == shardbook("lineage", f"{chat}@1").out.splitlines()
    up = shardbook("lineage", f"{chat}@1", "--up", "--depth", "1")
    assert f"{chat}@2" not in up.out
    assert "hub" not in up.out
    assert "There is more: --depth looks further" == up.out.splitlines()[-1]
    rows = shardbook("lineage", f"{base}@20", "--down", "--plain").rows
    assert ["WAY", "DEPTH", "CHECKPOINT", "KIND", "OF", "RECORDED"] == rows[0]
    assert ["down", "1", f"{chat}@1", "fine_tuned_from", f"{base}@20"] == rows[1][:5]
    assert {"1", "2"} == {row[1] for row in rows[1:]}


def test_json(project: str, client: Client, shardbook: Shardbook) -> None:
    """One object, and what a program sees is what the client returns."""
    words = ("lineage", f"{project}/chat@1", "fine_tuned_from", f"{project}/base@20")
    changed = shardbook(*words, "--json").json["lineage"]
    (edge,) = changed["ancestors"]
    assert ("fine_tuned_from", False, 1) == (edge["kind"], edge["told"], edge["depth"])
    found = shardbook("lineage", f"{project}/chat@1", "--json").json["lineage"]
    assert client.get_lineage(f"{project}/chat@1").to_json() == found
    assert [f"{project}/base@20"] == [one["object"]["ref"] for one in found["ancestors"]]
    assert ("COMMITTED", []) == (found["checkpoint"]["state"], found["descendants"])
    assert changed == found
    assert [] == shardbook(*words, "--remove", "--json").json["lineage"]["ancestors"]
    assert "there was no such edge\n" == shardbook(*words, "--remove").out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["base@10", "fine-tuned-from"], 2, "REF KIND OBJECT"),
        (["base@10", "made-of", "x"], 2, "resumed-from, fine-tuned-from"),
        (["base@10", "--remove"], 2, "--remove goes with"),
        (["base@10", "resumed-from", "x", "--up"], 2, "REF alone"),
        (["base@10", "resumed-from", "s3://key:secret@bucket/x"], 2, "password"),
        (["base@10", "resumed-from", "  "], 2, "name a checkpoint"),
        (["base"], 2, "is a run, not a checkpoint"),
        (["base@77"], 3, "shardbook ls"),
        (["base@10", "resumed-from", "base@77"], 3, "shardbook ls"),
        (["base@10", "resumed-from", "base@10"], 1, "the same checkpoint"),
        (["base@10", "resumed-from", "chat@2"], 1, "--up` shows how"),
    ],
)
def test_what_is_refused(project: str, shardbook: Shardbook, words: list[str], code: int, told: str) -> None:
    """Usage, what is not there, and cycles: each with what to do."""
    assert 0 == shardbook("lineage", f"{project}/chat@2", "fine-tuned-from", f"{project}/base@10").code
    words = [f"{project}/{word}" if word.startswith(("base", "chat")) else word for word in words]
    ran = shardbook("lineage", *words)
    assert code == ran.code, ran.err
    assert told in ran.err
    assert "secret" not in ran.err


def test_a_checkpoint_without_edges_says_what_to_do(
    project: str, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is an answer too."""
    be_a_terminal(monkeypatch)
    out = shardbook("lineage", f"{project}/base@20").out.splitlines()
    assert f"{project}/base@20" == out[0]
    assert "shardbook lineage" in out[1]


@pytest.mark.parametrize("way", [(), ("--up",), ("--plain",)])
def test_so_does_a_table_without_rows(client: Client, project: str, shardbook: Shardbook, way: tuple[str, ...]) -> None:
    """Below its header."""
    header, told = shardbook("lineage", f"{project}/base@20", *way).out.splitlines()
    assert header.startswith("WAY")
    assert told.startswith("Nothing is recorded")
    assert f"`shardbook lineage {project}/base@20 fine-tuned-from REF`" in told


class TestImports:
    """What is recorded in another run comes from what it was."""

    def test_of_another_run(self, client: Client, shardbook: Shardbook, project: str, tmp_path: Path) -> None:
        """From that run's checkpoint where the catalogue has it, else from its name; twice is once."""
        known = CheckpointDirectory(tmp_path / "in")
        known.add_manifest(identity(10, run=f"{project}/base", incarnation=b"\1" * 16))
        for _ in range(2):
            assert 0 == shardbook("import", str(tmp_path / "in"), "--run", f"{project}/copy").code
        (edge,) = client.list_lineage(f"{project}/copy@10")
        assert (LineageKind.CONVERTED_FROM.label, True) == (edge.kind, edge.told)
        assert edge.object.ref.startswith(f"{project}/base@10")

    def test_as_told(self, client: Client, shardbook: Shardbook, project: str, tmp_path: Path) -> None:
        """`--converted-from` counts for all of them; what cannot be kept is refused before anything is read."""
        CheckpointDirectory(tmp_path / "in").add_manifest(identity(10, run=f"{project}/copy"))
        words = ("import", str(tmp_path / "in"), "--run", f"{project}/copy", "--converted-from")
        assert 2 == shardbook(*words, "s3://key:secret@bucket").code
        for slip in (f"{project}/base@nope", f"projects/{project}/runs/base/parts/default/checkpoints/77"):
            assert [3, 3] == [shardbook(*words, slip).code, shardbook(*words, slip, "--dry-run").code]
        assert 0 == shardbook(*words, f"{project}/base@20").code
        (edge,) = client.list_lineage(f"{project}/copy@10")
        assert f"{project}/base@20" == edge.object.ref
