"""What a report shows of one run. Knows nothing about HTML or other runs."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from fedmira.formats import byte_unit, counted, format_bytes, format_loss, format_seconds, format_share
from fedmira.report import charts
from fedmira.report.figures import (
    BYTE_PARTS,
    TIME_PARTS,
    Figure,
    Section,
    by_client,
    disagreement_figures,
    graph_course,
    graph_figures,
    judged_losses,
    loss_figure,
    truth_figures,
)
from fedmira.report.reading import RunRecord, seconds_of


def run_sections(run: RunRecord) -> list[Section]:
    """What the page shows of a run; sections can be empty."""
    return [
        Section("Losses", (*_client_curves(run), *_run_test(run)), ragged=True),
        Section("Who learns from whom", (*graph_figures(run), *truth_figures(run))),
        Section("What merging does", (*disagreement_figures([run], {run.method: "s0"}), *graph_course(run))),
        Section("What it costs", tuple(_run_costs(run))),
    ]


def _client_curves(run: RunRecord) -> Iterable[Figure]:
    curves = run.validation_losses()
    if not curves:
        return
    average = run.mean_validation_losses()
    lines = [charts.Line(name, curve, "reference", bold=False) for name, curve in curves.items()]
    lines.append(charts.Line("mean", average, "s0"))
    late = " in each round over those that were there" if run.joined_after else ""
    yield Figure(
        heading="Validation loss of every client",
        drawing=Markup(charts.line_chart(lines, f"Validation loss of {counted(len(curves), 'client')} over rounds")),
        caption=(
            f"Nats per answer token after each round; one thin line for each of {counted(len(curves), 'client')}, "
            f"the mean over clients in colour{late}: "
            f"from {format_loss(average[0][1])} to {format_loss(average[-1][1])}."
        ),
    )


def _run_test(run: RunRecord) -> Iterable[Figure]:
    of_clients = by_client([run])
    groups = [
        (name, [charts.Bar(run.method, loss, "s0")]) for name, loss in judged_losses(run, of_clients=of_clients).items()
    ]
    if groups:
        yield loss_figure(groups, ", each client judged with its own adapter", of_clients=of_clients)


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
                f"{_compression(run)}"
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


def _compression(run: RunRecord) -> str:
    """How much less that is than without compression; empty where nothing was compressed."""
    plain = sum(int(event.get("uncompressed_bytes") or 0) for event in run.rounds)
    if not plain:
        return ""
    exchange = run.config.get("exchange") or {}
    forms = {"up": exchange.get("compression", "none"), "down": exchange.get("download_compression", "none")}
    said = " and ".join(f"{form} {way}" for way, form in forms.items() if form != "none")
    share = format_share((run.upload_bytes + run.download_bytes) / plain)
    return f" Compressed ({said}) to {share} of the {format_bytes(plain)} that the tensors as they are would take."


def left_out(run: RunRecord) -> list[dict[str, str]]:
    """Results that did not count, round by round: who and why."""
    return [
        {"round": str(event["round"]), "name": str(failure["client"]), "reason": str(failure["reason"])}
        for event in run.rounds
        for failure in event.get("failures", ())
    ] + [{"round": str(run.next_round), "name": name, "reason": reason} for name, reason in run.ended_by.items()]


def privacy(run: RunRecord) -> list[tuple[str, str]]:
    """What clients have given away at the end, and how that was limited; empty where nothing was noised."""
    spent, largest = run.epsilon, run.largest_epsilon
    if largest is None:
        return []
    settings = (run.config.get("exchange") or {}).get("privacy") or {}
    facts = [
        ("largest epsilon", f"{largest:.3f}"),
        ("mean epsilon", f"{sum(spent.values()) / len(spent):.3f}"),
    ]
    return facts + [
        (key.replace("_", " "), f"{settings[key]:g}" if isinstance(settings[key], int | float) else str(settings[key]))
        for key in ("budget", "delta", "clip_norm", "noise_multiplier", "noise_seed")
        if settings.get(key) is not None
    ]
