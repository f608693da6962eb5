"""MIRA with an implicit, confidence-weighted server step over all clients with stored adapters.

Theta <- (C + tau L)^-1 C Theta. Theta holds the last upload of every client, so nobody's old adapter is mixed twice;
C = diag(n_k / mean n * decay^rounds since), 0 for clients never seen. The graph is learned from the uploads unless one
is given. Stable for any strength. Knows nothing about models, data or how the uploads were made.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedmira.federation.choosing import ask, blend, choose, first_choice
from fedmira.federation.graph import Graph
from fedmira.federation.learned_graphs import Seen, learner
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import laplacian_implicit, step_numbers
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.method_config import MiraConfig
from fedmira.types import Arena, Clients, Participants, Results, Trial


def build(config: MiraConfig, clients: Clients, graph: Graph | None) -> Method:
    """Return the method on `graph`; None means the graph is learned from the stored uploads.

    All rows of `state.adapters` are mixed anew each round: also those of clients that were not sampled, which start
    from them on return and are judged by them until then. A client never seen starts from its neighbours where the
    graph knows them, else from its initial adapter.
    """
    mean_examples = float(np.mean(clients.num_examples_K))
    choice = config.choice
    learns = None if graph is not None else learner(config.graph, clients)

    def init(initial: Arena, clients: Clients) -> State:
        state = first_state(initial, clients)
        memory = {"uploads": initial.values_KP.clone()}
        if learns is not None:
            memory |= {"starts": initial.values_KP.clone(), **learns.init(initial)}
        if choice.enabled:
            memory |= {"mixed": initial.values_KP.clone(), **first_choice(choice, initial.num_clients)}
        return State(state.adapters, state.last_round_K, memory)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        stored = state.adapters.replace(state.memory["uploads"])
        uploads, last_round_K = received(stored, state, participants, results)
        memory = {**state.memory, "uploads": uploads.values_KP}
        related = graph
        if learns is not None:
            starts = state.adapters.replace(memory["starts"].clone())
            starts.values_KP[list(results.ids)] = state.adapters.values_KP[list(results.ids)]
            seen = Seen(uploads, starts, last_round_K, results.ids, participants.round)
            learned, related = learns.learn(memory, seen)
            memory |= {"starts": starts.values_KP, **learned}
        assert related is not None
        confidence_K = [
            num_examples / mean_examples * config.staleness_decay ** (participants.round - last) if last else 0.0
            for num_examples, last in zip(clients.num_examples_K, last_round_K, strict=True)
        ]
        mixer = laplacian_implicit(related, config.strength, confidence_K)
        mixed = mixer(uploads)
        numbers = {"returned": float(len(results.ids)), **step_numbers(related, mixer, uploads, mixed)}
        if choice.enabled:
            memory["mixed"] = mixed.values_KP
            mixed = blend(uploads, mixed, memory["choice"])
        return State(mixed, last_round_K, memory), Info(numbers, related)

    if not choice.enabled:
        return Method(init=init, plan=exchange_everything, merge=merge, personalise=own_adapters)

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        own, mixed = (state.adapters.replace(state.memory[name]) for name in ("uploads", "mixed"))
        return ask(choice, own, mixed, results)

    return Method(init, exchange_everything, merge, own_adapters, trial, partial(choose, choice))
