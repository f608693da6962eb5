"""What a graph is like in numbers: by hand on small graphs, and beside a method's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation.builders import clients, initial, mira, one_round, published

from fedmira.errors import ConfigError
from fedmira.federation import known_graphs as known
from fedmira.federation.diagnostics import graph_numbers
from fedmira.federation.graph import Graph, validated
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
