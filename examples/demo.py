"""The whole story on one machine: ``make demo``.

A server on SQLite; four gloo ranks train a small transformer with FSDP2 and save without a collective; the catalogue;
the server is killed, the save survives and is brought in; other world sizes load and train on; plain DCP loads.
Exits with 0 only if every step held, and leaves no process behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUN = "demo/tiny"
TRAIN = str(HERE / "train.py")
PLAIN = str(HERE / "plain_load.py")


class Demo:
    """A folder, an address, and the processes that have to end with the demo."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkpoints"
        self.keep = folder / "kept"
        for path in (self.root, self.keep):
            path.mkdir()
        self.port = free_port()
        self.environment = {
            **os.environ,
            "SHARDBOOK_SERVER": f"127.0.0.1:{self.port}",
            "SHARDBOOK_LISTEN": f"127.0.0.1:{self.port}",
            "SHARDBOOK_HTTP_LISTEN": "off",
            "SHARDBOOK_DATABASE_URL": f"sqlite:///{folder / 'shardbook.db'}",
            "SHARDBOOK_LOG_LEVEL": "warning",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Starts a process in a group of its own, so that its children end with it."""
        process = subprocess.Popen(command, env=self.environment, start_new_session=True)
        self.processes.append(process)
        return process

    def run(self, *command: str, timeout_s: float = 120) -> None:
        """Runs a command to its end; raises when it fails."""
        wait(self.start(*command), command, timeout_s)

    def start_server(self) -> subprocess.Popen[bytes]:
        """Starts the server and waits until it answers."""
        server = self.start(tool("shardbook-server"), "serve")
        deadline = time.monotonic() + 30
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return server
            time.sleep(0.05)
        raise SystemExit("the server did not start")

    def ranks(self, count: int, *arguments: str) -> list[str]:
        """Returns the command that trains on ``count`` ranks."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={count}"]
        # The rendezvous id is the job's id: a restart of the same job takes its run over at once.
        rendezvous = ["--rdzv-id=demo", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
        launcher = [*torchrun, *rendezvous] if count > 1 else [sys.executable]
        return [*launcher, TRAIN, RUN, f"--root={self.root}", *arguments]

    def shardbook(self, *arguments: str) -> None:
        """Runs the ``shardbook`` command and shows what it prints."""
        print(f"$ shardbook {' '.join(arguments)}", flush=True)
        self.run(tool("shardbook"), *arguments)

    def steps(self) -> list[int]:
        """Returns the steps that the catalogue has committed, in order."""
        out = subprocess.run(
            [tool("shardbook"), "ls", RUN, "--json"], env=self.environment, check=True, capture_output=True, timeout=60
        ).stdout
        found = json.loads(out)
        rows = found["checkpoints"] if isinstance(found, dict) else found
        return sorted(int(row["step"]) for row in rows if row["state"] == "COMMITTED")

    def stop(self) -> None:
        """Ends every process and its children."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            finally:
                process.wait()


def tell(demo: Demo) -> None:
    """Runs the story; raises where it does not hold."""
    title("A server on SQLite")
    server = demo.start_server()
    print(f"serving on 127.0.0.1:{demo.port}")

    title("Four ranks train, and save three steps without a collective; the second in the background")
    training = demo.start(*demo.ranks(4, "--steps=4", "--async-step=2", f"--keep={demo.keep}", "--wait-before=4"))
    wait_for_file(demo.root / "ready", training)
    check(demo.steps() == [1, 2, 3], "the catalogue has steps 1, 2 and 3")
    demo.shardbook("runs")
    demo.shardbook("ls", RUN)
    demo.shardbook("tensors", f"{RUN}@latest", "--limit=8")

    title("The server is killed; the fourth save survives it")
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    (demo.root / "go").touch()
    wait(training, ("torchrun",), 120)
    check((demo.root / "step-4" / ".metadata").exists(), "step 4 lies complete on storage, with DCP's own .metadata")

    title("A new server learns of it from the directory")
    demo.start_server()
    check(demo.steps() == [1, 2, 3], "the catalogue does not know step 4 yet")
    demo.shardbook("sync", str(demo.root / "step-4"))
    check(demo.steps() == [1, 2, 3, 4], "the catalogue has step 4")

    title("Two ranks load what four saved, compare it bit for bit, train on and save")
    demo.run(
        *demo.ranks(2, "--steps=1", f"--resume={RUN}@4", f"--expect={demo.keep / 'step-4.pt'}", f"--keep={demo.keep}")
    )
    check(demo.steps() == [1, 2, 3, 4, 5], "the catalogue has step 5")

    title("One process without torch.distributed loads, compares and trains on")
    demo.run(*demo.ranks(1, "--steps=1", "--no-save", f"--resume={RUN}@3", f"--expect={demo.keep / 'step-3.pt'}"))
    step_4 = str(demo.root / "step-4")
    demo.run(*demo.ranks(1, "--steps=1", "--no-save", f"--resume={step_4}", f"--expect={demo.keep / 'step-4.pt'}"))

    title("Plain torch.distributed.checkpoint loads the same directory")
    demo.run(sys.executable, PLAIN, step_4, str(demo.keep / "step-4.pt"))


def main() -> int:
    """Tells the story in a temporary folder; returns the exit code."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shardbook-demo-") as name, ending(Demo(Path(name))) as demo:
        tell(demo)
    left = [process.pid for process in demo.processes if alive(process.pid)]
    check(not left, "no process is left behind")
    print(f"\nAll of it held, in {time.monotonic() - begin:.0f} s.")
    return 0


@contextmanager
def ending(demo: Demo) -> Iterator[Demo]:
    """Ends the demo's processes, whatever happens."""
    try:
        yield demo
    finally:
        demo.stop()


def tool(name: str) -> str:
    """Returns the path of a command that was installed beside this interpreter."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    """Returns a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(process: subprocess.Popen[bytes], command: tuple[str, ...] | list[str], timeout_s: float) -> None:
    """Waits for a process; raises when it fails or takes too long."""
    if process.wait(timeout=timeout_s) != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


def wait_for_file(path: Path, process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    """Waits until ``path`` exists; raises when the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{path.name} did not appear")
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Tells whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def title(text: str) -> None:
    """Prints a heading."""
    print(f"\n=== {text}", flush=True)


def check(held: bool, what: str) -> None:
    """Prints what held; ends the demo where it did not."""
    if not held:
        raise SystemExit(f"FAILED: {what}")
    print(f"ok: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
