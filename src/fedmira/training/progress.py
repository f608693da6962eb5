"""Where a round stands in the middle of its training, as tensors and JSON-able facts.

Knows nothing about files: whoever catches `StopRequested` decides where the progress is kept.

Axes: S participants, F of them finished, C clients of the cohort in progress, P parameters of one adapter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from fedmira.errors import IntegrityError
from fedmira.training.optimizers import Moments
from fedmira.types import ClientReport, Job


class Progress(NamedTuple):
    """Everything that training needs to continue bit for bit."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


class StopRequested(Exception):
    """Training was asked to stop and did so between two steps; `progress` continues it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__("training was asked to stop")
        self.progress = progress


def never() -> bool:
    """Do not ask training to stop."""
    return False


def ignore(done: int, total: int) -> None:
    """Do nothing with what training tells of its steps."""


@dataclass(slots=True)
class Tally:
    """What is counted about one participant while it trains."""

    num_steps: int = 0
    loss_sum: float = 0.0
    num_supervised_tokens: int = 0
    num_tokens: int = 0
    failure: str = ""


@dataclass(slots=True)
class Cohort:
    """The clients that train together right now: participants first, first + 1, ... of the job."""

    first: int
    values_CP: torch.Tensor
    gradient_CP: torch.Tensor
    """Written anew in every step; kept only to spare the allocation."""
    moments: Moments
    tallies: list[Tally]
    step: int = 0
    """Steps that are behind it."""


@dataclass(slots=True)
class Standing:
    """How far a job has come."""

    cohort_size: int
    finished_FP: list[torch.Tensor] = field(default_factory=list)
    """Trained rows of the participants that succeeded so far, in blocks."""
    reports: list[ClientReport] = field(default_factory=list)
    cohort: Cohort | None = None


def save(standing: Standing, job: Job) -> Progress:
    """Turn a standing into tensors and facts that share no memory with the training."""
    cohort = standing.cohort
    assert cohort is not None
    tensors = {
        "finished_FP": torch.cat([job.start_SP[:0], *standing.finished_FP]),
        "values_CP": cohort.values_CP,
        **cohort.moments._asdict(),
    }
    facts = {
        "round": job.round,
        "ids": list(job.ids),
        "cohort_size": standing.cohort_size,
        "first": cohort.first,
        "step": cohort.step,
        "reports": [list(report) for report in standing.reports],
        "tallies": [asdict(tally) for tally in cohort.tallies],
    }
    return Progress({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, facts)


def restore(progress: Progress, job: Job, device: torch.device) -> Standing:
    """The standing that `save` was given, with its cohort on `device`.

    Raises:
        IntegrityError: the progress belongs to another round or other participants.
    """
    facts, tensors = progress.facts, progress.tensors
    if facts["round"] != job.round or tuple(facts["ids"]) != job.ids:
        raise IntegrityError(
            f"the saved progress is of round {facts['round']} with participants {facts['ids']}, but round {job.round} "
            f"with {list(job.ids)} is to be continued; resume from the checkpoint this progress was saved with"
        )
    # copies: training goes on in place, and the progress may be used again
    values_CP = tensors["values_CP"].to(device, copy=True)
    moments = Moments(
        tensors["first_CP"].to(device, copy=True),
        tensors["second_CP"].to(device, copy=True),
        tensors["steps_C"].clone(),
    )
    return Standing(
        cohort_size=facts["cohort_size"],
        finished_FP=[tensors["finished_FP"].to(job.start_SP.device)],
        reports=[ClientReport(*values) for values in facts["reports"]],
        cohort=Cohort(
            first=facts["first"],
            values_CP=values_CP,
            gradient_CP=torch.zeros_like(values_CP),
            moments=moments,
            tallies=[Tally(**values) for values in facts["tallies"]],
            step=facts["step"],
        ),
    )
