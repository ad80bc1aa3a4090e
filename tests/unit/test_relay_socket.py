"""Where a relay listens: an address that is its user's alone."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardbook._address import ServerAddress
from shardbook.errors import InvalidArgumentError, UnavailableError
from shardbook.relay.listening import default_address, make_room, socket_path
from shardbook.relay.service import Relay


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of this user's, with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="relay-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("address", ["unix:/run/user/7/r.sock", "unix:///run/user/7/r.sock"])
def test_both_spellings_are_one_socket(address: str) -> None:
    """Rule: what gRPC takes for a socket's address the relay does; clients take it, too."""
    assert Path("/run/user/7/r.sock") == socket_path(address)
    assert ServerAddress.parse(address).is_local


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:7070", "unix:", "unix:r.sock", "unix://host/r.sock", "unix:/folder/", f"unix:/{'x' * 107}", ""],
)
def test_other_addresses_are_refused(address: str) -> None:
    """Rule: a relay is for the ranks of one user on one host; the error names the option."""
    with pytest.raises(InvalidArgumentError) as refused:
        socket_path(address)
    assert ["listen"] == [violation.field for violation in refused.value.violations]


def test_the_default_is_the_users_own() -> None:
    """Rule: in the folder that the system made for the user, else in one that has the user's number."""
    assert "unix:///run/user/7/shardbook/relay.sock" == default_address({"XDG_RUNTIME_DIR": "/run/user/7"})
    assert f"shardbook-{os.getuid()}/relay.sock" in default_address({})


def test_a_relay_is_not_its_own_server() -> None:
    """Rule: SHARDBOOK_SERVER may still name the relay where the relay is started."""
    with pytest.raises(InvalidArgumentError, match="own address"):
        Relay("unix:/tmp/r.sock", "unix:///tmp/r.sock")


def test_the_folder_is_made_for_the_user_alone(folder: Path) -> None:
    """Rule: nobody else may put a socket in its place, and be sent tokens."""
    path = folder / "shardbook" / "relay.sock"
    make_room(path)
    assert 0o700 == path.parent.stat().st_mode & 0o777
    path.parent.chmod(0o777)
    with pytest.raises(UnavailableError, match="others may write"):
        make_room(path)
    path.parent.chmod(0o1777)
    make_room(path)


def test_only_a_socket_that_nobody_listens_on_is_removed(folder: Path) -> None:
    """Rule: a file, and a relay that works, stay; what a killed relay left goes."""
    path = folder / "relay.sock"
    path.write_text("data")
    with pytest.raises(UnavailableError, match="something else is there"):
        make_room(path)
    assert "data" == path.read_text()
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(UnavailableError, match="another relay answers"):
            make_room(path)
        assert path.is_socket()
    make_room(path)
    assert not path.exists()
