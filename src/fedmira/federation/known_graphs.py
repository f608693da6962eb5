"""Graphs that are known before the first round: given, embeddings, labels, uniform, random, true, permuted.

Knows nothing about adapters; graphs learned from them are in `learned_graphs`. Axes: K clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmira.config.graph import GraphConfig
from fedmira.errors import ConfigError, DataError
from fedmira.federation.graph import Graph, Matrix, explained, validated
from fedmira.federation.similarity import cosines, mutual_neighbours
from fedmira.formats import listed
from fedmira.randomness import generator
from fedmira.types import Clients

_PUBLISHED_THRESHOLD = 0.25
_DRAWS = 1000
_SHOWN = 3
"""Names of clients that a message lists."""


def resolve_graph(config: GraphConfig, clients: Clients, given: Matrix | None) -> Graph | None:
    """Return the graph of `config` with its privacy note, or None for a kind that is learned over rounds.

    Args:
        config: the `method.graph` section.
        clients: names, labels, seed and, for planted data, the true adjacency.
        given: with `kind: given`, the (K, K) matrix of the file in client order; with `embeddings`, the (K, K) inner
            products of the clients' prompt embeddings.

    Raises:
        ConfigError: the kind needs something that was not handed over.
        DataError: the matrix is unusable, or no client has a label.
    """
    graph = _known(config, clients, given)
    return None if graph is None else explained(graph)


def _known(config: GraphConfig, clients: Clients, given: Matrix | None) -> Graph | None:
    num_clients = len(clients.names)
    match config.kind:
        case "given":
            if given is None:
                raise ConfigError("method.graph.kind = given needs the matrix in method.graph.path; it was not loaded")
            return validated(given, num_clients, "given", {"path": config.path})
        case "embeddings":
            if given is None:
                raise ConfigError("method.graph.kind = embeddings needs the clients' embeddings; none were computed")
            return embeddings(given, clients.names, config.neighbours, config.power)
        case "labels":
            return labels(clients.tasks)
        case "uniform":
            return uniform(num_clients)
        case "random":
            return random(num_clients, clients.seed)
        case "true":
            return true(clients)
        case "permuted":
            return permuted(true(clients), clients.seed)
        case _:
            return None


def embeddings(gram_KK: Matrix, names: Sequence[str], neighbours: int, power: float) -> Graph:
    """Return the graph of mutual nearest neighbours by the centred cosines of the clients' prompt embeddings.

    Args:
        gram_KK: inner products of the embeddings; what all prompts share, such as the template, is centred away.
        names: of the K clients.
        neighbours: mutual nearest neighbours kept per client.
        power: exponent on the relative similarity.

    Raises:
        DataError: the matrix has another shape, or holds a number that is not finite.
    """
    if gram_KK.shape != (len(names), len(names)):
        raise DataError(f"graph 'embeddings': inner products of shape {gram_KK.shape} for {len(names)} clients")
    if not np.isfinite(gram_KK).all():
        # who is finite has products with the others that are not
        wrong = [name for name, square in zip(names, np.diagonal(gram_KK), strict=True) if not np.isfinite(square)]
        raise DataError(
            f"graph 'embeddings': the prompts' hidden states are not finite at {listed(wrong or names, _SHOWN)}; set "
            "model.dtype: float32, whose range is large enough, or another method.graph.kind, such as gram"
        )
    weights_KK = mutual_neighbours(cosines(gram_KK), neighbours, power)
    return validated(weights_KK, len(names), "embeddings", {"neighbours": neighbours, "power": power})


def labels(tasks: Sequence[str]) -> Graph:
    """Return the oracle graph: weight 1 between clients with the same task label; the unlabelled stay alone.

    Raises:
        DataError: no client has a label.
    """
    if not any(tasks):
        raise DataError(
            f"graph 'labels': none of the {len(tasks)} clients has a task label; use kind: gram, or data with tasks"
        )
    tasks_K = np.asarray(tasks)
    adjacency_KK = (tasks_K[:, None] == tasks_K[None, :]) & (tasks_K != "")[:, None]
    np.fill_diagonal(adjacency_KK, False)
    return validated(adjacency_KK, len(tasks), "labels", {"labels": len({task for task in tasks if task})})


def uniform(num_clients: int) -> Graph:
    """Return the complete graph with weight 1 on every edge."""
    return validated(np.ones((num_clients, num_clients)) - np.eye(num_clients), num_clients, "uniform")


def random(num_clients: int, seed: int) -> Graph:
    """Return the graph of MIRA's published code: a = (b + b^T) / 2 with b ~ U(0, 1), a < 0.25 set to 0.

    It relates clients by chance, not by task; the paper: "we set the adjacency matrix M's values randomly".
    """
    draws_KK = generator(seed, "graph").random((num_clients, num_clients))
    adjacency_KK = (draws_KK + draws_KK.T) / 2
    adjacency_KK[adjacency_KK < _PUBLISHED_THRESHOLD] = 0.0
    np.fill_diagonal(adjacency_KK, 0.0)
    return validated(adjacency_KK, num_clients, "random", {"seed": seed, "threshold": _PUBLISHED_THRESHOLD})


def true(clients: Clients) -> Graph:
    """Return the graph that the data was made from.

    Raises:
        ConfigError: the data has no known graph.
    """
    if clients.true_adjacency_KK is None:
        raise ConfigError(
            "method.graph.kind = true and permuted need data whose graph is known; use data.source: planted, or "
            "another kind: gram, labels, given, uniform, random"
        )
    return validated(clients.true_adjacency_KK, len(clients.names), "true")


def permuted(graph: Graph, seed: int) -> Graph:
    """Return `graph` with its clients shuffled so that none keeps its place and the edges really differ: a control.

    Weights, degrees and spectrum stay; only who is related to whom is wrong. `weight_kept` of the provenance is the
    share of edge weight that still joins clients joined in `graph`.

    Raises:
        DataError: the graph looks the same however its clients are shuffled (complete, empty or too small).
    """
    adjacency_KK = graph.adjacency_KK
    places = np.arange(graph.num_clients)
    stream = generator(seed, "graph", "permuted")
    for _ in range(_DRAWS):
        order = stream.permutation(graph.num_clients)
        shuffled_KK = adjacency_KK[np.ix_(order, order)]
        if np.any(order == places) or np.array_equal(shuffled_KK, adjacency_KK):
            continue
        kept = float(shuffled_KK[adjacency_KK > 0].sum() / shuffled_KK.sum())
        details = {"of": graph.name, "seed": seed, "order": [int(k) for k in order], "weight_kept": kept}
        return validated(shuffled_KK, graph.num_clients, "permuted", details)
    raise DataError(
        f"graph 'permuted': the {graph.name} graph of {graph.num_clients} clients with {graph.num_edges} edges looks "
        "the same however its clients are shuffled; use data with at least two families of two clients"
    )
