"""Neighbours that are not to be trusted: what each client takes from the others, revised by how far away they are.

What is revised is the row-stochastic matrix of a step, and a client never loses a share of its own upload: being far
away from the others does not move it. Needs squared distances between uploads and nothing else, K x K numbers. Knows
nothing about adapters, graphs or rounds.

Axes: K clients (rows take, columns give), C clients that are listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedmira.federation.graph import Matrix

_OUTLYING = 4.0
"""A Krum score beyond this many times the median: twice as far away as the others are."""
_ITERATIONS = 60
_NEARLY_ZERO = 1e-12
"""Distances below its root, as a share of the largest, count alike in a geometric median."""


def clip(matrix_KK: Matrix, distance_KK: Matrix, _effort_K: Sequence[int] = ()) -> Matrix:
    """Return the step in which no client moves another further than the median one does.

    x_k = theta_k + sum_l P_kl min(1, r_k / d_kl) (theta_l - theta_k), d_kl the distance and r_k its median over l != k,
    weighted by P_kl: ClippedGossip (He, Karimireddy and Jaggi 2022, arXiv 2202.01545) with a radius that follows the
    clients. A client of which nothing is known (P_kk = 0) has nothing of its own to be left with: its neighbours divide
    what clipping took.
    """
    others_KK, apart_KK = _others(matrix_KK), np.sqrt(distance_KK)
    order_KK = np.argsort(apart_KK, axis=1, kind="stable")
    reached_KK = np.take_along_axis(others_KK, order_KK, axis=1).cumsum(axis=1)
    middle_K1 = (2 * reached_KK >= reached_KK[:, -1:] * (1 - _NEARLY_ZERO)).argmax(axis=1)[:, None]
    radius_K1 = np.take_along_axis(apart_KK, np.take_along_axis(order_KK, middle_K1, axis=1), axis=1)
    beyond_KK = apart_KK > radius_K1
    kept_KK = others_KK * np.where(beyond_KK, radius_K1 / np.where(beyond_KK, apart_KK, 1.0), 1.0)
    kept_K1, unknown_K1 = kept_KK.sum(axis=1, keepdims=True), np.diagonal(matrix_KK)[:, None] == 0
    kept_KK = np.where(unknown_K1 & (kept_K1 > 0), kept_KK / np.where(kept_K1 > 0, kept_K1, 1.0), kept_KK)
    return np.asarray(kept_KK + np.diag(1.0 - kept_KK.sum(axis=1)))


def krum(matrix_KK: Matrix, distance_KK: Matrix, effort_K: Sequence[int]) -> Matrix:
    """Return the step in which nobody takes anything from a client with an outlying score.

    The score is the sum of d_kl^2 / (e_k + e_l) to the nearest C - f - 2 of the C clients that anybody listens to, f
    the most hostile ones that Krum allows, (C - 3) / 2 (Blanchard et al., NeurIPS 2017); beyond 4 times the median it
    is outlying. The others' shares grow in proportion. Krum takes clients for draws of one distribution, but who has
    more examples may take more steps, and who has a higher rank moves more numbers: squared distances count by the
    e_k = examples x rank of both ends, as noisy steps add up. Where all went as far, no score is more than twice the
    median by that (docs/log.md). A median of 0, where most uploads are the same, is no measure of the others, and
    everybody is heard.
    """
    ids = heard(matrix_KK)
    num_nearest = len(ids) - max(0, len(ids) - 3) // 2 - 2
    if num_nearest < 1:
        return matrix_KK
    effort_C = np.asarray(effort_K, dtype=np.float64)[ids]
    apart_CC = distance_KK[np.ix_(ids, ids)] / (effort_C[:, None] + effort_C)
    score_C = np.sort(apart_CC, axis=1)[:, 1 : num_nearest + 1].sum(axis=1)
    middle = float(np.median(score_C))
    hostile = np.array(ids)[score_C > _OUTLYING * middle]
    if middle == 0 or not len(hostile):
        return matrix_KK
    others_KK = _others(matrix_KK)
    others_KK[:, hostile] = 0.0
    return _shared_out(matrix_KK, others_KK)


def geometric_median(matrix_KK: Matrix, distance_KK: Matrix, _effort_K: Sequence[int] = ()) -> Matrix:
    """Return the step towards geometric medians of the rows' clients where it went towards their means.

    z_k minimises sum_l P_kl |z - theta_l|, all l voting, by Weiszfeld's iteration w_l ~ P_kl / |z - theta_l| as in RFA
    (Pillutla, Kakade and Harchaoui, IEEE TSP 2022, arXiv 1912.13445); |z - theta_l|^2 = (D w)_l - w^T D w / 2 for
    weights that sum to 1. Client k keeps its share P_kk, the others divide theirs as w.
    """
    weights_KK = matrix_KK
    least = _NEARLY_ZERO * float(distance_KK.max(initial=0.0)) or 1.0
    for _ in range(_ITERATIONS):
        across_KK = weights_KK @ distance_KK
        squares_KK = across_KK - (weights_KK * across_KK).sum(axis=1, keepdims=True) / 2
        weights_KK = matrix_KK / np.sqrt(np.maximum(squares_KK, least))
        weights_KK = weights_KK / weights_KK.sum(axis=1, keepdims=True)
    return _shared_out(matrix_KK, _others(weights_KK))


def heard(matrix_KK: Matrix) -> list[int]:
    """Return the clients that anybody else takes anything from, ascending."""
    return [int(k) for k in np.flatnonzero(_others(matrix_KK).any(axis=0))]


def _others(matrix_KK: Matrix) -> Matrix:
    """A copy without the clients' shares of their own upload."""
    return np.asarray(matrix_KK * (1.0 - np.eye(len(matrix_KK))))


def _shared_out(matrix_KK: Matrix, weights_KK: Matrix) -> Matrix:
    """What each row takes from others, divided among them by `weights_KK`; where nobody is left, the client itself."""
    total_K1 = weights_KK.sum(axis=1, keepdims=True)
    share_K1 = np.where(total_K1 > 0, _others(matrix_KK).sum(axis=1, keepdims=True), 0.0)
    taken_KK = share_K1 * weights_KK / np.where(total_K1 > 0, total_K1, 1.0)
    return np.asarray(taken_KK + np.diag(1.0 - share_K1[:, 0]))


ROBUST: Mapping[str, Callable[[Matrix, Matrix, Sequence[int]], Matrix]] = {
    "clip": clip,
    "krum": krum,
    "geometric_median": geometric_median,
}
"""By `method.robust`: from the matrix of a step, squared distances, (K, K) both, and training examples times rank,
(K,), to the matrix of the robust one."""
