"""The arguments that several commands take: a config with overrides, and how both are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from fedmira.config.run import RunConfig

Command = TypeVar("Command", bound=Callable[..., Any])


def config_arguments(command: Command) -> Command:
    """Add CONFIG [key=value ...] to a command."""
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    return click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG")(overrides(command))


def read_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the config in `path` with dotted `overrides` such as `method.graph.kind=labels`; these win.

    Raises:
        ConfigError: every mistake at once.
    """
    return read_config_and_text(path, overrides)[0]


def read_config_and_text(path: Path, overrides: Sequence[str]) -> tuple[RunConfig, str]:
    """Like `read_config`, with the file as it was written; read once, since a pipe gives nothing the second time."""
    from fedmira.cli.recipes import recipe_names
    from fedmira.config.file import parse_config, read_text

    text = read_text(path, recipe_names())
    return parse_config(text, overrides, source=path.name), text
