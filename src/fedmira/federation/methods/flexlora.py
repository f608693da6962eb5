"""FlexLoRA (Bai et al., NeurIPS 2024): the mean of the products, decomposed into a pair for each client's rank.

sum_k n_k B_k A_k / sum_k n_k is cut to rank r_k by its singular values; never formed, see `federation/products.py`.
Knows nothing about tasks or graphs. Axes: M distinct ranks, K clients, P parameters of one adapter.
"""

from __future__ import annotations

import numpy as np

from fedmira.config.method import FlexLoraConfig
from fedmira.federation.averaging import one_start, returned_weights
from fedmira.federation.joining import with_rows
from fedmira.federation.method import Info, Method, State
from fedmira.federation.products import in_products
from fedmira.federation.receiving import exchange_everything, own_adapters, received
from fedmira.types import Clients, Participants, Results


def build(config: FlexLoraConfig, clients: Clients) -> Method:
    """Return the method: clients of one rank hold the same pair, turned towards the one they held before."""
    num_clients = len(clients.names)
    ranks_K = clients.ranks_K or (2**31,) * num_clients
    ranks_M = sorted(set(ranks_K))
    holder_M = [ranks_K.index(rank) for rank in ranks_M]
    place_K = [ranks_M.index(rank) for rank in ranks_K]

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        info = Info({"returned": float(len(results.ids))})
        if not results.ids:
            return State(state.adapters, last_round_K), info
        weights_K = np.array(returned_weights(clients, results.ids))
        share_MK = np.tile(weights_K / weights_K.sum(), (len(ranks_M), 1))
        before = state.adapters.replace(state.adapters.values_KP[holder_M])
        mixed = in_products(share_MK, config.align, ranks_M, before)(adapters)
        return State(mixed.replace(mixed.values_KP[place_K]), last_round_K), info

    def join(state: State, num_before: int) -> State:
        # the pair of their own rank, or else the nearest to the largest one, turned towards what they began with
        held, ranks_N = ranks_K[:num_before], ranks_K[num_before:]
        largest_NK = np.eye(num_clients)[[held.index(max(held))] * len(ranks_N)]
        own = state.adapters.replace(state.adapters.values_KP[num_before:])
        rows_NP = in_products(largest_NK, config.align, ranks_N, own)(state.adapters).values_KP
        for row_P, rank in zip(rows_NP, ranks_N, strict=True):
            if rank in held:
                row_P.copy_(state.adapters.values_KP[held.index(rank)])
        return with_rows(state, num_before, rows_NP)

    return Method(init=one_start, plan=exchange_everything, merge=merge, personalise=own_adapters, join=join)
