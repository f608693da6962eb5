"""FedLEASE (NeurIPS 2025): after a warm-up, clients are clustered by their B; each cluster then shares one adapter.

d_kl = mean over layers of 1 - cos(B_k, B_l); average linkage; the number of clusters with the highest silhouette.
Knows nothing about tasks. Axes: C clients compared.
"""

from __future__ import annotations

import numpy as np

from fedmira.config.method import FedLEASEConfig
from fedmira.federation.client_clusters import best_cut
from fedmira.federation.clustered import clustered_once
from fedmira.federation.clustering import Labels, partitions
from fedmira.federation.graph import Matrix
from fedmira.federation.method import Method
from fedmira.types import Clients


def build(config: FedLEASEConfig, clients: Clients) -> Method:
    """Return the method: one cut for all layers."""

    def cut(distances: tuple[Matrix, ...]) -> Labels:
        distance_CC = np.asarray(np.mean(distances, axis=0))
        return best_cut(distance_CC, partitions(distance_CC), config.most_clusters, least_clusters=2)[None]

    return clustered_once("fedlease", clients, "cosine", config.warmup_rounds, cut)
