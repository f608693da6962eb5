"""What every report is made of: figures with a caption in plain words, and those that runs and studies share.

Knows nothing about HTML beyond marking finished drawings as safe; `charts` and `graph_charts` draw, `page` puts the
page together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedmira.evaluation.meters import mean, scores_by_task
from fedmira.formats import counted, format_share
from fedmira.report import charts, graph_charts
from fedmira.report.reading import REFERENCE_METHOD, GraphRecord, RunRecord, number

NUM_COLOURS = 8
SPLIT_TASKS = 8
"""A bar chart of more tasks or clients than this stands in two columns."""
FOLDED_TASKS = 30
"""A bar chart of more tasks than this starts folded."""
TIME_PARTS = (("train", "s4"), ("merge", "s3"), ("evaluate", "s7"))
"""(kind, colour class) of what a run spends seconds on."""
BYTE_PARTS = (("upload", "s7"), ("download", "s6"))
"""(kind, colour class) of what crosses between server and clients."""


Legend = tuple[tuple[str, str], ...]
"""(label, colour class) of each colour."""


@dataclass(frozen=True)
class Figure:
    """One drawing with its heading, its key of colours and what it says."""

    heading: str
    drawing: Markup
    caption: str
    legend: Legend = ()
    square: bool = False
    """Drawn on a square: three fit in a row."""
    wide: bool = False
    """Takes the whole width of the page."""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    heading: str
    figures: tuple[Figure, ...]
    introduction: str = ""
    ragged: bool = False
    """Its figures differ much in height, so they are not stretched to one."""


def colours_of(methods: Iterable[str]) -> dict[str, str]:
    """A colour class per method: grey for the reference, the palette in order for the others."""
    others = [method for method in methods if method != REFERENCE_METHOD]
    return {REFERENCE_METHOD: "reference"} | {
        method: f"s{position % NUM_COLOURS}" for position, method in enumerate(others)
    }


def by_client(runs: Iterable[RunRecord]) -> bool:
    """Whether test losses are better drawn of each client than of each task: none has a label, and they are few."""
    found = [run.records for run in runs]
    return not any(record.task for records in found for record in records) and all(
        len(records) <= graph_charts.MAXIMUM_NAMES for records in found
    )


def judged_losses(run: RunRecord, *, of_clients: bool) -> dict[str, float]:
    """Loss per token by the name of the client or, pooled over its clients, of the task; none where none is known."""
    if of_clients:
        losses = {record.name: record.loss.value for record in run.records}
    else:
        losses = {task or "no task label": pooled.loss for task, pooled in scores_by_task(run.records).items()}
    return {name: loss for name, loss in losses.items() if loss is not None}


def loss_figure(
    groups: Sequence[tuple[str, Sequence[charts.Bar]]], caption: str, legend: Legend = (), *, of_clients: bool
) -> Figure:
    """Bars of every task or client; many of them stand in two columns of one scale, very many start folded."""
    what = "client" if of_clients else "task"
    pooled = "" if of_clients else ", pooled over the clients of a task"
    highest = max((bar.value for _, bars in groups for bar in bars if math.isfinite(bar.value)), default=1.0)
    half = -(-len(groups) // 2) if len(groups) > SPLIT_TASKS else len(groups)
    columns = [
        charts.grouped_bars(part, f"Test loss of {len(part)} {what}s", highest=highest)
        for part in (groups[:half], groups[half:])
        if part
    ]
    return Figure(
        heading=f"Test loss of each {what}",
        drawing=Markup("".join(columns)),
        caption=f"Nats per answer token{pooled}{caption}; shorter is better.",
        legend=legend,
        wide=len(columns) > 1,
        folded=len(groups) > FOLDED_TASKS,
    )


def graph_figures(run: RunRecord) -> Iterable[Figure]:
    if run.graph is None:
        return
    graph = graph_charts.order_by_group(run.graph.names, group_labels(run), run.graph.adjacency)
    what = f"{run.method}, graph {run.graph.name}" if run.graph.name else run.method
    learned = _labels_in_words(graph) + _clusters_in_words(run.graph.provenance)
    yield Figure(
        heading=f"{what}, warm-up" if _warming_up(run.graph) else what,
        drawing=Markup(graph_charts.heat_map(graph, f"Weights of the graph of {run.method} as a heat map")),
        caption="Row and column are clients, a stronger cell is a heavier edge."
        f"{'' if _warming_up(run.graph) else learned}{_warmup_in_words(run.graph)}{_privacy_in_words(run.graph)}",
        square=True,
    )
    linked = graph_charts.node_link(graph, f"The graph of {run.method} drawn on a circle")
    if linked is not None:
        yield Figure(
            heading=f"{run.method}, drawn",
            drawing=Markup(linked),
            caption=_edges_in_words(graph, learned=not _warming_up(run.graph)) + _spectrum_in_words(run),
            square=True,
        )
    for block, adjacency in run.graph.blocks.items():
        part = graph_charts.order_by_group(run.graph.names, group_labels(run), adjacency)
        yield Figure(
            heading=f"{run.method}, {block}",
            drawing=Markup(graph_charts.heat_map(part, f"Weights of the graph of {block} of {run.method}")),
            caption=f"The layers of this block are mixed on a graph of their own.{_labels_in_words(part)}",
            square=True,
        )


def _labels_in_words(graph: graph_charts.Ordered) -> str:
    share = graph_charts.share_within_groups(graph)
    return "" if share is None else f" {format_share(share)} of its weight joins clients of one label."


def _warming_up(graph: GraphRecord) -> bool:
    """Whether clients were mixed on what `graph.warmup` says alone, since nothing learned had repeated itself yet."""
    return "warmup" in graph.provenance and not graph.provenance.get("learned_share")


def _warmup_in_words(graph: GraphRecord) -> str:
    if "warmup" not in graph.provenance:
        return ""
    whom = {"uniform": "everybody with everybody alike", "none": "nobody with anybody"}
    warmup = str(graph.provenance["warmup"])
    warmup = whom.get(warmup, warmup)
    after = f" after round {graph.provenance['round']}" if "round" in graph.provenance else ""
    if not _warming_up(graph):
        share = format_share(graph.provenance["learned_share"])
        return f" What was learned counts for {share}{after}, since it has not settled; for the rest this is {warmup}."
    return (
        f" This is the graph of the warm-up{after}, {warmup}: nothing that was learned was used in that round. A "
        "learned graph is used as far as it agrees with what was learned before."
    )


def _edges_in_words(graph: graph_charts.Ordered, *, learned: bool) -> str:
    edges, most = len(graph_charts.edges_of(graph)), graph_charts.MAXIMUM_EDGES
    if not edges:
        why = "nobody was related closely enough" if learned else "the warm-up joins nobody"
        return f"No edges: {why}, so every client kept its own adapter in that round."
    shown = f"The {most} heaviest of {edges} edges" if edges > most else counted(edges, "edge")
    across = ", grey ones join different labels" if any(graph.groups) else ""
    return f"{shown}; a thicker line is a heavier edge{across}."


def _privacy_in_words(graph: GraphRecord) -> str:
    note = str(graph.provenance.get("privacy") or "")
    what = "learning a graph" if _warming_up(graph) else "it"
    return f" What {what} reveals: {note[:1].lower()}{note[1:]}" if note else ""


def _clusters_in_words(provenance: Mapping[str, Any]) -> str:
    """What the graph's clusters are, if it looked for some in all layers at once."""
    if "clusters" not in provenance or isinstance(provenance["clusters"], list):
        return ""
    count = provenance["clusters"]
    if count is None:
        return " No clusters of clients are clear."
    only = "; only neighbours in the same one count" if provenance.get("within_clusters") else ""
    return f" Clients fall into {round(number(count))} clusters{only}."


