"""Claims: every client is compared with itself alone, seed by seed; the files hold the same numbers and no formulas."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.report.test_table import two_client_study, without

from fedmira.errors import UsageError
from fedmira.report.clients import client_facts, client_rows, csv_text, outcomes, write_csv
from fedmira.report.page import render
from fedmira.report.reading import StudyRecord, read
from fedmira.report.study_sections import END_CLIENTS, client_table
from fedmira.report.table import render_table, rows_of

Make = Callable[..., Path]
FIRST, SECOND = "family0-client0", "family0-client1"


def study_of(path: Path) -> StudyRecord:
    record = read(path)
    assert isinstance(record, StudyRecord)
    return record


@pytest.fixture
def study(make_study: Make) -> StudyRecord:
    """mira harms the second client on seed 0 by 25 %, and halves nobody's loss but the first's on seed 1."""
    losses = {
        ("local_only", 0): (2.0, 4.0),
        ("mira", 0): (2.0, 5.0),
        ("local_only", 1): (3.0, 2.0),
        ("mira", 1): (1.5, 2.0),
    }
    return study_of(two_client_study(make_study, losses))


def test_every_client_beside_itself_alone(study: StudyRecord) -> None:
    found = {(one.method, one.seed, one.client): one for one in outcomes(study)}
    assert len(found) == 2 * 2 * 2
    worse, better = found["mira", 0, SECOND], found["mira", 1, FIRST]
    assert (worse.loss, worse.difference, worse.relative_difference) == (5.0, 1.0, 0.25)
    assert (better.difference, better.relative_difference) == (-1.5, -0.5)
    assert (worse.test_examples, worse.test_tokens, worse.task) == (10, 10, "family0")
    assert worse.run_upload_bytes == 2 * 2 * 786_432
    alone = found["local_only", 0, SECOND]
    assert (alone.loss, alone.difference, alone.relative_difference) == (4.0, None, None)


def test_rows_are_means_over_the_compared_seeds(study: StudyRecord) -> None:
    first, second = client_rows(study)
    assert (first.client, first.test_examples, first.local_loss) == (FIRST, 10, 2.5)
    assert first.changes == {"mira": pytest.approx(-0.25)}
    assert (second.local_loss, second.changes) == (3.0, {"mira": pytest.approx(0.125)})


def test_seeds_that_are_not_compared_are_in_the_files_and_not_in_the_table(make_study: Make) -> None:
    losses = {(m, s): (2.0 + s, 2.0) for m in ("local_only", "mira", "fedit") for s in (0, 1)}
    study = study_of(without(two_client_study(make_study, losses), ("fedit", 1)))
    assert client_rows(study)[0].local_loss == 2.0
    assert {(one.method, one.seed) for one in outcomes(study)} == set(losses) - {("fedit", 1)}


def test_json_is_by_method_seed_and_client_and_finite(make_study: Make) -> None:
    losses = {("local_only", 0): (1.0, 1.0), ("mira", 0): (math.nan, 2.0)}
    facts = json.loads(json.dumps(client_facts(study_of(two_client_study(make_study, losses))), allow_nan=False))
    assert facts["mira"]["0"][FIRST]["loss"] is None
    assert facts["mira"]["0"][FIRST]["relative_difference"] is None
    assert facts["mira"]["0"][SECOND] | {"rouge_l": 0, "exact_match": 0} == {
        "loss": 2.0,
        "difference": 1.0,
        "relative_difference": 1.0,
        "test_tokens": 10,
        "test_examples": 10,
        "task": "family0",
        "rouge_l": 0,
        "exact_match": 0,
    }
    assert facts["local_only"]["0"][FIRST]["difference"] is None


def test_csv_reads_back(study: StudyRecord) -> None:
    text = csv_text(outcomes(study))
    assert text.count("\r\n") == text.count("\n") == 1 + 8
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    [row] = [r for r in rows if (r["method"], r["seed"], r["client"]) == ("mira", "0", SECOND)]
    assert (float(row["loss"]), float(row["difference"]), row["test_tokens"]) == (5.0, 1.0, "10")
    assert {r["difference"] for r in rows if r["method"] == "local_only"} == {""}


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\uff1d1", "  =1"])
def test_no_name_is_a_formula(make_run: Make, name: str) -> None:
    run = read(make_run(families=1, clients_per_family=1, rounds=1, name_of=lambda *_: name, task_of=lambda _: name))
    [row] = csv.DictReader(io.StringIO(csv_text(outcomes(run)), newline=""))
    assert row["client"] == row["task"] == f"'{name}"
    assert (row["difference"], row["seed"]) == ("", "0")


def test_other_names_stay_and_control_characters_are_written_out(make_run: Make) -> None:
    name = 'ward "3", M\xfcnchen; a=1\r\n\x1b[31m\ud800'
    path = make_run(families=1, clients_per_family=1, rounds=1, name_of=lambda *_: name)
    write_csv(read(path), file := path.parent / "new" / "numbers.csv")
    with file.open(encoding="utf-8", newline="") as stream:
        [row] = csv.DictReader(stream)
    assert row["client"] == 'ward "3", M\xfcnchen; a=1\\r\\n\\x1b[31m\\ud800'


def test_nothing_is_overwritten(study: StudyRecord, tmp_path: Path) -> None:
    mine, link = tmp_path / "mine.csv", tmp_path / "link.csv"
    mine.write_text("keep")
    link.symlink_to(tmp_path / "nowhere")
    for path in (mine, link):
        with pytest.raises(UsageError, match="exists; remove it or give another name"):
            write_csv(study, path)
    assert mine.read_text() == "keep"
    assert not (tmp_path / "nowhere").exists()


# --------------------------------------------------------------------------------------------------------- on the page


def section(page: str) -> str:
    return page.split("<h2>Client by client</h2>")[1].split("</section>")[0]


def test_the_page_has_a_line_per_client_the_worst_first_and_marks_harm(study: StudyRecord) -> None:
    found = section(render(study))
    assert re.findall(r'scope="row">([^<]*)', found) == [SECOND, FIRST]
    assert '<td class="harmed">+12.5&nbsp;%</td>' in found
    assert "<td>-25.0&nbsp;%</td>" in found
    assert found.count("harmed") == 2, "one cell and the note"
    assert "mean over seeds" in found
    assert "Sorted by mira, the worst first." in found
    assert "<details>" not in found


def test_many_clients_are_folded_and_very_many_are_cut_to_both_ends(make_study: Make) -> None:
    settings = {"methods": ("local_only", "mira"), "seeds": (0,), "rounds": 1}
    some = study_of(make_study(**settings, families=4, clients_per_family=5))
    assert "<summary>Show 20 clients</summary>" in section(render(some))
    assert "mean over seeds" not in section(render(some))
    many = study_of(make_study(**settings, families=20, clients_per_family=5))
    table = client_table(many)
    assert table is not None
    assert len(table.rows) == 2 * END_CLIENTS
    assert f"Only the {END_CLIENTS} at each end of 100; `fedmira report --csv` writes all." in table.note
    changes = sorted((row.changes["mira"] for row in client_rows(many)), reverse=True)
    shown = [float(row["cells"][0]["text"].removesuffix(" %")) for row in table.rows]
    assert shown == [round(100 * change, 1) + 0 for change in changes[:END_CLIENTS] + changes[-END_CLIENTS:]]


def test_without_training_alone_there_is_no_such_table(make_study: Make, make_run: Make) -> None:
    for path in (make_study(methods=("mira", "fedit")), make_study(methods=("local_only",)), make_run()):
        assert "<h2>Client by client</h2>" not in render(read(path))
    assert "<h2>Client by client</h2>" not in render(read(make_study(finished=False)))


def test_a_client_that_diverged_is_harmed(make_study: Make) -> None:
    losses = {("local_only", 0): (1.0, 1.0), ("mira", 0): (math.nan, 1.005)}
    page = section(render(study_of(two_client_study(make_study, losses))))
    assert '<td class="harmed">not finite</td>' in page
    assert "<td>+0.5&nbsp;%</td>" in page


def test_seeds_on_which_training_alone_diverged_say_nothing_of_a_client(make_study: Make) -> None:
    losses = {("local_only", 0): (math.nan, 1.0), ("local_only", 1): (2.0, 1.0), ("mira", 0): (1.0, 1.0)}
    first, second = client_rows(study_of(two_client_study(make_study, {**losses, ("mira", 1): (1.0, 1.0)})))
    assert (first.local_loss, first.changes) == (2.0, {"mira": -0.5})
    assert second.changes == {"mira": 0.0}


def test_clients_are_sorted_by_the_best_method_with_finite_numbers(make_study: Make) -> None:
    losses = {("local_only", 0): (1.0, 2.0), ("fedit", 0): (math.nan, 1.0), ("mira", 0): (1.5, 1.0)}
    table = client_table(study_of(two_client_study(make_study, losses)))
    assert table is not None
    assert "Sorted by mira, the worst first." in table.note
    assert [row["name"] for row in table.rows] == [FIRST, SECOND]


# ----------------------------------------------------------------------------------------------------------- of chance


def test_chance_is_named_where_test_examples_are_few(make_study: Make) -> None:
    path = make_study(methods=("local_only", "mira"), seeds=(0,))
    note = "Clients have few test examples (10 for the median one), so some look harmed by chance: see "
    assert note in render_table(rows_of(read(path)))
    assert note in render(read(path))
    for manifest in path.glob("runs/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"test": 10', '"test": 100'))
    assert "by chance" not in render_table(rows_of(read(path)))
    assert "by chance" not in render_table(rows_of(read(make_study(methods=("mira",)))))
