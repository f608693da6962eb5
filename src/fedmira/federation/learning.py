"""What learning a graph is: a few pure functions on what a run has seen. The kinds are in `learned_graphs`.

Knows nothing about how adapters are trained or mixed. Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

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
