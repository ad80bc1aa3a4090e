"""What every test may rely on: no setting leaks in, nothing is written outside temporary folders.

Markers, warnings and time limits stand in pyproject.toml. Property tests: ``--hypothesis-profile=soak`` tries many
more examples; a failing example is printed in a form that can be pasted into the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, print_blob=True, max_examples=60)
settings.register_profile("soak", deadline=None, print_blob=True, max_examples=5_000)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hides the developer's settings and data from this process and all that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SHARDBOOK_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        # Ranks and workers share few cores: one thread each.
        patch.setenv("OMP_NUM_THREADS", "1")
        # A terminal's width and colours are no part of an output.
        patch.setenv("COLUMNS", "200")
        patch.setenv("NO_COLOR", "1")
        patch.delenv("FORCE_COLOR", raising=False)
        yield
