"""Data files on disk: found, read, decompressed, decoded and hashed. Knows nothing about what a record means."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.data.sources.tables import read_table
from fedmira.errors import DataError
from fedmira.paths import home_expanded

TABLE_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", *TABLE_ENDINGS)
"""Of data files, in small or capital letters."""
WORKBOOK_ENDINGS = (".xlsx", ".xls", ".xlsm", ".ods")
"""Of what spreadsheet programs save by themselves, which is not read."""
AS_CSV = "save spreadsheets as CSV, in Excel as 'CSV UTF-8'"
NUM_NAMED_BAD = 3


class Bad(NamedTuple):
    """A record that cannot be used."""

    line: int
    """Counted from 1."""
    reason: str


class Found(NamedTuple):
    """What a path names."""

    files: list[Path]
    skipped: list[Path]
    """What lies beside them and is no data file, folders among them; nothing hidden."""


class FileRecords(NamedTuple):
    """What one file holds."""

    records: tuple[tuple[int, Any], ...]
    """(line counted from 1, record) of each line that is JSON or begins a row of a table; position instead of line
    where the file is one list."""
    bad: tuple[Bad, ...]
    sha256: str
    """Of the file's bytes as stored."""
    is_object: bool = False
    """Whether the file is one JSON object, over any number of lines, and this the only record."""
    columns: tuple[str, ...] = ()
    """Of a table, by its header; all records have these fields."""


def has_data_ending(name: str) -> bool:
    """Whether a file of that name is taken for a data file.

    >>> [has_data_ending(name) for name in ("a.jsonl", "a.NDJSON.gz", "a.csv", "a.xlsx")]
    [True, True, True, False]
    """
    return name.lower().endswith(FILE_ENDINGS)


def is_workbook(name: str) -> bool:
    """Whether a file of that name is what a spreadsheet program saves by itself."""
    return name.lower().endswith(WORKBOOK_ENDINGS)


def find_files(path: str) -> Found:
    """Return the data files that a path names, sorted: a file, all of a folder but hidden ones, or a glob's matches.

    Raises:
        DataError: there are none, or a folder may not be read.
    """
    expanded = home_expanded(path)
    # os.path answers False where pathlib raises for paths the system cannot even look up
    if os.path.isfile(expanded):
        return Found([expanded], [])
    try:
        if os.path.isdir(expanded):
            candidates = visible(expanded.iterdir())
            what = f"the folder {path!r} holds no file"
        else:
            candidates = sorted(Path(match) for match in glob.glob(str(expanded), recursive=True))
            what = f"there is no file, folder or match for {path!r}; a file must exist, and a match must be a file"
        files = [file for file in candidates if has_data_ending(file.name) and file.is_file()]
    except OSError as error:
        raise DataError(
            f"data.path = {path!r} cannot be read: {error.strerror or error}. Check that the folder may be read."
        ) from error
    if not files:
        advice = f"{AS_CSV[0].upper()}{AS_CSV[1:]}" if any(is_workbook(one.name) for one in candidates) else ""
        raise DataError(f"{what} ending in {', '.join(FILE_ENDINGS)}. {advice or 'Correct data.path'}.")
    for one, other in pairwise(sorted(files, key=_named)):
        if _named(one) == _named(other):
            raise DataError(
                f"{str(one)!r} and {str(other)!r} differ in their ending only, and whether they hold the same is not "
                "known. Remove one of them, or rename it."
            )
    taken, names = set(files), {_named(file) for file in files}
    others = [place for place in candidates if place not in taken and not place.name.startswith(".")]
    # a workbook beside the table that it was saved as is what it should be
    others = [place for place in others if not (is_workbook(place.name) and _named(place) in names)]
    # `**` matches the folders on the way to the files as well
    return Found(files, [place for place in others if "**" not in path or not os.path.isdir(place)])


