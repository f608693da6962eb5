"""Trains the participants of a round, a cohort at a time: one batched computation per step, each client as if alone.

Knows nothing about the server, its methods, files or how many rounds have been; it is told what it needs.

A client's result depends on its own examples, start and random streams only; who trains beside it changes no more
than the order of floating-point sums inside matrix products.

Axes: S participants, C clients of a cohort, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from fedmira.config.training import TrainingConfig
from fedmira.data.packing import PackedBatch, batches_in_round, num_rows, pack, steps_of_row
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.adapted import AdaptedModel, computes_in_parts
from fedmira.model.arena import adaptable_layers
from fedmira.model.base import BaseModel
from fedmira.model.lora import Dropout
from fedmira.model.shift import shifted
from fedmira.randomness import torch_generator
from fedmira.side_by_side import portions, side_by_side
from fedmira.stages import stage
from fedmira.training import progress as progress_
from fedmira.training.continuity import Continuity, Place
from fedmira.training.memory import AT_ONCE, num_parts
from fedmira.training.objective import pull_gradient, sum_of_client_means, sums_of_parts, token_losses
from fedmira.training.optimizers import clip_factor, fresh_moments, schedule_factor, update_
from fedmira.training.progress import Cohort, Progress, Standing, StopRequested, Tally, ignore, never
from fedmira.training.zeroth_order import direction, direction_number, slopes
from fedmira.types import Arena, Client, ClientReport, Job, Layout, Pull, SeedPool

__all__ = ["Progress", "StopRequested", "train"]


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
    continuity: Continuity | None
    """What optimizers remember from round to round; None if they begin afresh."""
    in_parts: bool
    """Whether a step is computed in parts, see `_packed`."""
    head_share: float
    """How many rows of the body take as many operations as one supervised row of the head."""


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
    continuity: Continuity | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = never,
    on_step: Callable[[int, int], None] = ignore,
) -> tuple[torch.Tensor, tuple[ClientReport, ...]]:
    """Train every participant of `job` on its own examples.

    Optimizer state starts fresh each round, or goes on from `continuity`. A client whose loss or gradient is not
    finite is stopped and named in its report, and the step is done again without it; if that was its first step, the
    others' numbers are bit for bit what they are without it.

    Args:
        base: the frozen model.
        layout: of the adapters in `job.start_SP`.
        job: who starts where, what moves, and what it is pulled towards. With `job.seeds` rows move along directions by
            `training.learning_rate` and `training.schedule` alone.
        clients: all clients of the federation; `job.ids` selects from them.
        training: optimizer, learning rate, batch size and amount of work.
        total_rounds: for schedules.
        seed: of the run; batches and dropout masks are drawn from streams named by client and round.
        cohort_size: participants trained together; consecutive ones form a cohort.
        dropout: rate on the input of the low-rank branch.
        continuity: what optimizers remember from round to round; a client's part of it changes when its cohort is done.
        progress: of an interrupted call with the same arguments; continues it bit for bit, with its cohort size.
        should_stop: asked before each step.
        on_step: told (client steps done, client steps in all) after each step.

    Returns:
        The trained rows of the participants that succeeded, in the order of `job.ids`, on the device of
        `job.start_SP`; and a report for each participant, `failure` being empty for those that succeeded.

    Raises:
        StopRequested: `should_stop` returned true; carries the progress.
        IntegrityError: `progress` belongs to another job.
        ValueError: `job` has seeds and a pull.
    """
    asked, holders = job, clients
    if asked.pooled:
        job, clients, training = _as_one(job, clients, training)
    with stage("data"):
        work = _prepare(base, layout, job, clients, training, total_rounds, seed, dropout, continuity)
    standing = Standing(cohort_size) if progress is None else progress_.restore(progress, job, base.device)
    with shifted(base, layout, job.shift_W):
        _train_all(work, standing, should_stop, on_step)
    blocks = [block_FP for block_FP in standing.finished_FP if len(block_FP)] or [job.start_SP[:0]]
    rows_SP = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    if asked.pooled:
        (report,) = standing.reports
        return rows_SP.repeat(len(asked.ids), 1), _for_all(report, asked, holders)
    return rows_SP, tuple(standing.reports)


def _as_one(
    job: Job, clients: Sequence[TokenizedClient], training: TrainingConfig
) -> tuple[Job, tuple[TokenizedClient], TrainingConfig]:
    """A pooled job as that of one client who holds the examples of all participants and takes all their steps."""
    examples = tuple(example for id_ in job.ids for example in clients[id_].train)
    everybody = TokenizedClient("pooled", examples, (), (), Client("pooled", (), (), ()))
    steps = training.steps_or_default
    if steps is not None:
        training = training.model_copy(update={"local_steps": steps * len(job.ids)})
    pull = None if job.pull is None else Pull(job.pull.target_SP[:1], job.pull.strength_S[:1])
    return job._replace(ids=(0,), start_SP=job.start_SP[:1], pull=pull, pooled=False), (everybody,), training


def _for_all(report: ClientReport, job: Job, clients: Sequence[TokenizedClient]) -> tuple[ClientReport, ...]:
    """The report of a pooled job for each participant; what was counted stands in the first, so that sums are right."""
    first, *others = (ClientReport(id_, len(clients[id_].train), 0, 0.0, 0, 0, report.failure) for id_ in job.ids)
    return report._replace(id=first.id, num_examples=first.num_examples), *others


def _train_all(
    work: _Work, standing: Standing, should_stop: Callable[[], bool], on_step: Callable[[int, int], None]
) -> None:
    """Train cohort after cohort until every row of the job is behind."""
    job = work.job
    total_steps = sum(len(batches) for batches in work.batches)
    while standing.cohort is not None or len(standing.reports) < len(job.ids):
        if standing.cohort is None:
            standing.cohort = _new_cohort(work, first=len(standing.reports), size=standing.cohort_size)
        cohort = standing.cohort
        # without gradients the model sees copies that move to and fro, so that the adapters stay exactly themselves
        seen_CP = cohort.values_CP if job.seeds is None else torch.empty_like(cohort.values_CP)
        gradient_CP = cohort.gradient_CP if job.seeds is None else None
        arena = Arena(work.layout, seen_CP)
        with AdaptedModel(work.base, arena, gradient_CP=gradient_CP, trainable=job.trainable) as adapted:
            while _active(work, cohort):
                if should_stop():
                    raise StopRequested(progress_.save(standing, job))
                _step(work, cohort, adapted)
                on_step(_steps_behind(work, cohort), total_steps)
        _finish(work, standing, cohort)
        standing.cohort = None
        # the moments and gradients must not lie beside the next cohort's, nor beside the joined results
        del cohort, seen_CP, gradient_CP, arena, adapted


def _prepare(
    base: BaseModel,
    layout: Layout,
    job: Job,
    clients: Sequence[TokenizedClient],
    training: TrainingConfig,
    total_rounds: int,
    seed: int,
    dropout: float,
    continuity: Continuity | None,
) -> _Work:
    participants = tuple(clients[id_] for id_ in job.ids)
    whole = (batches_in_round(client, training, seed, job.round) for client in participants)
    batches = tuple(steps[: steps_of_row(len(steps), job.work)] for steps in whole)
    trainable_P = None
    if job.seeds is not None:
        if job.pull is not None:
            raise ValueError("a job with seeds is trained without gradients, so a pull cannot act; leave one out")
        training = training.plain_sgd
    if not set(layout.groups) <= job.trainable:
        trainable_P = torch.zeros(layout.num_parameters, dtype=torch.bool)
        for group in job.trainable:
            for columns in layout.slices(group):
                trainable_P[columns] = True
        trainable_P = trainable_P.to(base.device)
    if not training.keep_moments:
        continuity = None
    head = base.model.get_output_embeddings().weight.numel()
    head_share = head / sum(inputs * outputs for inputs, outputs in adaptable_layers(base).values())
    return _Work(
        *(base, layout, job, participants, batches, training, trainable_P, total_rounds, seed, dropout, continuity),
        # without gradients adapters move while a pass is made
        in_parts=job.seeds is None and computes_in_parts(base, layout, dropout),
        head_share=head_share,
    )


def _new_cohort(work: _Work, first: int, size: int) -> Cohort:
    # a copy: the cohort is trained in place, the start belongs to the caller
    values_CP = work.job.start_SP[first : first + size].to(work.base.device, copy=True)
    if work.continuity is None:
        moments = fresh_moments(work.training, values_CP)
    else:
        moments = work.continuity.begin(_places(work, first, size), values_CP)
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


def _step(work: _Work, cohort: Cohort, adapted: AdaptedModel) -> None:
    """One update of every active client of the cohort, in place."""
    while active := _active(work, cohort):
        with stage("data"):
            parts = _packed(work, cohort, active)
        losses, norms = _try_step(work, cohort, adapted, parts)
        failed = _not_finite(active, losses, norms)
        if failed:
            # a fast path may have carried one client's trouble to others
            losses, norms = _try_step(work, cohort, adapted, parts, isolate=True)
            failed = _not_finite(active, losses, norms)
        for row in failed:
            what = "loss" if not math.isfinite(losses[row]) else "gradient norm"
            cohort.tallies[row].failure = _describe_failure(work, cohort, row, what)
            # nobody looks at it any more, and on a GPU 0 * nan would reach the others in every step from here on
            cohort.values_CP[row] = 0.0
        if not failed:
            with stage("optimizer"):
                _apply(work, cohort, active, norms)
            for row in active:
                tally = cohort.tallies[row]
                tally.num_steps += 1
                tally.loss_sum += losses[row]
                tally.num_supervised_tokens += sum(batch.supervised_per_client[row] for batch in parts)
                tally.num_tokens += sum(batch.tokens_per_client[row] for batch in parts)
            break
    cohort.step += 1


def _packed(work: _Work, cohort: Cohort, active: Sequence[int]) -> list[PackedBatch]:
    """The examples of this step, each client's in one batch: all in one, or in several of which two are computed at a
    time."""
    examples = [_examples(work, cohort, row) if row in active else [] for row in range(len(cohort.tallies))]
    parts: Sequence[Sequence[int]] = (active,)
    if work.in_parts:
        rows = [num_rows(of_row) for of_row in examples]
        supervised = [sum(example.num_supervised for example in of_row) for of_row in examples]
        costs = [own + work.head_share * asked for own, asked in zip(rows, supervised, strict=True)]
        parts = portions(costs, num_parts(sum(rows)))
    return [
        pack(
            [of_row if row in part else [] for row, of_row in enumerate(examples)],
            # a mask of what examples share would be shared too
            not work.dropout,
            virtual_tokens=work.layout.num_virtual_tokens,
        )
        for part in parts
        if any(examples[row] for row in part)
    ]


def _try_step(
    work: _Work, cohort: Cohort, adapted: AdaptedModel, parts: Sequence[PackedBatch], *, isolate: bool = False
) -> tuple[list[float], list[float]]:
    """Fill `cohort.gradient_CP`; per client the loss sum in nats and the norm of its gradient."""
    losses_C = _gradients(work, cohort, adapted, parts, isolate)
    with stage("optimizer"):
        norm_C = torch.linalg.vector_norm(cohort.gradient_CP, dim=1)
        # the only wait for a result; on a GPU the small tables that a step moves there wait as well
        losses, norms = torch.stack([losses_C, norm_C.to(losses_C.dtype)]).tolist()
    return losses, norms


def _not_finite(active: list[int], losses: list[float], norms: list[float]) -> list[int]:
    return [row for row in active if not (math.isfinite(losses[row]) and math.isfinite(norms[row]))]


def _examples(work: _Work, cohort: Cohort, row: int) -> list[TokenizedExample]:
    participant = cohort.first + row
    return [work.participants[participant].train[i] for i in work.batches[participant][cohort.step]]


def _gradients(
    work: _Work, cohort: Cohort, adapted: AdaptedModel, parts: Sequence[PackedBatch], isolate: bool
) -> torch.Tensor:
    """Fill `cohort.gradient_CP` with the gradients of every client's mean loss and pull; the loss sums (C,) in nats."""
    cohort.gradient_CP.zero_()
    if work.job.seeds is not None:
        return _estimated_gradients(work, cohort, adapted, parts[0], isolate, work.job.seeds)
    dropout = _dropout(work, cohort)

    def pass_through(batch: PackedBatch) -> torch.Tensor:
        with torch.enable_grad():
            with stage("forward"):
                hidden_Md = adapted.hidden(batch, dropout, isolate=isolate)
                losses_M = token_losses(work.base, hidden_Md, batch.labels_M)
                loss = sum_of_client_means(losses_M, batch.supervised_per_client)
            loss.backward()  # type: ignore[no-untyped-call]
        return sums_of_parts(losses_M, batch.supervised_per_client)

    with stage("backward"):
        losses_C = torch.stack(side_by_side([partial(pass_through, batch) for batch in parts], AT_ONCE)).sum(0)
    pull = work.job.pull
    if pull is not None:
        target_CP = pull.target_SP[cohort.first : cohort.first + len(cohort.tallies)]
        # row by row, because what is added needs memory of its own
        strength_C = pull.strength_S[cohort.first : cohort.first + len(cohort.tallies)]
        rows = zip(cohort.gradient_CP, cohort.values_CP, target_CP, strength_C, strict=True)
        for gradient_P, value_P, target_P, strength in rows:
            if strength:
                gradient_P += pull_gradient(value_P, target_P.to(value_P), strength, work.trainable_P)
    return losses_C


