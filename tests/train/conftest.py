"""Runs keep their token files with the test."""

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
