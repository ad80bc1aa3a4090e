"""Locations never hold credentials and never lead out of their place, on both sides, and no message repeats them."""

from __future__ import annotations

import logging
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook._moving import Move
from shardbook.core.uris import check_stays_inside, credentials_in
from shardbook.errors import InvalidArgumentError
from shardbook.moving.places import Place, relative_to, target_of
from shardbook.stores import Stores, check_location
from shardbook_server.service.checks import check_location as server_check
from shardbook_server.service.locations import Move as ServerMove

NAME = "projects/llm/runs/8b/parts/default/checkpoints/1.s1.a1"
_WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=8).filter(
    lambda word: ".." not in word
)
_SCHEMES = st.sampled_from(["s3", "gs", "https", "sftp", "hdfs", "simplecache::s3", "zip://a.zip::s3"])
_PARAMETERS = st.sampled_from(
    [
        "X-Amz-Signature",
        "X-Amz-Credential",
        "X-Amz-Security-Token",
        "x-goog-signature",
        "sig",
        "token",
        "access_token",
        "aws_secret_access_key",
        "AWSAccessKeyId",
        "key",
        "password",
        "Authorization",
        "api-key",
        "account_key",
    ]
)
#: No part of a message of ours.
SECRET = "zq7XwSECRETwX7qz"


@st.composite
def _with_credentials(draw: st.DrawFn) -> str:
    """A URL with a secret in one of the places where people put them."""
    scheme, host, path = draw(_SCHEMES), draw(_WORDS), "/".join(draw(st.lists(_WORDS, min_size=1, max_size=3)))
    if draw(st.booleans()):
        user = draw(st.sampled_from([f"me:{SECRET}", SECRET, f":{SECRET}", f"{SECRET}:x"]))
        return f"{scheme}://{user}@{host}/{path}"
    query = f"{draw(st.sampled_from(['', 'part=1&']))}{draw(_PARAMETERS)}={SECRET}"
    mark = draw(st.sampled_from(["?", "#"]))
    url = f"{scheme}://{host}/{path}{mark}{query}"
    return f"{scheme}://{host}/{path}?url={quote(url, safe='')}" if draw(st.booleans()) else url


