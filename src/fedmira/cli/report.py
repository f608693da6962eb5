"""`fedmira report`: one self-contained HTML page for a run or a study."""

from __future__ import annotations

from pathlib import Path

import click

from fedmira.cli.session import Session, standard_options


@click.command(short_help="Write the HTML report of a run or a study.")
@click.argument("path", type=click.Path(path_type=Path))
@standard_options
@click.pass_obj
def report(session: Session, path: Path) -> None:
    """Write PATH/report/index.html, one file that needs no network. PATH is the folder of a run or of a study."""
    from fedmira.report.page import write_report

    page = write_report(path)
    session.result({"report": str(page)}, f"Report: {page}")