def visible(places: Iterable[Path]) -> list[Path]:
    """Return those that are not hidden, sorted: a system puts files of its own, such as `._a.jsonl`, beside a user's.

    >>> [place.name for place in visible([Path("b.jsonl"), Path("._a.jsonl"), Path("a.jsonl")])]
    ['a.jsonl', 'b.jsonl']
    """
    return sorted(place for place in places if not place.name.startswith("."))


def client_of_file(path: Path) -> str:
    """Return the name of the client that a file stands for: the file name without its ending, in the Unicode form NFC,
    as not every file system keeps the form that a name was given in.

    >>> client_of_file(Path("data/ward-7.jsonl.gz"))
    'ward-7'
    """
    return unicodedata.normalize("NFC", _without_ending(path))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """What to call each of the files: its name, or where others have the same, its path from the folder they share.

    >>> distinct_names([Path("d/a/train.jsonl"), Path("d/b/train.jsonl"), Path("d/b/more.jsonl")])
    ['a/train.jsonl', 'b/train.jsonl', 'more.jsonl']
    """
    counts = Counter(path.name for path in paths)
    if len(counts) == len(paths):
        return [path.name for path in paths]
    folder = os.path.commonpath([path.parent for path in paths])
    return [path.name if counts[path.name] == 1 else path.relative_to(folder).as_posix() for path in paths]


def _without_ending(path: Path) -> str:
    endings = [ending for ending in FILE_ENDINGS if path.name.lower().endswith(ending)]
    return path.name[: -len(max(endings, key=len))] if endings else path.stem


def _named(path: Path) -> tuple[str, str]:
    return str(path.parent), _without_ending(path)


