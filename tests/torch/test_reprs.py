"""What a prompt shows of the public names."""

from __future__ import annotations

import shardbook.dcp as dcp
from shardbook.config import Mode


def test_only_public_names_are_completed() -> None:
    """``dir`` lists what is documented, none of the modules behind it."""
    assert sorted(dcp.__all__) == dir(dcp)


def test_a_session_is_one_short_line() -> None:
    """The incarnation as its directories begin: hex."""
    session = dcp.Session("llm/8b", part="optim", number=3, incarnation=bytes(range(16)), mode=Mode.OFFLINE)
    assert "Session('llm/8b:optim', number=3, incarnation=000102030405, mode=offline)" == repr(session)


def test_a_result_says_what_a_log_line_needs() -> None:
    """The reason only where there is one."""
    done = dcp.SaveResult(dcp.SaveState.COMMITTED, "llm/8b@7", step=7)
    assert "SaveResult(COMMITTED, 'llm/8b@7', step=7)" == repr(done)
    away = dcp.SaveResult(dcp.SaveState.UNREGISTERED, "/ckpt/7", "the server is away", step=7)
    assert "SaveResult(UNREGISTERED, '/ckpt/7', step=7, reason='the server is away')" == repr(away)
