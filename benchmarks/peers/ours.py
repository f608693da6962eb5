"""fedmira itself: the clients of the round in cohorts."""

from __future__ import annotations

import torch

from benchmarks.workloads import SEED, Task
from fedmira.training.cohort import train
from fedmira.training.memory import available_bytes, choose_cohort_size


class Ours:
    """`train` with `cohort_size` clients in one computation; None takes what a run chooses by default."""

    def __init__(self, task: Task, cohort_size: int | None = None) -> None:
        self._task = task
        self.cohort_size = cohort_size or choose_cohort_size(
            task.base, task.layout, task.clients, task.training, available_bytes(task.base.device)
        )

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        task = self._task
        rows_SP, reports = train(
            task.base,
            task.layout,
            task.job,
            task.clients,
            task.training,
            total_rounds=1,
            seed=SEED,
            cohort_size=self.cohort_size,
            dropout=0.0,
        )
        failures = [report.failure for report in reports if report.failure]
        if failures:
            raise RuntimeError(f"{len(failures)} clients failed, the first: {failures[0]}")
        return rows_SP

    def close(self) -> None:
        """Nothing is held."""
