"""What every data source returns. Knows nothing about files, formats or how examples become clients.

Axes: K clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedmira.types import Example

if TYPE_CHECKING:
    import numpy as np


class Source(NamedTuple):
    """The examples of a data source, in a fixed order, and what is known about where they come from."""

    examples: tuple[Example, ...]
    provenance: dict[str, Any]
    """JSON-able: file names with sha256, counts, unusable records."""
    splits: Mapping[str, str] = {}
    """Content key (`splits.content_key`) to "train", "validation" or "test", where the source decides; else drawn."""
    namers: frozenset[Example] = frozenset()
    """Examples whose own records name these splits; empty where the source decides for a text, whoever holds it."""
    true_adjacency: Callable[[Sequence[str]], np.ndarray] | None = None
    """From client names to the (K, K) graph the data was made from, where it is known."""
