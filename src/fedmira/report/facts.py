"""What was read from a directory as JSON: what `--json` prints."""

from __future__ import annotations

import os
from typing import Any

from fedmira.formats import finite
from fedmira.report.clients import client_facts
from fedmira.report.reading import RunRecord, StudyRecord
from fedmira.report.summary import summary_of_run
from fedmira.report.table import rows_of


def facts_of(record: RunRecord | StudyRecord) -> dict[str, Any]:
    """The closing numbers of a run; or of a study `methods`, and `clients` by method, seed and client."""
    if isinstance(record, RunRecord):
        return summary_of_run(record).facts()
    methods = [{**row.facts(), **_how_made(record, row.method)} for row in rows_of(record)]
    return {"methods": methods, "clients": client_facts(record)}


def _how_made(study: StudyRecord, method: str) -> dict[str, Any]:
    """The rate of a method, the validation loss of every rate tried, and its runs, by seed, as paths in the study."""
    return {
        "learning_rate": finite(study.learning_rates.get(method)),
        "best_rate_at_edge": study.best_at_edge(method),
        "rates_tried": {f"{rate:g}": finite(loss) for rate, loss in study.rates_tried(method).items()},
        "runs": {str(run.seed): os.path.relpath(run.path, study.path) for run in study.of(method)},
    }
