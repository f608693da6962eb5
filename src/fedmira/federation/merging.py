"""Merging what clients learned into the base after every round, and starting again from fresh pairs.

W <- W + s sum_k p_k B_k A_k, p_k = n_k / sum n over those that returned; every client starts the next round from a
fresh pair: A drawn anew, B zero. Knows nothing about tasks or graphs.

Axes: I and O in and out features of a layer, Q rank of the stacked factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fedmira.federation.averaging import follow, returned_weights
from fedmira.federation.method import Info, Method, State
from fedmira.federation.products import stacked
from fedmira.federation.receiving import exchange_everything, received
from fedmira.federation.shifting import Factors, pair_bytes, shifted_adapters, shifted_by, unshifted, with_shift
from fedmira.federation.similarity import low_rank_pairs
from fedmira.randomness import torch_generator
from fedmira.types import Arena, Clients, Job, Participants, Results


def merged_each_round(clients: Clients, shorten: Callable[[Factors], Factors]) -> Method:
    """Return a method whose rounds end in the base; `shorten` says what is merged and sent of the stacked factors."""

    def plan(state: State, participants: Participants) -> Job:
        # everybody draws its fresh pair from the seed of the round
        job = exchange_everything(state, participants)._replace(download=frozenset())
        return with_shift(job, state, participants)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        if not results.ids:
            return State(state.adapters, last_round_K, state.memory), Info({"returned": 0.0})
        weights_K = returned_weights(clients, results.ids)
        shares = [weight / sum(weights_K) for weight in weights_K]
        factors, own_bytes = [], []
        for spec_a, spec_b in low_rank_pairs(adapters.layout):
            b_OQ, a_QI = shorten(stacked(adapters.view(spec_b), adapters.view(spec_a), shares))
            factors.append((b_OQ, a_QI))
            own_bytes.append(pair_bytes(b_OQ, a_QI, adapters.values_KP.element_size()))
        memory = shifted_by(state, factors, own_bytes, results.ids)
        ranks = [a_QI.shape[0] for _, a_QI in factors]
        info = Info({"returned": float(len(results.ids)), "merged_rank": sum(ranks) / len(ranks)})
        return State(_fresh(adapters, clients.seed, participants.round), last_round_K, memory), info

    return Method(init=unshifted, plan=plan, merge=merge, personalise=shifted_adapters, join=follow())


def _fresh(arena: Arena, seed: int, round_: int) -> Arena:
    """Return the adapters that everybody draws after a round, as before the first: A in +-1/sqrt(I), B zero."""
    draw = torch_generator(seed, "fresh adapter", round_)
    fresh = arena.replace(torch.zeros_like(arena.values_KP))
    for spec, _ in low_rank_pairs(arena.layout):
        bound = 1.0 / math.sqrt(spec.shape[1])
        fresh.view(spec)[:] = torch.empty(spec.shape).uniform_(-bound, bound, generator=draw).to(arena.values_KP)
    return fresh
