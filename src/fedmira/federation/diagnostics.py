"""What a graph is like, in a few numbers for people: pieces, spectrum, stability, purity, change.

What is remembered here of earlier graphs is for these numbers alone. Knows nothing about adapters. Axes: K clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmira.federation.graph import Graph, connected_components, laplacian, weight_inside
from fedmira.federation.learning import Memory, compared, nothing_compared, settled_share
from fedmira.federation.method import Info, Method, State
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial

_SPECTRUM_CLIENTS = 1000
"""Eigenvalues of more clients would take longer than mixing them."""


def graph_numbers(graph: Graph, clients: Clients, tau: float | None = None) -> dict[str, float]:
    """Return what is known about `graph`; names whose value would mean nothing are left out.

    `components` and `alone` (clients without an edge); `lambda_2`, the smallest eigenvalue of L above 0 (how fast the
    slowest component agrees), and `lambda_max`; `stability_margin` = 2 / (tau lambda_max), below 1 where the explicit
    step diverges; `weight_in_tasks` and `weight_on_true_edges`, shares of edge weight; `agreement`, for graphs that are
    learned by `learning`, the cosine of what was learned with what was learned before, by which it counts. Of a graph
    by layer: those of the mean over layers.

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
        on_true_edges = graph.adjacency_KK[clients.true_adjacency_KK > 0].sum()
        numbers["weight_on_true_edges"] = float(on_true_edges / graph.adjacency_KK.sum())
    if "agreement" in graph.provenance:
        numbers["agreement"] = float(graph.provenance["agreement"])
    return numbers


def diagnosed(method: Method, clients: Clients, tau: float | None = None, *, remembers: bool = False) -> Method:
    """Return `method` whose numbers after a round also tell about the graph it used, if it did.

    Args:
        method: any.
        clients: see `graph_numbers`.
        tau: see `graph_numbers`.
        remembers: compare its graphs over rounds, which is for methods that relate clients anew and do not remember
            how. The `agreement` is that of `learning.settled_share`, among clients that returned: others may be
            related as they were, or to nobody, because they were away.
    """

    def told(info: Info, memory: Memory, returned: Sequence[int]) -> tuple[Info, Memory]:
        if info.graph is None:
            return info, memory
        numbers = graph_numbers(info.graph, clients, tau)
        if remembers:
            here_K = np.isin(np.arange(len(clients.names)), returned)
            looked_at_KK = here_K[:, None] & here_K & ~np.eye(len(here_K), dtype=bool)
            memory = compared(memory, info.graph.adjacency_KK, looked_at_KK)
            numbers |= settled_share(memory, settled=0.0)[1]
        return info._replace(numbers={**info.numbers, **numbers}), memory

    def remembered(state: State) -> Memory:
        """Of earlier graphs; a checkpoint of before it was kept has nothing."""
        nothing = nothing_compared(len(clients.names)) if remembers else {}
        return {name: state.memory.get(name, tensor) for name, tensor in nothing.items()}

    def init(initial: Arena, clients: Clients) -> State:
        state = method.init(initial, clients)
        return replace(state, memory={**state.memory, **remembered(state)})

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        after, info = method.merge(state, participants, results)
        info, memory = told(info, remembered(state), results.ids)
        return replace(after, memory={**after.memory, **memory}), info

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        assert method.decide is not None
        after, info = method.decide(state, trial, losses)
        info, memory = told(info, remembered(state), trial.ids)
        return replace(after, memory={**after.memory, **memory}), info

    return method._replace(init=init, merge=merge, decide=decide if method.decide else None)
