"""The study of all methods: which learning rates are tried, in which order, and which is chosen."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.stats
from tests.tools import tool

from fedmira.config.run import RunConfig

REPOSITORY = Path(__file__).resolve().parent.parent
GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return tool("methods_study")


def tried(
    study: ModuleType, loss: Callable[[float, int], float | None], grid: list[float]
) -> tuple[list[list[float]], Any]:
    """The batches of rates that are asked for until one is chosen, and that one."""
    config = RunConfig.model_validate({"name": "s", "compare": {"learning_rates": grid, "methods": ["fedit"]}})
    of = study.Study("s", config, {})
    found: dict[Any, Any] = {}
    batches = []
    while True:
        rate, untried = study.choose_rate(of, "fedit", found)
        if rate is not None:
            return batches, rate
        batches.append([task.learning_rate for task in untried])
        draws = [task.seed - config.compare.tuning_seed for task in untried]
        assert all(task.tuning and 0 <= draw < 3 for task, draw in zip(untried, draws, strict=True))
        answers = [loss(task.learning_rate, draw) for task, draw in zip(untried, draws, strict=True)]
        found |= {task.key: {"validation_loss": answer} for task, answer in zip(untried, answers, strict=True)}


@pytest.mark.parametrize(
    ("best", "batches"),
    [
        (3e-3, [[1e-3, 3e-3, 1e-2]]),
        (1e-3, [[1e-3, 3e-3, 1e-2], [3e-4]]),
        (3e-4, [[1e-3, 3e-3, 1e-2], [3e-4]]),
        (3e-2, [[1e-3, 3e-3, 1e-2], [3e-2]]),
    ],
)
def test_rates_are_tried_outwards_while_the_outermost_is_best(
    study: ModuleType, best: float, batches: list[list[float]]
) -> None:
    assert tried(study, lambda rate, _: abs(math.log(rate / best)), GRID) == (batches, best)


def test_a_rate_that_diverges_is_never_chosen(study: ModuleType) -> None:
    assert tried(study, lambda rate, _: None if rate > 2e-3 else rate, GRID)[1] == 3e-4


@pytest.mark.parametrize("grid", [[1e-3], [1e-3, 1e-2]])
def test_a_short_grid_is_tried_whole(study: ModuleType, grid: list[float]) -> None:
    assert tried(study, lambda rate, _: 1 / rate, grid) == ([grid], grid[-1])


def test_rates_that_are_close_are_tried_on_two_more_draws(study: ModuleType) -> None:
    """1e-3 is ahead on the first draw only; 1e-2 is out of the race."""
    losses = {1e-3: [2.00, 2.2, 2.2], 3e-3: [2.05, 2.0, 2.1], 3e-4: [2.3], 1e-2: [3.0]}
    batches, rate = tried(study, lambda rate, draw: losses[rate][draw], GRID)
    assert batches == [[1e-3, 3e-3, 1e-2], [3e-4], [1e-3, 1e-3, 3e-3, 3e-3]]
    assert rate == 3e-3


def test_the_search_goes_on_where_the_mean_of_the_draws_says_that_the_outermost_is_best(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(study._NEAR, "s", 1.05)
    losses = {1e-3: [2.5], 3e-3: [2.00, 2.4, 2.4], 1e-2: [2.05, 2.1, 2.0], 3e-2: [2.02, 2.0, 2.1]}
    batches, rate = tried(study, lambda rate, draw: losses[rate][draw], GRID)
    assert batches == [[1e-3, 3e-3, 1e-2], [3e-3, 3e-3, 1e-2, 1e-2], [3e-2], [3e-2, 3e-2]]
    assert rate == 3e-2


def test_how_close_is_close_can_differ_by_federation(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {1e-3: [2.5], 3e-3: [2.00, 2.4, 2.4], 1e-2: [2.3, 2.1, 2.0], 3e-2: [2.5]}
    assert tried(study, lambda rate, draw: losses[rate][draw], GRID)[1] == 3e-3
    monkeypatch.setitem(study._NEAR, "s", 1.2)
    assert tried(study, lambda rate, draw: losses[rate][draw], GRID)[1] == 1e-2


def test_of_equal_rates_the_smaller_is_chosen(study: ModuleType) -> None:
    assert tried(study, lambda rate, _: 2.0 if rate in (1e-3, 3e-3) else 3.0, GRID)[1] == 1e-3


def test_a_variant_runs_at_the_rate_of_its_method(study: ModuleType) -> None:
    for path in sorted((REPOSITORY / "studies").glob("*.yaml")):
        of = study.load_study(path, None)
        for name in of.methods:
            assert study.tuned_as(name) in of.methods
            assert study.tuned_as(name) == name or study.choose_rate(of, name, {}) == study.choose_rate(
                of, study.tuned_as(name), {}
            )
    assert study.tuned_as("mira-layers") == "mira"
    for rival in ("pfedgraph-average", "fedlease-warmup-2", "mira_published-strong"):
        assert study.tuned_as(rival) == rival
    assert study.tuned_as("mira-labels") == "mira-labels", "it would be held back by the rate of one that must learn"


def test_the_rate_of_a_method_is_looked_for_once_however_many_variants_wait_for_it(study: ModuleType) -> None:
    of = study.load_study(REPOSITORY / "studies" / "planted_unequal.yaml", None)
    todo = [task.key for task in study.missing(of, of.methods, {})]
    assert len(todo) == len(set(todo)) == 3 * len({study.tuned_as(name) for name in of.methods})


def described(**sections: Any) -> dict[str, Any]:
    return RunConfig.model_validate({"name": "s", **sections}).model_dump(mode="json")


def test_a_result_belongs_to_what_decides_its_numbers(study: ModuleType) -> None:
    base = described(method={"name": "mira"})
    assert study.digest(base) == study.digest({**base, "name": "other", "output": {"directory": "elsewhere"}})
    moved = {"source": "dolly", "path": "here"}
    one, other = (described(data={**moved, "path": path}) for path in ("here", "there"))
    assert study.digest(one) == study.digest(other)
    for changed in ({"strength": 3.0}, {"graph": {"settled": 0.7}}, {"ema_decay": 0.1}):
        assert study.digest(described(method={"name": "mira", **changed})) != study.digest(base)


def test_keys_that_a_graph_ignores_or_that_came_later_leave_old_results_valid(study: ModuleType) -> None:
    known = described(method={"name": "mira_published", "graph": {"kind": "labels"}})
    changed = {**known, "method": {**known["method"], "graph": {**known["method"]["graph"], "settled": 0.7}}}
    assert study.digest(changed) == study.digest(known)
    before = described(method={"name": "fedit"})
    assert before["method"].pop("ema_decay") == 0.0
    assert study.digest(before) == study.digest(described(method={"name": "fedit"}))


def runs(losses: Any) -> list[Any]:
    """A reported run for each row of losses."""
    study = sys.modules["methods_study"]
    return [study.Judged(np.asarray(losses_K, dtype=float), math.nan, {}) for losses_K in losses]


def test_commits_stand_in_the_order_of_the_runs_whatever_the_hash_seed(study: ModuleType) -> None:
    commits = [f"commit-{number % 9}" for number in range(40)]
    runs = [study.Judged(np.zeros(1), math.nan, {"commit": commit}) for commit in commits]
    assert study.origins(runs) == [(f"commit-{number}", "") for number in range(9)]


def test_an_interval_is_students_over_the_draws(study: ModuleType) -> None:
    """As scipy's paired test says it; however many clients there are, 3 draws are 3 draws."""
    random = np.random.default_rng(5)
    ones, others = random.normal(size=(3, 7)) + random.normal(size=(3, 1)), random.normal(size=(3, 7))
    wanted = scipy.stats.ttest_rel(ones.mean(axis=1), others.mean(axis=1)).confidence_interval(0.95)
    middle, low, high = study.difference(runs(ones), runs(others))
    assert middle == pytest.approx((ones - others).mean())
    assert (low, high) == pytest.approx((wanted.low, wanted.high))
    assert study.difference(runs(ones + 1), runs(ones)) == pytest.approx((1, 1, 1))
    assert study.difference(runs(ones[:1]), runs(others[:1]))[1:] == (-math.inf, math.inf)


