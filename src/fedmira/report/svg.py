"""The few shapes that charts are made of, as SVG text: escaping, numbers, ticks, axes.

Colours are CSS classes and variables of the page (`style.css`), so that one drawing serves light and dark mode; sizes
are user units of a viewBox, so that it scales from a phone to a wide screen. Knows nothing about what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from fedmira.formats import printable

WIDTH = 480
"""Width of every chart in user units; text of 13 units stays readable at the width of a phone."""
CHARACTER_WIDTH = 8.8
"""Of a label, generously: a phone shows text in larger units."""


def tag(name: str, body: str = "", **attributes: object) -> str:
    """One element; attribute values are escaped, `body` is SVG already. `class_` is class, `_` becomes `-`.

    >>> tag("rect", x=1.0, stroke_width=2, class_="a<b")
    '<rect x="1" stroke-width="2" class="a&lt;b"/>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(write(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{body}</{name}>" if body else f"<{name}{written}/>"


def write(value: object) -> str:
    """A number with at most two decimals, anything else as it is.

    >>> write(2.50), write(1 / 3), write(-0.0001), write("x")
    ('2.5', '0.33', '0', 'x')
    """
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def text(x: float, y: float, content: str, **attributes: object) -> str:
    """One line of text; control characters are written out and everything is escaped."""
    return tag("text", escape(printable(content)) or " ", x=x, y=y, **attributes)


def title(content: str) -> str:
    """What a browser shows while the pointer rests on the parent element."""
    return f"<title>{escape(printable(content))}</title>"


def shorten(label: str, length: int) -> str:
    """`label` with at most `length` characters; the middle goes, since ends tell names apart.

    >>> shorten("task1234_question_generation", 12)
    'task12..tion'
    """
    label = printable(label)
    if len(label) <= length:
        return label
    tail = (length - 2) * 2 // 5
    return f"{label[: length - 2 - tail]}..{label[len(label) - tail :]}"


def drawing(body: str, height: float, description: str, width: float = WIDTH) -> str:
    """A chart of `height` units that fills the width it is given; `description` is what screen readers say."""
    return tag(
        "svg",
        title(description) + body,
        class_="chart",
        viewBox=f"0 0 {write(width)} {write(height)}",
        role="img",
        aria_label=printable(description),
    )


class Scale(NamedTuple):
    """Maps [low, high] of the data to [start, end] of the drawing; values beyond are clipped to the ends.

    What is not a number goes to the end of `high`, where no loss is taken for the lowest.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = 1.0 if math.isnan(value) else (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within [low, high], about `wanted` of them.

    >>> ticks(0, 1), ticks(2.38, 3.41)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [2.4, 2.6, 2.8, 3.0, 3.2, 3.4])
    """
    # up to half as many again: too few lines read worse than a few too many
    raw = (high - low) / max(1.0, 1.5 * wanted)
    if raw < 1e-300:
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def extent(values: Sequence[float], *, padding: float = 0.05, include: Sequence[float] = ()) -> tuple[float, float]:
    """Lowest and highest finite value with some air around; never an empty interval."""
    finite = [value for value in (*values, *include) if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    air = (high - low) * padding
    # no air beyond a bound that was asked for, such as zero
    return low if low in include else low - air, high if high in include else high + air


def y_axis(scale: Scale, left: float, right: float, name: Callable[[float], str], wanted: int = 5) -> str:
    """Horizontal grid lines with their values left of `left`."""
    parts = []
    for value in ticks(scale.low, scale.high, wanted):
        y = scale(value)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="zero" if value == 0 else "grid"))
        parts.append(text(left - 6, y + 4.5, name(value), text_anchor="end", class_="tick"))
    return "".join(parts)


def x_axis(scale: Scale, top: float, bottom: float, name: Callable[[float], str], wanted: int = 5) -> str:
    """Vertical grid lines with their values below `bottom`."""
    parts = []
    for value in ticks(scale.low, scale.high, wanted):
        x = scale(value)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="zero" if value == 0 else "grid"))
        parts.append(text(x, bottom + 17, name(value), text_anchor="middle", class_="tick"))
    return "".join(parts)


def round_axis(scale: Scale, y: float, first: int, last: int) -> str:
    """Round numbers below `y`, whole ones only, and the word for them."""
    parts = [
        text(scale(value), y + 17, write(value), text_anchor="middle", class_="tick")
        for value in (ticks(first, last, 6) if last > first else [float(first)])
        if value == int(value)
    ]
    parts.append(text(scale.end, y + 35, "round", text_anchor="end", class_="axis"))
    return "".join(parts)


def compact(value: float) -> str:
    """A short number for an axis.

    >>> compact(0.5), compact(2.0), compact(1e6), compact(12500.0), compact(0.00002)
    ('0.5', '2', '1e+06', '12500', '2e-05')
    """
    return f"{value:.6g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
