"""The seam between server and clients: all that lies between a job and its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fedmira.types import Job, Results

if TYPE_CHECKING:
    from fedmira.training.cohort import Progress


class Exchange(Protocol):
    """Carries jobs to clients and results back. Bytes are counted here, where they cross."""

    def run(
        self,
        job: Job,
        *,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = ...,
        on_step: Callable[[int, int], None] = ...,
    ) -> Results:
        """Do `job`. `progress` continues one that was stopped; `on_step(done, total)` is told after each step.

        Raises:
            StopRequested: `should_stop()` answered true; carries the progress made so far.
        """
        ...
