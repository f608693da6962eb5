"""Projection onto the probability simplex, and the aggregation weights that pFedGraph finds with it.

Axes: C clients compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedmira.federation.graph import Matrix

_FAR = 1e6
"""Beside numbers as large the 1 of the sum loses digits that matter."""


def project_to_simplex(rows_MC: npt.ArrayLike) -> Matrix:
    """Return for each row the nearest point with entries of at least 0 that sum to 1, by sorting: O(C log C) a row.

    The projection is max(v - t, 0) with the t that makes it sum to 1 (Held, Wolfe and Crowder, 1974).

    >>> project_to_simplex([[0.5, 0.5], [2.0, 0.0]]).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    >>> project_to_simplex([[5e16, 5e16, 0.0]]).tolist()
    [[0.5, 0.5, 0.0]]
    """
    values_MC = np.atleast_2d(np.asarray(rows_MC, dtype=np.float64))
    largest_M1 = values_MC.max(axis=1, keepdims=True)
    # only differences count
    values_MC = np.where(np.abs(largest_M1) > _FAR, values_MC - largest_M1, values_MC)
    falling_MC = -np.sort(-values_MC, axis=1)
    excess_MC = np.cumsum(falling_MC, axis=1) - 1.0
    counts_C = np.arange(1, values_MC.shape[1] + 1)
    # the entries that stay positive are the largest ones; their number is the last at which the smallest still is
    positive_M = (falling_MC * counts_C > excess_MC).sum(axis=1)
    threshold_M = excess_MC[np.arange(len(values_MC)), positive_M - 1] / positive_M
    return np.asarray(np.maximum(values_MC - threshold_M[:, None], 0.0))


def collaboration(cosine_CC: Matrix, num_examples_C: Sequence[int], strength: float) -> Matrix:
    """Return pFedGraph's weights, (C, C): row k minimises lambda |w - p|^2 - <cosine_k, w> over the simplex.

    The quadratic programme of Ye et al. (ICML 2023, Eq. 7) without a solver: w_k = Proj(p + cosine_k / (2 lambda)).

    Args:
        cosine_CC: similarity of the clients' updates; counts as 1 on the diagonal.
        num_examples_C: training examples of each client; p are their shares.
        strength: lambda > 0; without bound every row becomes p.
    """
    alike_CC = np.array(cosine_CC)
    np.fill_diagonal(alike_CC, 1.0)
    share_C = np.asarray(num_examples_C, dtype=np.float64) / np.sum(num_examples_C)
    return project_to_simplex(share_C + alike_CC / (2.0 * strength))
