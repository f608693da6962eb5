"""What a report shows of a study: methods side by side, every client compared with itself trained alone.

Knows nothing about HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from fedmira.evaluation.meters import HARM_TOLERANCE, mean
from fedmira.formats import NOTHING, format_bytes, format_loss, format_relative, format_seconds, format_share
from fedmira.report import charts
from fedmira.report.clients import client_rows, outcomes
from fedmira.report.figures import (
    BYTE_PARTS,
    TIME_PARTS,
    Figure,
    Legend,
    Section,
    by_client,
    colours_of,
    disagreement_figures,
    graph_figures,
    group_labels,
    judged_losses,
    loss_figure,
    truth_figures,
)
from fedmira.report.reading import REFERENCE_METHOD, RunRecord, StudyRecord, seconds_of
from fedmira.report.table import rows_of

FOLDED_CLIENTS = 12
"""A table of more clients than this starts folded."""
END_CLIENTS = 30
"""Of more than twice as many clients the table has the worst and the best so many."""


def study_sections(study: StudyRecord) -> list[Section]:
    """What the page shows of a study; sections can be empty."""
    colours = colours_of(study.methods)
    # on one seed wherever the methods share one
    first = [runs[0] for method in study.methods if (runs := _shown(study, method))]
    drawn = _with_graph(first)
    graphs = [figure for run in drawn for figure in graph_figures(run)]
    truth = next((figure for run in drawn for figure in truth_figures(run)), None)
    if graphs and truth:
        # beside the first graph, which takes two places
        graphs.insert(2, truth)
    return [
        Section(
            "Who gains, who is harmed",
            (*_seed_by_seed(study, colours), *_changes(study)),
            "Every client is compared with itself: the same examples and the same seed, trained alone.",
        ),
        Section("Losses", (*_method_curves(study, colours), *_study_test(study, colours)), ragged=True),
        Section("Who learns from whom", tuple(graphs), _graphs_in_words(drawn)),
        Section("What merging does", tuple(disagreement_figures(first, colours))),
        Section("What it costs", tuple(_study_costs(study))),
    ]


class ClientTable(NamedTuple):
    """Every client beside itself trained alone, as text."""

    methods: tuple[str, ...]
    rows: list[dict[str, Any]]
    """name, examples, local loss, and a cell for each method: text, and whether it is harmed."""
    note: str
    folded: bool


def client_table(study: StudyRecord) -> ClientTable | None:
    """The clients of a study, worst first under the method that is best on average; None without training alone.

    Of very many clients only both ends.
    """
    found = client_rows(study)
    means = {row.method: row.mean_loss.mean for row in rows_of(study) if row.difference and row.mean_loss}
    methods = tuple(method for method in study.methods if any(method in row.changes for row in found))
    if not methods:
        return None
    best = min(methods, key=lambda method: loss if math.isfinite(loss := means.get(method, math.inf)) else math.inf)
    # what is not finite is worst, what is missing last
    found.sort(key=lambda row: _worse_first(row.changes.get(best)))
    cut = found[:END_CLIENTS] + found[-END_CLIENTS:] if len(found) > 2 * END_CLIENTS else found
    several = any(len(study.compared(method)) > 1 for method in methods)
    note = (
        f"Test loss of training alone, and how much lower or higher it is in % under each method{', ' * several}"
        f"{'mean over seeds' * several}; more than 1 % above is marked as harmed. "
        f"Sorted by {best}, the worst first."
    )
    if len(cut) < len(found):
        note += f" Only the {END_CLIENTS} at each end of {len(found)}; `fedmira report --csv` writes all."
    rows = [
        {
            "name": row.client,
            "examples": NOTHING if row.test_examples is None else _count(row.test_examples),
            "local_loss": format_loss(row.local_loss),
            "cells": [
                {"text": format_relative(change), "harmed": change is not None and not change <= HARM_TOLERANCE}
                for change in map(row.changes.get, methods)
            ],
        }
        for row in cut
    ]
    return ClientTable(methods, rows, note, folded=len(found) > FOLDED_CLIENTS)


def _worse_first(change: float | None) -> float:
    if change is None:
        return math.inf
    return -change if math.isfinite(change) else -math.inf


def _count(number: float) -> str:
    """A number of things, or the mean of several.

    >>> _count(1234.0), _count(2.5)
    ('1,234', '2.5')
    """
    return f"{number:,.0f}" if number.is_integer() else f"{number:,.1f}"


def _shown(study: StudyRecord, method: str) -> tuple[RunRecord, ...]:
    """The runs of a method that charts stand on: those that are compared, or what there is of unfinished ones."""
    return study.compared(method) or study.of(method)


def _over_seeds(groups: Iterable[Sequence[RunRecord]]) -> str:
    return ", mean over seeds" if any(len(runs) > 1 for runs in groups) else ""


def _graphs_in_words(drawn: Sequence[RunRecord]) -> str:
    """Whose graphs these are, of which draw and round."""
    if not drawn:
        return ""
    seeds = list(dict.fromkeys(run.seed for run in drawn))
    which = f"seed {seeds[0]}"
    if len(seeds) > 1:
        which = ", ".join(f"{run.method} on seed {run.seed}" for run in drawn)
    order = "; clients are ordered by label" if any(label for run in drawn for label in group_labels(run)) else ""
    begun = ", ".join(run.method for run in drawn if not run.records)
    so_far = f" Not finished, so after the last round so far: {begun}." if begun else ""
    return f"Graphs after the last round, {which}{order}.{so_far}"


def _with_graph(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs that have a graph, those that learned it first: they are what a reader looks for."""
    return sorted((run for run in runs if run.graph), key=lambda run: run.graph is None or run.graph.name != "gram")


