"""Adds up what was measured per client and turns it, once, into the numbers people compare.

Sums and counts travel together and add (`Mean`); a ratio is taken only at display. Two kinds of mean exist here and
each docstring says which one it is: a *pooled* mean weighs every token or answer alike; a mean *over clients* is, by
definition, unweighted: every client counts once, however much data it holds.

Knows nothing about models, generation or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmira.errors import DataError

HARM_TOLERANCE = 0.01
"""A client is harmed when its test loss is more than this share above that of local training."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A total and the weight it was summed over; two of them add, and the ratio is taken once.

    >>> (Mean(6.0, 2.0) + Mean(1.0, 2.0)).value
    1.75
    >>> Mean().value is None
    True
    """

    total: float = 0.0
    weight: float = 0.0
    """Tokens, answers or clients; never negative."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"the weight of a mean is {self.weight}; it is a count and must be 0 or more")

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float | None:
        """total / weight; None where nothing was counted. A non-finite total shows as it is, never as 0 or None."""
        return self.total / self.weight if self.weight else None


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """What one client's test examples gave under the adapter it is judged by. Sums, never ratios."""

    name: str
    task: str = ""
    category: str = ""
    loss_sum: float = 0.0
    """Cross entropy summed over the supervised tokens, nats."""
    tokens: int = 0
    """Supervised tokens."""
    rouge_l_sum: float = 0.0
    """Rouge-L F-measures (each 0 to 1) summed over the generated answers."""
    exact_match_sum: float = 0.0
    """Generated answers equal to a reference."""
    generated: int = 0
    """Answers generated; 0 where generation was off."""

    @property
    def loss(self) -> Mean:
        """Pooled over this client's supervised tokens, nats per token."""
        return Mean(self.loss_sum, self.tokens)

    @property
    def rouge_l(self) -> Mean:
        """Over this client's generated answers."""
        return Mean(self.rouge_l_sum, self.generated)

    @property
    def exact_match(self) -> Mean:
        """Over this client's generated answers."""
        return Mean(self.exact_match_sum, self.generated)


@dataclass(frozen=True, slots=True)
class Scores:
    """The numbers of one client or one task, pooled over its tokens and answers. None where nothing was measured."""

    loss: float | None
    """Test loss per supervised token, nats."""
    perplexity: float | None
    """exp(loss)."""
    rouge_l: float | None
    """Mean Rouge-L F-measure, 0 to 1."""
    exact_match: float | None
    """Share of exact answers, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of one run. A field is None where nothing was measured."""

    num_clients: int
    num_judged: int
    """Clients with at least one supervised test token; only these enter the losses below."""
    mean_loss: float | None
    """Test loss per supervised token, nats; unweighted over clients."""
    task_mean_loss: float | None
    """Pooled over the tokens of a task, then unweighted over tasks; clients without a task label count as one task.
    None where no client has a label."""
    worst_tenth_loss: float | None
    """Unweighted over the worst ceil(clients / 10) clients."""
    share_harmed: float | None
    """Share of clients whose loss is more than 1 % above the reference; None without a reference."""
    perplexity: float | None
    """exp(mean_loss): the geometric mean of the clients' perplexities."""
    rouge_l: float | None
    """Mean Rouge-L F-measure, 0 to 1; unweighted over the clients that generated."""
    exact_match: float | None
    """Share of exact answers, 0 to 1; unweighted over the clients that generated."""


def summarise(records: Sequence[ClientRecord], reference: Sequence[ClientRecord] | None = None) -> Summary:
    """Sum up a run over its clients. Their order changes the result by rounding at most.

    Args:
        records: one per client, measured on its test examples.
        reference: the same clients after `local_only` in the same draw (partition, initial adapters, batches).

    Raises:
        DataError: two records bear one name, or the reference is about other clients.
    """
    _refuse_repeated_names(records)
    losses = [loss for record in records if (loss := record.loss.value) is not None]
    mean_loss = mean(losses)
    return Summary(
        num_clients=len(records),
        num_judged=len(losses),
        mean_loss=mean_loss,
        task_mean_loss=task_mean(records),
        worst_tenth_loss=worst_tenth(losses),
        share_harmed=None if reference is None else share_harmed(records, reference),
        perplexity=perplexity(mean_loss),
        rouge_l=mean(score for record in records if (score := record.rouge_l.value) is not None),
        exact_match=mean(score for record in records if (score := record.exact_match.value) is not None),
    )


