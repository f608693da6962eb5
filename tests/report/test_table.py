"""Claims: the closing table pairs each run with local training of the same seed, averages over seeds, and is safe."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmira.errors import IntegrityError, UsageError
from fedmira.report.page import render
from fedmira.report.reading import StudyRecord, read, read_run
from fedmira.report.summary import facts_of, lines_of
from fedmira.report.table import comparable, render_table, rows_of, spread
from fedmira.runs.lines import event_line

Make = Callable[..., Path]


def two_client_study(make_study: Make, losses: dict[tuple[str, int], tuple[float, float]]) -> Path:
    """A study whose final losses of two clients are given by (method, seed)."""
    methods = tuple(dict.fromkeys(method for method, _ in losses))
    seeds = tuple(dict.fromkeys(seed for _, seed in losses))
    study = make_study(methods=methods, seeds=seeds, families=1, clients_per_family=2, rounds=2)
    entries = json.loads((study / "study.json").read_text())["runs"]
    for entry in entries:
        metrics = study / entry["path"] / "metrics.jsonl"
        *others, last = metrics.read_text().splitlines()
        final = json.loads(last)
        for client, loss in zip(final["clients"].values(), losses[entry["method"], entry["seed"]], strict=True):
            client |= {"loss_sum": loss * 10, "tokens": 10}
        metrics.write_text("\n".join([*others, json.dumps(final)]) + "\n")
    return study


def test_numbers_by_hand(make_study: Make) -> None:
    study = two_client_study(
        make_study,
        {
            ("local_only", 0): (2.0, 4.0),
            ("mira", 0): (1.0, 5.0),
            ("local_only", 1): (3.0, 3.0),
            ("mira", 1): (2.0, 2.0),
        },
    )
    local, mira = rows_of(read(study))
    assert local.method == "local_only"
    assert local.difference is None
    assert local.share_harmed is None
    assert mira.mean_loss == (pytest.approx(2.5), pytest.approx(statistics.stdev([3.0, 2.0])))
    assert mira.worst_tenth_loss == (pytest.approx(3.5), pytest.approx(statistics.stdev([5.0, 2.0])))
    # paired by seed: 3 - 3 and 2 - 3
    assert mira.difference == (pytest.approx(-0.5), pytest.approx(statistics.stdev([0.0, -1.0])))
    # one of two clients on seed 0, none on seed 1
    assert mira.share_harmed == (0.25, pytest.approx(statistics.stdev([0.5, 0.0])))
    assert mira.upload_bytes == (2 * 2 * 786_432, 0.0)
    assert local.upload_bytes == (0.0, 0.0)
    assert "2.500 (0.707)" in render_table([local, mira])


def test_a_run_alone_gives_one_row_without_comparison(make_run: Make) -> None:
    (row,) = rows_of(read(make_run(method="fedit")))
    assert (row.method, row.seeds, row.share_harmed, row.difference) == ("fedit", (0,), None, None)
    assert row.mean_loss is not None
    assert row.mean_loss.deviation is None
    assert "Harmed" not in render_table([row])


def test_unfinished_runs_are_left_out_and_counted(make_study: Make) -> None:
    study = make_study(methods=("local_only", "mira"), seeds=(0, 1))
    metrics = study / "runs/1-seed1/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    row = rows_of(read(study))[1]
    assert (row.seeds, row.num_unfinished) == ((0,), 1)
    # not the one round of the other run
    judged = read_run(study / "runs/1-seed0")
    assert row.upload_bytes == row.download_bytes == (8 * 16 * 786_432, None)
    assert row.seconds == (judged.seconds, None)
    assert "1 run without test numbers left out" in render_table(rows_of(read(study)))


def without(study: Path, *missing: tuple[str, int]) -> Path:
    """The study with the runs (method, seed) not begun: it lists their seeds and methods, and no such runs."""
    content = json.loads((study / "study.json").read_text())
    content["runs"] = [entry for entry in content["runs"] if (entry["method"], entry["seed"]) not in missing]
    (study / "study.json").write_text(json.dumps(content))
    return study


def hard_seed_study(make_study: Make) -> Path:
    """mira beats fedit on both seeds that fedit finished; fedit lacks the hard one."""
    methods = {"local_only": 2.5, "mira": 2.0, "fedit": 2.4}
    losses = {(m, seed): (loss + 6 * (seed == 2),) * 2 for seed in range(3) for m, loss in methods.items()}
    return without(two_client_study(make_study, losses), ("fedit", 2))


def test_methods_are_compared_on_the_seeds_that_all_finished(make_study: Make) -> None:
    local, mira, fedit = rows = rows_of(read(hard_seed_study(make_study)))
    assert local.seeds == mira.seeds == fedit.seeds == (0, 1)
    assert [row.num_unfinished for row in rows] == [0, 0, 1]
    assert [row.mean_loss and row.mean_loss.mean for row in rows] == pytest.approx([2.5, 2.0, 2.4])
    assert mira.difference == (pytest.approx(-0.5), 0.0)
    table = render_table(rows)
    assert "Mean over the 2 seeds that all methods with test numbers finished" in table
    assert "The comparison is not complete: 1 run without test numbers left out." in table
    assert (mira.facts()["num_seeds"], mira.facts()["seeds"]) == (2, (0, 1))


def test_one_shared_seed_is_named_as_one(make_study: Make) -> None:
    study = without(make_study(methods=("local_only", "mira")), ("mira", 1), ("mira", 2))
    table = render_table(rows_of(read(study)))
    assert "Numbers of the one seed that all methods with test numbers finished." in table
    assert "Mean over" not in table


def test_rows_without_a_shared_seed_are_not_compared(make_study: Make) -> None:
    study = without(
        make_study(methods=("local_only", "mira"), seeds=(0, 1, 2)), ("local_only", 0), ("mira", 1), ("mira", 2)
    )
    rows = rows_of(read(study))
    assert [row.seeds for row in rows] == [(1, 2), (0,)]
    assert not comparable(rows)
    assert "No seed was finished by all methods" in render_table(rows)


def test_a_method_that_never_began_does_not_hide_the_others(make_study: Make) -> None:
    study = without(make_study(methods=("local_only", "mira"), seeds=(0, 1)), ("mira", 0), ("mira", 1))
    local, mira = rows_of(read(study))
    assert (local.seeds, mira.seeds, mira.num_unfinished, mira.mean_loss) == ((0, 1), (), 2, None)


def test_seconds_and_bytes_are_sums_over_all_events(make_run: Make) -> None:
    path = make_run(rounds=3)
    run = read_run(path)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    expected = sum(v for e in events for k, v in e["timing"].items() if k.endswith("_seconds"))
    assert run.seconds == pytest.approx(expected)
    assert run.download_bytes == sum(e.get("download_bytes", 0) for e in events) > 0


def test_a_round_written_again_after_a_resume_counts_once(make_run: Make) -> None:
    path = make_run(rounds=3)
    before = rows_of(read(path))
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    # before it was stopped, another number
    stopped = [line.replace('"upload_bytes": ', '"upload_bytes": 1') for line in lines[2:4]]
    metrics.write_text("".join([*lines[:2], *stopped, *lines[2:]]))
    assert rows_of(read(path)) == before


def test_a_half_written_last_line_is_forgiven_and_damage_is_not(make_run: Make) -> None:
    path = make_run(rounds=3, finished=False)
    metrics = path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"event": "fin')
    assert len(read_run(path).rounds) == 3
    metrics.write_bytes(whole.encode() + '{"client": "é'.encode()[:-1])
    assert len(read_run(path).rounds) == 3, "torn inside a character"
    metrics.write_text('{"event": "ro\n' + whole)
    with pytest.raises(IntegrityError, match="line 1, is damaged"):
        read_run(path)
    metrics.write_text(whole.replace('"upload_bytes"', '"uploaded"'))
    with pytest.raises(IntegrityError, match="'upload_bytes' is missing"):
        read_run(path)
    metrics.write_text(whole)
    (path / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_run(path)


def test_names_may_hold_what_ends_a_line_of_text(make_run: Make) -> None:
    """Events are written unescaped, and only a newline ends one."""
    path = make_run(
        rounds=1, name_of=lambda family, k: f"a\u2028b\u0085c{family}-{k}", task_of=lambda family: "t\u2029"
    )
    metrics = path / "metrics.jsonl"
    lines = [event_line(json.loads(line)) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    assert "\u2028" in metrics.read_text(encoding="utf-8")
    run = read_run(path)
    assert len(run.records) == 16
    assert run.records[0].name == "a\u2028b\u0085c0-0"


def test_a_graph_of_the_wrong_size_is_refused(make_run: Make) -> None:
    path = make_run()
    graph = json.loads((path / "graph.json").read_text())
    (path / "graph.json").write_text(json.dumps({**graph, "adjacency": graph["adjacency"][1:]}))
    with pytest.raises(IntegrityError, match="16 names but no matrix of 16 x 16"):
        read_run(path)


def test_other_folders_are_refused(tmp_path: Path, make_study: Make) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        rows_of(read(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="neither"):
        rows_of(read(tmp_path))
    study = make_study(seeds=(0,))
    content = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps({**content, "runs": content["runs"] * 2}))
    with pytest.raises(IntegrityError, match="twice"):
        rows_of(read(study))


def test_hostile_method_names_stay_on_their_line(make_study: Make) -> None:
    rows = rows_of(read(make_study(methods=("local_only", "a\x1b[31m|b\nc"), seeds=(0,))))
    text, markdown = render_table(rows), render_table(rows, markdown=True)
    assert "\x1b" not in text + markdown
    assert len(text.splitlines()) == 8
    assert r"| a\\x1b[31m\|b\\nc |" in markdown


def test_markdown_is_a_table_with_the_same_cells(make_study: Make) -> None:
    rows = rows_of(read(make_study(seeds=(0, 1))))
    header, rule, *lines = render_table(rows, markdown=True).split("\n\n")[0].splitlines()
    assert header.startswith("| method | mean loss |")
    assert set(rule) <= set("|-: ")
    assert [line.count("|") for line in lines] == [header.count("|")] * 4
    for line, plain in zip(lines, render_table(rows).splitlines()[2:], strict=False):
        assert line.split("|")[2].strip() in plain


def test_json_facts_are_finite_and_flat(make_study: Make) -> None:
    study = two_client_study(make_study, {("local_only", 0): (1.0, 1.0), ("mira", 0): (float("nan"), 1.0)})
    local, mira = (row.facts() for row in rows_of(read(study)))
    json.dumps([local, mira], allow_nan=False)
    assert mira["mean_loss"] is None
    assert mira["share_harmed"] == 0.5
    assert local["mean_loss"] == 1.0
    assert "nan" in render_table(rows_of(read(study)))


ANSWERS = "at most 8 answers per client, each cut at 32 tokens"


def test_what_rouge_covers_is_a_footnote_where_it_stands(make_study: Make, make_run: Make) -> None:
    rows = rows_of(read(make_study(seeds=(0,))))
    for text in (render_table(rows), render_table(rows, markdown=True)):
        assert text.count(f"Rouge-L and exact match: {ANSWERS}.") == 1
    assert (rows[0].facts()["max_answers"], rows[0].facts()["max_answer_tokens"]) == (8, 32)
    assert "Rouge-L and exact match" not in render_table(rows_of(read(make_run(finished=False))))
    assert sum(ANSWERS in line for line in lines_of(read_run(make_run()))) == 2


def test_limits_of_answers_come_from_the_config_of_the_run(make_run: Make) -> None:
    path = make_run()
    config = path / "config.resolved.yaml"
    config.write_text(config.read_text().replace("examples_per_client: 8", "examples_per_client: null"))
    assert "Rouge-L and exact match: all answers, each cut at 32 tokens." in render_table(rows_of(read(path)))
    config.write_text(config.read_text().replace("max_new_tokens: 32", "max_new_tokens: many"))
    with pytest.raises(IntegrityError, match="not a whole run directory"):
        read_run(path)


def test_spread_of_nothing_one_and_many() -> None:
    assert spread([]) is None
    assert spread([None, 2.0]) == (2.0, None)
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def test_study_keeps_methods_in_its_order_and_finds_its_reference(make_study: Make) -> None:
    record = read(make_study(methods=("mira", "local_only")))
    assert isinstance(record, StudyRecord)
    assert [row.method for row in rows_of(record)] == ["mira", "local_only"]
    reference = record.reference(1)
    assert reference is not None
    assert (reference.method, reference.seed) == ("local_only", 1)
    assert record.reference(7) is None


def test_summary_of_a_run_for_the_command_line(make_run: Make) -> None:
    path = make_run(rounds=4)
    facts, lines = facts_of(read_run(path)), lines_of(read_run(path))
    json.dumps(facts, allow_nan=False)
    assert facts["rounds"] == 4
    assert facts["num_clients"] == 16
    assert any(line.startswith("test loss") for line in lines)
    assert len(facts["clients"]) == 16
    assert len(facts["tasks"]) == 4
    for one in (*facts["clients"].values(), *facts["tasks"].values()):
        assert set(one) == {"loss", "perplexity", "rouge_l", "exact_match"}
        assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    mean = statistics.fmean(one["loss"] for one in facts["clients"].values())
    assert facts["mean_loss"] == pytest.approx(mean)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    seconds = sum(event["timing"]["train_seconds"] for event in rounds)
    assert facts["tokens_per_second"] == pytest.approx(sum(event["tokens"] for event in rounds) / seconds)
    assert any("tokens per second" in line for line in lines)
    unjudged = read_run(make_run(finished=False))
    assert "mean_loss" not in facts_of(unjudged)
    assert not any("test loss" in line for line in lines_of(unjudged))


def test_what_was_sent_is_told_where_nobody_was_judged(make_run: Make) -> None:
    record = read_run(make_run(rounds=2, finished=False))
    sent = 2 * 16 * 786_432
    assert (facts_of(record)["upload_bytes"], facts_of(record)["download_bytes"]) == (sent, sent)
    assert "sent             24.0 MiB up, 24.0 MiB down" in lines_of(record)


def test_a_seed_on_which_training_alone_has_no_finite_loss_costs_the_others_nothing(make_study: Make) -> None:
    nan = float("nan")
    losses = {
        ("local_only", 0): (3.0, 3.0),
        ("mira", 0): (2.0, 2.0),
        ("local_only", 1): (nan, 3.0),
        ("mira", 1): (1.0, 2.0),
    }
    local, mira = rows = rows_of(read(two_client_study(make_study, losses)))
    assert (mira.difference, mira.difference_seeds) == ((pytest.approx(-1.0), None), (0,))
    assert local.difference_seeds is None
    note = "vs local: only seeds on which training alone has a finite test loss (1 of 2 seeds)."
    assert note in render_table(rows)
    assert mira.facts()["difference_seeds"] == (0,)
    # a loss of its own that is not finite is the method's fault
    losses |= {("local_only", 1): (3.0, 3.0), ("mira", 1): (nan, 2.0)}
    [_, mira] = rows = rows_of(read(two_client_study(make_study, losses)))
    assert mira.difference is not None
    assert math.isnan(mira.difference.mean)
    assert "vs local: only" not in render_table(rows)
    [_, mira] = rows = rows_of(read(two_client_study(make_study, dict.fromkeys(losses, (nan, nan)))))
    assert (mira.difference, mira.difference_seeds) == (None, ())
    assert "(0 of 2 seeds)" in render_table(rows)


def test_rows_with_different_seeds_beside_training_alone_are_counted_by_name(make_study: Make) -> None:
    wild = "a\x1b[31m"
    study = make_study(methods=("local_only", "mira", wild), seeds=(0, 1, 2))
    rows = rows_of(read(without(study, ("local_only", 1), ("local_only", 2), ("mira", 0), (wild, 2))))
    text = render_table(rows)
    assert "(mira 0 of 2 seeds, a\\x1b[31m 1 of 2 seeds)" in text
    assert "\x1b" not in text


# ------------------------------------------------------------------------------------------------------------ intervals


def test_three_seeds_give_the_interval_of_the_paired_difference(make_study: Make) -> None:
    losses = {("local_only", seed): (3.0 + seed, 3.0 + seed) for seed in range(3)}
    losses |= {("mira", seed): (3.0 + seed - d, 3.0 + seed - d) for seed, d in enumerate((0.1, 0.2, 0.3))}
    path = two_client_study(make_study, losses)
    local, mira = rows = rows_of(read(path))
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert mira.difference_interval == pytest.approx((-0.2 - reach, -0.2 + reach))
    assert mira.facts()["difference_interval"] == mira.difference_interval
    assert local.difference_interval is None
    assert local.facts()["difference_interval"] is None
    text, page = render_table(rows), render(read(path))
    assert "  -0.200 [-0.448, +0.048]  " in text
    assert "-0.200<small>[-0.448, +0.048]</small>" in page
    for shown in (text, page.replace("&nbsp;", " ").replace("&#39;", "'")):
        assert "in square brackets the 95 % interval of the mean paired difference (Student's t over seeds)." in shown


def test_two_seeds_keep_the_deviation_and_say_nothing_of_an_interval(make_study: Make) -> None:
    rows = rows_of(read(make_study(methods=("local_only", "mira"), seeds=(0, 1))))
    assert rows[1].difference_interval is None
    assert "95 %" not in render_table(rows)
    assert "Student" not in render(read(make_study(methods=("local_only", "mira"), seeds=(0, 1))))


# -------------------------------------------------------------------------------------------------------------- privacy


def noised(path: Path, spent: dict[str, float | None]) -> Path:
    """The run with this epsilon of its clients in every round."""
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "round":
            event["privacy"] = {"delta": 1e-5, "epsilon": spent}
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


@pytest.mark.parametrize(
    ("spent", "line", "known"),
    [
        ({"a": 3.2, "b": 1.0}, "epsilon          3.2 at most (delta 1e-05)", 3.2),
        ({"a": 16611.3}, "epsilon          16,611 at most (delta 1e-05), which protects little", 16611.3),
        ({"a": 1.0, "b": None}, "epsilon          inf at most (delta 1e-05), which protects little", None),
    ],
)
def test_the_summary_of_a_run_says_what_was_given_away(
    make_run: Make, spent: dict[str, float | None], line: str, known: float | None
) -> None:
    record = read_run(noised(make_run(rounds=2), spent))
    assert line in lines_of(record)
    assert (facts_of(record)["epsilon"], facts_of(record)["delta"]) == (known, 1e-5)


def test_without_noise_nothing_is_said_of_epsilon(make_run: Make, make_study: Make) -> None:
    record = read_run(make_run(rounds=2))
    assert (facts_of(record)["epsilon"], facts_of(record)["delta"]) == (None, None)
    assert not any("epsilon" in line for line in lines_of(record))
    assert "psilon" not in render_table(rows_of(read(make_study(rounds=1))))


def test_a_study_says_what_each_method_gave_away_at_most(make_study: Make) -> None:
    study = make_study(methods=("local_only", "mira", "fedit"), seeds=(0, 1), rounds=1)
    for position, seed, spent in ((1, 0, 2.0), (1, 1, 4.5), (2, 0, 300.0)):
        noised(study / f"runs/{position}-seed{seed}", {"family0-client0": spent})
    rows = rows_of(read(study))
    assert [row.facts()["epsilon"] for row in rows] == [None, 4.5, 300.0]
    note = (
        "Epsilon of any client in one run: mira 4.5 at most (delta 1e-05); "
        "fedit 300 at most (delta 1e-05), which protects little. Runs on the same data add up."
    )
    assert note in render_table(rows)
    assert note in render(read(study))
