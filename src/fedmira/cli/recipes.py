"""The recipes that come with fedmira: YAML files a user copies and edits.

They lie in `recipes/` of a checkout and in `fedmira/recipes` of an installed package. The first line of a recipe is a
comment that says what it is for.
"""

from __future__ import annotations

from pathlib import Path

import fedmira
from fedmira.errors import SetupError, UsageError, nearest


def recipe_folder() -> Path:
    """Return the folder of the recipes; raises SetupError if this installation has none."""
    package = Path(fedmira.__file__).resolve().parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise SetupError("this installation of fedmira lacks its recipes; install it again")


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes, the quickstart first."""
    names = (path.stem for path in recipe_folder().glob("*.yaml"))
    return tuple(sorted(names, key=lambda name: (name != "quickstart", name)))


def recipe_path(name: str) -> Path:
    """Return the file of the recipe `name`; raises UsageError with the nearest right name if there is none."""
    names = recipe_names()
    if name not in names:
        raise UsageError(f"there is no recipe {name!r}; allowed: {', '.join(names)}{nearest(name, names)}")
    return recipe_folder() / f"{name}.yaml"


def purpose(name: str) -> str:
    """Return the one line that says what the recipe `name` is for."""
    first_line = recipe_path(name).read_text(encoding="utf-8").partition("\n")[0]
    return first_line.removeprefix("#").strip()
