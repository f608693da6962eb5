"""Questions to a client's model, read from a file or a stream: one instruction a line, or records as data files hold.

Knows nothing about models or runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.data.sources.files import has_data_ending, read_records, read_text
from fedmira.data.sources.records import ROLES, Fields, UnusableRecordError, example_from_record, refuse_half_characters
from fedmira.errors import DataError
from fedmira.types import Example

STANDARD_INPUT = "-"


def read_questions(place: str) -> list[Example]:
    """Return the questions in the file `place`, or on standard input for `-`, in their order.

    Records are JSON objects with `instruction` and perhaps `input` (also `context`, `history`, `system`), or any other
    shape that data files have; answers may be missing and are not looked at. A file that is named as data files are
    holds records, or texts in quotes; anything else does where its first line that is not empty is a JSON object, and
    otherwise has one instruction in each such line.

    Raises:
        DataError: there is no question, a line is none, or the file cannot be read.
    """
    name = "standard input" if place == STANDARD_INPUT else Path(place).name
    if place != STANDARD_INPUT and has_data_ending(place):
        read = read_records(Path(place))
        faults = [(bad.line, bad.reason) for bad in read.bad]
        records = list(read.records)
    else:
        numbered = [(number, line) for number, line in enumerate(_text(place).split("\n"), start=1) if line.strip()]
        records, faults = _records(numbered)
    questions = []
    for line, record in records:
        try:
            questions.append(_question(record, f"{name}:{line}"))
        except UnusableRecordError as error:
            faults.append((line, str(error)))
    if faults:
        line, reason = min(faults)
        raise DataError(
            f"{name} has {len(faults):,} records that are no questions, first record {line}: {reason}. Give each an "
            "instruction, and an input where it needs one, or write one instruction in each line of a .txt file"
        )
    if not questions:
        raise DataError(f"{name} holds no question; write one instruction, or one JSON record, in each line")
    return questions


def _text(place: str) -> str:
    if place != STANDARD_INPUT:
        return read_text(Path(place))[0]
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text: {error.reason}; convert it to UTF-8") from error


def _records(numbered: list[tuple[int, str]]) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    """Lines as records, or as they are where the first is no object; and those that are neither."""
    if not numbered or not isinstance(_parsed(numbered[0][1]), Mapping):
        return [(number, line.strip()) for number, line in numbered], []
    parsed = [(number, _parsed(line)) for number, line in numbered]
    good = [(number, record) for number, record in parsed if record is not None]
    return good, [(number, "not JSON") for number, record in parsed if record is None]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _question(record: Any, id_: str) -> Example:
    if isinstance(record, str):
        if not record.strip():
            raise UnusableRecordError("it is empty")
        refuse_half_characters(record)
        return Example(instruction=record, output="", id=id_)
    if isinstance(record, Mapping):
        record = _answered(record)
    return example_from_record(record, Fields(), id_)


def _answered(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with some answer where it has none, which examples need and questions do not.

    >>> _answered({"instruction": "What?"})
    {'instruction': 'What?', 'output': '-'}
    """
    for field, role, text in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = record.get(field)
        if isinstance(turns, list) and turns:
            last = turns[-1]
            asks = isinstance(last, Mapping) and ROLES.get(str(last.get(role)).lower()) != "assistant"
            return {**record, field: [*turns, {role: "assistant", text: "-"}]} if asks else record
    if "instruction" in record:
        unanswered = record.get("output") is None and record.get("response") is None
        return {**record, "output": "-"} if unanswered else record
    return record if record.get("completion") is not None else {**record, "completion": "-"}