@given(_with_credentials())
def test_credentials_are_refused_on_both_sides(url: str) -> None:
    """Typed, with field and reason; neither a message nor a log repeats them."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        for field, refuse in (
            ("location", lambda: check_location(url)),
            ("location.location", lambda: server_check(url, "location.location")),
            ("to_location", lambda: Move(NAME, "/a", url)),
            ("to_location", lambda: ServerMove(NAME, "/a", url)),
            ("to", lambda: target_of(url, Stores({"s": "/s"}))),
            ("stores", lambda: Stores({"s": url.rpartition("::")[2]})),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                refuse()
            assert ("CREDENTIALS_IN_URI", [field]) == (
                caught.value.reason,
                [violation.field for violation in caught.value.violations],
            )
            assert SECRET not in repr(caught.value) + str(caught.value.violations)
    finally:
        logging.getLogger().removeHandler(handler)
    assert not any(SECRET in line for line in heard)


@given(_SCHEMES, _WORDS, st.lists(_WORDS, min_size=1, max_size=4))
def test_what_has_none_is_taken_by_both(scheme: str, host: str, path: list[str]) -> None:
    """Also where a path has an at-sign, or a parameter that is no secret."""
    url = f"{scheme}://{host}/{'/'.join(path)}/a@b?versionId=1"
    assert url == check_location(url) == server_check(url, "location")
    # A local directory may be called anything.
    assert credentials_in(f"/data/{'/'.join(path)}?token={SECRET}") is None


@pytest.mark.parametrize("url", ["abfss://box@account.example/x", "wasbs://box@account.example/x"])
def test_a_container_is_no_user(url: str) -> None:
    """Azure writes one where others write a user; its key is one all the same."""
    assert url == server_check(url, "location")
    with pytest.raises(InvalidArgumentError):
        server_check(url.replace("box@", f"box:{SECRET}@"), "location")


@pytest.mark.parametrize(
    "location",
    [
        "lustre:../x",
        "lustre:a/../../x",
        "lustre:/etc",
        "lustre:%2e%2e/x",
        "lustre:a/%2E%2E/x",
        "lustre:%2Fetc",
        "/data/../etc",
        "s3://bucket/../other",
        "s3://bucket/%2e%2e/other",
    ],
)
def test_ways_out_are_refused(location: str) -> None:
    """Whatever they are quoted as, on both sides."""
    for refuse in (
        lambda: check_stays_inside(location, "location"),
        lambda: server_check(location, "location"),
        lambda: Move(NAME, "/a", location),
        lambda: Place.parse(location, "to"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            refuse()
        assert "INVALID_LOCATION" == caught.value.reason


@pytest.mark.parametrize("location", ["lustre:a..b/..c", "/data/%2e%2e/x", "s3://bucket/a...b", "lustre:.", "C:/x"])
def test_names_with_dots_are_names(location: str) -> None:
    """Of a local directory a quoted dot is one, too."""
    if location != "C:/x":
        assert location == check_stays_inside(location, "location")
    assert location == server_check(location, "location")


STORES = Stores({"lustre": "/lustre", "archive": "/archive", "s3": "s3://bucket/eu"})


@pytest.mark.parametrize(
    ("location", "source", "relative"),
    [
        ("lustre:ckpt/8b/step-1", None, "ckpt/8b/step-1"),
        ("far:ckpt/8b/step-1", None, "ckpt/8b/step-1"),
        ("/lustre/ckpt/step-1", None, "ckpt/step-1"),
        ("lustre:.", None, ""),
        ("/data/step-1", None, None),
        ("lustre:ckpt/8b/step-1", "lustre/ckpt", "8b/step-1"),
        ("lustre:ckpt/8b/step-1", "lustre:ckpt/8b/step-1", ""),
        ("lustre:ckpt-old/step-1", "lustre/ckpt", None),
        ("far:ckpt/step-1", "lustre/ckpt", None),
        ("/data/ckpt/step-1", "/data/", "ckpt/step-1"),
        ("/database/step-1", "/data", None),
        ("lustre:ckpt/step-1", "/lustre/ckpt", "step-1"),
        ("s3://other/a/step-1", "s3://other/a", "step-1"),
        ("far:x/step-1", "/data", None),
    ],
)
def test_what_was_copied_along(location: str, source: str | None, relative: str | None) -> None:
    """Below ``--from`` everything keeps its place; nothing else moves."""
    place = None if source is None else Place.parse(source, "from")
    assert relative == relative_to(location, place, STORES)


@pytest.mark.parametrize(
    ("text", "relative", "location"),
    [
        ("archive", "8b/step-1", "archive:8b/step-1"),
        ("archive/cold/", "8b/step-1", "archive:cold/8b/step-1"),
        ("archive:cold", "", "archive:cold"),
        ("archive", "", "archive:."),
        ("s3", "step-1", "s3:step-1"),
    ],
)
def test_where_it_is_then(text: str, relative: str, location: str) -> None:
    """``STORE``, ``STORE/PATH`` and ``STORE:PATH``."""
    assert location == target_of(text, STORES).location(relative)


@pytest.mark.parametrize("text", ["nowhere", "nowhere/x", "/archive/x", "s3://bucket/eu"])
def test_a_target_is_a_store_that_is_configured(text: str) -> None:
    """The error names the setting, and what to type next."""
    with pytest.raises(InvalidArgumentError) as caught:
        target_of(text, STORES)
    assert "UNKNOWN_STORE" == caught.value.reason
    assert "SHARDBOOK_STORES" in caught.value.message
    assert "`shardbook stores`" in caught.value.message


def test_every_location_that_means_something_here_in_order() -> None:
    """Others are left out; when none does, the first one's store is named."""
    assert ("/archive/x", "/lustre/x") == STORES.paths_of(["far:x", "archive:x", "lustre:x"])
    with pytest.raises(InvalidArgumentError, match="SHARDBOOK_STORES=far=ROOT") as caught:
        STORES.paths_of(["far:x", "near:x"])
    assert "UNKNOWN_STORE" == caught.value.reason
