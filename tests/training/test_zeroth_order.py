"""Training along random directions: the slopes are those of the loss, and only the client, round and step decide."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tests.reference.engine_twin import exact_norms, move_along_seeds
from tests.reference.tiny_models import layout_of_kind, ragged_clients, tiny_base, tiny_layout
from tests.training.test_kinds import arena_of

from fedmira.config.method import FedKSeedConfig
from fedmira.config.training import TrainingConfig
from fedmira.federation.method import State
from fedmira.federation.registry import build_method
from fedmira.model.base import BaseModel
from fedmira.training.cohort import Progress, StopRequested, train
from fedmira.training.zeroth_order import direction, direction_number, slopes
from fedmira.types import Arena, ClientReport, Clients, Job, Layout, Participants, Pull, Results, SeedPool

SEED = 5
POOL = SeedPool(size=64, epsilon=1e-3)
CLIENTS = ragged_clients((5, 1, 7, 3, 4, 2, 6, 3))
STEPS = TrainingConfig(local_steps=3, batch_size=2, learning_rate=1e-3)
KINDS = ("lora", "prompt", "p_tuning", "full")


def layout_of(base: BaseModel, kind: str) -> Layout:
    return tiny_layout(base, "llama") if kind == "lora" else layout_of_kind(base, kind)


class Setup:
    """Clients with adapters that differ, on a tiny base whose norms do not round to float32."""

    def __init__(self, kind: str = "lora", dtype: torch.dtype = torch.float64) -> None:
        self.base = tiny_base("llama", dtype)
        if dtype == torch.float64:
            exact_norms(self.base.model)
        self.layout = layout_of(self.base, kind)
        self.start_SP = arena_of(self.base, self.layout, len(CLIENTS)).values_KP

    def job(self, ids: tuple[int, ...] = tuple(range(len(CLIENTS))), **changes: Any) -> Job:
        groups = frozenset(self.layout.groups)
        plain = Job(2, ids, self.start_SP[list(ids)], groups, groups, groups, seeds=POOL)
        return plain._replace(**changes)

    def train(
        self,
        job: Job,
        cohort_size: int = 8,
        training: TrainingConfig = STEPS,
        *,
        dropout: float = 0.0,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> tuple[torch.Tensor, tuple[ClientReport, ...]]:
        return train(
            self.base,
            self.layout,
            job,
            CLIENTS,
            training,
            total_rounds=3,
            seed=SEED,
            cohort_size=1 if self.layout.groups == ("full",) else cohort_size,
            dropout=dropout,
            progress=progress,
            should_stop=should_stop,
        )


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("kind", ["lora", "prompt", "full"])
def test_a_step_is_the_slope_along_the_direction_up_to_the_square_of_epsilon(kind: str) -> None:
    """Two clients: they move along their z by rate * g, and g - <gradient, z> falls a hundredfold with epsilon / 10."""
    setup, rate = Setup(kind), 0.5
    once = TrainingConfig(local_steps=1, batch_size=2, optimizer="sgd", learning_rate=rate, clip_norm=None)
    asked = setup.job((0, 2))
    descended_SP, (first, _) = setup.train(asked._replace(seeds=None), training=once)
    errors = []
    for epsilon in (1e-3, 1e-4):
        rows_SP, (report, _) = setup.train(asked._replace(seeds=SeedPool(64, epsilon)), training=once)
        for row, name in enumerate(("client-0", "client-2")):
            z_P = direction(SEED, direction_number(POOL, SEED, name, 2, 0), setup.layout.num_parameters).double()
            moved_P = asked.start_SP[row] - rows_SP[row]
            slope = float(moved_P @ z_P) / float(z_P @ z_P) / rate
            torch.testing.assert_close(moved_P, rate * slope * z_P, rtol=1e-12, atol=1e-13)
            exact = float((asked.start_SP[row] - descended_SP[row]) @ z_P) / rate
            errors.append(abs(slope - exact) / abs(exact))
        assert report.loss_sum == pytest.approx(first.loss_sum, rel=100 * epsilon)
    assert max(errors[2:]) < 1e-3
    assert errors[0] / errors[2] == pytest.approx(100, rel=0.05)
    assert errors[1] / errors[3] == pytest.approx(100, rel=0.05)


def test_slopes_and_losses_of_squares_by_hand() -> None:
    """Two clients: one with four tokens, each of them losing |theta|^2, and one that has none in this step."""
    values_CP = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    z_CP = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    moved_CP, tokens_C = torch.empty(2, 2), torch.tensor([4, 0])
    slope_C, losses_C = slopes(values_CP, z_CP, moved_CP, 0.5, lambda: tokens_C * moved_CP.square().sum(1), (4, 0))
    # 2 <theta, z>, and 4 * (|theta|^2 + |z|^2 / 4)
    assert slope_C.tolist() == [-6.0, 0.0]
    assert losses_C.tolist() == [25.0, 0.0]
    assert torch.equal(moved_CP, values_CP - z_CP / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cohort_equals_clients_that_move_alone(kind: str) -> None:
    setup = Setup(kind)
    job = setup.job((0, 1, 2, 4))
    expected_SP, _ = move_along_seeds(setup.base, setup.layout, job, CLIENTS, STEPS, SEED)
    rows_SP, reports = setup.train(job)
    assert float((expected_SP - job.start_SP).abs().amax(dim=1).min()) > 1e-3, "every client must have moved"
    torch.testing.assert_close(rows_SP, expected_SP, rtol=0, atol=1e-8)
    assert [report.num_steps for report in reports] == [3] * 4


def test_the_merged_adapter_is_rebuilt_from_the_sums_of_what_was_uploaded() -> None:
    """theta_0 - sum_j a_j z_j after two rounds with other participants, in which clients hold 1 to 7 examples."""
    setup = Setup()
    names = tuple(client.name for client in CLIENTS)
    counts = tuple(len(client.train) for client in CLIENTS)
    who = Clients(names, counts, ("",) * len(names), SEED)
    method = build_method(FedKSeedConfig(name="fedkseed", seeds=64, epsilon=1e-3), who)
    state: State = method.init(Arena(setup.layout, setup.start_SP), who)
    theta_0_P, sums = state.adapters.values_KP[0].clone(), defaultdict[int, float](float)
    for round_, ids in ((1, (0, 1, 2, 4)), (2, (2, 3, 7))):
        job = method.plan(state, Participants(round_, ids))
        _, uploads = move_along_seeds(setup.base, setup.layout, job, CLIENTS, STEPS, SEED)
        for id_, pairs in zip(ids, uploads, strict=True):
            for number, scalar in pairs:
                sums[number] += counts[id_] / sum(counts[k] for k in ids) * scalar
        rows_SP, reports = setup.train(job)
        state, _ = method.merge(state, Participants(round_, ids), Results(ids, rows_SP, reports, 0, 0, 0.0))
    rebuilt_P = theta_0_P.clone()
    for number, scalar in sums.items():
        rebuilt_P -= scalar * direction(SEED, number, setup.layout.num_parameters).double()
    assert float((rebuilt_P - theta_0_P).abs().max()) > 1e-3
    torch.testing.assert_close(state.adapters.values_KP, rebuilt_P.expand(8, -1), rtol=0, atol=1e-8)


# --------------------------------------------------------------------------------------------- what decides the result


@pytest.mark.usefixtures("two_threads")
def test_a_client_moves_the_same_in_any_company() -> None:
    setup = Setup()
    alone_SP, alone = setup.train(setup.job(), 1)
    for size in (3, 8):
        rows_SP, reports = setup.train(setup.job(), size)
        torch.testing.assert_close(rows_SP, alone_SP, rtol=0, atol=1e-9)
        assert [report.loss_sum for report in reports] == pytest.approx([report.loss_sum for report in alone], abs=1e-9)
    few_SP, _ = setup.train(setup.job((2, 6)))
    torch.testing.assert_close(few_SP, alone_SP[[2, 6]], rtol=0, atol=1e-9)


def test_numbers_cover_the_pool_and_differ_from_step_to_step_and_client_to_client() -> None:
    pool = SeedPool(8, 1e-3)
    numbers = [direction_number(pool, SEED, "anna", round_, step) for round_ in range(1, 21) for step in range(20)]
    assert all(30 < numbers.count(number) < 70 for number in range(8))
    assert numbers[:20] != [direction_number(pool, SEED, "ben", 1, step) for step in range(20)]
    assert numbers != [direction_number(pool, SEED + 1, "anna", r, step) for r in range(1, 21) for step in range(20)]


def test_directions_are_standard_normal_and_almost_orthogonal() -> None:
    one_P, other_P = direction(SEED, 3, 100_000), direction(SEED, 4, 100_000)
    assert torch.equal(one_P, direction(SEED, 3, 100_000))
    assert not torch.equal(one_P, direction(SEED + 1, 3, 100_000))
    assert abs(float(one_P.mean())) < 0.02
    assert float(one_P.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.nn.functional.cosine_similarity(one_P, other_P, dim=0))) < 0.02


def test_a_pool_of_one_seed_keeps_everybody_on_a_line() -> None:
    setup = Setup()
    rows_SP, _ = setup.train(setup.job(seeds=SeedPool(1, 1e-3)))
    z_P = direction(SEED, 0, setup.layout.num_parameters).double()
    moved_SP = rows_SP - setup.start_SP
    torch.testing.assert_close(moved_SP, (moved_SP @ z_P / (z_P @ z_P))[:, None] * z_P, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_looking_to_both_sides_leaves_no_trace(kind: str) -> None:
    """Steps too small to be seen: the adapters, and the base, keep every bit."""
    setup = Setup(kind, torch.float32)
    before = {name: tensor.clone() for name, tensor in setup.base.model.state_dict().items()}
    rows_SP, _ = setup.train(setup.job(), training=STEPS.model_copy(update={"learning_rate": 1e-30}))
    assert torch.equal(rows_SP, setup.start_SP)
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in setup.base.model.parameters())


def test_only_the_learning_rate_and_its_schedule_act() -> None:
    setup = Setup()
    plain_SP, _ = setup.train(setup.job())
    optimizer = {"optimizer": "adam", "weight_decay": 0.5, "clip_norm": 1e-3, "beta1": 0.5}
    assert torch.equal(setup.train(setup.job(), training=STEPS.model_copy(update=optimizer))[0], plain_SP)
    momentum = {"optimizer": "sgd", "momentum": 0.9}
    assert torch.equal(setup.train(setup.job(), training=STEPS.model_copy(update=momentum))[0], plain_SP)
    once = STEPS.model_copy(update={"local_steps": 1})
    warm = once.model_copy(update={"warmup_rounds": 4.0})
    moved_SP, half_SP = (setup.train(setup.job(), training=one)[0] - setup.start_SP for one in (once, warm))
    torch.testing.assert_close(half_SP, moved_SP / 2, rtol=0, atol=1e-13)


def test_both_sides_of_a_slope_see_the_same_dropout() -> None:
    """With masks of their own the difference of two losses would not fall with epsilon, and the slope would explode."""
    setup = Setup()
    once = STEPS.model_copy(update={"local_steps": 1})
    wide_SP, narrow_SP = (
        setup.train(setup.job(seeds=SeedPool(64, epsilon)), training=once, dropout=0.3)[0] - setup.start_SP
        for epsilon in (1e-4, 1e-5)
    )
    torch.testing.assert_close(narrow_SP, wide_SP, rtol=1e-3, atol=1e-7)
    assert not torch.allclose(wide_SP, setup.train(setup.job(), training=once)[0] - setup.start_SP, atol=1e-5)


def test_a_frozen_group_keeps_its_bits() -> None:
    setup = Setup()
    rows_SP, _ = setup.train(setup.job(trainable=frozenset({"lora_b"})))
    for group in setup.layout.groups:
        for part in setup.layout.slices(group):
            assert torch.equal(rows_SP[:, part], setup.start_SP[:, part]) == (group == "lora_a")


def test_a_pull_is_refused() -> None:
    setup = Setup()
    with pytest.raises(ValueError, match="a pull cannot act"):
        setup.train(setup.job(pull=Pull(setup.start_SP, (0.1,) * 8)))


# --------------------------------------------------------------------------------------------- failures, interruptions


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_is_not_finite_is_named_and_touches_nobody(kind: str) -> None:
    setup = Setup(kind)
    others = [0, 1, 2, 4, 5, 6, 7]
    expected_SP, _ = setup.train(setup.job(tuple(others)))
    setup.start_SP[3] = torch.nan
    rows_SP, reports = setup.train(setup.job())
    assert [report.id for report in reports if report.failure] == [3]
    assert "the loss of client client-3 is not finite in round 2, step 1" in reports[3].failure
    torch.testing.assert_close(rows_SP, expected_SP, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_interruption_before_any_step_changes_no_bit(kind: str) -> None:
    setup = Setup(kind, torch.float32)
    job = setup.job((0, 1, 2, 4))
    expected_SP, expected = setup.train(job, 2)
    for stop_at in range(12 if kind == "full" else 6):
        asked = iter(range(1000))
        with pytest.raises(StopRequested) as caught:
            setup.train(job, 2, should_stop=lambda asked=asked, stop_at=stop_at: next(asked) == stop_at)  # type: ignore[misc]
        stored = caught.value.progress
        restored = Progress(load(save(stored.tensors)), json.loads(json.dumps(stored.facts)))
        rows_SP, reports = setup.train(job, 2, progress=restored)
        assert torch.equal(rows_SP, expected_SP)
        assert reports == expected


def test_a_pooled_job_moves_along_seeds_too() -> None:
    setup = Setup()
    rows_SP, reports = setup.train(setup.job((0, 2), pooled=True))
    assert torch.equal(rows_SP[0], rows_SP[1])
    assert not torch.equal(rows_SP[0], setup.start_SP[0])
    assert [report.num_steps for report in reports] == [6, 0]
