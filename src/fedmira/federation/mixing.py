"""Mixers: what the server does to the adapters. Each maps an arena to an arena and they compose.

A mixer is a small matrix over the client axis, the same for every tensor it touches; `by_group` gives groups of tensors
their own. Rows that a mixer does not move keep their bytes. Knows nothing about rounds, participation or models.

Axes: K clients (rows of the arena handed in), P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch

from fedmira.errors import ConfigError, nearest
from fedmira.federation.graph import (
    Graph,
    Matrix,
    connected_components,
    degrees,
    disagreement,
    laplacian,
    largest_eigenvalue,
    parts,
    subgraph,
)
from fedmira.federation.multiply import multiply
from fedmira.types import Arena, Layout, TensorSpec

Mixer: TypeAlias = Callable[[Arena], Arena]

_LARGEST_CONDITION = 1e10
"""Beyond this ratio of coupling to confidence a component without weak links has reached its mean to the last digits of
float32, and float64 solves no component much further."""
_LEAST_FACTOR = 1e-290
"""Below this one of coupling to confidence products with weights of a graph could become 0."""


def keep() -> Mixer:
    """Return the mixer that changes nothing."""
    return lambda arena: arena


def average(weights_K: Sequence[float]) -> Mixer:
    """Return the mixer that gives every row the weighted mean sum_k w_k theta_k / sum_k w_k, the same bytes in all.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """
    weights = np.asarray(weights_K, dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(f"weights of a mean must be finite, at least 0 and not all 0; given {list(weights_K)[:8]}")

    def mix(arena: Arena) -> Arena:
        mean_1P = multiply(weights[None, :] / weights.sum(), arena.values_KP)
        return arena.replace(mean_1P.expand_as(arena.values_KP).clone())

    return mix


def linear(matrix_KK: Matrix) -> Mixer:
    """Return the mixer Theta <- matrix Theta, in new memory. Rows like the identity's are copied, not multiplied."""
    still_K = (matrix_KK == np.eye(len(matrix_KK))).all(axis=1)
    moving_KK = np.where(still_K[:, None], 0.0, matrix_KK)

    def mix(arena: Arena) -> Arena:
        if still_K.all():
            return arena.replace(arena.values_KP.clone())
        values_KP = multiply(moving_KK, arena.values_KP)
        for k in np.flatnonzero(still_K):
            values_KP[k] = arena.values_KP[k]
        return arena.replace(values_KP)

    return mix


def laplacian_explicit(graph: Graph, tau: float) -> Mixer:
    """Return the published step Theta <- (I - tau L) Theta: Eq. (8) of MIRA with tau = eta * lambda.

    Non-expansive while tau * lambda_max(L) <= 2; a convex combination of clients while tau * largest degree <= 1.

    Raises:
        ConfigError: tau is beyond the stable bound.
    """
    refuse_unstable(graph, tau)
    return _each_layer(graph, lambda part: linear(np.eye(part.num_clients) - tau * laplacian(part)))


def refuse_unstable(graph: Graph, tau: float) -> None:
    """Raise ConfigError if the explicit step with `tau` would grow the disagreement along some direction."""
    # the largest eigenvalue is at most twice the largest degree, which costs nothing
    doubtful = [part for part, _ in parts(graph) if tau * degrees(part).max(initial=0.0) > 1]
    eigenvalue = max((largest_eigenvalue(part) for part in doubtful), default=0.0)
    if tau * eigenvalue > 2 * (1 + 1e-9):
        raise ConfigError(
            f"method.server_lr * method.strength = {tau:g} makes the explicit step diverge: times the largest "
            f"Laplacian eigenvalue {eigenvalue:.4g} of the graph {graph.name!r} among {graph.num_clients} clients it "
            f"is {tau * eigenvalue:.4g}, allowed is at most 2. Set server_lr * strength <= {2 / eigenvalue:.4g}, or "
            "method.name = mira, whose implicit step is stable for any strength"
        )


def laplacian_implicit(
    graph: Graph,
    tau: float,
    confidence_K: Sequence[float],
    revised: Callable[[Graph, Matrix], Matrix] = lambda _part, matrix_KK: matrix_KK,
) -> Mixer:
    """Return the implicit step Theta <- (C + tau L)^-1 C Theta, C = diag(confidence).

    It minimises sum_k c_k ||x_k - theta_k||^2 + tau/2 sum_kl a_kl ||x_k - x_l||^2 (Vanhaesebrouck, Bellet and Tommasi,
    AISTATS 2017), so each row becomes a convex combination of rows for any tau >= 0. A client with confidence 0 takes
    its neighbours' value, one of infinite confidence keeps its own; a component in which nobody has any stays as it is.
    `revised` has the last word on the matrix of each part of the graph, see `welcomed` and `robust`.

    Raises:
        ValueError: tau is negative or not finite, or a confidence is negative or not a number.
    """
    return _each_layer(graph, lambda part: linear(revised(part, implicit_matrix(part, tau, confidence_K))))


