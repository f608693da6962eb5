"""A dry run says what the run will need, and leaves no trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmira.assembly import Assembly, assemble
from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError
from fedmira.experiment import run
from fedmira.federation.method import Info, State
from fedmira.forecast import estimate as estimating
from fedmira.forecast.estimate import dry_run
from fedmira.runs.store import RunStore
from fedmira.types import Losses, Trial

METHODS: dict[str, dict[str, Any]] = {
    "local_only": {"name": "local_only"},
    "fedit": {"name": "fedit"},
    "mira": {"name": "mira", "graph": {"kind": "gram"}},
    "ditto": {"name": "ditto"},
    "fedalt": {"name": "fedalt"},
    "centralised": {"name": "centralised"},
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
def test_bytes_are_predicted_exactly_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    wanted = config(method)
    estimate = dry_run(wanted)
    assert list(tmp_path.iterdir()) == [], "a dry run keeps nothing"
    events = [event for event in RunStore.open(run(wanted)).events() if event["event"] == "round"]
    assert sum(event["upload_bytes"] for event in events) // 2 == estimate.upload_bytes_per_round
    assert sum(event["download_bytes"] for event in events) // 2 == estimate.download_bytes_per_round
    assert (estimate.num_clients, estimate.clients_per_round, estimate.cohort_size, estimate.rounds) == (6, 3, 2, 2)
    parts = [getattr(estimate, f"{part}_seconds") for part in ("training", "mixing", "evaluation", "disk")]
    assert all(seconds > 0 for seconds in parts)
    assert estimate.seconds == pytest.approx(sum(parts))


@pytest.mark.parametrize("patience", [0.0, estimating._PATIENCE_SECONDS])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_average_of_the_last_round_is_predicted_where_a_run_of_that_length_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int, patience: float
) -> None:
    """However many rounds were mixed for the forecast: 0 seconds of patience are one, else they are two."""
    monkeypatch.setattr(estimating, "_PATIENCE_SECONDS", patience)
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12}
    wanted = config("mira", data=data, federation={"rounds": rounds, "participation": 0.5})
    estimate = dry_run(wanted)
    events = [event for event in RunStore.open(run(wanted, directory=tmp_path)).events() if event["event"] == "round"]
    assert sum(event["upload_bytes"] for event in events) // rounds == estimate.upload_bytes_per_round
    assert sum(event["download_bytes"] for event in events) // rounds == estimate.download_bytes_per_round


def test_what_all_clients_are_asked_after_the_last_round_is_decided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a part of the clients a round, nothing before it holds so many adapters at once."""
    decided: list[int] = []

    def watched(parts: Assembly) -> Assembly:
        decide = parts.method.decide

        def counting(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
            decided.append(trial.num_candidates * len(trial.ids))
            assert decide is not None
            return decide(state, trial, losses)

        return parts._replace(method=parts.method._replace(decide=counting))

    monkeypatch.setattr(estimating, "assemble", lambda config: watched(assemble(config)))
    dry_run(config("mira"))
    assert decided[-1] == 2 * 2 * 5 > decided[0], (
        "two shares of the mixture and of the average, of all that ever returned"
    )


HEAVY = {
    "activations": {
        "training": {"local_steps": 2, "batch_size": 16, "cohort_size": 16},
        "data": {"source": "planted", "families": 4, "clients_per_family": 4},
    },
    "adapters": {
        "training": {"local_steps": 2, "batch_size": 1, "cohort_size": 16},
        "data": {"source": "planted", "families": 4, "clients_per_family": 4, "examples": 12},
        "model": {"adapter": {"rank": 64}},
    },
}


@pytest.mark.parametrize("heavy", HEAVY)
def test_memory_is_predicted_within_15_percent(tmp_path: Path, heavy: str) -> None:
    """In processes of their own, because what is predicted is the peak of a process."""
    sections = {
        "federation": {"rounds": 2},
        "method": {"name": "fedit"},
        "evaluation": {"generation": {"max_new_tokens": 4, "examples_per_client": 1}},
        **HEAVY[heavy],
    }
    (tmp_path / "c.yaml").write_text(json.dumps(sections), encoding="utf-8")

    def fedmira(*arguments: str) -> Any:
        command = [sys.executable, "-m", "fedmira", "run", "c.yaml", "--quiet", "--json", *arguments]
        return json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout)

    predicted = fedmira("--dry-run")["memory_bytes"]
    happened = fedmira("--profile")["profile"]["peak_memory_bytes"]
    assert happened > 1.25 * memory_of_an_idle_process(), "the base alone would be a good guess"
    assert 0.85 * happened < predicted < 1.15 * happened


def memory_of_an_idle_process() -> int:
    """With the base in memory and nothing done."""
    program = (
        "from fedmira.assembly import assemble; from fedmira.config.run import RunConfig; "
        "from fedmira.evaluation.costs import highest_memory_bytes; "
        "assemble(RunConfig()); print(highest_memory_bytes())"
    )
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


def test_a_rank_twice_as_large_costs_twice_the_bytes() -> None:
    model = {"adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]}, "dtype": "float32", "device": "cpu"}
    small, large = dry_run(config("fedit")), dry_run(config("fedit", model=model))
    assert large.upload_bytes_per_round == 2 * small.upload_bytes_per_round
    assert large.adapter_parameters == 2 * small.adapter_parameters


def test_a_dry_run_refuses_what_the_run_would_refuse() -> None:
    with pytest.raises(ConfigError, match="nobody"):
        dry_run(config("mira", model={"adapter": {"client_ranks": {"nobody": 2}}}))


def test_every_fact_has_a_line() -> None:
    estimate = dry_run(config("mira"))
    text = "\n".join(estimate.lines())
    for word in ("clients", "adapter", "memory", "upload", "download", "time", "mixing"):
        assert word in text
    assert f"{estimate.adapter_parameters:,} parameters" in text
