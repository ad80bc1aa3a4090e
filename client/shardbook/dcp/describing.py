"""What a save says of its checkpoint: what the caller gave, and who and what writes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, SupportsFloat

import torch

from shardbook._version import __version__
from shardbook.core.description import check_labels, encode_note, finite_metrics, pack_said
from shardbook.core.lineage import Origin
from shardbook.dcp.session import Session, host_name, label, user_name

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """What the caller says of a checkpoint, checked. Picklable.

    Attributes:
        labels: By key.
        metrics: By name, finite.
        note: JSON text; empty for none.
        origins: Where it comes from.
    """

    labels: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    origins: tuple[Origin, ...] = ()

    @classmethod
    def of(
        cls,
        labels: Mapping[str, str] | None,
        metrics: Mapping[str, SupportsFloat] | None,
        note: Any,
        origins: tuple[Origin, ...] = (),
    ) -> Said:
        """Returns what the arguments of ``save`` say.

        A metric that is NaN or infinite is left out, with a warning: a diverged loss is no reason to lose a save.

        Raises:
            InvalidArgumentError: One of them cannot be kept; the field names it.
        """
        finite, lost = finite_metrics(metrics or {})
        if lost:
            _LOG.warning("metrics that are not finite are not kept with the checkpoint: %s", ", ".join(sorted(lost)))
        return cls(check_labels(labels or {}), finite, encode_note(note), origins)


#: The caller said nothing.
NOTHING_SAID: Final = Said()


def milliseconds(*moments_s: float) -> tuple[int, ...]:
    """Returns the times between moments, as 32 bits hold them."""
    return tuple(min(round((end - begin) * 1e3), 2**32 - 1) for begin, end in pairwise(moments_s))


def said_by(said: Said, session: Session, git_commit: str) -> bytes:
    """Returns what a save says with who and what makes it, as records hold it."""
    writer = {
        "host": host_name(),
        "user": user_name(),
        "job_id": session.job_id,
        "client_version": __version__,
        "torch_version": label(str(torch.__version__)),
        "git_commit": label(git_commit),
    }
    known = {name: value for name, value in writer.items() if value}
    return pack_said(said.labels, said.metrics, said.note, known, said.origins)
