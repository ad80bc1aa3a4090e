"""What ``shardbook watch --exec`` runs: its words, its environment, and the process."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardbook.cli import supervise
from shardbook.core.names import CheckpointName
from shardbook.errors import InvalidArgumentError
from shardbook.events import Claim
from shardbook.stores import Stores

_NAMES: Final = ("ref", "name", "path", "location", "project", "run", "part", "step", "attempt")
_PLACEHOLDER: Final = re.compile(r"\{(" + "|".join(_NAMES) + r")\}")
#: What looks like one, and is none: neither ``${HOME}`` nor ``{{name}}``, which are for the command itself.
_UNKNOWN: Final = re.compile(r"(?<![{$])\{(?!(?:" + "|".join(_NAMES) + r")\})([A-Za-z_][\w-]*)\}(?!\})")
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh"})
_SHELL_SCRIPT: Final = re.compile(r"-[a-z]*c")


@dataclass(frozen=True)
class Command:
    """A command with places for what is known of a checkpoint.

    It is split into words first and filled in afterwards, and no shell reads it: whatever a name or path holds stays
    within its word.

    Attributes:
        words: With ``{ref}`` and the like.
    """

    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Command:
        """Returns the command of a command line.

        Raises:
            InvalidArgumentError: It is none, is not there, has an unknown placeholder, or would let a shell read what
                is filled in.
        """
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise InvalidArgumentError(f"{text[:200]!a} is no command: {error}", field="exec") from error
        if not words:
            raise InvalidArgumentError("--exec needs a command", field="exec")
        if not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
            raise InvalidArgumentError(f"there is no command {words[0]!a}", field="exec")
        unknown = next((found for found in map(_UNKNOWN.search, words) if found is not None), None)
        if unknown is not None:
            known = ", ".join(f"{{{name}}}" for name in _NAMES)
            raise InvalidArgumentError(
                f"{unknown[0]} is no placeholder: {known}; braces with a blank, {{ {unknown[1]} }}, are passed on",
                field="exec",
            )
        is_script = any(_SHELL_SCRIPT.fullmatch(word) for word in words[1:])
        if Path(words[0]).name in _SHELLS and is_script and any(map(_PLACEHOLDER.search, words)):
            raise InvalidArgumentError(
                'a shell would read what is filled in: write "$SHARDBOOK_REF", with its quotes, for {ref}, and so on',
                field="exec",
            )
        return cls(words)

    def argv(self, facts: Mapping[str, str]) -> list[str]:
        """Returns the words filled in."""
        return [_PLACEHOLDER.sub(lambda match: facts[match[1]], word) for word in self.words]


def facts_of(claim: Claim, stores: Stores) -> dict[str, str]:
    """Returns what a command is told of a checkpoint, by placeholder."""
    one = claim.checkpoint
    part = CheckpointName.parse(one.name).part
    return {
        "ref": claim.ref,
        "name": one.name,
        # Where its store is not known here, the location has to do.
        "path": stores.here(one.location) or one.location,
        "location": one.location,
        "project": part.run.project,
        "run": part.run.ref,
        "part": one.part,
        "step": str(one.step),
        "attempt": str(claim.attempt),
    }


class Running:
    """A command that runs. It ends when this process does, however that ends."""

    def __init__(
        self, argv: list[str], facts: Mapping[str, str], server: str, *, grace_s: float, is_quiet: bool
    ) -> None:
        """Starts it.

        Args:
            argv: Its words.
            facts: For its environment, as ``SHARDBOOK_REF`` and so on.
            server: Address of the server, for commands of its own.
            grace_s: Between SIGTERM and SIGKILL where it is ended.
            is_quiet: Its output goes to standard error.
        """
        told, self._tell = os.pipe()
        environment = {**os.environ, **{f"SHARDBOOK_{name.upper()}": value for name, value in facts.items()}}
        try:
            # Not our group: a terminal's Ctrl-C comes to us alone, and is passed on.
            self._process = subprocess.Popen(  # noqa: S603 - it is what is asked for
                [sys.executable, "-I", "-S", supervise.__file__, str(told), str(grace_s), *argv],
                env={**environment, "SHARDBOOK_SERVER": server},
                pass_fds=(told,),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if is_quiet else None,
                start_new_session=True,
            )
        finally:
            os.close(told)

    def wait(self, timeout_s: float) -> int | None:
        """Returns the exit code, None when it still runs after so many seconds."""
        try:
            return self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: int) -> None:
        """Passes a signal on."""
        with suppress(BrokenPipeError):
            os.write(self._tell, bytes([number]))

    def end(self, grace_s: float) -> None:
        """Ends it: SIGTERM, and SIGKILL after so many seconds."""
        self.send(signal.SIGTERM)
        if self.wait(grace_s) is None:
            self.send(signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Lets go of it once it has ended."""
        os.close(self._tell)
