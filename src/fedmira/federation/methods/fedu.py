"""FedU (Dinh et al., IEEE TNNLS 2024): after local training one explicit Laplacian step on the graph of all clients.

theta_k <- theta_k - tau sum_l a_kl (theta_k - theta_l) for those that returned, l over all clients seen so far with
their last adapter; tau = server_lr * strength. Knows nothing about tasks.
"""

from __future__ import annotations

import numpy as np

from fedmira.config.method import FedUConfig
from fedmira.federation.graph import Graph, laplacian, subgraph
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import linear, refuse_unstable
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Clients, Participants, Results


def build(config: FedUConfig, clients: Clients, graph: Graph) -> Method:
    """Return the method on `graph`.

    Raises:
        ConfigError: server_lr * strength is beyond the stable bound of the whole graph.
    """
    tau = config.server_lr * config.strength
    refuse_unstable(graph, tau)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        seen = [k for k, last in enumerate(last_round_K) if last]
        matrix_KK = np.eye(len(clients.names))
        if results.ids:
            step_CC = np.eye(len(seen)) - tau * laplacian(subgraph(graph, seen))
            moving = [seen.index(k) for k in results.ids]
            matrix_KK[np.ix_(list(results.ids), seen)] = step_CC[moving]
        own_K = np.diagonal(matrix_KK)
        numbers = {"returned": float(len(results.ids)), "mixing_share": float((1.0 - own_K).mean())}
        return State(linear(matrix_KK)(adapters), last_round_K), Info(numbers, graph)

    return Method(init=first_state, plan=exchange_everything, merge=merge, personalise=own_adapters)
