"""Retention policies of runs, and what they keep: ``shardbook.core.retention`` judges, under the run's lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from shardbook.core import limits
from shardbook.core.names import LATEST, CheckpointName, PartName, RunName
from shardbook.core.retention import Candidate, Decision, RetentionPolicy, judge
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook_server.service import present
from shardbook_server.service.behind import find_behind
from shardbook_server.service.deletion import UNDELETE_S, mark
from shardbook_server.service.etags import check_etag, etag_of
from shardbook_server.service.holds import find_holders
from shardbook_server.service.pages import Tokens, page_count
from shardbook_server.service.places import Place, parse_parent, part_ids_of
from shardbook_server.service.views import Page, PolicyView, PruneView
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import descriptions as description_rows
from shardbook_server.storage import retention as rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import COMMITTED, DATA_MISSING
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.descriptions import NOTHING_SAID, Said
from shardbook_server.storage.retention import PolicyRow
from shardbook_server.storage.runs import PartRow


@dataclass(frozen=True, eq=False)
class _Judged:
    """A part's checkpoints and what becomes of them."""

    part: PartName
    decisions: list[Decision]

    def view(self, connection: Connection, decisions: Sequence[Decision]) -> list[PruneView]:
        """Returns some decisions as they are answered."""
        listed = checkpoint_rows.find_listed(connection, [one.candidate.key for one in decisions])
        views = []
        for one in decisions:
            info = present.checkpoint_of(listed[one.candidate.key])
            views.append(PruneView(info.name, info.ref, one.keep, one.reasons, info.size_bytes, one.candidate.time_us))
        return views


class RetentionService:
    """Stores policies, says what they keep, and deletes the rest. Thread-safe."""

    def __init__(self, database: Database, *, undelete_s: float = UNDELETE_S) -> None:
        """Keeps nothing but the key of the page tokens; ``undelete_s`` as for ``DeletionService``."""
        self._database = database
        self._tokens = Tokens(database)
        self._undelete_us = round(undelete_s * 1e6)

    def get_policy(self, name: str) -> PolicyView:
        """Returns the policy that counts for a part, or with ``parts/-`` for the parts without one of their own.

        Raises:
            NotFoundError: The run does not exist.
        """
        place, run = _one_run(name)
        with self._database.read() as connection:
            stored = rows.find_policies(connection, _run_id(connection, run))
        return _policy_view(_stored(stored, place.part), place.part)

    def set_policy(self, name: str, policy: RetentionPolicy, *, etag: str = "") -> PolicyView:
        """Stores the policy of a part, or with ``parts/-`` of the run; one without any rule removes it.

        Raises:
            NotFoundError: The run or part does not exist.
            AbortedError: What is stored there has another etag by now.
        """
        place, run = _one_run(name)
        with self._database.write([run]) as connection:
            part_ids_of(connection, place)
            run_id, part = _run_id(connection, run), place.part or ""
            stored = rows.find_policies(connection, run_id).get(part)
            check_etag(etag, _etag(stored), f"the policy of {name}", "etag")
            row = PolicyRow(part, policy.text, self._database.now_us(connection)) if policy else None
            rows.put_policy(connection, run_id, row, part)
            return _policy_view(row, part)

    def preview(
        self, parent: str, policy: RetentionPolicy | None, *, page_size: int = 0, page_token: str = ""
    ) -> Page[PruneView]:
        """Returns one page of what a policy keeps and what it would delete, part by part, newest first.

        Args:
            parent: ``projects/{project}/runs/{run}/parts/{part}``, or ``parts/-``.
            policy: What to keep; None for the stored policy of each part.
            page_size: 50 when 0, at most 1,000.
            page_token: From the page before.

        Raises:
            NotFoundError: The run or part does not exist.
            FailedPreconditionError: No policy is stored (``NO_POLICY``).
            InvalidArgumentError: The policy has no rule, or an argument is not valid.
        """
        place, _ = _one_run(parent)
        _check_rules(policy)
        scope = ("prune", parent, "" if policy is None else policy.text)
        count = page_count(page_size)
        position = self._tokens.read(scope, page_token)
        first = 0 if position is None else int(position[0])
        # What is new since the first page comes first, and would shift the rest: pages are of one moment's checkpoints.
        newest_id = None if position is None else int(position[1])
        with self._database.read() as connection:
            now_us = self._database.now_us(connection)
            every = [
                (judged, one)
                for judged in self._judge(connection, place, policy, now_us)
                for one in judged.decisions
                if newest_id is None or one.candidate.key <= newest_id
            ]
            items: list[PruneView] = []
            for judged, some in groupby(every[first : first + count], key=itemgetter(0)):
                items += judged.view(connection, [one for _, one in some])
        if newest_id is None:
            newest_id = max((one.candidate.key for _, one in every), default=0)
        token = self._tokens.make(scope, (first + count, newest_id)) if first + count < len(every) else ""
        return Page(tuple(items), token)

    def prune(
        self, parent: str, policy: RetentionPolicy | None, names: Sequence[str], *, files: bool = False
    ) -> list[PruneView]:
        """Deletes those of some checkpoints that a policy does not keep, judged anew under the run's lock.

        Args:
            parent: As for ``preview``.
            policy: As for ``preview``.
            names: Full names of checkpoints, at most ``limits.MAX_PRUNED``.
            files: As for ``DeletionService.delete``.

        Returns:
            What became of each. What was deleted before is not kept, so the same again answers the same.

        Raises:
            As ``preview`` does; NotFoundError also for a checkpoint that is none.
        """
        place, run = _one_run(parent)
        _check_rules(policy)
        if not 0 < len(names) <= limits.MAX_PRUNED:
            raise InvalidArgumentError(
                f"{len(names)} names: give 1 to {limits.MAX_PRUNED} that PreviewPrune gave",
                reason="LIMIT_EXCEEDED",
                field="names",
            )
        parsed = [CheckpointName.parse(name, f"names[{at}]") for at, name in enumerate(names)]
        for at, name in enumerate(parsed):
            if name.part.run != run or place.part not in (None, name.part.part):
                raise InvalidArgumentError(f"{name.ref} is no checkpoint of {parent}", field=f"names[{at}]")
        with self._database.write([run]) as connection:
            now_us = self._database.now_us(connection)
            wanted = [present.resolve(connection, name) for name in parsed]
            asked_for = set(wanted)
            checkpoint_rows.lock_committed(connection, wanted)
            views: dict[int, PruneView] = {}
            for judged in self._judge(connection, place, policy, now_us):
                asked = [one for one in judged.decisions if one.candidate.key in asked_for]
                gone = [one.candidate.key for one in asked if not one.keep]
                if gone:
                    found = checkpoint_rows.find_by_ids(connection, gone)
                    mark(connection, list(found.values()), now_us, self._undelete_us, [], files=files)
                for one, view in zip(asked, judged.view(connection, asked), strict=True):
                    views[one.candidate.key] = view
            views |= self._unjudged(connection, [one for one in wanted if one not in views])
            return [views[one] for one in wanted]

    @staticmethod
    def _unjudged(connection: Connection, wanted: Sequence[int]) -> dict[int, PruneView]:
        """Returns what there is to say of checkpoints that no policy is asked about: they are deleted, or failed."""
        views = {}
        for checkpoint_id, listed in checkpoint_rows.find_listed(connection, wanted).items():
            info = present.checkpoint_of(listed)
            is_deleted = listed.row.state == checkpoint_rows.DELETED
            reason = "it was deleted before" if is_deleted else f"it is {info.state.name}"
            views[checkpoint_id] = PruneView(
                info.name, info.ref, not is_deleted, (reason,), info.size_bytes, info.create_time_us
            )
        return views

    def _judge(
        self, connection: Connection, place: Place, policy: RetentionPolicy | None, now_us: int
    ) -> list[_Judged]:
        stored: dict[str, PolicyRow] = {}
        if policy is None:
            run = place.one_run
            stored = {} if run is None else rows.find_policies(connection, _run_id(connection, run))
        judged = []
        parts = [run_rows.part_by_id(connection, part_id) for part_id in part_ids_of(connection, place)]
        behind = find_behind(connection, parts, now_us)
        for row in parts:
            part = row.name
            rules = policy
            if rules is None:
                held = _stored(stored, part.part)
                rules = None if held is None else RetentionPolicy.from_text(held.policy)
            if rules is None and (place.part is not None or not stored):
                raise FailedPreconditionError(
                    f"no policy is stored for {part.ref}: `shardbook policy {part.ref} --keep-last 5` stores one, or "
                    "say what to keep",
                    reason="NO_POLICY",
                )
            candidates = _candidates(connection, row, behind, now_us)
            judged.append(_Judged(part, judge(rules or RetentionPolicy(), candidates, now_us)))
        return judged


