"""Clusters and aggregation weights written out one client at a time, for comparison. Slow and obvious.

Axes: K clients, P parameters.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize


def simplex_weights(cosine_K: np.ndarray, share_K: np.ndarray, strength: float) -> np.ndarray:
    """Minimise lambda |w - p|^2 - <cos, w> over w >= 0 with sum 1, by a general solver."""
    found = minimize(
        lambda w: strength * float(((w - share_K) ** 2).sum()) - float(cosine_K @ w),
        share_K,
        jac=lambda w: 2 * strength * (w - share_K) - cosine_K,
        bounds=[(0, 1)] * len(share_K),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return np.asarray(found.x)


def squared_distances(values_KP: np.ndarray) -> np.ndarray:
    """|theta_k - theta_l|^2 from the differences."""
    return np.array([[((one - other) ** 2).sum() for other in values_KP] for one in values_KP])


def best_cut(distance_KK: np.ndarray, tree: list[np.ndarray], least: int, most: int) -> int:
    """Number of clusters, least .. most, of the cut with the highest mean silhouette."""
    scores = {}
    for count in range(least, most + 1):
        labels = tree[count - 1]
        values = []
        for k, label in enumerate(labels):
            own = [distance_KK[k, j] for j in range(len(labels)) if labels[j] == label and j != k]
            if not own or count == 1:
                values.append(0.0)
                continue
            a = np.mean(own)
            b = min(
                np.mean([distance_KK[k, j] for j in range(len(labels)) if labels[j] == other])
                for other in set(labels.tolist()) - {label}
            )
            values.append((b - a) / max(a, b))
        scores[count] = float(np.mean(values))
    return max(scores, key=lambda count: (scores[count], -count))
