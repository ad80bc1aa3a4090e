"""Names of projects, runs, parts and checkpoints: parsing, printing and the rules they keep.

Resource names are what the API speaks, refs are what people type::

    projects/llm/runs/8b-v3/parts/default/checkpoints/1500.s3.a1
    llm/8b-v3@1500   llm/8b-v3@1500.s3   llm/8b-v3@latest   llm/8b-v3:optim@1500
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError

DEFAULT_PART = "default"
#: Alias that the server itself keeps.
LATEST = "latest"
#: Bytes of an incarnation: a UUID.
INCARNATION_BYTES = 16

_SEGMENT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{limits.MAX_NAME_CHARS - 1}}}")
_RUN = re.compile(r"projects/([^/]*)/runs/([^/]*)")
_PART = re.compile(r"projects/([^/]*)/runs/([^/]*)/parts/([^/]*)")
_CHECKPOINT = re.compile(r"projects/([^/]*)/runs/([^/]*)/parts/([^/]*)/checkpoints/([^/]*)")
_ALIAS_NAME = re.compile(r"projects/([^/]*)/runs/([^/]*)/parts/([^/]*)/aliases/([^/]*)")
_ID = re.compile(r"([0-9]{1,19})(?:\.s([0-9]{1,19})(?:\.a([0-9]{1,10})(?:\.([0-9a-f]{12}))?)?)?")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
_ALIAS_FORM = "an alias: it begins with a letter and has letters, digits, '.', '_' and '-', such as llm/8b-v3@best"
_REF = re.compile(r"([^/:@]*)/([^/:@]*)(?::([^/:@]*))?@([^/:@]*)")
_RUN_REF = re.compile(r"([^/:@]*)/([^/:@]*)")


def check_segment(text: str, field: str) -> str:
    """Returns ``text`` when it may name a project, run or part.

    Letters, digits, ``.``, ``_`` and ``-``, at most 128, beginning with a letter or digit.

    Raises:
        InvalidArgumentError: It may not; the message shows it escaped.
    """
    if not _SEGMENT.fullmatch(text):
        shown = ascii(text if len(text) <= limits.MAX_NAME_CHARS else text[: limits.MAX_NAME_CHARS] + "...")
        raise InvalidArgumentError(
            f"{shown} is not a name: letters, digits, '.', '_' and '-', at most {limits.MAX_NAME_CHARS}, "
            "beginning with a letter or digit",
            reason="INVALID_NAME",
            field=field,
        )
    return text


@dataclass(frozen=True, order=True)
class RunName:
    """A run of a project."""

    project: str
    run: str

    def __post_init__(self) -> None:
        check_segment(self.project, "project")
        check_segment(self.run, "run")

    def __str__(self) -> str:
        return f"projects/{self.project}/runs/{self.run}"

    @property
    def ref(self) -> str:
        """Short form, ``project/run``."""
        return f"{self.project}/{self.run}"

    @classmethod
    def parse(cls, text: str, field: str = "run") -> RunName:
        """Returns the run that ``projects/{project}/runs/{run}`` or ``project/run`` names.

        Raises:
            InvalidArgumentError: It names none; the error is about ``field``.
        """
        match = _RUN.fullmatch(text) or _RUN_REF.fullmatch(text)
        if match is None:
            raise _no_name(text, "a run: write project/run, such as llm/8b-v3", field)
        return cls(check_segment(match[1], field), check_segment(match[2], field))


@dataclass(frozen=True, order=True)
class PartName:
    """A part of a run."""

    run: RunName
    part: str = DEFAULT_PART

    def __post_init__(self) -> None:
        check_segment(self.part, "part")

    def __str__(self) -> str:
        return f"{self.run}/parts/{self.part}"

    @property
    def ref(self) -> str:
        """Short form, ``project/run`` or ``project/run:part``."""
        return self.run.ref if self.part == DEFAULT_PART else f"{self.run.ref}:{self.part}"

    @classmethod
    def parse(cls, text: str, field: str = "parent") -> PartName:
        """Returns the part that a resource name names.

        Raises:
            InvalidArgumentError: It names none; the error is about ``field``.
        """
        match = _PART.fullmatch(text)
        if match is None:
            raise _no_name(text, "a part: projects/{project}/runs/{run}/parts/{part}", field)
        return cls(
            RunName(check_segment(match[1], field), check_segment(match[2], field)), check_segment(match[3], field)
        )


@dataclass(frozen=True)
class CheckpointId:
    """Last segment of a checkpoint's name: an alias, or a step that may be narrowed to a session and attempt.

    Attributes:
        alias: ``latest`` or another alias; None when a step is given.
        step: Training step; None with an alias.
        session: Session number; None for whichever is live.
        attempt: Attempt; None for the newest committed one.
        incarnation: First 12 hex digits, given for attempts of session 0 only.
    """

    alias: str | None = None
    step: int | None = None
    session: int | None = None
    attempt: int | None = None
    incarnation: str | None = None

    def __str__(self) -> str:
        if self.alias is not None:
            return self.alias
        text = str(self.step)
        for mark, value in ((".s", self.session), (".a", self.attempt), (".", self.incarnation)):
            if value is None:
                break
            text += f"{mark}{value}"
        return text

    @classmethod
    def parse(cls, text: str, field: str = "name") -> CheckpointId:
        """Returns the id in ``text``.

        Raises:
            InvalidArgumentError: It is none; the error is about ``field``.
        """
        match = _ID.fullmatch(text)
        if match is None:
            if _ALIAS.fullmatch(text):
                return cls(alias=text)
            raise _no_name(
                text, "a checkpoint: behind the @ write a step (1500), a step and session (1500.s3) or latest", field
            )
        numbers = [None if group is None else int(group) for group in match.groups()[:3]]
        if any(number is not None and number > limits.INT64_MAX for number in numbers):
            raise _no_name(text, "a checkpoint: a number is 2**63 or more", field)
        if numbers[2] is not None and numbers[2] > limits.MAX_ATTEMPT:
            raise _no_name(text, "a checkpoint: the attempt is 2**31 or more", field)
        return cls(None, numbers[0], numbers[1], numbers[2], match[4])

    @classmethod
    def full(cls, step: int, session: int, attempt: int, incarnation: bytes) -> CheckpointId:
        """Returns the id that names one attempt for ever."""
        return cls(None, step, session, attempt, incarnation.hex()[:12] if session == 0 else None)


@dataclass(frozen=True)
class CheckpointName:
    """A checkpoint of a part."""

    part: PartName
    id: CheckpointId

    def __str__(self) -> str:
        return f"{self.part}/checkpoints/{self.id}"

    @property
    def ref(self) -> str:
        """Short form, ``project/run@1500``."""
        return f"{self.part.ref}@{self.id}"

    @classmethod
    def parse(cls, text: str, field: str = "name") -> CheckpointName:
        """Returns the checkpoint that a resource name or a ref names.

        Raises:
            InvalidArgumentError: It names none; the error is about ``field``.
        """
        match = _CHECKPOINT.fullmatch(text)
        if match is None:
            match = _REF.fullmatch(text)
        if match is None:
            raise _no_name(
                text,
                "a checkpoint: write project/run@step, such as llm/8b-v3@1500, or project/run@latest",
                field,
            )
        run = RunName(check_segment(match[1], field), check_segment(match[2], field))
        part = check_segment(DEFAULT_PART if match[3] is None else match[3], field)
        return cls(PartName(run, part), CheckpointId.parse(match[4], field))


@dataclass(frozen=True, order=True)
class AliasName:
    """An alias of a part: a name for one of its checkpoints that can be moved."""

    part: PartName
    alias: str

    def __post_init__(self) -> None:
        if not _ALIAS.fullmatch(self.alias):
            raise _no_name(self.alias, _ALIAS_FORM, "alias")

    def __str__(self) -> str:
        return f"{self.part}/aliases/{self.alias}"

    @property
    def ref(self) -> str:
        """Short form, ``project/run@best``."""
        return f"{self.part.ref}@{self.alias}"

    @classmethod
    def parse(cls, text: str, field: str = "name") -> AliasName:
        """Returns the alias that a resource name or a ref names.

        Raises:
            InvalidArgumentError: It names none; the error is about ``field``.
        """
        match = _ALIAS_NAME.fullmatch(text)
        if match is None:
            match = _REF.fullmatch(text)
        if match is None or not _ALIAS.fullmatch(match[4]):
            raise _no_name(text, _ALIAS_FORM, field)
        run = RunName(check_segment(match[1], field), check_segment(match[2], field))
        return cls(PartName(run, check_segment(DEFAULT_PART if match[3] is None else match[3], field)), match[4])


#: What people type; the same type, parsed from the same texts.
Ref = CheckpointName


def is_ref(text: str) -> bool:
    """Returns True when ``text`` has the form of a ref rather than of a path or URL."""
    return _REF.fullmatch(text) is not None and not text.startswith((".", "~"))


def check_incarnation(incarnation: bytes, field: str = "incarnation") -> bytes:
    """Returns ``incarnation`` when it is the 16 bytes of a UUID that is not all zeros."""
    if len(incarnation) != INCARNATION_BYTES or not any(incarnation):
        raise InvalidArgumentError("an incarnation is the 16 bytes of a UUID", field=field)
    return incarnation


def prefix_of(incarnation: bytes, attempt: int) -> str:
    """Returns the directory of an attempt's data files: ``{incarnation[:12]}-a{attempt}``."""
    return f"{incarnation.hex()[:12]}-a{attempt}"


def _no_name(text: str, form: str, field: str) -> InvalidArgumentError:
    shown = ascii(text if len(text) <= 300 else text[:300] + "...")
    return InvalidArgumentError(f"{shown} does not name {form}", reason="INVALID_NAME", field=field)
