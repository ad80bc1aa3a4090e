"""`shardbook rm --dry-run`: what would go, and what stands in its way."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from shardbook.client import Client
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.cli.test_cli_retention import recorded, steps

_numbers = itertools.count(1)


@pytest.fixture
def run() -> str:
    """A run that no other test writes."""
    return f"dry/run-{next(_numbers)}"


def test_it_says_what_would_go_and_what_would_stay(
    client: Client, shardbook: Shardbook, tmp_path: Path, run: str
) -> None:
    """Files go with --delete-files alone; aliases that people set go with the checkpoint."""
    first, _ = recorded(shardbook, tmp_path, run, 1, 2)
    shardbook("alias", "good", f"{run}@1")
    dry = shardbook("rm", f"{run}@1", "--dry-run")
    facts = f"6 files, 130 B in {first}"
    told = f"would delete {run}@1, and the aliases good"
    assert (0, f"{told}; its data would stay: {facts}\n", "") == (dry.code, dry.out, dry.err)
    dry = shardbook("rm", f"{run}@1", "--dry-run", "--delete-files")
    assert (0, f"{told}, with its data, {facts}") == (dry.code, dry.out.splitlines()[-1])
    assert [2, 1] == steps(shardbook, run)
    assert 0 == shardbook("rm", f"{run}@1").code
    dry = shardbook("rm", f"{run}@1", "--dry-run")
    assert (0, True) == (dry.code, "is deleted already; its data would stay" in dry.out)


def test_what_would_be_refused_is_said_and_exits_1(
    client: Client, shardbook: Shardbook, tmp_path: Path, run: str
) -> None:
    """As the deletion itself would be: @latest, a protected alias, a hold, another etag."""
    recorded(shardbook, tmp_path, run, 1, 2)

    def refused(*args: str) -> tuple[int, str]:
        ran = shardbook("rm", *args, "--dry-run")
        return ran.code, ran.err

    code, told = refused(f"{run}@latest")
    assert (1, True) == (code, "@latest means" in told), told
    assert 0 == refused(f"{run}@latest", "--force")[0]
    shardbook("alias", "golden", f"{run}@1", "--protect")
    code, told = refused(f"{run}@1")
    assert (1, True) == (code, "@golden means, which is protected" in told), told
    shardbook("hold", f"{run}@1", "--ttl", "2h", "--name", "eval")
    code, told = refused(f"{run}@1", "--force")
    assert (1, True) == (code, f"`shardbook release {run}@1 --name eval`" in told), told
    code, told = refused(f"{run}@1", "--force", "--etag", "another")
    assert (1, True) == (code, "was changed since" in told), told
    ran = shardbook("rm", f"{run}@1", "--dry-run", "--json")
    assert (1, ["golden"], 2) == (ran.code, ran.json["deleted_aliases"], len(ran.json["refusals"]))
