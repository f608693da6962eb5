"""What a run will need, before it is started: memory, bytes per round, seconds. Writes nothing and keeps nothing.

Memory and time are measured: one cohort trains, the server mixes made-up results, the clients are judged once, all on
throwaway copies; the rest is proportion.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from fedmira.assembly import Assembly, assemble
from fedmira.config import RunConfig
from fedmira.data.packing import local_batches
from fedmira.evaluation.costs import PeakMemory
from fedmira.evaluation.judge import validation_losses
from fedmira.exchange.in_process import crossing_bytes
from fedmira.federation import participation
from fedmira.randomness import torch_generator
from fedmira.training.memory import estimate_memory
from fedmira.types import Job, Results


class Estimate(NamedTuple):
    """Predicted needs of a run."""

    clients: int
    clients_per_round: int
    cohort_size: int
    adapter_parameters: int
    memory_bytes: int
    """Peak of the process, or of torch on a GPU."""
    upload_bytes_per_round: int
    download_bytes_per_round: int
    rounds: int
    seconds: float

    def lines(self) -> list[str]:
        """One line per fact, for people."""
        return [
            f"clients            {self.clients}, {self.clients_per_round} per round, {self.cohort_size} in a cohort",
            f"adapter            {self.adapter_parameters:,} parameters",
            f"memory             about {self.memory_bytes / 2**20:,.0f} MiB",
            f"upload per round   {self.upload_bytes_per_round / 2**20:,.2f} MiB",
            f"download per round {self.download_bytes_per_round / 2**20:,.2f} MiB",
            f"time               about {self.seconds:,.0f} s for {self.rounds} rounds",
        ]


def dry_run(config: RunConfig) -> Estimate:
    """Predict what the run `config` needs by building it, training a little and throwing the result away.

    Raises what starting the run would raise: unusable data, models or settings.
    """
    parts = assemble(config)
    state = parts.method.init(parts.initial_adapters(), parts.clients)
    participants = participation.draw(len(parts.clients.names), config.federation, config.seed, 1)
    job = parts.method.plan(state, participants)
    trial = _first_cohort(job, parts.cohort_size)
    parts.exchange.run(trial)  # the first pass of a process pays for allocations
    started = time.perf_counter()
    results = parts.exchange.run(trial)
    seconds_per_token = (time.perf_counter() - started) / sum(report.num_tokens for report in results.reports)
    tokens = sum(_round_tokens(parts, id_) for id_ in participants.ids)
    with PeakMemory(parts.base.device) as peak:
        started = time.perf_counter()
        state, _ = parts.method.merge(state, participants, _made_up_results(job, config.seed))
        merge_seconds = time.perf_counter() - started
        started = time.perf_counter()
        validation_losses(parts.base, parts.method.personalise(state), parts.tokenized, config.evaluation)
        evaluation_seconds = time.perf_counter() - started
    cohort_bytes = estimate_memory(parts.base, parts.layout, parts.tokenized, config.training, parts.cohort_size)
    rounds = config.federation.rounds
    return Estimate(
        clients=len(parts.clients.names),
        clients_per_round=len(participants.ids),
        cohort_size=parts.cohort_size,
        adapter_parameters=parts.layout.num_parameters,
        memory_bytes=max(cohort_bytes, results.peak_memory_bytes, peak.peak_bytes),
        upload_bytes_per_round=crossing_bytes(parts.layout, job.start_SP, job.upload),
        download_bytes_per_round=crossing_bytes(parts.layout, job.start_SP, job.download),
        rounds=rounds,
        seconds=rounds * (tokens * seconds_per_token + merge_seconds)
        + (rounds // config.evaluation.every + 1) * evaluation_seconds,
    )


def _made_up_results(job: Job, seed: int) -> Results:
    """What the server would get if every participant moved a little: the price of mixing does not depend on where."""
    noise = torch.randn(job.start_SP.shape, generator=torch_generator(seed, "estimate"))
    moved_SP = job.start_SP + 1e-3 * noise.to(job.start_SP)
    return Results(
        job.ids, moved_SP, reports=(), upload_bytes=0, download_bytes=0, train_seconds=0, peak_memory_bytes=0
    )


def _round_tokens(parts: Assembly, id_: int) -> int:
    """Tokens that client `id_` trains on in round 1; later rounds draw as many."""
    client, training = parts.tokenized[id_], parts.config.training
    batches = local_batches(
        len(client.train),
        training.batch_size,
        training.steps_or_default,
        training.local_epochs,
        parts.config.seed,
        client.name,
        1,
    )
    return sum(len(client.train[index].tokens) for batch in batches for index in batch)


def _first_cohort(job: Job, cohort_size: int) -> Job:
    ids = job.ids[:cohort_size]
    pull = None if job.pull is None else job.pull._replace(target_SP=job.pull.target_SP[: len(ids)])
    return job._replace(ids=ids, start_SP=job.start_SP[: len(ids)], pull=pull)
