"""Draw docs/results/bytes.svg: what smaller messages cost in loss, from the finished runs of the study of all methods.

python tools/methods_picture.py
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fedmira.report.svg import Scale, extent, tag, text, title, write, y_axis
from methods_study import REPOSITORY, STUDIES, chosen, load_study, mean_loss, standard_error

STUDY = "planted"
MESSAGES = {
    "mira": "float32",
    "mira-bf16": "bfloat16 up",
    "mira-int8": "int8 up",
    "mira-int8-both-ways": "int8 both ways",
    "mira-top-10": "top 10 % up",
    "mira-top-10-both-ways": "top 10 % up, int8 down",
    "mira-top-3": "top 3 % up",
    "mira-top-1": "top 1 % up",
}
"""Without error feedback the top 1 % is so far off that nothing else would be told apart."""
REFERENCES = {"local_only": "local_only, nothing sent", "fedit": "fedit"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760.0, 400.0, 58.0, 24.0, 56.0, 52.0
STYLE = """
.paper { fill: #ffffff } .ink { fill: #1d2429 } .dim, .tick { fill: #5b6770 } .grid, .zero { stroke: #e1e6ea }
.error { stroke: #3f78c6; stroke-width: 2 } .dot { fill: #3f78c6 } .reference { stroke: #5b6770; stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
  .paper { fill: #14181b } .ink { fill: #e8edf0 } .dim, .tick { fill: #a9b4bb } .grid, .zero { stroke: #2b3338 }
  .error { stroke: #7fb0f2 } .dot { fill: #7fb0f2 } .reference { stroke: #97a3ab }
}
"""


class Point(NamedTuple):
    label: str
    megabytes: float
    """Up and down, all rounds and clients of a run."""
    loss: float
    error: float
    """Standard error over draws."""


def points(names: dict[str, str]) -> list[Point]:
    """All of `names`; exits where reported runs of the present defaults are missing."""
    reported = chosen(load_study(STUDIES / f"{STUDY}.yaml", None))
    if absent := [name for name in names if name not in reported]:
        raise SystemExit(f"not run yet: {', '.join(absent)}; see tools/methods_study.py")
    found = []
    for name, label in names.items():
        runs = reported[name][1]
        sent = sum(run.line["upload_bytes"] + run.line["download_bytes"] for run in runs) / len(runs)
        found.append(Point(label, sent / 1e6, mean_loss(runs), standard_error(runs)))
    return found


def picture(sent: list[Point], references: list[Point]) -> str:
    """Loss against bytes, those on a logarithmic scale."""
    bounds = [value for point in sent for value in (point.loss - point.error, point.loss + point.error)]
    y = Scale(*extent([*bounds, *(point.loss for point in references)]), HEIGHT - BOTTOM, TOP)
    low, high = extent([math.log10(point.megabytes) for point in sent], padding=0.12)
    x = Scale(low, high, LEFT, WIDTH - RIGHT - 60)
    parts = [y_axis(y, LEFT, WIDTH - RIGHT, write)]
    for megabytes in (5, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500):
        if low <= math.log10(megabytes) <= high:
            at = x(math.log10(megabytes))
            parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
            parts.append(text(at, HEIGHT - BOTTOM + 18, f"{megabytes}", text_anchor="middle", class_="tick"))
    for point in references:
        at = y(point.loss)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="reference"))
        parts.append(text(WIDTH - RIGHT, at - 6, point.label, text_anchor="end", class_="dim"))
    for point in sent:
        across, down = x(math.log10(point.megabytes)), y(point.loss)
        low_end, high_end = y(point.loss - point.error), y(point.loss + point.error)
        parts.append(tag("line", x1=across, x2=across, y1=low_end, y2=high_end, class_="error"))
        said = f"{point.label}: {point.loss:.3f} ({point.error:.3f}) at {point.megabytes:.1f} MB"
        parts.append(tag("circle", title(said), cx=across, cy=down, r=5.0, class_="dot"))
        parts.append(text(across + 9, down + 4.5, point.label, class_="ink"))
    parts.append(text(LEFT - 40, 28, "Test loss of mira, nats per answer token, by what is sent", class_="ink"))
    parts.append(
        text(WIDTH / 2, HEIGHT - 12, "MB up and down in a run, 16 clients", text_anchor="middle", class_="dim")
    )
    return tag(
        "svg",
        title("Loss of mira on planted tasks against the bytes that cross, by compression")
        + tag("style", STYLE)
        + tag("rect", width=WIDTH, height=HEIGHT, class_="paper")
        + "".join(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        font_family="system-ui, sans-serif",
        font_size=14.0,
    )


if __name__ == "__main__":
    target = REPOSITORY / "docs" / "results" / "bytes.svg"
    target.write_text(picture(points(MESSAGES), points(REFERENCES)) + "\n", encoding="utf-8")
    print(f"wrote {target.relative_to(REPOSITORY)}")
