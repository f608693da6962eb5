"""Small pieces of a run, carried out on throwaway copies so that their price is known: a few steps, some evaluation,
a few generated tokens, one checkpoint. Knows nothing about what is predicted from them.

The heaviest piece of each kind is always tried, because the peak of memory is reached there; the price of the others
is that of pieces spread evenly over the light and the heavy ones, as many as fit into a few seconds.

Axes: C clients of a cohort, S participants, P parameters of one adapter.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fedmira.assembly import Assembly
from fedmira.data.packing import batches_in_round
from fedmira.data.tokenization import TokenizedExample
from fedmira.evaluation.generation import generate
from fedmira.evaluation.loss import batches, evaluate_loss
from fedmira.exchange.in_process import InProcess
from fedmira.federation import participation
from fedmira.federation.method import State
from fedmira.runs.checkpoint import save
from fedmira.training.memory import activation_bytes_per_token, head_bytes, probe_length
from fedmira.types import Arena, Job

_TRIAL_SECONDS = 4.0
"""No further step, and no further batch of evaluation, is tried once those of its kind have taken this long."""
_MOST_TRIALS = 8
_SHARE_OF_RUN = 16
"""At most one step in this many is tried, so that trying a short run takes less time than running it."""
_MOST_CLIENT_STEPS = 20_000
"""Steps of clients that are looked at, by their lengths alone; of longer runs some rounds stand for all."""
_GENERATED_TOKENS = 4
_TOGETHER = 256
"""Answers that grow together; see `evaluation.generation`."""

T = TypeVar("T")


class Step(NamedTuple):
    """One step of one cohort, as the run will take it."""

    ids: tuple[int, ...]
    """Clients, C."""
    examples: tuple[tuple[int, ...], ...]
    """Per client its training examples."""
    tokens: int
    supervised_tokens: int


class Steps(NamedTuple):
    """The steps of some rounds of a run, which stand for all."""

    steps: tuple[Step, ...]
    num_cohorts: int
    share: float
    """Of all rounds."""


def planned_steps(parts: Assembly) -> Steps:
    """The steps of the cohorts of every round, or of rounds spread evenly over a long run."""
    config, training = parts.config, parts.config.training
    lengths = [[(example.num_inputs, example.num_supervised) for example in client.train] for client in parts.tokenized]

    def client_batches(id_: int, round_: int) -> list[tuple[int, ...]]:
        return batches_in_round(parts.tokenized[id_], training, config.seed, round_)

    rounds = config.federation.rounds
    ids = participation.draw(len(parts.tokenized), config.federation, config.seed, 1).ids
    per_round = sum(len(client_batches(id_, 1)) for id_ in ids)
    looked_at = sorted(set(np.linspace(1, rounds, max(1, min(rounds, _MOST_CLIENT_STEPS // per_round))).round()))
    steps, num_cohorts = [], 0
    for round_ in map(int, looked_at):
        ids = participation.draw(len(parts.tokenized), config.federation, config.seed, round_).ids
        for first in range(0, len(ids), parts.cohort_size):
            num_cohorts += 1
            cohort = {id_: client_batches(id_, round_) for id_ in ids[first : first + parts.cohort_size]}
            for number in range(max(map(len, cohort.values()))):
                active = {id_: own[number] for id_, own in cohort.items() if number < len(own)}
                drawn = [lengths[id_][index] for id_, batch in active.items() for index in batch]
                tokens, supervised = (sum(column) for column in zip(*drawn, strict=True))
                steps.append(Step(tuple(active), tuple(active.values()), tokens, supervised))
    return Steps(tuple(steps), num_cohorts, len(looked_at) / rounds)


def try_training(parts: Assembly, job: Job, planned: Steps) -> tuple[float, float]:
    """Train the heaviest planned step and some others, from the starting rows of `job`; seconds per token, and seconds
    that a cohort takes besides its steps."""
    base, layout, dropout = parts.base, parts.layout, parts.config.model.adapter.dropout
    token_bytes = activation_bytes_per_token(base, layout, dropout, probe_length(base, parts.tokenized))
    cohort_seconds: list[float] = []

    def attempt(step: Step) -> float:
        seconds, beside = _train_twice(parts, job, step)
        cohort_seconds.append(beside)
        return seconds

    seconds_per_token = _price(
        planned.steps,
        attempt,
        size=lambda step: step.tokens,
        heavy=lambda step: step.tokens * token_bytes + head_bytes(base, layout, step.supervised_tokens),
        most=min(_MOST_TRIALS, 1 + len(planned.steps) // _SHARE_OF_RUN),
    )
    return seconds_per_token, min(cohort_seconds)


def try_evaluation(parts: Assembly, adapters: Arena) -> float:
    """Judge the heaviest batch of the validation and test examples and some others; seconds per token."""
    limit = parts.config.evaluation.batch_tokens
    splits = [[client.validation for client in parts.tokenized]]
    if parts.config.evaluation.test:
        splits.append([client.test for client in parts.tokenized])
    found = [batch for split in splits for batch in batches(split, limit)]

    def attempt(batch: list[list[TokenizedExample]]) -> float:
        return timed(parts, lambda: evaluate_loss(parts.base, adapters, batch, limit))[1]

    return _price(found, attempt, size=_num_tokens, heavy=_num_tokens)


def try_generation(parts: Assembly, adapters: Arena, seconds_per_token: float) -> float:
    """Begin to answer test prompts; the seconds that all answers will take.

    Answers are taken to be as long as the references: how long they will be, only the trained adapters know. A step of
    w answers costs a + b w, found at two widths.

    Args:
        adapters: (K, P), on the device of the base.
        seconds_per_token: of evaluation, by which no more prompts are tried than can be read in a few seconds.
    """
    settings = parts.config.evaluation.generation
    asked = [
        (k, example)
        for k, client in enumerate(parts.tokenized)
        for example in client.test[: settings.examples_per_client]
    ]
    if not asked:
        return 0.0
    lengths = [min(settings.max_new_tokens, e.num_supervised) for _, e in asked]
    most_tokens = _TRIAL_SECONDS / max(seconds_per_token, 1e-9)
    tried: list[tuple[int, TokenizedExample]] = []
    for place in asked[max(0, (len(asked) - _TOGETHER) // 2) :]:
        most_tokens -= place[1].prompt_length
        if len(tried) == _TOGETHER or (len(tried) >= 2 and most_tokens < 0):
            break
        tried.append(place)

    def seconds(places: list[tuple[int, TokenizedExample]], tokens: int) -> float:
        prompts: list[list[np.ndarray]] = [[] for _ in parts.tokenized]
        for client, example in places:
            prompts[client].append(example.tokens[: example.prompt_length])
        return timed(parts, lambda: generate(parts.base, adapters, prompts, tokens))[1]

    def seconds_of_step(places: list[tuple[int, TokenizedExample]]) -> tuple[float, float]:
        reading = seconds(places, 1)
        return reading, max(0.0, seconds(places, 1 + _GENERATED_TOKENS) - reading) / _GENERATED_TOKENS

    few = tried[::4]
    _, narrow = seconds_of_step(few)
    reading, wide = seconds_of_step(tried)
    per_answer = max(0.0, wide - narrow) / max(1, len(tried) - len(few))
    per_step = max(0.0, wide - per_answer * len(tried))
    num_steps = max(max(lengths), sum(lengths) / _TOGETHER)
    read = sum(example.prompt_length for _, example in asked) / sum(example.prompt_length for _, example in tried)
    return read * reading + per_step * num_steps + per_answer * sum(lengths)


def try_checkpoint(parts: Assembly, state: State) -> float:
    """Save a checkpoint in a folder that is removed at once; seconds."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = parts.saved_tensors(state)
        return timed(parts, lambda: save(Path(folder), 1, tensors, {}, config_hash="", keep=1))[1]


