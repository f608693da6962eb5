"""What a graph is like in numbers: by hand on small graphs, and beside a method's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tests.federation.builders import CONFIGS, build, clients, initial, mira, one_round, published, start

from fedmira.errors import ConfigError
from fedmira.federation import known_graphs as known
from fedmira.federation.diagnostics import graph_numbers
from fedmira.federation.graph import Graph, validated
from fedmira.federation.learning import nothing_compared
from fedmira.federation.method import Info, Method, State
from fedmira.federation.registry import build_method
from fedmira.types import Clients, Participants


def of(tasks: str, true: np.ndarray | None = None) -> Clients:
    return Clients(tuple(f"c{k}" for k in range(len(tasks))), (1,) * len(tasks), tuple(tasks), 0, true)


def test_numbers_by_hand() -> None:
    # a triangle of weight 2 and one client alone: the triangle's eigenvalues are 0, 6, 6
    triangle = np.zeros((4, 4))
    triangle[:3, :3] = 2 * (1 - np.eye(3))
    true = np.zeros((4, 4))
    true[0, 1] = true[1, 0] = 0.1
    graph = validated(triangle, 4, "gram", {"agreement": 0.25})
    numbers = graph_numbers(graph, of("aaba", true), tau=0.5)
    assert numbers == pytest.approx(
        {
            "components": 2,
            "alone": 1,
            "lambda_2": 6,
            "lambda_max": 6,
            "stability_margin": 2 / (0.5 * 6),
            "weight_in_tasks": 1 / 3,
            "weight_on_true_edges": 1 / 3,
            "agreement": 0.25,
        }
    )
    assert all(isinstance(number, float) for number in numbers.values())


def test_lambda_2_is_that_of_the_slowest_component() -> None:
    weights = np.zeros((4, 4))
    weights[0, 1] = weights[1, 0] = 3.0
    weights[2, 3] = weights[3, 2] = 0.5
    numbers = graph_numbers(validated(weights, 4, "given"), of("abab"))
    assert numbers["lambda_2"] == pytest.approx(1.0)
    assert numbers["lambda_max"] == pytest.approx(6.0)
    assert "stability_margin" not in numbers


@pytest.mark.parametrize("num_clients", [1, 3])
def test_a_graph_without_edges_has_no_spectrum_and_no_purity(num_clients: int) -> None:
    graph = Graph(np.zeros((num_clients, num_clients)), "gram")
    numbers = graph_numbers(graph, of("aab"[:num_clients], np.zeros((num_clients, num_clients))), tau=1.0)
    assert numbers == {"components": num_clients, "alone": num_clients}


def test_purity_needs_labels_that_join_and_divide() -> None:
    for tasks in ("aaaa", "abcd"):
        assert "weight_in_tasks" not in graph_numbers(known.uniform(4), of(tasks))
    assert graph_numbers(known.uniform(4), of("aabb"))["weight_in_tasks"] == pytest.approx(1 / 3)


def test_the_margin_is_where_the_explicit_step_is_refused() -> None:
    who = clients()
    for server_lr, stable in ((0.33, True), (0.34, False)):
        config = published("uniform", strength=1.0, server_lr=server_lr)
        margin = graph_numbers(known.uniform(6), who, tau=config.strength * server_lr)["stability_margin"]
        assert (margin >= 1) == stable
        if stable:
            method = build_method(config, who)
            _, info = one_round(method, method.init(initial(), who), who.names, Participants(1, tuple(range(6))))
            assert info.numbers["stability_margin"] == pytest.approx(margin)
        else:
            with pytest.raises(ConfigError, match="diverge"):
                build_method(config, who)


def test_methods_with_a_graph_tell_about_it_round_by_round() -> None:
    who, method = clients(), build_method(mira("gram"), clients())
    state, everybody = method.init(initial(), who), tuple(range(6))
    state, first = one_round(method, state, who.names, Participants(1, everybody))
    assert first.graph is not None
    assert first.numbers["weight_in_tasks"] == pytest.approx(first.numbers["weight_on_true_edges"])
    assert "agreement" not in first.numbers
    before = first.graph.adjacency_KK
    state, second = one_round(method, state, who.names, Participants(2, everybody))
    assert second.graph is not None
    now = second.graph.adjacency_KK
    cosine = (before * now).sum() / np.linalg.norm(before) / np.linalg.norm(now)
    assert second.numbers["agreement"] == pytest.approx(cosine)


# ---------------------------------------------------------------------------------------------- agreement over rounds

RELATING_ANEW = [name for name, config in CONFIGS.items() if config.shows_new_graphs]


def shown(method: Method, state: State, rounds: Sequence[Sequence[int]], first: int = 1) -> tuple[State, list[Info]]:
    """What is shown round by round."""
    infos = []
    for round_, ids in enumerate(rounds, start=first):
        state, info = one_round(method, state, clients().names, Participants(round_, tuple(ids)))
        infos.append(info)
    return state, infos


def weights(info: Info, ids: Sequence[int]) -> np.ndarray:
    assert info.graph is not None
    return info.graph.adjacency_KK[np.ix_(ids, ids)]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def test_methods_that_show_a_graph_of_their_own_are_known_as_such() -> None:
    """The others have none, or keep the clusters that they found once, or have one of `method.graph`, which `learning`
    compares with itself where it is learned."""
    for name, config in CONFIGS.items():
        method, state, _ = start(name)
        _, infos = shown(method, state, [range(6)] * 3)
        of_its_own = getattr(config, "graph", None) is None and any(info.graph is not None for info in infos)
        assert config.shows_new_graphs == (of_its_own and not config.clusters_by_factors), name


@pytest.mark.parametrize("name", RELATING_ANEW)
def test_a_graph_that_is_new_every_round_tells_how_much_of_the_last_one_is_left(name: str) -> None:
    method, state, _ = start(name)
    _, infos = shown(method, state, [range(6)] * 5)
    for before, now in zip(infos, infos[1:], strict=False):
        if before.graph is None or not (before.graph.num_edges and weights(now, range(6)).any()):
            assert "agreement" not in now.numbers
            continue
        assert now.numbers["agreement"] == pytest.approx(cosine(weights(before, range(6)), weights(now, range(6))))
    assert "agreement" not in infos[0].numbers
    assert "agreement" in infos[-1].numbers


def test_who_was_away_tells_nothing_about_the_graph() -> None:
    method, state, _ = start("pfedgraph")
    _, (whole, part, later) = shown(method, state, [range(6), (0, 1, 3), (1, 2, 3, 4)])
    assert part.numbers["agreement"] == pytest.approx(cosine(weights(whole, (0, 1, 3)), weights(part, (0, 1, 3))))
    # of each pair the last round in which both returned counts, and what few pairs said before fades
    before = weights(whole, range(6)).copy()
    before[np.ix_((0, 1, 3), (0, 1, 3))] = weights(part, (0, 1, 3))
    ids = np.ix_((1, 2, 3, 4), (1, 2, 3, 4))
    found = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for row, (old, new) in enumerate(
        [(weights(whole, (0, 1, 3)), weights(part, (0, 1, 3))), (before[ids], weights(later, (1, 2, 3, 4)))]
    ):
        found[row] = (old * new).sum(), (old * old).sum(), (new * new).sum()
    product, old_squares, new_squares = (1 - 12 / 30) * found[0] + found[1]
    assert later.numbers["agreement"] == pytest.approx(product / (old_squares * new_squares) ** 0.5)


@pytest.mark.parametrize("name", RELATING_ANEW)
def test_what_is_told_after_a_checkpoint_is_what_would_have_been(name: str) -> None:
    method, state, _ = start(name)
    rounds = [range(6), (0, 1, 3, 5), range(6), (0, 1, 2, 4)]
    half, _ = shown(method, state, rounds[:2])
    _, expected = shown(method, half, rounds[2:], first=3)
    memory = {key: tensor.clone() for key, tensor in half.memory.items()}
    restored = State(half.adapters.replace(half.adapters.values_KP.clone()), half.last_round_K, memory)
    after, infos = shown(build(name), restored, rounds[2:], first=3)
    assert [info.numbers for info in infos] == [info.numbers for info in expected]
    # of a checkpoint that was written before this was remembered it is not told, but for the next round
    older = replace(half, memory={key: tensor for key, tensor in memory.items() if key not in nothing_compared(6)})
    again, (first, second) = shown(build(name), older, rounds[2:], first=3)
    assert "agreement" not in first.numbers
    assert ("agreement" in second.numbers) == ("agreement" in expected[1].numbers)
    assert again.memory.keys() == after.memory.keys()
