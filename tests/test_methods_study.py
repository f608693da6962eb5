"""The study of all methods: which learning rates are tried, in which order, and which is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
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


def test_an_interval_resamples_draws_and_the_clients_within_them(study: ModuleType) -> None:
    def runs(losses: np.ndarray) -> list[Any]:
        return [study.Judged(losses_K, math.nan, {}) for losses_K in losses]

    random = np.random.default_rng(5)
    ones, others = random.normal(size=(3, 7)) + random.normal(size=(3, 1)), random.normal(size=(3, 7))
    means = []
    for _ in range(4000):
        drawn = [random.choice(ones[d] - others[d], size=7).mean() for d in random.integers(3, size=3)]
        means.append(np.mean(drawn))
    middle, low, high = study.difference(runs(ones), runs(others))
    assert middle == pytest.approx((ones - others).mean())
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.05 * (high - low))
    assert study.difference(runs(ones + 1), runs(ones)) == pytest.approx((1, 1, 1))


def test_a_task_is_harmed_by_the_mean_of_its_clients_in_all_draws(study: ModuleType) -> None:
    def run(losses: dict[str, tuple[str, float]]) -> Any:
        clients = {name: [task, 10 * loss, 10, 0.0, 0.0, 0] for name, (task, loss) in losses.items()}
        return study.judged({"clients": clients, "upload_bytes": 0, "download_bytes": 0, "seconds": 0})

    alone = [run({"a": ("one", 1.0), "b": ("one", 1.0), "c": ("two", 1.0)})] * 2
    shared = [
        run({"a": ("one", 1.4), "b": ("one", 0.7), "c": ("two", 1.005)}),
        run({"a": ("one", 0.9), "b": ("one", 0.9), "c": ("two", 1.02)}),
    ]
    assert study.harm(shared, alone) == pytest.approx(2 / 6)
    assert study.tasks_harmed(shared, alone) == "1 of 2"
    assert study.tasks_harmed(alone, alone) == "0 of 2"


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
