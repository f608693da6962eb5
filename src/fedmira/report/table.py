"""The closing table: one row per method, averaged over paired seeds, as text, Markdown or JSON.

Knows nothing about HTML; the page shows the same rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fedmira.config.exchange import WEAK_EPSILON
from fedmira.evaluation.meters import ClientRecord, mean, summarise
from fedmira.formats import (
    NOTHING,
    counted,
    finite,
    format_answers,
    format_bytes,
    format_change,
    format_loss,
    format_perplexity,
    format_seconds,
    format_share,
)
from fedmira.formats import printable as _printable
from fedmira.report.intervals import interval
from fedmira.report.reading import REFERENCE_METHOD, RunRecord, StudyRecord

FEW_EXAMPLES = 100
"""Test examples of the median client below which the notes say that chance harms too."""


class Spread(NamedTuple):
    """One number over the seeds of a method."""

    mean: float
    deviation: float | None
    """Standard deviation over seeds (n - 1 in the denominator); None with one seed."""


class Row(NamedTuple):
    """One method of a study, or a single run. A number is None where nothing was measured."""

    method: str
    seeds: tuple[int, ...]
    """Of the judged runs the numbers are averaged over. Of a study: only seeds that every method with test numbers has,
    so that rows can be compared; each row its own where there is none."""
    num_unfinished: int
    """Runs without test numbers; those that a study lists and never began count."""
    mean_loss: Spread | None
    """Test loss per supervised token, nats; unweighted over clients."""
    task_mean_loss: Spread | None
    worst_tenth_loss: Spread | None
    share_harmed: Spread | None
    """Share of clients with a test loss more than 1 % above `local_only` of the same seed. None for `local_only`."""
    difference: Spread | None
    """mean_loss minus that of `local_only`, paired by seed; below 0 is better. None for `local_only`."""
    difference_seeds: tuple[int, ...] | None
    """Those of `seeds` that `difference` stands on: where `local_only` has a finite loss. None where `difference` is
    about nothing: for `local_only`, and in a study without it."""
    difference_interval: tuple[float, float] | None
    """The 95 % interval of `difference`: Student's t over the paired seeds; None of fewer than three seeds."""
    perplexity: Spread | None
    rouge_l: Spread | None
    exact_match: Spread | None
    max_answers: int | None
    """Answers per client that Rouge-L and exact match cover, at most; None where all test examples were answered."""
    max_answer_tokens: int | None
    """Where an answer was cut, tokens; None where the config does not say."""
    upload_bytes: Spread | None
    """Whole run, all clients; of the unfinished runs where none is judged."""
    download_bytes: Spread | None
    seconds: Spread | None
    """Training, merging and evaluating, without loading."""
    peak_memory_bytes: int
    """The highest of all runs. Runs of one process share its resident set, so it depends on their order."""
    median_test_examples: float | None
    """Of the clients of the judged runs; None where nothing was written down."""
    epsilon: float | None
    """The largest of any client in any of the runs, each counted alone; None where nothing was noised."""
    delta: float | None

    @property
    def total_bytes(self) -> Spread | None:
        """Upload and download together, mean over seeds."""
        if self.upload_bytes is None or self.download_bytes is None:
            return None
        return Spread(self.upload_bytes.mean + self.download_bytes.mean, None)

    def facts(self) -> dict[str, Any]:
        """The row as flat JSON: `x` and `x_deviation` for every number, null for what is unknown or not finite."""
        flat: dict[str, Any] = {"num_seeds": len(self.seeds)}
        for name, value in self._asdict().items():
            if isinstance(value, Spread):
                flat[name] = finite(value.mean)
                flat[f"{name}_deviation"] = finite(value.deviation)
            else:
                flat[name] = finite(value)
        return flat