def _candidates(
    connection: Connection, part: PartRow, behind: Mapping[int, tuple[str, ...]], now_us: int
) -> list[Candidate]:
    found = rows.read_judged(connection, part.id)
    ids = [one.id for one in found]
    said, holders = description_rows.find_said(connection, ids), find_holders(connection, ids, now_us)
    return [
        Candidate(
            key=one.id,
            session=one.session,
            incarnation=one.incarnation,
            step=one.step,
            attempt=one.attempt,
            time_us=one.time_us,
            is_committed=one.state == COMMITTED,
            is_live=bool(one.live),
            is_whole=not one.flags & DATA_MISSING,
            metrics=said.get(one.id, NOTHING_SAID).metrics,
            aliases=_names(said.get(one.id, NOTHING_SAID), is_latest=one.id == part.latest_id),
            holders=(*holders.get(one.id, ()), *behind.get(one.id, ())),
        )
        for one in found
    ]


def _names(said: Said, *, is_latest: bool) -> tuple[str, ...]:
    return tuple(sorted([*said.aliases, *([LATEST] if is_latest else [])]))


def _check_rules(policy: RetentionPolicy | None) -> None:
    if policy is not None and not policy:
        raise InvalidArgumentError("the policy has no rule: it would keep next to nothing", field="policy")


def _one_run(name: str) -> tuple[Place, RunName]:
    place = parse_parent(name)
    run = place.one_run
    if run is None:
        raise InvalidArgumentError("name one project and run: only the part may be -", field="name")
    return place, run


def _run_id(connection: Connection, run: RunName) -> int:
    row = run_rows.find_run(connection, run)
    if row is None:
        raise NotFoundError(f"{run.ref} does not exist; `shardbook runs` lists what there is")
    return row.id


def _stored(stored: dict[str, PolicyRow], part: str | None) -> PolicyRow | None:
    return stored.get(part or "") or stored.get("")


def _policy_view(row: PolicyRow | None, part: str | None) -> PolicyView:
    if row is None:
        return PolicyView(None, etag=_etag(None))
    is_inherited = row.part != (part or "")
    stored = None if is_inherited else row
    return PolicyView(RetentionPolicy.from_text(row.policy), is_inherited, row.update_time_us, _etag(stored))


def _etag(stored: PolicyRow | None) -> str:
    return etag_of("policy", None if stored is None else stored.policy)