def _spectrum_in_words(run: RunRecord) -> str:
    """What the last round said about the graph's pieces and stability."""
    numbers = (run.rounds[-1].get("numbers") or {}) if run.rounds else {}
    if "components" not in numbers:
        return ""
    pieces, alone = round(number(numbers["components"])), round(number(numbers.get("alone", 0.0)))
    words = f" {counted(pieces, 'connected component')}"
    words += f", {alone} of them single clients." if alone else "."
    margin = number(numbers.get("stability_margin"))
    if math.isfinite(margin):
        words += (
            f" Laplacian eigenvalues from {number(numbers.get('lambda_2')):.3g} (the smallest above 0) to "
            f"{number(numbers.get('lambda_max')):.3g}; an explicit step would "
            + (f"bear {margin:.3g} times this strength." if margin >= 1 else "diverge at this strength.")
        )
    return words


GRAPH_SHARES = (
    ("weight_in_tasks", "in one label", "s0"),
    ("weight_on_true_edges", "on true edges", "s2"),
    ("agreement", "as before", "s7"),
)
"""(name in a round's numbers, label, colour class) of what a learned graph is watched by, all between 0 and 1."""


def graph_course(run: RunRecord) -> Iterable[Figure]:
    """How a learned graph changed over the rounds; nothing for one that stayed."""
    lines = []
    for name, label, colour in GRAPH_SHARES:
        points = [
            (int(event["round"]), number(event["numbers"][name]))
            for event in run.rounds
            if name in (event.get("numbers") or {})
        ]
        if len(points) > 1:
            lines.append(charts.Line(label, points, colour))
    if not any(line.label == "as before" for line in lines):
        return
    counting = ", by which it counts" if run.graph and "learned_share" in run.graph.provenance else ""
    yield Figure(
        heading=f"{run.method}: the graph over rounds",
        drawing=Markup(charts.line_chart(lines, f"What the graph of {run.method} joins, round by round")),
        caption=(
            "Shares of the graph's weight between clients of one label and, where it is known, on edges of the true "
            "graph; and how far what was learned is as in the round before, the cosine of the weights (1 is "
            f"unchanged){counting}."
        ),
    )


