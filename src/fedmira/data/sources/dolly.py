"""Databricks Dolly-15k: instruction, context, response and one of eight categories, from a file or a hub.

The category is the task: MIRA's 80 clients are 10 of each. Knows nothing about how examples become clients.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from fedmira.config.data import DollyConfig
from fedmira.data.sources import huggingface
from fedmira.data.sources.files import file_provenance, has_data_ending, read_records
from fedmira.data.sources.records import Fields, examples_of_file, usable_examples
from fedmira.data.sources.source import Source
from fedmira.errors import DataError
from fedmira.paths import home_expanded
from fedmira.types import Example

FIELDS = Fields(task="category", category="category")


def load(config: DollyConfig, seed: int) -> Source:
    """Read Dolly records; a path that is no file is taken as a Hugging Face id. The seed is not used.

    Raises:
        DataError: the file is missing, unreadable or mostly unusable, or a record has no category.
        SetupError: the path is a Hugging Face id and the `datasets` package is missing.
    """
    path = home_expanded(config.path)
    if os.path.isfile(path):
        read = read_records(path)
        examples, bad, *_ = examples_of_file(path.name, read, FIELDS)
        provenance: dict[str, Any] = {
            "source": "dolly",
            "files": [file_provenance(path, read.sha256, len(examples), bad)],
        }
        return Source(_labelled(examples, config.path), provenance)
    if os.path.isdir(path) or has_data_ending(config.path) or path.is_absolute() or config.path.startswith("."):
        raise DataError(
            f"data.path = {config.path!r} is not a file. Give a file (JSON Lines, JSON, CSV or TSV) with instruction, "
            "context, response and category, or a Hugging Face id such as databricks/databricks-dolly-15k."
        )
    rows, origin = huggingface.rows(config.path, name=None, split="train")
    examples, bad, *_ = usable_examples(config.path, enumerate(rows, start=1), (), FIELDS)
    provenance = {"source": "dolly", "dataset": huggingface.dataset_provenance(origin, examples, bad)}
    return Source(_labelled(examples, config.path), provenance)


def _labelled(examples: list[Example], name: str) -> tuple[Example, ...]:
    """Refuse examples without a category; drop a client field, which Dolly does not have."""
    without = next((example for example in examples if not example.category), None)
    if without is not None:
        raise DataError(
            f"the record {without.id} of {name!r} has no category, which the source dolly needs. "
            "Add it, or use data.source: jsonl."
        )
    return tuple(replace(example, client="") for example in examples)
