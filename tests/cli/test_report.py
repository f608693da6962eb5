"""`fedmira report` on folders made up from numbers: what it prints as JSON, what it writes as CSV, what it keeps."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.report.conftest import write_run, write_study


def test_json_of_a_study_has_its_rows_and_every_client(fedmira, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", methods=("local_only", "mira"), rounds=1)
    facts = json.loads(fedmira("report", study, "--json").out)
    assert facts["report"] == str(study / "report" / "index.html")
    assert [row["method"] for row in facts["methods"]] == ["local_only", "mira"]
    low, high = facts["methods"][1]["difference_interval"]
    assert low < facts["methods"][1]["difference"] < high
    assert set(facts["clients"]) == {"local_only", "mira"}
    assert set(facts["clients"]["mira"]) == {"0", "1", "2"}
    assert len(facts["clients"]["mira"]["2"]) == 16


def test_json_of_a_run_has_its_summary(fedmira, tmp_path: Path) -> None:
    facts = json.loads(fedmira("report", write_run(tmp_path / "run", rounds=1), "--json").out)
    assert facts["mean_loss"] > 0
    assert facts["epsilon"] is None
    assert len(facts["clients"]) == 16


def test_csv_has_a_row_for_every_method_seed_and_client(fedmira, tmp_path: Path) -> None:
    study, file = write_study(tmp_path / "study", rounds=1), tmp_path / "tables" / "numbers.csv"
    outcome = fedmira("report", study, "--csv", file)
    assert outcome.code == 0
    assert outcome.out == f"Report: {study / 'report' / 'index.html'}\nCSV: {file}\n"
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len({(r["method"], r["seed"], r["client"]) for r in rows}) == 4 * 3 * 16
    told = json.loads(fedmira("report", study, "--csv", tmp_path / "other.csv", "--json").out)
    assert told["csv"] == str(tmp_path / "other.csv")
    client = told["clients"]["mira"]["1"][rows[0]["client"]]
    [row] = [r for r in rows if (r["method"], r["seed"], r["client"]) == ("mira", "1", rows[0]["client"])]
    assert float(row["difference"]) == client["difference"]


def test_a_file_that_is_there_stays_and_nothing_else_is_written(fedmira, tmp_path: Path) -> None:
    run, file = write_run(tmp_path / "run", rounds=1), tmp_path / "mine.csv"
    file.write_text("keep")
    outcome = fedmira("report", run, "--csv", file)
    assert outcome.code == 2
    assert "mine.csv exists; remove it or give another name" in outcome.err
    assert file.read_text() == "keep"
    assert not (run / "report").exists()
