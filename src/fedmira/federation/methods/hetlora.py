"""HetLoRA (Cho et al., EMNLP 2024): a mean of adapters of different ranks, weighted by how much each one does.

theta <- sum_k |dW_k|_F theta_k / sum_k |dW_k|_F over those that returned, smaller adapters padded with zeros; each
client gets its first r_k components of it (`federation/ranks.py`). Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.averaging import follow, one_start, returned_weights
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import average
from fedmira.federation.products import squared_norms
from fedmira.federation.receiving import exchange_everything, own_adapters, received
from fedmira.types import Clients, Participants, Results


def build(clients: Clients) -> Method:
    """Return the method; where nobody does anything yet, training examples are the weights."""

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        info = Info({"returned": float(len(results.ids))})
        if not results.ids:
            return State(state.adapters, last_round_K), info
        norms_K = squared_norms(adapters).sqrt().tolist()
        weights_K = [norm if k in results.ids else 0.0 for k, norm in enumerate(norms_K)]
        if not any(weights_K):
            weights_K = returned_weights(clients, results.ids)
        return State(average(weights_K)(adapters), last_round_K), info

    return Method(init=one_start, plan=exchange_everything, merge=merge, personalise=own_adapters, join=follow())
