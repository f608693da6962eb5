"""`fedmira data`: who holds what, with a rendered example per client."""

from __future__ import annotations

from pathlib import Path

import click

from fedmira.cli.arguments import config_arguments, read_config
from fedmira.cli.session import Session, standard_options


@click.command(short_help="Show who holds what: clients, tasks, lengths, examples.")
@config_arguments
@standard_options
@click.pass_obj
def data(session: Session, config: Path, overrides: tuple[str, ...]) -> None:
    """Show the clients of CONFIG: their tasks, the sizes of their splits, token counts, and one example each.

    In the examples, the tokens that are trained on stand between [[ and ]]. Of more than 40 clients the first 40 show
    one; with --json all do.
    """
    run_config = read_config(config, overrides)
    from fedmira.assembly import assemble
    from fedmira.data.describe import NUM_SHOWN, describe

    parts = assemble(run_config)
    description = describe(
        parts.federation,
        parts.tokenized,
        parts.tokenization,
        parts.base.tokenizer,
        None if session.json else NUM_SHOWN,
    )
    session.result(description.facts(), description.text())
