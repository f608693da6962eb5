"""Which manifest.json this version of fedmira can read. Knows nothing of what else is in one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.errors import IntegrityError

MANIFEST = "manifest.json"
SCHEMA = 1


def refuse_other_schema(run: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse the `manifest` of the run directory `run` if its words may mean something else.

    Raises:
        IntegrityError: it has another schema; without a number, and not yet written, it counts as of this one.
    """
    if (schema := manifest.get("schema", SCHEMA)) != SCHEMA:
        raise IntegrityError(
            f"{run / MANIFEST} has schema {schema!r}, this version of fedmira reads {SCHEMA}; use the one that wrote "
            "it, or a later one"
        )
