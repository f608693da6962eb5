"""The seam between server and clients: all that lies between a job and its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fedmira.types import Job, Losses, Results, Trial

if TYPE_CHECKING:
    from fedmira.exchange.seam import Kept
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
            StopRequested: `should_stop()` answered true; carries the progress made so far. Nothing is remembered of
                the round.
            ParticipationError: the round would spend the privacy budget of a client; nothing has crossed.
        """
        ...

    def judge(self, trial: Trial) -> Losses:
        """Let clients judge the candidates of `trial` on examples of their own; compare predictions if it says so.

        With `Trial.versus` they also say how their examples scatter around a comparison.

        Raises:
            ConfigError: losses are asked for where uploads are noised, because losses are not.
        """
        ...

    def state(self) -> Kept:
        """What server and clients remember between rounds; saved beside the state of the method."""
        ...

    def restore(self, kept: Kept) -> None:
        """Go on from what `state` returned."""
        ...
