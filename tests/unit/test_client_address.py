"""Server addresses: what is one, what is not, and how a list becomes one target."""

from __future__ import annotations

import pytest

from shardbook._address import ServerAddress, target_of
from shardbook.client import Client
from shardbook.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("text", "hosts", "local"),
    [
        ("host:7420", ("host:7420",), False),
        (" a:1 , b:2 ", ("a:1", "b:2"), False),
        ("localhost:1", ("localhost:1",), True),
        ("127.0.0.1:1,[::1]:2", ("127.0.0.1:1", "[::1]:2"), True),
        ("unix:/run/shardbook.sock", ("unix:/run/shardbook.sock",), True),
        ("dns:///host:1", ("dns:///host:1",), False),
    ],
)
def test_address_is_parsed(text: str, hosts: tuple[str, ...], local: bool) -> None:
    """One address, several, IPv6 in brackets, sockets; loopback is known, so that no proxy gets in between."""
    address = ServerAddress.parse(text)
    assert (hosts, local) == (address.hosts, address.is_local)
    assert address == ServerAddress.parse(str(address))


@pytest.mark.parametrize(
    "text", ["", ",", "host", "host:", "host:0", "host:99999", "http://host:1", "a:1,b", "::1:5", "u:p@host:1", "h:1/x"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    """The message shows the form to write and repeats no password."""
    with pytest.raises(InvalidArgumentError, match="host:port") as caught:
        ServerAddress.parse(text)
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("host", "no port"),
        ("host:", "no port"),
        ("host:http", "not a number"),
        ("host:99999", "65535"),
        (":1", "no host"),
    ],
)
def test_what_is_wrong_with_an_address_is_named(text: str, why: str) -> None:
    """A port that is there and wrong is not called absent."""
    with pytest.raises(InvalidArgumentError, match=why):
        ServerAddress.parse(text)


def test_list_of_addresses_is_shuffled() -> None:
    """Clients spread over replicas: the first address is not everybody's first."""
    endpoints = frozenset({("10.0.0.1", 1), ("10.0.0.2", 2), ("10.0.0.3", 3)})
    targets = {target_of(endpoints) for _ in range(200)}
    assert 6 == len(targets)
    assert all(target.startswith("ipv4:10.0.0.") for target in targets)


def test_list_of_ipv6_addresses_has_brackets() -> None:
    """GRPC wants IPv6 in brackets."""
    assert "ipv6:[::1]:7" == target_of(frozenset({("::1", 7)}))


def test_names_in_a_list_are_looked_up() -> None:
    """A list may mix names and addresses; of a name's addresses IPv4 is taken where there is one."""
    assert frozenset({("127.0.0.1", 1), ("10.0.0.1", 2)}) == ServerAddress.parse("localhost:1,10.0.0.1:2").endpoints()


def test_client_without_any_address_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing configured: the error names the variable and the command that starts a server."""
    with pytest.raises(InvalidArgumentError, match=r"SHARDBOOK_SERVER.*shardbook-server serve") as caught:
        Client()
    assert "NO_SERVER" == caught.value.reason


def test_client_takes_address_and_token_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Client()` is enough where the environment says the rest."""
    monkeypatch.setenv("SHARDBOOK_SERVER", "a:1,b:2")
    monkeypatch.setenv("SHARDBOOK_TOKEN", "t")
    client = Client()
    assert ("a:1,b:2", "t") == (client.target, client._transport.token)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_timeout_must_be_a_time(timeout_s: float) -> None:
    """A deadline that is none is refused where it is given."""
    with pytest.raises(InvalidArgumentError):
        Client("a:1", timeout_s=timeout_s)
