"""A weighted graph over clients as a heat map and as a drawing on a circle; plain data in, SVG text out.

Both show the clients in one order, so that groups lie together, and colour or frame the groups. Knows nothing about
where the graph comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from fedmira.report.svg import drawing, shorten, tag, text, title, write

MAXIMUM_CELLS = 96
"""Cells along one side of a heat map; more clients share a cell, which shows the mean of their weights."""
MAXIMUM_NODES = 120
"""More clients than this are not drawn on a circle."""
MAXIMUM_EDGES = 200
"""Only the heaviest edges are drawn."""
MAXIMUM_TIPS = 300
"""Cells or edges that name their two clients when pointed at; where there are more, none does."""
MAXIMUM_NAMES = 24
"""Where no labels group the clients, up to so many are named beside their rows, columns and nodes."""
NAME_LENGTH = 16
"""Characters of a client's name beside a row."""
TIP_LENGTH = 24
"""Characters of a client's name in such a tip."""
LEVELS = 8
"""Shades of a heat map."""
UPRIGHT_LABELS = 8
"""More groups than this are named along rays, and more than
RADIAL_LABELS only when pointed at."""
RADIAL_LABELS = 40
TINY_WIDTH = 6.0
"""Of a character of such a name."""
SIZE = 360.0
"""Side of a drawing in user units."""
GROUP_COLOURS = 8

Matrix = Sequence[Sequence[float]]


class Ordered(NamedTuple):
    """A graph with its clients in drawing order."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    """The label of each client, empty where there is none; equal labels are neighbours."""
    weights: tuple[tuple[float, ...], ...]


def order_by_group(names: Sequence[str], groups: Sequence[str], adjacency: Matrix) -> Ordered:
    """Bring clients of one group together, groups in order of first appearance."""
    first = {group: position for position, group in reversed(list(enumerate(groups)))}
    order = sorted(range(len(names)), key=lambda index: first[groups[index]])
    return Ordered(
        names=tuple(names[index] for index in order),
        groups=tuple(groups[index] for index in order),
        weights=tuple(tuple(adjacency[row][column] for column in order) for row in order),
    )


def share_within_groups(graph: Ordered) -> float | None:
    """Share of the graph's weight between clients of one group; None if there is no weight or no two in a group."""
    inside = total = 0.0
    pairs = 0
    for row, weights in enumerate(graph.weights):
        for column, weight in enumerate(weights):
            same = row != column and _of_one_group(graph.groups[row], graph.groups[column])
            pairs += same
            total += weight if row != column else 0.0
            inside += weight if same else 0.0
    return inside / total if total > 0 and pairs else None


def _of_one_group(one: str, other: str) -> bool:
    return bool(one) and one == other


def heat_map(graph: Ordered, description: str) -> str:
    """The matrix of weights, darker is heavier; bars along two sides and thin lines mark the groups.

    Without groups, names stand along these two sides.
    """
    names, groups, weights = _binned(graph)
    size = len(names)
    heaviest = max((weight for row in weights for weight in row if math.isfinite(weight)), default=0.0)
    shown = [shorten(name, NAME_LENGTH) for name in names] if _is_named(graph) else []
    margin = 12.0 + TINY_WIDTH * max(map(len, shown), default=0)
    cell = (SIZE - margin - 2) / max(1, size)
    parts = [tag("rect", x=margin, y=margin, width=cell * size, height=cell * size, class_="paper")]
    filled = [
        (row, column, weight)
        for row in range(size)
        for column, weight in enumerate(weights[row])
        if weight > 0 and heaviest > 0
    ]
    cells = _cells(filled, names, heaviest) if len(filled) <= MAXIMUM_TIPS else _strokes(filled, heaviest)
    parts.append(tag("g", cells, transform=f"translate({margin} {margin}) scale({cell:.4f})"))
    for position, name in enumerate(shown):
        middle = margin + (position + 0.5) * cell
        for turn, anchor, x, y in ((0, "end", margin - 5, middle), (-90, "start", middle, margin - 5)):
            place = f"translate({x:.1f} {y:.1f}) rotate({turn})"
            parts.append(text(0, 3.5, name, text_anchor=anchor, class_="label tiny", transform=place))
    for start, end, label in [] if shown else _runs(groups):
        colour = f"fill g{_group_index(groups, label)}"
        at, length = margin + start * cell, (end - start) * cell
        tip = title(label or "clients")
        parts.append(tag("rect", tip, x=at + 0.5, y=2, width=max(1.0, length - 1), height=6, rx=2, class_=colour))
        parts.append(tag("rect", tip, x=2, y=at + 0.5, width=6, height=max(1.0, length - 1), rx=2, class_=colour))
        if start:
            whole = margin + cell * size
            parts.append(tag("path", d=f"M{margin} {at:.1f}H{whole:.1f}M{at:.1f} {margin}V{whole:.1f}", class_="split"))
    return drawing("".join(parts), SIZE, description, SIZE)


