"""How sure a mean over seeds is: Student's t, without scipy, which the reports of a plain installation have not got.

Knows nothing about runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

LEAST_SEEDS = 3
"""With two the quantile is 12.7 standard errors: an interval that says nothing."""


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of independent differences; None of fewer than three, or where one is not finite.

    >>> [round(bound, 3) for bound in interval([-0.2, -0.1, -0.3]) or ()]
    [-0.448, 0.048]
    """
    count = len(differences)
    if count < LEAST_SEEDS or not all(map(math.isfinite, differences)):
        return None
    middle = statistics.fmean(differences)
    reach = student_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return middle - reach, middle + reach


def student_quantile(freedom: int) -> float:
    """Return t with P(|T| < t) = 0.95 under Student's distribution of `freedom` degrees of freedom.

    >>> round(student_quantile(2), 4)
    4.3027
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _share_within(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _share_within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)), a finite series: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
