"""`fedmira init`: copy a recipe to edit, or list the recipes."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from fedmira.cli.recipes import purpose, recipe_names, recipe_path
from fedmira.cli.session import Session, standard_options
from fedmira.errors import SetupError, UsageError


@click.command(short_help="Copy a recipe to edit; without a name, list the recipes.")
@click.argument("recipe", required=False)
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@standard_options
@click.pass_obj
def init(session: Session, recipe: str | None, file: Path | None) -> None:
    """Copy RECIPE to FILE (default: RECIPE.yaml in the current folder). Never overwrites a file."""
    if recipe is None:
        purposes = {name: purpose(name) for name in recipe_names()}
        width = max(map(len, purposes))
        lines = [f"  {name:<{width}}  {line}" for name, line in purposes.items()]
        session.result({"recipes": purposes}, "\n".join(["Recipes; copy one with `fedmira init NAME`:", *lines]))
        return
    source = recipe_path(recipe)
    target, text = file or Path(f"{recipe}.yaml"), source.read_text(encoding="utf-8")
    try:
        # "x": creating and checking in one step, so that nothing is ever overwritten
        stream = target.open("x", encoding="utf-8")
    except FileExistsError:
        raise UsageError(f"{target} exists; remove it or give another name: fedmira init {recipe} FILE") from None
    except OSError as error:
        raise SetupError(f"cannot write {target}: {error.strerror}") from None
    try:
        with stream:
            stream.write(text)
    except OSError as error:
        # half a recipe would be in the way of the next try
        target.unlink(missing_ok=True)
        raise SetupError(f"cannot write {target}: {error.strerror}") from None
    quoted = shlex.quote(str(target))
    session.result(
        {"recipe": recipe, "file": str(target)},
        f"Wrote {target}. Edit it, then:\n  fedmira validate {quoted}\n  fedmira run {quoted}",
    )
