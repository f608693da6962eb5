"""Writes the report of a run or a study: one HTML file with its styles and drawings inside and nothing from outside.

Names and data are hostile: the template escapes everything but finished drawings, whose texts are escaped by `svg`, and
the page's own policy forbids scripts and any request. Knows nothing about how the numbers came to be.
"""

from __future__ import annotations

import importlib.resources
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fedmira.data.sources.files import unusable_line
from fedmira.data.splits import SPLITS
from fedmira.evaluation.meters import Scores, scores, scores_by_task
from fedmira.formats import (
    NOTHING,
    format_bytes,
    format_loss,
    format_perplexity,
    format_share,
    listed,
    printable,
)
from fedmira.report.figures import colours_of
from fedmira.report.reading import RunRecord, StudyRecord, read
from fedmira.report.run_sections import left_out, privacy, run_sections
from fedmira.report.study_sections import client_table, study_sections, tuned_unlike
from fedmira.report.table import (
    COLUMNS,
    Column,
    Row,
    answer_notes,
    chance_notes,
    comparable,
    format_interval,
    privacy_notes,
    rows_of,
    seed_notes,
)
from fedmira.report.words import edge_line, headline
from fedmira.runs.atomic import make_folder, write_bytes_atomically


def write_report(path: str | os.PathLike[str]) -> Path:
    """Write `report/index.html` into the run or study directory `path`, whole or not at all, and return its path.

    Raises:
        UsageError: `path` is neither a run nor a study.
        IntegrityError: one of its files is missing or damaged.
    """
    page = Path(path) / "report" / "index.html"
    content = render(read(Path(path))).encode("utf-8")
    make_folder(page.parent)
    write_bytes_atomically(page, content)
    return page


def render(record: RunRecord | StudyRecord) -> str:
    """The page as text; equal records give equal pages."""
    run = record if isinstance(record, RunRecord) else (record.runs[0] if record.runs else None)
    sections = run_sections(record) if isinstance(record, RunRecord) else study_sections(record)
    sentences = headline(record)
    rows = rows_of(record)
    table = _table(rows)
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            style=Markup(_resource("style.css")),
            kind="run" if isinstance(record, RunRecord) else "study",
            title=_title(record),
            lead=sentences[0],
            remarks=sentences[1:],
            facts=_facts(record, run),
            headings=[cell["heading"] for cell in table[0]["cells"]] if table else [],
            rows=table,
            notes=chance_notes(rows) + seed_notes(rows, "\N{PLUS-MINUS SIGN}") + privacy_notes(rows),
            answered=answer_notes(rows),
            over_tasks=any(row.task_mean_loss is not None for row in rows),
            compared=isinstance(record, StudyRecord),
            client_table=client_table(record) if isinstance(record, StudyRecord) else None,
            several_runs=isinstance(record, StudyRecord) and len(record.runs) > 1,
            sections=[section for section in sections if section.figures],
            tuning=_tuning(record),
            edge_line=edge_line(record) if isinstance(record, StudyRecord) else "",
            tuned_unlike=tuned_unlike(record) if isinstance(record, StudyRecord) else [],
            tasks=_tasks(record),
            clients=_clients(record),
            left_out=left_out(record) if isinstance(record, RunRecord) else [],
            privacy=privacy(record) if isinstance(record, RunRecord) else [],
            memory=_memory(run),
            config=run.config_text if run else "",
            versions=_versions(run),
            data=_data(run),
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["words"] = _words
    return environment


def _resource(name: str) -> str:
    return (importlib.resources.files("fedmira.report") / name).read_text(encoding="utf-8")


def _visible(value: Any) -> Any:
    """Write out control characters of any text that is not markup yet; line ends stay."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, keep="\n\t")
    return value


def _words(sentence: str) -> Markup:
    """Running text, escaped, in which a number is not parted from its percent sign."""
    return Markup(re.sub(r"(?<=\d) %", "&nbsp;%", escape(_visible(str(sentence)))))


def _title(record: RunRecord | StudyRecord) -> str:
    if isinstance(record, StudyRecord):
        return record.name or record.path.name
    return f"{record.config.get('name', 'run')}: {record.method}, seed {record.seed}"


def _facts(record: RunRecord | StudyRecord, run: RunRecord | None) -> list[tuple[str, str]]:
    """Short facts for the head of the page."""
    facts: list[tuple[str, str]] = []
    if isinstance(record, StudyRecord):
        facts.append(("methods", str(len(record.methods))))
        facts.append(("seed" if len(record.seeds) == 1 else "seeds", ", ".join(map(str, record.seeds))))
        created = record.created
    else:
        facts.append(("seed", str(record.seed)))
        created = str(record.manifest.get("created", ""))
    if run is not None:
        facts.append(("clients", str(len(run.manifest.get("clients", ())))))
        facts.append(("rounds", str(len(run.rounds))))
        source = run.config.get("data", {}).get("source")
        model = run.config.get("model", {}).get("path") or run.manifest.get("model", {}).get("path")
        facts += [(word, str(value)) for word, value in (("data", source), ("base model", model)) if value]
    facts.append(("created", created[:16].replace("T", " ")))
    return [(word, value) for word, value in facts if value]


def _table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Cells of the main table: text, a note on the spread, and whether it is the best of its column."""
    colours = colours_of(row.method for row in rows)
    columns = [column for column in COLUMNS if not column.better or any(column.value(row) for row in rows)]
    best = {column.heading: _best(rows, column) for column in columns}
    table = []
    for row in rows:
        cells = []
        for column in columns:
            value = column.value(row)
            shown = NOTHING if value is None else column.write(value.mean)
            cells.append(
                {
                    "heading": column.heading,
                    "text": shown,
                    "spread": _spread(row, column),
                    "best": shown == best[column.heading],
                }
            )
        table.append({"method": row.method, "colour": colours[row.method], "cells": cells})
    return table


