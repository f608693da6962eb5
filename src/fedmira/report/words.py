"""Says in words what a study or a run found, no more than its numbers carry. Ties are called ties.

Knows nothing about HTML; the sentences may hold names as they are, so whoever shows them escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmira.evaluation.meters import mean, summarise
from fedmira.formats import counted, format_loss, format_share
from fedmira.report.reading import REFERENCE_METHOD, RunRecord, StudyRecord
from fedmira.report.summary import advice
from fedmira.report.table import Row, rows_of, spread

TIE = 0.0005
"""Losses closer than this, in nats per token, look equal at the three decimals that are shown."""


def headline(record: RunRecord | StudyRecord) -> list[str]:
    """A few sentences, the most important first."""
    return _run_headline(record) if isinstance(record, RunRecord) else _study_headline(record)


def rates_line(study: StudyRecord) -> str:
    """At which learning rate each method ran that was tried at several; empty where none was."""
    chosen = [
        f"{method} {rate:g}"
        for method, rate in study.learning_rates.items()
        if len(tried := study.rates_tried(method)) > 1 and rate in tried
    ]
    return f"Learning rates, chosen by validation loss on another draw: {', '.join(chosen)}." if chosen else ""


def edge_line(study: StudyRecord) -> str:
    """Whose best rate is the outermost of those tried; empty where nobody's is."""
    at_edge = [method for method in study.learning_rates if study.best_at_edge(method)]
    if not at_edge:
        return ""
    return f"The best rate lies at the edge of the grid for {', '.join(at_edge)}: a wider grid might do better there."


def _study_headline(study: StudyRecord) -> list[str]:
    every = rows_of(study)
    rows = sorted((row for row in every if math.isfinite(_mean_loss(row))), key=_mean_loss)
    if not any(row.seeds for row in every):
        return ["No run of this study has finished with test numbers yet."]
    losses = {(run.method, run.seed): loss for run in study.runs if (loss := run.mean_loss) is not None}
    whole = {
        seed: {row.method: losses[row.method, seed] for row in rows}
        for seed in study.shared_seeds
        if all((row.method, seed) in losses for row in rows)
    }
    if not rows:
        sentences = ["No method of this study has a finite mean test loss."]
    elif len(rows) == 1:
        sentences = [f"{rows[0].method} reaches a mean test loss of {format_loss(_mean_loss(rows[0]))} nats per token."]
    elif not whole:
        sentences = ["No seed has been finished by all methods, so the methods cannot be compared yet."]
    else:
        sentences = _compare(rows, whole)
    # the rows stand on the seeds of `whole`, so the first of them is the method named first
    if rows and whole and rows[0].share_harmed is not None:
        sentences.append(_against_local(rows[0]))
    lost = [method for (method, _), loss in losses.items() if not math.isfinite(loss)]
    if lost:
        names = ", ".join(dict.fromkeys(lost))
        sentences.append(f"{counted(len(lost), 'run')} ended with a test loss that is not finite: {names}.")
    if risen := [method for method in study.methods if _has_risen(study.compared(method))]:
        sentences.append(
            f"Under {_list(risen)} the validation loss ends clearly above its lowest; fewer rounds or a lower learning "
            "rate may do better."
        )
    unfinished, total = sum(row.num_unfinished for row in every), len(study.seeds) * len(every)
    if unfinished:
        has = "has" if unfinished == 1 else "have"
        sentences.append(f"The comparison is not complete: {unfinished} of {total} runs {has} no test numbers.")
    return sentences


def _has_risen(runs: Sequence[RunRecord]) -> bool:
    """Whether every seed trained on after its best."""
    return bool(runs) and all(map(advice, runs))


