"""Local files in any shape that `records` knows: JSON Lines, .json files with one list or record, CSV, TSV; also .gz.

Knows nothing about how examples become clients, except that a file is a client where nothing else says so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedmira.config.data import JsonlConfig
from fedmira.data.sources.files import (
    client_of_file,
    distinct_names,
    file_provenance,
    find_files,
    read_records,
    skipped_provenance,
)
from fedmira.data.sources.records import Fields, examples_of_file, refuse_unused_fields
from fedmira.data.sources.source import Source
from fedmira.data.splits import named_splits
from fedmira.errors import DataError
from fedmira.types import Example


def load(config: JsonlConfig, seed: int, nameable: bool = True) -> Source:
    """Read the files that `config.path` names. The seed is not used.

    With `partition.by: field`, an example whose record has no client field belongs to the client named by its file.
    `nameable`: see `Fields`.

    Raises:
        DataError: a file is missing, unreadable or mostly unusable; a field was asked for that no record has; what
            records say about their splits is contradictory or unknown.
    """
    fields = Fields.of(config)._replace(nameable=nameable)
    examples: list[Example] = []
    splits: list[str] = []
    names: set[str] = set()
    files = []
    owners: dict[str, Path] = {}
    places = find_files(config.path)
    for path, name in zip(places.files, distinct_names(places.files), strict=True):
        read = read_records(path)
        found, bad, its_splits, its_names = examples_of_file(name, read, fields)
        splits += its_splits
        names |= its_names
        files.append(file_provenance(path, read.sha256, len(found), bad))
        if config.partition.by == "field" and config.client_field is None:
            client = client_of_file(path)
            if owners.setdefault(client, path) is not path and not all(e.client for e in found):
                raise DataError(
                    f"the files {str(owners[client])!r} and {str(path)!r} would both be the client {client!r}. "
                    "Rename one of them, or name the client in a field and set data.client_field."
                )
            found = [e if e.client else replace(e, client=client) for e in found]
        examples += found
    if config.client_field is not None and not any(example.client for example in examples):
        raise DataError(
            f"data.client_field = {config.client_field!r}, but no record in {config.path!r} has this field. "
            "Correct its name, or leave it out to take one client per file."
        )
    refuse_unused_fields(fields, names)
    provenance = {"source": "jsonl", "files": files, **skipped_provenance(places.skipped)}
    return Source(tuple(examples), provenance, *named_splits(examples, splits))
