"""Average linkage the slow way: every mean between two groups is computed anew for every merger."""

from __future__ import annotations

import numpy as np


def partitions(distance_CC: np.ndarray) -> list[list[int]]:
    """The partitions into 1, 2, ..., C groups; a group is named by its first client.

    Of equal means that of the first group, then that of the first other one, decides.
    """
    groups = {k: [k] for k in range(len(distance_CC))}
    found = [list(groups)]
    while len(groups) > 1:
        pairs = [(one, other) for one in groups for other in groups if one < other]
        # a mean of means, rounded as little as integers allow
        means = [distance_CC[np.ix_(groups[one], groups[other])].sum() for one, other in pairs]
        sizes = [len(groups[one]) * len(groups[other]) for one, other in pairs]
        smallest = min(mean / size for mean, size in zip(means, sizes, strict=True))
        one, other = next(
            pair
            for pair, mean, size in zip(pairs, means, sizes, strict=True)
            if np.isclose(mean / size, smallest, rtol=0, atol=1e-12)
        )
        groups[one] += groups.pop(other)
        found.append([next(name for name, group in groups.items() if k in group) for k in range(len(distance_CC))])
    return found[::-1]
