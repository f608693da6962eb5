"""Validated mixing: each client takes the share of the mixture that its validation examples ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.federation.builders import clients, initial, mira, play, same_bytes, trained

from fedmira.config.mira import ChoiceConfig
from fedmira.federation.choosing import ask, asked, blend, choose, expected, first_choice
from fedmira.federation.method import State
from fedmira.federation.questions import bounded
from fedmira.federation.registry import build_method
from fedmira.types import Arena, Layout, Losses, Participants, Results, TensorSpec, Trial

LAYOUT = Layout((TensorSpec("x", "lora_b", "layer", (2,), 0),))
OWN, MIXED = (Arena(LAYOUT, torch.tensor(values)) for values in ([[0.0, 4.0]] * 3, [[8.0, 0.0]] * 3))


def returned(*ids: int) -> Results:
    return Results(ids, OWN.values_KP[list(ids)], (), 0, 0, 0.0)


def state() -> State:
    return State(MIXED, (1, 1, 1), {**first_choice(3), "uploads": OWN.values_KP, "other": torch.ones(1)})


def answers(rows: list[list[float]], examples: tuple[int, ...]) -> Losses:
    """Of clients whose examples all say the same."""
    mean_SQ = torch.tensor(rows, dtype=torch.float64)
    return Losses(mean_SQ, examples, 0, 0, scatter_SQ=torch.zeros_like(mean_SQ))


def question(config: ChoiceConfig, *ids: int) -> Trial:
    trial = ask(config, state(), Participants(1, (0, 1, 2)), returned(*ids))
    assert trial is not None
    return trial


def test_a_mixture_that_is_not_trained_on_from_crosses_only_to_be_judged() -> None:
    def sent(participants: Participants) -> int:
        trial = ask(ChoiceConfig(), state(), participants, returned(*participants.ids))
        assert trial is not None
        return trial.sent

    assert sent(Participants(1, (0, 1, 2))) == 0
    assert sent(Participants(1, (0, 2))) == 1
    # after the last round it is taken home
    assert sent(Participants(9, (0, 2), last=True)) == 0


def test_a_blend_is_linear_and_keeps_bytes_at_its_ends() -> None:
    mixed = blend(OWN, MIXED, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert mixed.values_KP.tolist() == [[0.0, 4.0], [2.0, 3.0], [8.0, 0.0]]
    odd = OWN.replace(torch.full((3, 2), 0.1))
    # nobody's adapter is copied where all want the same
    assert blend(odd, MIXED, torch.zeros(3)) is odd
    assert blend(odd, MIXED, torch.ones(3)) is MIXED
    some = blend(odd, MIXED, torch.tensor([0.0, 1.0, 0.5]))
    assert same_bytes(some.values_KP[0], odd.values_KP[0])
    assert same_bytes(some.values_KP[1], MIXED.values_KP[1])
    assert odd.values_KP.tolist() == torch.full((3, 2), 0.1).tolist()


def test_every_client_keeps_what_does_best_on_its_own_examples() -> None:
    config = ChoiceConfig(grid=(0.0, 0.5, 1.0), margin=0.0)
    trial = question(config, 0, 2)
    assert (trial.ids, trial.num_candidates, trial.sent) == ((0, 2), 3, 0)
    assert [trial.candidate(number).tolist() for number in range(3)] == [
        [[0.0, 4.0]] * 2,
        [[4.0, 2.0]] * 2,
        [[8.0, 0.0]] * 2,
    ]
    after, info = choose(config, state(), trial, answers([[2.0, 1.0, 2.1], [1.0, 2.0, 3.0]], (10, 10)))
    assert after.memory["alpha"].tolist() == [0.5, 1.0, 0.0]
    assert after.memory["other"].tolist() == [1.0]
    assert info.numbers == {"mean_alpha": 0.25, "start_from_own": 0.5}


def test_a_small_gain_is_not_taken() -> None:
    config = ChoiceConfig(grid=(0.0, 1.0), margin=0.01)
    after, _ = choose(config, state(), question(config, 0, 1), answers([[2.0, 1.985], [2.0, 1.975]], (10, 10)))
    assert after.memory["alpha"].tolist() == [0.0, 1.0, 1.0]


def test_the_margin_is_a_share_of_the_loss() -> None:
    # the logarithm of 0.81 is -0.21
    config = ChoiceConfig(grid=(0.0, 1.0), margin=0.2)
    after, _ = choose(config, state(), question(config, 0, 1), answers([[1.0, 0.81], [1.0, 0.79]], (10, 10)))
    assert after.memory["alpha"].tolist() == [0.0, 1.0, 1.0]


def scattered(rows: list[list[float]], scatter: list[list[float]], examples: tuple[int, ...]) -> Losses:
    return answers(rows, examples)._replace(scatter_SQ=torch.tensor(scatter, dtype=torch.float64))


def test_answers_that_differ_by_no_more_than_chance_are_one() -> None:
    config = ChoiceConfig(margin=0.0)
    rows, trial = [[1.0, 1.1], [1.0, 0.5], [1.0, 0.5]], question(config, 0, 1, 2)
    sure, _ = choose(config, state(), trial, scattered(rows, [[0.0, 0.001]] * 3, (5, 5, 5)))
    unsure, _ = choose(config, state(), trial, scattered(rows, [[0.0, 10.0]] * 3, (5, 5, 5)))
    assert sure.memory["alpha"].tolist() == [0.0, 1.0, 1.0]
    assert unsure.memory["alpha"].tolist() == [1.0, 1.0, 1.0]
    # who has many examples is heard alone, although one example scatters by as much
    many, _ = choose(config, state(), trial, scattered(rows, [[0.0, 0.3]] * 3, (10_000, 5, 5)))
    few, _ = choose(config, state(), trial, scattered(rows, [[0.0, 0.3]] * 3, (5, 10_000, 5)))
    assert many.memory["alpha"].tolist() == [0.0, 1.0, 1.0]
    assert few.memory["alpha"].tolist() == [1.0, 1.0, 1.0]


def test_what_is_expected_by_hand() -> None:
    change_SQ = torch.tensor([[0.0, -0.3, 5.0], [0.0, 0.1, 0.2], [0.0, 0.2, 0.2]], dtype=torch.float64)
    scatter_SQ = torch.tensor([[0.0, 0.2, 9.0], [0.0, 0.1, 0.2], [0.0, torch.nan, torch.nan]], dtype=torch.float64)
    # the third has one example, and so no scatter
    expected_SQ = expected(change_SQ, scatter_SQ, torch.tensor([4.0, 6.0, 1.0], dtype=torch.float64))
    one = (3 * 0.2 + 5 * 0.1) / 8
    noise = [one / 4, one / 6, one]
    between = 0.07 - sum(noise) / 3
    shares = [1 / (between + v) for v in noise]
    mean = sum(share * c for share, c in zip(shares, (-0.3, 0.1, 0.2), strict=True)) / sum(shares)
    by_hand = [mean + between / (between + v) * (c - mean) for v, c in zip(noise, (-0.3, 0.1, 0.2), strict=True)]
    assert between > 0
    assert expected_SQ[:, 1].tolist() == pytest.approx(by_hand)
    assert expected_SQ[:, 0].tolist() == [0.0] * 3
    # who is hopeless stays, and says nothing about the other two, who agree
    assert expected_SQ[:, 2].tolist() == pytest.approx([5.0, 0.2, 0.2])


def test_an_answer_moves_by_two_standard_errors_at_most() -> None:
    change_SQ = torch.tensor([[-0.2], [-0.2], [-0.2], [0.4], [0.5]], dtype=torch.float64)
    scatter_SQ = torch.tensor([[0.04], [0.01], [0.0], [0.09], [1000.0]], dtype=torch.float64)
    moved_S = (expected(change_SQ, scatter_SQ, torch.full((5,), 4.0, dtype=torch.float64)) - change_SQ)[:, 0]
    # all are drawn to their mean of 0.06: by their own scatter, or the median where it is less, but no further than it
    assert moved_S.tolist() == pytest.approx([0.2, 0.2, 0.2, -0.3, -0.44])


@pytest.mark.parametrize(
    "odd", [(3.0, 400.0), (-4.0, 0.0), (0.3, 1e6), (-0.1, 1e6), (torch.nan, torch.nan), (4.9, 1e-3), (0.1, -1e6)]
)
def test_nobody_decides_for_others_that_are_sure(odd: tuple[float, float]) -> None:
    """Whatever one client answers, those whose ten examples say clearly what to keep do so."""
    clear = [(-0.2, 0.02)] * 5 + [(0.2, 0.02)] * 4
    change, scatter = (torch.tensor(column, dtype=torch.float64) for column in zip(*clear, odd, strict=True))
    losses = answers([[1.0, float(value)] for value in change.exp()], (10,) * 10)
    losses = losses._replace(scatter_SQ=torch.stack([torch.zeros(10).double(), scatter], dim=1))
    config = ChoiceConfig()
    start = State(OWN, (1,) * 10, {**first_choice(10), "uploads": OWN.values_KP})
    trial = Trial(tuple(range(10)), 2, lambda number: OWN.values_KP, sent=0, versus=(0,))
    after, _ = choose(config, start, trial, losses)
    assert after.memory["alpha"].tolist()[:9] == [1.0] * 5 + [0.0] * 4


def test_who_answers_nothing_follows_those_that_are_not_in_trouble() -> None:
    rows = [[1.0, 0.8], [1.0, 0.8], [1.0, torch.nan], [torch.inf, 1.0], [torch.nan, torch.nan]]
    losses = answers(rows, (5, 5, 5, 5, 0))
    start = State(OWN, (1,) * 5, {**first_choice(5), "uploads": OWN.values_KP})
    trial = Trial(tuple(range(5)), 2, lambda number: OWN.values_KP, sent=0, versus=(0,))
    for config in (ChoiceConfig(), ChoiceConfig(shrinkage=False)):
        after, _ = choose(config, start, trial, losses)
        assert after.memory["alpha"].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
        assert after.memory["start_alpha"].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_one_whose_loss_vanishes_does_not_decide_for_those_who_answer_nothing() -> None:
    rows = [[1.0, 0.0], *[[1.0, 2.0]] * 9, [torch.nan, torch.nan]]
    start = State(OWN, (1,) * 11, {**first_choice(11), "uploads": OWN.values_KP})
    trial = Trial(tuple(range(11)), 2, lambda number: OWN.values_KP, sent=0)
    after, _ = choose(ChoiceConfig(shrinkage=False), start, trial, answers(rows, (*(5,) * 10, 0)))
    assert after.memory["alpha"].tolist() == [1.0, *[0.0] * 10]


@pytest.mark.parametrize(
    ("scatter", "examples"), [([0.0, 0.0], (5, 5)), ([torch.nan, torch.nan], (1, 1)), ([0.2], (5,))]
)
def test_where_chance_cannot_be_told_everybody_trusts_its_own(scatter: list[float], examples: tuple[int, ...]) -> None:
    change_SQ = torch.tensor([[0.0, -0.3], [0.0, 0.1]], dtype=torch.float64)[: len(scatter)]
    scatter_SQ = torch.tensor([[0.0, value] for value in scatter], dtype=torch.float64)
    assert torch.equal(expected(change_SQ, scatter_SQ, torch.tensor(examples, dtype=torch.float64)), change_SQ)


def test_expected_changes_are_closer_to_the_truth_than_answers_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    for spread in (0.0, 0.1, 1.0):
        alone, drawn = 0.0, 0.0
        for _ in range(50):
            truth_S = -0.05 + spread * torch.randn(24, generator=generator, dtype=torch.float64)
            heard_SN = truth_S[:, None] + 0.3 * torch.randn(24, 5, generator=generator, dtype=torch.float64)
            change_SQ = torch.stack([torch.zeros(24, dtype=torch.float64), heard_SN.mean(dim=1)], dim=1)
            scatter_SQ = torch.stack([torch.zeros(24, dtype=torch.float64), heard_SN.var(dim=1)], dim=1)
            expected_S = expected(change_SQ, scatter_SQ, torch.full((24,), 5.0, dtype=torch.float64))[:, 1]
            alone += float((change_SQ[:, 1] - truth_S).square().mean())
            drawn += float((expected_S - truth_S).square().mean())
        assert drawn < alone * (0.2 if spread == 0 else 0.6 if spread == 0.1 else 1.0)


def test_a_hopeless_answer_says_nothing_about_others() -> None:
    config = ChoiceConfig(margin=0.0)
    rows, trial = [[1.0, 0.9], [1.0, 0.9], [1.0, torch.nan]], question(config, 0, 1, 2)
    after, _ = choose(config, state(), trial, scattered(rows, [[0.0, 0.1]] * 2 + [[0.0, torch.nan]], (5, 5, 5)))
    assert after.memory["alpha"].tolist() == [1.0, 1.0, 0.0]
    assert after.memory["start_alpha"].tolist() == [1.0, 1.0, 0.0]


def test_who_loses_nothing_either_way_is_not_in_trouble() -> None:
    trial = question(ChoiceConfig(), 0, 1, 2)
    after, _ = choose(ChoiceConfig(), state(), trial, answers([[0.0, 0.0], [1.0, 0.9], [0.0, 0.5]], (5, 5, 5)))
    assert after.memory["start_alpha"].tolist() == [1.0, 1.0, 0.0]
    assert after.memory["rise"][0] == 0


def test_where_to_start_from_is_decided_by_a_moving_average_of_own_answers() -> None:
    config = ChoiceConfig(memory=0.75)
    trial = question(config, 0)
    first, _ = choose(config, state(), trial, answers([[1.0, 1.5]], (5,)))
    assert first.memory["rise"].tolist() == pytest.approx([0.5, 0.0, 0.0]), "nothing came before"
    assert first.memory["start_alpha"].tolist() == [0.0, 1.0, 1.0]
    second, _ = choose(config, first, trial, answers([[1.0, 0.9]], (5,)))
    assert second.memory["rise"][0] == pytest.approx(0.75 * 0.5 + 0.25 * -0.1)
    assert second.memory["start_alpha"].tolist() == [0.0, 1.0, 1.0]
    # what is kept is decided by the last answers
    assert second.memory["alpha"].tolist() == [1.0, 1.0, 1.0]
    forgetful, _ = choose(ChoiceConfig(memory=0), first, trial, answers([[1.0, 0.9]], (5,)))
    assert forgetful.memory["start_alpha"].tolist() == [1.0, 1.0, 1.0]


def test_clients_say_how_sure_they_are_only_where_it_counts() -> None:
    assert question(ChoiceConfig(), 0).versus == (0,)
    assert question(ChoiceConfig(shrinkage=False), 0).versus == ()


@pytest.mark.parametrize("ruined", [torch.nan, torch.inf])
def test_a_mixture_that_ruins_a_client_is_left(ruined: float) -> None:
    after, _ = choose(ChoiceConfig(), state(), question(ChoiceConfig(), 0), answers([[1.0, ruined]], (5,)))
    assert after.memory["alpha"].tolist() == [0.0, 1.0, 1.0]
    assert after.memory["start_alpha"].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("heard", "kept"), [(0.6, 1.0), (1.1, 0.0)])
def test_a_client_without_examples_follows_the_others(heard: float, kept: float) -> None:
    config = ChoiceConfig(grid=(0.0, 1.0), margin=0.0)
    trial = question(config, 0, 1)
    after, _ = choose(config, state(), trial, answers([[1.0, heard], [torch.nan, torch.nan]], (5, 0)))
    assert after.memory["alpha"].tolist() == [kept, kept, 1.0]


def test_without_any_validation_examples_everybody_keeps_all() -> None:
    config = ChoiceConfig(grid=(0.0, 1.0))
    after, info = choose(config, state(), question(config, 0, 1, 2), answers([[torch.nan, torch.nan]] * 3, (0, 0, 0)))
    assert after.memory["alpha"].tolist() == [1.0, 1.0, 1.0]
    assert not info.numbers


@pytest.mark.parametrize(
    ("every", "round_", "last", "who"),
    [(1, 3, False, (2,)), (1, 3, True, (0, 2)), (3, 3, False, (2,)), (3, 4, False, ()), (3, 4, True, (0, 2))],
)
def test_the_last_round_asks_all_that_ever_returned(every: int, round_: int, last: bool, who: tuple[int, ...]) -> None:
    participants = Participants(round_, (1, 2), last)
    assert asked(ChoiceConfig(every=every), participants, returned(2), last_round_K=(1, 0, round_)) == who


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_however_rarely_clients_are_asked_each_question_is_a_turn(every: int) -> None:
    turns = []
    for round_ in range(1, 4 * every + 1):
        participants = Participants(round_, (0, 1, 2))
        trial = ask(ChoiceConfig(every=every), state(), participants, returned(0, 1, 2))
        if trial is not None:
            turns.append(bounded(trial, participants, 16).turn)
    assert turns == [0, 1, 2, 3]


@pytest.mark.parametrize(("loss", "start"), [(0.9, 1.0), (1.19, 1.0), (1.21, 0.0)])
def test_a_client_trains_on_from_its_mixture_unless_that_is_much_worse(loss: float, start: float) -> None:
    config = ChoiceConfig(tolerance=0.2)
    after, _ = choose(config, state(), question(config, 1), answers([[1.0, loss]], (10,)))
    assert after.memory["start_alpha"].tolist() == [1.0, start, 1.0]
    assert after.memory["alpha"].tolist() == [1.0, float(loss < 1), 1.0]


def test_without_tolerance_a_client_trains_on_from_a_mixture_that_is_as_good() -> None:
    config = ChoiceConfig(tolerance=0.0)
    after, _ = choose(config, state(), question(config, 0, 1), answers([[1.0, 1.0], [1.0, 1.001]], (10, 10)))
    assert after.memory["start_alpha"].tolist() == [1.0, 0.0, 1.0]


def test_what_a_client_keeps_and_starts_from_is_as_it_chose() -> None:
    who = clients()
    section = ChoiceConfig(margin=0.2, tolerance=0.2)
    method = build_method(mira("labels").model_copy(update={"choice": section}), who)
    state = play(method, method.init(initial(), who), who.names, [(0, 1, 2, 3, 4, 5), (1, 2, 5)])
    uploads = state.adapters.replace(state.memory["uploads"])
    alpha_K, start_K = state.memory["alpha"], state.memory["start_alpha"]
    assert 0 < int((alpha_K == 1).sum()) < len(alpha_K)
    assert same_bytes(method.personalise(state).values_KP, blend(uploads, state.adapters, alpha_K).values_KP)
    state = replace(state, memory={**state.memory, "start_alpha": 1 - start_K})
    job = method.plan(state, Participants(3, (0, 5)))
    expected = blend(uploads, state.adapters, 1 - start_K).values_KP[[0, 5]]
    assert same_bytes(job.start_SP, expected)
    assert not same_bytes(job.start_SP, state.adapters.values_KP[[0, 5]])


def test_a_learned_graph_compares_uploads_with_what_clients_trained_on_from() -> None:
    who, some = clients(), Participants(3, (0, 2, 5))
    method = build_method(mira("gram").model_copy(update={"choice": ChoiceConfig()}), who)
    state = play(method, method.init(initial(), who), who.names, [(0, 1, 2, 3, 4, 5)] * 2)
    ones = torch.ones(6, dtype=torch.float64)
    state = replace(state, memory={**state.memory, "alpha": 0 * ones, "start_alpha": ones})
    job = method.plan(state, some)
    after, _ = method.merge(state, some, trained(job, who.names))
    assert same_bytes(after.memory["starts"][[0, 2, 5]], job.start_SP)
    assert not same_bytes(job.start_SP, state.memory["uploads"][[0, 2, 5]])


def test_one_that_tolerates_everything_leaves_all_starts_as_they_are_without_choice() -> None:
    who = clients()
    rounds = [(0, 1, 2, 3, 4, 5), (1, 2, 5), (0, 1, 2)]
    adapters = []
    for section in (ChoiceConfig(tolerance=1e9), ChoiceConfig(enabled=False)):
        method = build_method(mira("gram").model_copy(update={"choice": section}), who)
        adapters.append(play(method, method.init(initial(), who), who.names, rounds).adapters.values_KP)
    assert same_bytes(*adapters)


@pytest.mark.parametrize("grid", [(0.5,), (0.0, 0.0, 1.0), (1.0, 0.0), (0.0, 0.5), (0.5, 1.0)])
def test_a_grid_that_leaves_no_choice_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending order"):
        ChoiceConfig(grid=grid)