def implicit_matrix(graph: Graph, tau: float, confidence_K: Sequence[float]) -> Matrix:
    """Return (C + tau L)^-1 C, (K, K): row-stochastic and non-negative; solved per component by Cholesky in float64.

    In a component tau acts up to 1e10 c / (2 d), c its largest confidence and d its largest degree: parts that only
    edges of some 1e-9 d join end short of their common mean, however large tau is.
    """
    confidence = np.asarray(confidence_K, dtype=np.float64)
    if not (np.isfinite(tau) and tau >= 0 and (confidence >= 0).all()):
        raise ValueError(f"tau must be finite and at least 0, confidences too; given {tau}, {confidence[:8].tolist()}")
    if np.isinf(confidence).any():
        return _around_those_who_stay(graph, tau, confidence)
    matrix_KK = np.eye(graph.num_clients)
    laplacian_KK = laplacian(graph)
    for members in connected_components(graph):
        block = np.ix_(members, members)
        highest = float(confidence[list(members)].max())
        if len(members) == 1 or highest == 0 or tau == 0:
            continue
        # only tau / c matters: scaling keeps long unseen components, whose c underflows, solvable
        relative = confidence[list(members)] / highest
        coupling = laplacian_KK[block]
        # the least moves nobody, but those who have no confidence at all still follow the others
        factor = max(min(tau, _LARGEST_CONDITION / (2 * coupling.max()) * highest) / highest, _LEAST_FACTOR)
        lower = torch.linalg.cholesky(torch.from_numpy(np.diag(relative) + factor * coupling))
        # the factor has no positive weight off its diagonal, so substitution adds and never subtracts: no sign is lost
        solved = torch.cholesky_solve(torch.from_numpy(np.diag(relative)), lower).numpy()
        matrix_KK[block] = solved / solved.sum(axis=1, keepdims=True)
    return matrix_KK


def welcomed(matrix_KK: Matrix, graph: Graph, confidence_K: Sequence[float]) -> Matrix:
    """Return the step that gives those of whom nothing is known the mean of all uploads, weighted by confidence.

    They are the clients in whose component nobody has any confidence, which `implicit_matrix` leaves as it is. An
    infinite confidence counts as 1. If nobody has any, everything stays as it is.
    """
    confidence = np.nan_to_num(np.asarray(confidence_K, dtype=np.float64), posinf=1.0)
    strangers = [k for ids in connected_components(graph) if not confidence[list(ids)].any() for k in ids]
    if not strangers or not confidence.any():
        return matrix_KK
    # of long unseen clients confidences are tiny, and only their ratios matter
    relative_K, welcoming_KK = confidence / confidence.max(), matrix_KK.copy()
    welcoming_KK[strangers] = relative_K / relative_K.sum()
    return welcoming_KK


def _around_those_who_stay(graph: Graph, tau: float, confidence_K: Matrix) -> Matrix:
    """Return `implicit_matrix` where some confidences are infinite.

    To a neighbour k those clients are constants: its own c_k theta_k + tau sum_l a_kl theta_l over them, divided by
    c_k + tau sum_l a_kl, is a value of that confidence in the graph among the others.
    """
    stay, move = np.flatnonzero(np.isinf(confidence_K)), np.flatnonzero(np.isfinite(confidence_K))
    matrix_KK, brought_KK = np.eye(graph.num_clients), np.diag(np.where(np.isinf(confidence_K), 0.0, confidence_K))
    brought_KK[:, stay] = tau * graph.adjacency_KK[:, stay]
    total_K = brought_KK.sum(axis=1)
    brought_KK = np.where(total_K[:, None] > 0, brought_KK / np.where(total_K > 0, total_K, 1.0)[:, None], matrix_KK)
    matrix_KK[move] = implicit_matrix(subgraph(graph, move.tolist()), tau, total_K[move]) @ brought_KK[move]
    return matrix_KK


def chain(*mixers: Mixer) -> Mixer:
    """Return the mixer that applies `mixers` from left to right."""

    def mix(arena: Arena) -> Arena:
        for mixer in mixers:
            arena = mixer(arena)
        return arena

    return mix


