"""Moments that clients keep between rounds: as if a round had not ended, in whatever gauge the factors come back."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tests.reference.tiny_models import ragged_clients, random_arena, tiny_base, tiny_layout

from fedmira.config.exchange import ExchangeConfig
from fedmira.config.method import method_with_defaults
from fedmira.config.refusals import refusal_beside
from fedmira.config.training import TrainingConfig
from fedmira.training.cohort import train
from fedmira.training.continuity import Continuity, Place, turn
from fedmira.training.optimizers import Moments, fresh_moments
from fedmira.types import Arena, Job, Layout

BOTH = frozenset({"lora_a", "lora_b"})
ADAM = TrainingConfig(local_steps=2, learning_rate=1e-2, keep_moments=True)
MOMENTUM = TrainingConfig(local_steps=2, learning_rate=0.1, optimizer="sgd", momentum=0.9, keep_moments=True)
BASE = tiny_base("llama", torch.float64)
LAYOUT = tiny_layout(BASE, "llama")
CLIENTS = ragged_clients((1, 1))
"""One example each, so that all steps see the same batch, whatever the round."""
START_SP = random_arena(LAYOUT, 2, torch.float64).values_KP


def one_round(round_: int, start_SP: torch.Tensor, training: TrainingConfig, memory: Continuity | None) -> torch.Tensor:
    rows_SP, reports = train(
        BASE,
        LAYOUT,
        Job(round_, (0, 1), start_SP, BOTH, BOTH, BOTH),
        CLIENTS,
        training,
        total_rounds=2,
        seed=0,
        cohort_size=2,
        dropout=0.0,
        continuity=memory,
    )
    assert not any(report.failure for report in reports)
    return rows_SP


def rotated(layout: Layout, rows_SP: torch.Tensor) -> torch.Tensor:
    """The same products as other factors: (B R, R^T A), R another rotation for each layer."""
    arena = Arena(layout, rows_SP.clone())
    draw = torch.Generator().manual_seed(0)
    rotations = {}
    for spec in layout.specs:
        rank = spec.shape[0] if spec.group == "lora_a" else spec.shape[1]
        if spec.layer not in rotations:
            random_RR = torch.randn(rank, rank, generator=draw, dtype=rows_SP.dtype)
            rotations[spec.layer] = torch.linalg.qr(random_RR).Q
        rotation_RR, view = rotations[spec.layer], arena.view(spec)
        view.copy_(rotation_RR.T @ view if spec.group == "lora_a" else view @ rotation_RR)
    return arena.values_KP


def products(layout: Layout, rows_SP: torch.Tensor) -> list[torch.Tensor]:
    arena = Arena(layout, rows_SP)
    a = {spec.layer: arena.view(spec) for spec in layout.specs if spec.group == "lora_a"}
    return [arena.view(spec) @ a[spec.layer] for spec in layout.specs if spec.group == "lora_b"]


def largest_difference(one_SP: torch.Tensor, other_SP: torch.Tensor) -> float:
    pairs = zip(products(LAYOUT, one_SP), products(LAYOUT, other_SP), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("training", [ADAM, MOMENTUM], ids=["adamw", "momentum"])
def test_two_rounds_with_kept_moments_are_one_round_of_twice_the_steps(training: TrainingConfig) -> None:
    memory = Continuity(LAYOUT, 2, training)
    halves_SP = one_round(2, one_round(1, START_SP, training, memory), training, memory)
    whole_SP = one_round(1, START_SP, training.model_copy(update={"local_steps": 4}), None)
    assert torch.equal(halves_SP, whole_SP)


def test_without_the_setting_each_round_begins_afresh() -> None:
    forgetful = ADAM.model_copy(update={"keep_moments": False})
    memory = Continuity(LAYOUT, 2, forgetful)
    first_SP = one_round(1, START_SP, forgetful, memory)
    assert memory.tensors() == {}
    assert torch.equal(one_round(2, first_SP, forgetful, memory), one_round(2, first_SP, forgetful, None))
    assert not torch.equal(one_round(2, first_SP, forgetful, None), one_round(2, first_SP, ADAM, kept_by(ADAM)))


def kept_by(training: TrainingConfig) -> Continuity:
    memory = Continuity(LAYOUT, 2, training)
    one_round(1, START_SP, training, memory)
    return memory


def test_moments_turn_with_the_factors() -> None:
    first_SP = one_round(1, START_SP, MOMENTUM, None)
    straight_SP = one_round(2, first_SP, MOMENTUM, kept_by(MOMENTUM))
    turned_SP = one_round(2, rotated(LAYOUT, first_SP), MOMENTUM, kept_by(MOMENTUM))
    assert largest_difference(straight_SP, turned_SP) < 1e-12
    # the claim has teeth: factors in another gauge with moments of the old one end elsewhere
    fooled = kept_by(MOMENTUM)
    fooled.tensors()["moments.0.ended"].copy_(rotated(LAYOUT, first_SP))
    fooled_SP = one_round(2, rotated(LAYOUT, first_SP), MOMENTUM, fooled)
    assert largest_difference(straight_SP, fooled_SP) > 1e-6


def test_where_one_factor_rested_nothing_turns() -> None:
    # all of A and half of each B, as after mixing B alone: the gradients of the new product are not those of the old
    start_P, moments_P = START_SP[0].clone(), torch.randn_like(START_SP[0])
    for spec in LAYOUT.specs:
        if spec.group == "lora_b":
            start_P[spec.columns] = torch.randn(spec.size, generator=torch.Generator().manual_seed(1)).to(start_P)
    turned_P, squares_P = turn(LAYOUT, START_SP[0], start_P, moments_P, moments_P.square())
    assert torch.equal(turned_P, moments_P)
    assert torch.equal(squares_P, moments_P.square())


def test_mean_squares_turn_with_the_squares_and_keep_their_sum_over_components() -> None:
    ended_P = START_SP[0]
    first_P, second_P = torch.randn_like(ended_P), torch.rand_like(ended_P)
    turned_first_P, turned_second_P = turn(LAYOUT, ended_P, rotated(LAYOUT, ended_P[None])[0], first_P, second_P)
    assert (turned_second_P >= 0).all()
    for spec in LAYOUT.specs:
        part = slice(spec.offset, spec.offset + spec.size)
        axis = 0 if spec.group == "lora_a" else 1
        before, after = (row_P[part].view(spec.shape).sum(dim=axis) for row_P in (second_P, turned_second_P))
        assert torch.allclose(before, after, rtol=1e-12)
        norms = [row_P[part].view(spec.shape).norm(dim=axis) for row_P in (first_P, turned_first_P)]
        assert torch.allclose(*norms, rtol=1e-12)


def test_a_client_that_failed_keeps_what_it_had_and_rows_of_one_client_do_not_share() -> None:
    memory = Continuity(LAYOUT, 3, ADAM)
    values_CP = START_SP.clone()
    moments = Moments(torch.ones_like(values_CP), torch.ones_like(values_CP), torch.tensor([2.0, 2.0]).double())
    memory.end([Place(0, 0), Place(1, 0)], values_CP, moments, [True, False])
    begun = memory.begin([Place(0, 0), Place(1, 0)], values_CP)
    assert begun.steps_C.tolist() == [2, 0]
    assert begun.first_CP.mean(dim=1).tolist() == [1, 0]
    assert memory.begin([Place(0, 1)], values_CP[:1]).steps_C.tolist() == [0]


def test_of_a_client_with_two_rows_only_the_one_that_was_rejected_begins_afresh() -> None:
    memory, both = Continuity(LAYOUT, 1, ADAM), [Place(0, 0), Place(0, 1)]
    moments = Moments(torch.ones_like(START_SP), torch.ones_like(START_SP), torch.tensor([2.0, 3.0]).double())
    memory.end(both, START_SP, moments, [True, True])
    memory.forget([Place(0, 1), Place(0, 2)])
    assert memory.begin(both, START_SP).steps_C.tolist() == [2, 0]


def test_memory_survives_being_stored_and_clients_that_joined_remember_nothing() -> None:
    mine, others = Continuity.parted({**kept_by(ADAM).tensors(), "error.0": START_SP})
    assert list(others) == ["error.0"]
    later = Continuity(LAYOUT, 3, ADAM)
    later.restore(mine)
    begun = later.begin([Place(1, 0), Place(2, 0)], START_SP)
    assert begun.steps_C.tolist() == [2, 0]
    assert torch.equal(begun.first_CP[1], fresh_moments(ADAM, START_SP).first_CP[1])


def test_nothing_to_keep_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="keep_moments has no effect with sgd"):
        TrainingConfig(optimizer="sgd", keep_moments=True)


@pytest.mark.parametrize(("name", "usable"), [("flora", False), ("florist", False), ("rolora", False), ("fedit", True)])
def test_methods_whose_factors_do_not_go_on_refuse_to_keep_moments(name: str, usable: bool) -> None:
    words = refusal_beside(method_with_defaults(name), ExchangeConfig(), client_ranks=False, keep_moments=True)
    assert (words == "") == usable
    assert usable or words.startswith("training.keep_moments = true would")