def mean(values: Iterable[float]) -> float | None:
    """Unweighted mean with exact summation, so that the order of the values does not matter; None of nothing.

    >>> mean([1.0, 2.0]), mean([])
    (1.5, None)
    """
    collected = list(values)
    if not all(map(math.isfinite, collected)):
        # fsum refuses inf - inf; a plain sum gives the inf or nan that should be seen
        return sum(collected) / len(collected)
    return math.fsum(collected) / len(collected) if collected else None


def scores(records: Iterable[ClientRecord]) -> Scores:
    """Pool `records` (those of one client, or of one task): sums add first, ratios are taken once."""
    loss, rouge_l, exact_match = Mean(), Mean(), Mean()
    for record in records:
        loss, rouge_l, exact_match = loss + record.loss, rouge_l + record.rouge_l, exact_match + record.exact_match
    return Scores(loss.value, perplexity(loss.value), rouge_l.value, exact_match.value)


def scores_by_task(records: Iterable[ClientRecord]) -> dict[str, Scores]:
    """The pooled numbers of each task, in order of first appearance; clients without a task label are one task."""
    members: dict[str, list[ClientRecord]] = {}
    for record in records:
        members.setdefault(record.task, []).append(record)
    return {task: scores(group) for task, group in members.items()}


def task_mean(records: Sequence[ClientRecord]) -> float | None:
    """Unweighted mean of the losses of `scores_by_task`, nats per token; None where no client has a task label."""
    if not any(record.task for record in records):
        return None
    return mean(pooled.loss for pooled in scores_by_task(records).values() if pooled.loss is not None)


def worst_tenth(losses: Sequence[float]) -> float | None:
    """Unweighted mean of the ceil(n / 10) largest losses; nan counts as the largest. None of nothing.

    >>> worst_tenth([1.0, 5.0, 2.0])
    5.0
    """
    if not losses:
        return None
    count = -(-len(losses) // 10)
    return mean(sorted(losses, key=lambda loss: (math.isnan(loss), loss))[-count:])


def share_harmed(records: Sequence[ClientRecord], reference: Sequence[ClientRecord]) -> float | None:
    """Share of the clients whose loss exceeds the reference's by more than 1 %.

    A client without test tokens is not judged. A non-finite loss is a harm wherever the reference is finite.

    Raises:
        DataError: `records` and `reference` are not about the same clients.
    """
    changes = relative_changes(records, reference)
    if not changes:
        return None
    return sum(not change <= HARM_TOLERANCE for change in changes.values()) / len(changes)


def relative_changes(records: Sequence[ClientRecord], reference: Sequence[ClientRecord]) -> dict[str, float]:
    """(loss - reference) / reference of each judged client; above 0 is worse than the reference.

    inf stands for any loss above a reference of 0 and for a non-finite loss beside a finite reference; -inf for a
    finite loss beside a non-finite reference.

    Raises:
        DataError: `records` and `reference` are not about the same clients.
    """
    _refuse_repeated_names(reference)
    by_name = {record.name: record for record in reference}
    others = sorted({record.name for record in records} ^ set(by_name))
    if others:
        raise DataError(
            f"share harmed compares each client with itself, but {len(others)} clients are on one side only: "
            f"{', '.join(map(repr, others[:5]))}. Compare runs of the same seed, data and partition."
        )
    changes: dict[str, float] = {}
    for record in records:
        loss, before = record.loss.value, by_name[record.name].loss.value
        if loss is not None and before is not None:
            changes[record.name] = _relative_change(loss, before)
    return changes


def _relative_change(loss: float, before: float) -> float:
    if not math.isfinite(before):
        return -math.inf if math.isfinite(loss) else 0.0
    if not math.isfinite(loss):
        return math.inf
    if before == 0:
        return math.inf if loss > 0 else 0.0
    return (loss - before) / before


def perplexity(loss: float | None) -> float | None:
    """exp(loss per token); inf where it is too large for a float."""
    if loss is None:
        return None
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _refuse_repeated_names(records: Sequence[ClientRecord]) -> None:
    names = [record.name for record in records]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise DataError(
            f"several records are named {', '.join(map(repr, repeated[:5]))}; every client needs its own name"
        )
