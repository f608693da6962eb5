"""Any data set that the `datasets` package loads: a hub id, a local folder of data files, or a saved data set.

Imports `datasets` late. Knows nothing about how examples become clients.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from fedmira.config.data import HuggingFaceConfig
from fedmira.data.sources.files import Bad, bad_provenance
from fedmira.data.sources.records import Fields, refuse_unused_fields, usable_examples
from fedmira.data.sources.source import Source
from fedmira.data.splits import named_splits
from fedmira.errors import DataError, SetupError
from fedmira.paths import home_expanded
from fedmira.types import Example


def load(config: HuggingFaceConfig, seed: int) -> Source:
    """Load one split of a data set, in any shape that `records` knows. The seed is not used.

    Raises:
        DataError: the data set, its configuration or its split cannot be loaded, or it is mostly unusable; a field was
            asked for that no record has; what records say about their splits is contradictory or unknown.
        SetupError: the `datasets` package is missing.
    """
    fields = Fields.of(config)
    records, origin = rows(config.path, config.name, config.split)
    examples, bad, splits, names = usable_examples(config.path, enumerate(records, start=1), (), fields)
    if config.client_field is not None and not any(example.client for example in examples):
        raise DataError(
            f"data.client_field = {config.client_field!r}, but no record of {config.path!r} has this field. "
            "Correct its name, or leave it out and set data.partition.by to task or iid."
        )
    refuse_unused_fields(fields, names)
    provenance = {"source": "huggingface", "dataset": dataset_provenance(origin, examples, bad)}
    return Source(tuple(examples), provenance, *named_splits(examples, splits))


def rows(path: str, name: str | None, split: str) -> tuple[Iterator[Mapping[str, Any]], dict[str, Any]]:
    """Return the records of one split and where they come from.

    Raises:
        DataError: they cannot be loaded.
        SetupError: the `datasets` package is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise SetupError(
            f"loading the data set {path!r} needs the `datasets` package. Run: pip install 'fedmira[huggingface]'"
        ) from error
    folder = home_expanded(path)
    local = os.path.isdir(folder)
    saved = local and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists())
    try:
        if saved:
            loaded = datasets.load_from_disk(str(folder))
            several = isinstance(loaded, datasets.DatasetDict)
            of_its_own = () if several else ("train", str(loaded.split))
            _refuse_other_than_saved(path, name, split, list(loaded) if several else None, of_its_own)
            loaded = loaded[split] if several else loaded
        else:
            loaded = datasets.load_dataset(str(folder) if local else path, name, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reasons = dict.fromkeys(str(one).strip().split("\n")[0] or type(one).__name__ for one in (error, first))
        hub = "" if local else ", and that the hub can be reached or the data set is cached"
        raise DataError(
            f"the data set {path!r} (configuration {name!r}, split {split!r}) cannot be loaded: "
            f"{': '.join(reason.rstrip('.') for reason in reasons)}. Check data.path, data.name and data.split{hub}."
        ) from error
    origin = {"path": path, "name": name, "split": split, "fingerprint": str(loaded._fingerprint)}
    return _records(loaded), origin


def _records(loaded: Any) -> Iterator[Mapping[str, Any]]:
    """Its rows one by one; images, sounds and the like as they are stored: decoding them takes time and packages."""
    import datasets

    features = datasets.Features(_undecoded(loaded.features))
    if features == loaded.features:
        return iter(loaded)
    tables = loaded.with_format("arrow", columns=loaded.format["columns"])
    return (features.decode_example(table.to_pylist()[0]) for table in tables)


def _undecoded(feature: Any) -> Any:
    """The same columns without the decoding of what is no text."""
    import datasets

    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return replace(feature, feature=_undecoded(feature.feature))
    # mixed values are stored as JSON, which is text
    media = getattr(feature, "decode", False) and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if media else feature


def _refuse_other_than_saved(
    path: str, name: str | None, split: str, splits: Sequence[str] | None, of_its_own: Sequence[str]
) -> None:
    """Refuse what a saved data set does not have: configurations, slices, and splits other than its own.

    Raises:
        DataError: says what to write instead.
    """
    if name is not None:
        raise DataError(
            f"data.name = {name!r}, but {path!r} is a saved data set, which has no configurations. Leave data.name out."
        )
    if split not in (splits or of_its_own):
        has = f"the splits {', '.join(splits)}" if splits else "no splits and is read whole, as train"
        raise DataError(
            f"data.split = {split!r}, but the saved data set {path!r} has {has}; slices such as train[:10%] are not "
            f"possible. Set data.split to {splits[0] if splits else 'train'}, for example, or save the part you want."
        )


def dataset_provenance(origin: dict[str, Any], examples: Sequence[Example], bad: Iterable[Bad]) -> dict[str, Any]:
    """What the manifest of a run says about a data set; the hash is of the examples, whatever files they came in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True).encode())
    counts = {"examples": len(examples), "examples_sha256": digest.hexdigest()}
    return {**origin, **counts, **bad_provenance(bad)}
