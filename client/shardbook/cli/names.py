"""What people type for runs and checkpoints; a name of another kind is answered with the command that takes it."""

from __future__ import annotations

from shardbook._patterns import is_pattern, listing_place
from shardbook.core.names import CheckpointName, PartName, RunName, check_segment
from shardbook.errors import InvalidArgumentError


def project_of(text: str) -> str:
    """Returns the project that ``text`` names; raises InvalidArgumentError."""
    if "/" in text:
        if is_path(text):
            raise _path(text, "projects", field="project")
        what = "checkpoint" if "@" in text else "run"
        command = "show" if "@" in text else "ls"
        raise InvalidArgumentError(
            f"{text} is a {what}, not a project: try `shardbook {command} {text}`", field="project"
        )
    return check_segment(text, "project")


def run_of(text: str) -> tuple[RunName, str | None]:
    """Returns the run that ``text`` names, and its part; None for all parts.

    Raises:
        InvalidArgumentError: It names none; the message says what it may be instead.
    """
    name, _, part = text.partition(":")
    try:
        run = RunName.parse(name)
        return run, PartName(run, part).part if part else None
    except InvalidArgumentError:
        if is_path(text):
            raise _path(text, "a run, project/run", field="run") from None
        if "@" in text:
            raise InvalidArgumentError(
                f"{text} is a checkpoint, not a run: try `shardbook show {text}`", field="run"
            ) from None
        if _names_project(text):
            raise _project(text, "a run", field="run") from None
        raise


def runs_of(text: str) -> tuple[RunName | str, str | None]:
    """Returns the run, or the pattern of runs, that ``text`` names, and its part; None for all parts.

    Raises:
        InvalidArgumentError: It names none; the message says what it may be instead.
    """
    if not is_pattern(text):
        return run_of(text)
    pattern, _, part = text.partition(":")
    listing_place(pattern, part or None)
    return pattern, part or None


def checkpoint_of(text: str) -> CheckpointName:
    """Returns the checkpoint that a ref names.

    Raises:
        InvalidArgumentError: It names none; the message says what it may be instead.
    """
    try:
        return CheckpointName.parse(text, "ref")
    except InvalidArgumentError:
        if "@" not in text and _names_run(text):
            raise InvalidArgumentError(
                f"{text} is a run, not a checkpoint: try `shardbook ls {text}`, or add @latest: {text}@latest",
                field="ref",
            ) from None
        if is_path(text):
            raise _path(text, "a ref, project/run@1500", field="ref") from None
        if _names_project(text):
            raise _project(text, "a checkpoint", field="ref") from None
        raise


def is_path(text: str) -> bool:
    """Returns True when ``text`` has the form of a path or URL."""
    return text.startswith(("/", ".", "~")) or "://" in text or text.partition("@")[0].count("/") > 1


def _project(text: str, wanted: str, *, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{text} is a project, not {wanted}: try `shardbook runs {text}`", field=field)


def _path(text: str, wanted: str, *, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{text} is a path, and this command takes {wanted}; `shardbook sync` and `shardbook.dcp.load` take paths",
        field=field,
    )


def _names_run(text: str) -> bool:
    try:
        run_of(text)
    except InvalidArgumentError:
        return False
    return True


def _names_project(text: str) -> bool:
    try:
        check_segment(text, "project")
    except InvalidArgumentError:
        return False
    return True
