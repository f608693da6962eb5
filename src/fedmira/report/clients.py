"""What every client came to under every method on every seed: as JSON, as CSV, and averaged over seeds.

Knows nothing about HTML.
"""

from __future__ import annotations

import csv
import io
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.errors import UsageError
from fedmira.evaluation.meters import mean, relative_changes
from fedmira.formats import finite, printable
from fedmira.report.reading import REFERENCE_METHOD, RunRecord, StudyRecord
from fedmira.runs.atomic import make_folder, write_bytes_atomically


class Outcome(NamedTuple):
    """One client at the end of one run. A number is None where nothing was measured."""

    method: str
    seed: int
    client: str
    task: str
    test_examples: int | None
    """Held by the client."""
    test_tokens: int
    """Answer tokens that the loss is a mean over."""
    loss: float | None
    """Test loss per answer token, nats."""
    difference: float | None
    """`loss` minus that of `local_only` on the same draw; below 0 is better. None for `local_only` and without it."""
    relative_difference: float | None
    """`difference` as a share of the loss of `local_only`; the client is harmed where it is above 0.01."""
    rouge_l: float | None
    exact_match: float | None
    run_upload_bytes: int
    """Of all clients in the whole run."""
    run_download_bytes: int


class ClientRow(NamedTuple):
    """One client of a study, averaged over the seeds that are compared."""

    client: str
    test_examples: float | None
    local_loss: float
    changes: Mapping[str, float]
    """Relative difference to training alone, by method."""


def outcomes(record: RunRecord | StudyRecord, *, compared: bool = False) -> list[Outcome]:
    """All judged clients, by method, seed and client in the record's order; `compared`: on the seeds of a study's table
    alone."""
    if isinstance(record, RunRecord):
        return _of_run(record, None)
    runs_of = record.compared if compared else record.of
    runs = [run for method in record.methods for run in runs_of(method) if run.records]
    return [one for run in runs for one in _of_run(run, None if run.is_reference else record.reference(run.seed))]


def _of_run(run: RunRecord, reference: RunRecord | None) -> list[Outcome]:
    alone = {} if reference is None else {one.name: one.loss.value for one in reference.records}
    changes = {} if reference is None else relative_changes(run.records, reference.records)
    examples = run.num_test_examples
    found = []
    for one in run.records:
        loss, before = one.loss.value, alone.get(one.name)
        found.append(
            Outcome(
                method=run.method,
                seed=run.seed,
                client=one.name,
                task=one.task,
                test_examples=examples.get(one.name),
                test_tokens=one.tokens,
                loss=loss,
                difference=None if loss is None or before is None else loss - before,
                relative_difference=changes.get(one.name),
                rouge_l=one.rouge_l.value,
                exact_match=one.exact_match.value,
                run_upload_bytes=run.upload_bytes,
                run_download_bytes=run.download_bytes,
            )
        )
    return found


def client_rows(study: StudyRecord) -> list[ClientRow]:
    """The clients that were judged under some method and alone, in the study's order, on the seeds of its table on
    which training alone gave each a finite loss."""
    by_client: dict[str, list[Outcome]] = {}
    for one in outcomes(study, compared=True):
        if one.loss is not None:
            by_client.setdefault(one.client, []).append(one)
    rows = []
    for client, found in by_client.items():
        alone = [
            one for one in found if one.method == REFERENCE_METHOD and one.loss is not None and math.isfinite(one.loss)
        ]
        seeds = {one.seed for one in alone}
        local_loss = mean(one.loss for one in alone if one.loss is not None)
        changes: dict[str, list[float]] = {}
        for one in found:
            if one.relative_difference is not None and one.seed in seeds:
                changes.setdefault(one.method, []).append(one.relative_difference)
        if local_loss is not None and changes:
            held = mean(one.test_examples for one in alone if one.test_examples is not None)
            rows.append(ClientRow(client, held, local_loss, {method: mean(c) or 0.0 for method, c in changes.items()}))
    return rows


def client_facts(record: RunRecord | StudyRecord) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """As JSON: the numbers of a client by method, seed and client; null for what is unknown or not finite."""
    facts: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for one in outcomes(record):
        numbers = {name: finite(getattr(one, name)) for name in Outcome._fields if name not in _OF_RUN}
        facts.setdefault(one.method, {}).setdefault(str(one.seed), {})[one.client] = numbers
    return facts


_OF_RUN = ("method", "seed", "client", "run_upload_bytes", "run_download_bytes")


def refuse_to_overwrite(path: Path) -> None:
    """Refuse a `path` at which something is, also a link to nothing.

    Raises:
        UsageError: it is there.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists; remove it or give another name")


def write_csv(record: RunRecord | StudyRecord, path: Path) -> None:
    """Write all `outcomes` into the new file `path`, whole or not at all.

    Raises:
        UsageError: something is there.
        SetupError, IntegrityError: the disk refused.
    """
    refuse_to_overwrite(path)
    make_folder(path.absolute().parent)
    # half a character, as of a file name that is not UTF-8, is written out
    write_bytes_atomically(path.absolute(), csv_text(outcomes(record)).encode(errors="backslashreplace"))


def csv_text(rows: Sequence[Outcome]) -> str:
    """The rows as RFC 4180 with a heading; an empty field is unknown, `nan` and `inf` are not finite."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(Outcome._fields)
    writer.writerows([_harmless(value) if isinstance(value, str) else value for value in row] for row in rows)
    return stream.getvalue()


def _harmless(text: str) -> str:
    """`text` on one line, and no formula for a spreadsheet.

    >>> _harmless("=HYPERLINK(...)"), _harmless("ward\\n3")
    ("'=HYPERLINK(...)", 'ward\\\\n3')
    """
    shown = printable(text)
    # some take full-width signs, or those after spaces, for a formula too
    return f"'{shown}" if unicodedata.normalize("NFKC", shown).lstrip()[:1] in set("=+-@") else shown
