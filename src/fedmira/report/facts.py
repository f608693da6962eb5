"""What was read from a directory as JSON: what `--json` prints."""

from __future__ import annotations

from typing import Any

from fedmira.report.clients import client_facts
from fedmira.report.reading import RunRecord, StudyRecord
from fedmira.report.summary import summary_of_run
from fedmira.report.table import rows_of


def facts_of(record: RunRecord | StudyRecord) -> dict[str, Any]:
    """The closing numbers of a run; or of a study `methods`, and `clients` by method, seed and client."""
    if isinstance(record, RunRecord):
        return summary_of_run(record).facts()
    return {"methods": [row.facts() for row in rows_of(record)], "clients": client_facts(record)}
