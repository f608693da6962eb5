"""Mixing of products with the products formed: dense matrices, one client after the other. Slow and obvious.

Axes: K clients, R rank, I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmira.types import Arena


def dense(arena: Arena, row: int) -> dict[str, torch.Tensor]:
    """Per layer B A of one client without the scaling, (O, I) float64."""
    tensors = {spec.name: arena.view(spec)[row].double() for spec in arena.layout.specs}
    return {layer: tensors[f"{layer}.lora_b"] @ tensors[f"{layer}.lora_a"] for layer in arena.layout.layers}


def mixed(arena: Arena, weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Per layer sum_k w_k B_k A_k, (O, I) float64."""
    total = {layer: torch.zeros_like(value) for layer, value in dense(arena, 0).items()}
    for row, weight in enumerate(weights):
        for layer, value in dense(arena, row).items():
            total[layer] += weight * value
    return total


def nearest_of_rank(matrix_OI: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix of this rank that comes nearest (Eckart and Young)."""
    u, values, v = torch.linalg.svd(matrix_OI, full_matrices=False)
    return u[:, :rank] @ torch.diag(values[:rank]) @ v[:rank]
