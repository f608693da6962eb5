"""Validated mixing: each client takes the share of the mixture that its validation examples ask for."""

from __future__ import annotations

import pytest
import torch
from tests.federation.builders import clients, initial, mira, play, same_bytes

from fedmira.federation.choosing import ask, blend, choose, first_choice
from fedmira.federation.method import State
from fedmira.federation.registry import build_method
from fedmira.method_config import ChoiceConfig
from fedmira.types import Arena, Layout, Losses, Results, TensorSpec

LAYOUT = Layout((TensorSpec("x", "lora_b", "layer", (2,), 0),))
OWN, MIXED = (Arena(LAYOUT, torch.tensor(values)) for values in ([[0.0, 4.0]] * 3, [[8.0, 0.0]] * 3))


def returned(*ids: int) -> Results:
    return Results(ids, OWN.values_KP[list(ids)], (), 0, 0, 0.0, 0)


def state(config: ChoiceConfig) -> State:
    memory = {**first_choice(config, 3), "other": torch.ones(1)}
    return State(MIXED.replace(MIXED.values_KP.clone()), (1, 1, 1), memory)


def answers(rows: list[list[float]], tokens: tuple[int, ...]) -> Losses:
    return Losses(torch.tensor(rows, dtype=torch.float64), tokens, 0, 0)


def test_a_blend_is_linear_and_keeps_bytes_at_its_ends() -> None:
    mixed = blend(OWN, MIXED, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert mixed.values_KP.tolist() == [[0.0, 4.0], [2.0, 3.0], [8.0, 0.0]]
    odd = OWN.replace(torch.full((3, 2), 0.1))
    assert same_bytes(blend(odd, MIXED, torch.zeros(3)).values_KP, odd.values_KP)


def test_every_client_takes_what_does_best_on_its_own_examples() -> None:
    config = ChoiceConfig(enabled=True, grid=(0.0, 0.5, 1.0), margin=0.0)
    trial = ask(config, OWN, MIXED, returned(0, 2))
    assert trial is not None
    assert (trial.ids, trial.num_candidates, trial.sent) == ((0, 2), 3, 0)
    after, info = choose(config, state(config), trial, answers([[2.0, 1.0, 3.0], [1.0, 2.0, 3.0]], (10, 10)))
    assert after.adapters.values_KP.tolist() == [[4.0, 2.0], [8.0, 0.0], [0.0, 4.0]]
    assert after.memory["choice"].tolist() == [0.5, 1.0, 0.0]
    assert after.memory["other"].tolist() == [1.0]
    assert info.numbers == {"mean_alpha": 0.25, "alpha_zero": 0.5}


def test_a_small_gain_is_not_taken() -> None:
    config = ChoiceConfig(enabled=True, grid=(0.0, 1.0), margin=0.01)
    trial = ask(config, OWN, MIXED, returned(0, 1))
    assert trial is not None
    after, _ = choose(config, state(config), trial, answers([[2.0, 1.985], [2.0, 1.975]], (10, 10)))
    assert after.memory["choice"].tolist() == [0.0, 1.0, 1.0]


def test_few_examples_are_drawn_towards_what_all_say() -> None:
    config = ChoiceConfig(enabled=True, grid=(0.0, 1.0), margin=0.0, pooling=100.0)
    trial = ask(config, OWN, MIXED, returned(0, 1, 2))
    assert trial is not None
    rows = [[1.0, 1.1], [1.0, 0.5], [1.0, 0.5]]
    few, _ = choose(config, state(config), trial, answers(rows, (1, 1, 1)))
    many, _ = choose(config, state(config), trial, answers(rows, (10_000, 1, 1)))
    assert few.memory["choice"].tolist() == [1.0, 1.0, 1.0]
    assert many.memory["choice"].tolist() == [0.0, 1.0, 1.0]


def test_evidence_is_remembered_and_a_client_without_examples_follows_the_others() -> None:
    config = ChoiceConfig(enabled=True, grid=(0.0, 1.0), margin=0.0, memory=0.75)
    trial = ask(config, OWN, MIXED, returned(0, 1))
    assert trial is not None
    first, _ = choose(config, state(config), trial, answers([[1.0, 0.6], [torch.nan, torch.nan]], (5, 0)))
    assert first.memory["choice"].tolist() == [1.0, 1.0, 1.0]
    second, _ = choose(config, first, trial, answers([[1.0, 1.1], [torch.nan, torch.nan]], (5, 0)))
    assert second.memory["evidence"][0].tolist() == pytest.approx([0.0, 0.75 * -0.4 + 0.25 * 0.1])
    assert second.memory["choice"].tolist() == [1.0, 1.0, 1.0]


def test_with_the_whole_mixture_as_only_better_choice_mira_is_as_without() -> None:
    who = clients()
    plain = build_method(mira("labels"), who)
    grid = ChoiceConfig(enabled=True, grid=(0.5, 1.0), margin=0.0)
    chosen = build_method(mira("labels").model_copy(update={"choice": grid}), who)
    asked = play(plain, plain.init(initial(), who), who.names, [(0, 1, 2, 3, 4, 5)])
    same = play(chosen, chosen.init(initial(), who), who.names, [(0, 1, 2, 3, 4, 5)])
    taken = same.memory["choice"] == 1
    assert torch.allclose(same.adapters.values_KP[taken], asked.adapters.values_KP[taken])


@pytest.mark.parametrize("grid", [(0.5,), (0.0, 0.0, 1.0), (1.0, 0.0)])
def test_a_grid_that_leaves_no_choice_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending order"):
        ChoiceConfig(enabled=True, grid=grid)


def test_without_any_validation_examples_everybody_takes_all() -> None:
    config = ChoiceConfig(enabled=True, grid=(0.0, 1.0))
    trial = ask(config, OWN, MIXED, returned(0, 1, 2))
    assert trial is not None
    after, info = choose(config, state(config), trial, answers([[torch.nan, torch.nan]] * 3, (0, 0, 0)))
    assert same_bytes(after.adapters.values_KP, MIXED.values_KP)
    assert after.memory["choice"].tolist() == [1.0, 1.0, 1.0]
    assert not info.numbers
