"""What learning a graph is: a few pure functions on what a run has seen. The kinds are in `learned_graphs`.

Knows nothing about how adapters are trained or mixed. Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from fedmira.federation.graph import Graph, Matrix, validated
from fedmira.federation.similarity import mutual_neighbours
from fedmira.graph_config import GraphConfig
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial

Memory: TypeAlias = Mapping[str, torch.Tensor]


class Seen(NamedTuple):
    """What the server has seen when a round is over."""

    uploads: Arena
    """(K, P): the last upload of every client."""
    starts: Arena
    """(K, P): what each client started from when it made that upload."""
    last_round_K: tuple[int, ...]
    """The round of that upload; 0 if there is none yet."""
    returned: tuple[int, ...]
    """Who returned this round; ascending."""
    round: int
    clip: bool = False
    """Whether what few clients learn alike is a median, in graphs made from the adapters."""

    @property
    def clients(self) -> list[int]:
        """Who ever returned."""
        return [k for k, last in enumerate(self.last_round_K) if last > 0]


class Learner(NamedTuple):
    """How a graph is learned."""

    init: Callable[[Arena], dict[str, torch.Tensor]]
    """What is remembered before round 1, by name; refuses adapters it cannot compare."""
    learn: Callable[[Memory, Seen], tuple[dict[str, torch.Tensor], Graph]]
    """What is remembered after a round, and the graph."""
    ask: Callable[[Participants, Results], Trial | None] | None = None
    """What is asked after a round, for the graph of the next; see `asked_graphs`."""
    hear: Callable[[Memory, int, Trial, Losses], dict[str, torch.Tensor]] | None = None
    """What is remembered after the answers, of those names that they change; the number is that of the round."""


Builder: TypeAlias = Callable[[GraphConfig, Clients], Learner]


def neighbour_graph(similarity_KK: Matrix, config: GraphConfig) -> Graph:
    """Return the graph of mutual nearest neighbours by `similarity_KK`; 0 means never compared."""
    weights_KK = mutual_neighbours(similarity_KK, config.neighbours, config.power)
    details = {"neighbours": config.neighbours, "power": config.power}
    return validated(weights_KK, len(weights_KK), config.kind, details)


# ------------------------------------------------------------------------------------------ how far a graph has settled

NO_EVIDENCE = torch.zeros(4, dtype=torch.float64)
"""Before anything was compared: <before, now>, |before|^2, |now|^2 and the number of edges of two graphs."""
_CLIENTS_PER_EDGE = 2
"""With fewer edges to compare than one for so many clients, two graphs agree by chance."""
_SETTLED_DEGREE = 2.0
"""What the weights of a client's edges sum to, about, in graphs of a few neighbours for each (docs/log.md)."""


def gathered(memory: Memory, now_KK: Matrix, returned: Sequence[int]) -> torch.Tensor:
    """Return what is known, (4,), of how graphs agree with those of the round before; see `NO_EVIDENCE`.

    Only pairs are compared of which one returned and both were known the round before: what nobody looked at again
    repeats itself by itself. Where few return, earlier rounds count as well, each as much less as one further on has
    seen of all clients: 1 - returned / K.

    Args:
        memory: the weights of the graph learned the round before, who was known then, and the evidence until then.
        now_KK: the weights of the graph learned now.
        returned: who returned this round.
    """
    num_clients = len(now_KK)
    known_K, returned_K = memory["known"].cpu().numpy() > 0, np.isin(np.arange(num_clients), returned)
    told_KK = (returned_K[:, None] | returned_K) & known_K[:, None] & known_K
    before_KK, now_KK = np.where(told_KK, memory["weights"].cpu().numpy(), 0.0), np.where(told_KK, now_KK, 0.0)
    found = [(before_KK * now_KK).sum(), (before_KK**2).sum(), (now_KK**2).sum(), (before_KK + now_KK > 0).sum() / 2]
    remembered = 1 - len(returned) / num_clients
    return remembered * memory["evidence"].cpu() + torch.tensor(found, dtype=torch.float64)


def settled_share(evidence: torch.Tensor, num_clients: int, settled: float) -> tuple[float, dict[str, float]]:
    """Return how much a learned graph counts, 0 .. 1, and the `agreement` that says so, if there is any.

    Args:
        evidence: what `gathered` returned.
        num_clients: K; with fewer edges than K / 2 an agreement counts for as much less.
        settled: agreement from which on a graph counts alone; 0: any.
    """
    product, before, now, edges = evidence.tolist()
    found = {"agreement": product / (before * now) ** 0.5} if before * now else {}
    if settled == 0:
        return 1.0, found
    enough = min(1.0, edges * _CLIENTS_PER_EDGE / num_clients)
    return enough * min(1.0, found.get("agreement", 0.0) / settled), found


def filled_up(graph: Graph, share: float, *, everyone: bool) -> Graph:
    """Return `share` of a learned graph, and for the rest everyone joined with everyone if `everyone`, else nobody.

    As long as nothing learned counts, weights are 1; then the rest joins a client with all others about as strongly as
    a settled graph does with its neighbours. Less would let a graph of chance that joins few keep clients apart.
    """
    num_others = max(1, graph.num_clients - 1)
    weight = (1 - share) * min(1.0, _SETTLED_DEGREE / num_others) if share else 1.0
    rest_KK = everyone * weight * (1 - np.eye(graph.num_clients))

    def filled(adjacency_KK: Matrix) -> Matrix:
        filled_KK = share * adjacency_KK + rest_KK
        filled_KK.setflags(write=False)
        return np.asarray(filled_KK)

    of = {id(adjacency_KK): filled(adjacency_KK) for adjacency_KK in graph.by_layer.values()}
    by_layer = {layer: of[id(adjacency_KK)] for layer, adjacency_KK in graph.by_layer.items()}
    return replace(graph, adjacency_KK=filled(graph.adjacency_KK), by_layer=by_layer)
