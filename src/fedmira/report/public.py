"""What users of the Python package call to read: paths as they write them, numbers as plain dictionaries.

Knows nothing about how numbers are made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedmira.errors import UsageError
from fedmira.report import reading
from fedmira.report.summary import facts_of


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the closing numbers of the run in `path`, those of its clients and tasks among them: what
    `fedmira report PATH --json` prints but for the page's path.

    Raises:
        UsageError: `path` holds no run, or one that has not begun its first round.
        IntegrityError: one of its files is missing or damaged.
    """
    return facts_of(reading.read_run(_holding(path, "metrics.jsonl", "run")))


def read_study(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the numbers of the comparison in `path`, of its methods and their clients: what
    `fedmira report PATH --json` prints but for the page's path.

    Raises:
        UsageError: `path` holds no comparison.
        IntegrityError: one of its files is missing or damaged.
    """
    return facts_of(reading.read_study(_holding(path, "study.json", "comparison")))


def _holding(path: str | os.PathLike[str], file: str, what: str) -> Path:
    folder = Path(path)
    if not (folder / file).is_file():
        raise UsageError(f"{folder} is no {what}: it has no {file}; give the folder that `fedmira` printed")
    return folder
