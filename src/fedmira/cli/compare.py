"""`fedmira compare`: several methods on the same clients; `fedmira quickstart`: the same on made-up tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmira.cli.arguments import config_arguments, read_config
from fedmira.cli.recipes import recipe_path
from fedmira.cli.session import Session, standard_options
from fedmira.errors import FedmiraError

if TYPE_CHECKING:
    from fedmira.config.run import RunConfig


@click.command(short_help="Offline, minutes: compare four methods on tasks whose graph is known.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the study.")
@standard_options
@click.pass_obj
def quickstart(session: Session, out: Path | None) -> None:
    """Compare four methods on made-up tasks with a known graph, write a report, print the table.

    Needs no network and no GPU. The recipe is `fedmira init quickstart`.
    """
    _compare(session, read_config(recipe_path("quickstart"), ()), out)


@click.command(short_help="Train several methods on the same clients and compare them.")
@config_arguments
@click.option("--methods", help="Comma-separated names, such as local_only,fedit,mira; variants of the config count.")
@click.option("--seeds", type=int, help="Number of paired draws; finished runs are kept in the same --out folder.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the study.")
@click.option("--dry-run", is_flag=True, help="Predict memory, bytes and time of all runs together; keep nothing.")
@standard_options
@click.pass_obj
def compare(
    session: Session,
    config: Path,
    overrides: tuple[str, ...],
    methods: str | None,
    seeds: int | None,
    out: Path | None,
    dry_run: bool,
) -> None:
    """Train every method of the comparison in CONFIG (section `compare`), each on the same draws of the same clients.

    Started again, it continues where it stopped: finished runs are kept.
    """
    chosen = list(overrides)
    if methods is not None:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        chosen.append(f"compare.methods=[{', '.join(names)}]")
    if seeds is not None:
        chosen.append(f"compare.seeds={seeds}")
    run_config = read_config(config, chosen)
    if dry_run:
        _estimate(session, run_config, out)
    else:
        _compare(session, run_config, out)


def _estimate(session: Session, config: RunConfig, directory: Path | None) -> None:
    with session.loading(config) as display:
        from fedmira.studies.forecast import estimate_study

        estimate = estimate_study(config, directory, display)
    session.result(estimate.facts(), "\n".join(["", *estimate.lines()]))


def _compare(session: Session, config: RunConfig, directory: Path | None) -> None:
    from fedmira.report.page import write_report
    from fedmira.report.reading import read_study
    from fedmira.report.summary import facts_of
    from fedmira.report.table import render_table, rows_of
    from fedmira.report.words import edge_line, rates_line

    facts: dict[str, Any] = {}
    failure: FedmiraError | None = None
    with session.loading(config) as display:
        from fedmira.studies.compare import FAILURES, failures_of, study_directory
        from fedmira.studies.compare import compare as run_comparison

        study = directory or study_directory(config)
        try:
            study = run_comparison(config, directory=directory, display=display)
        except FAILURES as error:
            # what did not fail is shown all the same
            failure = error
            facts = {"error": str(error), "exit_code": error.exit_code, "failures": failures_of(study)}
    page, record = write_report(study), read_study(study)
    below = [line for line in (rates_line(record), edge_line(record)) if line]
    session.result(
        {"study": str(study), "report": str(page), **facts_of(record), **facts},
        "\n".join(["", render_table(rows_of(record)), *below, f"Report: {page}"]),
    )
    if failure is not None:
        raise failure