def _spread(row: Row, column: Column) -> str:
    """The interval of a difference, or the deviation over seeds; empty where there is none to show."""
    if column.name == "difference" and row.difference_interval is not None:
        return format_interval(row.difference_interval)
    value = column.value(row)
    if value is None or value.deviation is None or column.write_deviation is None:
        return ""
    return f"\N{PLUS-MINUS SIGN}{column.write_deviation(value.deviation)}"


def _best(rows: Sequence[Row], column: Column) -> str | None:
    """The best value as it is shown, so that what looks equal is marked alike; None if nothing differs or compares."""
    means = [value.mean for row in rows if (value := column.value(row)) is not None and math.isfinite(value.mean)]
    if not column.better or not comparable(rows) or len(set(map(column.write, means))) < 2:
        return None
    return column.write(max(means) if column.better > 0 else min(means))


def _tuning(record: RunRecord | StudyRecord) -> list[dict[str, Any]]:
    """The rates that were tried, method by method, with the chosen one."""
    if not isinstance(record, StudyRecord):
        return []
    return [
        {
            "method": method,
            "tried": [
                {"rate": f"{rate:g}", "loss": format_loss(loss), "chosen": rate == record.learning_rates.get(method)}
                for rate, loss in record.rates_tried(method).items()
            ],
        }
        for method in dict.fromkeys(str(entry["method"]) for entry in record.tuning)
    ]


def _clients(record: RunRecord | StudyRecord) -> list[dict[str, str]]:
    """The clients of a run, one line each; none for a study, whose runs have reports of their own."""
    if not isinstance(record, RunRecord):
        return []
    records = {one.name: one for one in record.records}
    late = {name: f" (joined after round {round_})" for name, round_ in record.joined_after.items()}
    clients = []
    for client in record.manifest.get("clients", ()):
        one = records.get(str(client["name"]))
        clients.append(
            {
                "name": str(client["name"]) + late.get(str(client["name"]), ""),
                "task": str(client.get("task") or ""),
                "examples": " / ".join(str(client.get(split, NOTHING)) for split in SPLITS),
                **_score_cells(scores([one] if one else [])),
            }
        )
    return clients


def _tasks(record: RunRecord | StudyRecord) -> list[dict[str, str]]:
    """The tasks of a judged run, one line each."""
    if not isinstance(record, RunRecord):
        return []
    return [
        {"name": task or "no task label", **_score_cells(found)}
        for task, found in scores_by_task(record.records).items()
    ]


def _score_cells(found: Scores) -> dict[str, str]:
    return {
        "loss": format_loss(found.loss),
        "perplexity": format_perplexity(found.perplexity),
        "rouge_l": format_loss(found.rouge_l),
        "exact": format_share(found.exact_match),
    }


def _memory(run: RunRecord | None) -> list[tuple[str, str]]:
    """Bytes at one client as the paper counts them, and what was measured."""
    if run is None:
        return []
    memory: Mapping[str, Any] = run.manifest.get("memory", {})
    parts = [(word, memory.get(f"{word}_bytes")) for word in ("model", "adapter", "optimizer")]
    found = [(word, format_bytes(float(count))) for word, count in parts if count is not None]
    if len(found) == len(parts):
        found.append(("together", format_bytes(sum(float(count) for _, count in parts if count is not None))))
    if run.peak_memory_bytes:
        found.append(("measured peak", format_bytes(run.peak_memory_bytes)))
    return found


def _versions(run: RunRecord | None) -> list[tuple[str, str]]:
    if run is None:
        return []
    return [("fedmira", str(run.manifest.get("fedmira", ""))), *_flat(run.manifest.get("versions", {}))]


def _data(run: RunRecord | None) -> list[tuple[str, str]]:
    """Where the data is from; what could not be used comes first, as a list of many files is cut."""
    if run is None:
        return []
    data: Mapping[str, Any] = run.manifest.get("data", {})
    what, _, details = unusable_line(data).partition(": ")
    return [*([(what, details)] if what else []), *_flat(data)]


def _flat(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted key, text); long lists are cut with a count."""
    if isinstance(content, Mapping):
        return [
            line for key, value in content.items() for line in _flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    shown = listed(content, 6) if isinstance(content, list) else str(content)
    return [(prefix, shown[:300])]
