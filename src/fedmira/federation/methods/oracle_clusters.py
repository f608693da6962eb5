"""FedAvg within the true groups of clients: the upper reference of every method that must find them itself.

Knows the answer: task labels or the planted graph.
"""

from __future__ import annotations

import numpy as np

from fedmira.federation.averaging import returned_weights
from fedmira.federation.client_clusters import cluster_means
from fedmira.federation.graph import Graph, connected_components
from fedmira.federation.joining import with_rows
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import linear
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Clients, Participants, Results


def build(clients: Clients, graph: Graph) -> Method:
    """Return the method: theta_k <- sum n_l theta_l / sum n_l over those of k's group that returned.

    The groups are the connected components of `graph`. A group of which nobody returned keeps its adapter.
    """
    labels_K = np.zeros(len(clients.names), dtype=np.int64)
    for number, members in enumerate(connected_components(graph)):
        labels_K[list(members)] = number

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        mixed = linear(cluster_means(labels_K, returned_weights(clients, results.ids)))(adapters)
        numbers = {"returned": float(len(results.ids)), "clusters": float(labels_K.max() + 1)}
        return State(mixed, last_round_K), Info(numbers, graph)

    def join(state: State, num_before: int) -> State:
        groups = labels_K.tolist()
        # a group of its own begins with its initial adapter
        rows = [groups.index(groups[k]) for k in range(num_before, len(groups))]
        return with_rows(state, num_before, state.adapters.values_KP[rows])

    return Method(init=first_state, plan=exchange_everything, merge=merge, personalise=own_adapters, join=join)
