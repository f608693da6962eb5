"""What a benchmark found, as values that become JSON.

Knows nothing about what was measured or how it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Times


@dataclass(slots=True)
class Row:
    """One contestant."""

    contestant: str
    seconds: float | None = None
    """Median wall-clock seconds; None if it was not measured."""
    lower: float | None = None
    upper: float | None = None
    """Quartiles of the wall-clock seconds."""
    processor_seconds: float | None = None
    """Median processor seconds of the process that does the work; None where several do."""
    peak_bytes: int | None = None
    """Highest memory in one round, of all processes that do the work, with interpreter, libraries and model; what the
    round adds to what was held before, where contestants share a process: on a GPU, of what torch allocated."""
    final_loss: float | None = None
    """Of the trained adapters, nats per supervised token; the same judge for all contestants."""
    note: str = ""
    """Why something is missing."""
    settings: dict[str, str] = field(default_factory=dict)
    """How the contestant's own process waits and keeps memory; empty where it shares one."""
    clients_per_batch: int | None = None
    """Of PEFT's mixed batches: the fastest of those tried."""

    @classmethod
    def timed(cls, contestant: str, times: Times) -> Row:
        """A row with the numbers of `times`."""
        lower, upper = times.quartiles
        return cls(contestant, times.median, lower, upper, times.processor_median)


@dataclass(slots=True)
class Section:
    """One workload with its contestants."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    """Named numbers that targets refer to, such as ratios of medians."""
    facts: dict[str, float] = field(default_factory=dict)
    """About the workload: tokens, padding, floors, repetitions."""
    commit: str = ""
    """What was measured; empty if unknown."""
    date: str = ""
    """When, as in 2026-11-30; empty if unknown."""

    def row(self, contestant: str) -> Row:
        return next(row for row in self.rows if row.contestant == contestant)

    def add_ratios(self, ours: str) -> None:
        """For every other contestant that was timed, the measure `over NAME`: its seconds over those of `ours`."""
        own = self.row(ours).seconds
        for row in self.rows:
            if row.contestant != ours and row.seconds is not None and own is not None:
                self.measures[f"over {row.contestant}"] = row.seconds / own


@dataclass(slots=True)
class Results:
    """All sections of one run on one machine."""

    machine: dict[str, Any]
    sections: list[Section] = field(default_factory=list)

    def put(self, section: Section) -> None:
        """Take in a section, in the place of the one with its name if there is one."""
        names = [other.name for other in self.sections]
        if section.name in names:
            self.sections[names.index(section.name)] = section
        else:
            self.sections.append(section)


def write_results(path: Path, results: Results) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote."""
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    sections = [
        Section(**{**section, "rows": [Row(**row) for row in section["rows"]]}) for section in content["sections"]
    ]
    return Results(content["machine"], sections)