def read_bytes(path: Path) -> tuple[bytes, str]:
    """Return a file's content, decompressed if its name ends in .gz, and the sha256 of its bytes as stored.

    Raises:
        DataError: it is missing, unreadable or damaged, or its name is not UTF-8, which no manifest can hold.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of the data file {str(path)!a} is not UTF-8. Rename it.") from None
    try:
        stored = path.read_bytes()
        content = gzip.decompress(stored) if path.name.lower().endswith(".gz") else stored
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"the data file {str(path)!r} cannot be read: {error}. Check that it exists, is whole and may be read."
        ) from error
    return content, hashlib.sha256(stored).hexdigest()


def read_text(path: Path) -> tuple[str, str]:
    """Return a file's text (UTF-8) and its sha256; see `read_bytes`.

    Raises:
        DataError: it is missing, unreadable, damaged or not UTF-8.
    """
    content, sha256 = read_bytes(path)
    try:
        return content.decode("utf-8-sig"), sha256
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        advice = f"Convert it to UTF-8; {AS_CSV}" if _is_table(path) else "Convert it to UTF-8"
        raise DataError(
            f"the data file {str(path)!r} is not UTF-8 text: {error.reason} in line {line}. {advice}."
        ) from error


def read_records(path: Path) -> FileRecords:
    """Read a JSON Lines file, a JSON file that holds one list of records or one record, or a table with a header.

    Raises:
        DataError: the file is missing, unreadable, damaged, not UTF-8, a spreadsheet that was not saved as a table, a
            table whose header or quotation marks are wrong, or a .json file without an object in any line that is not
            JSON as a whole either.
    """
    if is_workbook(path.name):
        raise DataError(f"the data file {str(path)!r} cannot be read as it is: {AS_CSV}, and name that file.")
    text, sha256 = read_text(path)
    if _is_table(path):
        try:
            table = read_table(text)
        except csv.Error as error:
            raise DataError(f"the data file {str(path)!r} is no table: {error}. Correct it.") from error
        return FileRecords(table.rows, tuple(Bad(*row) for row in table.bad), sha256, columns=table.columns)
    problem = None
    if path.name.lower().endswith((".json", ".json.gz")):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = error  # a .json file may hold JSON lines all the same
        else:
            if isinstance(whole, list):
                return FileRecords(tuple(enumerate(whole, start=1)), (), sha256)
            if isinstance(whole, dict):
                return FileRecords(((1, whole),), (), sha256, is_object=True)
    records, bad = [], []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            records.append((line, json.loads(content)))
        except (ValueError, RecursionError) as error:
            bad.append(Bad(line, f"not JSON ({error})"))
    if problem and bad and not any(isinstance(record, dict) for _, record in records):
        raise DataError(
            f"the data file {str(path)!r} is not JSON: {problem}; nor does any line of it hold a record. Correct it."
        )
    return FileRecords(tuple(records), tuple(bad), sha256)


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLE_ENDINGS)


def file_provenance(path: Path, sha256: str, num_examples: int, bad: Iterable[Bad]) -> dict[str, Any]:
    """What the manifest of a run says about one data file."""
    return {"path": str(path), "sha256": sha256, "examples": num_examples, **bad_provenance(bad)}


def bad_provenance(bad: Iterable[Bad]) -> dict[str, Any]:
    """What the manifest of a run says about records that cannot be used."""
    unusable = sorted(bad)
    first = [[line, reason] for line, reason in unusable[:NUM_NAMED_BAD]]
    return {"unusable_records": len(unusable), "first_unusable": first}


def skipped_provenance(skipped: Sequence[Path]) -> dict[str, Any]:
    """What the manifest of a run says about names in `data.path` that are no data files; empty if there are none."""
    if not skipped:
        return {}
    # what was meant to be data comes first
    first = [
        ascii(one.name)[1:-1] for one in sorted(skipped, key=lambda one: not is_workbook(one.name))[:NUM_NAMED_BAD]
    ]
    return {"skipped_names": len(skipped), "first_skipped": first}


def unusable_line(data: Mapping[str, Any]) -> str:
    """One line about the records that cannot be used, over all files, and the names skipped; empty if there are none.

    Args:
        data: provenance of a federation: `files` as of `file_provenance`, or one `dataset` with the same counts; what
            `skipped_provenance` gives.

    >>> unusable_line({"files": [file_provenance(Path("d/a.jsonl"), "", 7, [Bad(3, "not JSON")])]})
    'unusable: 1 of 8 records, in 1 of 1 files (a.jsonl record 3: not JSON)'
    """
    return "; ".join(line for line in (_unusable_records(data), _skipped_names(data)) if line)


def _skipped_names(data: Mapping[str, Any]) -> str:
    count = data.get("skipped_names", 0)
    if not count:
        return ""
    more = ", ..." if count > NUM_NAMED_BAD else ""
    names = f"{', '.join(data['first_skipped'])}{more}"
    advice = f"; {AS_CSV}" if any(is_workbook(name) for name in data["first_skipped"]) else ""
    return f"skipped: {count:,} names that are no files ending in {', '.join(FILE_ENDINGS)} ({names}){advice}"


def _unusable_records(data: Mapping[str, Any]) -> str:
    files = [*data.get("files", ()), *([data["dataset"]] if "dataset" in data else ())]
    bad = [file for file in files if file["unusable_records"]]
    if not bad:
        return ""
    num_bad = sum(file["unusable_records"] for file in bad)
    num_records = num_bad + sum(file["examples"] for file in files)
    names = distinct_names([Path(file["path"]) for file in files])
    first = [
        (name, *found)
        for file, name in zip(files, names, strict=True)
        if file["unusable_records"]
        for found in file["first_unusable"]
    ][:NUM_NAMED_BAD]
    # a reason may quote names of fields, and these may hold line breaks
    named = [f"{name} record {line}: {' '.join(reason.split())[:120]}" for name, line, reason in first]
    more = "; ..." if num_bad > NUM_NAMED_BAD else ""
    where = f", in {len(bad):,} of {len(files):,} files" if "files" in data else ""
    return f"unusable: {num_bad:,} of {num_records:,} records{where} ({'; '.join(named)}{more})"
