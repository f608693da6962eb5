"""The server's mathematics written out client by client, for comparison with `fedmira.federation`. Slow and obvious.

Axes: K clients, P parameters of one adapter, R rank, I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmira.types import Arena


def explicit_step(values_KP: np.ndarray, adjacency_KK: np.ndarray, tau: float) -> np.ndarray:
    """Eq. (8) of MIRA: w_k - tau sum_l a_kl (w_k - w_l)."""
    mixed = []
    for k, row in enumerate(values_KP):
        pull = np.zeros_like(row)
        for other, weight in zip(values_KP, adjacency_KK[k], strict=True):
            pull += weight * (row - other)
        mixed.append(row - tau * pull)
    return np.stack(mixed)


def implicit_step(
    values_KP: np.ndarray, adjacency_KK: np.ndarray, tau: float, confidence_K: Sequence[float], sweeps: int = 20_000
) -> np.ndarray:
    """Minimise sum_k c_k |x_k - w_k|^2 + tau/2 sum_kl a_kl |x_k - x_l|^2 one client at a time until nothing moves."""
    mixed = values_KP.copy()
    for _ in range(sweeps):
        before = mixed.copy()
        for k, confidence in enumerate(confidence_K):
            total = confidence + tau * adjacency_KK[k].sum()
            if total > 0:
                mixed[k] = (confidence * values_KP[k] + tau * adjacency_KK[k] @ mixed) / total
        if np.array_equal(before, mixed):
            break
    return mixed


def disagreement(values_KP: np.ndarray, adjacency_KK: np.ndarray) -> float:
    """Eq. (3): 1/2 sum_k sum_l a_kl |w_k - w_l|^2."""
    total = 0.0
    for k, row in enumerate(values_KP):
        for other, weight in zip(values_KP, adjacency_KK[k], strict=True):
            total += 0.5 * weight * float(((row - other) ** 2).sum())
    return total


def dense_by_layer(arena: Arena) -> list[list[np.ndarray]]:
    """Per layer and client the product s B A, flattened: what the adapter really adds to the base model."""
    tensors = {spec.name: arena.view(spec).double() for spec in arena.layout.specs}
    return [
        [
            (arena.layout.scaling * tensors[f"{layer}.lora_b"][k] @ tensors[f"{layer}.lora_a"][k]).flatten().numpy()
            for k in range(arena.num_clients)
        ]
        for layer in dict.fromkeys(spec.layer for spec in arena.layout.specs)
    ]


def headings(after: Arena, before: Arena) -> list[list[np.ndarray]]:
    """2 after - before as dense updates, layer by layer, client by client."""
    return [
        [2 * new - old for new, old in zip(*layer, strict=True)]
        for layer in zip(dense_by_layer(after), dense_by_layer(before), strict=True)
    ]


def similarity(after: Arena, before: Arena) -> np.ndarray:
    """Mean over layers of the cosines of 2 after - before without what they have in common."""
    return np.mean([cosines(updates) for updates in headings(after, before)], axis=0)


def cosines(updates: list[np.ndarray]) -> np.ndarray:
    """Those beside what updates share, of few above the mean pair."""
    few = len(updates) < 10
    found = cosines_beside_the_common(updates, [0] * len(updates))
    if not few:
        return found
    pairs = [found[k, other] for k in range(len(updates)) for other in range(k)]
    common = np.mean(pairs)
    return np.clip((found - common) / (1 - common), -1, 1)


def cosines_beside_the_common(updates: list[np.ndarray], groups: Sequence[int]) -> np.ndarray:
    """Cosines of what is left of unit vectors at right angles to the mean of those in the same group."""
    units = [update / np.linalg.norm(update) for update in updates]
    left = []
    for unit, group in zip(units, groups, strict=True):
        mean = np.mean([other for other, its in zip(units, groups, strict=True) if its == group], axis=0)
        left.append(unit - (unit @ mean) / (mean @ mean) * mean)
    units = [vector / np.linalg.norm(vector) for vector in left]
    return np.array([[one @ other for other in units] for one in units])


def layer_grams(arena: Arena, before: Arena | None = None) -> list[np.ndarray]:
    """Per layer the inner products of the dense updates, or of where clients were heading from `before`."""
    layers = dense_by_layer(arena) if before is None else headings(arena, before)
    return [np.array([[one @ other for other in updates] for one in updates]) for updates in layers]


def centred_cosine(updates: list[np.ndarray]) -> np.ndarray:
    """Cosines of vectors after subtracting their mean."""
    stacked = np.stack(updates)
    centred = stacked - stacked.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit @ unit.T


def mutual_neighbours(similarity_KK: np.ndarray, neighbours: int, power: float) -> np.ndarray:
    """Clients that list each other among their `neighbours` most similar ones.

    The weight is the similarity over the geometric mean of the two clients' largest, to the power.
    """
    num_clients = len(similarity_KK)
    largest = [max(similarity_KK[k, j] for j in range(num_clients) if j != k) for k in range(num_clients)]
    lists = []
    for k in range(num_clients):
        others = sorted(
            (other for other in range(num_clients) if other != k), key=lambda other: -similarity_KK[k, other]
        )
        lists.append({other for other in others[:neighbours] if similarity_KK[k, other] > 0})
    adjacency = np.zeros_like(similarity_KK)
    for k in range(num_clients):
        for other in lists[k]:
            if k in lists[other]:
                scale = np.sqrt(largest[k]) * np.sqrt(largest[other])
                adjacency[k, other] = (similarity_KK[k, other] / scale) ** power
    return adjacency


def weighted_mean(rows: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum w x / sum w, one client after the other."""
    total = torch.zeros_like(rows[0])
    for row, weight in zip(rows, weights, strict=True):
        total = total + weight * row
    return total / sum(weights)
