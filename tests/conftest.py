"""Settings of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time: a change is judged by what it changed. HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or leaves text embeddings in the user's cache; the programs that tests start inherit it."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("INFOCLIP_CACHE")
    os.environ["INFOCLIP_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["INFOCLIP_CACHE"]
    else:
        os.environ["INFOCLIP_CACHE"] = before