def test_95_percent_intervals_hold_the_truth_95_times_in_100(study: ModuleType) -> None:
    random = np.random.default_rng(0)
    gaps = random.normal(size=(1000, 4, 1)) + random.normal(size=(1000, 4, 6))
    intervals = [study.difference(runs(of_study), runs(np.zeros((4, 6))))[1:] for of_study in gaps]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_a_task_is_harmed_by_the_mean_of_its_clients_in_all_draws(study: ModuleType) -> None:
    def run(losses: dict[str, tuple[str, float]]) -> Any:
        clients = {name: [task, 10 * loss, 10, 0.0, 0.0, 0] for name, (task, loss) in losses.items()}
        return study.judged({"clients": clients, "upload_bytes": 0, "download_bytes": 0, "seconds": 0})

    alone = [run({"a": ("one", 1.0), "b": ("one", 1.0), "c": ("two", 1.0)})] * 2
    shared = [
        run({"a": ("one", 1.4), "b": ("one", 0.7), "c": ("two", 1.005)}),
        run({"a": ("one", 0.9), "b": ("one", 0.9), "c": ("two", 1.02)}),
    ]
    other_order = [run({"a": ("one", 1.4), "b": ("one", 0.1), "c": ("two", 1.0)})] * 2
    assert study.harm(shared, alone) == pytest.approx(2 / 6)
    assert study.harm(shared, other_order) == pytest.approx(3 / 6)
    assert study.harm(shared, alone, other_order) == pytest.approx(1 / 6)
    assert study.tasks_harmed(shared, alone) == "1 of 2"
    assert study.tasks_harmed(alone, alone) == "0 of 2"


