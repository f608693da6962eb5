"""The command `fedmira`: its commands in the order a user meets them, and what happens to an error.

Exit codes: 0 done, 1 failed while running, 2 usage or config, 3 data, 4 environment, 5 checkpoint or integrity,
6 too few clients or a spent privacy budget, 129, 130, 143 interrupted after a clean checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from fedmira import __version__
from fedmira.cli.compare import compare, quickstart
from fedmira.cli.data import data
from fedmira.cli.export import export, predict
from fedmira.cli.init import init
from fedmira.cli.process import discard, prepare_process
from fedmira.cli.report import report
from fedmira.cli.run import run
from fedmira.cli.session import Session, debug_option, printable, tell
from fedmira.cli.validate import validate
from fedmira.errors import FedmiraError, SetupError

JOURNEY = (quickstart, init, validate, data, run, compare, report, export, predict)


class _InOrder(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, commands=JOURNEY, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedmira")
@debug_option
def cli() -> None:
    """Federated multi-task LoRA fine-tuning of language models.

    One frozen model, many clients whose tasks differ, one personalised adapter for each of them.
    Start with `fedmira quickstart`; then `fedmira init` lists recipes to copy and edit.
    """


def _fail(session: Session, message: str, exit_code: int) -> int:
    """Tell what went wrong on standard error, and with --json on standard output as well; return the exit code."""
    if session.debug:
        traceback.print_exc()
    head = "Error:" if os.environ.get("NO_COLOR") else click.style("Error:", fg="red", bold=True)
    tell(f"{head} {printable(message)}")
    return _answer(session, message, exit_code)


def _answer(session: Session, message: str, exit_code: int) -> int:
    """With --json the error as one object on standard output, unless a result that holds it is there already."""
    if session.json and not session.answered:
        try:
            click.echo(json.dumps({"error": message, "exit_code": exit_code}, sort_keys=True))
        except OSError:
            discard(sys.stdout)
    return exit_code


_OUT_OF_MEMORY = (
    "memory ran out ({}). Lower training.cohort_size (clients trained together), training.batch_size, data.max_length "
    "or evaluation.batch_tokens, or take a smaller model; `fedmira run CONFIG --dry-run` says what a run needs. What "
    "was saved goes on with --resume where more memory is free, and other settings mean a new run"
)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU or torch on a CPU was denied memory; the last has no exception of its own."""
    named = {kind.__name__ for kind in type(error).__mro__}
    return bool(named & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator: can't allocate" in str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. `arguments`: without the program's name; None for sys.argv."""
    prepare_process()
    session = Session()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        outcome = cli.main(args=given, prog_name="fedmira", standalone_mode=False, obj=session)
    except click.ClickException as error:
        error.show()
        # where an option is wrong none was read
        session.json = session.json or "--json" in given
        return _answer(session, error.format_message(), error.exit_code)
    except FedmiraError as error:
        return _fail(session, str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail(session, "interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        discard(sys.stdout)
        return 1
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(
                session,
                _OUT_OF_MEMORY.format(str(error).partition("\n")[0] or type(error).__name__),
                SetupError.exit_code,
            )
        hint = "" if session.debug else "\nThis is a fault in fedmira. Run again with --debug to see where it happened."
        return _fail(session, f"{type(error).__name__}: {error}{hint}", 1)
    return outcome if isinstance(outcome, int) else 0
