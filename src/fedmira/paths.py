"""Paths as people write them. Imports nothing of fedmira: checking a config and naming a run stay quick."""

from __future__ import annotations

import os
from pathlib import Path


def home_expanded(path: str) -> Path:
    """Replace a leading `~` where the home folder is known."""
    return Path(os.path.expanduser(path))
