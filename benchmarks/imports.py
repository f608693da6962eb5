"""Whether the packages of a benchmark are there: `python -m benchmarks.imports`.

For a machine that has no network and no environment of ours; says what is missing and what to do. Imports nothing of
fedmira.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable

NEEDED = ("torch", "transformers", "peft", "yaml", "pydantic")
HINT = (
    "pydantic comes from `make bench-gpu-packages` where there is a network (GPU_PYTHON is the version of this Python, "
    "{version}), then take benchmarks/.site along; the others must be installed here"
)


def unusable(names: Iterable[str]) -> list[str]:
    """Those that cannot be imported and why; a package made for another Python is found and yet not imported."""
    reasons = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name} ({error})")
    return reasons


def main(names: Iterable[str] = NEEDED) -> None:
    """Nothing, if all can be imported.

    Raises:
        SystemExit: one cannot.
    """
    reasons = unusable(names)
    if reasons:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SystemExit(f"{sys.executable} cannot import {', '.join(reasons)}: {HINT.format(version=version)}")


if __name__ == "__main__":
    main()
