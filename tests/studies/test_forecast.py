"""Claims: a comparison needs what one run of each method needs, times its seeds and learning rates; nothing is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.studies.test_compare import RATES, Told, config

from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError
from fedmira.forecast.estimate import Estimate
from fedmira.studies import forecast
from fedmira.studies.forecast import estimate_study

MIB = 2**20


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that were predicted; fedit takes a MiB up and two down in each of its two rounds."""
    configs: list[RunConfig] = []

    def predicted(run: RunConfig) -> Estimate:
        configs.append(run)
        alone = run.method.name == "local_only"
        numbers = dict.fromkeys(Estimate._fields, 0)
        numbers |= {"memory_bytes": (400 if alone else 500) * MIB, "start_seconds": 1.0, "seconds": 9.0, "rounds": 2}
        if not alone:
            numbers |= {"upload_bytes_per_round": MIB, "download_bytes_per_round": 2 * MIB}
        return Estimate(**{**numbers, "warnings": ("the same", *(() if alone else ("only fedit",)))})

    monkeypatch.setattr(forecast, "dry_run", predicted)
    return configs


def test_sums_over_methods_seeds_and_rates(asked: list[RunConfig], tmp_path: Path) -> None:
    wanted = config(methods=["local_only", "fedit"], seeds=3, learning_rates=RATES)
    display = Told()
    estimate = estimate_study(wanted, tmp_path / "study", display)
    assert [(run.method.name, run.seed) for run in asked] == [("local_only", 0), ("fedit", 0)]
    assert display.messages == ["Estimating local_only (1 of 2) ...", "Estimating fedit (2 of 2) ..."]
    facts = json.loads(json.dumps(estimate.facts(), allow_nan=False))
    assert facts["num_runs"] == 2 * (3 + 2)
    assert (facts["reported_runs_per_method"], facts["tuning_runs_per_method"]) == (3, 2)
    assert facts["seconds"] == 10 * (1 + 9)
    assert facts["memory_bytes"] == 500 * MIB
    assert (facts["upload_bytes"], facts["download_bytes"]) == (5 * 2 * MIB, 5 * 4 * MIB)
    assert facts["methods"]["fedit"]["seconds"] == 9.0
    lines = estimate.lines()
    assert lines[0] == "runs               10: 3 reported and 2 to choose a learning rate, for each of 2 methods"
    assert "time               about 100 s" in lines
    assert "fedit              about 10 s a run" in lines
    assert any(line.startswith("An estimate") and "counted as whole ones" in line for line in lines)
    assert lines[-2:] == ["warning: the same", "warning: only fedit"]
    assert list(tmp_path.iterdir()) == []


def test_one_learning_rate_is_not_tried(asked: list[RunConfig], tmp_path: Path) -> None:
    estimate = estimate_study(config(methods=["fedit"], seeds=2, learning_rates=RATES[:1]), tmp_path / "study")
    assert (estimate.runs_per_method, estimate.tuning_runs) == (2, 0)
    assert asked[0].training.learning_rate == RATES[0]
    assert not any("choose" in line for line in estimate.lines())


def test_what_a_comparison_refuses_is_refused_at_once(asked: list[RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is one of the seeds that are reported"):
        estimate_study(config(seeds=2, learning_rates=RATES, tuning_seed=1), tmp_path)
    assert asked == []
