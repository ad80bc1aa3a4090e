"""What bad input gets: a typed error with status, reason and field; never INTERNAL, and nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from google.protobuf.duration_pb2 import Duration

from shardbook.core import limits
from shardbook.errors import ShardbookError
from shardbook.v1 import catalog_pb2, metadata_pb2, retention_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.rpc.api import Api, Job, Payload, Shard, fields, payload, refusal, row


def _said(error: ShardbookError) -> tuple[str, str, list[str]]:
    return error.status, error.reason, fields(error)


def _box(first: int, count: int, *, rows: int = 8, dtype: str = "float32") -> Payload:
    """A rank's rows of one tensor."""
    return payload([Shard("layer.w", (rows, 3), (first, 0), (count, 3), dtype)])


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (_box(0, 4), _box(3, 5), "GEOMETRY_OVERLAP"),
        (_box(0, 4), _box(5, 3), "GEOMETRY_HOLE"),
        (_box(0, 4), _box(4, 5), "GEOMETRY_OUT_OF_BOUNDS"),
        (_box(0, 4), _box(4, 4, dtype="bfloat16"), "GEOMETRY_DISAGREEMENT"),
        (_box(0, 4), _box(4, 4, rows=9), "GEOMETRY_DISAGREEMENT"),
    ],
    ids=["overlap", "hole", "bounds", "dtype", "size"],
)
def test_chunks_that_make_no_tensor_fail_the_commit(
    api: Api, run: str, first: Payload, second: Payload, reason: str
) -> None:
    """Rule: FAILED_PRECONDITION naming the tensor; the attempt is FAILED for good and nothing of it is visible."""
    job = Job.start(api, run)
    error = refusal(lambda: job.save(1, [first, second]))
    assert ("FAILED_PRECONDITION", reason) == (error.status, error.reason)
    assert "layer.w" in error.message
    assert types_pb2.CHECKPOINT_STATE_FAILED == job.progress().progress.state
    assert "NOT_FOUND" == refusal(lambda: _get(api, job, "latest")).status
    assert "CHECKPOINT_CLOSED" == refusal(job.commit).reason
    assert types_pb2.CHECKPOINT_STATE_COMMITTED == job.save(2).state


def _get(api: Api, job: Job, checkpoint: str) -> types_pb2.Checkpoint:
    name = f"{job.run}/parts/default/checkpoints/{checkpoint}"
    return api.catalog.GetCheckpoint(catalog_pb2.GetCheckpointRequest(name=name)).checkpoint


# ------------------------------------------------------------------ sessions


def _fenced(job: Job) -> Job:
    Job.start(job.api, job.run)
    return job


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_fenced, "SESSION_FENCED"),
        (lambda job: replace(job, session=job.session + 1), "SESSION_UNKNOWN"),
        (lambda job: replace(job, incarnation=os.urandom(16)), "SESSION_UNKNOWN"),
        (lambda job: replace(job, run=job.run + "-other"), "SESSION_UNKNOWN"),
    ],
    ids=["fenced", "number", "incarnation", "run"],
)
def test_writes_of_a_session_that_is_not_current_are_refused(
    api: Api, run: str, change: Callable[[Job], Job], reason: str
) -> None:
    """Rule: number and incarnation both count, in every call that writes."""
    old = Job.start(api, run)
    what = old.rows()
    for rank in range(2):
        old.register(rank, what[rank])
    job = change(old)
    failure = types_pb2.RankFailure(rank=0, phase="write", reason="disk")
    report = pb.ReportFailureRequest(key=job.key(2), location=job.location(2), failure=failure)
    alive = pb.KeepAliveRequest(run=job.run, session=job.session, incarnation=job.incarnation)
    for call in (
        lambda: api.registration.PlanSave(job.plan_request(0, what[0], step=2)),
        lambda: api.registration.RegisterShards(job.register_request(0, what[0], step=2)),
        lambda: api.registration.ReportFailure(report),
        lambda: api.registration.KeepAlive(alive),
    ):
        error = refusal(call)
        assert ("FAILED_PRECONDITION", reason) == (error.status, error.reason)
    for closing in (job.commit, lambda: api.registration.AbortCheckpoint(pb.AbortCheckpointRequest(key=job.key()))):
        error = refusal(closing)
        # A commit looks for the attempt first: under another identity there is none.
        assert error.reason in (reason, "NOT_FOUND", "CHECKPOINT_CLOSED")
    assert "NOT_FOUND" == refusal(lambda: _get(api, old, "latest")).status


