"""In which form adapters are mixed, and compared: their factors, their products, or B over one A that nobody trains.

(B M, M^-1 A) is the same update as (B, A), so what is close in one form may be far apart in another: distances and
disagreement belong to the form that is mixed. Knows nothing about rounds, graphs or who takes part.

Axes: K clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from fedmira.federation.graph import Graph, Matrix, laplacian, parts
from fedmira.federation.mixing import Mixer, by_group, by_layer, energy, keep, matrix_of
from fedmira.federation.products import by_least_squares, in_products
from fedmira.federation.similarity import layer_grams, low_rank_pairs, row_distances, squared_distances
from fedmira.types import Arena


class Form(NamedTuple):
    """What a step on the client axis is applied to."""

    of: Callable[[Mixer], Mixer]
    """From the step on rows of numbers to the same step in this form."""
    distances: Callable[[Arena], Matrix]
    """Squared distances between clients in this form, (K, K)."""
    energy: Callable[[Graph, Arena], float]
    """tr(Theta^T L Theta), Eq. (3) of MIRA, in this form."""
    crossing: frozenset[str] | None = None
    """Groups of tensors that are trained and cross; None means all."""


def form(mixing: str, ranks_K: Sequence[int] | None = None) -> Form:
    """Return the form that `method.mixing` names.

    `products` takes for each client the pair of its rank that comes nearest to the mixed product, turned towards its
    own; `least_squares` keeps its A and takes the best B; with `shared_a` A is the initial one of all, so mixing B
    mixes products exactly. Clients of unequal rank are as far apart as their products are, whatever is mixed: what one
    lacks of A says nothing about it.

    Args:
        mixing: `factors`, `products`, `least_squares` or `shared_a`; `auto` is `products` where ranks differ, else
            `factors`.
        ranks_K: rank of each client; None means that of the arena.
    """
    unequal = len(set(ranks_K or ())) > 1
    distances = _product_distances if unequal else _row_distances
    match "products" if mixing == "auto" and unequal else mixing:
        case "products":
            mix = partial(in_products, ranks_K=ranks_K)
            return Form(lambda step: _on_products(step, mix), _product_distances, _product_energy)
        case "least_squares":
            return Form(lambda step: _on_products(step, by_least_squares), _product_distances, _product_energy)
        case "shared_a":
            moving = frozenset({"lora_b"})
            # A is at the client already, so not even a digit of it may move
            return Form(lambda step: by_group({"lora_a": keep(), "lora_b": step}), distances, energy, moving)
        case _:
            return Form(lambda step: step, distances, energy)


def _on_products(step: Mixer, mix: Callable[[Matrix], Mixer]) -> Mixer:
    """Return the mixer that does to products, by `mix`, what `step` does to rows of numbers."""

    def apply(arena: Arena) -> Arena:
        mixers: dict[bytes, Mixer] = {}
        of_layer: dict[str, Mixer] = {}
        for layer in arena.layout.layers:
            matrix_KK = matrix_of(step, arena.num_clients, layer)
            of_layer[layer] = mixers.setdefault(matrix_KK.tobytes(), mix(matrix_KK))
        return by_layer(of_layer)(arena)

    return apply


def _row_distances(arena: Arena) -> Matrix:
    """Return |theta_k - theta_l|^2, (K, K)."""
    return row_distances(arena.values_KP)


def _product_distances(arena: Arena) -> Matrix:
    """Return |dW_k - dW_l|^2 over all layers, (K, K), without forming the products."""
    return squared_distances(np.sum(layer_grams(arena), axis=0))


def _product_energy(graph: Graph, arena: Arena) -> float:
    """Return sum_layers tr(L G) = 1/2 sum_kl a_kl |dW_k - dW_l|^2."""
    layers = [spec_a.layer for spec_a, _ in low_rank_pairs(arena.layout)]
    grams = dict(zip(layers, layer_grams(arena), strict=True))
    total = 0.0
    for part, own in parts(graph):
        gram_KK = np.sum([grams[layer] for layer in own or layers if layer in grams], axis=0)
        total += float((laplacian(part) * gram_KK).sum())
    return max(total, 0.0)
