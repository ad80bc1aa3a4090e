"""P1, P4: deletions whose server ends just before or just after the transaction, and whose client is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from shardbook import CheckpointState, Client
from shardbook.catalog import Checkpoint, FileDeletion
from shardbook.config import ClientConfig
from shardbook.core.names import RunName
from shardbook.deleting import delete_files
from shardbook.sync import sync_directories
from shardbook.v1 import retention_pb2 as pb
from shardbook.verifying import verify
from shardbook_server.failpoints import EXIT_CODE
from tests.behaviour.client.data_files import write_checkpoint
from tests.behaviour.client.directories import identity
from tests.behaviour.rpc.api import DEADLINE_S, Api
from tests.faults.server import ServerProcess

#: Deletes the files of a checkpoint, and is killed when some of them are gone.
_KILLED = """
import os, signal, sys
from shardbook import Client
from shardbook.config import ClientConfig
from shardbook.deleting import delete_files, removing
removing._BATCH = 2
def kill(done, total, unit):
    os.kill(os.getpid(), signal.SIGKILL)
client = Client(sys.argv[1])
client.delete_checkpoint(sys.argv[2], delete_files=True)
delete_files(sys.argv[2], client=client, config=ClientConfig(), progress=kill)
"""


def recorded(client: Client, folder: Path, run: str) -> list[Checkpoint]:
    """Steps 1 to 3 in a folder and in the catalogue, newest first."""
    for step in (1, 2, 3):
        write_checkpoint(folder / f"step-{step}", identity(step, run=run))
    assert 3 == len(list(sync_directories(client, [folder])))
    return list(client.list_checkpoints(run))


def crash(server: ServerProcess, api: Api, call: Callable[[], object], failpoints: str = "") -> None:
    """Makes a call that the server does not survive, and starts it again, to end elsewhere."""
    grpc.channel_ready_future(api.channel).result(timeout=DEADLINE_S)
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert grpc.StatusCode.UNAVAILABLE == error.code()
    assert EXIT_CODE == server.await_exit()
    server.start(failpoints)
    grpc.channel_ready_future(api.channel).result(timeout=DEADLINE_S)


@pytest.mark.soak_with("postgres")
def test_crashes_at_prune_and_at_the_files(server: ServerProcess, api: Api, run: str, tmp_path: Path) -> None:
    """Just before: nothing is deleted. Just after: all of it is, once, and the same again ends it."""
    _, second, first = recorded(server.client, tmp_path, run)
    server.restart("prune.before_db=exit")
    request = pb.PruneRequest(
        parent=f"{RunName.parse(run)}/parts/-",
        policy=pb.RetentionPolicy(keep_last=1),
        names=[first.name, second.name],
        delete_files=True,
    )

    def prune() -> pb.PruneResponse:
        answer: pb.PruneResponse = api.catalog.Prune(request, timeout=DEADLINE_S)
        return answer

    crash(server, api, prune, "prune.after_db=exit")
    assert CheckpointState.COMMITTED is server.client.get_checkpoint(first.name).state
    crash(server, api, prune, "files.before_db=exit")
    gone = server.client.get_checkpoint(first.name)
    assert (CheckpointState.DELETED, FileDeletion.BEGUN) == (gone.state, gone.file_deletion)
    begun = pb.RecordFileDeletionRequest(name=first.name)
    crash(server, api, lambda: api.catalog.RecordFileDeletion(begun, timeout=DEADLINE_S), "files.after_db=exit")
    done = pb.RecordFileDeletionRequest(name=first.name, done=True)
    crash(server, api, lambda: api.catalog.RecordFileDeletion(done, timeout=DEADLINE_S))
    assert [False, False] == [one.keep for one in prune().decisions]
    assert FileDeletion.DONE is server.client.get_checkpoint(first.name).file_deletion
    assert gone.delete_time == server.client.get_checkpoint(first.name).delete_time
    for one in (first, second):
        delete_files(one.name, client=server.client, config=ClientConfig())
    assert ["step-3"] == [path.name for path in tmp_path.iterdir()]
    assert verify(tmp_path / "step-3").is_ok


def test_a_client_that_is_killed_between_two_files(server: ServerProcess, run: str, tmp_path: Path) -> None:
    """The catalogue knows, the directory claims nothing, and the next one ends it."""
    *_, first = recorded(server.client, tmp_path, run)
    ended = subprocess.run([sys.executable, "-c", _KILLED, server.address, first.name], check=False, timeout=60)
    assert -signal.SIGKILL == ended.returncode
    assert FileDeletion.BEGUN is server.client.get_checkpoint(first.name).file_deletion
    assert [] == list(sync_directories(server.client, [tmp_path / "step-1"]))
    done = delete_files(first.name, client=server.client, config=ClientConfig())
    assert 0 < done.found_count < done.file_count
    assert not (tmp_path / "step-1").exists()
    assert FileDeletion.DONE is server.client.get_checkpoint(first.name).file_deletion