def timed(parts: Assembly, call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds until the device is done."""
    device = parts.base.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def _train_twice(parts: Assembly, job: Job, step: Step) -> tuple[float, float]:
    """Seconds of a step, and those a cohort takes besides its steps: the same step is taken twice."""
    config = parts.config
    clients = tuple(
        replace(parts.tokenized[id_], train=tuple(parts.tokenized[id_].train[index] for index in indices))
        for id_, indices in zip(step.ids, step.examples, strict=True)
    )
    size = len(clients)
    exchange = InProcess(
        parts.base,
        parts.layout,
        clients,
        config.training.model_copy(update={"local_steps": 2, "local_epochs": None}),
        dropout=config.model.adapter.dropout,
        total_rounds=config.federation.rounds,
        seed=config.seed,
        cohort_size=size,
    )
    pull = None if job.pull is None else job.pull._replace(target_SP=job.pull.target_SP[:size])
    trial = job._replace(
        ids=tuple(range(size)), start_SP=job.start_SP[:size], pull=pull, work=1.0, local_rows=0, pooled=False
    )
    # the cohorts before the last one have left their results
    others_SP = job.start_SP[size:].clone()
    after_step = [time.perf_counter()]
    results = exchange.run(trial, on_step=lambda done, total: after_step.append(time.perf_counter()))
    ended = time.perf_counter()
    torch.cat([results.values_SP, others_SP])
    seconds = after_step[-1] - after_step[-2]
    return seconds, max(0.0, ended - after_step[0] - 2 * seconds)


def _price(
    pieces: Sequence[T],
    attempt: Callable[[T], float],
    *,
    size: Callable[[T], int],
    heavy: Callable[[T], float],
    most: int = _MOST_TRIALS,
) -> float:
    """Seconds per unit of size, from the heaviest piece and from at most `most` others spread evenly over the sizes.

    The heaviest is tried first, which also pays for what is slow only once; it counts only where nothing else fits.
    """
    if not pieces:
        return 0.0
    first = max(pieces, key=heavy)
    spent = attempt(first)
    if spent > _TRIAL_SECONDS:
        return spent / size(first)
    ordered = sorted(pieces, key=size)
    seconds, sizes = 0.0, 0
    for share in _spread(min(most, len(ordered))):
        piece = ordered[int(share * len(ordered))]
        seconds += attempt(piece)
        sizes += size(piece)
        if spent + seconds > _TRIAL_SECONDS:
            break
    return seconds / sizes


def _spread(number: int) -> list[float]:
    """The middles of `number` equal parts of 0 .. 1, from the middle outwards.

    >>> _spread(4)
    [0.375, 0.625, 0.125, 0.875]
    """
    middles = [(index + 0.5) / number for index in range(number)]
    return sorted(middles, key=lambda middle: abs(middle - 0.5))


def _num_tokens(batch: list[list[TokenizedExample]]) -> int:
    return sum(example.num_inputs for examples in batch for example in examples)
