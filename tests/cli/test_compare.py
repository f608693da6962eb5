"""`fedmira compare --dry-run`: all runs of a study together, and nothing of them on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CONFIG = """
name: small
data: {source: planted, families: 2, clients_per_family: 1, examples: 12, max_length: 64}
model: {adapter: {rank: 2, targets: [q_proj]}}
training: {local_steps: 1, batch_size: 2}
federation: {rounds: 2}
evaluation: {generation: {enabled: false}}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def test_a_dry_run_sums_up_all_runs_and_keeps_nothing(fedmira, place: Path) -> None:
    rates = "compare.learning_rates=[0.001, 0.01]"
    arguments = ("compare", "c.yaml", rates, "--methods", "local_only,fedit", "--seeds", "3", "--dry-run")
    outcome = fedmira(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert facts["num_runs"] == 2 * (3 + 2)
    fedit, local = facts["methods"]["fedit"], facts["methods"]["local_only"]
    assert facts["seconds"] == pytest.approx(5 * sum(one["start_seconds"] + one["seconds"] for one in (fedit, local)))
    assert facts["upload_bytes"] == 5 * 2 * fedit["upload_bytes_per_round"] > 0
    assert facts["memory_bytes"] == max(fedit["memory_bytes"], local["memory_bytes"]) > 0
    assert "Estimating fedit (2 of 2) ..." in outcome.err
    assert [path.name for path in place.iterdir()] == ["c.yaml"]


def test_a_dry_run_says_that_it_estimates(fedmira) -> None:
    outcome = fedmira("compare", "c.yaml", "--methods", "local_only", "--dry-run")
    assert outcome.out.splitlines()[1] == "Estimating local_only (1 of 1) ..."
    assert "An estimate from small parts of one run of each method." in outcome.out
    assert "choose" not in outcome.out


def test_a_dry_run_refuses_what_a_comparison_refuses(fedmira) -> None:
    Path("mine").mkdir()
    Path("mine/note.txt").write_text("keep")
    outcome = fedmira("compare", "c.yaml", "--methods", "local_only", "--out", "mine", "--dry-run")
    assert outcome.code == 2
    assert "holds something else (note.txt)" in outcome.err


def test_what_was_tuned_is_told_and_where_the_runs_lie(fedmira) -> None:
    words = ("compare", "c.yaml", "compare.learning_rates=[0.001, 0.01]", "--methods", "local_only", "--out", "mine")
    told = fedmira(*words)
    assert told.code == 0, told.err
    facts = json.loads(fedmira("report", "mine", "--json").out)
    (method,) = facts["methods"]
    rates = method["rates_tried"]
    best = min(rates, key=rates.__getitem__)
    assert set(rates) == {"0.001", "0.01"}
    assert method["learning_rate"] == float(best)
    assert f"Learning rates, chosen by validation loss on another draw: local_only {best}.\n" in told.out
    assert method["best_rate_at_edge"]
    assert "at the edge of the grid for local_only:" in told.out
    (run,) = method["runs"].values()
    assert fedmira("export", f"mine/{run}", "--all", "--out", "adapters").code == 0
    again = fedmira("compare", "c.yaml", "--methods", "local_only", "--out", "one")
    assert "Learning rates" not in again.out
    assert "edge" not in again.out