def rows_of(record: RunRecord | StudyRecord) -> list[Row]:
    """The rows of what was read from a directory."""
    if isinstance(record, RunRecord):
        judged = [record] if record.records else []
        return [_row(record.method, [record], judged, {}, {}, num_unfinished=1 - len(judged))]
    references = {seed: run.records for seed in record.seeds if (run := record.reference(seed)) is not None}
    # the reference itself gets none: compared with itself it would show zeros that mean nothing
    return [
        _row(
            method,
            runs := record.of(method),
            record.compared(method),
            {} if method == REFERENCE_METHOD else references,
            record.differences(method),
            num_unfinished=len(record.seeds) - sum(bool(run.records) for run in runs),
        )
        for method in record.methods
    ]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and standard deviation of the values that are there; None of nothing."""
    known = [value for value in values if value is not None]
    average = mean(known)
    if average is None:
        return None
    if len(known) < 2:
        return Spread(average, None)
    return Spread(average, statistics.stdev(known) if all(map(math.isfinite, known)) else math.nan)


def _row(
    method: str,
    runs: Sequence[RunRecord],
    judged: Sequence[RunRecord],
    references: dict[int, tuple[ClientRecord, ...]],
    differences: dict[int, float],
    *,
    num_unfinished: int,
) -> Row:
    summaries = [summarise(run.records, references.get(run.seed)) for run in judged]
    spent = judged or runs
    examples = [count for run in judged for count in run.num_test_examples.values()]
    return Row(
        method=method,
        seeds=tuple(run.seed for run in judged),
        num_unfinished=num_unfinished,
        mean_loss=spread(summary.mean_loss for summary in summaries),
        task_mean_loss=spread(summary.task_mean_loss for summary in summaries),
        worst_tenth_loss=spread(summary.worst_tenth_loss for summary in summaries),
        share_harmed=spread(summary.share_harmed for summary in summaries),
        difference=spread(differences.values()),
        difference_seeds=tuple(differences) if references else None,
        difference_interval=interval(tuple(differences.values())),
        perplexity=spread(summary.perplexity for summary in summaries),
        rouge_l=spread(summary.rouge_l for summary in summaries),
        exact_match=spread(summary.exact_match for summary in summaries),
        max_answers=runs[0].max_answers if runs else None,
        max_answer_tokens=runs[0].max_answer_tokens if runs else None,
        upload_bytes=spread(run.upload_bytes for run in spent),
        download_bytes=spread(run.download_bytes for run in spent),
        seconds=spread(run.seconds for run in spent),
        peak_memory_bytes=max((run.peak_memory_bytes for run in runs), default=0),
        median_test_examples=statistics.median(examples) if examples else None,
        epsilon=max((epsilon for run in runs if (epsilon := run.largest_epsilon) is not None), default=None),
        delta=next((run.delta for run in runs if run.delta is not None), None),
    )


# ------------------------------------------------------------------------------------------------------------- as text


class Column(NamedTuple):
    """One number of the closing table."""

    heading: str
    name: str
    """Of the number in `Row`."""
    write: Callable[[float], str]
    better: int = -1
    """-1 where less is better, 1 where more is; 0 for costs, which are shown and not compared."""
    write_deviation: Callable[[float], str] | None = format_loss
    """None where the deviation over seeds is not shown. Text shows that of losses only."""
    in_text: bool = True
    """Whether text has it too: a terminal is narrow."""

    def value(self, row: Row) -> Spread | None:
        """The number of one method."""
        value: Spread | None = getattr(row, self.name)
        return value

    def text(self, row: Row) -> str:
        """The cell of a method in a table of text: `mean`, `mean (deviation)`, or a difference with its interval."""
        value = self.value(row)
        if value is None:
            return NOTHING
        shown = self.write(value.mean)
        if self.name == "difference" and row.difference_interval is not None:
            return f"{shown} {format_interval(row.difference_interval)}"
        if value.deviation is not None and self.write_deviation is format_loss:
            return f"{shown} ({format_loss(value.deviation)})"
        return shown


def _points(share: float) -> str:
    """A deviation of shares, in percentage points."""
    return f"{100 * share:.1f}"


COLUMNS = (
    Column("mean loss", "mean_loss", format_loss),
    Column("vs local", "difference", format_change),
    Column("task mean", "task_mean_loss", format_loss, in_text=False),
    Column("worst tenth", "worst_tenth_loss", format_loss),
    Column("harmed", "share_harmed", format_share, write_deviation=_points),
    Column("perplexity", "perplexity", format_perplexity, write_deviation=format_perplexity, in_text=False),
    Column("Rouge-L", "rouge_l", format_loss, better=1),
    Column("exact", "exact_match", format_share, better=1, write_deviation=_points),
    Column("up + down", "total_bytes", format_bytes, better=0, write_deviation=None),
    Column("time", "seconds", format_seconds, better=0, write_deviation=None),
)
"""Of tables, behind the method."""


def render_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """The rows as aligned plain text, or as a Markdown table; control characters in names are written out."""
    columns = [column for column in COLUMNS if column.in_text]
    cells = [["method", *(column.heading for column in columns)]]
    cells += [[_printable(row.method), *(column.text(row) for column in columns)] for row in rows]
    if markdown:
        cells = [[text.replace("\\", "\\\\").replace("|", "\\|") for text in line] for line in cells]
        cells.insert(1, ["---", *["---:"] * len(columns)])
        return "\n".join([*(f"| {' | '.join(line)} |" for line in cells), "", " ".join(footnotes(rows))])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *footnotes(rows)])


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the numbers of the table are, a sentence each."""
    parts = ["Loss: nats per answer token on test data, mean over clients; lower is better."]
    if any(row.share_harmed for row in rows):
        parts.append("Harmed: clients more than 1 % worse than training alone.")
    return parts + chance_notes(rows) + answer_notes(rows) + seed_notes(rows, "in brackets") + privacy_notes(rows)


