"""Records of instruction data sets, in the shapes people publish, become examples; what cannot is counted.

Shapes, detected record by record: `messages` (role, content), `conversations` (ShareGPT: from, value), `prompt` and
`completion` (text, or lists of messages), `instruction` with `output` or `response` (Alpaca, Dolly), `question` and
`answer`, `prompt` and `response`. The last three may have `input` or `context` and, as in LLaMA-Factory, `history` (a
list of [user, assistant] pairs), which becomes earlier turns. Any record may have `system`, the turn before all others
where none of them is one. Of a conversation the last assistant turn is the answer. Where the config says which fields
are instruction, input and output, these are taken, and the known names for those of which it says nothing. Knows
nothing about files and clients, and of splits only their names.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fedmira.data.sources.files import NUM_NAMED_BAD, Bad, FileRecords
from fedmira.data.splits import SPLITS
from fedmira.errors import DataError, nearest
from fedmira.types import Example

if TYPE_CHECKING:
    from fedmira.config.data import HuggingFaceConfig, JsonlConfig

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
SHAPES = (
    "messages, conversations, prompt + completion (or response), instruction + output (or response), question + answer"
)
PAIRS = (("question", "answer"), ("prompt", "response"), ("prompt", "completion"))
KNOWN = {
    "instruction": ("instruction", "question", "prompt"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
}
"""Names that each part of an example goes by in the shapes that are no conversations."""
CONVERSATIONS = (("messages", "role", "content"), ("conversations", "from", "value"))
"""Fields that are lists of turns, and the fields of a turn for who speaks and what."""
LISTS = ("messages", "conversations", "history")
"""Fields that are lists, which no cell of a table is."""
_NAME_THEM = (
    "say with data.fields which are question and answer (sources jsonl and huggingface), as in "
    "data.fields: {instruction: NAME, output: NAME}"
)

Turns: TypeAlias = tuple[tuple[str, str], ...]
"""(role, text) of what was said before the instruction."""


class Fields(NamedTuple):
    """Names of the fields of a record."""

    client: str = "client"
    """This one and the next two say where an example belongs; a record may lack each of them."""
    task: str = "task"
    category: str = "category"
    parts: Mapping[str, str] = {}
    """Fields that are instruction, input or output, by these words; empty: those of the known shapes."""
    split: str | None = None
    """Field that says in which split an example is; a record may lack it. None: no field does."""
    are_columns: bool = False
    """Whether the fields are columns of a table, so that no value is a list."""
    nameable: bool = True
    """Whether whoever reads a refusal could name the parts, with `data.fields`."""

    @classmethod
    def of(cls, config: JsonlConfig | HuggingFaceConfig) -> Fields:
        """What a config says about the fields of its records."""
        client = config.client_field or "client"
        return cls(client, config.task_field, config.category_field, config.fields, config.split_field)


class Usable(NamedTuple):
    """What came of the records of one file or data set."""

    examples: list[Example]
    bad: list[Bad]
    splits: list[str]
    """Of each example, the split that its record names, or an empty string."""
    names: set[str]
    """Of the fields of all records."""


class UnusableRecordError(Exception):
    """One record cannot become an example; the message says why. Never leaves the sources."""


class _UnknownShapeError(UnusableRecordError):
    """Nothing in the record is known to be a question with its answer."""


class _MissingFieldError(UnusableRecordError):
    """The record lacks a field."""


def examples_of_file(name: str, read: FileRecords, fields: Fields) -> Usable:
    """Turn the records of a file into examples and collect what cannot be one.

    Raises:
        DataError: as `usable_examples`; or the file is one object that is no record, or a table without the columns
            that a question and its answer need.
    """
    if read.columns:
        fields = fields._replace(are_columns=True)
        _refuse_columns(name, read.columns, fields)
    if read.is_object:
        [(_, content)] = read.records
        try:
            example_from_record(content, fields, name)
        except _UnknownShapeError as error:
            raise _no_list(name, content) from error
        except UnusableRecordError:
            pass  # counted with its reason below
    return usable_examples(name, read.records, read.bad, fields)


def usable_examples(name: str, records: Iterable[tuple[int, Any]], bad: Iterable[Bad], fields: Fields) -> Usable:
    """Turn records into examples and collect what cannot be one.

    Args:
        name: of the file or data set, for ids and messages.
        records: (line, record).
        bad: what is unusable already.
        fields: what the fields of a record are called.

    Raises:
        DataError: no record is usable, or more are unusable than usable; or a record names a split that does not exist.
    """
    usable, advice = Usable([], list(bad), [], set()), ""
    for line, record in records:
        id_ = f"{name}:{line}"
        try:
            example = example_from_record(record, fields, id_)
            split = _label(record, fields.split).casefold() if fields.split else ""
        except UnusableRecordError as error:
            if fields.nameable and isinstance(error, _UnknownShapeError | _MissingFieldError):
                advice = f", or {_NAME_THEM}"
            usable.bad.append(Bad(line, str(error)))
            continue
        if split and split not in SPLITS:
            raise DataError(
                f"the record {id_} has {fields.split} = {split!r}, which data.split_field says is its split; allowed: "
                f"{', '.join(SPLITS)}{nearest(split, SPLITS)}. Correct it, or leave it empty to have the split drawn."
            )
        usable.names.update(map(str, record))
        usable.examples.append(example)
        usable.splits.append(split)
    refuse_mostly_bad(name, len(usable.examples), usable.bad, advice)
    return usable


def refuse_unused_fields(fields: Fields, names: Iterable[str]) -> None:
    """Refuse the name of a field that records may lack if all of them do, although the config asks for it.

    Args:
        fields: by the config.
        names: fields of all usable records.

    Raises:
        DataError: says which key it is.
    """
    known, usual = sorted(names), Fields()
    for key, field, default in (
        ("fields.input", fields.parts.get("input"), None),
        ("task_field", fields.task, usual.task),
        ("category_field", fields.category, usual.category),
        ("split_field", fields.split, None),
    ):
        if field is not None and field not in (default, *known):
            raise DataError(
                f"data.{key} = {field!r}, but no record has this field{nearest(field, known)}. Correct its name, or "
                "leave the key out."
            )


def _refuse_columns(name: str, columns: Sequence[str], fields: Fields) -> None:
    """Refuse a table in which no row can be an example, so that the header is told once and not in every row."""
    header = f"the columns of {name!r} are {', '.join(columns)[:500]}"
    for part, field in fields.parts.items():
        # not every table needs a column for the input; one that none has is refused with all files
        if part != "input" and field not in columns:
            raise DataError(
                f"{header}; data.fields.{part} = {field!r} is not among them{nearest(field, columns)}. Correct it, or "
                "the first line of the file."
            )
    try:
        _parts(dict.fromkeys(columns, "text"), fields)
    except (_UnknownShapeError, _MissingFieldError) as error:
        problem = error if isinstance(error, _MissingFieldError) else "none is known as a question with its answer"
        either, call = (f"Either {_NAME_THEM}; or", "call") if fields.nameable else ("", "Call")
        advice = f"{either} {call} them question and answer in the first line.".strip()
        raise DataError(f"{header}: {problem}. {advice}") from error
    except UnusableRecordError:
        pass  # rows may do without what is wrong, and else each says so


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
        advice = f"Its fields are {names_of(content)}. Put the examples into a list, or write one in each line"
    return DataError(f"{name!r} is one object, not a list of examples. {advice}; allowed are the shapes {SHAPES}.")


def names_of(record: Mapping[str, Any]) -> str:
    """The names of its fields in words, as many as a message has room for."""
    return ", ".join(sorted(map(str, record)))[:200] or "none"


def refuse_mostly_bad(name: str, num_usable: int, bad: Iterable[Bad], advice: str = "") -> None:
    """Raise unless there is something usable and no more unusable than usable; `advice` says what else can be done.

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
        f"Allowed are the shapes {SHAPES}, with texts that are not empty. Correct the file or data.path{advice}."
    )


