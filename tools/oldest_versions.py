"""Print the oldest versions of everything that pyproject.toml accepts, as constraints for pip (`make test-oldest`)."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def oldest_versions() -> list[str]:
    """Every requirement with a lower bound, its optional ones too, as NAME==BOUND."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional = [line for extra in project["optional-dependencies"].values() for line in extra]
    found = {
        f"{wanted.name}=={bound.version}"
        for wanted in map(Requirement, [*project["dependencies"], *optional])
        for bound in wanted.specifier
        if bound.operator == ">="
    }
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(oldest_versions()))
