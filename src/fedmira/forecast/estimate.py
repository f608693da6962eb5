"""What a run will need, before it is started: memory, bytes per round, seconds. Keeps nothing.

A miniature of the run is carried out on throwaway copies: some rows move, the server mixes them, some steps are
trained, some examples judged, some tokens generated, one checkpoint saved. The time of the whole is proportion; its
memory is the peak of this process, which has done the heaviest of everything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from fedmira.assembly import Assembly, assemble
from fedmira.config.run import RunConfig
from fedmira.data.packing import batches_in_round, steps_of_row
from fedmira.evaluation.costs import highest_memory_bytes, memory_bytes
from fedmira.exchange.in_process import examples_asked, trial_bytes
from fedmira.exchange.privacy import advice
from fedmira.exchange.seam import planned_bytes
from fedmira.federation import participation
from fedmira.federation.method import State
from fedmira.federation.questions import bounded
from fedmira.forecast.remarks import warnings
from fedmira.forecast.trials import planned_steps, timed, try_checkpoint, try_evaluation, try_generation, try_training
from fedmira.formats import format_mib
from fedmira.randomness import torch_generator
from fedmira.types import ClientReport, Job, Losses, Results, Trial

_PATIENCE_SECONDS = 20.0
"""Mixing that takes longer is not done a second time."""
_HEAP_GROWTH = 0.1
"""A heap that has served batches of many sizes holds more than one that has served a few: 0 to 20 % in runs of minutes
(`python -m benchmarks.dry_run`). A GPU's peak counts what is in use and does not grow."""

_Asked = Callable[[int], tuple[State, Trial | None]]
"""A round to the state after it and what clients are asked then."""


class Estimate(NamedTuple):
    """Predicted needs of a run."""

    num_clients: int
    clients_per_round: int
    cohort_size: int
    adapter_parameters: int
    adapters_bytes: int
    """Of the adapters of all clients, which the server holds in `memory_bytes`: as often as there are clients the size
    of the base, where every weight is tuned."""
    memory_bytes: int
    """Peak of the process that carries out the run, with the interpreter and the base; of torch's memory on a GPU."""
    upload_bytes_per_round: int
    """Mean over the rounds, as is that of downloads: some rounds ask clients to judge adapters."""
    download_bytes_per_round: int
    rounds: int
    start_seconds: float
    """Until the first round: loading the base model, reading and tokenizing the data. As long as it took just now."""
    seconds: float
    """From the first round to the end."""
    training_seconds: float
    mixing_seconds: float
    evaluation_seconds: float
    """Validation losses, and the final judgement with its answers."""
    disk_seconds: float
    dry_run_seconds: float
    """What predicting took, the start included."""
    warnings: tuple[str, ...] = ()
    """What the run will say before its first round."""

    def lines(self) -> list[str]:
        """One line per fact, for people."""
        return [
            f"clients            {self.num_clients}, {self.clients_per_round} per round, "
            f"{self.cohort_size} in a cohort",
            f"adapter            {self.adapter_parameters:,} parameters, "
            f"{format_mib(self.adapters_bytes, 2)} for all clients",
            f"memory             about {format_mib(self.memory_bytes)}",
            f"upload per round   {_crossing(self.upload_bytes_per_round)}",
            f"download per round {_crossing(self.download_bytes_per_round)}",
            f"time               about {self.seconds:,.0f} s for {self.rounds} rounds, "
            f"after {self.start_seconds:,.0f} s to start",
            f"of which           training {self.training_seconds:,.0f} s, mixing {self.mixing_seconds:,.0f} s, "
            f"evaluation {self.evaluation_seconds:,.0f} s, disk {self.disk_seconds:,.0f} s",
            *(f"warning: {line}" for line in self.warnings),
        ]


