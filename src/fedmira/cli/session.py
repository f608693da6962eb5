"""What every command shares: the options --debug, --json and --quiet, and how a result is printed.

Progress goes to a display (`display.py`), a result goes to standard output, an error to standard error. Knows nothing
about what the commands compute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fedmira.cli.process import discard
from fedmira.errors import SetupError
from fedmira.formats import printable as escaped

if TYPE_CHECKING:
    from fedmira.config.run import RunConfig
    from fedmira.experiment import Display

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Session:
    """The options that hold for one call of the command line. Mutable: options are read while clicking through."""

    debug: bool = False
    json: bool = False
    quiet: bool = False
    warnings: list[str] = field(default_factory=list)
    """What `warn` has said so far."""
    answered: bool = False
    """Whether the result was printed: with --json standard output gets one object, also where an error follows."""

    def warn(self, line: str) -> None:
        """Say on standard error what the user may not expect, with --quiet too."""
        self.warnings.append(line)
        tell(printable(f"warning: {line}"))

    def result(self, facts: Mapping[str, Any], text: str) -> None:
        """Print the outcome of a command: `facts` as one JSON object with --json, else `text`.

        Raises:
            SetupError: it cannot be written, as where a disk is full.
        """
        try:
            click.echo(json.dumps(facts, sort_keys=True, allow_nan=False) if self.json else printable(text))
            self.answered = True
        except BrokenPipeError:
            raise
        except OSError as error:
            discard(sys.stdout)
            raise SetupError(
                f"the result could not be printed: {error.strerror or error}; what the command did stands"
            ) from error

    @contextmanager
    def loading(self, config: RunConfig, log: Callable[[str], None] | None = None) -> Iterator[Display | None]:
        """A display for the run `config`, None with --quiet; closed whatever happens, so the terminal stays usable.

        Says at once what takes the first seconds: torch is imported and the model loaded inside the block. If the
        reader of the display leaves, the block goes on; that is a warning, and a line for `log`.
        """
        if self.quiet:
            yield None
            return
        from fedmira.cli.display import SteadyDisplay

        def tell_all(line: str) -> None:
            self.warn(line)
            if log is not None:
                log(f"warning: {line}")

        # standard output is kept free for a result in JSON
        display = SteadyDisplay(tell_all, to_stderr=self.json)
        display.message(f"Loading the base model ({config.model.path}) and the data ({config.data.source}) ...")
        try:
            yield display
        finally:
            display.close()


def tell(text: str) -> None:
    """Print `text` on standard error; nothing happens if nobody can read it any more."""
    try:
        click.echo(text, err=True)
    except OSError:
        discard(sys.stderr)


def printable(text: str) -> str:
    """Return `text` with control characters but newline and tab written out: data must not steer a terminal.

    >>> printable("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    return escaped(text, keep="\n\t")


def _remember(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        setattr(context.ensure_object(Session), str(option.name), True)


def _flag(name: str, help_text: str) -> Callable[[Command], Command]:
    return click.option(
        f"--{name}", is_flag=True, expose_value=False, is_eager=True, callback=_remember, help=help_text
    )


debug_option = _flag("debug", "Show the traceback of an error.")


def standard_options(command: Command) -> Command:
    """Add --json, --quiet and --debug to a command."""
    quiet = _flag("quiet", "Show no progress, only the result.")
    return _flag("json", "Print the result as one JSON object.")(quiet(debug_option(command)))
