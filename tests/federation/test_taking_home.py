"""What clients take home: a moving average over rounds of what they would take home without it, for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.federation.builders import (
    CONFIGS,
    LOCAL,
    clients,
    handed_over,
    initial,
    layout_for,
    mira,
    mira_with,
    one_round,
    play,
    same_bytes,
    trained,
)

from fedmira.config.run import RunConfig
from fedmira.federation.joining import joined
from fedmira.federation.method import Info, Method, State
from fedmira.federation.methods import local_only
from fedmira.federation.ranks import trimmed
from fedmira.federation.registry import build_method
from fedmira.federation.taking_home import over_rounds
from fedmira.types import Losses, Participants, Trial

ROUNDS = [(0, 1, 3), (1, 2, 4), (0, 1, 2, 3, 4, 5), (5,)]
AVERAGED = {name: config for name, config in CONFIGS.items() if not config.moves_the_base}


@pytest.mark.parametrize("name", list(AVERAGED))
def test_it_is_the_weighted_mean_of_all_rounds_and_changes_nothing_else(name: str) -> None:
    who, decay = clients(), 0.75
    given = handed_over(getattr(getattr(AVERAGED[name], "graph", None), "kind", None))
    plain, method = (
        build_method(AVERAGED[name].model_copy(update={"ema_decay": share}), who, given) for share in (0.0, decay)
    )
    first = initial(of=layout_for(AVERAGED[name]))
    one, other = plain.init(first, who), method.init(first, who)
    assert same_bytes(plain.personalise(one).values_KP, method.personalise(other).values_KP)
    taken: list[np.ndarray] = []
    first_round_K = np.array([next(r for r, ids in enumerate(ROUNDS) if k in ids) for k in range(6)])
    for round_, ids in enumerate(ROUNDS, start=1):
        one, _ = one_round(plain, one, who.names, Participants(round_, ids))
        other, _ = one_round(method, other, who.names, Participants(round_, ids))
        assert same_bytes(one.adapters.values_KP, other.adapters.values_KP)
        taken.append(plain.personalise(one).values_KP.double().numpy())
        # twin: the weights of each client written out; its first round has what is left, rounds before it nothing
        kept = [decay ** (len(returned) / 6) for returned in ROUNDS[: len(taken)]]
        expected = np.zeros_like(taken[0])
        for k in range(6):
            begun = min(int(first_round_K[k]), len(taken) - 1)
            for index in range(begun, len(taken)):
                weight = np.prod(kept[index + 1 :]) * (1.0 if index == begun else 1 - kept[index])
                expected[k] += weight * taken[index][k]
        np.testing.assert_allclose(method.personalise(other).values_KP.double().numpy(), expected, atol=1e-5)


def test_what_never_moves_keeps_its_bits() -> None:
    # A of a method that freezes it is the same in all rounds
    who = clients()
    method = build_method(CONFIGS["ffa_lora"].model_copy(update={"ema_decay": 0.3}), who)
    state = play(method, method.init(initial(), who), who.names, ROUNDS)
    for part in initial().layout.slices("lora_a"):
        assert same_bytes(method.personalise(state).values_KP[:, part], initial().values_KP[:, part])


def test_without_decay_nothing_is_kept() -> None:
    method = local_only.build()
    assert over_rounds(method, 0.0) is method


def test_one_that_joins_has_no_past_before_its_first_round() -> None:
    fewer, everybody = clients(4), clients(6)
    config = mira("gram").model_copy(update={"ema_decay": 0.5})
    before, method, plain = (
        build_method(config, fewer),
        build_method(config, everybody),
        build_method(config.model_copy(update={"ema_decay": 0.0}), everybody),
    )
    state = play(before, before.init(initial(4), fewer), fewer.names, [(0, 1, 2, 3), (0, 2)])
    grown = joined(method, state, method.init(initial(6), everybody), 2)
    assert same_bytes(before.personalise(state).values_KP, method.personalise(grown).values_KP[:4])
    assert same_bytes(plain.personalise(grown).values_KP[4:], method.personalise(grown).values_KP[4:])
    after = play(method, grown, everybody.names, [(0, 4)], first=3)
    assert same_bytes(plain.personalise(after).values_KP[4:], method.personalise(after).values_KP[4:])
    later = play(method, after, everybody.names, [(4,)], first=4)
    # one of six came back
    kept = 0.5 ** (1 / 6)
    expected = kept * plain.personalise(after).values_KP + (1 - kept) * plain.personalise(later).values_KP
    torch.testing.assert_close(method.personalise(later).values_KP[4], expected[4])
    assert same_bytes(plain.personalise(later).values_KP[5], method.personalise(later).values_KP[5])


def test_what_stands_in_memory_is_not_changed_by_the_next_round() -> None:
    who = clients()
    method = build_method(LOCAL.model_copy(update={"ema_decay": 0.5}), who)
    state = play(method, method.init(initial(), who), who.names, ROUNDS[:2])
    home = state.memory["home"].clone()
    play(method, replace(state), who.names, ROUNDS[2:], first=3)
    assert same_bytes(home, state.memory["home"])


def test_ranks_hold_for_what_is_averaged() -> None:
    who = clients()._replace(ranks_K=(1, 2, 2, 2, 1, 2))
    method, plain = (build_method(mira_with("labels", ema_decay=decay), who) for decay in (0.5, 0.0))
    state = play(method, method.init(initial(), who), who.names, ROUNDS)
    values_KP = method.personalise(state).values_KP
    assert same_bytes(values_KP, trimmed(initial().layout, values_KP, who.ranks_K or ()))
    assert not same_bytes(values_KP, plain.personalise(state).values_KP)


def asked_after(
    method: Method, state: State, participants: Participants, names: tuple[str, ...]
) -> tuple[State, Trial, Callable[[State, Trial, Losses], tuple[State, Info]]]:
    """The state after a round, what clients are asked, and what is made of their answers."""
    results = trained(method.plan(state, participants), names)
    merged, _ = method.merge(state, participants, results)
    trial = method.trial(merged, participants, results) if method.trial else None
    assert trial is not None
    assert method.decide is not None
    return merged, trial, method.decide


@pytest.mark.parametrize("ranks_K", [None, (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize(("pull", "averaged"), [(0.0, False), (1.0, True)])
def test_the_average_is_taken_home_where_clients_do_better_with_it(
    pull: float, averaged: bool, ranks_K: tuple[int, ...] | None
) -> None:
    who, everybody = clients()._replace(ranks_K=ranks_K), (0, 1, 2, 3, 4, 5)
    config = mira_with("labels", ema_decay=0.5, choice={"shrinkage": False})
    method = build_method(config, who)
    always, never = (
        build_method(mira_with("labels", ema_decay=decay, choice={"shrinkage": False, "average": not decay}), who)
        for decay in (0.5, 0.0)
    )
    state = play(method, method.init(initial(), who), who.names, [everybody, everybody])
    last = Participants(3, everybody, last=True)
    merged, trial, decide = asked_after(method, state, last, who.names)
    # two shares with the average and two without; everybody holds what they are made of
    assert (trial.num_candidates, trial.sent) == (4, 0)
    # an optimum on the way from what the last round gives all of them to where they were before, or beyond it
    mixed_KP, home_KP = trial.candidate(3).double(), trial.candidate(1).double()
    optimum_KP = mixed_KP + (2 * pull - 0.5) * (home_KP - mixed_KP)
    losses = [(trial.candidate(q).double() - optimum_KP).square().mean(dim=1) for q in range(4)]
    decided, info = decide(merged, trial, Losses(torch.stack(losses, dim=1), (3,) * 6, 0, 0))
    assert info.numbers["takes_average"] == float(averaged)
    merged, own, decide = asked_after(always, state, last, who.names)
    answers = losses[:2] if averaged else losses[2:]
    expected, _ = decide(merged, own, Losses(torch.stack(answers, dim=1), (3,) * 6, 0, 0))
    other = always if averaged else never
    assert same_bytes(method.personalise(decided).values_KP, other.personalise(expected).values_KP)
    assert not same_bytes(always.personalise(expected).values_KP, never.personalise(expected).values_KP)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("average_SQ", "own_SQ", "better"),
    [
        # what counts is what each of the four asked takes: the first two their own, the others their mixture.
        # The mean of losses falls by 0.07, though that of the first is eleven times what it was
        ([[0.11, 9], [0.9, 9], [9, 0.9], [9, 0.9]], [[0.01, 2], [1, 2], [2, 1], [2, 1]], True),
        # it rises by 0.01, though three of four losses fall by a tenth
        ([[4.34, 9], [0.09, 9], [9, 0.9], [9, 0.9]], [[4.0, 5], [0.1, 5], [5, 1], [5, 1]], False),
        # of the average the first two would take their mixture, the others their own, and all are better off
        ([[9, 0.009], [9, 0.9], [0.9, 9], [0.9, 9]], [[0.01, 2], [1, 2], [2, 1], [2, 1]], True),
        ([[9, 0.02], [9, 1], [1, 9], [1, 9]], [[0.01, 2], [1, 2], [2, 1], [2, 1]], False),
        ([[NAN, 9], [0.9, 9], [9, 0.9], [9, 0.9]], [[0.01, 2], [1, 2], [2, 1], [2, 1]], False),
        ([[NAN, NAN], [0.9, 9], [9, 0.9], [9, 0.9]], [[0.01, 2], [1, 2], [2, 1], [2, 1]], False),
        ([[0.02, 9], [1.1, 9], [9, 1.1], [9, 9]], [[0.01, 2], [1, 2], [2, 1], [NAN, NAN]], True),
        ([[INF, 9], [INF, 9], [9, INF], [9, 0.5]], [[0.01, 2], [1, 2], [2, 1], [2, 1]], False),
        ([[5, 9], [9, 9], [9, 9], [9, 9]], [[0.01, 2], [1, 2], [2, 1], [9, INF]], False),
        ([[5, 9], [9, 9], [9, 9], [9, 9]], [[0.01, 2], [1, 2], [2, 1], [INF, NAN]], True),
    ],
)
def test_one_mean_of_losses_decides_for_all(
    average_SQ: list[list[float]], own_SQ: list[list[float]], better: bool
) -> None:
    who = clients()
    method = build_method(mira_with("labels", ema_decay=0.5, choice={"shrinkage": False}), who)
    state = play(method, method.init(initial(), who), who.names, [(0, 1, 3, 4), (0, 1, 3, 4)])
    last = Participants(3, (0, 1, 3, 4), last=True)
    merged, trial, decide = asked_after(method, state, last, who.names)
    # two never returned and hold no past; the average is one more adapter for those who will not be sent their mixture
    assert (trial.ids, trial.num_candidates, trial.sent) == ((0, 1, 3, 4), 4, 1)
    answers_SQ = torch.cat([torch.tensor(average_SQ), torch.tensor(own_SQ)], dim=1).double()
    decided, info = decide(merged, trial, Losses(answers_SQ, (3,) * 4, 0, 0))
    assert info.numbers["takes_average"] == better
    assert same_bytes(method.personalise(decided).values_KP, method.personalise(merged).values_KP) <= better
    # whatever was chosen, the next round's average is made of averages
    averaging = replace(decided, memory={**decided.memory, "takes_average": torch.ones(1)})
    again, other = (play(method, one, who.names, [(1,)], first=4) for one in (decided, averaging))
    assert same_bytes(method.personalise(again).values_KP, method.personalise(other).values_KP)
    assert again.memory["takes_average"] == 1


def test_what_they_train_on_from_is_not_decided_by_answers_about_the_average() -> None:
    who, everybody = clients(), (0, 1, 2, 3, 4, 5)
    section = {"shrinkage": False, "memory": 0.0, "tolerance": 0.1}
    method, plain = (build_method(mira_with("labels", ema_decay=decay, choice=section), who) for decay in (0.5, 0.0))
    state, other = (play(one, one.init(initial(), who), who.names, [everybody] * 2) for one in (method, plain))
    last = Participants(3, everybody, last=True)
    merged, trial, decide = asked_after(method, state, last, who.names)
    other, own, decide_plain = asked_after(plain, other, last, who.names)
    # of x everybody would lose a fifth by its mixture, of the average it gains half, and the average is better
    answers_SQ = torch.tensor([[0.9, 0.45, 1.0, 1.2]]).double().expand(6, -1)
    decided, info = decide(merged, trial, Losses(answers_SQ, (3,) * 6, 0, 0))
    expected, numbers = decide_plain(other, own, Losses(answers_SQ[:, 2:], (3,) * 6, 0, 0))
    assert info.numbers == {"mean_alpha": 1.0, "start_from_own": 1.0, "takes_average": 1.0}
    assert numbers.numbers == {"mean_alpha": 0.0, "start_from_own": 1.0}
    # all of the mixture in what is taken home
    torch.testing.assert_close(method.personalise(decided).values_KP, trial.candidate(1))
    following = Participants(4, everybody)
    assert same_bytes(method.plan(decided, following).start_SP, plain.plan(expected, following).start_SP)
    # and what later averages are made of is what was decided of x
    before = method.personalise(replace(merged, memory={**merged.memory, "average.alpha": torch.zeros(6)}))
    later, _ = one_round(method, decided, who.names, following)
    torch.testing.assert_close(later.memory["home"], before.values_KP)


def test_a_checkpoint_of_before_shares_were_kept_goes_on() -> None:
    who, everybody = clients(), (0, 1, 2, 3, 4, 5)
    method = build_method(mira_with("labels", ema_decay=0.3, choice={"enabled": True}), who)
    state = play(method, method.init(initial(), who), who.names, [everybody] * 2)
    newer = ("home_share", "average.alpha")
    older = replace(state, memory={name: value for name, value in state.memory.items() if name not in newer})
    assert len(older.memory) == len(state.memory) - 2
    assert same_bytes(method.personalise(older).values_KP, method.personalise(state).values_KP)
    one, other = (play(method, before, who.names, [(0, 3)], first=3) for before in (state, older))
    assert one.memory.keys() == other.memory.keys()
    assert same_bytes(method.personalise(one).values_KP, method.personalise(other).values_KP)


def test_where_nobody_has_a_past_nobody_is_asked_about_it() -> None:
    who, last = clients(), Participants(1, (0, 1, 2), last=True)
    method = build_method(mira_with("labels", ema_decay=0.5, choice={"enabled": True}), who)
    state = method.init(initial(), who)
    _, trial, _ = asked_after(method, state, last, who.names)
    assert (trial.num_candidates, trial.sent) == (2, 0)


def test_clients_without_validation_examples_take_the_average() -> None:
    who, everybody = clients(), (0, 1, 2, 3, 4, 5)
    method = build_method(mira_with("labels", ema_decay=0.5, choice={"enabled": True}), who)
    state = play(method, method.init(initial(), who), who.names, [everybody])
    last = Participants(2, everybody, last=True)
    merged, trial, decide = asked_after(method, state, last, who.names)
    nothing = Losses(torch.full((6, 4), torch.nan, dtype=torch.float64), (0,) * 6, 0, 0)
    decided, info = decide(merged, trial, nothing)
    assert info.numbers["takes_average"] == 1.0
    assert same_bytes(method.personalise(decided).values_KP, method.personalise(merged).values_KP)


def test_unaligned_pairs_of_two_rounds_are_not_averaged() -> None:
    with pytest.raises(ValueError, match="align: false"):
        RunConfig.model_validate({"method": {"name": "flexlora", "align": False, "ema_decay": 0.5}})


@pytest.mark.parametrize("name", ["flora", "florist", "fedex_lora"])
def test_a_method_that_moves_the_base_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="moves the base"):
        RunConfig.model_validate({"method": {"name": name, "ema_decay": 0.5}})
