"""Carries out a Dockerfile without an engine: its very COPY and RUN steps, below a folder.

What differs from an engine: the base image is a fresh virtual environment of this machine's Python, the folders that
the Dockerfile makes at the top stand below a folder instead, and making a user, which would change this machine, is
left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from docker.utils.build import exclude_paths

from tests.deploy.dockerfile import Instruction, Stage
from tests.deploy.files import ROOT

#: Folders that only exist in the image.
_INSIDE = ("src", "wheels", "opt/shardbook", "var/lib")
_INSIDE_PATTERN = re.compile(rf"(?<![\w./-])/(?=(?:{'|'.join(_INSIDE)})\b)")
#: Instructions that change nothing in the file system; tests read them.
_DESCRIBING = frozenset({"CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL", "USER"})
#: RUN steps that begin so are about this machine's users.
_MAKES_USER = "groupadd "
#: For pip: this machine's way to its index, and its cache, as the steps' cache mounts have it.
_HANDED_ON = ("HOME", "LANG")


class Machine:
    """Where the steps are carried out.

    Args:
        folder: Whoever runs the result has to be able to read it.
        python: The base image's Python.
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.root = folder / "root"
        self.environment: dict[str, str] = {}
        self._folder = folder
        self._base = folder / "base"
        subprocess.run([python, "-m", "venv", "--without-pip", self._base], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(self._base / "bin" / "python")]
        subprocess.run([*pip, "install", "--quiet", "pip"], check=True, env=self._outside())

    def build(self, stages: Iterable[Stage]) -> None:
        """Carries out every stage; the last one's file system is left below ``root``."""
        done: list[Stage] = []
        for stage in stages:
            if done:
                self.root.rename(self._stage(done[-1].name))
            self.root.mkdir()
            self.environment = self._outside()
            self._workdir = self.root
            for instruction in stage.instructions:
                self._carry_out(instruction)
            done.append(stage)

    def inside(self, text: str) -> str:
        """Returns text with the image's paths as they are here."""
        return _INSIDE_PATTERN.sub(f"{self.root}/", text)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction.name:
            case "ARG" | "ENV":
                for name, value in instruction.pairs.items():
                    self.environment[name] = self.inside(value).replace("$PATH", self.environment["PATH"])
            case "WORKDIR":
                self._workdir = Path(self.inside(instruction.text))
                self._workdir.mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(instruction)
            case "RUN" if not instruction.text.startswith(_MAKES_USER):
                self._run(instruction.text)
            case name:
                assert name in _DESCRIBING | {"RUN"}, f"no test knows how to do {name}"

    def _copy(self, instruction: Instruction) -> None:
        *sources, target = instruction.words
        to = self._workdir / self.inside(target)
        base = self._stage(instruction.flags["from"]) if "from" in instruction.flags else self._context()
        for source in sources:
            path = base / source.lstrip("/")
            if path.is_dir():
                # As Docker has it: what is in the folder, not the folder.
                shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True)
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, to)

    def _run(self, text: str) -> None:
        command = self.inside(text)
        elsewhere = [
            path for path in re.findall(r"(?<![\w./=-])/[\w./*-]+", command) if not path.startswith(str(self.root))
        ]
        assert [] == elsewhere, f"these are paths of this machine: {elsewhere}"
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            env=self.environment,
            cwd=self._workdir,
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == done.returncode, f"{text}\n{done.stdout}{done.stderr}"

    def _context(self) -> Path:
        """What an engine would be sent: the tree, less what .dockerignore names."""
        context = self._folder / "context"
        if not context.exists():
            lines = (ROOT / ".dockerignore").read_text().splitlines()
            for name in exclude_paths(str(ROOT), [line for line in lines if line and not line.startswith("#")]):
                if (ROOT / name).is_file():
                    (context / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, context / name)
        return context

    def _stage(self, name: str) -> Path:
        return self._folder / f"stage-{name}"

    def _outside(self) -> dict[str, str]:
        """The environment of the base image, and how pip reaches its index from this machine."""
        handed_on = {name: value for name, value in os.environ.items() if name in _HANDED_ON or name.startswith("PIP_")}
        return {"PATH": f"{self._base / 'bin'}:/usr/local/bin:/usr/bin:/bin", **handed_on}
