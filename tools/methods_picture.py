"""Draw the pictures of docs/results/methods.md from the finished runs: methods.svg, what the methods that matter most
come to on every federation; bytes.svg, what smaller messages cost in loss.

python tools/methods_picture.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedmira.report.svg import Scale, extent, tag, text, title, write, x_axis, y_axis
from methods_study import (
    REPOSITORY,
    STUDIES,
    Judged,
    Study,
    chosen,
    difference,
    harm,
    load_study,
    mean_loss,
    standard_error,
)

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
.others .error { stroke: #8b98a1 } .others .dot { fill: #8b98a1 } .told .error { stroke: #8b98a1 }
.told .dot { fill: #ffffff; stroke: #8b98a1; stroke-width: 2 } .alone { stroke: #5b6770 } .band { fill: #f2f5f7 }
@media (prefers-color-scheme: dark) {
  .paper { fill: #14181b } .ink { fill: #e8edf0 } .dim, .tick { fill: #a9b4bb } .grid, .zero { stroke: #2b3338 }
  .error { stroke: #7fb0f2 } .dot { fill: #7fb0f2 } .reference { stroke: #97a3ab }
  .others .error { stroke: #77848d } .others .dot { fill: #77848d } .told .error { stroke: #77848d }
  .told .dot { fill: #14181b; stroke: #77848d } .alone { stroke: #97a3ab } .band { fill: #1b2125 }
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
    return whole("Loss of mira on planted tasks against the bytes that cross, by compression", parts, WIDTH, HEIGHT)


class Row(NamedTuple):
    label: str
    names: tuple[str, ...]
    """The first of them that a study has."""
    look: str = "others"


TOLD = Row("mira, told the tasks", ("mira-true", "mira-labels"), "told")
ROWS = (
    Row("mira", ("mira",), "ours"),
    *(Row(name, (name,)) for name in ("fedlease", "pfedgraph", "fedit_finetuned", "ditto")),
    *(Row(name, (name,)) for name in ("fedalt", "fedsa_lora", "mira_published", "fedit")),
    TOLD,
)
PANELS = {
    "flan": "FLAN-8",
    "flan_few": "three of its tasks",
    "instruction_induction": "instruction induction",
    "natural_instructions": "Natural Instructions",
    "planted": "planted tasks",
    "planted_unequal": "planted, unequal",
}
ROW, PANEL, NAMES, HEAD, FOOT = 27.0, 162.0, 146.0, 92.0, 34.0
HARM = 54.0
"""Room for the share of harmed clients at the right of a panel."""


def overview(studies: Sequence[Study]) -> str:
    """Loss minus that of training alone, a panel for each federation, a row for each method."""
    width, bottom = NAMES + PANEL * len(studies) + 12, HEAD + ROW * len(ROWS)
    parts = [
        text(
            16,
            28,
            "Test loss minus that of training alone, nats per answer token: left of the line is better",
            class_="ink",
        ),
    ]
    for number, row in enumerate(ROWS):
        top = HEAD + ROW * number
        if number % 2 == 0:
            parts.append(tag("rect", x=8.0, y=top, width=width - 16, height=ROW, class_="band"))
        weight = "600" if row.look == "ours" else None
        parts.append(text(16, top + ROW / 2 + 4.5, row.label, class_="ink", font_size=13, font_weight=weight))
    for number, study in enumerate(studies):
        reported = {name: runs for name, (_, runs) in chosen(study).items()}
        parts.append(_panel(study, reported, NAMES + PANEL * number, bottom))
    return whole("What each method comes to on each federation, beside training alone", parts, width, bottom + FOOT)


def _panel(study: Study, reported: dict[str, list[Judged]], left: float, bottom: float) -> str:
    local, right = reported["local_only"], left + PANEL - HARM
    draws, clients = len(local), len(local[0].losses_K)
    found = {row: reported[name] for row in ROWS for name in row.names if name in reported}
    gaps = {row: difference(runs, local) for row, runs in found.items()}
    low = 1.12 * min(lower for _, lower, _ in gaps.values())
    # whoever loses more than the best gain is written out, or would hide the others
    x = Scale(
        low, min(-1.3 * low, extent([upper for _, _, upper in gaps.values()], include=[-0.2 * low])[1]), left, right
    )
    parts = [
        text(left, HEAD - 36, PANELS[study.name], class_="ink", font_size=12.5, font_weight="600"),
        text(left, HEAD - 19, f"{clients} clients, {draws} draws", class_="dim", font_size=12),
        text(left + PANEL - 10, HEAD - 4, "harmed", text_anchor="end", class_="dim", font_size=11),
        x_axis(x, HEAD, bottom, lambda value: f"{value:+g}" if value else "0", 2),
        tag("line", x1=x(0.0), x2=x(0.0), y1=HEAD, y2=bottom, class_="alone"),
    ]
    for row, runs in found.items():
        middle, lower, upper = gaps[row]
        y, share = HEAD + ROW * (ROWS.index(row) + 0.5), harm(runs, local)
        said = title(f"{row.label}: {middle:+.3f} [{lower:+.3f}, {upper:+.3f}], {share:.1%} of the clients harmed")
        if upper > x.high:
            drawn = text(right, y + 4.5, f"{middle:+.2f} \u2192", text_anchor="end", class_="dim", font_size=12)
        else:
            drawn = tag("line", x1=x(lower), x2=x(upper), y1=y, y2=y, class_="error")
            drawn += tag("circle", cx=x(middle), cy=y, r=4.5, class_="dot")
        parts.append(tag("g", said + drawn, class_=row.look))
        parts.append(text(left + PANEL - 10, y + 4.5, f"{share:.1%}", text_anchor="end", class_="dim", font_size=12))
    return "".join(parts)


def whole(description: str, parts: Sequence[str], width: float, height: float) -> str:
    """The picture, for light and dark pages."""
    return tag(
        "svg",
        title(description)
        + tag("style", STYLE)
        + tag("rect", width=width, height=height, class_="paper")
        + "".join(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        font_family="system-ui, sans-serif",
        font_size=14.0,
    )


if __name__ == "__main__":
    for name, drawn in (
        ("methods", overview([load_study(STUDIES / f"{study}.yaml", None) for study in PANELS])),
        ("bytes", picture(points(MESSAGES), points(REFERENCES))),
    ):
        target = REPOSITORY / "docs" / "results" / f"{name}.svg"
        target.write_text(drawn + "\n", encoding="utf-8")
        print(f"wrote {target.relative_to(REPOSITORY)}")
