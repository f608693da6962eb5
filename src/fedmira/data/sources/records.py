"""Records of instruction data sets, in the shapes people publish, become examples; what cannot is counted.

Shapes, detected record by record: `messages` (role, content), `conversations` (ShareGPT: from, value), `prompt` and
`completion` (text, or lists of messages), `instruction` with `input` or `context` and `output` or `response` (Alpaca,
Dolly) and, as in LLaMA-Factory, `history` (a list of [user, assistant] pairs), which becomes earlier turns. Any record
may have `system`, the turn before all others where none of them is one. Of a conversation the last assistant turn is
the answer. Knows nothing about files, clients or splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedmira.data.sources.files import NUM_NAMED_BAD, Bad
from fedmira.errors import DataError
from fedmira.types import Example

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
SHAPES = "messages, conversations, prompt + completion, instruction + output (or response)"


class Fields(NamedTuple):
    """Names of the fields that say where an example belongs; a record may lack each of them."""

    client: str = "client"
    task: str = "task"
    category: str = "category"


class UnusableRecordError(Exception):
    """One record cannot become an example; the message says why. Never leaves the sources."""


class _UnknownShapeError(UnusableRecordError):
    """Nothing in the record is known to be a question with its answer."""


def usable_examples(
    name: str, records: Iterable[tuple[int, Any]], bad: Iterable[Bad], fields: Fields, is_object: bool = False
) -> tuple[list[Example], list[Bad]]:
    """Turn records into examples and collect what cannot be one.

    Args:
        name: of the file or data set, for ids and messages.
        records: (line, record).
        bad: what is unusable already.
        fields: where client, task and category stand.
        is_object: whether the one record is all that is in the file.

    Raises:
        DataError: no record is usable, or more are unusable than usable.
    """
    examples, unusable = [], list(bad)
    for line, record in records:
        try:
            examples.append(example_from_record(record, fields, f"{name}:{line}"))
        except UnusableRecordError as error:
            if is_object and isinstance(error, _UnknownShapeError):
                raise _no_list(name, record) from error
            unusable.append(Bad(line, str(error)))
    refuse_mostly_bad(name, len(examples), unusable)
    return examples, unusable


def _no_list(name: str, content: Mapping[str, Any]) -> DataError:
    """What to say of a file that is one object and no record."""
    lists = [
        repr(field)
        for field, value in content.items()
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value)
    ]
    if lists:
        advice = f"Keep only the list in its field {' or '.join(lists)}"
    else:
        advice = f"Its fields are {_names(content)}. Put the examples into a list, or write one in each line"
    return DataError(f"{name!r} is one object, not a list of examples. {advice}; allowed are the shapes {SHAPES}.")


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record)))[:200] or "none"


def refuse_mostly_bad(name: str, num_usable: int, bad: Iterable[Bad]) -> None:
    """Raise unless there is something usable and no more unusable than usable.

    Raises:
        DataError: names the file and its first unusable records.
    """
    unusable = sorted(bad)
    if num_usable and len(unusable) <= num_usable:
        return
    if not unusable:
        raise DataError(f"{name!r} holds no records. Put examples into it, or leave it out of data.path.")
    named = "; ".join(f"record {line}: {reason}" for line, reason in unusable[:NUM_NAMED_BAD])
    raise DataError(
        f"{name!r} has {len(unusable)} unusable and {num_usable} usable records ({named}). "
        f"Allowed are the shapes {SHAPES}, with texts that are not empty. Correct the file or data.path."
    )


def example_from_record(record: Any, fields: Fields, id_: str) -> Example:
    """Turn one record into an example.

    Raises:
        UnusableRecordError: its shape is unknown, or a text is missing, empty or no text.
    """
    if not isinstance(record, Mapping):
        raise UnusableRecordError(f"a record must be an object with fields, not {type(record).__name__}")
    instruction, input_, references, turns = _parts(record)
    system = _text(record, "system", required=False)
    if system.strip() and "system" not in (role for role, _ in turns):
        turns = (("system", system), *turns)
    refuse_half_characters(instruction, input_, *references, *(text for _, text in turns))
    return Example(
        instruction=instruction,
        input=input_,
        output=references[0],
        references=references if len(references) > 1 else (),
        turns=turns,
        task=_label(record, fields.task),
        category=_label(record, fields.category),
        client=_label(record, fields.client),
        id=id_,
    )


def refuse_half_characters(*texts: str) -> None:
    """Refuse texts with half of a surrogate pair, which JSON can spell but no tokenizer can encode.

    Raises:
        UnusableRecordError: one of them has.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableRecordError(f"a text has half a character: {error.object[error.start]!a}") from error