def test_clients_are_paired_by_name_and_answers_weighed_alike(study: ModuleType) -> None:
    clients = {"b": ["t", 4.0, 2, 1.0, 0, 2], "a": ["t", 3.0, 3, 3.0, 0, 4], "c": ["t", 5.0, 1, 0.0, 0, 0]}
    run = study.judged({"clients": clients})
    assert run.losses_K.tolist() == [1.0, 2.0, 5.0]
    assert run.rouge_l == pytest.approx((0.75 + 0.5) / 2)


def test_what_mira_should_reach_is_judged_by_hand(study: ModuleType) -> None:
    losses = {"mira": (1.0, 1.2), "local_only": (2.0, 2.0), "fedit": (1.15, 1.25), "mira-true": (0.9, 0.9)}
    told = {
        name: [study.judged({"clients": {"a": ["t", loss, 1, 0.0, 0, 0]}}) for loss in draws]
        for name, draws in losses.items()
    }
    cells = dict(zip(study._AIMS, study._reached(told, {}), strict=True))
    assert cells["best method but `mira`"] == "fedit"
    # gaps of -0.15 and -0.05, and draws of fedit 0.1 apart: both standard errors are 0.05
    assert cells["best, or within one standard error of the paired difference"] == "met (0.050)"
    assert cells["the same, of the best's own mean"] == "met (0.050)"
    # 2 - 1.1 of 2 - 0.9
    assert cells["80 % of the gap to the true graph or clusters closed"] == "met: 82% of mira-true"


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_harm_unless_training_alone_is_lost_too(study: ModuleType, lost: float) -> None:
    """As `share_harmed` counts."""
    assert study.harm(runs([[lost, 1.0, 1.0, lost]]), runs([[1.0, 1.0, lost, lost]])) == 0.25
    clients = {"clients": {"a": ["task", 0, 0, 0, 0, 0]}}
    [run], [alone] = runs([[lost]]), runs([[1.0]])
    assert study.tasks_harmed([run._replace(line=clients)], [alone]) == "1 of 1"


def reported(study: ModuleType, monkeypatch: pytest.MonkeyPatch, lines: dict[str, list[dict[str, Any]]]) -> Any:
    """A study in which the reported draws of methods came to `lines`."""
    compare = {"learning_rates": [1e-3], "methods": list(lines), "seeds": 2}
    of = study.Study("s", RunConfig.model_validate({"name": "s", "compare": compare}), {})
    whole = {"clients": {"a": ["task", 1.0, 1, 0.0, 0, 0]}, "upload_bytes": 0, "download_bytes": 0, "seconds": 1.0}
    found = [
        dict(zip(study.KEY, study.task_of(of, name, seed, 1e-3, tuning=tuning).key, strict=True))
        | (whole if "diverged" not in line else {})
        | {"validation_loss": 1.0, **line}
        for name, of_name in lines.items()
        for tuning in (False, True)
        for seed, line in enumerate(of_name, of.config.compare.tuning_seed if tuning else 0)
        if not (tuning and "diverged" in line)
    ]
    monkeypatch.setattr(study, "read_lines", lambda _: found)
    return of


