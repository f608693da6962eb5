"""Charts as pure functions: plain data in, one SVG element as text out. Graphs are drawn by `graph_charts`.

Every text is escaped. A colour is the name of a CSS class that `style.css` defines (`reference`, `s0` to `s7`, `worse`,
`better`, `level`). Knows nothing about runs, studies or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedmira.formats import format_change, format_loss
from fedmira.report.svg import (
    CHARACTER_WIDTH,
    WIDTH,
    Scale,
    compact,
    drawing,
    extent,
    round_axis,
    shorten,
    tag,
    text,
    ticks,
    title,
    x_axis,
    y_axis,
)

LEFT = 50.0
TOP = 14.0
AXIS_HEIGHT = 40.0
LABEL_HEIGHT = 17.0


class Line(NamedTuple):
    """A curve over rounds."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    bold: bool = True
    """Bold curves are labelled at their end; the others are faint."""


class Bar(NamedTuple):
    """One coloured part of a bar."""

    label: str
    value: float
    colour: str


class Step(NamedTuple):
    """A number before and after the merge of one round."""

    round: int
    before: float
    after: float


def line_chart(lines: Sequence[Line], description: str) -> str:
    """Curves of a loss over rounds, drawn in order; non-finite points are left out."""
    lines = [line._replace(points=[point for point in line.points if math.isfinite(point[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    labels = [(line, shorten(line.label, 16)) for line in lines if line.bold]
    # room for every label at the end of its line
    height = max(290.0, TOP + AXIS_HEIGHT + LABEL_HEIGHT * len(labels))
    right = WIDTH - 12 - CHARACTER_WIDTH * max((len(label) for _, label in labels), default=0)
    bottom = height - AXIS_HEIGHT
    rounds = [point[0] for line in lines for point in line.points] or [1.0]
    x = Scale(min(rounds), max(rounds) if max(rounds) > min(rounds) else min(rounds) + 1, LEFT + 6, right - 6)
    y = Scale(*extent([point[1] for line in lines for point in line.points]), bottom, TOP)
    parts = [y_axis(y, LEFT, right, compact), round_axis(x, bottom, int(min(rounds)), int(max(rounds)))]
    for line in lines:
        path = "M" + "L".join(f"{x(round_):.1f} {y(value):.1f}" for round_, value in line.points)
        css = f"line {'bold' if line.bold else 'thin'} {line.colour}"
        parts.append(tag("path", title(line.label), d=path, class_=css))
        if line.bold or len(line.points) == 1:
            end = line.points[-1]
            tip = title(f"{line.label}: {format_loss(end[1])}")
            parts.append(tag("circle", tip, cx=x(end[0]), cy=y(end[1]), r=3.5, class_=f"fill {line.colour}"))
    heights = _apart([y(line.points[-1][1]) for line, _ in labels], LABEL_HEIGHT, TOP, bottom)
    for (line, label), label_y in zip(labels, heights, strict=True):
        parts.append(text(right + 4, label_y + 4.5, label, class_=f"label {line.colour}"))
    return drawing("".join(parts), height, description)


def grouped_bars(groups: Sequence[tuple[str, Sequence[Bar]]], description: str, *, highest: float) -> str:
    """Horizontal bars from zero to `highest`: a headed group per task, a bar per method, its value at the end."""
    bar, gap, head = 12.0, 3.0, 20.0
    x = Scale(0.0, highest or 1.0, 4.0, WIDTH - 56.0)
    parts, y = [], 4.0
    for label, bars in groups:
        parts.append(text(4, y + 13, shorten(label, 42), class_="label"))
        y += head
        for one in bars:
            finite = math.isfinite(one.value)
            width = (x(one.value) - x.start) if finite else x.end - x.start
            rect = tag("rect", x=x.start, y=y, width=max(width, 1.0), height=bar, rx=2, class_=f"fill {one.colour}")
            value = text(x.start + width + 6, y + bar - 1.5, format_loss(one.value), class_="value")
            parts.append(tag("g", title(f"{label}, {one.label}: {format_loss(one.value)}") + rect + value))
            y += bar + gap
        y += 9.0
    return drawing("".join(parts), max(y, 20.0), description)


def change_bars(
    changes: Sequence[tuple[str, float]],
    description: str,
    *,
    low: float,
    high: float,
    tolerance: float,
) -> str:
    """One thin bar per client from best to worst: up is worse than the reference, down is better.

    Args:
        changes: (client, relative change of its loss).
        description: what the chart shows.
        low: the lowest change of all charts that stand side by side, and
        high: the highest, so that they can be compared.
        tolerance: a change above it is drawn as harm.
    """
    height = 210.0
    bottom = height - 12.0
    y = Scale(min(low, -tolerance), max(high, tolerance), bottom, TOP)
    order = sorted(changes, key=lambda change: change[1])
    slot = (WIDTH - LEFT - 8) / max(1, len(order))
    parts = [y_axis(y, LEFT, WIDTH - 4, lambda value: f"{100 * value:+.3g} %" if value else "0", 4)]
    for position, (name, change) in enumerate(order):
        colour = "worse" if change > tolerance else "better" if change < -tolerance else "level"
        top, base = sorted((y(change), y(0.0)))
        rect = tag(
            "rect",
            title(f"{name}: {100 * change:+.1f} %"),
            x=LEFT + 4 + position * slot,
            y=top,
            width=max(0.6, slot * (0.8 if slot > 3 else 1.0)),
            height=max(1.0, base - top),
            class_=f"fill {colour}",
        )
        parts.append(rect)
    return drawing("".join(parts), height, description)


def paired_dots(rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], description: str) -> str:
    """Differences to the reference: a row per method, a dot per seed, a bar at their mean; left of zero is better.

    A difference that is not finite is a cross at the right end, and its row has no bar.

    Args:
        rows: (method, [(seed, difference)], colour).
        description: what the chart shows.
    """
    row_height, head = 46.0, 8.0
    bottom = head + row_height * len(rows)
    values = [value for _, dots, _ in rows for _, value in dots]
    x = Scale(*extent(values, padding=0.08, include=(0.0,)), 14.0, WIDTH - 18.0)
    if x.high == 0.0 or x.low == 0.0:
        # zero gets air too: dots on it must not be cut
        air = (x.high - x.low) * 0.08
        x = x._replace(low=x.low - (air if x.low == 0 else 0), high=x.high + (air if x.high == 0 else 0))
    parts = [x_axis(x, head, bottom, lambda value: f"{value:+.3g}" if value else "0", 4)]
    for position, (label, dots, colour) in enumerate(rows):
        y = head + position * row_height + 32.0
        parts.append(text(14, y - 15, shorten(label, 40), class_=f"label halo {colour}"))
        if dots and all(math.isfinite(value) for _, value in dots):
            centre = x(sum(value for _, value in dots) / len(dots))
            parts.append(tag("line", x1=centre, x2=centre, y1=y - 9, y2=y + 9, class_=f"line bold {colour}"))
        for seed, value in dots:
            if not math.isfinite(value):
                tip = title(f"{label}, {seed}: the loss was not finite")
                cross = f"M{x.end - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
                parts.append(tag("path", tip, d=cross, class_=f"line bold {colour}"))
                continue
            tip = title(f"{label}, {seed}: {format_change(value)}")
            parts.append(tag("circle", tip, cx=x(value), cy=y, r=4.5, class_=f"dot {colour}"))
    return drawing("".join(parts), bottom + 24, description)


def stacked_bars(rows: Sequence[tuple[str, Sequence[Bar]]], description: str, write: Callable[[float], str]) -> str:
    """Horizontal bars made of parts, from zero, with their sum at the end."""
    row_height = 42.0
    sums = [sum(bar.value for bar in bars) for _, bars in rows]
    x = Scale(0.0, max(sums, default=0.0) or 1.0, 4.0, WIDTH - 92.0)
    parts = []
    for position, ((label, bars), total) in enumerate(zip(rows, sums, strict=True)):
        y, start = position * row_height + 14.0, 0.0
        parts.append(text(4, y, shorten(label, 40), class_="label"))
        for bar in bars:
            if bar.value > 0:
                left, width = x(start), x(start + bar.value) - x(start)
                tip = title(f"{label}, {bar.label}: {write(bar.value)}")
                parts.append(
                    tag("rect", tip, x=left, y=y + 6, width=max(0.5, width), height=14, class_=f"fill {bar.colour}")
                )
            start += bar.value
        parts.append(text(x(total) + 6, y + 17.5, write(total), class_="value"))
    return drawing("".join(parts), row_height * len(rows) + 4, description)


def stacked_columns(
    columns: Sequence[tuple[int, Sequence[Bar]]],
    description: str,
    write: Callable[[float], str],
    unit: tuple[str, float],
) -> str:
    """One column per round made of parts, from zero.

    Args:
        columns: (round, parts).
        description: what the chart shows.
        write: how a value is written where one points at it.
        unit: (name, size) of what the axis counts in.
    """
    height = 220.0
    left, top, bottom = LEFT, TOP + 16, height - AXIS_HEIGHT
    name, size = unit
    sums = [sum(bar.value for bar in bars) for _, bars in columns]
    y = Scale(0.0, (max(sums, default=0.0) or 1.0) / size, bottom, top)
    rounds = [round_ for round_, _ in columns] or [1]
    slot = (WIDTH - left - 8) / (max(rounds) - min(rounds) + 1)
    x = Scale(min(rounds) - 0.5, max(rounds) + 0.5, left + 4, WIDTH - 4.0)
    parts = [
        y_axis(y, left, WIDTH - 4, compact, 4),
        round_axis(x, bottom, min(rounds), max(rounds)),
        text(left - 6, TOP, name, text_anchor="end", class_="axis"),
    ]
    for round_, bars in columns:
        base = 0.0
        for bar in bars:
            if bar.value > 0:
                ceiling = y((base + bar.value) / size)
                tip = title(f"round {round_}, {bar.label}: {write(bar.value)}")
                width = max(0.8, slot * (0.76 if slot > 4 else 1.0))
                column = tag(
                    "rect",
                    tip,
                    x=x(round_) - width / 2,
                    y=ceiling,
                    width=width,
                    height=max(0.5, y(base / size) - ceiling),
                    class_=f"fill {bar.colour}",
                )
                parts.append(column)
            base += bar.value
    return drawing("".join(parts), height, description)


def merge_steps(steps: Sequence[Step], description: str, colour: str) -> str:
    """What a merge does to a non-negative number: a line falls from before (ring) to after (dot) in each round.

    The scale is logarithmic where the positive values span more than a factor of fifty.
    """
    steps = [step for step in steps if math.isfinite(step.before) and math.isfinite(step.after)]
    values = [value for step in steps for value in (step.before, step.after)]
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and max(positive) / min(positive) > 50

    def transform(value: float) -> float:
        return math.log10(max(value, min(positive))) if logarithmic else value

    height = 220.0
    left, bottom = 62.0, height - AXIS_HEIGHT
    low, high = extent([transform(value) for value in values], include=() if logarithmic else (0.0,))
    y = Scale(low, high, bottom, TOP)
    rounds = [step.round for step in steps] or [1]
    x = Scale(min(rounds), max(max(rounds), min(rounds) + 1), left + 12, WIDTH - 14.0)
    axis = _decades(y, left) if logarithmic else y_axis(y, left, WIDTH - 4, compact, 4)
    parts = [axis, round_axis(x, bottom, min(rounds), max(rounds))]
    if len(steps) > 1:
        path = "M" + "L".join(f"{x(step.round):.1f} {y(transform(step.after)):.1f}" for step in steps)
        parts.append(tag("path", d=path, class_=f"line thin {colour}"))
    for step in steps:
        at, before, after = x(step.round), y(transform(step.before)), y(transform(step.after))
        tip = title(f"round {step.round}: {compact(step.before)} before, {compact(step.after)} after the merge")
        stem = tag("line", x1=at, x2=at, y1=before, y2=after, class_=f"line {colour}")
        ring = tag("circle", cx=at, cy=before, r=3.6, class_=f"ring {colour}")
        dot = tag("circle", cx=at, cy=after, r=3.6, class_=f"fill {colour}")
        parts.append(tag("g", tip + stem + ring + dot))
    return drawing("".join(parts), height, description)


def _decades(y: Scale, left: float) -> str:
    """The axis of a logarithmic scale: powers of ten, or halves of a decade where there are few."""
    values = [value for value in ticks(y.low, y.high, 4) if value == int(value)]
    if len(values) < 2:
        values = ticks(y.low, y.high, 4)
    parts = []
    for value in values:
        parts.append(tag("line", x1=left, x2=WIDTH - 4, y1=y(value), y2=y(value), class_="grid"))
        parts.append(text(left - 6, y(value) + 4.5, f"{10**value:.2g}", text_anchor="end", class_="tick"))
    return "".join(parts)


def _apart(positions: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Move positions as little as a single sweep allows so that neighbours keep `distance`; order is kept."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [0.0] * len(positions)
    previous = low - distance
    for index in order:
        previous = placed[index] = max(positions[index], previous + distance)
    limit = high
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - distance
    return placed
