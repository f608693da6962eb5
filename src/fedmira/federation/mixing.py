"""Mixers: what the server does to the adapters. Each maps an arena to an arena and they compose.

A mixer is a small matrix over the client axis, the same for every tensor it touches; `by_group` gives groups of tensors
their own. Rows that a mixer does not move keep their bytes. Knows nothing about rounds, participation or models.

Axes: K clients (rows of the arena handed in), P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
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
)
from fedmira.types import Arena, Layout, TensorSpec

Mixer: TypeAlias = Callable[[Arena], Arena]

_LARGEST_CONDITION = 1e10
"""Beyond this ratio of coupling to confidence a component has reached its mean to the last digits of float32."""
_BLOCK_PARAMETERS = 1 << 20


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
        mean_1P = _combine(weights[None, :] / weights.sum(), arena.values_KP)
        return arena.replace(mean_1P.expand_as(arena.values_KP).clone())

    return mix


def linear(matrix_KK: Matrix) -> Mixer:
    """Return the mixer Theta <- matrix Theta, in new memory. Rows like the identity's are copied, not multiplied."""
    moved = np.flatnonzero((matrix_KK != np.eye(len(matrix_KK))).any(axis=1))

    def mix(arena: Arena) -> Arena:
        values_KP = arena.values_KP.clone()
        if moved.size:
            values_KP[torch.from_numpy(moved)] = _combine(matrix_KK[moved], arena.values_KP)
        return arena.replace(values_KP)

    return mix


def laplacian_explicit(graph: Graph, tau: float) -> Mixer:
    """Return the published step Theta <- (I - tau L) Theta: Eq. (8) of MIRA with tau = eta * lambda.

    Non-expansive while tau * lambda_max(L) <= 2; a convex combination of clients while tau * largest degree <= 1.

    Raises:
        ConfigError: tau is beyond the stable bound.
    """
    refuse_unstable(graph, tau)
    return linear(np.eye(graph.num_clients) - tau * laplacian(graph))


def refuse_unstable(graph: Graph, tau: float) -> None:
    """Raise ConfigError if the explicit step with `tau` would grow the disagreement along some direction."""
    eigenvalue = largest_eigenvalue(graph)
    if tau * eigenvalue > 2 * (1 + 1e-9):
        raise ConfigError(
            f"method.server_lr * method.strength = {tau:g} makes the explicit step diverge: times the largest "
            f"Laplacian eigenvalue {eigenvalue:.4g} of the graph {graph.name!r} among {graph.num_clients} clients it "
            f"is {tau * eigenvalue:.4g}, allowed is at most 2. Set server_lr * strength <= {2 / eigenvalue:.4g}, or "
            "method.name = mira, whose implicit step is stable for any strength"
        )


def laplacian_implicit(graph: Graph, tau: float, confidence_K: Sequence[float]) -> Mixer:
    """Return the implicit step Theta <- (C + tau L)^-1 C Theta, C = diag(confidence).

    It minimises sum_k c_k ||x_k - theta_k||^2 + tau/2 sum_kl a_kl ||x_k - x_l||^2 (Vanhaesebrouck, Bellet and Tommasi,
    AISTATS 2017), so each row becomes a convex combination of rows for any tau >= 0. A client with confidence 0 takes
    its neighbours' value; a component in which nobody has confidence keeps its values.

    Raises:
        ValueError: tau or a confidence is negative or not finite.
    """
    return linear(implicit_matrix(graph, tau, confidence_K))


def implicit_matrix(graph: Graph, tau: float, confidence_K: Sequence[float]) -> Matrix:
    """Return (C + tau L)^-1 C, (K, K): row-stochastic and non-negative; solved per component by Cholesky in float64."""
    confidence = np.asarray(confidence_K, dtype=np.float64)
    if not (np.isfinite(tau) and tau >= 0 and np.isfinite(confidence).all() and (confidence >= 0).all()):
        raise ValueError(f"tau and confidences must be finite and at least 0; given {tau}, {confidence[:8].tolist()}")
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
        factor = min(tau, _LARGEST_CONDITION / (2 * coupling.max()) * highest) / highest
        lower = torch.linalg.cholesky(torch.from_numpy(np.diag(relative) + factor * coupling))
        # the factor has no positive weight off its diagonal, so substitution adds and never subtracts: no sign is lost
        solved = torch.cholesky_solve(torch.from_numpy(np.diag(relative)), lower).numpy()
        matrix_KK[block] = solved / solved.sum(axis=1, keepdims=True)
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
            columns = torch.cat([torch.arange(s.start, s.stop) for s in arena.layout.slices(group)])
            part = Arena(_only(arena.layout, group), arena.values_KP[:, columns])
            values_KP[:, columns] = mixer(part).values_KP
        return arena.replace(values_KP)

    return mix


def step_numbers(graph: Graph, mixer: Mixer, before: Arena, after: Arena) -> dict[str, float]:
    """Return what people look at after one step on `graph`: disagreement energies, edges, degrees, mixing share.

    `mixing_share` is the mean over rows of the absolute weight that comes from other clients: 0 alone, 1 - 1/K at the
    mean of everybody.
    """
    matrix_KK = matrix_of(mixer, graph.num_clients)
    others_KK = np.abs(matrix_KK - np.diag(np.diagonal(matrix_KK)))
    return {
        "disagreement_before": disagreement(graph, before.values_KP),
        "disagreement_after": disagreement(graph, after.values_KP),
        "edges": float(graph.num_edges),
        "mean_degree": float(degrees(graph).mean()),
        "max_degree": float(degrees(graph).max()),
        "mixing_share": float(others_KK.sum(axis=1).mean()),
    }


def matrix_of(mixer: Mixer, num_clients: int) -> Matrix:
    """Return the (K, K) matrix of a mixer that treats all tensors alike, by mixing the identity.

    >>> matrix_of(average([1.0, 3.0]), 2).tolist()
    [[0.25, 0.75], [0.25, 0.75]]
    """
    layout = Layout((TensorSpec("identity", "identity", "", (num_clients,), 0),))
    return np.asarray(mixer(Arena(layout, torch.eye(num_clients, dtype=torch.float64))).values_KP.numpy())


def _combine(weights_MK: npt.NDArray[np.float64], values_KP: torch.Tensor) -> torch.Tensor:
    """Return weights @ values in the dtype of `values`, computed in float32 at least; rows of weight 0 are not read."""
    sources = np.flatnonzero(weights_MK.any(axis=0))
    # weights rounded to 8 bits would no longer sum to 1
    dtype = torch.promote_types(values_KP.dtype, torch.float32)
    weights = torch.from_numpy(weights_MK[:, sources]).to(values_KP.device, dtype)
    rows = torch.from_numpy(sources).to(values_KP.device)
    blocks = [
        (weights @ block[rows].to(dtype)).to(values_KP.dtype)
        for block in torch.split(values_KP, _BLOCK_PARAMETERS, dim=1)
    ]
    return torch.cat(blocks, dim=1)


def _only(layout: Layout, group: str) -> Layout:
    """Return the layout of the tensors of `group` alone, closed up."""
    specs: list[TensorSpec] = []
    for spec in layout.specs:
        if spec.group == group:
            specs.append(TensorSpec(spec.name, spec.group, spec.layer, spec.shape, sum(s.size for s in specs)))
    return Layout(tuple(specs), layout.scaling)
