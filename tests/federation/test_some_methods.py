"""What some methods do and others need not: each test says which, and why not the rest."""

from __future__ import annotations

import pytest
import torch
from tests.federation.builders import (
    CONFIGS,
    ROUNDS,
    adapters,
    build,
    clients,
    one_round,
    play,
    same_bytes,
    start,
    trained,
)

from fedmira.federation.method import State
from fedmira.types import Participants

of_mira = pytest.mark.parametrize("name", [name for name in CONFIGS if "mira" in name])


NOT_AS_IF_ALONE = {
    "mira-permuted": "a graph of one client cannot be shuffled",
    **dict.fromkeys(("mira-gram-shared_a", "mira-gram_layers-depth", "ffa_lora", "rolora"), "some tensors rest"),
    **dict.fromkeys(("fedadam", "fedadam-momentum"), "the server takes steps of its own"),
    **dict.fromkeys(
        ("flexlora", "flexlora-unaligned", "flora", "florist"), "what is kept is a product, not its factors"
    ),
    **dict.fromkeys(("ditto", "feddpa", "fedalt"), "two adapters share the steps, or add up"),
}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_AS_IF_ALONE])
def test_one_client_trains_as_if_alone(name: str) -> None:
    who = clients(1)
    method = build(name, who)
    first = adapters(name, 1)
    state = play(method, method.init(first, who), who.names, [(0,)] * 3)
    alone = first.values_KP
    for round_ in (1, 2, 3):
        job = build("local_only", who).plan(State(first.replace(alone), (0,)), Participants(round_, (0,)))
        alone = trained(job, who.names).values_SP
    assert same_bytes(state.adapters.values_KP, alone)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith(("local_only", "mira_published"))])
def test_adapters_of_clients_that_do_not_take_part_stay_as_they_are(name: str) -> None:
    method, state, who = start(name)
    before = play(method, state, who.names, ROUNDS[:3])
    after = play(method, before, who.names, [(1, 4)], first=4)
    assert same_bytes(after.adapters.values_KP[[0, 2, 3, 5]], before.adapters.values_KP[[0, 2, 3, 5]])
    assert not same_bytes(after.adapters.values_KP[[1, 4]], before.adapters.values_KP[[1, 4]])


def test_of_training_alone_nothing_crosses() -> None:
    method, state, _ = start("local_only")
    job = method.plan(state, Participants(1, (1, 5)))
    assert job.download == job.upload == frozenset()


@of_mira
def test_mira_mixes_with_the_graph_it_was_given_and_says_how_far_it_brought_clients_together(name: str) -> None:
    method, state, who = start(name)
    for round_, ids in enumerate(ROUNDS, start=1):
        state, info = one_round(method, state, who.names, Participants(round_, ids))
        assert info.graph is not None
        assert info.graph.name == name.split("-")[1]
        assert info.numbers["disagreement_after"] <= info.numbers["disagreement_before"] * (1 + 1e-6)
        assert 0 <= info.numbers["mixing_share"] < 1


@of_mira
def test_every_method_with_a_graph_is_active(name: str) -> None:
    method, state, who = start(name)
    state = play(method, state, who.names, ROUNDS[:3])
    everybody = Participants(4, tuple(range(6)))
    job = method.plan(state, everybody)
    results = trained(job, who.names)
    mixed, info = method.merge(state, everybody, results)
    assert info.numbers["edges"] > 0
    assert info.numbers["mixing_share"] > 0.001
    assert info.numbers["disagreement_after"] < 0.999 * info.numbers["disagreement_before"]
    assert not torch.allclose(mixed.adapters.values_KP, results.values_SP, atol=1e-4)
