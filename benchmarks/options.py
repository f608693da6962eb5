"""How a run of the benchmark is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """The same for every section."""

    device: str
    threads: int
    warm_up: int
    """Rounds that are not timed; the round that is judged and whose memory is measured comes on top."""
    repeats: int
    peers_python: Path | None = None
    """Interpreter of the environment with the peers that need their own; None where it could not be made."""
    peers_note: str = ""
    """Why there is none."""
    own_processes: bool = False
    """Whether every contestant of training and generation has a process of its own, prepared as its users have it."""
