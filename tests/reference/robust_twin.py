"""Slow twins of `fedmira.federation.robust`: the same steps on the clients' vectors, one client at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def clipped(matrix_KK: np.ndarray, values_KP: np.ndarray) -> np.ndarray:
    """Return x_k = theta_k + sum_l P_kl clip(theta_l - theta_k, r_k), r_k the weighted median distance."""
    mixed = []
    for k, own_P in enumerate(values_KP):
        others = [other for other in range(len(values_KP)) if other != k and matrix_KK[k, other] > 0]
        apart = sorted((float(np.linalg.norm(values_KP[other] - own_P)), matrix_KK[k, other]) for other in others)
        radius, reached = 0.0, 0.0
        for distance, weight in apart:
            if 2 * reached < sum(weight for _, weight in apart) * (1 - 1e-12):
                radius = distance
            reached += weight
        moved_P = own_P.copy()
        for other in others:
            way_P = values_KP[other] - own_P
            moved_P += matrix_KK[k, other] * way_P * min(1.0, radius / max(float(np.linalg.norm(way_P)), 1e-300))
        mixed.append(moved_P)
    return np.stack(mixed)


def krum_scores(values_KP: np.ndarray, num_examples_K: Sequence[int]) -> list[float]:
    """Return the sum of squared distances over both ends' examples to the nearest n - f - 2 others, f = (n - 3) / 2."""
    everybody, scores = range(len(values_KP)), []
    for k in everybody:
        apart = []
        for other in everybody:
            squared = float(((values_KP[k] - values_KP[other]) ** 2).sum())
            if other != k:
                apart.append(squared / (num_examples_K[k] + num_examples_K[other]))
        scores.append(sum(sorted(apart)[: len(values_KP) - (len(values_KP) - 3) // 2 - 2]))
    return scores


def geometric_median(weights_K: np.ndarray, values_KP: np.ndarray) -> np.ndarray:
    """Return the point that minimises sum_l w_l |z - theta_l|, by small steps against its gradient from the mean."""
    point_P, step = weights_K @ values_KP / weights_K.sum(), 1.0
    cost = float(weights_K @ np.linalg.norm(values_KP - point_P, axis=1))
    for _ in range(20_000):
        way_KP = point_P - values_KP
        slope_P = weights_K @ (way_KP / np.maximum(np.linalg.norm(way_KP, axis=1, keepdims=True), 1e-12))
        trial_P = point_P - step * slope_P
        trial_cost = float(weights_K @ np.linalg.norm(values_KP - trial_P, axis=1))
        if trial_cost < cost:
            point_P, cost, step = trial_P, trial_cost, step * 1.2
        else:
            step /= 2
        if step < 1e-14:
            break
    return point_P
