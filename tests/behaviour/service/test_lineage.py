"""Lineage by hand: what may be an edge, both directions, cycles, limits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from shardbook.core import limits
from shardbook.core.lineage import LineageKind
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ShardbookError
from shardbook_server.service.lineage import EdgeInfo, EdgeRequest, LineageDirection, LineageInfo
from shardbook_server.service.services import Services, build_services
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from shardbook_server.storage import lineage as lineage_rows
from shardbook_server.storage.database import Database
from shardbook_server.storage.lineage import LOCK, Ends
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model, whole
from tests.databases import opened

RESUMED, TUNED, CONVERTED, EVALUATED = LineageKind
UP, DOWN = LineageDirection.UP, LineageDirection.DOWN


def add(services: Services, subject: str, kind: LineageKind, other: str) -> EdgeInfo:
    """Adds an edge."""
    return services.lineage.add(EdgeRequest(subject, kind, other))


def remove(services: Services, subject: str, kind: LineageKind, other: str) -> bool:
    """Removes an edge."""
    return services.lineage.remove(EdgeRequest(subject, kind, other))


def told(edges: tuple[EdgeInfo, ...]) -> list[tuple[str, str, str, int]]:
    """Edges as (subject, kind, object, depth)."""
    return [(edge.subject.ref, edge.kind.label, edge.object.ref, edge.depth) for edge in edges]


def saved(services: Services, run: str, count: int) -> list[CheckpointInfo]:
    """Checkpoints of a run, steps 1 and so on."""
    project, name = run.split("/")
    job = Job(services, Model(1), run=f"projects/{project}/runs/{name}")
    job.start(job_id=run)
    return [job.save(step) for step in range(1, count + 1)]


def test_edges_lead_both_ways_across_runs_and_projects(services: Services) -> None:
    """Base, its fine-tuning, what was converted of it, and an evaluation that has a name only."""
    saved(services, "base/8b", 2)
    saved(services, "chat/8b", 2)
    saved(services, "export/8b", 1)
    add(services, "base/8b@1", RESUMED, "https://hub.example/models/8b")
    add(services, "base/8b@2", RESUMED, "base/8b@1")
    add(services, "chat/8b@1", TUNED, "base/8b@2")
    add(services, "export/8b@1", CONVERTED, "chat/8b@latest")
    add(services, "chat/8b@2", TUNED, "chat/8b@1")
    add(services, "export/8b@1", EVALUATED, "mmlu 5-shot")
    whole = services.lineage.get("chat/8b@1")
    assert told(whole.ancestors) == [
        ("chat/8b@1", "fine_tuned_from", "base/8b@2", 1),
        ("base/8b@2", "resumed_from", "base/8b@1", 2),
        ("base/8b@1", "resumed_from", "https://hub.example/models/8b", 3),
    ]
    assert told(whole.descendants) == [
        ("chat/8b@2", "fine_tuned_from", "chat/8b@1", 1),
        ("export/8b@1", "converted_from", "chat/8b@2", 2),
        ("export/8b@1", "evaluated_by", "mmlu 5-shot", 3),
    ]
    assert ("chat/8b@1", False) == (whole.checkpoint.ref, whole.truncated)
    assert () == services.lineage.get("chat/8b@1", direction=UP).descendants
    assert () == services.lineage.get("chat/8b@1", direction=DOWN).ancestors


def test_an_edge_is_added_and_removed_once(services: Services, clock: Clock) -> None:
    """The same again changes nothing; one that is not there is no error."""
    saved(services, "llm/8b", 2)
    for other in ("llm/8b@1", "a name"):
        first = add(services, "llm/8b@2", TUNED, other)
        clock.advance(5)
        assert first == add(services, "projects/llm/runs/8b/parts/default/checkpoints/2", TUNED, other)
        assert not first.told
        # Another kind is another edge.
        assert first.id != add(services, "llm/8b@2", CONVERTED, other).id
        assert [True, False] == [remove(services, "llm/8b@2", TUNED, other) for _ in range(2)]
    assert 2 == len(services.lineage.list("llm/8b@2").items)


def test_edges_outlive_their_ends(services: Services) -> None:
    """A deleted checkpoint says so at the end of its edges, leads on to what it came from, and takes more by its id."""
    saved(services, "llm/8b", 3)
    add(services, "llm/8b@2", RESUMED, "llm/8b@1")
    add(services, "llm/8b@3", RESUMED, "llm/8b@2")
    services.deletions.delete("llm/8b@2")
    above = services.lineage.get("llm/8b@3").ancestors
    assert [
        ("llm/8b@3", "resumed_from", "llm/8b@2.s1.a1", 1),
        ("llm/8b@2.s1.a1", "resumed_from", "llm/8b@1", 2),
    ] == told(above)
    assert [CheckpointState.DELETED, CheckpointState.COMMITTED] == [edge.object.state for edge in above]
    assert ("llm/8b@2.s1.a1", 1) == (
        services.lineage.get("llm/8b@2.s1.a1").checkpoint.ref,
        len(services.lineage.list("llm/8b@2.s1.a1", direction=DOWN).items),
    )
    with pytest.raises(NotFoundError):
        add(services, "llm/8b@2", EVALUATED, "mmlu")
    assert "mmlu" == add(services, "llm/8b@2.s1.a1", EVALUATED, "mmlu").object.ref
    with pytest.raises(FailedPreconditionError):
        add(services, "llm/8b@1", TUNED, "llm/8b@2.s1.a1")
    services.deletions.undelete("llm/8b@2.s1.a1")
    assert CheckpointState.COMMITTED is services.lineage.get("llm/8b@3").ancestors[0].object.state
    assert remove(services, "llm/8b@3", RESUMED, "llm/8b@2")


@pytest.mark.parametrize("kind", LineageKind)
def test_cycles_are_refused(services: Services, kind: LineageKind) -> None:
    """However long, whatever its kinds; the verdict names the field."""
    saved(services, "llm/8b", 4)
    add(services, "llm/8b@2", RESUMED, "llm/8b@1")
    add(services, "llm/8b@2", EVALUATED, "llm/8b@3")
    add(services, "llm/8b@4", CONVERTED, "llm/8b@3")
    ends = ("llm/8b@1", "llm/8b@4") if kind is not EVALUATED else ("llm/8b@4", "llm/8b@1")
    for subject, other in (ends, ("llm/8b@1", "llm/8b@1")):
        with pytest.raises(FailedPreconditionError) as caught:
            add(services, subject, kind, other)
        assert ("LINEAGE_CYCLE", "object") == (caught.value.reason, caught.value.violations[0].field)
    remove(services, "llm/8b@2", EVALUATED, "llm/8b@3")
    add(services, ends[0], kind, ends[1])


@pytest.mark.parametrize(
    ("subject", "other", "error", "field"),
    [
        ("llm/8b", "llm/8b@1", InvalidArgumentError, "subject"),
        ("llm/8b@9", "llm/8b@1", NotFoundError, ""),
        ("llm/8b@1", "llm/8b@9", NotFoundError, ""),
        ("llm/8b@1", "llm/none@latest", NotFoundError, ""),
        ("llm/8b@1", "projects/llm/runs/8b/parts/default/checkpoints/", InvalidArgumentError, "object"),
        ("llm/8b@1", "", InvalidArgumentError, "object"),
        ("llm/8b@1", "  ", InvalidArgumentError, "object"),
        ("llm/8b@1", "a\nb", InvalidArgumentError, "object"),
        ("llm/8b@1", "\u202eb", InvalidArgumentError, "object"),
        ("llm/8b@1", "x" * (limits.MAX_LINEAGE_NAME_BYTES + 1), InvalidArgumentError, "object"),
        ("llm/8b@1", "https://ada:secret@host/x", InvalidArgumentError, "object"),
        ("llm/8b@1", "see s3://key@bucket/x", InvalidArgumentError, "object"),
        ("llm/8b@1", "https://host/x?X-Amz-Signature=1", InvalidArgumentError, "object"),
        ("llm/8b@5.s1.a1", "llm/8b@1", FailedPreconditionError, "subject"),
        ("llm/8b@1", "llm/8b@5.s1.a1", FailedPreconditionError, "object"),
    ],
)
def test_ends_that_cannot_be(
    services: Services, subject: str, other: str, error: type[ShardbookError], field: str
) -> None:
    """Typed errors that name the field; what might be a password is not repeated."""
    job = Job(services, Model(1))
    job.start()
    job.save(1)
    job.plan(5, whole(job.model))
    with pytest.raises(error) as caught:
        add(services, subject, TUNED, other)
    assert field == (caught.value.violations[0].field if caught.value.violations else "")
    assert "secret" not in str(caught.value)


def test_pages_and_bounds(services: Services) -> None:
    """Pages by token; a walk ends at its depth, and at its edges, and says that there is more."""
    saved(services, "llm/8b", 6)
    for older, younger in itertools.pairwise(range(1, 7)):
        add(services, f"llm/8b@{younger}", RESUMED, f"llm/8b@{older}")
    for number in range(5):
        add(services, "llm/8b@3", EVALUATED, f"evaluation {number}")
    found: list[EdgeInfo] = []
    token = ""
    while True:
        page = services.lineage.list("llm/8b@3", page_size=3, page_token=token)
        found += page.items
        token = page.next_page_token
        if not token:
            break
        assert 3 == len(page.items)
    assert [("llm/8b@3", "llm/8b@2"), ("llm/8b@4", "llm/8b@3")] == [
        (edge.subject.ref, edge.object.ref) for edge in found[:2]
    ]
    assert [f"evaluation {number}" for number in range(5)] == [edge.object.ref for edge in found[2:]]
    assert 1 == len(services.lineage.list("llm/8b@3", direction=UP).items)
    with pytest.raises(InvalidArgumentError):
        services.lineage.list("llm/8b@4", page_token=services.lineage.list("llm/8b@3", page_size=1).next_page_token)

    def shape(max_depth: int = 0, max_edges: int = 0) -> tuple[int, int, bool]:
        info = services.lineage.get("llm/8b@6", max_depth=max_depth, max_edges=max_edges)
        return len(info.ancestors), max(edge.depth for edge in info.ancestors), info.truncated

    assert (5, 5, False) == shape()
    assert (5, 5, False) == shape(max_depth=5, max_edges=5)
    assert (4, 4, True) == shape(max_depth=4)
    assert (3, 3, True) == shape(max_edges=3)
    for name, value in (("max_depth", -1), ("max_depth", limits.MAX_LINEAGE_DEPTH + 1), ("max_edges", 1001)):
        with pytest.raises(InvalidArgumentError) as caught:
            shape(**{name: value})
        assert name == caught.value.violations[0].field


def test_a_walk_ends_soon_where_many_ways_lead_on(services: Services) -> None:
    """Every pair of twelve checkpoints is an edge: 2,048 ways, and every edge comes once."""
    saved(services, "llm/8b", 12)
    for older, younger in itertools.combinations(range(1, 13), 2):
        add(services, f"llm/8b@{younger}", TUNED, f"llm/8b@{older}")
    above = services.lineage.get("llm/8b@12").ancestors
    assert 66 == len({edge.id for edge in above}) == len(above)
    assert sorted(edge.depth for edge in above) == [edge.depth for edge in above]
    assert services.lineage.get("llm/8b@12", max_edges=10).truncated


def test_a_subject_has_so_many_edges(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is full; what others say about it is not counted."""
    monkeypatch.setattr(limits, "MAX_LINEAGE_EDGES", 2)
    saved(services, "llm/8b", 5)
    for younger in (2, 3, 4):
        add(services, f"llm/8b@{younger}", TUNED, "llm/8b@1")
    for name in ("one", "two"):
        add(services, "llm/8b@1", EVALUATED, name)
    with pytest.raises(InvalidArgumentError) as caught:
        add(services, "llm/8b@1", EVALUATED, "three")
    assert ("LIMIT_EXCEEDED", "subject") == (caught.value.reason, caught.value.violations[0].field)
    add(services, "llm/8b@1", EVALUATED, "two")


