"""Several servers over one Postgres, and jobs that save through them without a pause."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Final

from shardbook import Client
from shardbook.recording import attempt_key
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.client.directories import identity
from tests.behaviour.client.saves import register, start_session
from tests.faults.server import ServerProcess

#: Time that every call has: what a replica that goes away costs has to fit into it.
CALL_S: Final = 20.0
#: Ranks of a job.
WORLD_SIZE: Final = 4


class Replicas:
    """Servers over one database.

    Args:
        folder: Where they keep their logs.
        database_url: A migrated Postgres.
        count: How many.
        settings: Environment variables of all of them.

    Attributes:
        servers: Each of them.
    """

    def __init__(self, folder: Path, database_url: str, count: int, **settings: str) -> None:
        self.servers = [ServerProcess(folder / f"{at}", database_url, **settings) for at in range(count)]

    @property
    def address(self) -> str:
        """All of them, as a client names them."""
        return ",".join(server.address for server in self.servers)

    @property
    def clients(self) -> list[Client]:
        """Clients that may use any of them, each over a connection of its own; which replica it meets is chance."""
        addresses = [server.address for server in self.servers]
        return [Client(",".join(order), timeout_s=CALL_S) for order in permutations(addresses)]

    def client_of(self, at: int) -> Client:
        """A client of one of them."""
        return Client(self.servers[at].address, timeout_s=CALL_S)


@contextmanager
def running_replicas(folder: Path, database_url: str, count: int, **settings: str) -> Iterator[Replicas]:
    """Runs servers over one database until the block ends."""
    replicas = Replicas(folder, database_url, count, **settings)
    with ExitStack() as stack:
        for server in replicas.servers:
            stack.enter_context(server)
        yield replicas


class SavingJob:
    """A job that saves step after step in a thread of its own; its ranks use clients in turn.

    A call that fails within its deadline is a failure of the job.

    Args:
        clients: Clients that ranks take in turn.
        run: ``project/run``.
        folder: Where its files would be.
    """

    def __init__(self, clients: Sequence[Client], run: str, folder: Path) -> None:
        self._clients = clients
        self._run = run
        self._folder = folder
        self._incarnation = os.urandom(16)
        self._ended = threading.Event()
        self._saved = threading.Condition()
        self._thread = threading.Thread(target=self._save_on, name=f"job-{run}")
        #: Steps that were acknowledged as committed.
        self.committed: list[int] = []
        #: What went wrong; empty in a test that passes.
        self.failures: list[str] = []

    def __enter__(self) -> SavingJob:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(3 * CALL_S)
        assert not self._thread.is_alive(), "the job hangs"

    def await_saves(self, count: int) -> None:
        """Waits until so many further steps are committed."""
        with self._saved:
            target = len(self.committed) + count
            done = self._saved.wait_for(lambda: len(self.committed) >= target or self.failures, 3 * CALL_S)
        assert done, "no save for a long time"
        assert [] == self.failures, self.failures

    def _save_on(self) -> None:
        step = 0
        with ThreadPoolExecutor(WORLD_SIZE) as ranks:
            while not self._ended.is_set() and not self.failures:
                step += 1
                try:
                    self._save(step, ranks)
                except Exception as error:  # noqa: BLE001 - whatever it was, the test shows it
                    self.failures.append(f"step {step}: {type(error).__name__}: {error}")
                else:
                    self.committed.append(step)
                with self._saved:
                    self._saved.notify_all()

    def _save(self, step: int, ranks: ThreadPoolExecutor) -> None:
        session = start_session(self._clients[0], self._run, self._incarnation).session
        who = identity(step, run=self._run, incarnation=self._incarnation, world_size=WORLD_SIZE)
        who = replace(who, session=session)
        place = self._folder / f"step-{step}"
        done = [
            ranks.submit(register, self._clients[(step + rank) % len(self._clients)], who, place, [rank])
            for rank in range(WORLD_SIZE)
        ]
        request = pb.CommitCheckpointRequest(key=attempt_key(who))
        done[0].result()  # the coordinator's own
        # While the others still register: the commit waits for them on whatever replica it met.
        committer = self._clients[step % len(self._clients)]
        assert committer.commit_when_complete(request, timeout_s=CALL_S).checkpoint.live
        for one in done:
            one.result()
