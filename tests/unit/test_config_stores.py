"""Locations: what the catalogue records for a directory, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.errors import InvalidArgumentError
from shardbook.stores import Stores, normalized

STORES = Stores(
    {
        "lustre": "/lustre/ckpt",
        "deep": "/lustre/ckpt/team",
        "s3-eu": "s3://bucket/eu/",
        "az": "abfss://box@acct.example/r",
    }
)


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/lustre/ckpt/run/step-1", "lustre:run/step-1"),
        ("/lustre/ckpt/run/step-1/", "lustre:run/step-1"),
        ("/lustre/ckpt/run/../run/./step-1", "lustre:run/step-1"),
        ("/lustre/ckpt/team/step-1", "deep:step-1"),
        ("/lustre/ckpt", "lustre:."),
        ("/lustre/ckpt-old/step-1", "/lustre/ckpt-old/step-1"),
        ("file:///lustre/ckpt/x", "lustre:x"),
        ("/elsewhere/step-1", "/elsewhere/step-1"),
        ("//elsewhere", "/elsewhere"),
        ("s3://bucket/eu/run/step-1/", "s3-eu:run/step-1"),
        ("s3://key:secret@bucket/eu/run", "s3-eu:run"),
        ("s3://bucket/other", "s3://bucket/other"),
        ("s3://key:secret@bucket/other", "s3://bucket/other"),
        ("sftp://me@host:22/dir", "sftp://host:22/dir"),
        ("https://host/dir?X-Amz-Signature=abc#frag", "https://host/dir"),
        ("s3://bucket/what?#really", "s3://bucket/what?#really"),
        ("abfss://box@acct.example/r/step", "az:step"),
        ("abfss://box:key@acct.example/r/step", "az:step"),
        ("zip://a.zip::s3://k:s@bucket/x", "zip://a.zip::s3://bucket/x"),
    ],
)
def test_location_of(path: str, location: str) -> None:
    """Below a root `store:relative`, the longest root first; else the plain path or URL without credentials."""
    assert location == STORES.location_of(path)


def test_relative_path_is_taken_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded means the same from any directory; links are kept, since other hosts mount them elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert f"{tmp_path}/link/step-1" == Stores().location_of(Path("link/step-1"))


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_location_and_path_are_inverse(name: str) -> None:
    """Every path below a store comes back from its location."""
    path = f"/lustre/ckpt/a/{name}/b"
    assert normalized(path) == STORES.path_of(STORES.location_of(path))


@pytest.mark.parametrize("path", ["/lustre/ckpt", "s3://bucket/eu", "s3://bucket/other", "/elsewhere"])
def test_roots_and_strangers_come_back_too(path: str) -> None:
    """The root itself, and what is below no root."""
    assert path == STORES.path_of(STORES.location_of(path))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("unknown:run/step", "UNKNOWN_STORE"),
        ("lustre:../../etc", "INVALID_LOCATION"),
        ("lustre:/etc", "INVALID_LOCATION"),
    ],
)
def test_location_that_means_nothing_here_is_refused(location: str, reason: str) -> None:
    """A store this machine lacks is named with the setting to add; a location never leaves its store."""
    with pytest.raises(InvalidArgumentError) as caught:
        STORES.path_of(location)
    assert reason == caught.value.reason


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("s3", "s3://key:secret@bucket/x"),
        ("sftp", "sftp://me@host/x"),
        ("web", "https://host/x?sig=secret"),
        ("az", "abfss://box:secret@acct.example/x"),
        ("Upper", "/x"),
        ("a/b", "/x"),
        ("", "/x"),
        ("rel", "relative/path"),
        ("none", ""),
    ],
)
def test_bad_store_is_refused_without_repeating_secrets(name: str, root: str) -> None:
    """Credentials, odd names and relative roots are configuration errors; the message shows no secret."""
    with pytest.raises(InvalidArgumentError) as caught:
        Stores({name: root})
    assert "secret" not in str(caught.value)
