"""Real ranks of one host that load the same: one asks for it, all are right."""

from __future__ import annotations

from pathlib import Path

from tests.torch import jobs
from tests.torch.harness import RankPool


def test_replicas_on_a_host_share_one_fetch(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Four evaluators that start at once; then the next checkpoint, and the first one again."""
    paths = [str(tmp_path / f"step-{step}") for step in (1, 2)]
    pool.run(jobs.save, "fsdp", paths, {"run": run, "server": server}, {}, world_size=4)
    environment = {"SHARDBOOK_SERVER": server, "SHARDBOOK_CACHE_DIR": str(tmp_path / "cache")}

    def load(step: int) -> list[list[bool]]:
        loaded = pool.run(jobs.load_counted, f"{run}@{step}", world_size=4, environment=environment)
        assert [[]] * 4 == [wrong for wrong, _ in loaded]
        return sorted(came for _, came in loaded)

    # Whoever came first asked at once; of the others' calls each said what the name means, and no more.
    assert [[False]] * 3 + [[True]] == load(1)
    assert [[False]] * 3 + [[False, True]] == load(2)
    assert [[False]] * 4 == load(1)


def test_a_broken_cache_is_no_reason_to_fail(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Its directory is a file; every rank asks for itself."""
    (tmp_path / "file").touch()
    environment = {"SHARDBOOK_SERVER": server, "SHARDBOOK_CACHE_DIR": str(tmp_path / "file")}
    pool.run(jobs.save, "fsdp", [str(tmp_path / "1")], {"run": run, "server": server}, {}, world_size=2)
    loaded = pool.run(jobs.load_counted, f"{run}@1", world_size=2, environment=environment)
    assert [([], [True])] * 2 == loaded
