"""`fedmira run`: one method on one federation with one seed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from fedmira.cli.arguments import config_arguments, read_config_and_text
from fedmira.cli.session import Session, standard_options
from fedmira.errors import UsageError


@click.command(short_help="Train: one method, one federation, one seed.")
@config_arguments
@click.option("--dry-run", is_flag=True, help="Predict memory, bytes and time by trying small parts; keep nothing.")
@click.option(
    "--resume", is_flag=True, help="Continue the run where it stopped, bit for bit; rounds and clients may be added."
)
@click.option("--profile", is_flag=True, help="Write where the time went to profile.json, and print it.")
@standard_options
@click.pass_obj
def run(session: Session, config: Path, overrides: tuple[str, ...], dry_run: bool, resume: bool, profile: bool) -> None:
    """Train as CONFIG says; KEY=VALUE pairs such as method.graph.kind=labels win over the file."""
    from fedmira.runs.atomic import unwritable_line
    from fedmira.runs.naming import run_directory, run_stem
    from fedmira.runs.store import RunStore

    run_config, text = read_config_and_text(config, overrides)
    if dry_run:
        if resume or profile:
            raise UsageError("--dry-run predicts a whole run and does none; leave out --resume and --profile with it")
        from fedmira.model.source import is_absent_gpu

        unwritable = unwritable_line(run_directory(run_config))
        if is_absent_gpu(run_config.model.device):
            from fedmira.forecast.elsewhere import memory_elsewhere

            needed = memory_elsewhere(run_config)
            needed = needed._replace(warnings=(*needed.warnings, *filter(None, [unwritable])))
            session.result(needed.facts(), "\n".join(needed.lines()))
            return
        from fedmira.forecast.estimate import dry_run as estimate_run

        estimate = estimate_run(run_config)
        estimate = estimate._replace(warnings=(*estimate.warnings, *filter(None, [unwritable])))
        session.result(estimate._asdict(), "\n".join(estimate.lines()))
        return
    open_store = RunStore.resume if resume else RunStore.create
    # before anything heavy is loaded: what speaks against the directory is said at once
    with open_store(run_config, text) as store:
        if resume and not store.has_progress():
            where = f"no run {run_stem(run_config)} has begun in {store.path.parent}"
            line = f"nothing to resume; this is a new run: {where}"
            session.warn(line)
            store.log(f"warning: {line}")
        with session.loading(run_config, store.log) as display:
            from fedmira.experiment import carry_out

            path = carry_out(store, display, profile=profile)
    from fedmira.report.reading import read_run
    from fedmira.report.summary import facts_of, lines_of

    record = read_run(path)
    facts, lines = {"run": str(path), **facts_of(record)}, [f"Run: {path}", *lines_of(record)]
    if profile:
        from fedmira.profile import lines as profile_lines

        facts["profile"] = RunStore.open(path).profile()
        lines += ["", *profile_lines(facts["profile"]), ""]
    session.result(facts, "\n".join([*lines, f"Next: fedmira report {shlex.quote(str(path))}"]))