def truth_figures(run: RunRecord) -> Iterable[Figure]:
    if run.graph is None or run.graph.true_adjacency is None:
        return
    graph = graph_charts.order_by_group(run.graph.names, group_labels(run), run.graph.true_adjacency)
    yield Figure(
        heading="The true graph",
        drawing=Markup(graph_charts.heat_map(graph, "Weights of the true graph as a heat map")),
        caption="What the data was made from: no method but an oracle sees it.",
        square=True,
    )


def group_labels(run: RunRecord) -> tuple[str, ...]:
    """The label each client of the graph is ordered by: its category or task, whichever joins clients; else empty."""
    if run.graph is None:
        return ()
    clients = {str(client["name"]): client for client in run.manifest.get("clients", ())}
    for field in ("category", "task"):
        labels = tuple(str(clients.get(name, {}).get(field) or "") for name in run.graph.names)
        if any(labels) and 1 < len(set(labels)) < len(labels):
            return labels
    return ("",) * len(run.graph.names)


def disagreement_figures(runs: Sequence[RunRecord], colours: Mapping[str, str]) -> Iterable[Figure]:
    for run in runs:
        steps = [
            charts.Step(
                int(event["round"]), number(numbers["disagreement_before"]), number(numbers["disagreement_after"])
            )
            for event in run.rounds
            if {"disagreement_before", "disagreement_after"} <= (numbers := event.get("numbers") or {}).keys()
        ]
        if not steps:
            continue
        kept = mean(step.after / step.before for step in steps if step.before > 0)
        effect = "" if kept is None else f" A merge leaves {format_share(kept)} of it on average."
        yield Figure(
            heading=f"{run.method}: disagreement energy",
            drawing=Markup(
                charts.merge_steps(
                    steps, f"Disagreement before and after each merge, {run.method}", colours[run.method]
                )
            ),
            caption=(
                "How far related clients are apart, tr(W'LW): ring before the merge, dot after it; local training "
                f"drives it up again.{effect}"
            ),
        )
