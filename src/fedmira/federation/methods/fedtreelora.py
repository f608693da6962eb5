"""FedTreeLoRA (ICML 2026): one tree of clients for all layers; the deeper a layer, the deeper it is cut.

Distances are Frobenius between the B after a warm-up, the tree their average linkage. Each layer is averaged within the
clusters of its own cut, the one with the highest silhouette that has no fewer clusters than the layer before. Knows
nothing about tasks. Axes: L layers, C clients compared.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedmira.config.method import FedTreeLoRAConfig
from fedmira.federation.client_clusters import best_cut, num_clusters
from fedmira.federation.clustered import clustered_once
from fedmira.federation.clustering import Labels, partitions
from fedmira.federation.graph import Matrix
from fedmira.federation.method import Method
from fedmira.types import Clients


def build(config: FedTreeLoRAConfig, clients: Clients) -> Method:
    """Return the method: a cut of its own for each layer."""
    cut = partial(cut_layers, most_clusters=config.most_clusters)
    return clustered_once("fedtreelora", clients, "euclidean", config.warmup_rounds, cut, by_depth=True)


def cut_layers(distances: tuple[Matrix, ...], most_clusters: int) -> Labels:
    """Return the labels (L, C) of every layer's cut of the tree of the mean distances."""
    tree, fewest, chosen = partitions(np.asarray(np.mean(distances, axis=0))), 1, []
    for distance_CC in distances:
        chosen.append(best_cut(distance_CC, tree, most_clusters, fewest))
        fewest = num_clusters(chosen[-1])
    return np.stack(chosen)
