"""FedEx-LoRA (Singhal et al., ACL 2025): the factors are averaged, and what that gets wrong is added to the base.

W <- W + s (sum_k p_k B_k A_k - Bbar Abar), p_k = n_k / sum n over those that returned, Abar and Bbar the means. With
the mean adapter this is the mean of the products, for clients of one rank; others are refused. Knows nothing about
tasks or graphs.
"""

from __future__ import annotations

import torch

from fedmira.federation.averaging import follow, mean_of, returned_weights
from fedmira.federation.method import Info, Method, State
from fedmira.federation.products import stacked
from fedmira.federation.receiving import exchange_everything, received
from fedmira.federation.shifting import pair_bytes, shifted_adapters, shifted_by, unshifted, with_shift
from fedmira.federation.similarity import low_rank_pairs
from fedmira.types import Clients, Job, Participants, Results


def build(clients: Clients) -> Method:
    """Return the method; who downloads the means and the stacked factors of a round makes its residual itself."""

    def plan(state: State, participants: Participants) -> Job:
        return with_shift(exchange_everything(state, participants), state, participants)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        info = Info({"returned": float(len(results.ids))})
        if not results.ids:
            return State(state.adapters, last_round_K, state.memory), info
        weights_K = returned_weights(clients, results.ids)
        shares_K = [weight / sum(weights_K) for weight in weights_K]
        mean = mean_of(clients, results.ids)(adapters)
        factors, own_bytes = [], []
        for spec_a, spec_b in low_rank_pairs(adapters.layout):
            b_OQ, a_QI = stacked(adapters.view(spec_b), adapters.view(spec_a), shares_K)
            mean_b, mean_a = mean.view(spec_b)[0].double(), mean.view(spec_a)[0].double()
            factors.append((torch.cat([b_OQ, -mean_b], dim=1), torch.cat([a_QI, mean_a], dim=0)))
            own_bytes.append(pair_bytes(b_OQ, a_QI, adapters.values_KP.element_size()))
        return State(mean, last_round_K, shifted_by(state, factors, own_bytes, results.ids)), info

    return Method(init=unshifted, plan=plan, merge=merge, personalise=shifted_adapters, join=follow())