def test_session_0_is_refused_in_calls_of_a_running_save(api: Api, run: str) -> None:
    """Rule: 0 is for attempts made offline, which only RecordCheckpoint takes."""
    job = replace(Job.start(api, run), session=0)
    error = refusal(lambda: api.registration.RegisterShards(job.register_request(0, job.rows()[0])))
    assert ("INVALID_ARGUMENT", ["key.session"]) == (error.status, fields(error))


# ------------------------------------------------------------------ one attempt, one story


def test_calls_of_one_attempt_agree_on_world_size_and_place(api: Api, run: str) -> None:
    """Rule: the first call sets them; another value is INVALID_ARGUMENT with its field."""
    job = Job.start(api, run)
    what = job.rows()[0]
    job.register(0, what)
    for field, change in (
        ("key.world_size", {"world_size": 3}),
        ("location.location", {"location": "/elsewhere"}),
        ("location.prefix", {"prefix": "other-a1"}),
    ):
        request = job.register_request(0, what)
        message = request.key if field.startswith("key") else request.location
        for name, value in change.items():
            setattr(message, name, value)
        error = refusal(api.registration.RegisterShards, request)
        assert ("INVALID_ARGUMENT", "ATTEMPT_MISMATCH", [field]) == _said(error)


@pytest.mark.parametrize("rank", [2, 1_000_000, -1, 2**31 - 1])
def test_a_rank_out_of_range_is_refused(api: Api, run: str, rank: int) -> None:
    """Rule: 0 to world_size - 1."""
    job = Job.start(api, run)
    what = job.rows()[0]
    plan = refusal(lambda: api.registration.PlanSave(job.plan_request(rank, what)))
    shards = refusal(lambda: api.registration.RegisterShards(job.register_request(rank, what)))
    failure = types_pb2.RankFailure(rank=rank, phase="write")
    report = pb.ReportFailureRequest(key=job.key(), location=job.location(), failure=failure)
    failed = refusal(api.registration.ReportFailure, report)
    assert {"INVALID_ARGUMENT"} == {plan.status, shards.status, failed.status}
    assert [["rank"], ["registration.rank"], ["failure.rank"]] == [fields(plan), fields(shards), fields(failed)]


def test_a_rank_that_says_something_else_is_refused_and_the_same_again_is_fine(api: Api, run: str) -> None:
    """Rule: idempotent by natural key: same content OK with the same answer, other content ALREADY_EXISTS."""
    job = Job.start(api, run)
    one, other = payload([row("a", 0, 2)]), payload([row("b", 0, 2)])
    for what in (one, one):
        assert pb.PlanSaveResponse.STATE_WAITING == job.plan(0, what).state
        assert not job.register(0, what).unknown
    assert ("ALREADY_EXISTS", "ALREADY_EXISTS", ["plan_digest"]) == _said(refusal(lambda: job.plan(0, other)))
    error = refusal(lambda: job.register(0, other))
    assert ("ALREADY_EXISTS", ["registration"]) == (error.status, fields(error))
    assert 1 == job.progress().progress.registered_count