def dry_run(config: RunConfig) -> Estimate:
    """Predict what the run `config` needs by building it, trying small parts of it and throwing the results away.

    Memory is right only in a process that did nothing else before.

    Raises what starting the run would raise: unusable data, models or settings.
    """
    started = time.perf_counter()
    parts = assemble(config)
    method, rounds = parts.method, config.federation.rounds
    state = method.init(parts.initial_adapters(), parts.clients)
    start_seconds = time.perf_counter() - started
    loaded_bytes = memory_bytes(parts.base.device)
    planned = planned_steps(parts)

    state, mixing, asked = _mix(parts, state, 1)
    if mixing < _PATIENCE_SECONDS:
        # the first mixing of a process pays for what later ones find ready
        del asked
        state, mixing, asked = _mix(parts, state, 2)
    asked_tokens, crossing = 0, []
    for round_ in range(1, rounds + 1):
        # one at a time: a question may hold adapters
        then, trial = asked(round_)
        if trial is not None:
            asked_tokens += _tokens_of(parts, trial)
            if trial.num_candidates:
                crossing.append(trial_bytes(trial, parts.layout, trial.candidate(0)))
            if round_ == rounds and method.decide is not None:
                # the last round asks the most clients about the most: memory may be at its peak there
                method.decide(then, trial, _made_up_losses(trial, config.seed))
        del then, trial
    del asked
    participants = participation.draw(len(parts.clients.names), config.federation, config.seed, 1)
    job = method.plan(state, participants)
    told = warnings(parts)
    if config.exchange.privacy.enabled and (line := advice(parts.layout, job.upload, job.trainable)):
        told = (*told, line)
    seconds_per_token, seconds_per_cohort = try_training(parts, job, planned)
    # a client may hold several rows, each trained for a share of the steps
    whole = {id_: len(batches_in_round(parts.tokenized[id_], config.training, config.seed, 1)) for id_ in job.ids}
    effort = sum(steps_of_row(whole[id_], job.work) for id_ in job.ids) / sum(whole[id_] for id_ in participants.ids)
    client_steps = effort * sum(len(one.ids) for one in planned.steps) / (planned.share * rounds)
    upload_bytes, download_bytes = planned_bytes(config.exchange, parts.layout, job, round(client_steps))
    del job

    evaluation = config.evaluation
    adapters = method.personalise(state)
    per_token = try_evaluation(parts, adapters)
    num_evaluations = math.ceil(rounds / evaluation.every)
    judged = num_evaluations * sum(e.num_inputs for client in parts.tokenized for e in client.validation)
    answers = 0.0
    if evaluation.test:
        judged += sum(e.num_inputs for client in parts.tokenized for e in client.test)
        if evaluation.generation.enabled:
            answers = try_generation(parts, adapters, per_token)
    del adapters
    if mixing < _PATIENCE_SECONDS:
        # once more, beside what training and evaluation left in the heap
        _mix(parts, state, 2)
    judged += asked_tokens
    upload_bytes += sum(answers_bytes for answers_bytes, _ in crossing) // rounds
    download_bytes += sum(sent_bytes for _, sent_bytes in crossing) // rounds
    num_saves = math.ceil(rounds / config.output.checkpoint_every)

    training_seconds = (
        sum(one.tokens for one in planned.steps) * seconds_per_token + planned.num_cohorts * seconds_per_cohort
    ) / planned.share
    training_seconds *= effort
    mixing_seconds = rounds * mixing
    evaluation_seconds = judged * per_token + answers
    disk_seconds = num_saves * try_checkpoint(parts, state)
    return Estimate(
        num_clients=len(parts.clients.names),
        clients_per_round=len(participants.ids),
        cohort_size=parts.cohort_size,
        adapter_parameters=parts.layout.num_parameters,
        adapters_bytes=state.adapters.values_KP.nbytes,
        memory_bytes=_of_a_long_run(parts.base.device, loaded_bytes, highest_memory_bytes()),
        upload_bytes_per_round=upload_bytes,
        download_bytes_per_round=download_bytes,
        rounds=rounds,
        start_seconds=start_seconds,
        seconds=training_seconds + mixing_seconds + evaluation_seconds + disk_seconds,
        training_seconds=training_seconds,
        mixing_seconds=mixing_seconds,
        evaluation_seconds=evaluation_seconds,
        disk_seconds=disk_seconds,
        dry_run_seconds=time.perf_counter() - started,
        warnings=told,
    )


