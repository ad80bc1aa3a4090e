"""The cache on disk: bounded, whole or not at all, and never a reason to fail."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook import _disk_cache
from shardbook._disk_cache import ENTRY_BYTES, DiskCache, cache_directory

_LARGE = 1 << 30


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    """A cache that is not there yet."""
    return DiskCache(str(tmp_path / "not" / "there"), _LARGE)


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is as a process of its own to the log."""
    monkeypatch.setattr(_disk_cache, "_told", set())


def taken_bytes(cache: DiskCache) -> int:
    """What the entries take, as the bound counts it; other files are empty or of a fixed size."""
    entries = [path for path in cache.root.glob("*/*") if path.name != "lock"]
    return sum(path.stat().st_size + ENTRY_BYTES for path in entries)


def test_what_was_put_is_there_for_every_process(cache: DiskCache) -> None:
    """In the order in which it was given, empty payloads too; other names of the group are other entries."""
    assert (False, None) == (cache.holds("g"), cache.get("g", "a"))
    cache.put("g", "a", [b"one", b"", b"two"])
    cache.put("g", "b", [])
    again = DiskCache(cache.directory, _LARGE)
    assert [b"one", b"", b"two"] == again.get("g", "a")
    assert [] == again.get("g", "b")
    assert (True, False) == (again.holds("g"), again.holds("h"))
    cache.drop("g", "a")
    assert again.get("g", "a") is None


def test_only_its_user_can_look_into_it(cache: DiskCache) -> None:
    """Neither directories nor files are for others."""
    cache.put("g", "a", [b"x"])
    made = [cache.root, *cache.root.rglob("*")]
    assert {0} == {path.stat().st_mode & 0o077 for path in made}


@given(
    st.sampled_from([0, 1, 2, 4, 7, 12]).map(lambda count: count * ENTRY_BYTES),
    st.lists(st.sampled_from([0, 1, 1000, ENTRY_BYTES, 9000, 4 * ENTRY_BYTES]), min_size=4, max_size=10),
    st.lists(st.tuples(st.sampled_from([True, True, False]), st.integers(0, 9)), min_size=8, max_size=24),
)
def test_it_never_takes_more_than_it_may(max_bytes: int, sizes: list[int], steps: list[tuple[bool, int]]) -> None:
    """Whatever is put and asked for. What is found is what was put, and what fits and was just put is found."""
    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(folder, max_bytes)
        for is_put, drawn in steps:
            key = drawn % len(sizes)
            group, name, content = f"g{key % 3}", f"n{key}", [bytes([key]) * sizes[key]]
            if is_put:
                cache.put(group, name, content)
            found = cache.get(group, name)
            assert found in (None, content)
            if is_put and sizes[key] + 2 * ENTRY_BYTES <= max_bytes:  # what frames it is far smaller than a block
                assert content == found
            assert not cache.root.exists() or taken_bytes(cache) <= max_bytes


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    """Looked at counts as used; folders of groups that are empty go with their entries."""
    cache = DiskCache(str(tmp_path), 8 * 2 * ENTRY_BYTES)
    for number in range(7):
        cache.put(f"g{number}", "a", [bytes(ENTRY_BYTES - 200)])
    assert cache.get("g0", "a") is not None
    for number in range(7, 11):
        cache.put(f"g{number}", "a", [bytes(ENTRY_BYTES - 200)])
    kept = [number for number in range(11) if cache.holds(f"g{number}")]
    assert {0, 10} <= set(kept)
    assert 4 <= len(kept) <= 8
    assert kept[1:] == list(range(kept[1], 11))
    assert sorted(f"g{number}" for number in kept) == sorted(
        path.name for path in cache.root.iterdir() if path.is_dir()
    )


@pytest.mark.parametrize("where", [0, 5, 8, 20, 39, 40, 44, -1])
def test_a_damaged_entry_is_none(cache: DiskCache, where: int) -> None:
    """A changed byte, an early end and another entry's content: removed, and kept again when it comes again."""
    cache.put("g", "a", [b"content of a"])
    cache.put("g", "b", [b"content of b"])
    path = cache.root / "g" / "a"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[where] ^= 1
    for damaged in (bytes(changed), whole[:where], whole + b"\0", b"", (cache.root / "g" / "b").read_bytes()):
        path.write_bytes(damaged)
        assert cache.get("g", "a") is None
        assert not path.exists()
        cache.put("g", "a", [b"content of a"])
        assert [b"content of a"] == cache.get("g", "a")


@pytest.mark.parametrize("noted", [None, b"", b"garbage", b"-1", b"0" * 20])
def test_a_usage_that_is_not_known_is_found_out(tmp_path: Path, noted: bytes | None) -> None:
    """Somebody removed or spoiled the file. One that says too little is made good by the next that fills the cache."""
    cache = DiskCache(str(tmp_path), 6 * ENTRY_BYTES)
    cache.put("g", "a", [bytes(ENTRY_BYTES)])
    if noted is None:
        (cache.root / "usage").unlink()
    else:
        (cache.root / "usage").write_bytes(noted)
    for number in range(8):
        cache.put("g", f"b{number}", [bytes(ENTRY_BYTES)])
    assert taken_bytes(cache) <= 6 * ENTRY_BYTES
    assert cache.get("g", "b7") is not None


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """When room is made; nobody ever takes it for an entry."""
    cache = DiskCache(str(tmp_path), 4 * ENTRY_BYTES)
    cache.put("g", "a", [b"x"])
    (cache.root / "g" / ".new-half").write_bytes(bytes(100))
    (cache.root / "h").mkdir()
    (cache.root / "h" / ".new-other").write_bytes(bytes(100))
    assert not cache.holds("h")
    for number in range(6):
        cache.put("g", f"b{number}", [bytes(100)])
    assert not list(cache.root.rglob(".new-*"))
    assert not (cache.root / "h").exists()