def node_link(graph: Ordered, description: str) -> str | None:
    """The graph on a circle: a thicker line is a heavier edge, coloured within a group and grey across groups.

    Returns None for more than MAXIMUM_NODES clients, where a drawing shows nothing.
    """
    size = len(graph.names)
    if size > MAXIMUM_NODES:
        return None
    labels = graph.names if _is_named(graph) else graph.groups
    radial = len(_runs(labels)) > UPRIGHT_LABELS
    longest = max(map(len, labels), default=0)
    margin = 92.0 if radial else min(92.0, max(52.0, 24.0 + 7.2 * longest))
    centre, radius = SIZE / 2, SIZE / 2 - margin
    angles = [2 * math.pi * (index + 0.5) / max(1, size) - math.pi / 2 for index in range(size)]
    places = [(centre + radius * math.cos(angle), centre + radius * math.sin(angle)) for angle in angles]
    edges = edges_of(graph)[:MAXIMUM_EDGES]
    heaviest = edges[0][0] if edges else 1.0
    # many lines must be finer to stay apart
    fineness = min(1.0, 80 / max(1, len(edges))) ** 0.5
    parts = []
    for weight, one, other in reversed(edges):
        share = weight / heaviest
        inside = _of_one_group(graph.groups[one], graph.groups[other])
        colour = f"g{_group_index(graph.groups, graph.groups[one])}" if inside else "across"
        (x1, y1), (x2, y2) = places[one], places[other]
        # neighbours bow only a little, opposite nodes pass near the centre
        pull = 0.25 + 0.55 * math.hypot(x2 - x1, y2 - y1) / (2 * radius)
        middle_x = (x1 + x2) / 2 * (1 - pull) + centre * pull
        middle_y = (y1 + y2) / 2 * (1 - pull) + centre * pull
        parts.append(
            tag(
                "path",
                _tip(graph.names, one, other, weight),
                d=f"M{x1:.0f} {y1:.0f}Q{middle_x:.0f} {middle_y:.0f} {x2:.0f} {y2:.0f}",
                class_=f"edge {colour}",
                stroke_width=write(0.3 + 3.0 * fineness * share),
                stroke_opacity=write(0.12 + 0.75 * fineness * share),
            )
        )
    dot = max(2.2, min(7.0, math.pi * radius / max(1, size) * 0.62))
    for index, (x, y) in enumerate(places):
        css = f"node g{_group_index(graph.groups, graph.groups[index])}"
        name, group = graph.names[index], graph.groups[index]
        tip = title(f"{name} ({group})" if group else name)
        parts.append(tag("circle", tip, cx=x, cy=y, r=dot, class_=css))
    write_labels = _radial_labels if radial else _upright_labels
    parts.append(write_labels(labels, angles, centre, radius + dot + 7))
    return drawing("".join(parts), SIZE, description, SIZE)


def _is_named(graph: Ordered) -> bool:
    return not any(graph.groups) and len(graph.names) <= MAXIMUM_NAMES


def edges_of(graph: Ordered) -> list[tuple[float, int, int]]:
    """(weight, client, client) of every edge, the heaviest first; a direction that is heavier counts."""
    size = len(graph.names)
    edges = [
        (max(graph.weights[one][other], graph.weights[other][one]), one, other)
        for one in range(size)
        for other in range(one)
    ]
    return sorted((edge for edge in edges if edge[0] > 0), reverse=True)


