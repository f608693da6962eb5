"""What is tried stands for what the run will do: the same steps, the heaviest first, prices by size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedmira.assembly import assemble
from fedmira.config.run import RunConfig
from fedmira.experiment import run
from fedmira.forecast import trials
from fedmira.forecast.trials import planned_steps, timed
from fedmira.runs.store import RunStore


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 3, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 2, "batch_size": 3, "cohort_size": 2},
            "federation": {"rounds": 3, "clients_per_round": 5},
            "evaluation": {"test": False},
            **sections,
        }
    )


@pytest.mark.parametrize(
    "work", [{"local_steps": 2}, {"local_steps": None, "local_epochs": 2}, {"batch_size": 50}], ids=str
)
def test_the_planned_steps_are_those_the_run_takes(tmp_path: Path, work: dict[str, Any]) -> None:
    wanted = config(training={"batch_size": 3, "cohort_size": 2, **work})
    planned = planned_steps(assemble(wanted))
    rounds = [event for event in RunStore.open(run(wanted, directory=tmp_path)).events() if event["event"] == "round"]
    assert sum(step.tokens for step in planned.steps) == sum(event["tokens"] for event in rounds)
    assert sum(step.supervised_tokens for step in planned.steps) == sum(event["train_tokens"] for event in rounds)
    assert (planned.num_cohorts, planned.share) == (3 * 3, 1.0)


def test_a_long_run_is_looked_at_in_a_few_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MOST_CLIENT_STEPS", 40)
    long = config(federation={"rounds": 200})
    planned = planned_steps(assemble(long))
    # 12 steps of clients a round
    assert planned.share == 3 / 200
    assert len(planned.steps) == 3 * 3 * 2
    everything = sum(len(step.ids) for step in planned.steps) / planned.share
    assert everything == 200 * 6 * 2


def test_a_call_is_timed_until_the_device_of_the_base_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", happened.append)
    second = torch.device("cuda", 1)
    parts: Any = SimpleNamespace(base=SimpleNamespace(device=second))
    timed(parts, lambda: happened.append("call"))
    assert happened == [second, "call", second]


def test_the_heaviest_piece_is_tried_and_the_price_is_that_of_the_others() -> None:
    tried: list[int] = []

    def attempt(piece: int) -> float:
        tried.append(piece)
        return 100.0 if piece == 99 and tried == [99] else 0.01 * piece

    price = trials._price([5, 99, 1, 3], attempt, size=int, heavy=float)
    assert (tried, price) == ([99], pytest.approx(100 / 99)), "too slow to try another"
    tried.clear()
    price = trials._price([5, 9, 1, 3], attempt, size=int, heavy=lambda piece: -float(piece), most=2)
    assert tried[0] == 1
    assert sorted(tried[1:]) == [3, 9]
    assert price == pytest.approx(0.01)
    assert trials._price([], attempt, size=int, heavy=float) == 0
