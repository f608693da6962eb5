"""Questions to a client's model, read from a file or a stream: one instruction a line, or records as data files hold.

Knows nothing about models or runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedmira.data.sources.files import has_data_ending, read_records, read_text
from fedmira.data.sources.records import (
    CONVERSATIONS,
    KNOWN,
    LISTS,
    ROLES,
    Turns,
    UnusableRecordError,
    earlier_turns,
    known_name,
    known_turns,
    names_of,
    refuse_half_characters,
    text_of,
    with_system,
)
from fedmira.errors import DataError
from fedmira.types import Example

STANDARD_INPUT = "-"


def read_questions(place: str, parts: Mapping[str, str] = MappingProxyType({})) -> list[Example]:
    """Return the questions in the file `place`, or on standard input for `-`, in their order.

    Records are JSON objects with `instruction` and perhaps `input` (also `context`, `history`, `system`), or any other
    shape that data files have; whatever stands as an answer, and where an example belongs, is not looked at. A file
    that is named as data files are holds records, or texts in quotes; anything else does where its first line that is
    not empty is a JSON object, and otherwise has one instruction in each such line.

    Args:
        place: path of the file, or `-`.
        parts: names of the fields that are instruction and input, as `data.fields`; records that lack such a field are
            read by the known names.

    Raises:
        DataError: there is no question, a line is none, or the file cannot be read.
    """
    name = "standard input" if place == STANDARD_INPUT else Path(place).name
    if place != STANDARD_INPUT and has_data_ending(place):
        read = read_records(Path(place))
        faults = [(bad.line, bad.reason) for bad in read.bad]
        records = list(read.records)
        if read.columns:
            records = [(line, {name: row[name] for name in row if name not in LISTS}) for line, row in records]
    else:
        numbered = [(number, line) for number, line in enumerate(_text(place).split("\n"), start=1) if line.strip()]
        records, faults = _records(numbered)
    questions = []
    for line, record in records:
        try:
            questions.append(_question(record, parts, f"{name}:{line}"))
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


def _question(record: Any, parts: Mapping[str, str], id_: str) -> Example:
    if isinstance(record, str):
        if not record.strip():
            raise UnusableRecordError("it is empty")
        refuse_half_characters(record)
        return Example(instruction=record, output="", id=id_)
    if not isinstance(record, Mapping):
        raise UnusableRecordError(f"a record must be an object with fields, or a text, not {type(record).__name__}")
    asked = None if parts else _in_turns(record)
    # as in training, where it is said which fields are what no list of turns goes before them
    asked = asked or _in_fields(record, parts) or _in_turns(record)
    if asked is None:
        known = dict.fromkeys((parts.get("instruction", KNOWN["instruction"][0]), *KNOWN["instruction"]))
        raise UnusableRecordError(
            f"it has none of the fields {', '.join(known)}, and no list messages or conversations; its fields are "
            f"{names_of(record)}"
        )
    instruction, input_, turns = asked
    turns = with_system(turns, record, parts)
    refuse_half_characters(instruction, input_, *(text for _, text in turns))
    return Example(instruction=instruction, output="", input=input_, turns=turns, id=id_)


_Asked = tuple[str, str, Turns]
"""Instruction, input and earlier turns."""


def _in_turns(record: Mapping[str, Any]) -> _Asked | None:
    """What the last turn of the user asks; None where the record is no conversation."""
    for field, role_field, text_field in (*CONVERSATIONS, ("prompt", "role", "content")):
        turns = record.get(field)
        if not isinstance(turns, list) or not turns:
            continue
        while turns and _is_answer(turns[-1], role_field):
            turns = turns[:-1]
        *earlier, (role, instruction) = known_turns(turns, field, role_field, text_field) or [("", "")]
        if role != "user":
            raise UnusableRecordError(f"{field} has no turn of a user that waits for an answer")
        if not instruction.strip():
            raise UnusableRecordError(f"the last question in {field} is empty")
        return instruction, "", tuple(earlier)
    return None


def _is_answer(turn: Any, role_field: str) -> bool:
    return isinstance(turn, Mapping) and ROLES.get(str(turn.get(role_field)).lower()) == "assistant"


def _in_fields(record: Mapping[str, Any], parts: Mapping[str, str]) -> _Asked | None:
    """What a field asks, one of `parts` or else one that is known by its name; None where there is neither."""
    others = {field: value for field, value in record.items() if field not in parts.values()}
    if isinstance(others.get("prompt"), list) and others["prompt"]:
        del others["prompt"]  # turns
    own = {part: field for part, field in parts.items() if field in record}
    if "instruction" not in own and not any(name in others for name in KNOWN["instruction"]):
        return None
    if not parts and record.get("prompt") is not None and record.get("completion") is not None:
        # the shape that has nothing beside these two
        return text_of(record, "prompt"), "", ()
    instruction, input_ = (own.get(part) or known_name(others, part) for part in ("instruction", "input"))
    # as in training, see `records`
    turns = earlier_turns(others) if not parts or isinstance(others.get("history"), list) else ()
    return text_of(record, instruction), text_of(record, input_, required=False), turns