def example_from_record(record: Any, fields: Fields, id_: str) -> Example:
    """Turn one record into an example.

    Raises:
        UnusableRecordError: its shape is unknown, or a text is missing, empty or no text.
    """
    if not isinstance(record, Mapping):
        raise UnusableRecordError(f"a record must be an object with fields, not {type(record).__name__}")
    instruction, input_, references, turns = _parts(record, fields)
    turns = with_system(turns, record, fields.parts)
    refuse_half_characters(instruction, input_, *references, *(text for _, text in turns))
    return Example(
        instruction=instruction,
        input=input_,
        output=references[0],
        references=references if len(references) > 1 else (),
        turns=turns,
        task=_label(record, fields.task),
        category=_label(record, fields.category),
        client=unicodedata.normalize("NFC", _label(record, fields.client)),
        id=id_,
    )


def with_system(turns: Turns, record: Mapping[str, Any], parts: Mapping[str, str]) -> Turns:
    """The turns behind what the record's field `system` says, if it is none of `parts` and none of them says such."""
    system = "" if "system" in parts.values() else text_of(record, "system", required=False)
    if system.strip() and "system" not in (role for role, _ in turns):
        return (("system", system), *turns)
    return turns


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


_Parts = tuple[str, str, tuple[str, ...], Turns]


