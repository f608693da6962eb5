"""What a comparison will need, before it is started: one run of each method is predicted and stands for all of its own.

Keeps nothing. Knows nothing about how a run is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.config.run import RunConfig
from fedmira.experiment import Display, SilentDisplay
from fedmira.forecast.estimate import Estimate, dry_run
from fedmira.formats import format_mib
from fedmira.runs.atomic import unwritable_line
from fedmira.studies.compare import rates_to_try, refuse, study_directory, variant


class StudyEstimate(NamedTuple):
    """Predicted needs of all runs of a comparison, also of those that are finished already."""

    methods: Mapping[str, Estimate]
    """Of one run of each; their memory is the peak of this process up to then, as in a comparison."""
    reported_runs: int
    """Of each method, one per seed."""
    tuning_runs: int
    """Of each method, one per learning rate; 0 where there is one. Counted as whole runs: they judge no test data."""
    unwritable: str
    """Why the study's folder could not be written; empty if that looks possible."""

    @property
    def runs_per_method(self) -> int:
        return self.reported_runs + self.tuning_runs

    @property
    def seconds(self) -> float:
        """Of everything, with loading."""
        return self.runs_per_method * sum(one.start_seconds + one.seconds for one in self.methods.values())

    @property
    def memory_bytes(self) -> int:
        """One process carries out all runs."""
        return max(one.memory_bytes for one in self.methods.values())

    @property
    def upload_bytes(self) -> int:
        return self.runs_per_method * sum(one.upload_bytes_per_round * one.rounds for one in self.methods.values())

    @property
    def download_bytes(self) -> int:
        return self.runs_per_method * sum(one.download_bytes_per_round * one.rounds for one in self.methods.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Each once, however many methods it holds for."""
        said = [line for one in self.methods.values() for line in one.warnings]
        return tuple(dict.fromkeys([*said, *([self.unwritable] if self.unwritable else [])]))

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        totals = ("seconds", "memory_bytes", "upload_bytes", "download_bytes", "warnings")
        return {
            "num_runs": len(self.methods) * self.runs_per_method,
            "reported_runs_per_method": self.reported_runs,
            "tuning_runs_per_method": self.tuning_runs,
            **{name: getattr(self, name) for name in totals},
            "methods": {name: one._asdict() for name, one in self.methods.items()},
        }

    def lines(self) -> list[str]:
        """One line per fact, for people."""
        each = f"{self.reported_runs} reported"
        counted_whole = ""
        if self.tuning_runs:
            each += f" and {self.tuning_runs} to choose a learning rate"
            counted_whole = " Runs that choose a rate are counted as whole ones, though they judge no test data."
        width = max(18, *(len(name) for name in self.methods))
        facts = [
            ("runs", f"{len(self.methods) * self.runs_per_method}: {each}, for each of {len(self.methods)} methods"),
            ("memory", f"about {format_mib(self.memory_bytes)}"),
            ("upload", f"about {format_mib(self.upload_bytes, 2)}"),
            ("download", f"about {format_mib(self.download_bytes, 2)}"),
            ("time", f"about {_duration(self.seconds)}"),
            *(
                (name, f"about {_duration(one.start_seconds + one.seconds)} a run")
                for name, one in self.methods.items()
            ),
        ]
        return [
            *(f"{label:<{width}} {text}" for label, text in facts),
            f"An estimate from small parts of one run of each method.{counted_whole}",
            *(f"warning: {line}" for line in self.warnings),
        ]


def estimate_study(config: RunConfig, directory: Path | None = None, display: Display | None = None) -> StudyEstimate:
    """Predict what `compare` needs; `display` is told what is being estimated. Raises what starting it would raise."""
    directory, display = directory or study_directory(config), display or SilentDisplay()
    refuse(config, directory)
    rates, names = rates_to_try(config), list(dict.fromkeys(config.compare.methods))
    methods = {}
    for position, name in enumerate(names, 1):
        display.message(f"Estimating {name} ({position} of {len(names)}) ...")
        methods[name] = dry_run(variant(config, name, config.seed, rates[0]))
    tuning_runs = len(rates) if len(rates) > 1 else 0
    return StudyEstimate(methods, config.compare.seeds, tuning_runs, unwritable_line(directory))


def _duration(seconds: float) -> str:
    """Seconds, and hours where they are many.

    >>> _duration(0.32), _duration(90), _duration(7200)
    ('0.3 s', '90 s', '7,200 s (2.0 h)')
    """
    return f"{seconds:,.{seconds < 10:d}f} s" + (f" ({seconds / 3600:,.1f} h)" if seconds >= 3600 else "")
