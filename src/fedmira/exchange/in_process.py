"""The default exchange: all clients live in this process and train as cohorts over one frozen base model.

Knows nothing about methods or rounds beyond the job it is given. A group of tensors that a job does not send stays
where it is and costs nothing, although a simulation keeps it in the same matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fedmira.evaluation.costs import PeakMemory
from fedmira.training.cohort import Progress, train
from fedmira.types import Job, Layout, Results

if TYPE_CHECKING:
    import torch

    from fedmira.config import TrainingConfig
    from fedmira.data.tokenization import TokenizedClient
    from fedmira.model.base import BaseModel


def _never() -> bool:
    return False


def _ignore(done: int, total: int) -> None:
    pass


class InProcess:
    """Trains the participants of a job in cohorts of at most `cohort_size` clients."""

    def __init__(
        self,
        base: BaseModel,
        layout: Layout,
        clients: Sequence[TokenizedClient],
        training: TrainingConfig,
        *,
        dropout: float,
        total_rounds: int,
        seed: int,
        cohort_size: int,
    ) -> None:
        self._base, self._layout, self._clients, self._training = base, layout, clients, training
        self._dropout, self._total_rounds, self._seed = dropout, total_rounds, seed
        self._cohort_size = cohort_size

    def run(
        self,
        job: Job,
        *,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = _never,
        on_step: Callable[[int, int], None] = _ignore,
    ) -> Results:
        """See `fedmira.exchange.Exchange.run`."""
        started = time.perf_counter()
        with PeakMemory(self._base.device) as peak:
            values_SP, reports = train(
                self._base,
                self._layout,
                job,
                self._clients,
                self._training,
                total_rounds=self._total_rounds,
                seed=self._seed,
                cohort_size=self._cohort_size,
                dropout=self._dropout,
                progress=progress,
                should_stop=should_stop,
                on_step=on_step,
            )
        return Results(
            ids=tuple(report.id for report in reports if not report.failure),
            values_SP=values_SP,
            reports=reports,
            upload_bytes=crossing_bytes(self._layout, values_SP, job.upload),
            download_bytes=crossing_bytes(self._layout, job.start_SP, job.download),
            train_seconds=time.perf_counter() - started,
            peak_memory_bytes=peak.peak_bytes,
        )


def crossing_bytes(layout: Layout, values_SP: torch.Tensor, groups: Iterable[str]) -> int:
    """Bytes of the tensors of `groups` in the rows `values_SP`, as they cross the seam."""
    return sum(values_SP[:, part].nbytes for group in sorted(groups) for part in layout.slices(group))
