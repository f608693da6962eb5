"""Groups of clients from the distances between them: average linkage, and how many groups by silhouette.

Knows nothing about what the distances measure. `scipy.cluster.hierarchy` is the twin of the tests.

Axes: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedmira.federation.graph import Matrix

Labels: TypeAlias = npt.NDArray[np.int64]
NEGLIGIBLE = 1e-9
"""A silhouette of equal distances, but for rounding."""


def partitions(distance_CC: Matrix) -> tuple[Labels, ...]:
    """Return the partitions into 1, 2, ..., C groups that average linkage gives, (C,) each; O(C^2) to O(C^3).

    The two groups with the smallest mean distance between their members become one. A group is named by its first
    client.

    >>> [labels.tolist() for labels in partitions(np.array([[0.0, 1.0, 5.0], [1.0, 0.0, 4.0], [5.0, 4.0, 0.0]]))]
    [[0, 0, 0], [0, 0, 2], [0, 1, 2]]
    """
    size = len(distance_CC)
    labels = np.arange(size)
    found = [labels.copy()]
    between_CC = np.array(distance_CC, dtype=np.float64)
    np.fill_diagonal(between_CC, np.inf)
    members = np.ones(size)
    nearest = _Nearest(between_CC)
    for _ in range(size - 1):
        first = int(nearest.distance_C.argmin())
        one, other = sorted((first, int(nearest.group_C[first])))
        joint = members[one] * between_CC[one] + members[other] * between_CC[other]
        members[one] += members[other]
        between_CC[one] = between_CC[:, one] = joint / members[one]
        between_CC[other] = between_CC[:, other] = np.inf
        between_CC[one, one] = np.inf
        labels[labels == other] = one
        found.append(labels.copy())
        nearest.merged(one, other)
    return tuple(reversed(found))


class _Nearest:
    """Per row of a matrix the smallest entry and the first column that has it, kept up to date while columns merge.

    Costs C for each merge, and C for each row whose smallest entry went and did not come back smaller: few unless
    distances form chains or hubs.
    """

    def __init__(self, distance_CG: Matrix) -> None:
        self._distance_CG = distance_CG
        self._there_G = np.ones(distance_CG.shape[1], dtype=bool)
        self.group_C = np.asarray(distance_CG.argmin(axis=1))
        self.distance_C = distance_CG[np.arange(len(distance_CG)), self.group_C]

    def merged(self, into: int, gone: int) -> None:
        """Column `into` < `gone` has new values, `gone` has none any more, and no other grew but in rows nearest to one
        of the two."""
        self._there_G[gone] = False
        new_C = self._distance_CG[:, into]
        went_C = ((self.group_C == gone) | (self.group_C == into)) & (new_C > self.distance_C)
        closer_C = (new_C < self.distance_C) | ((new_C == self.distance_C) & (into < self.group_C))
        self.distance_C = np.where(closer_C, new_C, self.distance_C)
        self.group_C = np.where(closer_C, into, self.group_C)
        rows, there = np.flatnonzero(went_C), np.flatnonzero(self._there_G)
        distance_RG = self._distance_CG[np.ix_(rows, there)]
        self.group_C[rows] = there[distance_RG.argmin(axis=1)]
        self.distance_C[rows] = distance_RG.min(axis=1)


def silhouette(distance_CC: Matrix, labels_C: Labels) -> float:
    """Return the mean of (b - a) / max(a, b), -1 .. 1 (Rousseeuw 1987); 0 for a client alone in its group.

    a is the mean distance to one's own group, b that to the nearest other group.
    """
    names, places_C = np.unique(labels_C, return_inverse=True)
    if len(names) < 2:
        return 0.0
    member_CG = np.eye(len(names))[places_C]
    sizes_G = member_CG.sum(axis=0)
    sums_CG = distance_CC @ member_CG
    own_C = sizes_G[places_C]
    within_C = (sums_CG * member_CG).sum(axis=1) / np.maximum(own_C - 1, 1)
    nearest_C = np.where(member_CG > 0, np.inf, sums_CG / sizes_G).min(axis=1)
    return _mean_silhouette(within_C, nearest_C, own_C)


def clusters(distance_CC: Matrix, least: float = NEGLIGIBLE) -> Labels | None:
    """Return the partition into 2 to C - 1 groups with the largest silhouette, the fewest groups among equals.

    None if no partition has more than `least`, by default a positive one: then nothing says that there are groups.
    """
    if len(distance_CC) < 3:
        return None
    candidates = partitions(distance_CC)[1:-1]
    scores = _silhouettes(distance_CC, candidates)
    if max(scores) <= least:
        return None
    return candidates[int(np.argmax(scores))]


def _silhouettes(distance_CC: Matrix, nested: Sequence[Labels]) -> list[float]:
    """Return the silhouettes of partitions that `partitions` made, in their order; as fast as those were found.

    From one partition to the next coarser one two groups become one, so the sums of distances to groups are added up.
    """
    size = len(distance_CC)
    rows, before = np.arange(size), np.arange(size)
    sums_CC, sizes_C, means_CC = distance_CC.astype(np.float64), np.ones(size), distance_CC.astype(np.float64)
    np.fill_diagonal(means_CC, np.inf)
    nearest = _Nearest(means_CC)
    scores = []
    for labels in reversed(nested):
        (gone,) = np.unique(before[before != labels])
        into = labels[gone]
        sums_CC[:, into] += sums_CC[:, gone]
        sizes_C[into] += sizes_C[gone]
        theirs_C = labels == into
        # nobody's own group is another one
        means_CC[:, into], means_CC[:, gone] = np.where(theirs_C, np.inf, sums_CC[:, into] / sizes_C[into]), np.inf
        nearest.merged(int(into), int(gone))
        own_C = sizes_C[labels]
        within_C = sums_CC[rows, labels] / np.maximum(own_C - 1, 1)
        scores.append(_mean_silhouette(within_C, nearest.distance_C, own_C))
        before = labels
    return scores[::-1]


def _mean_silhouette(within_C: Matrix, nearest_C: Matrix, own_C: Matrix) -> float:
    """The mean over clients of (b - a) / max(a, b), from a, b and the sizes of their groups."""
    larger_C = np.maximum(within_C, nearest_C)
    values_C = np.where(larger_C > 0, (nearest_C - within_C) / np.where(larger_C > 0, larger_C, 1.0), 0.0)
    return float(np.where(own_C > 1, values_C, 0.0).mean())
