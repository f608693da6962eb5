"""Trains the participants of a round, a cohort at a time: one batched computation per step, each client as if alone.

Knows nothing about the server, its methods, files or how many rounds have been; it is told what it needs.

A client's result depends on its own examples, start and random streams only; who trains beside it changes no more
than the order of floating-point sums inside matrix products.

Axes: S participants, C clients of a cohort, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fedmira.config import TrainingConfig
from fedmira.data.packing import PackedBatch, local_batches, pack
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.base import BaseModel
from fedmira.model.lora import Dropout, attached
from fedmira.randomness import torch_generator
from fedmira.training import progress as progress_
from fedmira.training.objective import pull_gradient, sum_of_client_means, sums_per_client, token_losses
from fedmira.training.optimizers import clip_factor, fresh_moments, schedule_factor, update_
from fedmira.training.progress import Cohort, Progress, Standing, StopRequested, Tally
from fedmira.types import Arena, ClientReport, Job, Layout

__all__ = ["Progress", "StopRequested", "train"]


def _never() -> bool:
    return False


def _ignore(_done: int, _total: int) -> None:
    return None


class _Work(NamedTuple):
    """What stays the same for all cohorts of a job."""

    base: BaseModel
    layout: Layout
    job: Job
    participants: tuple[TokenizedClient, ...]
    """Of the job, in the order of its ids."""
    batches: tuple[list[tuple[int, ...]], ...]
    """Per participant the training examples of each of its steps."""
    training: TrainingConfig
    trainable_P: torch.Tensor | None
    """On the device of the base; None if everything is trainable."""
    total_rounds: int
    seed: int
    dropout: float


def train(
    base: BaseModel,
    layout: Layout,
    job: Job,
    clients: Sequence[TokenizedClient],
    training: TrainingConfig,
    *,
    total_rounds: int,
    seed: int,
    cohort_size: int,
    dropout: float,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = _never,
    on_step: Callable[[int, int], None] = _ignore,
) -> tuple[torch.Tensor, tuple[ClientReport, ...]]:
    """Train every participant of `job` on its own examples.

    Optimizer state starts fresh each round. A client whose loss or gradient is not finite is stopped and named in its
    report, and the step is done again without it; if that was its first step, the others' numbers are bit for bit what
    they are without it.

    Args:
        base: the frozen model.
        layout: of the adapters in `job.start_SP`.
        job: who starts where, what moves, and what it is pulled towards.
        clients: all clients of the federation; `job.ids` selects from them.
        training: optimizer, learning rate, batch size and amount of work.
        total_rounds: for schedules.
        seed: of the run; batches and dropout masks are drawn from streams named by client and round.
        cohort_size: participants trained together; consecutive ones form a cohort.
        dropout: rate on the input of the low-rank branch.
        progress: of an interrupted call with the same arguments; continues it bit for bit, with its cohort size.
        should_stop: asked before each step.
        on_step: told (client steps done, client steps in all) after each step.

    Returns:
        The trained rows of the participants that succeeded, in the order of `job.ids`, on the device of
        `job.start_SP`; and a report for each participant, `failure` being empty for those that succeeded.

    Raises:
        StopRequested: `should_stop` returned true; carries the progress.
        IntegrityError: `progress` belongs to another job.
    """
    work = _prepare(base, layout, job, clients, training, total_rounds, seed, dropout)
    device = base.device
    standing = Standing(cohort_size) if progress is None else progress_.restore(progress, job, device)
    total_steps = sum(len(batches) for batches in work.batches)
    while standing.cohort is not None or len(standing.reports) < len(job.ids):
        if standing.cohort is None:
            standing.cohort = _new_cohort(work, first=len(standing.reports), size=standing.cohort_size)
        cohort = standing.cohort
        while _active(work, cohort):
            if should_stop():
                raise StopRequested(progress_.save(standing, job))
            _step(work, cohort)
            on_step(_steps_behind(work, cohort), total_steps)
        _finish(work, standing, cohort)
        standing.cohort = None
    rows_SP = torch.cat([job.start_SP[:0], *standing.finished_FP])
    return rows_SP, tuple(standing.reports)


def _prepare(
    base: BaseModel,
    layout: Layout,
    job: Job,
    clients: Sequence[TokenizedClient],
    training: TrainingConfig,
    total_rounds: int,
    seed: int,
    dropout: float,
) -> _Work:
    participants = tuple(clients[id_] for id_ in job.ids)
    batches = tuple(
        local_batches(
            len(client.train),
            training.batch_size,
            training.steps_or_default,
            training.local_epochs,
            seed,
            client.name,
            job.round,
        )
        for client in participants
    )
    trainable_P = None
    if not set(layout.groups) <= job.trainable:
        trainable_P = torch.zeros(layout.num_parameters, dtype=torch.bool)
        for group in job.trainable:
            for columns in layout.slices(group):
                trainable_P[columns] = True
        trainable_P = trainable_P.to(base.device)
    return _Work(base, layout, job, participants, batches, training, trainable_P, total_rounds, seed, dropout)


def _new_cohort(work: _Work, first: int, size: int) -> Cohort:
    # a copy: the cohort is trained in place, the start belongs to the caller
    values_CP = work.job.start_SP[first : first + size].to(work.base.device, copy=True)
    moments = fresh_moments(work.training, values_CP)
    return Cohort(first, values_CP, torch.zeros_like(values_CP), moments, [Tally() for _ in range(len(values_CP))])


def _active(work: _Work, cohort: Cohort) -> list[int]:
    """Rows of the cohort that have a step to do."""
    return [
        row
        for row, tally in enumerate(cohort.tallies)
        if not tally.failure and cohort.step < len(work.batches[cohort.first + row])
    ]


def _steps_behind(work: _Work, cohort: Cohort) -> int:
    """Client steps that are done or, after a failure, never will be."""
    earlier = sum(len(work.batches[participant]) for participant in range(cohort.first))
    return earlier + sum(
        len(work.batches[cohort.first + row]) if tally.failure else tally.num_steps
        for row, tally in enumerate(cohort.tallies)
    )


def _step(work: _Work, cohort: Cohort) -> None:
    """One update of every active client of the cohort, in place."""
    while active := _active(work, cohort):
        batch = pack([_examples(work, cohort, row) if row in active else [] for row in range(len(cohort.tallies))])
        losses_C = _gradients(work, cohort, batch)
        norm_C = torch.linalg.vector_norm(cohort.gradient_CP, dim=1)
        # the only synchronisation of a step
        losses, norms = torch.stack([losses_C, norm_C.to(losses_C.dtype)]).tolist()
        failed = [row for row in active if not (math.isfinite(losses[row]) and math.isfinite(norms[row]))]
        for row in failed:
            what = "loss" if not math.isfinite(losses[row]) else "gradient norm"
            cohort.tallies[row].failure = _describe_failure(work, cohort, row, what)
        if not failed:
            _apply(work, cohort, active, norms)
            for row in active:
                tally = cohort.tallies[row]
                tally.num_steps += 1
                tally.loss_sum += losses[row]
                tally.num_supervised_tokens += batch.supervised_per_client[row]
                tally.num_tokens += batch.rows_per_client[row]
            break
    cohort.step += 1


def _examples(work: _Work, cohort: Cohort, row: int) -> list[TokenizedExample]:
    participant = cohort.first + row
    return [work.participants[participant].train[i] for i in work.batches[participant][cohort.step]]


def _gradients(work: _Work, cohort: Cohort, batch: PackedBatch) -> torch.Tensor:
    """Fill `cohort.gradient_CP` with the gradients of every client's mean loss and pull; the loss sums (C,) in nats."""
    arena = Arena(work.layout, cohort.values_CP)
    cohort.gradient_CP.zero_()
    with (
        torch.enable_grad(),
        attached(
            work.base,
            arena,
            batch.rows_per_client,
            gradient_CP=cohort.gradient_CP,
            trainable=work.job.trainable,
            dropout=_dropout(work, cohort),
        ),
    ):
        hidden_ND = work.base.hidden(batch)
        losses_M = token_losses(work.base, hidden_ND, batch.supervised_rows_M, batch.labels_M)
        sum_of_client_means(losses_M, batch.supervised_per_client).backward()  # type: ignore[no-untyped-call]
    pull = work.job.pull
    if pull is not None:
        target_CP = pull.target_SP[cohort.first : cohort.first + len(cohort.tallies)].to(cohort.values_CP)
        cohort.gradient_CP += pull_gradient(cohort.values_CP, target_CP, pull.strength, work.trainable_P)
    return sums_per_client(losses_M, batch.supervised_per_client)


