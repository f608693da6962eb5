"""The lines of run.log that are read back: whose results a round left out.

A round that went on has them in metrics.jsonl too; of one that ended the run, the log is all there is.
"""

from __future__ import annotations

import re
from pathlib import Path

_LEFT_OUT = re.compile(r"\S+Z round (\d+): (.+?) was left out: (.+)")


def left_out_line(round_: int, name: str, reason: str) -> str:
    """What is told of one result."""
    return f"round {round_}: {name} was left out: {reason}"


def read_left_out(log: Path, round_: int) -> dict[str, str]:
    """The reason by the client's name, of all results that round `round_` left out.

    Where the round was repeated the later reason counts. A log that is missing or cannot be read tells nothing.
    """
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    except OSError:
        return {}
    found = [match for line in lines if (match := _LEFT_OUT.fullmatch(line))]
    return {match[2]: match[3] for match in found if int(match[1]) == round_}
