"""Clusters of clients from the distances between their adapters, and what is averaged inside them.

Knows nothing about rounds or how adapters were trained; trees and silhouettes are in `clustering`.

Axes: K clients, C those compared, P parameters of one layer's B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from fedmira.errors import ConfigError
from fedmira.federation.clustering import Labels, silhouette
from fedmira.federation.graph import PRIVACY, Graph, Matrix, validated
from fedmira.federation.similarity import row_distances, symmetric_distances
from fedmira.types import Arena

UNKNOWN = -1
"""Label of a client that is in no cluster yet."""
FEWEST_TO_CLUSTER = 3
"""A silhouette compares clusters, of which at least one has two members."""
_GROUP = "lora_b"
"""The tensors that clusters are found from: B starts at 0 and so shows what was learned."""


def layer_distances(arena: Arena, kind: Literal["cosine", "euclidean"]) -> tuple[Matrix, ...]:
    """Return per layer the distances between the clients' factors B, (C, C) in float64 each.

    Args:
        arena: the C clients to compare.
        kind: `cosine`, 1 - cos (a tensor of zeros is at distance 1 from all others), or `euclidean` (Frobenius).

    Raises:
        ConfigError: the adapter has no factors B.
    """
    specs = {spec.layer: spec for spec in arena.layout.specs if spec.group == _GROUP}
    if not specs:
        raise ConfigError(
            f"clusters are found from the tensors {_GROUP!r}, but the adapter has the groups "
            f"{list(arena.layout.groups)}; use model.adapter.kind = lora, or another method"
        )
    distances = []
    for layer in arena.layout.layers:
        values_CP = arena.view(specs[layer]).flatten(1)
        if kind == "euclidean":
            distances.append(np.sqrt(row_distances(values_CP)))
            continue
        unit_CP = torch.nn.functional.normalize(values_CP.double(), dim=1)
        distances.append(symmetric_distances(1.0 - (unit_CP @ unit_CP.T).clamp(-1.0, 1.0).cpu().numpy()))
    return tuple(distances)


def best_cut(distance_CC: Matrix, tree: Sequence[Labels], most_clusters: int, least_clusters: int = 1) -> Labels:
    """Return the cut of `tree` with the highest silhouette, (C,); the fewest clusters among equals.

    Args:
        distance_CC: by which cuts are judged; the tree may come from other distances.
        tree: the partitions into 1 to C clusters, from `clustering.partitions`.
        most_clusters: of the result. C clusters are considered only if nothing else is left.
        least_clusters: of the result. One cluster scores 0.
    """
    most = max(least_clusters, min(most_clusters, len(tree) - 1))
    scores = [silhouette(distance_CC, labels_C) for labels_C in tree[least_clusters - 1 : most]]
    return tree[least_clusters - 1 + int(np.argmax(scores))]


def nearest(distance_CC: Matrix, rows: Sequence[int], among: Sequence[int]) -> list[int]:
    """Return for each of `rows` the nearest of `among`.

    >>> nearest(np.array([[0.0, 5.0, 1.0], [5.0, 0.0, 4.0], [1.0, 4.0, 0.0]]), [2], [0, 1])
    [0]
    """
    return [list(among)[int(np.argmin(distance_CC[row, list(among)]))] for row in rows]


def far_apart(distance_CC: Matrix, count: int) -> list[int]:
    """Return `count` clients that differ much: the most central one, then always the farthest from those chosen.

    Farthest-first traversal (Gonzalez, 1985).

    >>> far_apart(np.array([[0.0, 5.0, 1.0], [5.0, 0.0, 4.0], [1.0, 4.0, 0.0]]), 2)
    [2, 1]
    """
    chosen = [int(distance_CC.sum(axis=1).argmin())]
    while len(chosen) < count:
        chosen.append(int(distance_CC[:, chosen].min(axis=1).argmax()))
    return chosen


def cluster_means(labels_K: Labels, weights_K: Sequence[float]) -> Matrix:
    """Return the (K, K) matrix that gives every member of a cluster the weighted mean of its cluster.

    Clients in no cluster, and clusters in which nobody has weight, keep their rows.

    >>> cluster_means(np.array([0, 0, 1, UNKNOWN]), [1.0, 3.0, 0.0, 1.0])[0].tolist()
    [0.25, 0.75, 0.0, 0.0]
    """
    weight_KK = _together(labels_K) * np.asarray(weights_K, dtype=np.float64)[None, :]
    total_K = weight_KK.sum(axis=1)
    mean_KK = weight_KK / np.where(total_K > 0, total_K, 1.0)[:, None]
    return np.where((total_K > 0)[:, None], mean_KK, np.eye(len(labels_K)))


def cluster_graph(labels_K: Labels, name: str, details: Mapping[str, Any] | None = None) -> Graph:
    """Return the graph with weight 1 between members of a cluster."""
    adjacency_KK = _together(labels_K)
    np.fill_diagonal(adjacency_KK, 0.0)
    facts = {"clusters": num_clusters(labels_K), "privacy": PRIVACY["clusters"], **(details or {})}
    return validated(adjacency_KK, len(labels_K), name, facts)


def num_clusters(labels_K: Labels) -> int:
    """Return how many clusters there are."""
    return len(set(labels_K.tolist()) - {UNKNOWN})


def _together(labels_K: Labels) -> Matrix:
    """1 where two clients are in one cluster, else 0."""
    together_KK = (labels_K[:, None] == labels_K[None, :]) & (labels_K != UNKNOWN)[:, None]
    return np.asarray(together_KK, dtype=np.float64)
