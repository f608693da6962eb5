"""Print the Markdown sections of a results page from study directories: words, table, learning rates, data.

    python tools/results_page.py "Title=runs/STUDY" ... > sections.md

Everything printed comes from the studies; the words around it are written by hand.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from fedmira.report.reading import StudyRecord, read
from fedmira.report.table import render_table, rows_of
from fedmira.report.words import headline


def section(title: str, path: Path) -> str:
    """One section: what came out in words, the table, the rates that were tried, and what the data was."""
    study = read(path)
    if not isinstance(study, StudyRecord):
        raise SystemExit(f"{path} is a single run; give a study that `fedmira compare` made")
    rows = rows_of(study)
    parts = [f"## {title}", " ".join(headline(study)), render_table(rows, markdown=True)]
    if study.tuning:
        parts.append(_rates(study))
    return "\n\n".join(parts)


def _rates(study: StudyRecord) -> str:
    """Validation loss of every method at every learning rate tried; the chosen one in bold."""
    tried_by = {method: study.rates_tried(method) for method in dict.fromkeys(e["method"] for e in study.tuning)}
    rates = sorted({rate for tried in tried_by.values() for rate in tried})
    lines = [
        "| validation loss on the tuning draw at learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]
    for method, tried in tried_by.items():
        trained = {rate: loss for rate, loss in tried.items() if not math.isnan(loss)}
        shown = {rate: f"{loss:.3f}" if rate in trained else "diverged" for rate, loss in tried.items()}
        if trained:
            best = min(trained, key=trained.__getitem__)
            shown[best] = f"**{shown[best]}**"
        lines.append(f"| {method} | " + " | ".join(shown.get(rate, "") for rate in rates) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="TITLE=STUDY")
    for argument in parser.parse_args().studies:
        title, _, path = argument.partition("=")
        print(section(title, Path(path)) + "\n")


if __name__ == "__main__":
    main()
