"""Methods that cluster the clients once, after a warm-up alone, and then average within clusters.

Who is alike is seen from the factors B. Knows nothing about tasks. Axes: G groups of layers with labels of their own
(one for all layers, or one for each), K clients, C those compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from fedmira.federation.averaging import returned_weights
from fedmira.federation.client_clusters import (
    FEWEST_TO_CLUSTER,
    UNKNOWN,
    cluster_graph,
    cluster_means,
    layer_distances,
    nearest,
    num_clusters,
)
from fedmira.federation.clustering import Labels
from fedmira.federation.graph import Matrix
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import by_layer, linear
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Arena, Clients, Job, Participants, Results


def clustered_once(
    name: str,
    clients: Clients,
    kind: Literal["cosine", "euclidean"],
    warmup_rounds: int,
    cut: Callable[[tuple[Matrix, ...]], Labels],
    by_depth: bool = False,
) -> Method:
    """Return the method. Clusters are found once, when `warmup_rounds` are over and three clients have returned.

    Until then everybody trains alone. A client that returns for the first time later joins the clusters of the client
    whose B points most nearly where its own does (cosine, whatever `kind`: its B is that of one round and short) and
    takes their adapter; what it trained from its initial one counts for nobody else.

    Args:
        name: of the graph.
        clients: all of them.
        kind: of the distance between two B of a layer, by which clusters are found.
        warmup_rounds: rounds before the clusters are found.
        cut: from the distances of each layer, (C, C), to the labels, (G, C).
        by_depth: whether each layer has labels of its own.
    """

    def init(initial: Arena, clients: Clients) -> State:
        num_layers = len(layer_distances(initial, kind))  # refuses adapters without B
        state = first_state(initial, clients)
        unknown_GK = torch.full((num_layers if by_depth else 1, initial.num_clients), UNKNOWN, dtype=torch.int64)
        return State(state.adapters, state.last_round_K, {"clusters": unknown_GK})

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        clustered = bool((state.memory["clusters"] != UNKNOWN).any())
        return job if clustered else job._replace(download=frozenset())

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        labels_GK = state.memory["clusters"].cpu().numpy().copy()
        known = np.flatnonzero(labels_GK[0] != UNKNOWN).tolist()
        weighing, seen = results.ids, [k for k, last in enumerate(last_round_K) if last]
        new = [k for k in results.ids if k not in known]
        if known and new:
            rows = [*known, *new]
            distance_CC = np.asarray(np.mean(layer_distances(adapters.rows(rows), "cosine"), axis=0))
            places = nearest(distance_CC, range(len(known), len(rows)), range(len(known)))
            near = [known[place] for place in places]
            labels_GK[:, new] = labels_GK[:, near]
            values_KP = adapters.values_KP.clone()
            values_KP[new] = values_KP[near]
            adapters, weighing = adapters.replace(values_KP), tuple(k for k in results.ids if k in known)
        elif not known and participants.round >= warmup_rounds and len(seen) >= FEWEST_TO_CLUSTER:
            labels_GK[:, seen] = cut(layer_distances(adapters.rows(seen), kind))
            weighing = tuple(seen)
        weights_K = returned_weights(clients, weighing)
        mixers = [linear(cluster_means(labels_K, weights_K)) for labels_K in labels_GK]
        mixer = by_layer(dict(zip(adapters.layout.layers, mixers, strict=True))) if by_depth else mixers[0]
        counts = [num_clusters(labels_K) for labels_K in labels_GK]
        numbers = {"returned": float(len(results.ids)), "clusters": float(counts[-1])}
        if by_depth:
            numbers["clusters_first"] = float(counts[0])
        # shown are the deepest layer's clusters
        graph = cluster_graph(labels_GK[-1], name, {"round": participants.round, "clusters_by_layer": counts})
        return State(mixer(adapters), last_round_K, {"clusters": torch.from_numpy(labels_GK)}), Info(numbers, graph)

    return Method(init=init, plan=plan, merge=merge, personalise=own_adapters)