def test_an_edge_waits_for_one_that_is_being_added(database: Database, services: Services) -> None:
    """Two edges that together close a cycle: whoever comes second sees the first, on either database."""
    one, two = saved(services, "llm/8b", 2)
    with opened(database.url) as other, ThreadPoolExecutor(1) as thread:
        with other.write(lock=LOCK) as connection:
            lineage_rows.insert_edge(connection, Ends(TUNED, one.checkpoint_id, two.checkpoint_id), None, 1)
            second: Future[EdgeInfo] = thread.submit(add, services, "llm/8b@1", TUNED, "llm/8b@2")
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
        with pytest.raises(FailedPreconditionError) as caught:
            second.result(timeout=30)
    assert "LINEAGE_CYCLE" == caught.value.reason


def test_of_two_edges_that_close_a_cycle_one_is_added(database: Database, services: Services) -> None:
    """Added at once through two servers, again and again: exactly one wins."""
    saved(services, "llm/8b", 3)
    add(services, "llm/8b@3", TUNED, "llm/8b@2")
    with opened(database.url) as other, ThreadPoolExecutor(2) as threads:
        servers = (services, build_services(other))
        for _ in range(15):
            together = threading.Barrier(2)

            def race(at: int, together: threading.Barrier = together) -> str:
                subject, older = (("llm/8b@2", "llm/8b@1"), ("llm/8b@1", "llm/8b@3"))[at]
                together.wait(30)
                try:
                    add(servers[at], subject, RESUMED, older)
                except FailedPreconditionError as error:
                    return error.reason
                return ""

            assert ["", "LINEAGE_CYCLE"] == sorted(threads.map(race, range(2)))
            removed = (
                remove(services, "llm/8b@2", RESUMED, "llm/8b@1"),
                remove(services, "llm/8b@1", RESUMED, "llm/8b@3"),
            )
            assert [False, True] == sorted(removed)


