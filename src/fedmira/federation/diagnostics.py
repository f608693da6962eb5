"""What a graph is like, in a few numbers for people: pieces, spectrum, stability, purity, change.

Nothing here is needed by the next round. Knows nothing about adapters. Axes: K clients.
"""

from __future__ import annotations

import numpy as np

from fedmira.federation.graph import Graph, Matrix, connected_components, laplacian, weight_inside
from fedmira.federation.method import Info, Method, State
from fedmira.types import Clients, Losses, Participants, Results, Trial

_SPECTRUM_CLIENTS = 1000
"""Eigenvalues of more clients would take longer than mixing them."""


def graph_numbers(graph: Graph, clients: Clients, tau: float | None = None) -> dict[str, float]:
    """Return what is known about `graph`; names whose value would mean nothing are left out.

    `components` and `alone` (clients without an edge); `lambda_2`, the smallest eigenvalue of L above 0 (how fast the
    slowest component agrees), and `lambda_max`; `stability_margin` = 2 / (tau lambda_max), below 1 where the explicit
    step diverges; `weight_in_tasks` and `weight_on_true_edges`, shares of edge weight; `agreement`, for learned graphs,
    the cosine of what was learned with what was learned before, by which it counts (see `learning`). Of a graph by
    layer: those of the mean over layers.

    Args:
        graph: over all K clients.
        clients: their labels and, for planted data, the true graph.
        tau: server_lr * strength of the method; None leaves the margin out.
    """
    components = connected_components(graph)
    numbers = {"components": float(len(components)), "alone": float(sum(len(one) == 1 for one in components))}
    if graph.num_edges and graph.num_clients <= _SPECTRUM_CLIENTS:
        eigenvalues = np.linalg.eigvalsh(laplacian(graph))
        numbers |= {"lambda_2": float(eigenvalues[len(components)]), "lambda_max": float(eigenvalues[-1])}
        if tau:
            numbers["stability_margin"] = 2.0 / (tau * numbers["lambda_max"])
    if graph.num_edges and 1 < len(set(clients.tasks)) < len(clients.tasks):
        numbers["weight_in_tasks"] = weight_inside(graph, clients.tasks)
    if graph.num_edges and clients.true_adjacency_KK is not None:
        numbers["weight_on_true_edges"] = _weight_on(graph, clients.true_adjacency_KK)
    if "agreement" in graph.provenance:
        numbers["agreement"] = float(graph.provenance["agreement"])
    return numbers


def _weight_on(graph: Graph, true_KK: Matrix) -> float:
    """The share of edge weight on edges that the true graph has."""
    return float(graph.adjacency_KK[true_KK > 0].sum() / graph.adjacency_KK.sum())


def diagnosed(method: Method, clients: Clients, tau: float | None = None) -> Method:
    """Return `method` whose numbers after a round also tell about the graph it used, if it did."""

    def told(info: Info) -> Info:
        if info.graph is None:
            return info
        return info._replace(numbers={**info.numbers, **graph_numbers(info.graph, clients, tau)})

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        after, info = method.merge(state, participants, results)
        return after, told(info)

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        assert method.decide is not None
        after, info = method.decide(state, trial, losses)
        return after, told(info)

    return method._replace(merge=merge, decide=decide if method.decide else None)