def test_missing_ranks_are_named_with_their_hosts(api: Api, run: str) -> None:
    """Rule: RANKS_MISSING has the first 50 and the count; hosts are known for ranks that planned."""
    job = replace(Job.start(api, run), world_size=80)
    what = job.rows()
    for rank in (0, 1, 3):
        job.plan(rank, what[rank])
    job.register(0, what[0])
    error = refusal(job.commit)
    assert ("FAILED_PRECONDITION", "RANKS_MISSING") == (error.status, error.reason)
    assert "79" == error.metadata["missing_count"]
    assert str(list(range(1, 51))).replace(" ", "") == error.metadata["ranks"]
    assert error.metadata["hosts"].startswith('["n1","","n3",""')
    assert "truncated" not in error.metadata


def test_a_failed_rank_fails_the_commit_at_once(api: Api, run: str) -> None:
    """Rule: RANK_FAILED with rank, host and phase, although a wait was asked for."""
    job = Job.start(api, run)
    job.register(0, job.rows()[0])
    failure = types_pb2.RankFailure(rank=1, host="n1", phase="write", reason="no space\x00left")
    request = pb.ReportFailureRequest(key=job.key(), location=job.location(), failure=failure)
    assert types_pb2.CHECKPOINT_STATE_FAILED == api.registration.ReportFailure(request).state
    error = refusal(lambda: job.commit(wait_s=20))
    assert ("FAILED_PRECONDITION", "RANK_FAILED") == (error.status, error.reason)
    assert {"rank": "1", "host": "n1", "phase": "write"}.items() <= error.metadata.items()
    request.failure.phase = "lunch"
    assert ["failure.phase"] == fields(refusal(api.registration.ReportFailure, request))


# ------------------------------------------------------------------ numbers and names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", -(2**63)),
        ("session", -1),
        ("attempt", 0),
        ("attempt", -1),
        ("world_size", 0),
        ("world_size", -1),
        ("world_size", limits.MAX_WORLD_SIZE + 1),
        ("incarnation", b""),
        ("incarnation", b"x" * 15),
        ("incarnation", bytes(16)),
    ],
)
def test_a_key_out_of_range_names_its_field(api: Api, run: str, field: str, value: object) -> None:
    """Rule: every part of the key has a range; the error has the path of the one that is wrong."""
    job = Job.start(api, run)
    request = job.register_request(0, job.rows()[0])
    setattr(request.key, field, value)
    error = refusal(api.registration.RegisterShards, request)
    assert ("INVALID_ARGUMENT", [f"key.{field}"]) == (error.status, fields(error))