def _parts(record: Mapping[str, Any], fields: Fields) -> _Parts:
    """Instruction, input, answers and earlier turns."""
    if fields.parts:
        return _named_parts(record, fields.parts)
    if fields.are_columns:
        record = {field: value for field, value in record.items() if field not in LISTS}
    # some data sets give every record all fields, and leave a list empty where another shape is meant
    for field, role_field, text_field in CONVERSATIONS:
        if record.get(field) not in (None, []):
            return _conversation(record[field], field, role_field, text_field)
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation(prompt + completion, "prompt + completion", "role", "content")
        return text_of(record, "prompt"), "", (text_of(record, "completion"),), ()
    if "instruction" in record:
        answer = "response" if record.get("output") is None and record.get("response") is not None else "output"
        return _asked(record, "instruction", answer)
    for question, answer in PAIRS:
        if question in record and answer in record and (record[question], record[answer]) != (None, None):
            return _asked(record, question, answer)
    raise _UnknownShapeError(f"no known shape; its fields are {names_of(record)}")


def _asked(record: Mapping[str, Any], instruction: str, output: str) -> _Parts:
    context = "input" if record.get("input") is not None else "context"
    references = _texts(record, output)
    return text_of(record, instruction), text_of(record, context, required=False), references, earlier_turns(record)


def _named_parts(record: Mapping[str, Any], parts: Mapping[str, str]) -> _Parts:
    """The fields that the config names, and those that are known by their names among the others."""
    for part, field in parts.items():
        if part != "input" and field not in record:
            raise _MissingFieldError(
                f"the field {field}, which data.fields names as {part}, is missing{nearest(field, record)}"
            )
    others = {field: value for field, value in record.items() if field not in parts.values()}

    def named(part: str) -> tuple[Mapping[str, Any], str]:
        return (record, parts[part]) if part in parts else (others, known_name(others, part))

    references = _texts(*named("output"))
    instruction, input_ = text_of(*named("instruction")), text_of(*named("input"), required=False)
    # a text of that name is a column like others; who says which fields are what needs no list there
    return instruction, input_, references, earlier_turns(others) if isinstance(others.get("history"), list) else ()


def known_name(others: Mapping[str, Any], part: str) -> str:
    """What a part of which the config says nothing is called among the fields that it uses for no other."""
    there = [name for name in KNOWN[part] if name in others]
    if not there and part != "input":
        raise _MissingFieldError(
            f"data.fields does not name the {part}, and no other field is called {' or '.join(KNOWN[part])}"
        )
    return next((name for name in there if others[name] is not None), (there or KNOWN[part])[0])


def earlier_turns(record: Mapping[str, Any]) -> Turns:
    """What `history` of an Alpaca record says comes before its instruction."""
    history = record.get("history")
    if history is None:
        return ()
    if not isinstance(history, list) or not all(_is_pair_of_texts(pair) for pair in history):
        raise UnusableRecordError("history must be a list of pairs of texts, [user, assistant]")
    return tuple(turn for user, assistant in history for turn in (("user", user), ("assistant", assistant)))


def _is_pair_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def known_turns(turns: Any, field: str, role_field: str, text_field: str) -> list[tuple[str, str]]:
    """Return (role, text) of each turn in the field `field`.

    Raises:
        UnusableRecordError: it is no list of turns, or a turn has an unknown role or no text.
    """
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
    return known


def _conversation(turns: Any, field: str, role_field: str, text_field: str) -> _Parts:
    known = known_turns(turns, field, role_field, text_field)
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
    return (text_of(record, field),)


def text_of(record: Mapping[str, Any], field: str, required: bool = True) -> str:
    """Return the text in a field, which must be there and not empty if it is `required`.

    Raises:
        UnusableRecordError: it is not, or holds no text.
    """
    value = record.get(field)
    if value is None:
        if not required:
            return ""
        if field in record:
            raise UnusableRecordError(f"the field {field} has no value")
        raise _MissingFieldError(f"the field {field} is missing")
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