def _crossing(count: int) -> str:
    """Bytes in a unit in which scalars are not lost.

    >>> _crossing(3 * 2**20), _crossing(80)
    ('3.00 MiB', '0.08 KiB')
    """
    return format_mib(count, 2) if count >= 2**20 or not count else f"{count / 2**10:,.2f} KiB"


def _of_a_long_run(device: torch.device, loaded_bytes: int, peak_bytes: int) -> int:
    """The peak after many rounds, from that of a few pieces and what was in use before them."""
    growth = _HEAP_GROWTH if device.type == "cpu" else 0.0
    return peak_bytes + round(growth * max(0, peak_bytes - loaded_bytes))


def _mix(parts: Assembly, state: State, round_: int) -> tuple[State, float, _Asked]:
    """The state after round `round_` with made-up results and answers, the seconds of planning, merging and deciding,
    and what clients are asked after each round."""
    method, federation, seed = parts.method, parts.config.federation, parts.config.seed
    participants = participation.draw(len(parts.clients.names), federation, seed, round_)
    job, planning = timed(parts, lambda: method.plan(state, participants))
    results = _made_up_results(job, seed)
    del job
    (mixed, _), merging = timed(parts, lambda: method.merge(state, participants, results))

    def asked(number: int) -> tuple[State, Trial | None]:
        here, then = participants._replace(round=number, last=number == federation.rounds), mixed
        if here.last:
            then = _of_the_last_round(mixed, parts.config)
        trial = method.trial(then, here, results) if method.trial else None
        limit = parts.config.evaluation.examples_per_question
        return then, bounded(trial, here, limit) if trial else None

    _, trial = asked(round_)
    if trial is None or method.decide is None:
        return mixed, planning + merging, asked
    losses, decide = _made_up_losses(trial, seed), method.decide
    (decided, _), deciding = timed(parts, lambda: decide(mixed, trial, losses))
    return decided, planning + merging + deciding, asked


def _of_the_last_round(state: State, config: RunConfig) -> State:
    """`state`, remembering who will have returned by the last round and who before it: on that rests whom it asks and
    about what."""
    before, drawn = set[int](), set[int]()
    for round_ in range(1, config.federation.rounds + 1):
        before = set(drawn)
        drawn |= set(participation.draw(len(state.last_round_K), config.federation, config.seed, round_).ids)
    memory = dict(state.memory)
    if (has_home_K := memory.get("has_home")) is not None:
        memory["has_home"] = torch.tensor([float(k in before) for k in range(len(has_home_K))]).to(has_home_K)
    last_round_K = tuple(config.federation.rounds * (k in drawn) for k in range(len(state.last_round_K)))
    return replace(state, last_round_K=last_round_K, memory=memory)


def _tokens_of(parts: Assembly, trial: Trial) -> int:
    clients = [parts.tokenized[id_] for id_ in trial.ids]
    examples = [example for client in clients for example in examples_asked(trial, client)]
    return trial.num_candidates * sum(example.num_inputs for example in examples)


def _made_up_losses(trial: Trial, seed: int) -> Losses:
    """What clients would answer by chance: some prefer their own, so that all that a method can do is done."""
    noise = torch_generator(seed, "estimate", "answers")
    mean_SQ = torch.rand((len(trial.ids), trial.num_candidates), generator=noise, dtype=torch.float64) + 1.0
    agreement_SS = None if trial.compare_SP is None else torch.eye(len(trial.ids), dtype=torch.float64)
    scatter_SQ = torch.rand(mean_SQ.shape, generator=noise, dtype=torch.float64) if trial.versus else None
    return Losses(mean_SQ, (2,) * len(trial.ids), 0, 0, agreement_SS, scatter_SQ)


def _made_up_results(job: Job, seed: int) -> Results:
    """What the server would get if every participant moved a little: the price of mixing does not depend on where."""
    moved_SP = job.start_SP.clone()
    noise = torch_generator(seed, "estimate")
    for row_P in moved_SP:
        row_P += 1e-3 * torch.randn(row_P.shape, generator=noise).to(row_P)
    reports = tuple(ClientReport(id_, 0, 0, 0.0, 0, 0) for id_ in job.ids)
    return Results(job.ids, moved_SP, reports=reports, upload_bytes=0, download_bytes=0, train_seconds=0)
