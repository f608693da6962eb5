"""The default exchange: all clients live in this process and train as cohorts over one frozen base model.

What crosses is encoded, counted and checked by `seam`. Knows nothing about methods or rounds beyond the job it is
given. A group of tensors that a job does not send stays where it is and costs nothing, although a simulation keeps it
in the same matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fedmira.config.exchange import ExchangeConfig
from fedmira.evaluation.loss import example_losses, scatter
from fedmira.evaluation.predictions import agreement
from fedmira.exchange.messages import crossing_bytes
from fedmira.exchange.seam import Kept, Seam, uncompressed_bytes
from fedmira.training.cohort import Progress, StopRequested, train
from fedmira.training.continuity import Continuity, Place
from fedmira.training.progress import ignore, never
from fedmira.types import Arena, Job, Layout, Losses, Results, Trial

if TYPE_CHECKING:
    from fedmira.config.training import TrainingConfig
    from fedmira.data.tokenization import TokenizedClient, TokenizedExample
    from fedmira.model.base import BaseModel

_ANSWER_BYTES = 4
"""A loss crosses as one float32, and so does how sure a comparison with it is."""


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
        batch_tokens: int = 4096,
        exchange: ExchangeConfig | None = None,
        texts: Sequence[TokenizedExample] = (),
    ) -> None:
        self._base, self._layout, self._clients, self._training = base, layout, clients, training
        self._dropout, self._total_rounds, self._seed = dropout, total_rounds, seed
        self._cohort_size, self._batch_tokens, self._texts = cohort_size, batch_tokens, texts
        crossing = exchange or ExchangeConfig()
        self._seam = Seam(crossing, layout, [client.name for client in clients], seed)
        self._continuity = Continuity(layout, len(clients), training)
        self._compresses = (crossing.compression, crossing.download_compression) != ("none", "none")

    def run(
        self,
        job: Job,
        *,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = never,
        on_step: Callable[[int, int], None] = ignore,
    ) -> Results:
        """See `fedmira.exchange.Exchange.run`."""
        # a round that goes on where it was stopped took the time before that too
        started = time.perf_counter() - (0.0 if progress is None else float(progress.facts.get("seconds", 0.0)))
        self._seam.refuse(job)
        sent = self._seam.send(job)
        try:
            values_SP, reports = train(
                self._base,
                self._layout,
                sent.job,
                self._clients,
                self._training,
                total_rounds=self._total_rounds,
                seed=self._seed,
                cohort_size=self._cohort_size,
                dropout=self._dropout,
                continuity=self._continuity,
                progress=progress,
                should_stop=should_stop,
                on_step=on_step,
            )
        except StopRequested as stopped:
            stopped.progress.facts["seconds"] = time.perf_counter() - started
            raise
        received = self._seam.receive(sent.job, values_SP, reports, planned=job)
        judged = zip(job.ids, job.blocks, reports, received.reports, strict=True)
        self._continuity.forget(
            [Place(id_, block) for id_, block, sent_, got in judged if got.failure and not sent_.failure]
        )
        return Results(
            ids=received.ids,
            values_SP=received.values_SP,
            reports=received.reports,
            upload_bytes=received.upload_bytes,
            download_bytes=sent.download_bytes,
            train_seconds=time.perf_counter() - started,
            uncompressed_bytes=uncompressed_bytes(self._layout, job, reports) if self._compresses else 0,
        )

    def state(self) -> Kept:
        """See `fedmira.exchange.Exchange.state`."""
        kept = self._seam.state()
        return kept._replace(tensors={**kept.tensors, **self._continuity.tensors()})

    def restore(self, kept: Kept) -> None:
        """See `fedmira.exchange.Exchange.restore`."""
        mine, of_seam = Continuity.parted(kept.tensors)
        self._continuity.restore(mine)
        self._seam.restore(kept._replace(tensors=of_seam))

    def judge(self, trial: Trial) -> Losses:
        """See `fedmira.exchange.Exchange.judge`."""
        if trial.num_candidates:
            self._seam.refuse_losses()
        asked = [self._clients[id_] for id_ in trial.ids]
        examples = [examples_asked(trial, client) for client in asked]
        tokens_S = [sum(example.num_supervised for example in of_client) for of_client in examples]
        mean_SQ = torch.full((len(asked), trial.num_candidates), torch.nan, dtype=torch.float64)
        scatter_SQ = mean_SQ.clone() if trial.versus else None
        versus_SN: list[list[float]] = []
        crossed = (0, 0)
        for number in range(trial.num_candidates):
            arena = Arena(self._layout, trial.candidate(number))
            if number == 0:
                crossed = trial_bytes(trial, self._layout, arena.values_KP)
            losses_SN = example_losses(self._base, arena, examples, self._batch_tokens)
            if number in trial.versus:
                versus_SN = losses_SN
            for row, losses_N in enumerate(losses_SN):
                if losses_N:
                    mean_SQ[row, number] = sum(losses_N) / tokens_S[row]
                if scatter_SQ is not None and versus_SN:
                    scatter_SQ[row, number] = scatter(losses_N, versus_SN[row])
        agreement_SS = None
        if trial.compare_SP is not None:
            agreement_SS = agreement(self._base, Arena(self._layout, trial.compare_SP), self._texts, self._batch_tokens)
        return Losses(mean_SQ, tuple(map(len, examples)), *crossed, agreement_SS, scatter_SQ)


def examples_asked(trial: Trial, client: TokenizedClient) -> tuple[TokenizedExample, ...]:
    """The examples by which `client` judges the candidates of a trial, in the order in which it holds them."""
    examples = client.train if trial.split == "train" else client.validation
    if trial.most_examples is None or len(examples) <= trial.most_examples:
        return examples
    first = trial.turn * trial.most_examples
    chosen = {(first + place) % len(examples) for place in range(trial.most_examples)}
    return tuple(examples[place] for place in sorted(chosen))


def trial_bytes(trial: Trial, layout: Layout, rows_SP: torch.Tensor) -> tuple[int, int]:
    """(upload, download) bytes of a trial: every answer, and the adapters that are sent to be judged.

    Args:
        trial: the question.
        layout: of the adapters.
        rows_SP: one of the candidates; all are of one size.
    """
    groups = layout.groups if trial.groups is None else trial.groups
    compared = trial.num_candidates - trial.versus[0] - len(trial.versus) if trial.versus else 0
    answers = len(trial.ids) * (trial.num_candidates + compared) * _ANSWER_BYTES
    return answers, trial.sent * crossing_bytes(layout, groups, rows_SP) if trial.sent else 0
