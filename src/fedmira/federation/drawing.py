"""From similarities to weights: the ways to draw a graph that join clients by how alike they are.

All map a symmetric matrix of cosines of the clients seen, without what all have in common, to non-negative symmetric
weights with a zero diagonal; heaviest edges are about 1, so that the strength of a step means the same for all.
`mutual_neighbours` in `similarity` is the first of them, and `kept_within` may follow it. Knows nothing about
adapters or rounds.

Axes: C clients compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fedmira.federation.clustering import NEGLIGIBLE, clusters
from fedmira.federation.graph import Matrix

SUBSTANTIAL = 0.25
"""Silhouettes up to here mean no substantial structure (Kaufman and Rousseeuw, Finding groups in data, 1990)."""
_NEWTON_STEPS = 200
_TOLERANCE = 1e-11
"""Relative error of the degrees at which a smooth graph counts as found."""


def distances_from_cosines(similarity_CC: Matrix) -> Matrix:
    """Return |x_k - x_l|^2 = 2 - 2 s_kl of the unit vectors whose cosines are given; zero diagonal."""
    distance_CC = np.maximum(2.0 - 2.0 * similarity_CC, 0.0)
    np.fill_diagonal(distance_CC, 0.0)
    return distance_CC


class Drawn(NamedTuple):
    """A graph among the clients compared."""

    weights_CC: Matrix
    facts: Mapping[str, Any] = MappingProxyType({})
    """JSON-able: what the provenance should say of it."""


def inside_clusters(similarity_CC: Matrix, least: float = NEGLIGIBLE) -> Drawn:
    """Return weight 1 between clients of one cluster; no edges where no silhouette is above `least`.

    The fact `clusters` says how many there are, None if there are none.
    """
    distance_CC = 1.0 - similarity_CC
    np.fill_diagonal(distance_CC, 0.0)
    labels_C = clusters(distance_CC, least)
    if labels_C is None:
        return Drawn(np.zeros_like(similarity_CC), {"clusters": None})
    same_CC = labels_C[:, None] == labels_C[None, :]
    weights_CC = np.asarray(same_CC, dtype=np.float64) - np.eye(len(labels_C))
    return Drawn(weights_CC, {"clusters": len(np.unique(labels_C))})


def kept_within(clusters: Drawn, weights_CC: Matrix) -> Matrix:
    """Return the weights without those from one cluster to another; all of them where there are no clusters.

    Clients have fewer relatives than neighbours when groups are small. What fills the list up is chance, and clients
    that were mixed by chance look alike in the next round.

    Args:
        clusters: what `inside_clusters` returned.
        weights_CC: the weights of neighbours.
    """
    return np.where(clusters.weights_CC > 0, weights_CC, 0.0) if clusters.weights_CC.any() else weights_CC


def task_correlation(similarity_CC: Matrix) -> Matrix:
    """Return the correlations of Omega = G^(1/2) / tr(G^(1/2)), G the given Gram matrix.

    Omega is the task covariance that minimises tr(Theta^T Omega^-1 Theta) with trace 1 (Zhang and Yeung, UAI 2010). Its
    root lifts small eigenvalues: weak relations count more than in G. A task without variance is uncorrelated.
    """
    values_C, vectors_CC = np.linalg.eigh(similarity_CC)
    # a moving average over rounds need not be positive
    omega_CC = (vectors_CC * np.sqrt(np.maximum(values_C, 0.0))) @ vectors_CC.T
    trace = float(np.trace(omega_CC))
    if trace <= 0:
        return np.zeros_like(similarity_CC)
    variance_C = np.diagonal(omega_CC) / trace
    there_C = variance_C > 1e-12
    inverse_C = np.where(there_C, 1.0 / np.sqrt(np.where(there_C, variance_C, 1.0)), 0.0)
    correlation_CC = omega_CC / trace * inverse_C[:, None] * inverse_C[None, :]
    return np.asarray((correlation_CC + correlation_CC.T) / 2)


def symmetric(weights_CC: Matrix) -> Matrix:
    """Return (W + W^T) / 2 without its diagonal, scaled so that the heaviest edges of the clients average 1."""
    drawn_CC = (weights_CC + weights_CC.T) / 2
    np.fill_diagonal(drawn_CC, 0.0)
    heaviest = float(drawn_CC.max(axis=1, initial=0.0).mean()) if len(drawn_CC) else 0.0
    return drawn_CC / heaviest if heaviest > 0 else drawn_CC


def smooth_weights(distance_CC: Matrix, neighbours: int) -> Matrix:
    """Return the graph on which the clients vary smoothly, every client having a neighbour (Kalofolias, AISTATS 2016).

    Minimises sum_kl w_kl z_kl - sum_k log(degree_k) + 1/2 |W|^2 over symmetric W >= 0 with a zero diagonal, z the
    squared distances times theta, which is chosen for about `neighbours` edges a client (Kalofolias and Perraudin, ICLR
    2019). Solved through the dual: w_kl = max(0, (u_k + u_l) / 2 - z_kl) with u_k = 1 / degree_k, by Newton's method on
    the convex function sum_(k<l) w_kl^2 - sum_k log u_k of C numbers.
    """
    size = len(distance_CC)
    if size < 2:
        return np.zeros_like(distance_CC)
    cost_CC = distance_CC * _theta(distance_CC, neighbours)
    u_C = np.ones(size)
    for _ in range(_NEWTON_STEPS):
        weights_CC = _weights(u_C, cost_CC)
        gradient_C = weights_CC.sum(axis=1) - 1.0 / u_C
        if np.abs(gradient_C * u_C).max() <= _TOLERANCE:
            break
        active_CC = (weights_CC > 0).astype(np.float64)
        hessian_CC = (np.diag(active_CC.sum(axis=1)) + active_CC) / 2 + np.diag(1.0 / u_C**2)
        step_C = np.linalg.solve(hessian_CC, gradient_C)
        now, falls, share = _dual(u_C, cost_CC), float(gradient_C @ step_C), 1.0
        rounding = 4 * np.finfo(np.float64).eps * abs(now)
        while share > 1e-12:
            further_C = u_C - share * step_C
            if (further_C > 0).all() and _dual(further_C, cost_CC) <= now + rounding - 1e-4 * share * falls:
                break
            share /= 2
        else:
            break  # no smaller value within rounding
        u_C = further_C
    return _weights(u_C, cost_CC)


def _weights(u_C: Matrix, cost_CC: Matrix) -> Matrix:
    weights_CC = np.maximum((u_C[:, None] + u_C[None, :]) / 2 - cost_CC, 0.0)
    np.fill_diagonal(weights_CC, 0.0)
    return weights_CC


def _dual(u_C: Matrix, cost_CC: Matrix) -> float:
    return float((_weights(u_C, cost_CC) ** 2).sum() / 2 - np.log(u_C).sum())


def _theta(distance_CC: Matrix, neighbours: int) -> float:
    """The scale of distances at which a client alone takes `neighbours` edges: the middle of its range, averaged."""
    size = len(distance_CC)
    off_CC = np.sort(distance_CC[~np.eye(size, dtype=bool)].reshape(size, size - 1), axis=1)
    mean = float(off_CC.mean())
    count = min(neighbours, size - 2)
    if count < 1 or mean <= 0:
        return 1.0 / mean if mean > 0 else 1.0
    sum_C, last_C, next_C = off_CC[:, :count].sum(axis=1), off_CC[:, count - 1], off_CC[:, count]
    low_C, high_C = (count * edge_C**2 - sum_C * edge_C for edge_C in (next_C, last_C))
    told_C = (low_C > 1e-12 * mean**2) & (high_C > 1e-12 * mean**2)
    return float(((low_C * high_C)[told_C] ** -0.25).mean()) if told_C.any() else 1.0 / mean
