"""Which checkpoints a run directory holds, by their names alone, and in what order. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fedmira.runs.atomic import disk_error

FOLDER = "checkpoints"
_NAME = re.compile(r"round-(\d{5,9})(-partial)?(?:-r(\d{1,6}))?")


class Generation(NamedTuple):
    """One checkpoint folder; sorts from the oldest to the newest."""

    round: int
    partial: bool
    """True for a state inside the next round, which comes after the one at the end of `round`."""
    revision: int
    """1, or more if the same state was saved again."""
    path: Path

    @property
    def same(self) -> tuple[int, bool]:
        """Equal for generations of which the later replaces the earlier."""
        return self.round, self.partial


def generation_path(parent: Path, round_: int, partial: bool, revision: int) -> Path:
    """Return the folder of a generation.

    >>> generation_path(Path("c"), 12, False, 1).name, generation_path(Path("c"), 12, True, 3).name
    ('round-00012', 'round-00012-partial-r3')
    """
    suffix = ("-partial" if partial else "") + (f"-r{revision}" if revision > 1 else "")
    return parent / f"round-{round_:05d}{suffix}"


def generations(parent: Path) -> list[Generation]:
    """Return the checkpoints in the folder `parent`, whole or not, from the oldest to the newest.

    Raises:
        SetupError, IntegrityError: the folder cannot be listed.
    """
    try:
        names = os.listdir(parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise disk_error(error, parent, "list the checkpoints in") from error
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    return sorted(Generation(int(m[1]), m[2] is not None, int(m[3] or 1), parent / m[0]) for m in matches)


def has_checkpoints(run_path: Path) -> bool:
    """Whether `run_path` holds any checkpoint, whole or not."""
    return bool(generations(run_path / FOLDER))
