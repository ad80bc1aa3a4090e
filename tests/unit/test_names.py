"""Names: what may be one, and that every name prints as it parses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.names import (
    CheckpointId,
    CheckpointName,
    PartName,
    RunName,
    check_incarnation,
    is_ref,
    prefix_of,
)
from shardbook.errors import InvalidArgumentError

segments = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")
numbers = st.integers(0, 2**63 - 1)
ids = st.one_of(
    st.builds(CheckpointId, step=numbers),
    st.builds(CheckpointId, step=numbers, session=numbers),
    st.builds(CheckpointId, step=numbers, session=numbers, attempt=st.integers(1, 2**31 - 1)),
    st.builds(CheckpointId.full, numbers, st.just(0), st.integers(1, 99), st.binary(min_size=16, max_size=16)),
    st.sampled_from([CheckpointId(alias="latest"), CheckpointId(alias="best")]),
)
names = st.builds(CheckpointName, st.builds(PartName, st.builds(RunName, segments, segments), segments), ids)


@given(names)
def test_a_checkpoint_parses_as_it_prints(name: CheckpointName) -> None:
    """As a resource name and as a ref."""
    assert name == CheckpointName.parse(str(name))
    assert name == CheckpointName.parse(name.ref)
    assert is_ref(name.ref)


@pytest.mark.parametrize(
    "text",
    ["", ".", "-a", "a b", "a/b", "a\0", "a\n", "..", "%2f", "\u202eabc", "x" * 129, "<script>", "é"],
)
def test_bad_segments_are_refused_with_the_field(text: str) -> None:
    """Control characters, separators, right-to-left marks and long names never reach a database."""
    with pytest.raises(InvalidArgumentError) as caught:
        RunName("project", text)
    assert ("INVALID_NAME", "run") == (caught.value.reason, caught.value.violations[0].field)
    assert text not in {"\u202eabc", "a\0"} or text not in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "llm/8b",
        "llm/8b@",
        "@1",
        "llm/8b@1.a2",
        "llm/8b@9223372036854775808",
        "llm/8b@1.s1.a2147483648",
        "llm@1",
        "a/b/c@1",
        "llm/8b@-1",
    ],
)
def test_texts_that_name_no_checkpoint_are_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(InvalidArgumentError) as caught:
        CheckpointName.parse(text)
    assert caught.value.reason == "INVALID_NAME"


@pytest.mark.parametrize("text", ["/ckpt/step-1500", "./a/b@1", "s3://bucket/x@1", "step-1500", "C:/x/y@1", "~a/b@1"])
def test_paths_and_urls_are_no_refs(text: str) -> None:
    """load() takes both; a path wins only where it cannot be a ref."""
    assert not is_ref(text)


def test_incarnations_are_16_bytes_and_prefixes_follow() -> None:
    """The directory of an attempt cannot be another's."""
    assert "000102030405-a7" == prefix_of(check_incarnation(bytes(range(16))), 7)
    for bad in (b"", bytes(16), bytes(15)):
        with pytest.raises(InvalidArgumentError):
            check_incarnation(bad)