def by_group(mixers: Mapping[str, Mixer]) -> Mixer:
    """Return the mixer that treats each group of tensors by its own mixer; every group must be named.

    Raises:
        ConfigError: `mixers` names an unknown group or leaves one out (when applied).
    """

    def mix(arena: Arena) -> Arena:
        groups = arena.layout.groups
        for name in [*mixers, *groups]:
            if name not in groups or name not in mixers:
                raise ConfigError(
                    f"mixers for {sorted(mixers)}, but the adapter has {sorted(groups)}{nearest(name, groups)}"
                )
        values_KP = arena.values_KP.clone()
        for group, mixer in mixers.items():
            part, columns = _part(arena, [spec for spec in arena.layout.specs if spec.group == group])
            values_KP[:, columns] = mixer(part).values_KP
        return arena.replace(values_KP)

    return mix


def by_layer(mixers: Mapping[str, Mixer]) -> Mixer:
    """Return the mixer that treats each adapted layer by its own mixer; layers may share one.

    Raises:
        ConfigError: a layer of the adapter is not named (when applied).
    """

    def mix(arena: Arena) -> Arena:
        for layer in arena.layout.layers:
            if layer not in mixers:
                raise ConfigError(
                    f"mixers for the layers {sorted(mixers)[:4]}, ..., but the adapter has {layer!r}"
                    f"{nearest(layer, tuple(mixers))}"
                )
        values_KP = arena.values_KP.clone()
        for mixer in dict.fromkeys(mixers[layer] for layer in arena.layout.layers):
            part, columns = _part(arena, [spec for spec in arena.layout.specs if mixers[spec.layer] is mixer])
            values_KP[:, columns] = mixer(part).values_KP
        return arena.replace(values_KP)

    return mix


def _each_layer(graph: Graph, mixer_of: Callable[[Graph], Mixer]) -> Mixer:
    """Return the mixer of `graph`: by layer where the graph is."""
    if not graph.by_layer:
        return mixer_of(graph)
    mixers: dict[str, Mixer] = {}
    for part, layers in parts(graph):
        mixers |= dict.fromkeys(layers, mixer_of(part))
    return by_layer(mixers)


def step_numbers(
    graph: Graph, mixer: Mixer, before: Arena, after: Arena, energies: Callable[[Graph, Arena], float] | None = None
) -> dict[str, float]:
    """Return what people look at after one step on `graph`: disagreement energies, edges, degrees, mixing share.

    `energies` measures disagreement where it is not that of the numbers themselves, see `forms`. `mixing_share` is the
    mean over rows of the absolute weight that comes from other clients: 0 alone, 1 - 1/K at the mean of everybody.
    """
    shares, measured = [], energies or energy
    for _, layers in parts(graph):
        matrix_KK = matrix_of(mixer, graph.num_clients, layers[0] if layers else "")
        others_KK = np.abs(matrix_KK - np.diag(np.diagonal(matrix_KK)))
        shares += [float(others_KK.sum(axis=1).mean())] * max(1, len(layers))
    return {
        "disagreement_before": measured(graph, before),
        "disagreement_after": measured(graph, after),
        "edges": float(graph.num_edges),
        "mean_degree": float(degrees(graph).mean()),
        "max_degree": float(degrees(graph).max()),
        "mixing_share": float(np.mean(shares)),
    }


def energy(graph: Graph, arena: Arena) -> float:
    """Return tr(Theta^T L Theta), Eq. (3) of MIRA, each layer on its own graph where they differ."""
    if not graph.by_layer:
        return disagreement(graph, arena.values_KP)
    total = 0.0
    for part, layers in parts(graph):
        own = _part(arena, [spec for spec in arena.layout.specs if spec.layer in layers])[0]
        total += disagreement(part, own.values_KP)
    return total


def matrix_of(mixer: Mixer, num_clients: int, layer: str = "") -> Matrix:
    """Return the (K, K) matrix of a mixer that treats all tensors (of `layer`) alike, by mixing the identity.

    >>> matrix_of(average([1.0, 3.0]), 2).tolist()
    [[0.25, 0.75], [0.25, 0.75]]
    """
    layout = Layout((TensorSpec("identity", "identity", layer, (num_clients,), 0),))
    return np.asarray(mixer(Arena(layout, torch.eye(num_clients, dtype=torch.float64))).values_KP.numpy())


def _part(arena: Arena, wanted: Sequence[TensorSpec]) -> tuple[Arena, torch.Tensor]:
    """Return the wanted tensors, closed up and copied, and the columns of the arena they come from."""
    layout = Layout.of(((s.name, s.group, s.layer, s.shape) for s in wanted), arena.layout.scaling)
    chosen = torch.cat([torch.arange(spec.offset, spec.offset + spec.size) for spec in wanted])
    return Arena(layout, arena.values_KP[:, chosen]), chosen