def _dropout(work: _Work, cohort: Cohort) -> Dropout | None:
    if not work.dropout:
        return None
    step = cohort.step

    def generator(row: int, layer: str) -> torch.Generator:
        client = work.participants[cohort.first + row]
        return torch_generator(work.seed, "dropout", client.name, work.job.round, step, layer)

    return Dropout(work.dropout, generator)


def _apply(work: _Work, cohort: Cohort, active: list[int], norms: list[float]) -> None:
    """Clip and update the active clients, in place."""
    training, job = work.training, work.job
    factors = [clip_factor(norms[row], training.clip_norm) if row in active else 1.0 for row in range(len(norms))]
    if min(factors) < 1.0:
        cohort.gradient_CP *= torch.tensor(factors, dtype=cohort.gradient_CP.dtype).to(work.base.device)[:, None]
    rates = [0.0] * len(norms)
    for row in active:
        steps = len(work.batches[cohort.first + row])
        factor = schedule_factor(job.round, cohort.step, steps, work.total_rounds, training)
        rates[row] = training.learning_rate * factor
    is_active = [row in active for row in range(len(norms))]
    update_(cohort.values_CP, cohort.gradient_CP, cohort.moments, training, rates, is_active, work.trainable_P)


def _finish(work: _Work, standing: Standing, cohort: Cohort) -> None:
    """Move a trained cohort's rows and reports to the finished ones."""
    finite = torch.isfinite(cohort.values_CP).all(dim=1).tolist()
    for row, tally in enumerate(cohort.tallies):
        participant = cohort.first + row
        if not finite[row] and not tally.failure:
            tally.failure = _describe_failure(work, cohort, row, "adapter")
        if not tally.failure:
            standing.finished_FP.append(cohort.values_CP[row : row + 1].to(work.job.start_SP.device))
        standing.reports.append(
            ClientReport(
                id=work.job.ids[participant],
                num_examples=len(work.participants[participant].train),
                num_steps=tally.num_steps,
                loss_sum=tally.loss_sum,
                num_supervised_tokens=tally.num_supervised_tokens,
                num_tokens=tally.num_tokens,
                failure=tally.failure,
            )
        )


def _describe_failure(work: _Work, cohort: Cohort, row: int, what: str) -> str:
    """`the loss of client-3 is not finite in round 2, step 7 (examples a, b)` and what to do."""
    participant = cohort.first + row
    client = work.participants[participant]
    step = min(cohort.step, len(work.batches[participant]) - 1)
    names = ", ".join(client.train[i].id or f"number {i}" for i in work.batches[participant][step])
    return (
        f"the {what} of client {client.name} is not finite in round {work.job.round}, step {step + 1} "
        f"(examples {names}); lower training.learning_rate or look at these examples"
    )
