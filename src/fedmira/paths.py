"""Paths as people write them. Imports nothing of fedmira: checking a config and naming a run stay quick."""

from __future__ import annotations

import os
from pathlib import Path


def home_expanded(path: str) -> Path:
    """Replace a leading `~` where the home folder is known."""
    return Path(os.path.expanduser(path))


def looks_local(path: str) -> bool:
    r"""Whether `path` cannot be a Hugging Face id, which is `name` or `owner/name`, or is there.

    >>> looks_local("./model"), looks_local(r"C:\models\small"), looks_local("openai-community/gpt2")
    (True, True, False)
    """
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or os.path.exists(path)
