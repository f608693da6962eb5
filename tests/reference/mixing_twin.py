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


def dense_updates(arena: Arena) -> list[np.ndarray]:
    """Per client all products s B A, flattened and joined: what the adapter really adds to the base model."""
    tensors = {spec.name: arena.view(spec).double() for spec in arena.layout.specs}
    layers = dict.fromkeys(spec.layer for spec in arena.layout.specs)
    return [
        np.concatenate(
            [
                (arena.layout.scaling * tensors[f"{layer}.lora_b"][k] @ tensors[f"{layer}.lora_a"][k]).flatten().numpy()
                for layer in layers
            ]
        )
        for k in range(arena.num_clients)
    ]


def product_gram(arena: Arena) -> np.ndarray:
    """Inner products of the dense updates."""
    updates = dense_updates(arena)
    return np.array([[one @ other for other in updates] for one in updates])


def centred_cosine(arena: Arena) -> np.ndarray:
    """Cosines of the dense updates after subtracting their mean."""
    updates = np.stack(dense_updates(arena))
    centred = updates - updates.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit @ unit.T


def mutual_neighbours(similarity_KK: np.ndarray, neighbours: int, power: float) -> np.ndarray:
    """Clients that list each other among their `neighbours` most similar ones, weighted by similarity^power."""
    num_clients = len(similarity_KK)
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
                adjacency[k, other] = similarity_KK[k, other] ** power
    return adjacency


def weighted_mean(rows: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum w x / sum w, one client after the other."""
    total = torch.zeros_like(rows[0])
    for row, weight in zip(rows, weights, strict=True):
        total = total + weight * row
    return total / sum(weights)
