"""What a report shows of one run. Knows nothing about HTML or other runs."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from fedmira.evaluation.meters import losses_by_task
from fedmira.report import charts
from fedmira.report.figures import (
    BYTE_PARTS,
    TIME_PARTS,
    Figure,
    Section,
    disagreement_figures,
    graph_figures,
    task_figure,
)
from fedmira.report.formats import byte_unit, format_bytes, format_loss, format_seconds
from fedmira.report.reading import RunRecord, seconds_of


def run_sections(run: RunRecord) -> list[Section]:
    """What the page shows of a run; sections can be empty."""
    return [
        Section("Losses", (*_client_curves(run), *_run_tasks(run)), ragged=True),
        Section("Who learns from whom", tuple(graph_figures(run))),
        Section("What merging does", tuple(disagreement_figures([run], {run.method: "s0"}))),
        Section("What it costs", tuple(_run_costs(run))),
    ]


def _client_curves(run: RunRecord) -> Iterable[Figure]:
    curves = run.validation_losses()
    if not curves:
        return
    average = run.mean_validation_losses()
    lines = [charts.Line(name, curve, "reference", bold=False) for name, curve in curves.items()]
    lines.append(charts.Line("mean", average, "s0"))
    yield Figure(
        heading="Validation loss of every client",
        drawing=Markup(charts.line_chart(lines, f"Validation loss of {len(curves)} clients over rounds")),
        caption=(
            f"Nats per answer token after each round; one thin line for each of {len(curves)} clients, "
            f"the mean over clients in colour: from {format_loss(average[0][1])} to {format_loss(average[-1][1])}."
        ),
    )


def _run_tasks(run: RunRecord) -> Iterable[Figure]:
    tasks = {task: pooled.value for task, pooled in losses_by_task(run.records).items() if pooled.value is not None}
    if not tasks:
        return
    groups = [(task or "no task label", [charts.Bar(run.method, loss, "s0")]) for task, loss in tasks.items()]
    yield task_figure(groups, ", each client judged with its own adapter")


def _run_costs(run: RunRecord) -> Iterable[Figure]:
    if not run.rounds:
        return
    rounds = [int(event["round"]) for event in run.rounds]
    sent = [[charts.Bar(kind, float(event[f"{kind}_bytes"]), css) for kind, css in BYTE_PARTS] for event in run.rounds]
    if most := max(sum(bar.value for bar in bars) for bars in sent):
        yield Figure(
            heading="Bytes per round",
            drawing=Markup(
                charts.stacked_columns(
                    list(zip(rounds, sent, strict=True)), "Bytes sent per round", format_bytes, byte_unit(most)
                )
            ),
            caption=(
                f"Counted where they cross between server and clients, all participants together: "
                f"{format_bytes(run.upload_bytes)} up and {format_bytes(run.download_bytes)} down in the whole run."
            ),
            legend=BYTE_PARTS,
        )
    evaluated = {int(event["round"]): seconds_of(event, "evaluate") for event in run.evaluations}
    columns = []
    for event in run.rounds:
        spent = {kind: seconds_of(event, kind) for kind, _ in TIME_PARTS}
        spent["evaluate"] += evaluated.get(int(event["round"]), 0.0)
        columns.append((int(event["round"]), [charts.Bar(kind, spent[kind], css) for kind, css in TIME_PARTS]))
    yield Figure(
        heading="Seconds per round",
        drawing=Markup(charts.stacked_columns(columns, "Seconds per round", format_seconds, ("s", 1.0))),
        caption=f"{format_seconds(run.seconds)} in all with the final test, without loading.{_throughput(run)}",
        legend=TIME_PARTS,
    )


def _throughput(run: RunRecord) -> str:
    return f" Training reads {run.tokens_per_second:,.0f} tokens per second." if run.tokens_per_second else ""