def _estimated_gradients(
    work: _Work, cohort: Cohort, adapted: AdaptedModel, batch: PackedBatch, isolate: bool, pool: SeedPool
) -> torch.Tensor:
    """Fill `cohort.gradient_CP`, which is zero, with every client's slope times its direction; the loss sums (C,)."""

    def loss_sums() -> torch.Tensor:
        with stage("forward"):
            hidden_Md = adapted.hidden(batch, _dropout(work, cohort), isolate=isolate)
            losses_M = token_losses(work.base, hidden_Md, batch.labels_M)
            return sums_of_parts(losses_M, batch.supervised_per_client)

    direction_CP = cohort.gradient_CP
    with stage("optimizer"), torch.inference_mode():
        for row, direction_P in enumerate(direction_CP):
            if batch.supervised_per_client[row]:
                name = work.participants[cohort.first + row].name
                number = direction_number(pool, work.seed, name, work.job.round, cohort.step)
                direction_P.copy_(direction(work.seed, number, len(direction_P)))
        if work.trainable_P is not None:
            direction_CP *= work.trainable_P
        slope_C, losses_C = slopes(
            cohort.values_CP,
            direction_CP,
            adapted.arena.values_KP,
            pool.epsilon,
            loss_sums,
            batch.supervised_per_client,
        )
        direction_CP *= slope_C.to(direction_CP.dtype)[:, None]
    return losses_C


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
    finite = [bool(torch.isfinite(value_P).all()) for value_P in cohort.values_CP]
    for row, tally in enumerate(cohort.tallies):
        participant = cohort.first + row
        if not finite[row] and not tally.failure:
            tally.failure = _describe_failure(work, cohort, row, "adapter")
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
    kept = [row for row, tally in enumerate(cohort.tallies) if not tally.failure]
    rows_FP = cohort.values_CP if len(kept) == len(cohort.tallies) else cohort.values_CP[kept]
    standing.finished_FP.append(rows_FP.to(work.job.start_SP.device))
    if work.continuity is not None:
        finished = [not tally.failure for tally in cohort.tallies]
        work.continuity.end(_places(work, cohort.first, len(finished)), cohort.values_CP, cohort.moments, finished)


def _places(work: _Work, first: int, size: int) -> list[Place]:
    """Whose memory the rows of a cohort have."""
    rows = slice(first, first + size)
    return [Place(*place) for place in zip(work.job.ids[rows], work.job.blocks[rows], strict=True)]


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
