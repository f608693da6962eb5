"""Graphs that are learned while a run goes on, by kind: those from the adapters here, others in `asked_graphs`.

Knows nothing about how adapters are trained or mixed. Axes: K clients, C those compared, G blocks of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from fedmira.config.graph import GraphConfig
from fedmira.federation import drawing
from fedmira.federation.asked_graphs import ASKED
from fedmira.federation.blocks import block_of
from fedmira.federation.drawing import Drawn
from fedmira.federation.graph import Graph, Matrix, explained, validated
from fedmira.federation.learning import (
    Learner,
    LearnerBuilder,
    Memory,
    Seen,
    compared,
    everyone_joined,
    filled_up,
    nothing_compared,
    settled_share,
)
from fedmira.federation.ranks import trimmed
from fedmira.federation.similarity import (
    MINIMUM_CLIENTS,
    heading_grams,
    low_rank_pairs,
    moved,
    mutual_neighbours,
    over_layers,
    rank_groups,
    similarity,
    strangers,
    update_cosines,
)
from fedmira.federation.simplex import collaboration
from fedmira.types import Arena, Clients


def learner(config: GraphConfig, clients: Clients) -> Learner:
    """Return the learner of `config.kind`.

    Whatever the kind, what is learned counts for as much as it agrees with what was learned before; for the rest
    everyone seen is joined with everyone, or nobody (`config.warmup`): clients that have not yet learned what sets them
    apart look alike by chance, and chance does not repeat itself. The provenance says the round, that agreement, how
    much the learned graph counts, and what the server learns by it.
    """
    of_kind = {**_FROM_ADAPTERS, **ASKED}[config.kind](config, clients)
    num_clients = len(clients.names)

    def init(initial: Arena) -> dict[str, torch.Tensor]:
        return {**of_kind.init(initial), **nothing_compared(num_clients)}

    def learn(memory: Memory, seen: Seen) -> tuple[dict[str, torch.Tensor], Graph]:
        if clients.ranks_K is not None:
            # clients of a smaller rank started from what fits it
            started_KP = trimmed(seen.starts.layout, seen.starts.values_KP, clients.ranks_K)
            seen = seen._replace(starts=seen.starts.replace(started_KP))
        learned, graph = of_kind.learn(memory, seen)
        learned |= compared(memory, graph.adjacency_KK, of_kind.looked_at(memory, seen))
        share, found = settled_share(learned, config.settled)
        details: dict[str, Any] = {**found, "memory": config.memory, "round": seen.round, "learned_share": share}
        if share < 1:
            details["warmup"] = config.warmup
            degree = everyone_joined(learned, len(seen.clients)) if config.warmup == "uniform" else 0.0
            graph = filled_up(graph, share, seen.clients, degree)
        return learned, explained(replace(graph, provenance={**graph.provenance, **details}))

    return Learner(init, learn, of_kind.ask, of_kind.hear)


_Draw: TypeAlias = Callable[[Matrix, list[int], GraphConfig, Clients], Drawn]
"""From the similarities among clients that were seen, and who they are, to the weights between them."""


def _drawn(
    draw: _Draw, similarity_KK: Matrix, seen: Seen, config: GraphConfig, clients: Clients
) -> tuple[Matrix, Mapping[str, Any]]:
    """Return what `draw` makes of the similarities among the clients that moved, (K, K); nothing if they are too few.

    Of a client that never moved, B = 0 say, nothing is known. Its similarities of 0 are those of no pair: where
    strangers lie below 0 it would look like everybody's next of kin.
    """
    weights_KK = np.zeros_like(similarity_KK)
    there = [k for k in seen.clients if similarity_KK[k, k] > 0]
    if len(there) < MINIMUM_CLIENTS:
        return weights_KK, {}
    block = np.ix_(there, there)
    weights_KK[block], facts = draw(similarity_KK[block], there, config, clients)
    return weights_KK, facts


def _no_grams(initial: Arena) -> dict[str, torch.Tensor]:
    num_layers, num_clients = len(low_rank_pairs(initial.layout)), initial.num_clients
    return {"grams": torch.zeros(num_layers, num_clients, num_clients, dtype=torch.float64)}


def _inner_products(memory: Memory, seen: Seen) -> tuple[dict[str, torch.Tensor], list[Matrix]]:
    """Return the inner products to remember, (L, K, K), and those of each layer among the clients seen, (C, C)."""
    before_LKK = memory["grams"].cpu().numpy()
    grams_LKK = heading_grams(before_LKK, seen.uploads, seen.starts, seen.clients, seen.returned)
    block = np.ix_(seen.clients, seen.clients)
    return {"grams": torch.from_numpy(grams_LKK)}, [gram_KK[block] for gram_KK in grams_LKK]


def _alike_by_rank(seen: Seen, clients: Clients) -> tuple[int, ...] | None:
    """Return the groups of the clients seen whose updates are alike because of their ranks, (C,).

    A client of small rank starts from less of a mixture and learns more slowly, so at first its updates hold more of
    what everybody has to learn. Without taking that away, graphs join clients of like rank.
    """
    return None if clients.ranks_K is None else rank_groups([clients.ranks_K[k] for k in seen.clients])


def _from_adapters(draw: _Draw) -> LearnerBuilder:
    """Return the builder of learners that draw a graph from the similarities of where clients were heading.

    The similarities are a moving average over rounds, see `similarity`; `draw` gets those among the clients that were
    seen and moved, and who they are. Others have no edges, and fewer than three give no graph.
    """

    def build(config: GraphConfig, clients: Clients) -> Learner:
        num_clients = len(clients.names)

        def init(initial: Arena) -> dict[str, torch.Tensor]:
            return {"similarity": torch.zeros(num_clients, num_clients, dtype=torch.float64), **_no_grams(initial)}

        def learn(memory: Memory, seen: Seen) -> tuple[dict[str, torch.Tensor], Graph]:
            grams, among_CC = _inner_products(memory, seen)
            before_KK = memory["similarity"].cpu().numpy()
            now_CC = similarity(among_CC, _alike_by_rank(seen, clients))
            now_KK = moved(before_KK, now_CC, seen.clients, seen.returned, config.memory)
            weights_KK, facts = _drawn(draw, now_KK, seen, config, clients)
            names = ("neighbours", "power", "within_clusters", "spread")
            used = {name: getattr(config, name) for name in names if config.uses(name)}
            return {"similarity": torch.from_numpy(np.array(now_KK)), **grams}, validated(
                weights_KK, num_clients, config.kind, {**used, **facts}
            )

        return Learner(init, learn)

    return build


def _neighbours(similarity_CC: Matrix, ids: list[int], config: GraphConfig, clients: Clients) -> Drawn:
    clear = drawing.inside_clusters(similarity_CC, drawing.SUBSTANTIAL)
    # clear clusters stand far above 0; only kin that noise hides may lie below it
    least = 0.0 if clear.weights_CC.any() else strangers(similarity_CC)
    # of pairs at 0 nothing is known: they were never compared
    above_CC = np.where(similarity_CC != 0, similarity_CC - least, 0.0)
    weights_CC = mutual_neighbours(above_CC, config.neighbours, config.power)
    facts = {"strangers": least}
    if not config.within_clusters:
        return Drawn(weights_CC, facts)
    return Drawn(drawing.kept_within(clear, weights_CC), {**clear.facts, **facts})


def _gram_layers(config: GraphConfig, clients: Clients) -> Learner:
    """As `gram`, but each block has similarities of its own, drawn by `pooling` towards those of all layers."""
    num_clients = len(clients.names)

    def blocks_of(arena: Arena) -> dict[str, list[int]]:
        """The low-rank pairs of each block, by their place."""
        blocks: dict[str, list[int]] = {}
        for place, (spec_a, _) in enumerate(low_rank_pairs(arena.layout)):
            blocks.setdefault(block_of(spec_a.layer), []).append(place)
        return blocks

    def init(initial: Arena) -> dict[str, torch.Tensor]:
        shape = (len(blocks_of(initial)), num_clients, num_clients)
        return {"similarity": torch.zeros(shape, dtype=torch.float64), **_no_grams(initial)}

    def learn(memory: Memory, seen: Seen) -> tuple[dict[str, torch.Tensor], Graph]:
        similarity_GKK = memory["similarity"].cpu().numpy()
        blocks = blocks_of(seen.uploads)
        grams, among_CC = _inner_products(memory, seen)
        groups_C = _alike_by_rank(seen, clients)
        of_layer = [update_cosines(gram_CC, groups_C) for gram_CC in among_CC]
        everywhere_CC = over_layers(of_layer)
        of_blocks = [over_layers([of_layer[place] for place in places]) for places in blocks.values()]
        # where a block says nothing of a pair, all layers speak for it
        now = [
            np.where(block_CC != 0, (1 - config.pooling) * block_CC + config.pooling * everywhere_CC, everywhere_CC)
            for block_CC in of_blocks
        ]
        similarity_GKK = np.stack(
            [
                moved(before_KK, now_CC, seen.clients, seen.returned, config.memory)
                for before_KK, now_CC in zip(similarity_GKK, now, strict=True)
            ]
        )
        of_block: dict[str, Matrix] = {}
        facts_of_blocks: list[Mapping[str, Any]] = []
        for block, similarity_KK in zip(blocks, similarity_GKK, strict=True):
            of_block[block], facts = _drawn(_neighbours, similarity_KK, seen, config, clients)
            facts_of_blocks.append(facts)
        layers = seen.uploads.layout.layers
        # a layer without a low-rank pair follows the mean of those that have one
        mean_KK = np.mean([of_block[block_of(layer)] for layer in layers if block_of(layer) in of_block], axis=0)
        names = ("neighbours", "power", "within_clusters", "pooling")
        details = {name: getattr(config, name) for name in names}
        details |= {name: [facts[name] for facts in facts_of_blocks] for name in facts_of_blocks[0]}
        graph = validated(mean_KK, num_clients, config.kind, {**details, "blocks": len(blocks)})
        by_layer = {layer: of_block.get(block_of(layer), graph.adjacency_KK) for layer in layers}
        return {"similarity": torch.from_numpy(similarity_GKK), **grams}, replace(graph, by_layer=by_layer)

    return Learner(init, learn)


_FROM_ADAPTERS: Mapping[str, LearnerBuilder] = {
    "gram": _from_adapters(_neighbours),
    "gram_layers": _gram_layers,
    "mtrl": _from_adapters(
        lambda s_CC, seen, config, clients: Drawn(
            mutual_neighbours(drawing.task_correlation(s_CC), config.neighbours, config.power)
        )
    ),
    "kalofolias": _from_adapters(
        lambda s_CC, seen, config, clients: Drawn(
            drawing.symmetric(drawing.smooth_weights(drawing.distances_from_cosines(s_CC), config.neighbours))
        )
    ),
    "pfedgraph": _from_adapters(
        lambda s_CC, seen, config, clients: Drawn(
            drawing.symmetric(collaboration(s_CC, [clients.num_examples_K[k] for k in seen], config.spread))
        )
    ),
    "clusters": _from_adapters(lambda s_CC, seen, config, clients: drawing.inside_clusters(s_CC)),
}
