"""MIRA with an implicit, confidence-weighted server step over all clients with stored adapters.

Theta <- (C + tau L)^-1 C Theta. Theta holds the last upload of every client, so nobody's old adapter is mixed twice;
C = diag(n_k / mean n * decay^rounds since), 0 for clients never seen; a round in which a part of the clients returned
counts as that part. The graph is learned from the uploads unless one is given. Stable for any strength. Knows nothing
about models, data or how the uploads were made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from fedmira.config.mira import MiraConfig
from fedmira.federation.blocks import faded
from fedmira.federation.choosing import ask, choose, first_choice, taken
from fedmira.federation.graph import Graph
from fedmira.federation.learned_graphs import Seen, learner
from fedmira.federation.method import Info, Method, State
from fedmira.federation.receiving import away, exchange_groups, first_state, received
from fedmira.federation.server_step import Mixture, server_step
from fedmira.federation.strengths import chosen_together, in_use
from fedmira.types import Arena, Clients, Job, Participants, Results

_LEAST = 1e-300
"""What the confidence of a client fades to: however long ago it was seen, it is no stranger."""


def build(config: MiraConfig, clients: Clients, graph: Graph | None) -> Method:
    """Return the method on `graph`; None means the graph is learned from the stored uploads.

    All rows of `state.adapters` are mixed anew each round, also those of clients that were not sampled. What a client
    starts from and is judged by is as much of its row as it has chosen, see `choosing`. A client never seen starts from
    its neighbours where the graph knows them, else from the mean of all that returned.
    """
    mean_examples, factors_K = float(np.mean(clients.num_examples_K)), config.factors_of(clients.names)
    choice, decay, step = config.choice, config.staleness_decay, server_step(config, clients)
    learns = None if graph is not None else learner(config.graph, clients)

    def init(initial: Arena, clients: Clients) -> State:
        state = first_state(initial, clients)
        memory = {"uploads": initial.values_KP.clone(), "away": torch.zeros(initial.num_clients, dtype=torch.float64)}
        if learns is not None:
            memory |= {"starts": initial.values_KP.clone(), **learns.init(initial)}
        if choice.enabled:
            memory |= first_choice(initial.num_clients)
        return State(state.adapters, state.last_round_K, memory)

    def mixtures(
        related: Graph, uploads: Arena, last_round_K: tuple[int, ...], away_K: torch.Tensor
    ) -> Callable[[float], Mixture]:
        since = zip(last_round_K, away_K.tolist(), strict=True)
        faded_K = [max(decay**rounds, _LEAST) if last else 0.0 for last, rounds in since]
        confidence_K = [
            0.0 if not last else np.inf if not factor else n / mean_examples * faded / factor
            for n, last, faded, factor in zip(clients.num_examples_K, last_round_K, faded_K, factors_K, strict=True)
        ]
        return step.mixtures(related, uploads, confidence_K)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        stored = state.adapters.replace(state.memory["uploads"])
        uploads, last_round_K = received(stored, state, participants, results)
        away_K = away(state, results)
        memory = {**state.memory, "uploads": uploads.values_KP, "away": away_K}
        related = graph
        if learns is not None:
            starts = state.adapters.replace(memory["starts"].clone())
            starts.values_KP[list(results.ids)] = taken(state, "start_alpha", results.ids).values_KP
            seen = Seen(uploads, starts, last_round_K, results.ids, participants.round)
            learned, related = learns.learn(memory, seen)
            memory |= {"starts": starts.values_KP, **learned}
        assert related is not None
        related = faded(related, uploads.layout.layers, config.depth)
        mixture = mixtures(related, uploads, last_round_K, away_K)(in_use(config.strength, memory))
        numbers = {"returned": float(len(results.ids)), **mixture.numbers()}
        return State(mixture.adapters, last_round_K, memory), Info(numbers, related)

    def plan(state: State, participants: Participants) -> Job:
        job = exchange(state, participants)
        return job._replace(start_SP=taken(state, "start_alpha", job.ids).values_KP)

    exchange = exchange_groups(step.form.crossing)
    method = Method(init, plan, merge, partial(taken, share="alpha"))
    if choice.enabled:
        method = method._replace(trial=partial(ask, choice, groups=step.form.crossing), decide=partial(choose, choice))
    return chosen_together(method, mixtures, step.form.crossing) if config.strength == "auto" else method
