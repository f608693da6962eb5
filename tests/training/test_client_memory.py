"""One more client in a cohort costs its adapter, its gradient and its moments, and nothing else."""

from __future__ import annotations

import pytest
from benchmarks.client_memory import measure_client_memory

from fedmira.config.training import TrainingConfig

OPTIMIZERS = {
    "adamw": (TrainingConfig(local_steps=2, batch_size=1, weight_decay=0.1), 4),
    "adam with L2": (TrainingConfig(local_steps=2, batch_size=1, optimizer="adam", weight_decay=0.1), 4),
    "sgd with momentum": (TrainingConfig(local_steps=2, batch_size=1, optimizer="sgd", momentum=0.9), 3),
    "sgd": (TrainingConfig(local_steps=2, batch_size=1, optimizer="sgd"), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_client_costs_no_more_than_its_arenas(name: str) -> None:
    training, arenas = OPTIMIZERS[name]
    measured = measure_client_memory("cpu", training, rank=512, few=2, many=6)
    assert measured.parameters > 500_000
    per_parameter = measured.bytes_per_client / measured.parameters
    assert 4 * arenas <= per_parameter <= 1.1 * 4 * arenas
