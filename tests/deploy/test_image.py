"""What the Dockerfile's steps make, run as Compose and Kubernetes would: by a user without rights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.dockerfile import read_stages
from tests.deploy.files import COMPOSE, DOCKERFILE, ROOT, read_yaml, version
from tests.deploy.image import Machine
from tests.postgres import Postgres, as_user, unprivileged_user

# Packages come over the network where pip has none of them yet.
pytestmark = pytest.mark.timeout(600)

FINAL = read_stages(DOCKERFILE)[-1]
#: A server is up, or down, within this, seconds.
SOON_S = 30.0


@cache
def _python(user: str | None) -> str:
    """A Python of this machine that ``user`` may run too: root's own is often below /root."""
    own = os.path.realpath(sys.executable)
    candidates = [own, *map(str, sorted(Path("/usr/bin").glob("python3.1[1-9]"), reverse=True))]
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    for path in candidates:
        with suppress(PermissionError):
            if subprocess.run([*as_user(user), path, "-I", "-c", code], cwd="/", check=False).returncode == 0:
                return path
    pytest.fail(f"user {user} can run none of {candidates}: run the tests as a user, or install Python for everybody")


class Image:
    """The environment that the steps made, and how its commands are run.

    Attributes:
        machine: Where it was made.
        environment: What ENV says, and nothing of this process.
    """

    def __init__(self, folder: Path) -> None:
        self.user = unprivileged_user()
        self.machine = Machine(folder, _python(self.user))
        self.machine.build(read_stages(DOCKERFILE))
        names = FINAL.environment
        self.environment = {name: self.machine.environment[name] for name in names}
        # The step that makes the user is not carried out, its folder's is: somebody's who is not root.
        self.home = Path(self.environment["HOME"])
        if self.user is not None:
            shutil.chown(self.home, self.user)

    def start(self, *words: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts the entry point with ``words``."""
        (entry,) = FINAL.only("ENTRYPOINT").words
        program = shutil.which(entry, path=self.environment["PATH"])
        assert program == str(self.machine.root / "opt/shardbook/bin" / entry)
        return subprocess.Popen(
            [*as_user(self.user), program, *words],
            env={**self.environment, **environment},
            cwd=self.machine.inside(FINAL.only("WORKDIR").text),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """Runs a command that ends well; returns its output."""
        with self.start(*words, environment=environment or {}) as process:
            output, _ = process.communicate(timeout=SOON_S)
        assert 0 == process.returncode, output
        return output

    @contextmanager
    def serving(self, *words: str, environment: Mapping[str, str]) -> Iterator[str]:
        """Serves until the block ends, then stops it as engines do; gives the address."""
        process = self.start(*words, environment=environment)
        try:
            yield _address(process)
            process.send_signal(getattr(signal, FINAL.only("STOPSIGNAL").text))
            output, _ = process.communicate(timeout=SOON_S)
            assert 0 == process.returncode, output
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The Dockerfile's result; not below pytest's own folder, which other users cannot enter."""
    folder = Path(tempfile.mkdtemp(prefix="shardbook-image-"))
    folder.chmod(0o755)
    try:
        yield Image(folder)
    finally:
        shutil.rmtree(folder)


def _address(process: subprocess.Popen[str]) -> str:
    """Waits until a server says where it is."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if found := re.match(r"export SHARDBOOK_SERVER=(\S+)", line):
            return found[1]
    pytest.fail("".join(lines))


def _probe(address: str) -> int:
    """The answer to a probe as Kubernetes makes it: the health of the whole server."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=SOON_S, wait_for_ready=True)
        return int(answer.status)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_image_holds_what_it_needs_at_pinned_versions(image: Image) -> None:
    """Rule: no torch, no pip, no compiler's leavings; every package has the version that the constraints give it."""
    site = next((image.machine.root / "opt/shardbook/lib").glob("python3*/site-packages"))
    names = [folder.name.removesuffix(".dist-info") for folder in site.glob("*.dist-info")]
    installed = {_normal(name): number for name, _, number in (name.rpartition("-") for name in names)}
    assert version() == installed.pop("shardbook")
    assert set() == {"torch", "pip", "setuptools", "hatchling"} & set(installed)
    assert {"psycopg", "psycopg-binary", "alembic", "grpcio"} <= set(installed)
    lines = (ROOT / "constraints-dev.txt").read_text().splitlines()
    pinned = {_normal(name): number for name, _, number in (line.partition("==") for line in lines)}
    assert {} == {name: number for name, number in installed.items() if pinned.get(name) != number}
    assert not (site / "torch").exists()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_image_has_the_version(image: Image) -> None:
    """Rule: the entry point answers, and is this release."""
    assert f"shardbook-server {version()}\n" == image.run("--version")


def test_image_serves_the_embedded_database_as_anybody(image: Image) -> None:
    """Rule: without a database URL, data lies in the folder that is set aside for it; SIGTERM ends it well."""
    assert "schema is at" in image.run("db", "upgrade", environment=_listening())
    with image.serving(*FINAL.only("CMD").words, environment=_listening()) as address:
        assert health_pb2.HealthCheckResponse.SERVING == _probe(address)
    database = image.home / "shardbook.db"
    assert database.exists()
    if image.user is not None:
        assert image.user == database.owner()


def test_health_check_believes_the_server(image: Image) -> None:
    """Rule: what the image asks is what its server answers, while it serves and no longer."""
    http = _free_address()
    _, _, words = FINAL.only("HEALTHCHECK").text.partition(" ")
    python, flag, code = json.loads(words)
    program = shutil.which(python, path=image.environment["PATH"])
    assert program is not None
    command = [program, flag, code.replace(", 7071,", f", {http.rpartition(':')[2]},")]

    def healthy() -> bool:
        asked = subprocess.run(
            [*as_user(image.user), *command],
            check=False,
            env=image.environment,
            cwd=image.home,
            stderr=subprocess.DEVNULL,
        )
        return asked.returncode == 0

    with image.serving("serve", environment={**_listening(), "SHARDBOOK_HTTP_LISTEN": http}):
        end_s = time.monotonic() + SOON_S
        while not healthy():
            assert time.monotonic() < end_s
            time.sleep(0.2)
    assert not healthy()


def test_services_of_compose_run_over_postgres(image: Image, postgres: Postgres) -> None:
    """Rule: migrate, then both replicas, with Compose's commands and environment; they write no file."""
    services = read_yaml(COMPOSE)["services"]
    where = urlsplit(postgres.new_database())
    assert where.username is not None

    def environment(name: str) -> dict[str, str]:
        given = {key: _interpolated(str(value)) for key, value in services[name]["environment"].items()}
        url = urlsplit(given["SHARDBOOK_DATABASE_URL"])
        assert ("shardbook", None, "db", 5432) == (url.username, url.password, url.hostname, url.port)
        here = url._replace(netloc=f"{where.username}@{where.hostname}:{where.port}", path=where.path)
        password = {"PGPASSWORD": where.password} if where.password else {}
        return {**given, **password, "SHARDBOOK_DATABASE_URL": here.geturl(), **_listening()}

    before = _files(image.machine.root)
    with image.start(*services["server-1"]["command"], environment=environment("server-1")) as early:
        output, _ = early.communicate(timeout=SOON_S)
    assert 1 == early.returncode
    assert "shardbook-server db upgrade" in output
    assert "schema is at" in image.run(*services["migrate"]["command"], environment=environment("migrate"))
    with ExitStack() as stack:
        for name in ("server-1", "server-2"):
            serving = image.serving(*services[name]["command"], environment=environment(name))
            address = stack.enter_context(serving)
            assert health_pb2.HealthCheckResponse.SERVING == _probe(address)
    assert set() == _files(image.machine.root) - before


def _interpolated(text: str) -> str:
    """What Compose makes of a value when nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def _listening() -> dict[str, str]:
    """Addresses of this test's own in place of all addresses."""
    return {"SHARDBOOK_LISTEN": "127.0.0.1:0", "SHARDBOOK_HTTP_LISTEN": "127.0.0.1:0"}
