"""Clients of smaller rank: every method gives them no more components than they have, and uses all of the others'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.federation.builders import (
    CONFIGS,
    clients,
    initial,
    judged,
    layout,
    layout_for,
    mira_with,
    one_round,
    same_bytes,
    trained,
)
from tests.federation.test_contract import build
from tests.reference import products_twin

from fedmira.config.exchange import ExchangeConfig
from fedmira.config.method import METHOD_SECTIONS, FedAdamConfig, method_with_defaults
from fedmira.config.refusals import refusal_beside
from fedmira.config.run import RunConfig
from fedmira.federation.method import State
from fedmira.federation.ranks import squares_between, trimmed
from fedmira.federation.registry import build_method
from fedmira.federation.similarity import row_distances
from fedmira.types import PAIRS, Arena, Clients, Job, Layout, Participants, Results

RANKS = (1, 2, 1, 2, 2, 1)
ROUNDS = [(0, 1, 3), (1, 2, 4), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)]


def mixed_clients() -> Clients:
    return clients()._replace(ranks_K=RANKS)


def beyond(layout: Layout, values_SP: torch.Tensor, ids: tuple[int, ...]) -> float:
    """The largest number in a component that its client does not have."""
    arena, largest = Arena(layout, values_SP), 0.0
    for spec in layout.specs:
        for row, id_ in enumerate(ids):
            first = spec.group in {group_a for group_a, _ in PAIRS}
            part = arena.view(spec)[row][RANKS[id_] :] if first else arena.view(spec)[row][:, RANKS[id_] :]
            largest = max([largest, *part.abs().flatten().tolist()])
    return largest


@pytest.mark.parametrize("name", list(CONFIGS))
def test_clients_start_from_and_keep_no_more_than_their_rank(name: str) -> None:
    who, of = mixed_clients(), layout_for(CONFIGS[name])
    method = build(name, who)
    state = method.init(initial(of=of), who)
    for round_, ids in enumerate(ROUNDS, start=1):
        job = method.plan(state, Participants(round_, ids))
        # one adapter that all of a pooled job train is nobody's own
        assert job.pooled or beyond(of, job.start_SP, job.ids) == 0
        if job.pull is not None:
            assert beyond(of, job.pull.target_SP, job.ids) == 0
        state, _ = one_round(method, state, who.names, Participants(round_, ids))
        kept = method.personalise(state)
        assert beyond(of, kept.values_KP, tuple(range(6))) == 0
        # those of full rank have not lost theirs
        assert float(kept.values_KP.abs().max()) > 0


@pytest.mark.parametrize("name", ["pcl", "ifca", "mira-labels-auto"])
def test_clients_judge_no_more_than_their_rank(name: str) -> None:
    who, of, asked = mixed_clients(), layout_for(CONFIGS[name]), 0
    method = build(name, who)
    state = method.init(initial(of=of), who)
    assert method.trial is not None
    assert method.decide is not None
    for round_, ids in enumerate(ROUNDS, start=1):
        participants = Participants(round_, ids)
        results = trained(method.plan(state, participants), who.names)
        state, _ = method.merge(state, participants, results)
        trial = method.trial(state, participants, results)
        if trial is not None:
            asked += 1
            assert all(beyond(of, trial.candidate(number), trial.ids) == 0 for number in range(trial.num_candidates))
            state, _ = method.decide(state, trial, judged(trial, who.names))
    assert asked > 2


@pytest.mark.parametrize("name", list(CONFIGS))
def test_ranks_that_are_all_that_of_the_arena_change_nothing(name: str) -> None:
    states: list[State] = []
    for who in (clients(), clients()._replace(ranks_K=(2,) * 6)):
        method = build(name, who)
        state = method.init(initial(of=layout_for(CONFIGS[name])), who)
        for round_, ids in enumerate(ROUNDS, start=1):
            state, _ = one_round(method, state, who.names, Participants(round_, ids))
        states.append(state)
    assert same_bytes(states[0].adapters.values_KP, states[1].adapters.values_KP)


def test_flexlora_gives_each_rank_the_largest_singular_values_of_the_mean() -> None:
    who = mixed_clients()
    method = build("flexlora", who)
    state = method.init(initial(dtype=torch.float64), who)
    state, _ = one_round(method, state, who.names, Participants(1, (0, 1, 3)))
    kept = method.personalise(state)
    # what the three sent is no longer at hand, but the rank 2 pair holds its best part, and rank 1 the best of that
    for layer, product in products_twin.dense(kept, 1).items():
        best = products_twin.nearest_of_rank(product, 1)
        for row in (0, 2, 5):
            torch.testing.assert_close(products_twin.dense(kept, row)[layer], best, rtol=0, atol=1e-12)
        for row in (3, 4):
            torch.testing.assert_close(products_twin.dense(kept, row)[layer], product, rtol=0, atol=1e-12)


def test_trimming_keeps_the_first_components_and_copies() -> None:
    arena = initial(2, torch.float64)
    arena.values_KP.fill_(1.0)
    rows = trimmed(arena.layout, arena.values_KP, (1, 2))
    assert float(arena.values_KP.min()) == 1
    assert same_bytes(rows[1], arena.values_KP[1])
    assert int(rows[0].sum()) == arena.layout.num_parameters // 2


def alive(of: Layout, row_P: torch.Tensor) -> list[int]:
    """How many components of each layer are not 0 in both factors."""
    arena, counts = Arena(of, row_P[None]), []
    specs = {(spec.layer, spec.group): spec for spec in of.specs}
    for layer in of.layers:
        a_RI, b_OR = (arena.view(specs[layer, group])[0] for group in ("lora_a", "lora_b"))
        counts.append(int((a_RI.any(dim=1) | b_OR.any(dim=0)).sum()))
    return counts


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "centralised"])
def test_components_that_only_smaller_clients_left_at_0_start_anew(name: str) -> None:
    who, of = mixed_clients(), layout_for(CONFIGS[name])
    method = build(name, who)
    state = method.init(initial(of=of), who)
    # the clients of rank 1 alone, so that a mean has nothing beyond
    for round_ in range(1, 4):
        state, _ = one_round(method, state, who.names, Participants(round_, (0, 2, 5)))
    job = method.plan(state, Participants(4, (0, 1, 3)))
    for row_P, id_ in zip(job.start_SP, job.ids, strict=True):
        assert alive(of, row_P) == [RANKS[id_]] * len(of.layers)


@pytest.mark.parametrize("name", ["fedit", "hetlora", "mira-labels", "fedsa_lora"])
def test_starting_components_anew_leaves_the_product_as_it_is(name: str) -> None:
    who = mixed_clients()
    method = build(name, who)
    state = method.init(initial(dtype=torch.float64), who)
    for round_ in range(1, 4):
        state, _ = one_round(method, state, who.names, Participants(round_, (0, 2, 5)))
    kept, job = method.personalise(state), method.plan(state, Participants(4, (0, 1, 3)))
    starts = Arena(kept.layout, job.start_SP)
    for row, id_ in enumerate(job.ids):
        before, after = products_twin.dense(kept, id_), products_twin.dense(starts, row)
        for layer in before:
            torch.testing.assert_close(after[layer], before[layer], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["fedadam", "fedadam-momentum"])
def test_to_fedadam_a_component_that_a_client_lacks_has_not_moved(name: str) -> None:
    who = mixed_clients()
    method = build(name, who)
    state = method.init(initial(dtype=torch.float64), who)
    start_P = state.adapters.values_KP[0].clone()
    for round_ in range(1, 4):
        participants = Participants(round_, (0, 1, 3))
        job = method.plan(state, participants)
        still = trained(job, who.names)._replace(values_SP=job.start_SP.clone())
        state, _ = method.merge(state, participants, still)
    torch.testing.assert_close(state.adapters.values_KP[0], start_P, rtol=0, atol=1e-12)


def test_fedadam_takes_the_mean_of_what_clients_of_each_rank_moved() -> None:
    who, config = mixed_clients(), FedAdamConfig(name="fedadam", rule="momentum", beta1=0.0, server_lr=1.0)
    method = build_method(config, who)
    state = method.init(initial(dtype=torch.float64), who)
    job = method.plan(state, Participants(1, (0, 1)))
    results = trained(job, who.names)
    after, _ = method.merge(state, Participants(1, (0, 1)), results)
    moved_SP = trimmed(layout(), results.values_SP, (1, 2)) - job.start_SP
    sizes = torch.tensor([who.num_examples_K[k] for k in (0, 1)], dtype=torch.float64)
    expected_P = state.adapters.values_KP[0] + (sizes / sizes.sum()) @ moved_SP
    torch.testing.assert_close(after.adapters.values_KP[0], expected_P, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["fedprox", "pfedgraph-pull", "ditto"])
def test_who_is_pulled_to_its_start_is_so_where_components_start_anew(name: str) -> None:
    who, of = mixed_clients(), layout_for(CONFIGS[name])
    method = build(name, who)
    state = method.init(initial(of=of), who)
    # a mean of clients of rank 1 alone has nothing beyond
    for round_ in range(1, 4):
        state, _ = one_round(method, state, who.names, Participants(round_, (0, 2, 5)))
    job = method.plan(state, Participants(4, (1, 3)))
    assert job.pull is not None
    assert same_bytes(job.pull.target_SP[-2:], job.start_SP[:2])
    assert same_bytes(job.pull.target_SP[:2], job.start_SP[:2])


def test_a_method_that_unequal_ranks_mislead_refuses_them_before_the_run() -> None:
    asked = {
        name: refusal_beside(method_with_defaults(name), ExchangeConfig(), True, False) for name in METHOD_SECTIONS
    }
    assert {name for name, reason in asked.items() if reason} == {"fedex_lora", "fedkseed", "fedlease", "fedtreelora"}
    assert "remove model.adapter.client_ranks, or take flora" in asked["fedex_lora"]
    for name in ("fedlease", "fedtreelora"):
        assert f"{name} finds clusters from the factors B, which are more alike among clients of one" in asked[name]
        assert "remove model.adapter.client_ranks, or take mira, pfedgraph or ifca" in asked[name]
    for name, reason in asked.items():
        assert not reason or not refusal_beside(method_with_defaults(name), ExchangeConfig(), False, False)
    with pytest.raises(ValidationError, match="fedex_lora adds to the base"):
        RunConfig.model_validate({"method": {"name": "fedex_lora"}, "model": {"adapter": {"client_ranks": [2, 8]}}})


def test_one_adapter_for_all_examples_has_the_largest_rank_whoever_comes_first() -> None:
    who = mixed_clients()
    method = build("centralised", who)
    state = method.init(initial(), who)
    for round_ in range(1, 3):
        state, _ = one_round(method, state, who.names, Participants(round_, (0, 1, 2)))
    job = method.plan(state, Participants(3, (0, 1, 2)))
    assert all(alive(layout_for(CONFIGS["centralised"]), row_P) == [2, 2] for row_P in job.start_SP)
    assert same_bytes(job.start_SP[0], job.start_SP[1])
    assert beyond(state.adapters.layout, method.personalise(state).values_KP, tuple(range(6))) == 0


def strangers(who: Clients, round_: int = 1) -> Results:
    """Uploads of everybody that moved from the common start in ways of their own, trimmed."""
    start = initial(6, torch.float64)
    draw = torch.Generator().manual_seed(3)
    moved = 0.1 * torch.randn(start.values_KP.shape, generator=draw, dtype=torch.float64)
    values = start.values_KP + moved
    if who.ranks_K is not None:
        values = trimmed(start.layout, values, who.ranks_K)
    job = Job(round_, tuple(range(6)), start.values_KP, frozenset(), frozenset(), frozenset())
    return trained(job, who.names)._replace(values_SP=values)


def test_pfedgraph_does_not_take_a_missing_component_for_a_common_way() -> None:
    found = []
    for ranks in (None, (1, 1, 1, 2, 2, 2)):
        who = clients()._replace(ranks_K=ranks)
        method = build("pfedgraph", who)
        state = method.init(initial(dtype=torch.float64), who)
        _, info = method.merge(state, Participants(1, tuple(range(6))), strangers(who))
        assert info.graph is not None
        found.append(info.graph.adjacency_KK[:3, :3].mean())
    assert found[1] < 1.5 * found[0]


def test_krum_does_not_take_a_larger_rank_for_hostile() -> None:
    # every number of an adapter moves as far as any other: who has 16 components goes four times as far as who has one
    of, ranks = layout(rank=16), (1, 1, 16) * 3
    moved = torch.randn(9, of.num_parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = initial(9, torch.float64, of).values_KP
    told = {}
    for hears in (ranks, None):
        who = clients(9)._replace(num_examples_K=(20,) * 9, ranks_K=hears)
        method = build_method(mira_with("uniform", robust="krum", mixing="factors"), who)
        uploads_SP = trimmed(of, start + moved, ranks)
        results = Results(tuple(range(9)), uploads_SP, (), 0, 0, 0.0)
        _, info = method.merge(method.init(initial(9, torch.float64, of), who), Participants(1, results.ids), results)
        told[hears] = info.numbers["unheard"]
    # somebody who has 16 components without being known for it is another matter
    assert told == {ranks: 0, None: 3}


def test_krum_does_not_take_a_smaller_rank_for_hostile() -> None:
    shares = []
    for ranks in (None, (2, 2, 2, 2, 2, 1)):
        who = clients()._replace(ranks_K=ranks)
        method = build_method(mira_with("uniform", robust="krum"), who)
        state = method.init(initial(dtype=torch.float64), who)
        results = strangers(who)
        after, _ = method.merge(state, Participants(1, tuple(range(6))), results)
        weights = np.linalg.lstsq(results.values_SP.numpy().T, after.adapters.values_KP[0].numpy(), rcond=None)[0]
        shares.append(float(weights[5]))
    assert shares[0] > 0.05
    assert shares[1] > 0.05


# ------------------------------------------------------------------------------------- compared by what both have


CROSSED = (2, 8) * 4
TASK_K = np.arange(8) // 4


def two_tasks_crossed_with_two_ranks() -> Arena:
    """Where 8 clients end: B and A move by what the task asks and, half as much, by chance."""
    of, generator = layout(rank=8), torch.Generator().manual_seed(3)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(rows, of.num_parameters, generator=generator, dtype=torch.float64)

    start = initial(8, torch.float64, of)
    ends_KP = start.values_KP + draw(2)[TASK_K] + 0.5 * draw(8)
    return start.replace(trimmed(of, ends_KP, CROSSED))


def test_pairs_are_compared_by_the_components_that_both_have() -> None:
    ends = two_tasks_crossed_with_two_ranks()
    rows = [7, 0, 3, 2, 5]
    found = squares_between(ends, rows, CROSSED)
    for one, k in enumerate(rows):
        for other, m in enumerate(rows):
            common = min(CROSSED[k], CROSSED[m])
            pair_2P = trimmed(ends.layout, ends.values_KP[[k, m]], (common, common))
            expected = float((pair_2P[0] - pair_2P[1]).square().sum()) * 8 / common
            assert found[one, other] == pytest.approx(expected, rel=1e-12)
    assert np.array_equal(squares_between(ends, rows, None), squares_between(ends, rows, (8,) * 8))


@pytest.mark.parametrize("name", ["fedamp", "pfedgraph"])
def test_clients_of_one_task_are_related_whatever_their_ranks(name: str) -> None:
    ends = two_tasks_crossed_with_two_ranks()
    same_task = (TASK_K[:, None] == TASK_K) & ~np.eye(8, dtype=bool)
    same_rank = np.equal.outer(CROSSED, CROSSED) & ~np.eye(8, dtype=bool)
    # as if all had everything, clients of like rank are nearest to one another
    raw_KK = row_distances(ends.values_KP)
    assert raw_KK[same_task & ~same_rank].min() > raw_KK[same_rank & ~same_task & (np.array(CROSSED) == 2)].max()
    who = clients(8)._replace(ranks_K=CROSSED, num_examples_K=(5,) * 8)
    method = build(name, who)
    everybody = Participants(1, tuple(range(8)))
    state = method.init(initial(8, torch.float64, ends.layout), who)
    results = trained(method.plan(state, everybody), who.names)._replace(values_SP=ends.values_KP)
    _, info = method.merge(state, everybody, results)
    assert info.graph is not None
    weights_KK = info.graph.adjacency_KK
    assert weights_KK[same_task & ~same_rank].min() > weights_KK[~same_task].max()
