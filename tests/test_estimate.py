"""A dry run says what the run will need, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmira.config import RunConfig
from fedmira.errors import ConfigError
from fedmira.estimate import dry_run
from fedmira.experiment import run
from fedmira.runs.store import RunStore

METHODS: dict[str, dict[str, Any]] = {
    "local_only": {"name": "local_only"},
    "fedit": {"name": "fedit"},
    "mira": {"name": "mira", "graph": {"kind": "gram"}},
}


def config(method: str, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 3, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 2, "batch_size": 2, "cohort_size": 2},
            "federation": {"rounds": 2, "clients_per_round": 3},
            "method": METHODS[method],
            "evaluation": {"generation": {"enabled": False}},
            **sections,
        }
    )


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_predicted_exactly_and_memory_within_a_factor_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = config(method)
    estimate = dry_run(wanted)
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"
    events = [event for event in RunStore.open(run(wanted)).events() if event["event"] == "round"]
    assert [event["upload_bytes"] for event in events] == [estimate.upload_bytes_per_round] * 2
    assert [event["download_bytes"] for event in events] == [estimate.download_bytes_per_round] * 2
    peak = max(event["timing"]["peak_memory_bytes"] for event in events)
    assert peak / 2 < estimate.memory_bytes < 2 * peak
    assert (estimate.clients, estimate.clients_per_round, estimate.cohort_size, estimate.rounds) == (6, 3, 2, 2)
    assert 0 < estimate.seconds < 60


def test_twice_the_rounds_take_twice_the_time_and_the_same_bytes() -> None:
    short = dry_run(config("mira"))
    long = dry_run(config("mira", federation={"rounds": 200, "clients_per_round": 3}))
    # a hundred times the rounds; the clock of a busy machine is good for a factor of a few
    assert 10 < long.seconds / short.seconds < 1000
    assert long.upload_bytes_per_round == short.upload_bytes_per_round


def test_a_rank_twice_as_large_costs_twice_the_bytes() -> None:
    model = {"adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]}, "dtype": "float32", "device": "cpu"}
    small, large = dry_run(config("fedit")), dry_run(config("fedit", model=model))
    assert large.upload_bytes_per_round == 2 * small.upload_bytes_per_round
    assert large.adapter_parameters == 2 * small.adapter_parameters


def test_a_dry_run_refuses_what_the_run_would_refuse() -> None:
    with pytest.raises(ConfigError, match="clients_per_round = 7 exceeds the number of clients, 6"):
        dry_run(config("mira", federation={"clients_per_round": 7}))


def test_every_fact_has_a_line() -> None:
    estimate = dry_run(config("mira"))
    text = "\n".join(estimate.lines())
    for word in ("clients", "adapter", "memory", "upload", "download", "time"):
        assert word in text
    assert f"{estimate.adapter_parameters:,} parameters" in text