def _method_curves(study: StudyRecord, colours: Mapping[str, str]) -> Iterable[Figure]:
    faint, bold = [], []
    for method in study.methods:
        curves = [curve for run in _shown(study, method) if (curve := run.mean_validation_losses())]
        if not curves:
            continue
        faint += [charts.Line(method, curve, colours[method], bold=False) for curve in curves if len(curves) > 1]
        values: dict[int, list[float]] = {}
        for curve in curves:
            for round_, loss in curve:
                values.setdefault(round_, []).append(loss)
        # a round that some seeds have not reached yet would make the mean jump
        average = [(r, mean(v) or 0.0) for r, v in sorted(values.items()) if len(v) == len(curves)]
        bold.append(charts.Line(method, average, colours[method]))
    if bold:
        yield Figure(
            heading="Validation loss of each method",
            drawing=Markup(charts.line_chart([*faint, *bold], "Mean validation loss of each method over rounds")),
            caption=(
                "Nats per answer token, mean over clients"
                + (", and over seeds; the faint lines are single seeds." if faint else ".")
            ),
        )


def _seed_by_seed(study: StudyRecord, colours: Mapping[str, str]) -> Iterable[Figure]:
    rows, lost, without_reference = [], False, set[int]()
    for method in study.methods:
        if differences := study.differences(method):
            rows.append((method, [(f"seed {seed}", value) for seed, value in differences.items()], colours[method]))
            lost |= not all(map(math.isfinite, differences.values()))
        without_reference |= set() if method == REFERENCE_METHOD else _without_reference(study, method)
    left_out = ", ".join(map(str, sorted(without_reference)))
    if rows:
        yield Figure(
            heading="Difference to training alone, seed by seed",
            drawing=Markup(charts.paired_dots(rows, "Difference of the mean test loss to local training, per seed")),
            caption=(
                "Mean test loss minus that of local_only on the same draw, nats per answer token; one dot per seed, "
                "a bar at their mean. Left of zero is better than training alone."
                + (" A cross at the right end, without a bar: a loss that was not finite." if lost else "")
                + (f" Left out, as training alone had no finite loss: seed {left_out}." if left_out else "")
            ),
        )


def _without_reference(study: StudyRecord, method: str) -> set[int]:
    """The seeds of compared runs on which training alone has no finite loss."""
    alone = {
        run.seed: reference.mean_loss for run in study.compared(method) if (reference := study.reference(run.seed))
    }
    return {seed for seed, loss in alone.items() if loss is not None and not math.isfinite(loss)}


