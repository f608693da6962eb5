"""FedTreeLoRA (ICML 2026): one tree of clients for all layers; the deeper a layer, the deeper it is cut.

Distances are Frobenius between the B after a warm-up, the tree their average linkage. Each layer is averaged within the
clusters of its own cut, the one with the highest silhouette that has no fewer clusters than the layer before. Knows
nothing about tasks. Axes: L layers, K clients, C those compared.
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
from fedmira.federation.clustering import Labels, partitions
from fedmira.federation.graph import Matrix
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import by_layer, linear
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.method_config import FedTreeLoRAConfig
from fedmira.types import Arena, Clients, Job, Participants, Results


def build(config: FedTreeLoRAConfig, clients: Clients) -> Method:
    """Return the method. The tree is grown once, when `warmup_rounds` are over and three clients have returned.

    Until then everybody trains alone. A client that returns for the first time later joins the clusters of the client
    whose B is nearest.
    """

    def init(initial: Arena, clients: Clients) -> State:
        num_layers = len(layer_distances(initial, "lora_b", "euclidean"))
        state = first_state(initial, clients)
        unknown_LK = torch.full((num_layers, initial.num_clients), UNKNOWN, dtype=torch.int64)
        return State(state.adapters, state.last_round_K, {"clusters": unknown_LK})

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        grown = bool((state.memory["clusters"] != UNKNOWN).any())
        return job if grown else job._replace(download=frozenset())

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        labels_LK = state.memory["clusters"].cpu().numpy().copy()
        known = np.flatnonzero(labels_LK[0] != UNKNOWN).tolist()
        weighing, seen = results.ids, [k for k, last in enumerate(last_round_K) if last]
        new = [k for k in results.ids if k not in known]
        if known and new:
            rows = [*known, *new]
            some = adapters.replace(adapters.values_KP[rows])
            distance_CC = np.mean(layer_distances(some, "lora_b", "euclidean"), axis=0)
            near = nearest(distance_CC, range(len(known), len(rows)), range(len(known)))
            labels_LK[:, new] = labels_LK[:, [known[place] for place in near]]
        elif not known and participants.round >= config.warmup_rounds and len(seen) >= MINIMUM_CLIENTS:
            some = adapters.replace(adapters.values_KP[seen])
            labels_LK[:, seen] = cut_layers(layer_distances(some, "lora_b", "euclidean"), config.most_clusters)
            weighing = tuple(seen)
        weights_K = returned_weights(clients, weighing)
        mixers = [linear(cluster_means(labels_K, weights_K)) for labels_K in labels_LK]
        mixed = by_layer(dict(zip(adapters.layout.layers, mixers, strict=True)))(adapters)
        counts = [float(num_clusters(labels_K)) for labels_K in labels_LK]
        numbers = {"returned": float(len(results.ids)), "clusters_first": counts[0], "clusters_last": counts[-1]}
        # shown are the deepest layer's clusters: those of every other layer are unions of them
        graph = cluster_graph(labels_LK[-1], "fedtreelora", {"clusters_by_layer": counts})
        return State(mixed, last_round_K, {"clusters": torch.from_numpy(labels_LK)}), Info(numbers, graph)

    return Method(init=init, plan=plan, merge=merge, personalise=own_adapters)


def cut_layers(distances: tuple[Matrix, ...], most_clusters: int) -> Labels:
    """Return the labels (L, C) of every layer's cut of the tree of the mean distances."""
    tree, fewest, chosen = partitions(np.asarray(np.mean(distances, axis=0))), 1, []
    for distance_CC in distances:
        chosen.append(best_cut(distance_CC, tree, most_clusters, fewest))
        fewest = num_clusters(chosen[-1])
    return np.stack(chosen)