NAMES = ["", "a\x00b", "a\nb", "../x", "a/b", "a%2fb", "a\u202eb", "x" * 10_240, "-a", "\u00e9", "a b", "<script>"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_none_are_refused_everywhere(api: Api, run: str, name: str) -> None:
    """Rule: projects, runs and parts are letters, digits, dots, dashes and underscores; same verdict in every call."""
    resource = f"projects/test/runs/{name}"
    job = replace(Job(api, resource), session=1)
    start = pb.StartSessionRequest(run=resource, incarnation=b"x" * 16)
    assert ["run"] == fields(refusal(api.registration.StartSession, start))
    request = job.register_request(0, job.rows()[0])
    assert ["key.run"] == fields(refusal(api.registration.RegisterShards, request))
    get = catalog_pb2.GetRunRequest(name=resource)
    assert ("INVALID_ARGUMENT", ["name"]) == _said(refusal(api.catalog.GetRun, get))[::2]
    if name:
        part = pb.StartSessionRequest(run=run, part=name, incarnation=b"x" * 16)
        assert ["part"] == fields(refusal(api.registration.StartSession, part))
        status = pb.GetRunStatusRequest(run=run, part=name)
        assert ["part"] == fields(refusal(api.registration.GetRunStatus, status))
    assert ["run"] == fields(refusal(api.registration.GetRunStatus, pb.GetRunStatusRequest(run=resource)))
    checkpoint = metadata_pb2.GetMetadataRequest(name=f"{run}/parts/default/checkpoints/{name}")
    assert ["name"] == fields(refusal(lambda: next(api.metadata.GetMetadata(checkpoint))))


@pytest.mark.parametrize(
    "given", [Duration(seconds=2**62), Duration(seconds=60, nanos=-1), Duration(seconds=60, nanos=2_000_000_000)]
)
def test_a_duration_is_one(api: Api, run: str, given: Duration) -> None:
    """Rule: parts that no duration has are refused wherever one is given, and the field is named."""
    name = f"{run}/parts/default/checkpoints/1.s1.a1"
    hold = retention_pb2.HoldCheckpointRequest(name=name, holder="eval", ttl=given)
    assert ["ttl"] == fields(refusal(api.catalog.HoldCheckpoint, hold))
    policy = retention_pb2.RetentionPolicy(newer_than=given)
    stored = retention_pb2.SetRetentionPolicyRequest(name=f"{run}/parts/-", policy=policy)
    assert ["policy.newer_than"] == fields(refusal(api.catalog.SetRetentionPolicy, stored))
    start = pb.StartSessionRequest(run=run, incarnation=b"x" * 16, wait=given)
    assert ["wait"] == fields(refusal(api.registration.StartSession, start))


def test_an_age_is_a_time_that_a_job_can_have(api: Api, run: str) -> None:
    """Rule: the age of an incarnation, and the session that its job has seen, are not negative."""
    for age in (Duration(seconds=-1), Duration(nanos=-1), Duration(seconds=2**40), Duration(seconds=2**62)):
        request = pb.StartSessionRequest(run=run, incarnation=b"x" * 16, age=age)
        assert ["age"] == fields(refusal(api.registration.StartSession, request))
    known = pb.StartSessionRequest(run=run, incarnation=b"x" * 16, known_session=-1)
    assert ["known_session"] == fields(refusal(api.registration.StartSession, known))


@pytest.mark.parametrize("field", ["job_id", "host", "user"])
@pytest.mark.parametrize("text", ["a\x00b", "a\nb", "a\u202eb", "x" * 10_240])
def test_labels_are_one_short_printable_line(api: Api, run: str, field: str, text: str) -> None:
    """Rule: what people read on a terminal has no control or formatting characters."""
    request = pb.StartSessionRequest(run=run, incarnation=b"x" * 16)
    setattr(request, field, text)
    error = refusal(api.registration.StartSession, request)
    assert ("INVALID_ARGUMENT", [field]) == (error.status, fields(error))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("location", ""),
        ("location", "s3://user:secret@bucket/x"),
        ("location", "/a\x00b"),
        ("location", "/" + "x" * 5000),
        ("prefix", "../other"),
        ("prefix", "/absolute"),
        ("prefix", "a//b"),
        ("prefix", "a/"),
    ],
)
def test_a_place_must_be_storable(api: Api, run: str, field: str, text: str) -> None:
    """Rule: no credentials, no way out of the directory."""
    job = Job.start(api, run)
    request = job.register_request(0, job.rows()[0])
    setattr(request.location, field, text)
    error = refusal(api.registration.RegisterShards, request)
    assert ("INVALID_ARGUMENT", [f"location.{field}"]) == (error.status, fields(error))
    assert "secret" not in error.message


def test_numbers_that_are_no_member_of_an_enum_are_refused(api: Api, run: str) -> None:
    """Rule: an enum of a newer client is an error that says what is known, not a guess."""
    job = Job.start(api, run)
    start = pb.StartSessionRequest(run=run, incarnation=b"x" * 16, on_live=99)  # type: ignore[arg-type]
    assert ["on_live"] == fields(refusal(api.registration.StartSession, start))
    progress = pb.GetCheckpointProgressRequest(key=job.key(), until=99)  # type: ignore[arg-type]
    assert ["until"] == fields(refusal(api.registration.GetCheckpointProgress, progress))
    for kind in (0, 99):
        request = job.register_request(0, job.rows()[0])
        request.blobs.add(kind=kind, payload=b"x")
        assert ["blobs[0].kind"] == fields(refusal(api.registration.RegisterShards, request))


# ------------------------------------------------------------------ catalogue and records