def chance_notes(rows: Sequence[Row]) -> list[str]:
    """That chance harms too, where clients are compared on few test examples."""
    held = min((row.median_test_examples for row in rows if row.median_test_examples is not None), default=None)
    if held is None or held >= FEW_EXAMPLES or not any(row.share_harmed for row in rows):
        return []
    return [
        f"Clients have few test examples ({held:g} for the median one), so some look harmed by chance: see "
        '"What is measured" in docs/concepts.md.'
    ]


def privacy_notes(rows: Sequence[Row]) -> list[str]:
    """What clients of each method have given away, where uploads were noised."""
    spent = [
        f"{_printable(row.method)} {format_epsilon(row.epsilon, row.delta)}" for row in rows if row.epsilon is not None
    ]
    if not spent:
        return []
    return [f"Epsilon of any client in one run: {'; '.join(spent)}. Runs on the same data add up."]


def format_epsilon(epsilon: float, delta: float | None) -> str:
    """What was given away at most, and whether that still protects anybody.

    >>> format_epsilon(16611.2, 1e-5), format_epsilon(2.345, None)
    ('16,611 at most (delta 1e-05), which protects little', '2.35 at most')
    """
    # at 10 a neighbour's data can make an outcome 22,000 times as likely
    little = ", which protects little" if not epsilon <= WEAK_EPSILON else ""
    shown = f"{epsilon:,.0f}" if epsilon >= 100 else f"{epsilon:.3g}"
    return f"{shown} at most{'' if delta is None else f' (delta {delta:g})'}{little}"


def answer_notes(rows: Sequence[Row]) -> list[str]:
    """What Rouge-L and exact match cover; methods of one study are judged alike. Empty where nothing was answered."""
    said = dict.fromkeys(format_answers(row.max_answers, row.max_answer_tokens) for row in rows if row.rouge_l)
    return [f"Rouge-L and exact match: {covered}." for covered in said if covered]


def seed_notes(rows: Sequence[Row], place: str) -> list[str]:
    """Which seeds the rows stand on and what is missing; `place` says where the deviations are written."""
    parts = []
    unfinished = sum(row.num_unfinished for row in rows)
    seeds = max((len(row.seeds) for row in rows), default=0)
    shared = unfinished and len(rows) > 1
    if not comparable(rows):
        parts.append(
            "No seed was finished by all methods: each row is a mean over seeds of its own "
            f"({place} the standard deviation), and the rows cannot be compared."
        )
    elif seeds > 1:
        over = f"the {seeds} seeds that all methods with test numbers finished" if shared else f"{seeds} seeds"
        parts.append(f"Mean over {over}, {place} the standard deviation over seeds.")
    elif seeds and shared:
        parts.append("Numbers of the one seed that all methods with test numbers finished.")
    if any(row.difference_interval for row in rows):
        parts.append(
            "vs local: in square brackets the 95 % interval of the mean paired difference (Student's t over seeds)."
        )
    parts += _difference_notes(rows)
    if unfinished:
        missing = f"{counted(unfinished, 'run')} without test numbers left out."
        parts.append(f"The comparison is not complete: {missing}" if len(rows) > 1 else missing)
    return parts


def _difference_notes(rows: Sequence[Row]) -> list[str]:
    """How many seeds the differences to training alone stand on, where these are not all of the row."""
    found = {
        _printable(row.method): f"{len(row.difference_seeds)} of {counted(len(row.seeds), 'seed')}"
        for row in rows
        if row.difference_seeds is not None and len(row.difference_seeds) < len(row.seeds)
    }
    if not found:
        return []
    alike = len(set(found.values())) == 1
    counts = next(iter(found.values())) if alike else ", ".join(f"{name} {count}" for name, count in found.items())
    return [f"vs local: only seeds on which training alone has a finite test loss ({counts})."]


def comparable(rows: Sequence[Row]) -> bool:
    """Whether all rows that have test numbers have them from the same seeds."""
    return len({row.seeds for row in rows if row.seeds}) < 2


def format_interval(bounds: tuple[float, float]) -> str:
    """Both ends of an interval.

    >>> format_interval((-0.2, 0.05))
    '[-0.200, +0.050]'
    """
    return f"[{', '.join(map(format_change, bounds))}]"