def _changes(study: StudyRecord) -> Iterable[Figure]:
    found: dict[str, list[tuple[str, float]]] = {}
    several = len(study.seeds) > 1
    for one in outcomes(study, compared=True):
        if one.relative_difference is not None:
            label = f"{one.client}, seed {one.seed}" if several else one.client
            found.setdefault(one.method, []).append((label, one.relative_difference))
    finite = [change for changes in found.values() for _, change in changes if math.isfinite(change)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    for method, changes in found.items():
        harmed = sum(change > HARM_TOLERANCE for _, change in changes)
        helped = sum(change < -HARM_TOLERANCE for _, change in changes)
        drawing = charts.change_bars(
            changes,
            f"Change of each client's test loss under {method} compared with local training",
            low=low,
            high=high,
            tolerance=HARM_TOLERANCE,
        )
        yield Figure(
            heading=f"{method}: {helped} helped, {harmed} harmed",
            drawing=Markup(drawing),
            caption=(
                f"Change of test loss against training alone, one bar per client{' and seed' if several else ''}, "
                f"sorted; down is better. {format_share(harmed / len(changes))} are more than 1 % worse, "
                f"{len(changes) - harmed - helped} within 1 %."
            ),
            legend=(("helped", "better"), ("within 1 %", "level"), ("harmed", "worse")),
        )


def _study_test(study: StudyRecord, colours: Mapping[str, str]) -> Iterable[Figure]:
    losses: dict[str, dict[str, list[float]]] = {}
    compared = [study.compared(method) for method in study.methods]
    runs = [run for of_method in compared for run in of_method]
    of_clients = by_client(runs)
    for run in runs:
        for name, loss in judged_losses(run, of_clients=of_clients).items():
            losses.setdefault(name, {}).setdefault(run.method, []).append(loss)
    groups = [
        (
            name,
            [
                charts.Bar(method, mean(by_method[method]) or 0.0, colours[method])
                for method in study.methods
                if method in by_method
            ],
        )
        for name, by_method in losses.items()
    ]
    if groups:
        legend = tuple((method, colours[method]) for method in study.methods if study.of(method))
        yield loss_figure(groups, _over_seeds(compared), legend, of_clients=of_clients)


def _study_costs(study: StudyRecord) -> Iterable[Figure]:
    runs = {
        method: found for method in study.methods if (found := [run for run in _shown(study, method) if run.rounds])
    }
    if not runs:
        return
    over = _over_seeds(runs.values())
    begun = ", ".join(method for method, found in runs.items() if not study.compared(method))
    so_far = f" Not finished, so what was spent so far: {begun}." if begun else ""

    def rows(parts: Legend, spent: Callable[[RunRecord, str], float]) -> list[tuple[str, list[charts.Bar]]]:
        return [
            (method, [charts.Bar(kind, mean(spent(run, kind) for run in found) or 0.0, css) for kind, css in parts])
            for method, found in runs.items()
        ]

    sent = rows(BYTE_PARTS, lambda run, kind: {"upload": run.upload_bytes, "download": run.download_bytes}[kind])
    yield Figure(
        heading="Bytes of a whole run",
        drawing=Markup(charts.stacked_bars(sent, "Bytes sent by each method", format_bytes)),
        caption=f"Counted where they cross between server and clients, all clients and rounds{over}.{so_far}",
        legend=BYTE_PARTS,
    )
    seconds = rows(TIME_PARTS, lambda run, kind: math.fsum(seconds_of(event, kind) for event in run.events))
    yield Figure(
        heading="Seconds of a whole run",
        drawing=Markup(charts.stacked_bars(seconds, "Seconds of each method", format_seconds)),
        caption=f"All clients trained on one machine{over}; loading is not counted.{so_far}",
        legend=TIME_PARTS,
    )


def tuned_unlike(study: StudyRecord) -> list[str]:
    """The methods whose rate was chosen from others than most were given; empty where all are alike.

    No study is made like this any more; one that an earlier version wrote can be.
    """
    tried = {method: set(study.rates_tried(method)) for method in study.learning_rates}
    # tried and not taken: it ran without a grid later
    given = {method: rates if study.learning_rates[method] in rates else set() for method, rates in tried.items()}
    usual = max(given.values(), key=list(given.values()).count, default=set())
    return [method for method, rates in given.items() if rates != usual]
