"""The sections of a results page: what is printed of the learning rates that were tried."""

from __future__ import annotations

from pathlib import Path

from tests.tools import tool

from fedmira.report.reading import StudyRecord


def test_a_rate_that_diverged_is_told_and_never_the_best() -> None:
    losses = {"fedit": [1.5, None], "mira": [None, None], "mira_published": [1.25]}
    tuning = tuple(
        {"method": method, "learning_rate": rate, "validation_loss": loss}
        for method, of_method in losses.items()
        for rate, loss in zip((0.001, 0.01), of_method, strict=False)
    )
    study = StudyRecord(Path(), "s", "", tuple(losses), (0,), (), {}, tuning)
    assert tool("results_page")._rates(study).splitlines()[2:] == [
        "| fedit | **1.500** | diverged |",
        "| mira | diverged | diverged |",
        "| mira_published | **1.250** |  |",
    ]
