"""Claims: intervals are Student's, as scipy has them, and nothing is said of too few seeds or of what is not finite."""

from __future__ import annotations

import math

import pytest
from scipy.stats import t as student

from fedmira.report.intervals import interval, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 29, 100])
def test_quantiles_are_those_of_scipy(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=1e-9)


def test_the_interval_of_three_seeds_by_hand() -> None:
    # mean -0.2, standard deviation 0.1, so 4.3027 standard errors of 0.1 / sqrt(3)
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert interval([-0.1, -0.3, -0.2]) == pytest.approx((-0.2 - reach, -0.2 + reach))


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, 2.0], [1.0, 2.0, math.nan], [1.0, 2.0, math.inf]])
def test_too_few_and_not_finite_have_none(differences: list[float]) -> None:
    assert interval(differences) is None
