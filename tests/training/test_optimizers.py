"""Updates on rows of an arena equal torch.optim on each row; schedules and clipping equal their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference.engine_twin import make_optimizer

from fedmira.config.training import TrainingConfig
from fedmira.training.optimizers import clip_factor, fresh_moments, schedule_factor, update_

NUM_CLIENTS, NUM_PARAMETERS = 4, 23
CONFIGS = {
    "adamw": TrainingConfig(optimizer="adamw", weight_decay=0.2, learning_rate=0.03),
    "adam with L2": TrainingConfig(optimizer="adam", weight_decay=0.2, learning_rate=0.03, beta1=0.7, beta2=0.95),
    "sgd": TrainingConfig(optimizer="sgd", weight_decay=0.1, learning_rate=0.3),
    "sgd with momentum": TrainingConfig(optimizer="sgd", weight_decay=0.1, learning_rate=0.3, momentum=0.8),
}


def draws(seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_CLIENTS, NUM_PARAMETERS, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_equal_torch_optim_with_steps_and_rates_of_their_own(name: str) -> None:
    training = CONFIGS[name]
    values_CP = draws(0)
    parameters = [torch.nn.Parameter(row_P.clone()) for row_P in values_CP]
    optimizers = [make_optimizer([parameter], training) for parameter in parameters]
    moments = fresh_moments(training, values_CP)
    for step in range(6):
        gradient_CP = draws(100 + step)
        active = [(step + client) % (client + 1) == 0 for client in range(NUM_CLIENTS)]
        rates = [training.learning_rate / (1 + client + step) for client in range(NUM_CLIENTS)]
        for client, (parameter, optimizer) in enumerate(zip(parameters, optimizers, strict=True)):
            if active[client]:
                optimizer.param_groups[0]["lr"] = rates[client]
                parameter.grad = gradient_CP[client].clone()
                optimizer.step()
        update_(values_CP, gradient_CP, moments, training, rates, active)
    assert float((values_CP - draws(0)).abs().min()) > 0
    torch.testing.assert_close(values_CP, torch.stack([p.detach() for p in parameters]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_inactive_rows_keep_every_bit_whatever_their_gradient(name: str) -> None:
    training = CONFIGS[name]
    values_CP = draws(0)
    moments = fresh_moments(training, values_CP)
    update_(values_CP, draws(1), moments, training, [0.1] * NUM_CLIENTS, [True] * NUM_CLIENTS)
    before = {key: tensor.clone() for key, tensor in {"values": values_CP, **moments._asdict()}.items()}
    gradient_CP = draws(2)
    gradient_CP[1:3] = float("nan")
    update_(values_CP, gradient_CP, moments, training, [0.1] * NUM_CLIENTS, [True, False, False, True])
    after = {"values": values_CP, **moments._asdict()}
    for key, tensor in after.items():
        assert torch.equal(tensor[1:3], before[key][1:3]), key
    assert not torch.equal(values_CP[0], before["values"][0])


@pytest.mark.parametrize("name", CONFIGS)
def test_columns_that_are_not_trainable_keep_every_bit(name: str) -> None:
    training = CONFIGS[name]
    values_CP, gradient_CP = draws(0), draws(1)
    trainable_P = torch.arange(NUM_PARAMETERS) % 3 != 0
    moments = fresh_moments(training, values_CP)
    for _ in range(3):
        rates = [0.1] * NUM_CLIENTS
        update_(values_CP, gradient_CP * trainable_P, moments, training, rates, [True] * NUM_CLIENTS, trainable_P)
    assert torch.equal(values_CP[:, ~trainable_P], draws(0)[:, ~trainable_P])
    assert (values_CP != draws(0))[:, trainable_P].all()


@given(norm=st.floats(1e-3, 1e3), clip_norm=st.floats(1e-2, 1e2))
def test_clipping_equals_torch(norm: float, clip_norm: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    direction = torch.nn.functional.normalize(draws(3)[0, :5], dim=0)
    parameter.grad = direction * norm
    torch.nn.utils.clip_grad_norm_([parameter], clip_norm)
    torch.testing.assert_close(direction * norm * clip_factor(norm, clip_norm), parameter.grad, rtol=1e-12, atol=0)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 6),
    total=st.integers(1, 6),
    steps=st.integers(1, 5),
)
def test_schedules_stay_in_range_and_never_rise_after_the_warm_up(
    schedule: str, warmup: float, total: int, steps: int
) -> None:
    training = TrainingConfig.model_validate({"schedule": schedule, "warmup_rounds": warmup})
    factors = [
        (r - 1 + s / steps, schedule_factor(r, s, steps, total, training))
        for r in range(1, total + 1)
        for s in range(steps)
    ]
    assert all(0 < factor <= 1 for _, factor in factors)
    after = [factor for begun, factor in factors if begun >= warmup]
    assert after == sorted(after, reverse=True)
    during = [factor for begun, factor in factors if begun + 1 / steps <= warmup]
    assert during == sorted(during)
    if schedule == "constant" and warmup == 0:
        assert all(factor == 1 for _, factor in factors)


def test_schedules_by_hand() -> None:
    linear = TrainingConfig(schedule="linear", warmup_rounds=1)
    assert [schedule_factor(1, step, 4, 3, linear) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [schedule_factor(round_, 0, 4, 3, linear) for round_ in (2, 3)] == [1.0, 0.5]
