"""Which clients are alike, seen from their adapters: the gauge-free Gram matrix of low-rank products, and its graph.

(B M, M^-1 A) is the same update as (B, A), so factors must not be compared with each other; products can be, without
ever being formed. Knows nothing about how the adapters were trained. The Gram matrix is linear algebra over an arena;
`tests/reference/mixing_twin.py` forms the products.

Axes: K clients, C those compared, R rank, I and O in and out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmira.config import GraphConfig
from fedmira.errors import ConfigError
from fedmira.federation.graph import Graph, Matrix, validated
from fedmira.types import Arena, Layout, TensorSpec

MINIMUM_CLIENTS = 3
"""Two centred vectors always have cosine -1: fewer than three say nothing."""
_NEGLIGIBLE = 1e-12
"""A centred squared norm below this share of the largest plain one is rounding."""
_BLOCK_ELEMENTS = 1 << 24


def low_rank_pairs(layout: Layout) -> tuple[tuple[TensorSpec, TensorSpec], ...]:
    """Return the (lora_a, lora_b) specs of every layer that has both.

    Raises:
        ConfigError: the adapter has no low-rank pair, so `gram` means nothing for it.
    """
    by_layer = {spec.layer: spec for spec in layout.specs if spec.group == "lora_a"}
    pairs = tuple((by_layer[s.layer], s) for s in layout.specs if s.group == "lora_b" and s.layer in by_layer)
    if not pairs:
        raise ConfigError(
            f"method.graph.kind = gram compares low-rank products, but the adapter has the groups {list(layout.groups)}"
            "; use kind: labels, given, uniform or random"
        )
    return pairs


def product_gram(arena: Arena, ids: Sequence[int] | None = None) -> Matrix:
    """Return G_kl = <dW_k, dW_l> = sum over layers of s^2 tr((B_k^T B_l)(A_l A_k^T)), (C, C) in float64.

    Cost C^2 R^2 (I + O) per layer, without forming any product; equals the inner products of the dense updates and
    does not change when a client's factors are turned by any invertible M.

    Args:
        arena: lora_a of shape (R, I) and lora_b of shape (O, R) per layer.
        ids: the clients to compare, all K if left out.
    """
    rows = list(range(arena.num_clients)) if ids is None else list(ids)
    num_rows = len(rows)
    gram_CC = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=arena.values_KP.device)
    for spec_a, spec_b in low_rank_pairs(arena.layout):
        rank = spec_a.shape[0]
        lora_a_CRI = arena.view(spec_a)[rows].double()
        lora_b_CRO = arena.view(spec_b)[rows].double().transpose(1, 2)
        stacked_a, stacked_b = lora_a_CRI.flatten(0, 1), lora_b_CRO.flatten(0, 1)
        step = max(1, _BLOCK_ELEMENTS // max(1, num_rows * rank * rank))
        for start in range(0, num_rows, step):
            some = slice(start * rank, (start + step) * rank)
            paired = (stacked_b[some] @ stacked_b.T) * (stacked_a[some] @ stacked_a.T)
            gram_CC[start : start + step] += paired.view(-1, rank, num_rows, rank).sum((1, 3))
    gram = np.asarray(gram_CC.cpu().numpy()) * arena.layout.scaling**2
    return np.asarray((gram + gram.T) / 2)


def centred_cosine(gram_CC: Matrix) -> Matrix:
    """Return the cosines of the updates after removing their mean: H G H, H = I - 1 1^T / C, scaled to unit diagonal.

    What all clients learn alike (the format of the answers) would make everyone similar; centring removes it. Rows of
    clients that equal the mean are 0, and so is everything when fewer than three clients are compared. Never NaN.
    """
    if len(gram_CC) < MINIMUM_CLIENTS:
        return np.zeros_like(gram_CC)
    centred_CC = gram_CC - gram_CC.mean(axis=0)
    centred_CC = centred_CC - centred_CC.mean(axis=1, keepdims=True)
    squares_C = np.diagonal(centred_CC)
    there_C = squares_C > _NEGLIGIBLE * max(float(np.diagonal(gram_CC).max()), np.finfo(np.float64).tiny)
    inverse_C = np.where(there_C, 1.0 / np.sqrt(np.where(there_C, squares_C, 1.0)), 0.0)
    cosine_CC = np.clip(centred_CC * inverse_C[:, None] * inverse_C[None, :], -1.0, 1.0)
    return np.asarray((cosine_CC + cosine_CC.T) / 2)


def observe(previous_KK: Matrix, arena: Arena, ids: Sequence[int], memory: float) -> Matrix:
    """Return the similarities after comparing the clients `ids`, (K, K); pairs not among them stay as they were.

    A pair seen before moves to `memory * previous + (1 - memory) * now`; a new pair takes what is seen now. 0 means
    never compared.
    """
    rows = list(ids)
    if len(rows) < MINIMUM_CLIENTS:
        return previous_KK
    now_CC = centred_cosine(product_gram(arena, rows))
    before_CC = previous_KK[np.ix_(rows, rows)]
    updated_KK = previous_KK.copy()
    updated_KK[np.ix_(rows, rows)] = np.where(before_CC != 0, memory * before_CC + (1 - memory) * now_CC, now_CC)
    return np.asarray(updated_KK)


def mutual_neighbours(similarity_KK: Matrix, neighbours: int, power: float) -> Matrix:
    """Return the adjacency max(0, similarity)^power between clients that are among each other's nearest `neighbours`.

    Clients tied with the last neighbour count as well, so that the result does not depend on their order.
    """
    positive_KK = np.maximum(similarity_KK, 0.0)
    np.fill_diagonal(positive_KK, 0.0)
    count = min(neighbours, max(len(positive_KK) - 1, 1))
    least_K = np.partition(positive_KK, -count, axis=1)[:, -count]
    near_KK = (positive_KK > 0) & (positive_KK >= least_K[:, None])
    return np.where(near_KK & near_KK.T, positive_KK**power, 0.0)


def gram_graph(similarity_KK: Matrix, config: GraphConfig, round_: int) -> Graph:
    """Return the graph of `kind: gram` after round `round_`: no edges during the warm-up, else mutual neighbours."""
    num_clients = len(similarity_KK)
    details = {"neighbours": config.neighbours, "power": config.power, "memory": config.memory, "round": round_}
    if round_ <= config.warmup_rounds:
        return validated(np.zeros((num_clients, num_clients)), num_clients, "gram", {**details, "warmup": True})
    return validated(mutual_neighbours(similarity_KK, config.neighbours, config.power), num_clients, "gram", details)