class Edges(RuleBasedStateMachine):
    """Random edges among a few checkpoints, held against a set of pairs."""

    COUNT = 6
    NODES = st.integers(1, COUNT)
    KINDS = st.sampled_from(list(LineageKind))

    def __init__(self, services: Services, run: str) -> None:
        super().__init__()
        self.services, self.run = services, run
        self.edges: set[tuple[int, LineageKind, int]] = set()
        self.named: set[tuple[int, LineageKind, str]] = set()

    def ref(self, node: int) -> str:
        """A checkpoint."""
        return f"{self.run}@{node}"

    def older(self, node: int) -> set[int]:
        """What a checkpoint comes from, itself too, by the model."""
        found, left = {node}, [node]
        while left:
            at = left.pop()
            for subject, kind, other in self.edges:
                parent, child = (subject, other) if kind is EVALUATED else (other, subject)
                if child == at and parent not in found:
                    found.add(parent)
                    left.append(parent)
        return found

    @rule(subject=NODES, kind=KINDS, other=NODES)
    def add(self, subject: int, kind: LineageKind, other: int) -> None:
        """An edge is added unless it closes a cycle."""
        parent, child = (subject, other) if kind is EVALUATED else (other, subject)
        closes = child in self.older(parent)
        try:
            add(self.services, self.ref(subject), kind, self.ref(other))
        except FailedPreconditionError as error:
            assert ("LINEAGE_CYCLE", True) == (error.reason, closes)
        else:
            assert not closes
            self.edges.add((subject, kind, other))

    @rule(subject=NODES, kind=KINDS, name=st.sampled_from(["hub", "s3://bucket/x"]))
    def add_named(self, subject: int, kind: LineageKind, name: str) -> None:
        """What has a name only closes no cycle."""
        add(self.services, self.ref(subject), kind, name)
        self.named.add((subject, kind, name))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Any edge goes, and one that is not there."""
        if self.edges:
            subject, kind, other = data.draw(st.sampled_from(sorted(self.edges)))
            assert remove(self.services, self.ref(subject), kind, self.ref(other))
            self.edges.discard((subject, kind, other))
        assert not remove(self.services, self.ref(1), RESUMED, "never added")

    @invariant()
    def both_directions_agree(self) -> None:
        """One is above another exactly where that is below it; nothing is above itself."""
        infos = {node: self.services.lineage.get(self.ref(node)) for node in range(1, self.COUNT + 1)}
        above = {(node, other) for node in infos for other in self._reached(infos[node], up=True)}
        below = {(other, node) for node in infos for other in self._reached(infos[node], up=False)}
        expected = {(node, other) for node in infos for other in self.older(node) - {node}}
        assert expected == above == below
        assert not any(node == other for node, other in above)
        own = [edge for node in infos for edge in self.services.lineage.list(self.ref(node), direction=UP).items]
        own += [edge for node in infos for edge in self.services.lineage.list(self.ref(node), direction=DOWN).items]
        between = [edge for edge in own if edge.object.checkpoint]
        assert 2 * len(self.edges) == len(between)
        assert len(self.named) == len(own) - len(between)

    def _reached(self, info: LineageInfo, *, up: bool) -> set[int]:
        ends = set()
        for edge in info.ancestors if up else info.descendants:
            is_above = (edge.kind is EVALUATED) is not up
            end = edge.object if is_above else edge.subject
            if end.checkpoint:
                ends.add(int(end.ref.rpartition("@")[2]))
        return ends


@pytest.mark.soak_with("postgres")
def test_edges_never_close_a_cycle(services: Services) -> None:
    """A state machine of adds and removes; each run of it has checkpoints of its own."""
    numbers = itertools.count(1)

    def machine() -> Edges:
        run = f"llm/r{next(numbers)}"
        saved(services, run, Edges.COUNT)
        return Edges(services, run)

    some = settings(
        max_examples=8,
        stateful_step_count=12,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    make: Callable[[], RuleBasedStateMachine] = machine
    run_state_machine_as_test(make, settings=some)  # type: ignore[arg-type]
