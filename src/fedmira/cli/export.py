"""`fedmira export`: a client's adapter as a PEFT folder or its whole model; `fedmira predict`: its answer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from fedmira.cli.session import Session, standard_options
from fedmira.errors import Interrupted, UsageError
from fedmira.runs.signals import handled, not_ignored


class _Ended(BaseException):
    """A signal has come; no handler of exceptions on the way may take it for one of its own."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end it as Ctrl-C does: what was begun is removed.

    SIGHUP stays ignored where it is, as under `nohup`.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    try:
        with handled(end, not_ignored(signal.SIGTERM, signal.SIGHUP)):
            yield
    except _Ended as ended:
        number = signal.Signals(ended.args[0])
        raise Interrupted(f"interrupted by {number.name}", number) from None


@click.command(short_help="Write a client's adapter as a PEFT folder.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--client", help="Name of the client.")
@click.option("--all", "all_clients", is_flag=True, help="Every client, each in OUT/NAME.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="New or empty folder.")
@click.option("--with-base", is_flag=True, help="Put a copy of the embedded base model into OUT/base.")
@click.option("--merged", is_flag=True, help="Write a whole model: the base with the adapter added to its weights.")
@standard_options
@click.pass_obj
def export(
    session: Session, run: Path, client: str | None, all_clients: bool, out: Path, with_base: bool, merged: bool
) -> None:
    """Write what a client of RUN gets to keep as a folder that peft loads.

    vLLM serves it if it is a LoRA adapter of rank 512 or less whose base is of a family with LoRA there: not GPT-2.
    Where every weight was tuned, and with --merged, the folder is a whole model, for transformers.
    """
    if (client is None) != all_clients:
        raise UsageError("give either --client NAME or --all")
    from fedmira.export.clients import export_clients

    with _ended_by_signals():
        folders = export_clients(run, client, out, with_base=with_base, merged=merged, warn=session.warn)
    session.result(
        {"folders": {name: str(folder) for name, folder in folders.items()}, "warnings": session.warnings},
        "\n".join(f"{name}: {folder}" for name, folder in folders.items()),
    )


@click.command(short_help="Answer a question with a client's adapter.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--client", required=True, help="Name of the client.")
@click.option("--input", "context", default="", help="Further context of the instruction TEXT.")
@click.option(
    "--file",
    "file",
    metavar="FILE",
    help="Many questions in place of TEXT: one instruction a line, or records with instruction and input, as in the "
    "data of RUN, whose answers are not looked at; - reads standard input.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens at which answers are cut; by default as in the run.",
)
@click.argument("text", required=False)
@standard_options
@click.pass_obj
def predict(
    session: Session,
    run: Path,
    client: str,
    context: str,
    file: str | None,
    max_new_tokens: int | None,
    text: str | None,
) -> None:
    """Print what the model of RUN answers to the instruction TEXT with the adapter of a client.

    With --file, one line for each question: the answer with its line breaks written out as \\n, or with --json an
    object.
    """
    if (text is None) == (file is None):
        raise UsageError("give either TEXT or --file FILE")
    if file is not None and context:
        raise UsageError("--input has no effect with --file; write it into the records, as `input`")
    from fedmira.export.clients import answer, answers, fields_of

    if file is None:
        assert text is not None, "one of the two is given"
        reply = answer(run, client, text, context, max_new_tokens=max_new_tokens, warn=session.warn)
        facts = {"client": client, "instruction": text, "input": context, "answer": reply, "warnings": session.warnings}
        session.result(facts, reply)
        return
    from fedmira.export.questions import read_questions
    from fedmira.formats import printable

    questions = read_questions(file, fields_of(run))
    replies = answers(run, client, questions, max_new_tokens=max_new_tokens, warn=session.warn)
    for question, reply in zip(questions, replies, strict=True):
        asked = {"client": client, "instruction": question.instruction, "input": question.input}
        session.result({**asked, "answer": reply}, printable(reply, keep="\t"))
