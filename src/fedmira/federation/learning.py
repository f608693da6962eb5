"""What learning a graph is: a few pure functions on what a run has seen. The kinds are in `learned_graphs`.

Knows nothing about how adapters are trained or mixed. Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fedmira.config.graph import GraphConfig
from fedmira.federation.graph import Graph, Matrix, validated
from fedmira.federation.similarity import MINIMUM_CLIENTS, mutual_neighbours
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial

Memory: TypeAlias = Mapping[str, torch.Tensor]
Mask: TypeAlias = npt.NDArray[np.bool_]


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
    looked_at: Callable[[Memory, Seen], Mask] = lambda memory, seen: pairs_of_returned(seen)
    """The pairs of clients that the graph is learned from anew, (K, K)."""


LearnerBuilder: TypeAlias = Callable[[GraphConfig, Clients], Learner]


def neighbour_graph(similarity_KK: Matrix, config: GraphConfig) -> Graph:
    """Return the graph of mutual nearest neighbours by `similarity_KK`; 0 means never compared."""
    weights_KK = mutual_neighbours(similarity_KK, config.neighbours, config.power)
    details = {"neighbours": config.neighbours, "power": config.power}
    return validated(weights_KK, len(weights_KK), config.kind, details)


# ------------------------------------------------------------------------------------------ how far a graph has settled

_SETTLED_DEGREE = 2.0
"""What the weights of a client's edges sum to, about, in graphs of a few neighbours for each (docs/log.md)."""


def nothing_compared(num_clients: int) -> dict[str, torch.Tensor]:
    """Return what is remembered, before round 1, of how graphs agree.

    `last_weights` (K, K): those of each pair when it was last looked at; `pairs_known` (K, K): 1 where it ever was;
    `evidence` (4,): <before, now>, |before|^2 and |now|^2 of the weights of pairs that were looked at again, and their
    number.
    """
    nothing_KK = torch.zeros(num_clients, num_clients, dtype=torch.float64)
    evidence = torch.zeros(4, dtype=torch.float64)
    return {"last_weights": nothing_KK.clone(), "pairs_known": nothing_KK.clone(), "evidence": evidence}


def pairs_of_returned(seen: Seen) -> Mask:
    """Return the pairs that graphs from adapters look at, (K, K): both were seen, and one of them returned."""
    seen_K, returned_K = (np.isin(np.arange(len(seen.last_round_K)), ids) for ids in (seen.clients, seen.returned))
    enough = len(seen.clients) >= MINIMUM_CLIENTS
    return enough & (returned_K[:, None] | returned_K) & seen_K[:, None] & seen_K & ~np.eye(len(seen_K), dtype=bool)


def compared(memory: Memory, now_KK: Matrix, looked_at_KK: Mask) -> dict[str, torch.Tensor]:
    """Return what is remembered of how graphs agree, see `nothing_compared`, after a round.

    What nobody looked at again repeats itself by itself, so it does not count. Where few pairs are looked at, earlier
    rounds count as well, faded by the share of pairs that was looked at since.

    Args:
        memory: what was remembered before.
        now_KK: the weights of the graph learned now.
        looked_at_KK: the pairs that it was learned from; the others are as they were.
    """
    before_KK, known_KK = memory["last_weights"].cpu().numpy(), memory["pairs_known"].cpu().numpy() > 0
    again_KK = np.triu(looked_at_KK & known_KK)
    before_N, now_N = before_KK[again_KK], now_KK[again_KK]
    found = torch.tensor([before_N @ now_N, before_N @ before_N, now_N @ now_N, len(now_N)], dtype=torch.float64)
    known_KK = known_KK | looked_at_KK
    faded = 1 - looked_at_KK.sum() / max(1, known_KK.sum())
    return {
        "last_weights": torch.from_numpy(np.where(looked_at_KK, now_KK, before_KK)),
        "pairs_known": torch.from_numpy(known_KK.astype(np.float64)),
        "evidence": faded * memory["evidence"].cpu() + found,
    }


def settled_share(memory: Memory, settled: float) -> tuple[float, dict[str, float]]:
    """Return how much a learned graph counts, 0 .. 1, and the `agreement` that says so, if there is any.

    The agreement is the cosine of the weights of pairs that were looked at again with those they had before. Where
    these pairs are fewer than the clients in them it counts for as much less: a few agree by chance.

    Args:
        memory: what `compared` returned.
        settled: agreement from which on a graph counts alone; 0: any.
    """
    product, before, now, pairs = memory["evidence"].tolist()
    found = {"agreement": product / (before * now) ** 0.5} if before * now else {}
    if settled == 0:
        return 1.0, found
    enough = min(1.0, pairs / max(1, int((memory["pairs_known"] > 0).any(dim=1).sum())))
    return enough * min(1.0, found.get("agreement", 0.0) / settled), found


def everyone_joined(memory: Memory, num_seen: int) -> float:
    """Return what the weights of a client's edges sum to where everyone seen is joined with everyone else.

    Weights are 1 before any pair was looked at again. From then on everyone is joined about as strongly as in settled
    graphs: with less, a graph of chance that joins few would keep clients apart, and with more, clients that nobody
    resembles would be drawn into one.
    """
    return _SETTLED_DEGREE if memory["evidence"][3] > 0 else max(0.0, num_seen - 1.0)


def filled_up(graph: Graph, share: float, ids: Sequence[int], degree: float) -> Graph:
    """Return `share` of a learned graph; for the rest, clients are joined with each other alike.

    Args:
        graph: what was learned, the same for all layers or not.
        share: how much it counts, 0 .. 1.
        ids: the clients joined for the rest: those that were seen.
        degree: what the weights of one of them would sum to if nothing learned counted; 0 joins nobody.
    """
    rest_KK = np.zeros_like(graph.adjacency_KK)
    rest_KK[np.ix_(ids, ids)] = (1 - share) * (degree / max(1, len(ids) - 1))
    np.fill_diagonal(rest_KK, 0.0)
    by_layer = graph.by_layer if share else {}

    def filled(adjacency_KK: Matrix) -> Matrix:
        filled_KK = share * adjacency_KK + rest_KK
        filled_KK.setflags(write=False)
        return np.asarray(filled_KK)

    of = {id(adjacency_KK): filled(adjacency_KK) for adjacency_KK in by_layer.values()}
    by_layer = {layer: of[id(adjacency_KK)] for layer, adjacency_KK in by_layer.items()}
    return replace(graph, adjacency_KK=filled(graph.adjacency_KK), by_layer=by_layer)
