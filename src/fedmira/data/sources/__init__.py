"""Where examples come from: one module per source, each turning its config into a `Source`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedmira.config.data import DataConfig
from fedmira.data.sources import dolly, huggingface, jsonl, natural_instructions, planted
from fedmira.data.sources.source import Source

LOADERS: dict[str, Callable[[Any, int], Source]] = {
    "planted": planted.load,
    "natural_instructions": natural_instructions.load,
    "dolly": dolly.load,
    "jsonl": jsonl.load,
    "huggingface": huggingface.load,
}


def load_examples(config: DataConfig, seed: int) -> Source:
    """Load or make the examples that `config` describes.

    Args:
        config: the `data` section of a run's config.
        seed: of the draws, for sources that make their data.

    Raises:
        DataError: a file is missing, unreadable or holds nothing usable.
        SetupError: the source needs a package that is not installed.
    """
    return LOADERS[config.source](config, seed)


__all__ = ["LOADERS", "Source", "load_examples"]
