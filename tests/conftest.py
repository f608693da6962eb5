"""Shared by all tests: where the optional development data lies, and a quiet environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with data and models for development (`shared` beside the checkout); skips where it is absent."""
    path = REPOSITORY.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("the development data folder `shared` is not beside this checkout")
    return path