def test_a_line_without_a_hash_does_not_turn_the_check_of_the_data_off(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, one, other = {}, {"data": "a"}, {"data": "b"}
    same = reported(study, monkeypatch, {"local_only": [old, one], "fedit": [one, one], "mira": [one, one]})
    assert list(study.chosen(same)) == ["local_only", "fedit", "mira"]
    each = reported(study, monkeypatch, {"local_only": [one, other], "fedit": [one, other]})
    assert list(study.chosen(each)) == ["local_only", "fedit"], "another draw has other examples"
    differs = reported(study, monkeypatch, {"local_only": [old, one], "fedit": [one, one], "mira": [other, one]})
    with pytest.raises(SystemExit, match="mira, seed 0: not the examples"):
        study.chosen(differs)


def test_who_trains_on_other_examples_is_tested_on_the_same(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    one, more = {"data": "a"}, {"data": "b"}
    of = reported(study, monkeypatch, {"local_only": [one, one], "mira": [one, one], "ditto": [more, more]})
    trains_on_more = of._replace(settings={"ditto": {"method": "ditto", "data": {}}})
    assert list(study.chosen(trains_on_more)) == ["local_only", "mira", "ditto"]
    longer = {"data": "a", "clients": {"a": ["task", 1.0, 2, 0.0, 0, 0]}}
    of = reported(study, monkeypatch, {"local_only": [one, one], "mira": [one, longer]})
    with pytest.raises(SystemExit, match="mira, seed 1: not the examples"):
        study.chosen(of)


def test_a_method_that_diverged_is_not_one_that_was_not_run(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    of = reported(study, monkeypatch, {"local_only": [{}, {}], "fedit": [{}, {"diverged": "nan"}], "mira": [{}]})
    assert study.section(of).endswith("Diverged: fedit (draws 1).\n\nNot run yet: mira.")
    of = reported(study, monkeypatch, {"local_only": [{}, {"diverged": "nan"}]})
    assert study.section(of) == "## s\n\nDiverged: local_only (draws 1)."


def test_a_line_that_a_kill_tore_is_ignored_and_cut(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    file = tmp_path / "x.jsonl"
    for torn in (b'{"method": "b", "n', '{"method": "\u00e9'.encode()[:-1]):
        file.write_bytes(b'{"method": "a"}\n' + torn)
        assert study.read_lines("x") == [{"method": "a"}]
        [line] = study.record("x", dict, [([("method", "c")],)], 1)
        assert study.read_lines("x") == [{"method": "a"}, line]
    file.write_bytes(b'{"met')
    assert study.read_lines("x") == []


def test_a_line_says_where_the_sources_were_changed(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(study, "REPOSITORY", tmp_path)
    assert study.sources_commit() == ""
    for name in ("src/a.py", "tools/b.py", "studies/results/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "x")
    (tmp_path / "studies/results/c.jsonl").write_text("2")
    assert re.fullmatch("[0-9a-f]+", study.sources_commit())
    (tmp_path / "src/a.py").write_text("2")
    assert re.fullmatch("[0-9a-f]+ with changes", study.sources_commit())


@pytest.mark.parametrize("name", ["attack_study", "joining_study"])
def test_runs_of_the_studies_beside_have_one_thread_too(name: str) -> None:
    program = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(REPOSITORY / 'tools' / name)!r} + '.py', run_name='__main__')\n"
        "except SystemExit: pass\nimport torch; print(torch.get_num_threads())"
    )
    bare = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    bare["PYTHONPATH"] = str(REPOSITORY / "tools")
    done = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1"


def test_every_finished_run_is_kept_before_it_is_handed_on(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    kept = []
    for line in study.record("x", dict, [([("method", "a")],), ([("method", "b")],)], 1):
        kept.append(line)
        assert study.read_lines("x") == kept
    assert sorted(line["method"] for line in kept) == ["a", "b"]
    assert all({"commit", "processor"} <= set(line) for line in kept)
