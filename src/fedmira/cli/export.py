"""`fedmira export`: a client's adapter as a PEFT folder or its whole model; `fedmira predict`: its answer."""

from __future__ import annotations

from pathlib import Path

import click

from fedmira.cli.session import Session, standard_options
from fedmira.errors import UsageError


@click.command(short_help="Write a client's adapter as a PEFT folder.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--client", help="Name of the client.")
@click.option("--all", "all_clients", is_flag=True, help="Every client, each in OUT/NAME.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="New or empty folder.")
@click.option("--with-base", is_flag=True, help="Put a copy of the embedded base model into OUT/base.")
@standard_options
@click.pass_obj
def export(session: Session, run: Path, client: str | None, all_clients: bool, out: Path, with_base: bool) -> None:
    """Write what a client of RUN gets to keep as a folder that peft and vLLM load."""
    if (client is None) != all_clients:
        raise UsageError("give either --client NAME or --all")
    from fedmira.export.clients import export_clients

    folders = export_clients(run, client, out, with_base=with_base, warn=session.warn)
    session.result(
        {"folders": {name: str(folder) for name, folder in folders.items()}, "warnings": session.warnings},
        "\n".join(f"{name}: {folder}" for name, folder in folders.items()),
    )


@click.command(short_help="Answer a question with a client's adapter.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--client", required=True, help="Name of the client.")
@click.option("--input", "context", default="", help="Further context of the instruction.")
@click.argument("text")
@standard_options
@click.pass_obj
def predict(session: Session, run: Path, client: str, context: str, text: str) -> None:
    """Print what the model of RUN answers to the instruction TEXT with the adapter of a client."""
    from fedmira.export.clients import answer

    reply = answer(run, client, text, context, warn=session.warn)
    facts = {"client": client, "instruction": text, "input": context, "answer": reply, "warnings": session.warnings}
    session.result(facts, reply)
