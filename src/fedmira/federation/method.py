"""What a federated algorithm is: a few pure functions on values.

No files, clocks, devices, printing or global randomness here or in any method; knows nothing about models and data.

Axes: K clients, S participants, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fedmira.types import Arena, Clients, Job, Losses, Participants, Results, Trial

if TYPE_CHECKING:
    import torch

    from fedmira.federation.graph import Graph


@dataclass(frozen=True, slots=True)
class State:
    """What the next round needs. Every field survives a checkpoint unchanged."""

    adapters: Arena
    """(K, P): row k is where client k starts its next round, unless the method's `plan` says otherwise."""
    last_round_K: tuple[int, ...]
    """The last round each client took part in; 0 if it never did."""
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What one method remembers besides, by name: stored uploads, a moving average of the Gram matrix, ..."""


class Info(NamedTuple):
    """What people look at; nothing in it is needed by the next round."""

    numbers: Mapping[str, float]
    """Scalars of the round, such as `disagreement_before` and `disagreement_after`."""
    graph: Graph | None = None
    """The graph this round was mixed with, over all K clients; None if the method has none."""


class Method(NamedTuple):
    """A federated algorithm."""

    init: Callable[[Arena, Clients], State]
    """The state before round 1, from the arena of initial adapters."""
    plan: Callable[[State, Participants], Job]
    """What each participant starts from, trains, sends back and is pulled towards."""
    merge: Callable[[State, Participants, Results], tuple[State, Info]]
    """The state after the round. Clients whose result is missing count as not sampled."""
    personalise: Callable[[State], Arena]
    """(K, P): what each client is judged by and gets to keep."""
    trial: Callable[[State, Participants, Results], Trial | None] | None = None
    """After `merge`: what clients are asked to judge on their own examples; None asks nobody."""
    decide: Callable[[State, Trial, Losses], tuple[State, Info]] | None = None
    """The state after the answers to a trial. Its numbers join those of `merge`; its graph, if any, replaces that."""
    join: Callable[[State, int], State] | None = None
    """The state once the clients from that row on, which joined and hold their initial adapters, hold what a client
    never seen would; None: what a `merge` in which nobody returns gives them. See `joining`."""
