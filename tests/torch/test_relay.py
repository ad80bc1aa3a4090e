"""Real ranks through a relay: what they save is committed and loads, and no rank talks to the server itself."""

from __future__ import annotations

from pathlib import Path

from shardbook import Client
from shardbook.dcp import SaveState
from shardbook_server.connections import count_connections
from tests.relays import RelayProcess
from tests.torch import jobs
from tests.torch.harness import RankPool


def test_ranks_save_and_load_through_a_relay(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """A first save, one that the server knows, an async one, and loads by ref: as without a relay, no collective."""
    paths = [str(tmp_path / f"step-{step}") for step in (1, 2, 3)]
    before = count_connections(server)
    with RelayProcess(server) as relay:
        start = {"run": run, "server": relay.address}
        saved = pool.run(jobs.save, "fsdp", paths, start, {}, world_size=4)
        assert [[]] * 4 == [one.noticed for one in saved]
        assert [[SaveState.COMMITTED] * 3] * 4 == [[result.state for result in one.results] for one in saved]
        # The relay's.
        assert before is not None
        assert count_connections(server) == before + 1
        refs = [f"{run}@{step}" for step in (1, 2, 3)]
        environment = {"SHARDBOOK_SERVER": relay.address}
        loaded = pool.run(jobs.load, "fsdp", refs, world_size=4, environment=environment)
        assert [{ref: [] for ref in refs}] * 4 == loaded
    assert [3, 2, 1] == [one.step for one in Client(server).list_checkpoints(run)]
