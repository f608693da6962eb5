"""Clients of smaller rank: every method gives them no more components than they have, and uses all of the others'."""

from __future__ import annotations

import pytest
import torch
from tests.federation.builders import CONFIGS, clients, initial, layout_for, one_round, same_bytes
from tests.federation.test_contract import build
from tests.reference import products_twin

from fedmira.federation.method import State
from fedmira.federation.ranks import trimmed
from fedmira.types import PAIRS, Arena, Clients, Layout, Participants

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
        assert beyond(of, job.start_SP, job.ids) == 0
        if job.pull is not None:
            assert beyond(of, job.pull.target_SP, job.ids) == 0
        state, _ = one_round(method, state, who.names, Participants(round_, ids))
        kept = method.personalise(state)
        assert beyond(of, kept.values_KP, tuple(range(6))) == 0
        # those of full rank have not lost theirs
        assert float(kept.values_KP.abs().max()) > 0


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
