"""`fedmira report`: one self-contained HTML page for a run or a study, and its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedmira.cli.session import Session, standard_options


@click.command(short_help="Write the HTML report of a run or a study.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write the numbers of every method, seed and client to FILE, which must be new.",
)
@standard_options
@click.pass_obj
def report(session: Session, path: Path, csv_file: Path | None) -> None:
    """Write PATH/report/index.html, one file that needs no network. PATH is the folder of a run or of a study.

    With --json all numbers are printed, those of every client too.
    """
    from fedmira.report.clients import refuse_to_overwrite, write_csv
    from fedmira.report.page import write_report
    from fedmira.report.reading import read
    from fedmira.report.summary import facts_of

    if csv_file is not None:
        refuse_to_overwrite(csv_file)
    page, record = write_report(path), read(path)
    facts: dict[str, Any] = {"report": str(page), **facts_of(record)}
    lines = [f"Report: {page}"]
    if csv_file is not None:
        write_csv(record, csv_file)
        facts["csv"] = str(csv_file)
        lines.append(f"CSV: {csv_file}")
    session.result(facts, "\n".join(lines))
