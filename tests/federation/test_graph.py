"""Graphs: what is refused, what is computed, and the kinds that are known beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.federation.builders import clients
from tests.reference import mixing_twin

from fedmira.config.graph import GraphConfig
from fedmira.errors import ConfigError, DataError
from fedmira.federation import graph as graphs
from fedmira.federation import known_graphs as known


def adjacencies(largest: int = 7) -> st.SearchStrategy[np.ndarray]:
    """Symmetric weights with some exact zeros."""

    def symmetric(matrix: np.ndarray) -> np.ndarray:
        matrix = np.where(matrix < 0.3, 0.0, matrix)
        return np.triu(matrix, 1) + np.triu(matrix, 1).T

    sizes = st.integers(1, largest)
    return sizes.flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 4))).map(symmetric)


@pytest.mark.parametrize(
    ("adjacency", "message"),
    [
        (np.zeros((3, 3)), r"shape is \(3, 3\); expected 2 x 2"),
        (np.zeros((2, 3)), r"shape is \(2, 3\); expected 2 x 2"),
        ([[0, 1], [1]], "not a matrix of numbers"),
        ([["a", "b"], ["b", "a"]], "not a matrix of numbers"),
        ([[0, np.nan], [np.nan, 0]], r"2 of 4 weights are wrong; the first, \(0, 1\), is nan: not finite"),
        ([[0, np.inf], [np.inf, 0]], "inf: not finite"),
        ([[0, -0.5], [-0.5, 0]], r"\(0, 1\), is -0.5: negative"),
        ([[0, 1], [0.5, 0]], r"not symmetric: weight \(0, 1\) is 1 but \(1, 0\) is 0.5"),
    ],
)
def test_bad_graphs_are_refused_with_numbers(adjacency: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        graphs.validated(adjacency, 2, "given")  # type: ignore[arg-type]
    assert caught.value.exit_code == 3


def test_validated_drops_and_counts_self_edges_and_cannot_be_written_to() -> None:
    graph = graphs.validated([[1, 2], [2, 0]], 2, "given", {"path": "x"})
    assert graph.adjacency_KK.tolist() == [[0, 2], [2, 0]]
    assert graph.provenance == {"path": "x", "self_edges_dropped": 1}
    assert graph.num_edges == 1
    with pytest.raises(ValueError, match="read-only"):
        graph.adjacency_KK[0, 1] = 5.0


def test_matrix_with_names_follows_the_clients() -> None:
    matrix = [[0, 1, 2], [1, 0, 3], [2, 3, 0]]
    ordered = graphs.from_matrix(matrix, ["c", "a", "b"], ["a", "b", "c"])
    assert ordered.tolist() == [[0, 3, 1], [3, 0, 2], [1, 2, 0]]
    assert graphs.from_matrix(matrix, None, ["a", "b", "c"]).tolist() == matrix


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["alpha", "bta"], r"unknown \['bta'\]; did you mean 'beta'\?, missing \['beta'\]"),
        (["alpha"], r"missing \['beta'\]"),
        (["alpha", "alpha", "beta"], r"\['alpha'\] appear more than once"),
    ],
)
def test_matrix_with_wrong_names_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        graphs.from_matrix(np.zeros((len(names), len(names))), names, ["alpha", "beta"])


def test_laplacian_degrees_and_components_by_hand() -> None:
    graph = graphs.validated([[0, 1, 0, 0], [1, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 0]], 4, "given")
    assert graphs.degrees(graph).tolist() == [1, 3, 2, 0]
    assert graphs.laplacian(graph).tolist() == [[1, -1, 0, 0], [-1, 3, -2, 0], [0, -2, 2, 0], [0, 0, 0, 0]]
    assert graphs.connected_components(graph) == ((0, 1, 2), (3,))
    assert graphs.subgraph(graph, (2, 3, 1)).adjacency_KK.tolist() == [[0, 0, 2], [0, 0, 0], [2, 0, 0]]
    assert graphs.largest_eigenvalue(known.uniform(5)) == pytest.approx(5)
    assert graphs.largest_eigenvalue(graphs.validated(np.zeros((3, 3)), 3, "given")) == 0


@given(adjacencies())
def test_laplacian_properties(adjacency: np.ndarray) -> None:
    graph = graphs.validated(adjacency, len(adjacency), "given")
    eigenvalues = np.linalg.eigvalsh(graphs.laplacian(graph))
    assert np.allclose(graphs.laplacian(graph).sum(axis=1), 0, rtol=0, atol=1e-12)
    assert eigenvalues[0] >= -1e-9
    assert graphs.largest_eigenvalue(graph) <= 2 * graphs.degrees(graph).max() + 1e-9
    components = graphs.connected_components(graph)
    assert sorted(k for members in components for k in members) == list(range(len(adjacency)))
    # as many zero eigenvalues as components
    assert int((eigenvalues < 1e-6).sum()) == len(components)
    half = tuple(range(0, len(adjacency), 2))
    assert graphs.largest_eigenvalue(graphs.subgraph(graph, half)) <= graphs.largest_eigenvalue(graph) + 1e-9


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize(("num_clients", "kind"), [(5, "random"), (80, "few edges"), (5, "even"), (80, "even")])
def test_disagreement_equals_its_twin_also_far_from_the_origin(num_clients: int, kind: str, offset: float) -> None:
    generator = np.random.Generator(np.random.Philox(0))
    values_KP = generator.normal(size=(num_clients, 40)) + offset
    adjacency = known.random(num_clients, 0)
    if kind != "random":
        weights_KK = np.full((num_clients, num_clients), 0.3)
        distance_KK = np.abs(np.subtract.outer(np.arange(num_clients), np.arange(num_clients)))
        weights_KK[distance_KK > 2 if kind == "few edges" else distance_KK == 0] = 0
        adjacency = graphs.validated(weights_KK, num_clients, "given")
    expected = mixing_twin.disagreement(values_KP, adjacency.adjacency_KK)
    assert graphs.disagreement(adjacency, torch.from_numpy(values_KP)) == pytest.approx(expected, rel=1e-9)


def test_weight_inside() -> None:
    graph = graphs.validated([[0, 3, 1], [3, 0, 0], [1, 0, 0]], 3, "given")
    assert graphs.weight_inside(graph, ["a", "a", "b"]) == 0.75
    assert graphs.weight_inside(graph, ["a", "a", "a"]) == 1
    assert graphs.weight_inside(graph, ["", "", "a"]) == 0, "no label is none in common"
    assert graphs.weight_inside(graphs.validated(np.zeros((3, 3)), 3, "given"), ["a", "a", "b"]) == 0


def test_random_graph_has_the_statistics_of_the_published_code() -> None:
    adjacency = known.random(80, seed=0).adjacency_KK
    above = adjacency[np.triu_indices(80, 1)]
    assert np.array_equal(adjacency, adjacency.T)
    assert not np.any(np.diagonal(adjacency))
    assert not np.any((above > 0) & (above < 0.25))
    # a is triangular on 0 .. 1: P(a < 1/4) = 1/8, E[a; a >= 1/4] = 1/2 - 1/48
    assert np.mean(above == 0) == pytest.approx(1 / 8, abs=0.02)
    assert above.mean() == pytest.approx(1 / 2 - 1 / 48, abs=0.01)
    assert graphs.largest_eigenvalue(known.random(80, seed=0)) == pytest.approx(44, abs=2)
    eights = [known.random(8, seed) for seed in range(200)]
    assert np.mean([graphs.degrees(graph).mean() for graph in eights]) == pytest.approx(3.35, abs=0.08)
    assert np.mean([graphs.largest_eigenvalue(graph) for graph in eights]) == pytest.approx(5.1, abs=0.1)


def test_random_graph_follows_the_seed_alone() -> None:
    assert np.array_equal(known.random(6, 1).adjacency_KK, known.random(6, 1).adjacency_KK)
    assert not np.array_equal(known.random(6, 1).adjacency_KK, known.random(6, 2).adjacency_KK)


def test_labels_join_clients_of_one_task_and_leave_the_unlabelled_alone() -> None:
    assert known.labels(["a", "b", "a", ""]).adjacency_KK.tolist() == [[0, 0, 1, 0], [0] * 4, [1, 0, 0, 0], [0] * 4]
    assert known.labels(["", "", "a"]).num_edges == 0
    with pytest.raises(DataError, match="none of the 2 clients has a task label"):
        known.labels(["", ""])


@pytest.mark.parametrize("families", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_permuted_keeps_the_spectrum_and_changes_who_is_related(families: int, seed: int) -> None:
    tasks = [str(k // 4) for k in range(4 * families)]
    original = known.labels(tasks)
    shuffled = known.permuted(original, seed)
    assert np.allclose(
        np.linalg.eigvalsh(graphs.laplacian(shuffled)),
        np.linalg.eigvalsh(graphs.laplacian(original)),
        rtol=0,
        atol=1e-9,
    )
    assert all(place != k for k, place in enumerate(shuffled.provenance["order"]))
    assert not np.array_equal(shuffled.adjacency_KK, original.adjacency_KK)
    assert graphs.weight_inside(shuffled, tasks) == pytest.approx(shuffled.provenance["weight_kept"])
    assert shuffled.provenance["weight_kept"] < 0.7


def test_what_permuted_keeps_is_counted_in_weight() -> None:
    weights = np.random.default_rng(0).random((6, 6)) * (np.random.default_rng(1).random((6, 6)) < 0.4)
    original = graphs.validated(np.triu(weights, 1) + np.triu(weights, 1).T, 6, "true")
    shuffled = known.permuted(original, 0)
    kept = shuffled.adjacency_KK[original.adjacency_KK > 0].sum() / original.adjacency_KK.sum()
    assert 0 < kept < 1
    assert shuffled.provenance["weight_kept"] == pytest.approx(kept)


@pytest.mark.parametrize("graph", [known.uniform(4), known.uniform(2), known.labels(["a", "b"])])
def test_a_graph_that_no_shuffle_changes_is_refused(graph: graphs.Graph) -> None:
    with pytest.raises(DataError, match="looks the same however its clients are shuffled"):
        known.permuted(graph, 0)


@pytest.mark.parametrize("kind", ["labels", "uniform", "random", "true", "permuted", "given"])
def test_resolve_names_the_kind_and_its_provenance_is_json(kind: str) -> None:
    config = GraphConfig.model_validate({"kind": kind, "path": "g.npy" if kind == "given" else None})
    matrix = np.ones((6, 6)) if kind == "given" else None
    graph = known.resolve_graph(config, clients(), matrix)
    assert graph is not None
    assert graph.name == kind
    assert graph.num_edges > 0
    assert json.loads(json.dumps(dict(graph.provenance))) == dict(graph.provenance)


def test_resolve_what_is_missing() -> None:
    assert known.resolve_graph(GraphConfig(), clients(), None) is None
    with pytest.raises(ConfigError, match="it was not loaded"):
        known.resolve_graph(GraphConfig(kind="given", path="x.npy"), clients(), None)
    with pytest.raises(ConfigError, match="data whose graph is known"):
        known.resolve_graph(GraphConfig(kind="true"), clients()._replace(true_adjacency_KK=None), None)
    with pytest.raises(DataError, match="expected 6 x 6"):
        known.resolve_graph(GraphConfig(kind="given", path="x.npy"), clients(), np.zeros((5, 5)))
