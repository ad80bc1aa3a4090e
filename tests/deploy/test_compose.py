"""docker-compose.yml: valid, and in agreement with the Dockerfile and the settings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.dockerfile import read_stages
from tests.deploy.files import (
    COMPOSE,
    DOCKERFILE,
    ROOT,
    SERVER_VARIABLES,
    drain_s,
    is_server_command,
    literal_passwords,
    read_yaml,
    seconds,
    server_settings,
    version,
)

SERVICES: dict[str, Any] = read_yaml(COMPOSE)["services"]
REPLICAS = ("server-1", "server-2")
OURS = ("migrate", *REPLICAS)


def _check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_schema_of_the_compose_specification_is_met() -> None:
    """Rule: the file is valid by the official schema, which check-jsonschema ships."""
    done = _check_schema(COMPOSE)
    assert 0 == done.returncode, done.stdout


def test_schema_would_find_a_mistake(tmp_path: Path) -> None:
    """Rule: the check of the test above does check."""
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace_perod"))
    done = _check_schema(wrong)
    assert 1 == done.returncode
    assert "stop_grace_perod" in done.stdout


def test_the_order_is_database_schema_servers() -> None:
    """Rule: nothing migrates before the database answers, and nobody serves before the schema is there."""
    healthy, done = {"condition": "service_healthy"}, {"condition": "service_completed_successfully"}
    assert {"db": healthy} == SERVICES["migrate"]["depends_on"]
    for name in REPLICAS:
        assert {"db": healthy, "migrate": done} == SERVICES[name]["depends_on"]
    # A migration that is started again for ever would look like one that takes long.
    assert "no" == SERVICES["migrate"]["restart"]
    assert {"disable": True} == SERVICES["migrate"]["healthcheck"]


def test_database_is_healthy_only_over_tcp() -> None:
    """Rule: the socket answers already while the image sets a new database up, and then goes away."""
    test = SERVICES["db"]["healthcheck"]["test"]
    assert ["CMD", "pg_isready"] == test[:2]
    assert "--host=127.0.0.1" in test


def test_database_keeps_what_it_acknowledged() -> None:
    """Rule: fsync is on, data lies in a named volume, and stopping gives it time."""
    db = SERVICES["db"]
    assert "postgres:16" == db["image"]
    assert {"fsync=on", "full_page_writes=on", "synchronous_commit=on"} == set(db["command"][2::2])
    (volume,) = db["volumes"]
    name, _, folder = volume.partition(":")
    assert name in read_yaml(COMPOSE)["volumes"]
    assert "/var/lib/postgresql/data" == folder
    assert "ports" not in db
    assert seconds(db["stop_grace_period"]) >= 60


@pytest.mark.parametrize("name", OURS)
def test_commands_and_settings_exist(name: str) -> None:
    """Rule: each service runs a command of the image with settings that the server knows."""
    service = SERVICES[name]
    assert is_server_command(service["command"])
    assert set() == set(server_settings(service["environment"])) - SERVER_VARIABLES
    assert "entrypoint" not in service
    assert f":-shardbook-server:{version()}}}" in service["image"]
    arguments = {name for stage in read_stages(DOCKERFILE) for arg in stage.of("ARG") for name in arg.pairs}
    assert arguments == set(service["build"]["args"])


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_finish_before_they_are_killed(name: str) -> None:
    """Rule: the grace period has room for draining and for one last statement."""
    service = SERVICES[name]
    assert seconds(service["stop_grace_period"]) >= drain_s(service["environment"]) + 30


@pytest.mark.parametrize("name", OURS)
def test_services_have_no_rights_that_they_do_not_need(name: str) -> None:
    """Rule: read-only root, no capabilities, no way to get any."""
    service = SERVICES[name]
    assert (True, ["ALL"]) == (service["read_only"], service["cap_drop"])
    assert ["no-new-privileges:true"] == service["security_opt"]
    assert "user" not in service


def test_ports_are_published_to_this_machine_only() -> None:
    """Rule: gRPC and HTTP of every replica, on ports of their own, and the first line of help names them all."""
    published = [port.rsplit(":", 2) for name in REPLICAS for port in SERVICES[name]["ports"]]
    assert {"127.0.0.1"} == {host for host, _, _ in published}
    outside = [port for _, port, _ in published]
    assert len(outside) == len(set(outside))
    assert ["7070", "7071"] * 2 == [inside for _, _, inside in published]
    for name in REPLICAS:
        listens = {key: value for key, value in SERVICES[name]["environment"].items() if key.endswith("LISTEN")}
        assert {"SHARDBOOK_LISTEN": "0.0.0.0:7070", "SHARDBOOK_HTTP_LISTEN": "0.0.0.0:7071"} == listens
    servers = ",".join(f"{host}:{port}" for host, port, inside in published if inside == "7070")
    for page in (COMPOSE, ROOT / "deploy" / "README.md"):
        assert f"export SHARDBOOK_SERVER={servers}\n" in page.read_text()


def test_passwords_come_from_outside() -> None:
    """Rule: one variable, whose default says what it is for; URLs have no password; git takes no .env."""
    text = COMPOSE.read_text()
    assert [] == literal_passwords(text)
    for service in SERVICES.values():
        given = {value for name, value in service["environment"].items() if "PASSWORD" in name}
        assert {"${SHARDBOOK_DATABASE_PASSWORD:-local-use-only}"} == given
    assert "`local-use-only`" in (ROOT / "deploy" / "README.md").read_text()
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_example_names_every_variable() -> None:
    """Rule: .env.example has what the file takes from outside, and nothing else."""
    taken = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    named = set(re.findall(r"^#?(\w+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    assert taken == named


def test_it_is_meant_for_no_swarm() -> None:
    """Rule: replicas are services with addresses of their own, so nothing is scaled behind one port."""
    assert ["db", *OURS] == list(SERVICES)
    assert [] == [name for name, service in SERVICES.items() if "deploy" in service]
