"""Strength chosen without labels: all clients together, from their validation losses with a few mixtures."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from tests.federation.builders import clients, initial, layout, mira_with, one_round, same_bytes, trained

from fedmira.config.mira import MiraConfig
from fedmira.config.run import RunConfig
from fedmira.federation.known_graphs import labels
from fedmira.federation.method import Method, State
from fedmira.federation.mixing import laplacian_implicit
from fedmira.federation.questions import apart, together
from fedmira.federation.registry import build_method
from fedmira.federation.strengths import FIRST, GRID, judged
from fedmira.randomness import torch_generator
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial


def answers(rows: list[list[float]]) -> Losses:
    return Losses(torch.tensor(rows, dtype=torch.float64), (5,) * len(rows), 0, 0)


def memory() -> dict[str, torch.Tensor]:
    return {"strength": torch.tensor([FIRST]).double(), "strength_evidence": torch.zeros(len(GRID)).double()}


def test_all_clients_together_choose_by_their_relative_losses() -> None:
    # the second client's task is ten times as hard; in nats it would outvote the first, who gains more by its share
    heard = judged(memory(), answers([[2.0, 1.0, 3.0, 4.0], [10.0, 10.2, 10.0, 10.0], [torch.nan] * 4]))
    assert float(heard["strength"]) == GRID[1]
    relative = np.array([[2.0, 1.0, 3.0, 4.0], [10.0, 10.2, 10.0, 10.0]])
    expected = (relative / relative.mean(axis=1, keepdims=True) - 1).mean(axis=0)
    np.testing.assert_allclose(heard["strength_evidence"].numpy(), expected, atol=1e-15)


def test_what_was_said_before_outweighs_one_round() -> None:
    heard = judged(memory(), answers([[1.0, 2.0, 2.0, 2.0]]))
    chosen = []
    for _ in range(3):
        heard = judged({**memory(), **heard}, answers([[2.0, 1.0, 2.0, 2.0]]))
        chosen.append(float(heard["strength"]))
    assert chosen == [GRID[0], GRID[1], GRID[1]]


@pytest.mark.parametrize("worst", [torch.inf, torch.nan, 1e30])
def test_a_mixture_that_ruins_a_client_is_worse_than_any_other(worst: float) -> None:
    # the first client alone would take the last one
    clients_say = [[2.0, 1.9, 1.8, 1.7], [1.0, 1.0, 1.0, worst]]
    heard = judged(memory(), answers(clients_say))
    assert float(heard["strength"]) == GRID[2]
    relative = np.array([[2.0, 1.9, 1.8, 1.7], [0.0, 0.0, 0.0, 1.0]])
    expected = (relative / relative.mean(axis=1, keepdims=True) - 1).mean(axis=0)
    np.testing.assert_allclose(heard["strength_evidence"].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("alike", [[torch.inf, torch.nan, torch.inf, torch.inf], [0.0] * 4])
def test_a_client_to_which_all_mixtures_are_equal_leaves_the_choice_to_the_others(alike: list[float]) -> None:
    sound = [2.0, 1.0, 3.0, 4.0]
    heard = judged(memory(), answers([sound, alike]))
    assert torch.equal(heard["strength_evidence"], judged(memory(), answers([sound]))["strength_evidence"])


def test_without_validation_examples_the_strength_stays() -> None:
    assert judged(memory(), answers([[torch.nan] * 4])) == {}


def test_two_questions_come_apart_as_they_were() -> None:
    def question(count: int, first: float) -> Trial:
        return Trial((0, 2), count, lambda number: torch.full((2, 1), first + number), sent=count)

    both = together(question(2, 10.0), together(question(3, 20.0), question(1, 30.0)))
    assert both is not None
    assert [float(both.candidate(number)[0]) for number in range(6)] == [10, 11, 20, 21, 22, 30]
    assert (both.num_candidates, both.sent) == (6, 6)
    (first, said), (rest, more) = apart(both, answers([[float(number) for number in range(6)]] * 2))
    assert first is not None
    assert rest is not None
    assert said.mean_SQ[0].tolist() == [0, 1]
    (second, _), (last, final) = apart(rest, more)
    assert second is not None
    assert last is not None
    assert float(second.candidate(2)[0]) == 22
    assert (float(last.candidate(0)[0]), final.mean_SQ[0].tolist()) == (30.0, [5.0])
    assert together(None, None) is None
    with pytest.raises(ValueError, match="other clients"):
        together(question(1, 0.0), question(1, 0.0)._replace(ids=(1,)))


@pytest.mark.parametrize("settings", [{}, {"mixing": "products"}, {"robust": "clip", "depth": 0.5}])
def test_each_candidate_is_what_mira_of_that_strength_would_have_made(settings: dict[str, object]) -> None:
    who, everybody = clients(), Participants(1, tuple(range(6)))
    method = build_method(mira_with("labels", strength="auto", **settings), who)
    results = trained(method.plan(method.init(initial(), who), everybody), who.names)
    state, info = method.merge(method.init(initial(), who), everybody, results)
    assert info.numbers["strength"] == FIRST
    assert method.trial is not None
    trial = method.trial(state, everybody, results)
    assert trial is not None
    assert (trial.num_candidates, trial.sent) == (len(GRID), len(GRID) - 1)
    for number, strength in enumerate(GRID):
        fixed = build_method(mira_with("labels", strength=strength, **settings), who)
        made, _ = fixed.merge(fixed.init(initial(), who), everybody, results)
        assert torch.allclose(trial.candidate(number), made.adapters.values_KP, atol=1e-6)


def test_who_was_away_counts_for_less_in_every_candidate() -> None:
    who, last = clients(), Participants(2, (0, 2, 5))
    noise_KP = torch.randn(6, layout().num_parameters, generator=torch_generator(3, "uploads"))
    later = Results(last.ids, 2 * noise_KP[list(last.ids)], (), 0, 0, 0.0)

    def after(strength: float | str) -> tuple[Method, State]:
        method = build_method(mira_with("labels", strength=strength, staleness_decay=0.5), who)
        everybody = Participants(1, tuple(range(6)))
        first = Results(everybody.ids, noise_KP, (), 0, 0, 0.0)
        state, _ = method.merge(method.init(initial(), who), everybody, first)
        return method, method.merge(state, last, later)[0]

    method, state = after("auto")
    assert method.trial is not None
    trial = method.trial(state, last, later)
    assert trial is not None
    for number, strength in enumerate(GRID):
        made_KP = after(strength)[1].adapters.values_KP
        torch.testing.assert_close(trial.candidate(number), made_KP[list(last.ids)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("choice", [True, False])
def test_every_mixture_crosses_once(choice: bool) -> None:
    # what clients choose a share of is that of the strength in use
    who, some = clients(), Participants(1, (0, 2, 5))
    method = build_method(mira_with("labels", strength="auto", choice={"enabled": choice}), who)
    results = trained(method.plan(method.init(initial(), who), some), who.names)
    state, _ = method.merge(method.init(initial(), who), some, results)
    assert method.trial is not None
    trial = method.trial(state, some, results)
    assert trial is not None
    assert (trial.num_candidates, trial.sent) == (len(GRID) + 2 * choice, len(GRID))


def test_the_strength_that_was_chosen_is_used_in_the_next_round() -> None:
    who, everybody = clients(), Participants(1, tuple(range(6)))
    method = build_method(mira_with("labels", strength="auto"), who)
    state, _ = one_round(method, method.init(initial(), who), who.names, everybody)
    chosen = float(state.memory["strength"])
    assert chosen in GRID
    results = trained(method.plan(state, Participants(2, everybody.ids)), who.names)
    after, info = method.merge(state, Participants(2, everybody.ids), results)
    assert info.numbers["strength"] == chosen
    confidence_K = [n / np.mean(who.num_examples_K) for n in who.num_examples_K]
    expected = laplacian_implicit(labels(who.tasks), chosen, confidence_K)(Arena(layout(), results.values_SP))
    assert same_bytes(after.adapters.values_KP, expected.values_KP)


# --------------------------------------------------------------------------------- clients whose best strength is known

SIZE, ROUNDS = 4, 10
LAYOUT = layout(features=((12, 10), (9, 14)))


@cache
def outcome(strength: float | str, deviation: float, noise: float) -> tuple[float, float]:
    """Error of clients of two families of one graph each, and the last strength; validation examples are noisy too."""
    num_clients = 2 * SIZE

    def draw(purpose: str, rows: int) -> torch.Tensor:
        generator = torch_generator(0, "quadratic", purpose)
        return torch.randn((rows, LAYOUT.num_parameters), generator=generator, dtype=torch.float64)

    true_KP = draw("family", 2).repeat_interleave(SIZE, dim=0) + deviation * draw("deviation", num_clients)
    empirical_KP = true_KP + noise * draw("examples", num_clients)
    validation_KP = true_KP + noise * draw("validation", num_clients)
    tasks = tuple(str(k // SIZE) for k in range(num_clients))
    who = Clients(tuple(f"client-{k}" for k in range(num_clients)), (10,) * num_clients, tasks, 0)
    config = MiraConfig.model_validate(
        {"graph": {"kind": "labels"}, "choice": {"enabled": False}, "strength": strength}
    )
    method = build_method(config, who)
    state, last = method.init(initial(num_clients, torch.float64, LAYOUT), who), 0.0
    for round_ in range(1, ROUNDS + 1):
        everybody = Participants(round_, tuple(range(num_clients)))
        start_KP = method.plan(state, everybody).start_SP
        results = Results(everybody.ids, empirical_KP + 0.9**10 * (start_KP - empirical_KP), (), 0, 0, 0.0)
        state, info = method.merge(state, everybody, results)
        last = info.numbers.get("strength", 0.0)
        trial = method.trial(state, everybody, results) if method.trial else None
        if trial is not None and method.decide is not None:
            losses = [(trial.candidate(q) - validation_KP).square().mean(dim=1) for q in range(trial.num_candidates)]
            mean_SQ = torch.stack(losses, dim=1)
            state, _ = method.decide(state, trial, Losses(mean_SQ, (5,) * num_clients, 0, 0))
    return float((method.personalise(state).values_KP - true_KP).square().mean()), last


@pytest.mark.parametrize(("deviation", "noise", "wanted"), [(0.1, 1.0, 4.0), (1.0, 0.3, 0.0625)])
def test_clients_choose_a_strength_that_is_nearly_the_best_of_the_grid(
    deviation: float, noise: float, wanted: float
) -> None:
    error, chosen = outcome("auto", deviation, noise)
    of_grid = {strength: outcome(strength, deviation, noise)[0] for strength in GRID}
    assert chosen == wanted
    assert error < 1.02 * min(of_grid.values())
    # the choice matters: the worst of the grid is far behind
    assert max(of_grid.values()) > 1.5 * error


def test_losses_are_not_asked_for_under_noise() -> None:
    section = {"name": "mira", "strength": "auto", "choice": {"enabled": False}}
    with pytest.raises(
        ValueError, match=r"asks for clients' losses, which nothing would noise; set method\.strength to"
    ):
        RunConfig.model_validate({"method": section, "exchange": {"privacy": {"enabled": True}}})