_Parts = tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]]


def _parts(record: Mapping[str, Any]) -> _Parts:
    """Instruction, input, answers and earlier turns."""
    # some data sets give every record all fields, and leave a list empty where another shape is meant
    if record.get("messages") not in (None, []):
        return _conversation(record["messages"], "messages", "role", "content")
    if record.get("conversations") not in (None, []):
        return _conversation(record["conversations"], "conversations", "from", "value")
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation(prompt + completion, "prompt + completion", "role", "content")
        return _text(record, "prompt"), "", (_text(record, "completion"),), ()
    if "instruction" in record:
        answer = "response" if record.get("output") is None and record.get("response") is not None else "output"
        context = "input" if record.get("input") is not None else "context"
        references = _texts(record, answer)
        return _text(record, "instruction"), _text(record, context, required=False), references, _earlier_turns(record)
    raise _UnknownShapeError(f"no known shape; its fields are {_names(record)}")


def _earlier_turns(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What `history` of an Alpaca record says comes before its instruction."""
    history = record.get("history")
    if history is None:
        return ()
    if not isinstance(history, list) or not all(_is_pair_of_texts(pair) for pair in history):
        raise UnusableRecordError("history must be a list of pairs of texts, [user, assistant]")
    return tuple(turn for user, assistant in history for turn in (("user", user), ("assistant", assistant)))


def _is_pair_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _conversation(turns: Any, field: str, role_field: str, text_field: str) -> _Parts:
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UnusableRecordError(f"{field} must be a list of turns with {role_field} and {text_field}")
    known = []
    for turn in turns:
        role = ROLES.get(str(turn.get(role_field)).lower())
        if role is None:
            raise UnusableRecordError(
                f"unknown {role_field} {turn.get(role_field)!r} in {field}; allowed: {', '.join(ROLES)}"
            )
        known.append((role, _turn_text(turn.get(text_field), field, text_field)))
    while known and known[-1][0] != "assistant":
        known.pop()  # a question without an answer teaches nothing
    if len(known) < 2 or known[-2][0] != "user":
        raise UnusableRecordError(f"{field} has no assistant turn that answers a user turn")
    *earlier, (_, instruction), (_, answer) = known
    if not instruction.strip() or not answer.strip():
        raise UnusableRecordError(f"the last question or answer in {field} is empty")
    return instruction, "", (answer,), tuple(earlier)


def _turn_text(content: Any, field: str, text_field: str) -> str:
    if isinstance(content, str):
        return content
    if (
        isinstance(content, list)
        and content
        and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    ):
        return "".join(part["text"] for part in content)
    raise UnusableRecordError(f"{text_field} of a turn in {field} is {type(content).__name__}, not text")


def _texts(record: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A text, or a list of equally good texts."""
    value = record.get(field)
    if isinstance(value, list):
        texts = tuple(text for text in value if isinstance(text, str) and text.strip())
        if not texts or len(texts) < len(value):
            raise UnusableRecordError(f"{field} must be text or a list of texts that are not empty")
        return texts
    return (_text(record, field),)


def _text(record: Mapping[str, Any], field: str, required: bool = True) -> str:
    value = record.get(field)
    if value is None:
        if not required:
            return ""
        raise UnusableRecordError(f"the field {field} is {'null' if field in record else 'missing'}")
    if not isinstance(value, str):
        raise UnusableRecordError(f"the field {field} is {type(value).__name__}, not text")
    if required and not value.strip():
        raise UnusableRecordError(f"the field {field} is empty")
    return value


def _label(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UnusableRecordError(
            f"the field {field} is {type(value).__name__}; a label must be text or a whole number"
        )
    refuse_half_characters(str(value))
    return " ".join(str(value).split())
