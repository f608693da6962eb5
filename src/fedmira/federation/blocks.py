"""Blocks of layers: which block a layer is in, relations that fade with depth, and graphs by block as one tensor.

Knows nothing about how graphs are learned or used. Axes: G blocks, K clients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fedmira.federation.graph import Graph


def block_of(layer: str) -> str:
    """Return the block of a layer: its name up to its first number, else the whole name.

    >>> block_of("model.layers.12.self_attn.q_proj"), block_of("lm_head")
    ('model.layers.12', 'lm_head')
    """
    found = re.match(r"\D*\d+", layer)
    return found.group() if found else layer


def places(layers: Sequence[str]) -> dict[str, int]:
    """Return the block of each layer as a number, in order of first appearance.

    >>> places(["h.0.a", "h.0.b", "h.1.a"])
    {'h.0.a': 0, 'h.0.b': 0, 'h.1.a': 1}
    """
    order = {block: place for place, block in enumerate(dict.fromkeys(map(block_of, layers)))}
    return {layer: order[block_of(layer)] for layer in layers}


def to_blocks(graph: Graph, layers: Sequence[str]) -> torch.Tensor:
    """Return the adjacency of each block, (G, K, K) float64; the layers of a block must share one."""
    of_block = {place: graph.by_layer.get(layer, graph.adjacency_KK) for layer, place in places(layers).items()}
    return torch.from_numpy(np.stack(list(of_block.values())))


def from_blocks(adjacency_GKK: torch.Tensor, layers: Sequence[str], name: str) -> Graph:
    """Return the graph with the adjacency of each block, by layer only where they differ: `to_blocks` undone."""
    distinct = {matrix_KK.tobytes(): matrix_KK for matrix_KK in adjacency_GKK.cpu().numpy()}
    if len(distinct) == 1:
        return Graph(next(iter(distinct.values())), name)
    of_block = [distinct[matrix_KK.tobytes()] for matrix_KK in adjacency_GKK.cpu().numpy()]
    by_layer = {layer: of_block[place] for layer, place in places(layers).items()}
    return Graph(np.mean(list(by_layer.values()), axis=0), name, {}, by_layer)


def faded(graph: Graph, layers: Sequence[str], depth: float) -> Graph:
    """Return the graph whose weights fall from block to block, to 1 - depth of what they were in the last one.

    tau L grows with the weights, so block b of G is mixed with strength * (1 - depth * b / (G - 1)): shallow blocks are
    shared, deep ones stay personal (FedTreeLoRA, ICML 2026, shares less and less from block to block by cutting a tree
    deeper). Of a single block nothing fades, and 0 is the graph itself.
    """
    of_block = places(layers)
    last = max(of_block.values(), default=0)
    if not depth or not last:
        return graph
    left_G = 1.0 - depth * torch.arange(last + 1, dtype=torch.float64) / last
    by_block = from_blocks(to_blocks(graph, layers) * left_G[:, None, None], layers, graph.name)
    return replace(by_block, provenance={**graph.provenance, "depth": depth})