# ------------------------------------------------------------------ disks that do not work


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged for people."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@contextmanager
def a_full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 8 KiB meanwhile, which every write is told as an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_miss_and_one_line(cache: DiskCache, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing half-written stays, what was there stays, and it works again when there is room."""
    cache.put("g", "a", [b"before"])
    with a_full_disk():
        for _ in range(3):
            cache.put("g", "b", [os.urandom(20_000)])
    assert ([b"before"], None) == (cache.get("g", "a"), cache.get("g", "b"))
    assert [
        "a",
    ] == sorted(path.name for path in (cache.root / "g").iterdir())
    (told,) = warnings_of(caplog)
    assert cache.directory in told
    cache.put("g", "b", [bytes(20_000)])
    assert [bytes(20_000)] == cache.get("g", "b")


def test_a_directory_that_cannot_be_made_is_a_miss_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever wants to be alone is told that he is not, and goes on."""
    (tmp_path / "file").touch()
    cache = DiskCache(str(tmp_path / "file" / "below"), _LARGE)
    for _ in range(2):
        cache.put("g", "a", [b"x"])
        assert (None, False) == (cache.get("g", "a"), cache.holds("g"))
        with cache.alone("g", 5.0) as is_alone:
            assert not is_alone
    assert 1 == len(warnings_of(caplog))


@pytest.mark.parametrize("how", ["open to others", "a link"])
def test_a_directory_that_others_may_write_is_not_used(
    cache: DiskCache, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can write there could say where a checkpoint's bytes are."""
    cache.put("g", "a", [b"x"])
    if how == "a link":
        cache.root.rename(tmp_path / "elsewhere")
        cache.root.symlink_to(tmp_path / "elsewhere")
    else:
        cache.root.chmod(0o770)
    assert (None, False) == (cache.get("g", "a"), cache.holds("g"))
    cache.put("g", "b", [b"y"])
    assert not (cache.root / "g" / "b").exists()
    assert 1 == len(warnings_of(caplog))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache directory, unless others of a cluster would meet there; what is configured, whatever it is."""
    home = "26 1 8:1 / / rw - ext4 /dev/sda rw\n"
    shared = home + "40 26 0:35 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2\n"
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert "/home/me/.cache" == cache_directory("", home)
    assert tempfile.gettempdir() == cache_directory("", shared)
    assert "/home/me/fast" == cache_directory("~/fast", shared)
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert "/scratch/me" == cache_directory("", shared)


# ------------------------------------------------------------------ several processes

_PUTS_AND_GETS = """
import random, sys
from shardbook._disk_cache import DiskCache
cache, seed = DiskCache(sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
drawn = random.Random(seed)
for _ in range(150):
    key = drawn.randrange(20)
    content = [bytes([key]) * (400 * key), str(key).encode()]
    if drawn.random() < 0.5:
        cache.put(f"g{key % 4}", f"n{key}", content)
    elif cache.get(f"g{key % 4}", f"n{key}") not in (None, content):
        sys.exit(f"{key} is another's")
"""
_HOLDS = """
import sys, time
from shardbook._disk_cache import DiskCache
with DiskCache(sys.argv[1], 1 << 30).alone("g", 10.0) as is_alone:
    print(is_alone, flush=True)
    time.sleep(60)
"""


def started(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """A process that runs ``code``."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)


def test_processes_that_share_it_find_what_they_put(tmp_path: Path) -> None:
    """Four at once on a cache that is always full: no entry of another's, none torn, no error, and the bound holds."""
    max_bytes = 40_000
    processes = [started(_PUTS_AND_GETS, tmp_path, max_bytes, seed) for seed in range(4)]
    assert [0] * 4 == [process.wait(60) for process in processes]
    for process in processes:
        process.communicate()
    cache = DiskCache(str(tmp_path), max_bytes)
    assert 0 < taken_bytes(cache) <= max_bytes
    assert not list(cache.root.rglob(".new-*"))


def test_a_dead_fetcher_blocks_nobody(cache: DiskCache) -> None:
    """Its lock falls with the process, also by SIGKILL; one that lives is waited for as long as was said."""
    process = started(_HOLDS, cache.directory)
    assert process.stdout is not None
    assert "True\n" == process.stdout.readline()
    with cache.alone("other", 30.0) as is_alone:
        assert is_alone
    began_s = time.monotonic()
    with cache.alone("g", 0.2) as is_alone:
        assert not is_alone
    assert time.monotonic() - began_s < 20
    process.send_signal(signal.SIGKILL)
    with cache.alone("g", 30.0) as is_alone:
        assert is_alone
    process.communicate()


def test_threads_keep_each_other_away(cache: DiskCache) -> None:
    """One at a time, each in the end."""
    inside: list[int] = []
    most: list[int] = []

    def enter() -> None:
        with cache.alone("g", 60.0) as is_alone:
            assert is_alone
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [1] * 6 == most
