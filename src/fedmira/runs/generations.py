"""Which checkpoints a run directory holds, by their names alone, in what order, and whether some were lost.

Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.errors import IntegrityError
from fedmira.formats import counted
from fedmira.runs.atomic import disk_error, make_folder

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


def expect_checkpoints(run_path: Path) -> None:
    """Make the folder of the checkpoints, so that a run in which it is missing has lost them; raises as `make_folder`.

    Durable with the next file that is written beside it.
    """
    make_folder(run_path / FOLDER)


def refuse_lost_checkpoints(run_path: Path, events: Iterable[Mapping[str, Any]], most_unsaved: int) -> None:
    """Refuse to begin again where a run without any checkpoint has come further than that can be.

    Args:
        run_path: the run directory.
        events: all that it recorded.
        most_unsaved: rounds that may be recorded and not saved.

    Raises:
        IntegrityError: rounds or final results are recorded that would have been saved.
    """
    events = list(events)
    rounds = max((int(event["round"]) for event in events if event.get("event") == "round"), default=0)
    # final results come just before a checkpoint, which may be the first
    finished = any(event.get("event") == "final" for event in events) and not (run_path / FOLDER).is_dir()
    if rounds > most_unsaved or finished:
        raise IntegrityError(
            f"{run_path} holds the results of {counted(rounds, 'round')} and no checkpoint to go on from: {FOLDER} was "
            "removed. Put it back, or remove the run directory to start again"
        )
