"""Every test here has a cache of its own and no data folders but those it names."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    if request.node.get_closest_marker("slow"):  # real data, in the caches that the environment names
        return None
    folder = tmp_path / "cache"
    monkeypatch.setenv("CLBENCH_CACHE", str(folder))
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    return folder
