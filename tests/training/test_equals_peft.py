"""Training a cohort equals training each client alone with stock PEFT and torch.optim."""

from __future__ import annotations

import pytest
import torch
from tests.reference.engine_twin import train_one_by_one
from tests.reference.tiny_models import ragged_clients, random_arena, tiny_base, tiny_layout

from fedmira.config.training import TrainingConfig
from fedmira.training.cohort import train
from fedmira.types import Job, Pull

SEED = 5
OPTIMIZERS = {
    "adamw clipped": TrainingConfig(
        local_epochs=2, batch_size=3, optimizer="adamw", learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5
    ),
    "adam with L2": TrainingConfig(
        local_steps=4, batch_size=2, optimizer="adam", learning_rate=1e-2, weight_decay=0.05, clip_norm=5.0
    ),
    "sgd with momentum": TrainingConfig(
        local_epochs=2,
        batch_size=2,
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=0.01,
        clip_norm=None,
    ),
    "plain sgd": TrainingConfig(local_steps=3, batch_size=4, optimizer="sgd", learning_rate=0.3, clip_norm=1.0),
}
BOTH = frozenset({"lora_a", "lora_b"})


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cohort_equals_clients_trained_alone_with_peft(family: str, name: str) -> None:
    training = OPTIMIZERS[name]
    base = tiny_base(family)
    layout = tiny_layout(base, family)
    clients = ragged_clients()
    ids = (0, 1, 2, 4)
    start_SP = random_arena(layout, len(ids)).values_KP
    job = Job(2, ids, start_SP.clone(), BOTH, BOTH, BOTH)

    expected_SP, expected_losses = train_one_by_one(base, layout, job, clients, training, SEED)
    rows_SP, reports = train(
        base, layout, job, clients, training, total_rounds=3, seed=SEED, cohort_size=4, dropout=0.0
    )

    assert torch.equal(job.start_SP, start_SP), "the start belongs to the caller"
    assert float((expected_SP - start_SP).abs().min(dim=0).values.max()) > 1e-3, "the clients must have moved"
    torch.testing.assert_close(rows_SP, expected_SP, rtol=0, atol=1e-9)
    assert [report.id for report in reports] == list(ids)
    assert [report.loss_sum for report in reports] == pytest.approx(expected_losses, abs=1e-9)
    assert all(report.failure == "" for report in reports)


@pytest.mark.parametrize("trainable", [{"lora_b"}, {"lora_a"}, BOTH], ids=lambda groups: "+".join(sorted(groups)))
def test_pull_and_frozen_groups_equal_peft(trainable: frozenset[str]) -> None:
    training = OPTIMIZERS["adamw clipped"]
    base = tiny_base("llama")
    layout = tiny_layout(base, "llama")
    clients = ragged_clients()
    start_SP = random_arena(layout, 5).values_KP
    pull = Pull(random_arena(layout, 5, seed=11).values_KP, strength_S=(0.3, 0.2, 0.0, 0.5, 0.1))
    job = Job(1, (0, 1, 2, 3, 4), start_SP, BOTH, frozenset(trainable), BOTH, pull)

    # the twin adds the pull of frozen groups too, as a constant without a gradient
    expected_SP, expected_losses = train_one_by_one(base, layout, job, clients, training, SEED)
    rows_SP, reports = train(
        base, layout, job, clients, training, total_rounds=1, seed=SEED, cohort_size=2, dropout=0.0
    )

    torch.testing.assert_close(rows_SP, expected_SP, rtol=0, atol=1e-9)
    assert [report.loss_sum for report in reports] == pytest.approx(expected_losses, abs=1e-9)
    for group in layout.groups:
        for columns in layout.slices(group):
            assert torch.equal(rows_SP[:, columns], start_SP[:, columns]) == (group not in trainable)
