"""Reads a Dockerfile into stages of instructions, as far as ours goes; hadolint judges its syntax."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: In capitals, such as ``RUN``.
        flags: Its ``--name=value`` words.
        text: What follows them, on one line.
    """

    name: str
    flags: dict[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """The words of a JSON array, or those that blanks separate."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return shlex.split(self.text)

    @property
    def pairs(self) -> dict[str, str]:
        """The ``name=value`` pairs of ENV, LABEL and ARG; a name alone has an empty value."""
        return {name: value for name, _, value in (word.partition("=") for word in self.words)}


@dataclass(frozen=True)
class Stage:
    """What stands between two FROMs.

    Attributes:
        name: After AS; empty for the last one.
        base: An image, or an earlier stage.
        instructions: In their order, without FROM.
    """

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def of(self, name: str) -> list[Instruction]:
        """The instructions of one name."""
        return [instruction for instruction in self.instructions if instruction.name == name]

    def only(self, name: str) -> Instruction:
        """The one instruction of a name."""
        (found,) = self.of(name)
        return found

    @property
    def environment(self) -> dict[str, str]:
        """What its ENVs set, as written."""
        return {name: value for instruction in self.of("ENV") for name, value in instruction.pairs.items()}


def read_stages(path: Path) -> list[Stage]:
    """Returns the stages of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction = _instruction(line)
        if instruction.name == "FROM":
            base, *name = instruction.words
            stages.append(Stage("".join(name[1:]), base, ()))
        else:
            last = stages.pop()
            stages.append(Stage(last.name, last.base, (*last.instructions, instruction)))
    return stages


def _instruction(line: str) -> Instruction:
    name, _, rest = line.partition(" ")
    flags: dict[str, str] = {}
    while found := re.match(r"--([a-z-]+)=(\S+)\s+", rest.lstrip()):
        flags[found[1]] = found[2]
        rest = rest.lstrip()[found.end() :]
    return Instruction(name.upper(), flags, rest.strip())
