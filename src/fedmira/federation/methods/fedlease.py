"""FedLEASE (NeurIPS 2025): after a warm-up, clients are clustered by their B; each cluster then shares one adapter.

d_kl = mean over layers of 1 - cos(B_k, B_l); average linkage; the number of clusters with the highest silhouette.
Knows nothing about tasks.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmira.federation.averaging import returned_weights
from fedmira.federation.client_clusters import (
    MINIMUM_CLIENTS,
    UNKNOWN,
    best_cut,
    cluster_graph,
    cluster_means,
    layer_distances,
    nearest,
    num_clusters,
)
from fedmira.federation.clustering import partitions
from fedmira.federation.graph import Matrix
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import linear
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.method_config import FedLEASEConfig
from fedmira.types import Arena, Clients, Job, Participants, Results


def build(config: FedLEASEConfig, clients: Clients) -> Method:
    """Return the method. Clusters are found once, when `warmup_rounds` are over and three clients have returned.

    Until then everybody trains alone. A client that returns for the first time later joins the cluster of the client
    whose B is nearest.
    """

    def init(initial: Arena, clients: Clients) -> State:
        layer_distances(initial, "lora_b", "cosine")  # refuses adapters without B
        state = first_state(initial, clients)
        unknown_K = torch.full((initial.num_clients,), UNKNOWN, dtype=torch.int64)
        return State(state.adapters, state.last_round_K, {"clusters": unknown_K})

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        clustered = bool((state.memory["clusters"] != UNKNOWN).any())
        return job if clustered else job._replace(download=frozenset())

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        labels_K = state.memory["clusters"].cpu().numpy().copy()
        known = np.flatnonzero(labels_K != UNKNOWN).tolist()
        weighing = results.ids
        seen = [k for k, last in enumerate(last_round_K) if last]
        if known:
            new = [k for k in results.ids if k not in known]
            if new:
                rows = [*known, *new]
                places = range(len(known))
                near = nearest(_distances(adapters, rows), range(len(known), len(rows)), places)
                labels_K[new] = labels_K[[known[place] for place in near]]
        elif participants.round >= config.warmup_rounds and len(seen) >= MINIMUM_CLIENTS:
            distance_CC = _distances(adapters, seen)
            labels_K[seen] = best_cut(distance_CC, partitions(distance_CC), config.most_clusters, least_clusters=2)
            weighing = tuple(seen)
        mixed = linear(cluster_means(labels_K, returned_weights(clients, weighing)))(adapters)
        numbers = {"returned": float(len(results.ids)), "clusters": float(num_clusters(labels_K))}
        graph = cluster_graph(labels_K, "fedlease", {"round": participants.round})
        return State(mixed, last_round_K, {"clusters": torch.from_numpy(labels_K)}), Info(numbers, graph)

    return Method(init=init, plan=plan, merge=merge, personalise=own_adapters)


def _distances(adapters: Arena, rows: list[int]) -> Matrix:
    some = adapters.replace(adapters.values_KP[rows])
    return np.asarray(np.mean(layer_distances(some, "lora_b", "cosine"), axis=0))