def test_pages_have_sizes_and_tokens_of_their_own(api: Api, run: str) -> None:
    """Rule: a negative size or a token that was not made for this listing is INVALID_ARGUMENT."""
    job = Job.start(api, run)
    job.save(1)
    job.save(2)
    parent = f"{run}/parts/default"
    listing = api.catalog.ListCheckpoints(catalog_pb2.ListCheckpointsRequest(parent=parent, page_size=1))
    token = listing.next_page_token
    assert token
    refused = [
        refusal(lambda: api.catalog.ListRuns(catalog_pb2.ListRunsRequest(parent="projects/-", page_size=-1))),
        refusal(lambda: api.catalog.ListRuns(catalog_pb2.ListRunsRequest(parent="projects/-", page_token=token))),
        refusal(lambda: api.catalog.ListRuns(catalog_pb2.ListRunsRequest(parent="nothing"))),
        refusal(
            lambda: api.metadata.ListTensors(
                metadata_pb2.ListTensorsRequest(parent=f"{parent}/checkpoints/1", page_token="\u00e9")
            )
        ),
    ]
    assert {"INVALID_ARGUMENT"} == {error.status for error in refused}
    assert [["page_size"], ["page_token"], ["parent"], ["page_token"]] == [fields(error) for error in refused]


def test_what_is_not_there_is_not_found(api: Api, run: str) -> None:
    """Rule: NOT_FOUND for a well-formed name of nothing, also for an attempt that nobody has begun."""
    job = Job.start(api, run)
    calls: list[Callable[[], object]] = [
        lambda: api.catalog.GetRun(catalog_pb2.GetRunRequest(name=run + "-other")),
        lambda: api.registration.GetRunStatus(pb.GetRunStatusRequest(run=run + "-other")),
        lambda: api.registration.GetRunStatus(pb.GetRunStatusRequest(run=run, part="other")),
        lambda: _get(api, job, "7"),
        lambda: _get(api, job, "latest"),
        lambda: next(
            api.metadata.GetMetadata(metadata_pb2.GetMetadataRequest(name=f"{run}/parts/default/checkpoints/1"))
        ),
        job.progress,
        job.commit,
    ]
    assert {"NOT_FOUND"} == {refusal(call).status for call in calls}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"registration_count": 0}, "registration_count"),
        ({"registration_count": -1}, "registration_count"),
        ({"session": 0}, "key.session"),
        ({"ranks": [0, 0]}, "registrations"),
        ({"ranks": [0, 2]}, "registrations[1].rank"),
        ({"ranks": [0, -1]}, "registrations[1].rank"),
        ({"count": limits.MAX_RECORD_REGISTRATIONS + 1}, "registrations"),
        ({"digest": b"short"}, "registrations[0].structure_digest"),
        ({"header": bytes(limits.MAX_EXTENTS_BYTES + 1)}, "metadata_header"),
        ({"write_time": -1}, "write_time"),
    ],
)
def test_a_record_is_judged_like_the_calls_it_stands_for(
    api: Api, run: str, change: dict[str, object], field: str
) -> None:
    """Rule: the same checks, with paths into the list of registrations."""
    job = Job.start(api, run)
    what = job.rows()[0]
    request = pb.RecordCheckpointRequest(key=job.key(), location=job.location(), registration_count=2)
    digest = change.get("digest", what.structure_digest)
    ranks = change.get("ranks", range(int(str(change.get("count", 1)))))
    assert isinstance(ranks, list | range)
    for rank in ranks:
        request.registrations.add(rank=rank, structure_digest=digest, extents=what.extents)
    if "registration_count" in change:
        request.registration_count = int(str(change["registration_count"]))
    if "session" in change:
        request.key.session = 0
    if "header" in change:
        request.metadata_header = bytes(limits.MAX_EXTENTS_BYTES + 1)
    if "write_time" in change:
        request.write_time.seconds = -1
    error = refusal(api.registration.RecordCheckpoint, request)
    assert ("INVALID_ARGUMENT", [field]) == (error.status, fields(error))
