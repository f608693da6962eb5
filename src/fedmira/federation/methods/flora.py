"""FLoRA (Wang et al., NeurIPS 2024) and FLoRIST (Ramesh and Dass, MLSys 2026): products are merged into the base.

W <- W + s sum_k p_k B_k A_k, p_k = n_k / sum n over those that returned, and every client starts the next round from a
fresh pair: A drawn anew, B zero. FLoRA sends the stacked factors, FLoRIST the pair of the least rank that holds a share
of the energy (squared singular values) of the sum. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

import math

import torch

from fedmira.federation.averaging import follow, returned_weights
from fedmira.federation.method import Info, Method, State
from fedmira.federation.products import energy_rank, spectrum, stacked
from fedmira.federation.receiving import exchange_everything, received
from fedmira.federation.shifting import pair_bytes, shifted_adapters, shifted_by, unshifted, with_shift
from fedmira.federation.similarity import low_rank_pairs
from fedmira.randomness import torch_generator
from fedmira.types import Arena, Clients, Job, Participants, Results


def build(clients: Clients, energy: float | None = None) -> Method:
    """Return the method; with `energy` each layer's sum is cut to the least rank that holds this share of it."""

    def plan(state: State, participants: Participants) -> Job:
        # everybody draws its fresh pair from the seed of the round
        job = exchange_everything(state, participants)._replace(download=frozenset())
        return with_shift(job, state, participants)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        if not results.ids:
            return State(state.adapters, last_round_K, state.memory), Info({"returned": 0.0})
        weights_K = returned_weights(clients, results.ids)
        factors, own_bytes = [], []
        for spec_a, spec_b in low_rank_pairs(adapters.layout):
            b_OQ, a_QI = stacked(adapters, spec_a, spec_b, [weight / sum(weights_K) for weight in weights_K])
            if energy is not None:
                whole = spectrum(b_OQ, a_QI)
                rank = energy_rank(whole.values_Q, energy)
                b_OQ, a_QI = whole.u_OQ[:, :rank] * whole.values_Q[:rank], whole.v_QI[:rank]
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