def _upright_labels(labels: Sequence[str], angles: Sequence[float], centre: float, radius: float) -> str:
    """Each label once, level, beside the middle of its arc."""
    parts = []
    for start, end, label in _runs(labels):
        if len(angles) == end - start:
            return ""  # one group needs no name
        angle = (angles[start] + angles[end - 1]) / 2
        x, y = centre + radius * math.cos(angle), centre + radius * math.sin(angle)
        anchor = "middle" if abs(math.cos(angle)) < 0.3 else "start" if math.cos(angle) > 0 else "end"
        room = (SIZE - 2 * 4 if anchor == "middle" else SIZE - x if anchor == "start" else x) / 7.2
        label = shorten(label, max(6, min(18, int(room))))
        parts.append(text(x, y + 4 + 5 * math.sin(angle), label, text_anchor=anchor, class_="label small"))
    return "".join(parts)


def _radial_labels(labels: Sequence[str], angles: Sequence[float], centre: float, radius: float) -> str:
    """Each label once, along the ray through the middle of its arc, while there is room between the rays."""
    runs = _runs(labels)
    if len(runs) > RADIAL_LABELS:
        return ""
    parts = []
    for start, end, label in runs:
        angle = (angles[start] + angles[end - 1]) / 2
        x, y = centre + radius * math.cos(angle), centre + radius * math.sin(angle)
        # on the left half the text is turned once more, so that nobody has to read upside down
        left = math.cos(angle) < 0
        turn = math.degrees(angle) + (180 if left else 0)
        parts.append(
            text(
                0,
                3.5,
                shorten(label, 13),
                text_anchor="end" if left else "start",
                class_="label tiny",
                transform=f"translate({x:.1f} {y:.1f}) rotate({turn:.1f})",
            )
        )
    return "".join(parts)


def _cells(filled: Sequence[tuple[int, int, float]], names: Sequence[str], heaviest: float) -> str:
    """A square of unit size per cell that names its two clients when pointed at."""
    squares = (
        tag(
            "rect",
            _tip(names, row, column, weight),
            x=column,
            y=row,
            class_=f"h{_level(weight, heaviest)}",
        )
        for row, column, weight in filled
    )
    return tag("g", "".join(squares), class_="cells")


def _strokes(filled: Sequence[tuple[int, int, float]], heaviest: float) -> str:
    """Many cells in few bytes: one path per shade, a short horizontal stroke per cell."""
    by_level: dict[int, list[str]] = {}
    for row, column, weight in filled:
        by_level.setdefault(_level(weight, heaviest), []).append(f"M{column} {row}h1")
    paths = (tag("path", d="".join(strokes), class_=f"strokes h{level}") for level, strokes in sorted(by_level.items()))
    # a stroke runs along the middle of its row
    return tag("g", "".join(paths), transform="translate(0 .5)")


def _tip(names: Sequence[str], one: int, other: int, weight: float) -> str:
    return title(f"{shorten(names[one], TIP_LENGTH)} - {shorten(names[other], TIP_LENGTH)}: {weight:.3g}")


def _level(weight: float, heaviest: float) -> int:
    return max(1, min(LEVELS, math.ceil(LEVELS * weight / heaviest)))


def _runs(groups: Sequence[str]) -> list[tuple[int, int, str]]:
    """(start, end, label) of each stretch of equal labels."""
    bounds = [0, *(index for index in range(1, len(groups)) if groups[index] != groups[index - 1]), len(groups)]
    return [(start, end, groups[start]) for start, end in pairwise(bounds) if end > start]


def _group_index(groups: Sequence[str], label: str) -> int:
    return list(dict.fromkeys(groups)).index(label) % GROUP_COLOURS


def _binned(graph: Ordered) -> Ordered:
    """Fewer, larger cells where there are too many clients: each shows the mean of its weights."""
    size = len(graph.names)
    width = -(-size // MAXIMUM_CELLS)
    if width <= 1:
        return graph
    bins = [range(start, min(start + width, size)) for start in range(0, size, width)]
    return Ordered(
        names=tuple(f"{graph.names[one[0]]} to {graph.names[one[-1]]}" for one in bins),
        groups=tuple(graph.groups[one[0]] for one in bins),
        weights=tuple(
            tuple(sum(graph.weights[i][j] for i in one for j in other) / (len(one) * len(other)) for other in bins)
            for one in bins
        ),
    )
