"""What watchers claim and say of their work, checked, and what they are answered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shardbook.core.names import CheckpointName, check_segment
from shardbook.errors import InvalidArgumentError
from shardbook_server.service.checks import check_int, check_label
from shardbook_server.service.events import Place
from shardbook_server.service.interest import Interest
from shardbook_server.service.views import CheckpointInfo
from shardbook_server.storage.claims import ClaimState

#: Bytes of a claim's id: a UUID.
CLAIM_BYTES: Final = 16
MIN_LEASE_S: Final = 1.0
MAX_LEASE_S: Final = 86_400.0
MAX_ATTEMPTS: Final = 100
#: Longest delay before another attempt, seconds.
MAX_DELAY_S: Final = 30 * 86_400.0
#: Longest text of why an attempt failed.
MAX_FAILURE_CHARS: Final = 500
_NAME: Final = re.compile(r"subscriptions/([^/]*)")


class Outcome(IntEnum):
    """What came of an attempt; numbers as in ``shardbook.v1.FinishClaimRequest.Outcome``."""

    DONE = 1
    FAILED = 2
    RELEASED = 3


@dataclass(frozen=True)
class ClaimRequest:
    """What a watcher claims, as ``shardbook.v1.ClaimCheckpointRequest``."""

    subscription: str
    parent: str
    filter_text: str
    cursor: str
    claim_id: bytes
    holder: str
    lease_s: float
    max_attempts: int

    def __post_init__(self) -> None:
        subscription_name(self.subscription, "subscription")
        # Read here so that a bad one is refused before anything waits.
        Interest.of(self.parent, self.filter_text)
        check_claim_id(self.claim_id)
        check_label(self.holder, "holder")
        check_lease(self.lease_s)
        check_int(self.max_attempts, "max_attempts", smallest=1, largest=MAX_ATTEMPTS)


@dataclass(frozen=True)
class FinishRequest:
    """What came of a claim, as ``shardbook.v1.FinishClaimRequest``."""

    subscription: str
    claim_id: bytes
    checkpoint: str
    outcome: Outcome
    failure: str
    retry_delay_s: float
    max_attempts: int

    def __post_init__(self) -> None:
        subscription_name(self.subscription, "subscription")
        check_claim_id(self.claim_id)
        if self.checkpoint or self.outcome is not Outcome.RELEASED:
            CheckpointName.parse(self.checkpoint, "checkpoint")
        if self.outcome is Outcome.FAILED:
            check_int(self.max_attempts, "max_attempts", smallest=1, largest=MAX_ATTEMPTS)
        if not 0 <= self.retry_delay_s <= MAX_DELAY_S:
            raise InvalidArgumentError(f"a delay is 0 to {MAX_DELAY_S:.0f} s", field="retry_delay")


@dataclass(frozen=True)
class ClaimView:
    """A claim as it is answered."""

    checkpoint: CheckpointInfo
    state: ClaimState
    attempt: int
    holder: str
    due_time_us: int
    failure: str


@dataclass(frozen=True)
class ClaimAnswer:
    """What there was to claim.

    Attributes:
        claim: What was claimed; None when there is nothing.
        cursor: Event that the subscription has come to.
        again_s: When it makes sense to ask again although no event comes, seconds; None when only an event helps.
    """

    claim: ClaimView | None
    cursor: int = 0
    again_s: float | None = None


@dataclass(frozen=True)
class SubscriptionView:
    """A subscription as it is answered."""

    name: str
    parent: str
    filter_text: str
    place: Place
    behind_count: int
    done_count: int
    claims: tuple[ClaimView, ...]
    create_time_us: int


def subscription_name(text: str, field: str = "name") -> str:
    """Returns the name in ``subscriptions/{subscription}``; raises InvalidArgumentError."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            f"{text[:80]!a} does not name a subscription: subscriptions/{{subscription}}",
            reason="INVALID_NAME",
            field=field,
        )
    return check_segment(match[1], field)


def check_claim_id(claim_id: bytes) -> bytes:
    """Returns the id of a claim; raises InvalidArgumentError when it is no UUID."""
    if len(claim_id) != CLAIM_BYTES:
        raise InvalidArgumentError(f"a claim's id has {CLAIM_BYTES} bytes, not {len(claim_id)}", field="claim_id")
    return claim_id


def check_lease(lease_s: float) -> float:
    """Returns how long a claim is to last, seconds; raises InvalidArgumentError."""
    if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
        raise InvalidArgumentError(f"a lease is {MIN_LEASE_S:.0f} to {MAX_LEASE_S:.0f} s", field="lease")
    return lease_s
