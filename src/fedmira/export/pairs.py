"""Several low-rank pairs of a layer as one pair: B1 A1 + B2 A2 = [B1 | B2] [A1; A2]. Other tools know one pair only.

Knows nothing about files. Axes: P parameters of one adapter, R rank, I/O in and out features.
"""

from __future__ import annotations

import torch

from fedmira.types import PAIRS, Layout


def num_pairs(layout: Layout) -> int:
    """Return how many low-rank pairs a layer has; 0 for other kinds of adapters."""
    return sum(1 for pair in PAIRS if set(pair) <= set(layout.groups))


def joined_pairs(layout: Layout, row_P: torch.Tensor) -> tuple[Layout, torch.Tensor]:
    """Return the adapter with one pair per layer whose product is the sum of the products, and its row.

    The rank of a layer is the sum of the ranks of its pairs; the scaling stays.
    """
    first_a, first_b = PAIRS[0]
    by_place = {(spec.layer, spec.group): spec for spec in layout.specs}
    tensors: list[tuple[str, str, str, tuple[int, ...]]] = []
    columns: list[torch.Tensor] = []
    for layer in layout.layers:
        for factor, (group, axis) in enumerate(((first_a, 0), (first_b, 1))):
            parts = [by_place[layer, pair[factor]] for pair in PAIRS if (layer, pair[factor]) in by_place]
            values = torch.cat([row_P[spec.columns].reshape(spec.shape) for spec in parts], dim=axis)
            tensors.append((f"{layer}.{group}", group, layer, tuple(values.shape)))
            columns.append(values.reshape(-1))
    return Layout.of(tensors, layout.scaling), torch.cat(columns)
