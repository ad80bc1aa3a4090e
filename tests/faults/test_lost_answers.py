"""P4, rows 2 and 14: writes of the catalogue whose answer is lost, with the connection or with the server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardbook import CheckpointState, Client
from shardbook.core.lineage import LineageKind
from shardbook.errors import NotFoundError
from tests.faults.proxy import Fault, TcpProxy
from tests.faults.server import ServerProcess
from tests.faults.test_deletion import recorded

#: Deadline of a call that outlives its server, seconds.
_DEADLINE_S = 60.0


@contextmanager
def restarted_when_it_ends(server: ServerProcess) -> Iterator[None]:
    """Starts the server again as soon as it has ended, as what supervises it does."""

    def restart() -> None:
        server.await_exit()
        server.start()

    supervisor = threading.Thread(target=restart)
    supervisor.start()
    yield
    supervisor.join(_DEADLINE_S)
    assert not supervisor.is_alive()


@pytest.mark.parametrize("point", ["before", "after"])
def test_a_deletion_whose_server_ends_is_told_once(server: ServerProcess, run: str, tmp_path: Path, point: str) -> None:
    """Before or after the transaction: the caller learns which alias went with it, and nothing else is deleted."""
    newest, *_ = recorded(server.client, tmp_path, run)
    server.client.set_alias(f"{run}@golden", newest.name)
    server.restart(f"delete.{point}_db=exit")
    with restarted_when_it_ends(server):
        client = Client(server.address, outage_s=_DEADLINE_S)
        gone, aliases = client.delete_checkpoint(f"{run}@latest", force=True, deadline_s=_DEADLINE_S)
    assert (newest.name, CheckpointState.DELETED, ("golden",)) == (gone.name, gone.state, aliases)
    assert [2, 1] == [one.step for one in server.client.list_checkpoints(run)]


def test_answers_that_are_cut_off_are_answered_again(server: ServerProcess, run: str, tmp_path: Path) -> None:
    """What was removed is not taken for something that was never there."""
    newest, second, first = recorded(server.client, tmp_path, run)
    server.client.set_alias(f"{run}@golden", first.name)
    server.client.add_lineage(second.name, LineageKind.RESUMED_FROM, first.name)
    with TcpProxy(server.address) as proxy:
        client = Client(proxy.address)
        writes: tuple[Callable[[], bool | None], ...] = (
            lambda: client.delete_alias(f"{run}@golden"),
            lambda: client.remove_lineage(second.name, LineageKind.RESUMED_FROM, first.name),
        )
        for number, write in enumerate(writes, 1):
            assert newest.name == client.get_checkpoint(f"{run}@latest").name
            proxy.switch(Fault("cut-reply", 0, once=True))
            assert write() in (None, True)
            assert number == proxy.struck_count
    with pytest.raises(NotFoundError):
        server.client.delete_alias(f"{run}@golden")
    assert not server.client.remove_lineage(second.name, LineageKind.RESUMED_FROM, first.name)
