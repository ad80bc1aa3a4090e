"""``shardbook demo``: the whole story on one machine, by this very command and a server of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from shardbook.cli import failures, output
from shardbook.cli.options import AsJson, Plain
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError

EXAMPLES = """\b
Examples:
  shardbook demo
  shardbook demo --keep /tmp/shardbook-demo"""
_RUN: Final = "demo/tiny"
_EMBED: Final = "model.embed.weight"
#: For the server to listen, and to end, seconds.
_START_S: Final = 30.0
#: Run in a process of its own: this one stays free of torch.
_TORCH: Final = """
import sys, torch, shardbook.dcp as dcp
state = {"model": {"embed": {"weight": torch.zeros(64, 16)}}}
dcp.load(state, sys.argv[1])
want = torch.arange(1024.0).reshape(64, 16) / 300
assert torch.equal(want, state["model"]["embed"]["weight"])
"""


def demo(
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="DIR", help="Leave everything in DIR, which is made, to look at.")
    ] = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
) -> None:
    """Show the whole story on this machine, in some seconds: save, find, load, lose the server, bring it level.

    A server on SQLite and four ranks, all in a temporary folder. Torch is not needed; where it is installed it loads
    what was saved. Exits 0 only when every step held.
    """
    missing = [name for name in ("shardbook_server", "sqlalchemy", "starlette") if not importlib.util.find_spec(name)]
    if missing:
        raise InvalidArgumentError(
            f"the demo starts a server, which needs {', '.join(missing)}: pip install 'shardbook[server]'",
            reason="MISSING_PACKAGE",
            field="server",
        )
    began_s = time.monotonic()
    shown = io.StringIO() if as_json else sys.stdout
    with _folder(keep) as root, contextlib.redirect_stdout(shown):
        story = _Story(root, is_plain=is_plain)
        try:
            story.tell()
        finally:
            story.stop_server()
    took_s = time.monotonic() - began_s
    if as_json:
        output.print_json({"held": story.held, "took_s": round(took_s, 3), "directory": keep})
        return
    output.print_line(f"All of it held, in {took_s:.0f} s.", is_plain=is_plain)
    if keep is not None:
        database = f"sqlite:///{Path(keep).absolute() / 'shardbook.db'}"
        output.print_line(f"look at it: shardbook-server serve --database-url {database}", is_plain=is_plain)


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="shardbook-demo-") as name:
            yield Path(name)
        return
    path = Path(keep).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_used = any(path.iterdir())
    except OSError as error:
        raise InvalidArgumentError(f"--keep {keep}: {error}", field="keep") from error
    if is_used:
        raise InvalidArgumentError(f"{keep} is not empty: name a directory that is to be made", field="keep")
    yield path


class _Story:
    """What is shown, step by step; ``held`` grows with what was found to be so."""

    def __init__(self, root: Path, *, is_plain: bool) -> None:
        self._root, self._is_plain = root, is_plain
        self._address = f"127.0.0.1:{_free_port()}"
        self._server: subprocess.Popen[bytes] | None = None
        self.held: list[str] = []

    def tell(self) -> None:
        """Tells it; raises where something does not hold."""
        from shardbook.client import Client
        from shardbook.demo import DemoJob

        self._title("A server on SQLite")
        self._start_server()
        self._say(f"serving on {self._address}")
        job = DemoJob(_RUN, self._root / "ckpt", Client(self._address, timeout_s=10.0))
        job.start()

        self._title("Four ranks save three steps, without a collective")
        for step, loss in ((100, 2.1), (200, 1.4), (300, 1.7)):
            saved = job.save(step, labels={"stage": "pretrain"}, metrics={"val_loss": loss})
            self._check(saved.world_size == 4 and saved.tensor_count == 2, f"{saved.ref} is committed")
        self._run("runs")
        self._run("ls", _RUN)

        self._title("Which one is best, and what is in it")
        self._run("alias", "best", "--metric", "val_loss", "--min", _RUN)
        self._run("show", f"{_RUN}@best")
        self._run("tensors", f"{_RUN}@best")
        self._run("cat", f"{_RUN}@best", f"{_EMBED}[0:2]")
        self._run("diff", f"{_RUN}@100", f"{_RUN}@300")
        self._loads(f"{_RUN}@300", 300)
        self._loads_by_torch(f"{_RUN}@300")

        self._title("The server is killed; the next save survives it")
        self.stop_server(kill=True)
        directory = job.save_alone(400)
        self._run("verify", str(directory))
        self._loads(str(directory), 400)

        self._title("A new server learns of it from the directory")
        self._start_server()
        self._run("ls", _RUN, "--limit", "1")
        self._run("sync", str(directory))
        self._loads(f"{_RUN}@latest", 400)

        self._title("A rank falls silent: who, where, and since when")
        job.save_in_part(500, without=2)
        self._run("status", _RUN)

    def stop_server(self, *, kill: bool = False) -> None:
        """Ends the server, if there is one."""
        if self._server is not None:
            (self._server.kill if kill else self._server.terminate)()
            try:
                self._server.wait(_START_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None

    # ------------------------------------------------------------------ parts of the above

    def _start_server(self) -> None:
        environment = {
            **os.environ,
            "SHARDBOOK_LISTEN": self._address,
            "SHARDBOOK_HTTP_LISTEN": "off",
            "SHARDBOOK_DATABASE_URL": f"sqlite:///{self._root / 'shardbook.db'}",
            "SHARDBOOK_LOG_LEVEL": "warning",
        }
        program = "from shardbook_server.cli import main; main()"
        with (self._root / "server.log").open("ab") as log:
            self._server = subprocess.Popen(  # noqa: S603 - this very interpreter
                [sys.executable, "-P", "-c", program, "serve"], env=environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_S
        while self._server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                host, _, port = self._address.rpartition(":")
                if probe.connect_ex((host, int(port))) == 0:
                    return
            time.sleep(0.05)
        told = (self._root / "server.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise UnavailableError(f"the demo's server did not start: {' '.join(told)}")

    def _run(self, *words: str) -> None:
        """Runs a command in this process, against the demo's server, and shows it with what it prints."""
        from shardbook.cli.app import app

        self._say(f"$ shardbook {' '.join(words)}")
        plain = ["--plain"] if self._is_plain else []
        with _environment(SHARDBOOK_SERVER=self._address):
            code = typer.main.get_command(app).main([*words, *plain], prog_name="shardbook", standalone_mode=False)
        self._check(code in (None, failures.OK), f"shardbook {words[0]}", is_told=False)

    def _loads(self, target: str, step: int) -> None:
        import numpy as np

        from shardbook.demo import expected
        from shardbook.reading import read

        with _environment(SHARDBOOK_SERVER=self._address):
            values = read(target, _EMBED)
        self._check(np.array_equal(expected(_EMBED, step), values), f"numpy reads {target} as it was saved")

    def _loads_by_torch(self, ref: str) -> None:
        if importlib.util.find_spec("torch") is None:
            self._say("torch is not installed: with it, dcp.load would do the same on any number of ranks")
            return
        done = subprocess.run(  # noqa: S603 - this very interpreter
            [sys.executable, "-P", "-c", _TORCH, ref],
            env={**os.environ, "SHARDBOOK_SERVER": self._address, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        why = "" if done.returncode == 0 else f": {done.stderr.strip().splitlines()[-1:]}"
        self._check(done.returncode == 0, f"torch loads {ref}, saved on four ranks, on one{why}")

    def _check(self, held: bool, what: str, *, is_told: bool = True) -> None:
        if not held:
            raise FailedPreconditionError(f"this did not hold: {what}", reason="DEMO_FAILED")
        self.held.append(what)
        if is_told:
            self._say(f"ok: {what}")

    def _title(self, text: str) -> None:
        self._say("")
        self._say(f"=== {text}")

    def _say(self, text: str) -> None:
        output.print_line(text, is_plain=self._is_plain)


@contextlib.contextmanager
def _environment(**changed: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = ["EXAMPLES", "demo"]