def _compare(rows: Sequence[Row], whole: dict[int, dict[str, float]]) -> list[str]:
    """The sentences about who is lowest, from the seeds that every method finished."""
    averages = {row.method: mean(found[row.method] for found in whole.values()) or 0.0 for row in rows}
    order = sorted(averages, key=averages.__getitem__)
    best, second = order[0], order[1]
    lowest = averages[best]
    tied = [method for method in order if averages[method] - lowest < TIE]
    seeds = len(whole)
    if len(tied) > 1:
        over = f" over {seeds} seeds" if seeds > 1 else ""
        return [f"{_list(tied)} tie for the lowest mean test loss: {format_loss(lowest)} nats per token{over}."]
    wins = sum(found[best] - min(found.values()) < TIE for found in whole.values())
    shared = sum(sum(loss - min(found.values()) < TIE for loss in found.values()) > 1 for found in whole.values())
    sentences = [
        f"{best} has the lowest mean test loss"
        + (f" on {wins} of {seeds} seeds" if seeds > 1 else "")
        + f": {format_loss(lowest)} nats per token{' on average' if seeds > 1 else ''}"
        + f"; next is {second} with {format_loss(averages[second])}."
    ]
    if shared:
        sentences[0] = sentences[0][:-1] + f" (tied on {counted(shared, 'seed')})."
    gaps = [found[second] - found[best] for found in whole.values()]
    gap = spread(gaps)
    if seeds == 1:
        sentences.append("This is one seed: how far another draw would move these numbers is not known.")
    elif gap is not None and not is_clear(gaps):
        deviation = format_loss(gap.deviation)
        sentences.append(
            f"The gap of {format_loss(gap.mean)} to {second} is not clear of its spread over the seeds ({deviation}): "
            "read it as a tie."
        )
    return sentences


def is_clear(differences: Sequence[float]) -> bool:
    """Whether paired differences all point one way and their mean exceeds their standard deviation.

    A rule of thumb for wording, not a test of significance.

    >>> is_clear([0.2, 0.3, 0.25]), is_clear([0.2, -0.1, 0.3]), is_clear([0.3])
    (True, False, False)
    """
    found = spread(differences)
    if found is None or found.deviation is None:
        return False
    one_way = all(value > 0 for value in differences) or all(value < 0 for value in differences)
    return one_way and abs(found.mean) > found.deviation


def _against_local(row: Row) -> str:
    assert row.share_harmed is not None
    harmed = row.share_harmed.mean
    share = "no client is" if harmed == 0 else f"{format_share(harmed)} of the clients are"
    sentence = f"Under {row.method} {share} harmed (more than 1 % worse than training alone)"
    if row.difference is not None and math.isfinite(row.difference.mean):
        change, alone = row.difference.mean, "training alone"
        average = "On average"
        if (count := len(row.difference_seeds or ())) < len(row.seeds):
            seeds = "On the one seed" if count == 1 else f"On average over the {count} seeds"
            average = f"{seeds} on which {alone} has a finite loss,"
            alone = "it"
        if abs(change) < TIE:
            sentence = f"{average} {row.method} equals {alone}. {sentence}"
        else:
            side = "below" if change < 0 else "above"
            gap = format_loss(abs(change))
            sentence = f"{average} {row.method} lies {gap} {side} {alone}. {sentence}"
    return sentence + "."


def _run_headline(run: RunRecord) -> list[str]:
    rounds = counted(len(run.rounds), "round")
    if not run.records:
        loss = run.last_validation_loss()
        if loss is None:
            return [f"{run.method}, {rounds} so far; nothing has been evaluated yet.", *_end_in_words(run)]
        return [
            f"{run.method} is at a mean validation loss of {format_loss(loss)} nats per token after {rounds}; no test "
            "numbers yet.",
            *_end_in_words(run),
            *advice(run),
        ]
    numbers = summarise(run.records)
    sentences = [
        f"{run.method} ends at a mean test loss of {format_loss(numbers.mean_loss)} nats per token over "
        f"{counted(numbers.num_clients, 'client')} after {rounds}; the worst tenth is at "
        f"{format_loss(numbers.worst_tenth_loss)}.",
        *advice(run),
    ]
    if run.method != REFERENCE_METHOD:
        sentences.append(
            "One run alone cannot say whether sharing helped: fedmira compare also trains the same clients alone."
        )
    if late := len(run.joined_after):
        sentences.append(
            f"{counted(late, 'client')} joined after the first round and had fewer rounds than the others."
        )
    failures = sum(len(event.get("failures", ())) for event in run.rounds)
    if failures:
        sentences.append(f"{counted(failures, 'client result')} went missing on the way.")
    return sentences


def _end_in_words(run: RunRecord) -> list[str]:
    """Why the round after the last did not come to an end, if results were left out of it."""
    if not run.ended_by:
        return []
    count, first = len(run.ended_by), next(iter(run.ended_by.values()))
    return [
        f"Round {run.next_round} left {counted(count, 'client result')} out and did not end. The first reason: {first}."
    ]


def _mean_loss(row: Row) -> float:
    return math.inf if row.mean_loss is None else row.mean_loss.mean


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
