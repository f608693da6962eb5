"""The numbers of a run or a study as JSON, which `--json` prints, and those of a run that has ended as lines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedmira.evaluation.meters import scores, scores_by_task, summarise
from fedmira.formats import (
    counted,
    finite,
    format_answers,
    format_bytes,
    format_loss,
    format_seconds,
    format_share,
)
from fedmira.report.clients import client_facts
from fedmira.report.reading import RunRecord, StudyRecord
from fedmira.report.table import format_epsilon, rows_of

RISE = 0.05
"""A validation loss that ends above its lowest by more than this share has clearly risen again."""


def facts_of(record: RunRecord | StudyRecord) -> dict[str, Any]:
    """As JSON, null for what is unknown or not finite: the closing numbers of a run, flat but for `clients` and
    `tasks`; or of a study `methods`, and `clients` by method, seed and client."""
    if isinstance(record, RunRecord):
        return _of_run(record)
    methods = [{**row.facts(), **_how_made(record, row.method)} for row in rows_of(record)]
    return {"methods": methods, "clients": client_facts(record)}


def lines_of(run: RunRecord) -> list[str]:
    """The closing numbers of a run as text, one number a line."""
    found: list[tuple[str, str]] = []
    if (validation_loss := run.last_validation_loss()) is not None:
        found.append(("validation loss", f"{format_loss(validation_loss)} nats per answer token"))
    if run.records:
        numbers = summarise(run.records)
        found.append(("test loss", f"{format_loss(numbers.mean_loss)} (mean over clients)"))
        found.append(("worst tenth", f"{format_loss(numbers.worst_tenth_loss)} (mean of the worst clients)"))
        if numbers.rouge_l is not None:
            covered = format_answers(run.max_answers, run.max_answer_tokens)
            note = f" ({covered})" if covered else ""
            found.append(("Rouge-L", format_loss(numbers.rouge_l) + note))
            found.append(("exact match", format_share(numbers.exact_match) + note))
    found.append(("sent", f"{format_bytes(run.upload_bytes)} up, {format_bytes(run.download_bytes)} down"))
    if run.largest_epsilon is not None:
        found.append(("epsilon", format_epsilon(run.largest_epsilon, run.delta)))
    found.append(("time", f"{format_seconds(run.seconds)} for {counted(len(run.rounds), 'round')}"))
    if run.tokens_per_second:
        found.append(("training reads", f"{run.tokens_per_second:,.0f} tokens per second"))
    if run.peak_memory_bytes:
        found.append(("peak memory", format_bytes(run.peak_memory_bytes)))
    width = max(len(label) for label, _ in found)
    return [*(f"{label.ljust(width)}  {text}" for label, text in found), *advice(run)]


def advice(run: RunRecord) -> list[str]:
    """A sentence where training went on after its best; nothing where it did not."""
    lowest, last = run.lowest_validation_loss(), run.last_validation_loss()
    # a last loss that is not a number has risen too
    if lowest is None or last is None or last <= (1 + RISE) * lowest[1]:
        return []
    return [
        f"Validation loss was lowest after round {lowest[0]} ({format_loss(lowest[1])}) and is {format_loss(last)} "
        "after the last; fewer rounds or a lower learning rate may do better."
    ]


def _of_run(run: RunRecord) -> dict[str, Any]:
    round_, lowest = run.lowest_validation_loss() or (None, None)
    flat: dict[str, Any] = {
        "method": run.method,
        "rounds": len(run.rounds),
        "validation_loss": run.last_validation_loss(),
        "lowest_validation_loss": lowest,
        "lowest_validation_round": round_,
        "max_answers": run.max_answers,
        "max_answer_tokens": run.max_answer_tokens,
        "upload_bytes": run.upload_bytes,
        "download_bytes": run.download_bytes,
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "tokens_per_second": run.tokens_per_second,
        "epsilon": run.largest_epsilon,
        "delta": run.delta,
    }
    if not run.records:
        return _finite(flat)
    clients = {record.name: _finite(asdict(scores([record]))) for record in run.records}
    tasks = {task: _finite(asdict(found)) for task, found in scores_by_task(run.records).items()}
    return {**_finite(flat | asdict(summarise(run.records))), "clients": clients, "tasks": tasks}


def _how_made(study: StudyRecord, method: str) -> dict[str, Any]:
    """The rate of a method, the validation loss of every rate tried, and its runs, by seed, as paths in the study."""
    return {
        "learning_rate": finite(study.learning_rates.get(method)),
        "best_rate_at_edge": study.best_at_edge(method),
        "rates_tried": {f"{rate:g}": finite(loss) for rate, loss in study.rates_tried(method).items()},
        "runs": {str(run.seed): os.path.relpath(run.path, study.path) for run in study.of(method)},
    }


def _finite(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: finite(value) for name, value in flat.items()}
