"""What `fedmira run` says when a run has ended: its numbers as lines and as JSON. Knows nothing about other runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.evaluation.meters import Scores, Summary, scores, scores_by_task
from fedmira.formats import (
    counted,
    finite,
    format_answers,
    format_bytes,
    format_loss,
    format_seconds,
    format_share,
)
from fedmira.report.reading import RunRecord, read_run
from fedmira.report.table import format_epsilon, summary_of

RISE = 0.05
"""A validation loss that ends above its lowest by more than this share has clearly risen again."""


class RunSummary(NamedTuple):
    """The closing numbers of one run."""

    method: str
    num_rounds: int
    numbers: Summary | None
    """None where the run was not judged on test data."""
    validation_loss: float | None
    """After the last evaluated round, unweighted over clients."""
    lowest_validation: tuple[int, float] | None
    """(round, loss) where that mean was lowest with the clients of the last round; None if it was never finite."""
    max_answers: int | None
    """Answers per client that Rouge-L and exact match cover, at most; None where all test examples were answered."""
    max_answer_tokens: int | None
    """Where an answer was cut, tokens; None where the config does not say."""
    upload_bytes: int
    """Counted at the seam, over all rounds."""
    download_bytes: int
    seconds: float
    peak_memory_bytes: int
    tokens_per_second: float | None
    """Tokens read while training, over the seconds of training; None before the first round."""
    epsilon: float | None
    """The largest of any client, over all its uploads of this run; None where nothing was noised."""
    delta: float | None
    """The delta that epsilon is counted at."""
    clients: Mapping[str, Scores]
    tasks: Mapping[str, Scores]
    """Clients without a task label are one task, named by the empty text."""

    def facts(self) -> dict[str, Any]:
        """As JSON, flat but for `clients` and `tasks`; null for what is unknown or not finite."""
        flat: dict[str, Any] = {
            "method": self.method,
            "rounds": self.num_rounds,
            "validation_loss": self.validation_loss,
            "lowest_validation_loss": self.lowest_validation[1] if self.lowest_validation else None,
            "lowest_validation_round": self.lowest_validation[0] if self.lowest_validation else None,
            "max_answers": self.max_answers,
            "max_answer_tokens": self.max_answer_tokens,
            "upload_bytes": self.upload_bytes,
            "download_bytes": self.download_bytes,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "tokens_per_second": self.tokens_per_second,
            "epsilon": self.epsilon,
            "delta": self.delta,
        }
        if self.numbers is not None:
            flat |= {name: getattr(self.numbers, name) for name in Summary.__slots__}
        flat = _finite(flat)
        if self.numbers is not None:
            flat["clients"] = {name: _finite(asdict(scores)) for name, scores in self.clients.items()}
            flat["tasks"] = {name: _finite(asdict(scores)) for name, scores in self.tasks.items()}
        return flat

    def lines(self) -> list[str]:
        """As text, one number a line."""
        found: list[tuple[str, str]] = []
        if self.validation_loss is not None:
            found.append(("validation loss", f"{format_loss(self.validation_loss)} nats per answer token"))
        if self.numbers is not None:
            found.append(("test loss", f"{format_loss(self.numbers.mean_loss)} (mean over clients)"))
            found.append(("worst tenth", f"{format_loss(self.numbers.worst_tenth_loss)} (mean of the worst clients)"))
            if self.numbers.rouge_l is not None:
                covered = format_answers(self.max_answers, self.max_answer_tokens)
                note = f" ({covered})" if covered else ""
                found.append(("Rouge-L", format_loss(self.numbers.rouge_l) + note))
                found.append(("exact match", format_share(self.numbers.exact_match) + note))
        found.append(("sent", f"{format_bytes(self.upload_bytes)} up, {format_bytes(self.download_bytes)} down"))
        if self.epsilon is not None:
            found.append(("epsilon", format_epsilon(self.epsilon, self.delta)))
        found.append(("time", f"{format_seconds(self.seconds)} for {counted(self.num_rounds, 'round')}"))
        if self.tokens_per_second:
            found.append(("training reads", f"{self.tokens_per_second:,.0f} tokens per second"))
        if self.peak_memory_bytes:
            found.append(("peak memory", format_bytes(self.peak_memory_bytes)))
        width = max(len(label) for label, _ in found)
        return [*(f"{label.ljust(width)}  {text}" for label, text in found), *self.advice()]

    def advice(self) -> list[str]:
        """A sentence where training went on after its best; nothing where it did not."""
        if self.lowest_validation is None or self.validation_loss is None:
            return []
        round_, lowest = self.lowest_validation
        # a last loss that is not a number has risen too
        if self.validation_loss <= (1 + RISE) * lowest:
            return []
        return [
            f"Validation loss was lowest after round {round_} ({format_loss(lowest)}) and is "
            f"{format_loss(self.validation_loss)} after the last; fewer rounds or a lower learning rate may do better."
        ]


def summarise_run(path: Path) -> RunSummary:
    """The closing numbers of the run in `path`.

    Raises:
        IntegrityError: a file of the run directory is missing or damaged.
    """
    return summary_of_run(read_run(path))


def summary_of_run(run: RunRecord) -> RunSummary:
    """The closing numbers of a run that was read."""
    curve = run.mean_validation_losses()
    return RunSummary(
        method=run.method,
        num_rounds=len(run.rounds),
        numbers=summary_of(run) if run.records else None,
        validation_loss=curve[-1][1] if curve else None,
        lowest_validation=run.lowest_validation_loss(),
        max_answers=run.max_answers,
        max_answer_tokens=run.max_answer_tokens,
        upload_bytes=run.upload_bytes,
        download_bytes=run.download_bytes,
        seconds=run.seconds,
        peak_memory_bytes=run.peak_memory_bytes,
        tokens_per_second=run.tokens_per_second,
        epsilon=run.largest_epsilon,
        delta=run.delta,
        clients={record.name: scores([record]) for record in run.records},
        tasks=scores_by_task(run.records),
    )


def _finite(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: finite(value) for name, value in flat.items()}
