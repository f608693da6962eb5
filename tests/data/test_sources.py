"""Files in the shapes people publish become examples; what is unusable is counted or refused with file and reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.config.data import DollyConfig, HuggingFaceConfig, JsonlConfig, NaturalInstructionsConfig, PartitionConfig
from fedmira.data.partition import build_federation
from fedmira.data.sources import load_examples
from fedmira.data.sources.files import find_files, unusable_line
from fedmira.errors import DataError, SetupError
from fedmira.types import Example


def jsonl(path: Path | str, **options: Any) -> JsonlConfig:
    return JsonlConfig(source="jsonl", path=str(path), **options)


def write_lines(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def alpaca(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"question {number}", "output": f"answer {number}", **more}


def load_one(tmp_path: Path, record: Any) -> Example:
    [example] = load_examples(jsonl(write_lines(tmp_path / "one.jsonl", record)), 0).examples
    return example


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"instruction": "Translate.", "input": "cat", "output": "chat"},
            {"instruction": "Translate.", "input": "cat", "output": "chat"},
        ),
        (
            {"instruction": "Why?", "context": "c", "response": "r", "task": "qa", "category": 3, "client": "w"},
            {"instruction": "Why?", "input": "c", "output": "r", "task": "qa", "category": "3", "client": "w"},
        ),
        (
            {"instruction": "Any of", "output": ["a", "b"]},
            {"instruction": "Any of", "output": "a", "references": ("a", "b")},
        ),
        (
            {"instruction": "q2", "output": "a2", "system": "s", "history": [["q0", "a0"], ["q1", "a1"]]},
            {
                "instruction": "q2",
                "output": "a2",
                "turns": (("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q1"), ("assistant", "a1")),
            },
        ),
        (
            {"messages": [], "conversations": [], "instruction": "Name it.", "output": "it"},
            {"instruction": "Name it.", "output": "it"},
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"instruction": "q", "output": "a", "turns": (("system", "s"),)},
        ),
        (
            {
                "system": "other",
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ],
            },
            {"instruction": "q", "output": "a", "turns": (("system", "s"),)},
        ),
        (
            {"system": "s", "prompt": "q", "completion": "a"},
            {"instruction": "q", "output": "a", "turns": (("system", "s"),)},
        ),
        (
            {"instruction": "q", "output": "a", "system": "", "history": []},
            {"instruction": "q", "output": "a"},
        ),
        ({"prompt": "2+2=", "completion": "4"}, {"instruction": "2+2=", "output": "4"}),
        ({"question": "q", "answer": ["a", "b"]}, {"instruction": "q", "output": "a", "references": ("a", "b")}),
        ({"question": "q", "context": "c", "answer": "a"}, {"instruction": "q", "input": "c", "output": "a"}),
        (
            {"prompt": "q", "response": "a", "history": [["q0", "a0"]], "question": None, "answer": None},
            {"instruction": "q", "output": "a", "turns": (("user", "q0"), ("assistant", "a0"))},
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            {"instruction": "q", "output": "a"},
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q1"},
                    {"role": "assistant", "content": "a1"},
                    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "2"}]},
                    {"role": "assistant", "content": "a2"},
                    {"role": "user", "content": "never answered"},
                ]
            },
            {
                "instruction": "q2",
                "output": "a2",
                "turns": (("system", "s"), ("user", "q1"), ("assistant", "a1")),
            },
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"instruction": "q", "output": "a"},
        ),
    ],
)
def test_known_shapes(tmp_path: Path, record: dict[str, Any], expected: dict[str, Any]) -> None:
    assert load_one(tmp_path, record) == Example(**expected, id="one.jsonl:1")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1, 2], "must be an object with fields, not list"),
        ({"text": "t"}, r"no known shape; its fields are text\).* with data\.fields"),
        ({"question": "q", "answer": None}, "the field answer has no value"),
        ({"question": "q", "output": "a"}, "no known shape; its fields are output, question"),
        ({"instruction": "q"}, "the field output is missing"),
        ({"instruction": "q", "output": None}, "the field output has no value"),
        ({"instruction": None, "output": "a"}, "the field instruction has no value"),
        ({"instruction": "q", "response": " "}, "the field response is empty"),
        ({"instruction": "q", "output": "a", "task": "\ud83d"}, "half a character"),
        ({"instruction": "q", "output": " "}, "the field output is empty"),
        ({"instruction": "", "output": "a"}, "the field instruction is empty"),
        ({"instruction": "q", "output": 7}, "the field output is int, not text"),
        ({"instruction": "q", "output": []}, "output must be text or a list of texts"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "the field input is list, not text"),
        ({"instruction": "q", "output": "a", "task": {"x": 1}}, "the field task is dict; a label must be text"),
        ({"instruction": "q", "output": "a", "system": 5}, "the field system is int, not text"),
        ({"system": ["s"], "messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"prompt": "q", "completion": "a", "system": ["s"]}, "the field system is list, not text"),
        ({"instruction": "q", "output": "a", "history": "before"}, "history must be a list of pairs of texts"),
        ({"instruction": "q", "output": "a", "history": [["q", "a", "?"]]}, "history must be a list of pairs of texts"),
        ({"instruction": "q", "output": "a", "history": [["q", None]]}, "history must be a list of pairs of texts"),
        ({"instruction": "q", "output": "a", "history": [["q", "\ud83d"]]}, "half a character"),
        ({"instruction": "q \ud83d", "output": "a"}, "half a character"),
        ({"prompt": ["x"], "completion": ["y"]}, r"prompt \+ completion must be a list of turns"),
        ({"messages": "hello"}, "messages must be a list of turns"),
        ({"messages": []}, "no known shape; its fields are messages"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn that answers a user turn"),
        ({"messages": [{"role": "wizard", "content": "q"}]}, "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": 5}]}, "content of a turn in messages is int, not text"),
    ],
)
def test_unusable_records_say_why(tmp_path: Path, record: Any, reason: str) -> None:
    with pytest.raises(
        DataError, match=rf"(?s)'one\.jsonl' has 1 unusable and 0 usable records \(record 1: .*{reason}"
    ):
        load_one(tmp_path, record)


# ---------------------------------------------------------------------------------------------------------------- jsonl


def test_unusable_records_are_counted_and_the_first_three_named(tmp_path: Path) -> None:
    records = ["{", *(alpaca(i) for i in range(6)), "", {"x": 1}, "nonsense", {"y": 2}]
    path = write_lines(tmp_path / "a.jsonl", *records)
    source = load_examples(jsonl(path), 0)
    assert len(source.examples) == 6
    [file] = source.provenance["files"]
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (file["examples"], file["unusable_records"]) == (6, 4)
    assert [line for line, _ in file["first_unusable"]] == [1, 9, 10]
    json.dumps(source.provenance)


def test_compressed_files_and_lists_read_the_same(tmp_path: Path) -> None:
    records = [alpaca(i) for i in range(3)]
    text = "\n".join(map(json.dumps, records))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(text)
    (tmp_path / "bom.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8")
    outputs = [
        [e.output for e in load_examples(jsonl(tmp_path / name), 0).examples]
        for name in ("a.jsonl.gz", "a.json", "b.json", "bom.jsonl")
    ]
    assert outputs == [["answer 0", "answer 1", "answer 2"]] * 4


def test_a_line_separator_within_a_text_does_not_end_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(alpaca(1, input="one\u2028two\x85three"), ensure_ascii=False), encoding="utf-8")
    [example] = load_examples(jsonl(path), 0).examples
    assert example.input == "one\u2028two\x85three"


def test_one_client_per_file(tmp_path: Path) -> None:
    for name in ("ward-b", "ward-a"):
        write_lines(tmp_path / f"{name}.jsonl", *(alpaca(i, input=name) for i in range(8)))
    (tmp_path / "notes.txt").write_text("not data")
    by_field = PartitionConfig(by="field")
    assert build_federation(jsonl(tmp_path, partition=by_field), 0).names == ("ward-a", "ward-b")
    assert build_federation(jsonl(tmp_path / "*-b.jsonl", partition=by_field), 0).names == ("ward-b",)


def test_a_client_field_wins_over_the_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "f.jsonl", *(alpaca(i, client="xy"[i % 2], site="s") for i in range(16)))
    by_field = PartitionConfig(by="field")
    assert build_federation(jsonl(tmp_path, partition=by_field), 0).names == ("x", "y")
    assert build_federation(jsonl(tmp_path, partition=by_field, client_field="site"), 0).names == ("s",)


def test_two_files_of_one_name_are_not_merged_silently(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "same.jsonl", *(alpaca(i) for i in range(8)))
    with pytest.raises(DataError, match=r"would both be the client 'same'"):
        load_examples(jsonl(tmp_path / "*/same.jsonl", partition=PartitionConfig(by="field")), 0)
    assert len(load_examples(jsonl(tmp_path / "*/same.jsonl"), 0).examples) == 16


def test_ids_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    for place in ("a/train.jsonl", "b/c/train.jsonl", "b/more.jsonl"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / place, alpaca(1), {"odd": 1})
    source = load_examples(jsonl(tmp_path / "**" / "*.jsonl"), 0)
    assert [e.id for e in source.examples] == ["a/train.jsonl:1", "b/c/train.jsonl:1", "more.jsonl:1"]
    assert "(a/train.jsonl record 2: no known shape; its fields are odd; b/c/train.jsonl " in unusable_line(
        source.provenance
    )


def test_a_client_field_that_no_record_has_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "f.jsonl", alpaca(1))
    with pytest.raises(DataError, match="client_field = 'hospital', but no record"):
        load_examples(jsonl(tmp_path, client_field="hospital"), 0)


@pytest.mark.parametrize(("key", "given"), [("task_field", "tsk"), ("category_field", "catgory")])
def test_a_label_field_that_no_record_has_is_refused(tmp_path: Path, key: str, given: str) -> None:
    usual = key.removesuffix("_field")
    write_lines(tmp_path / "a.jsonl", alpaca(1))
    write_lines(tmp_path / "b.jsonl", alpaca(2, **{usual: "t"}))
    with pytest.raises(
        DataError, match=f"data.{key} = '{given}', but no record has this field; did you mean '{usual}'"
    ):
        load_examples(jsonl(tmp_path, **{key: given}), 0)
    # one file may lack it, and what goes by its usual name need not be there
    assert len(load_examples(jsonl(tmp_path, **{key: usual}), 0).examples) == 2
    assert len(load_examples(jsonl(tmp_path / "a.jsonl"), 0).examples) == 1
    write_lines(tmp_path / "a.jsonl", alpaca(1, **{given: "t"}))
    assert len(load_examples(jsonl(tmp_path, **{key: given}), 0).examples) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, r"there is no file, folder or match for '.*gone\.jsonl'.*Correct data\.path"),
        (lambda path: path.mkdir(), r"the folder '.*gone\.jsonl' holds no file ending in"),
        (lambda path: path.write_bytes(b""), r"'gone\.jsonl' holds no records"),
        (lambda path: path.write_bytes(b"\n \n"), r"'gone\.jsonl' holds no records"),
        (lambda path: path.write_bytes(b'{"a": 1}\n\xff'), r"not UTF-8 text: invalid start byte in line 2"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "gone.jsonl"
    make(path)
    with pytest.raises(DataError, match=message):
        load_examples(jsonl(path), 0)


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-9], lambda packed: b"plain text", lambda packed: packed[:4]]
)
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json.dumps(alpaca(1)).encode() * 50)))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz' cannot be read"):
        load_examples(jsonl(path), 0)


def test_what_a_folder_holds_beside_data_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for number, name in enumerate(["a.jsonl", "b.JSONL", "c.ndjson", "more/d.jsonl", "e.txt", ".hidden"]):
        write_lines(tmp_path / name, *(alpaca(10 * number + one) for one in range(10)))
    config = jsonl(tmp_path, partition=PartitionConfig(by="field"))
    federation = build_federation(config, 0)
    assert federation.names == ("a", "b", "c")
    endings = ".jsonl, .jsonl.gz, .ndjson, .ndjson.gz, .json, .json.gz, .csv, .csv.gz, .tsv, .tsv.gz"
    told = f"skipped: 2 names that are no files ending in {endings} (e.txt, more)"
    assert unusable_line(federation.provenance) == told
    # a pattern with ** says nothing of the folders it goes through
    assert unusable_line(load_examples(jsonl(tmp_path / "**" / "[a-d]*"), 0).provenance) == ""
    write_lines(tmp_path / "more" / "f.jsonl", alpaca(77), {"text": "x"})
    both = load_examples(jsonl(tmp_path / "more" / "*"), 0).provenance
    assert unusable_line(both).startswith("unusable: 1 of 12 records, in 1 of 2 files (f.jsonl record 2: no known")
    assert "skipped" not in unusable_line(both)


def test_hidden_files_are_no_data_unless_they_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "anna.jsonl", *(alpaca(one) for one in range(3)))
    # what macOS leaves on disks that are not its own
    for name in ("._anna.jsonl", ".DS_Store.json"):
        (tmp_path / name).write_bytes(b"\0\x05\x16\x07\xff")
    assert [file.name for file in find_files(str(tmp_path)).files] == ["anna.jsonl"]
    source = load_examples(jsonl(tmp_path), 0)
    assert len(source.examples) == 3
    assert unusable_line(source.provenance) == ""
    for named in (tmp_path / "._anna.jsonl", tmp_path / "._*"):
        with pytest.raises(DataError, match="not UTF-8 text"):
            load_examples(jsonl(named), 0)
    (tmp_path / "anna.jsonl").unlink()
    with pytest.raises(DataError, match="holds no file ending in"):
        load_examples(jsonl(tmp_path), 0)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 2, "tags": ["a"], "data": [alpaca(1)]}, "Keep only the list in its field 'data'; allowed are"),
        ({"train": [alpaca(1)], "test": [alpaca(2)]}, "Keep only the list in its field 'train' or 'test'; allowed are"),
        ({"q1": alpaca(1), "q2": alpaca(2)}, "Its fields are q1, q2. Put the examples into a list, or write one in"),
    ],
)
def test_a_file_that_is_one_object_is_said_to_be_one(
    tmp_path: Path, content: dict[str, Any], message: str, indent: int | None
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=indent))
    for config in (jsonl(path), dolly(path)):
        with pytest.raises(DataError, match=rf"'a\.json' is one object, not a list of examples\. {message}"):
            load_examples(config, 0)


def test_a_record_alone_in_a_file_may_be_laid_out_over_lines(tmp_path: Path) -> None:
    for name, record in (("a", alpaca(1)), ("b", {"messages": [{"role": "wizard", "content": "q"}]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(record, indent=2))
    [example] = load_examples(jsonl(tmp_path / "a.json"), 0).examples
    assert (example.output, example.id) == ("answer 1", "a.json:1")
    with pytest.raises(DataError, match=r"has 1 unusable and 0 usable records \(record 1: unknown role 'wizard'"):
        load_examples(jsonl(tmp_path / "b.json"), 0)


def test_a_damaged_list_is_one_mistake_not_one_in_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([alpaca(1), alpaca(2)], indent=2)[:-1])
    with pytest.raises(DataError, match=r"a\.json' is not JSON: .* line 10 column 1 .*nor does any line"):
        load_examples(jsonl(path), 0)
    path.write_text("\n".join([json.dumps(alpaca(1)), json.dumps(alpaca(2)), "{"]))
    assert len(load_examples(jsonl(path), 0).examples) == 2


def test_a_capital_gz_is_an_archive_and_a_capital_json_may_hold_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.JSON.GZ").write_bytes(gzip.compress(json.dumps([alpaca(1), alpaca(2)]).encode()))
    assert len(load_examples(jsonl(tmp_path), 0).examples) == 2


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(DataError, match=r"data\.path = .* cannot be read: Permission denied"):
        load_examples(jsonl(tmp_path), 0)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.jsonl"
    path.write_text(json.dumps(alpaca(1, client="bob")))
    for given in (tmp_path, path):
        with pytest.raises(DataError, match=r"caf\\udce9\.jsonl' is not UTF-8\. Rename it"):
            load_examples(jsonl(given), 0)


@pytest.mark.parametrize("path", ["~nobody-by-this-name/x.jsonl", "nul\0byte.jsonl", "[", "x" * 5000])
def test_odd_paths_are_refused_in_words(path: str) -> None:
    with pytest.raises(DataError, match=r"Correct data\.path"):
        load_examples(jsonl(path), 0)


# ------------------------------------------------------------------------------------------------- natural instructions


def natural(path: Path, **options: Any) -> NaturalInstructionsConfig:
    return NaturalInstructionsConfig(source="natural_instructions", path=str(path), **options)


def task_content(**changes: Any) -> dict[str, Any]:
    instances = [{"id": f"i{n}", "input": f"in {n}", "output": [f"out {n}", "or this"]} for n in range(8)]
    return {"Definition": ["Do it.", "Other"], "Categories": ["Doing", "B"], "Instances": instances, **changes}


def write_task(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(task_content(**changes)))
    return path


def test_the_official_schema(tmp_path: Path) -> None:
    write_task(tmp_path, "task2_b")
    write_task(tmp_path, "task1_a", Definition="As text.")
    source = load_examples(natural(tmp_path), 0)
    assert [e.task for e in source.examples] == ["task1_a"] * 8 + ["task2_b"] * 8
    assert source.examples[8] == Example(
        instruction="Do it.",
        input="in 0",
        output="out 0",
        references=("out 0", "or this"),
        task="task2_b",
        category="Doing",
        id="i0",
    )
    assert source.examples[0].instruction == "As text."
    assert [len(file["sha256"]) for file in source.provenance["files"]] == [64, 64]


def test_hidden_files_are_no_tasks(tmp_path: Path) -> None:
    write_task(tmp_path, "task1")
    (tmp_path / "._task1.json").write_bytes(b"\0\x05\x16\x07\xff")
    assert {example.task for example in load_examples(natural(tmp_path), 0).examples} == {"task1"}


def test_chosen_tasks_in_the_given_order(tmp_path: Path) -> None:
    for name in ("task1", "task2", "task3"):
        write_task(tmp_path, name)
    federation = build_federation(natural(tmp_path, tasks=("task3", "task1.json")), 0)
    assert federation.names == ("task3", "task1")


def test_unusable_instances_are_counted(tmp_path: Path) -> None:
    good = task_content()["Instances"]
    bad = [{"input": 3, "output": ["x"]}, {"input": "x", "output": []}, {"input": "x\ud800", "output": ["y"]}, 5]
    write_task(tmp_path, "task1", Instances=[*bad, *good])
    source = load_examples(natural(tmp_path), 0)
    assert len(source.examples) == 8
    assert source.provenance["files"][0]["unusable_records"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Definition": []}, r"task1\.json.*schema: Definition is missing"),
        ({"Categories": None}, r"task1\.json.*schema: Categories is missing"),
        ({"Definition": ["Do \ud83d it"]}, r"task1\.json.*schema: in Definition, a text has half a character"),
        ({"Categories": ["\ud83d"]}, r"task1\.json.*schema: in Categories, a text has half a character"),
        ({"Instances": {"a": 1}}, r"task1\.json.*schema: Instances is missing or not a list"),
        ({"Instances": []}, r"task1\.json' holds no records"),
        ({"Instances": [{"input": "a"}]}, r"task1\.json' has 1 unusable and 0 usable"),
    ],
)
def test_files_off_the_schema_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_task(tmp_path, "task1", **changes)
    with pytest.raises(DataError, match=message):
        load_examples(natural(tmp_path), 0)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "it holds a list, not an object")])
def test_task_files_that_are_no_tasks(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "task1.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_examples(natural(tmp_path), 0)


def test_missing_folder_and_misspelt_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_examples(natural(tmp_path / "gone"), 0)
    with pytest.raises(DataError, match=r"holds no \.json file"):
        load_examples(natural(tmp_path), 0)
    write_task(tmp_path, "task033_winogrande")
    with pytest.raises(DataError, match=r"'task33_winogrande'.*did you mean 'task033_winogrande'\?"):
        load_examples(natural(tmp_path, tasks=("task33_winogrande",)), 0)


# ---------------------------------------------------------------------------------------------------------------- dolly


def dolly(path: Path | str) -> DollyConfig:
    return DollyConfig(source="dolly", path=str(path))


def test_dolly_takes_the_category_as_task(tmp_path: Path) -> None:
    record = {"instruction": "q", "context": "c", "response": "r", "category": "open_qa", "client": "not of Dolly"}
    [example] = load_examples(dolly(write_lines(tmp_path / "d.jsonl", record)), 0).examples
    assert example == Example(
        instruction="q", input="c", output="r", task="open_qa", category="open_qa", id="d.jsonl:1"
    )


def test_dolly_needs_a_category_and_a_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"instruction": "q", "response": "r"})
    with pytest.raises(DataError, match=r"d\.jsonl:1 .* has no category"):
        load_examples(dolly(path), 0)
    for missing in (tmp_path / "gone.jsonl", "./gone", "data/gone.jsonl.gz"):
        with pytest.raises(DataError, match="is not a file"):
            load_examples(dolly(missing), 0)


# --------------------------------------------------------------------------------------------------------- hugging face


def hub(path: Path | str, **options: Any) -> HuggingFaceConfig:
    return HuggingFaceConfig(source="huggingface", path=str(path), **options)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The `datasets` package, with its cache in a folder of the test and without the hub."""
    module = pytest.importorskip("datasets", reason="the extra `huggingface` is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    module.disable_progress_bars()
    return module


def test_a_local_folder_of_data_files(tmp_path: Path, datasets: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *(alpaca(i, task="t", site=f"s{i % 2}") for i in range(20)))
    config = hub(folder, client_field="site", partition=PartitionConfig(by="field"))
    federation = build_federation(config, 0)
    assert federation.names == ("s0", "s1")
    assert federation.clients[0].task == "t"
    provenance = federation.provenance["dataset"]
    assert provenance["examples"] == 20
    assert len(provenance["examples_sha256"]) == 64
    json.dumps(federation.provenance)


def test_fields_and_splits_by_names_of_ones_own(tmp_path: Path, datasets: Any) -> None:
    records = [{"q": f"question {i}", "a": "yes", "part": "test" if i < 4 else ""} for i in range(12)]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    options: dict[str, Any] = {"fields": {"instruction": "q", "output": "a"}, "split_field": "part"}
    partition = PartitionConfig(by="iid", num_clients=1)
    [client] = build_federation(hub(tmp_path / "saved", partition=partition, **options), 0).clients
    assert {e.instruction for e in client.test} == {f"question {i}" for i in range(4)}


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_a_saved_data_set(tmp_path: Path, datasets: Any, as_dictionary: bool) -> None:
    made = datasets.Dataset.from_list([alpaca(i) for i in range(5)])
    (datasets.DatasetDict({"train": made}) if as_dictionary else made).save_to_disk(str(tmp_path / "saved"))
    outputs = [e.output for e in load_examples(hub(tmp_path / "saved"), 0).examples]
    assert outputs == [f"answer {i}" for i in range(5)]


def test_what_is_no_text_is_not_decoded(tmp_path: Path, datasets: Any) -> None:
    stored = {"bytes": b"no picture", "path": None}
    turns = [{"role": role, "content": [{"type": "text", "text": role, "picture": None}]} for role in ("user", "bot")]
    shown = [{**turns[0], "content": [{"type": "image", "text": None, "picture": stored}]}, turns[1]]
    records = [{"messages": turns, "picture": stored, "sounds": [stored]} for _ in range(3)]
    made = datasets.Dataset.from_list([*records, {"messages": shown, "picture": stored, "sounds": [stored]}])
    features = made.features.copy()
    features["picture"], features["sounds"] = datasets.Image(), datasets.List(datasets.Audio())
    features["messages"].feature["content"].feature["picture"] = datasets.Image()
    made.cast(features).save_to_disk(str(tmp_path / "saved"))
    before = sorted(tmp_path.rglob("*"))
    source = load_examples(hub(tmp_path / "saved"), 0)
    assert [(e.instruction, e.output) for e in source.examples] == [("user", "bot")] * 3
    [[line, reason]] = source.provenance["dataset"]["first_unusable"]
    assert (line, reason) == (4, "content of a turn in messages is list, not text")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is copied"


def test_mixed_values_beside_a_picture_are_read(tmp_path: Path, datasets: Any) -> None:
    text, stored = datasets.Value("string"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"instruction": text, "output": datasets.Json(), "picture": stored})
    records = [{**alpaca(0), "output": ["a", "b"]}, alpaca(1)]
    rows = [{**record, "picture": {"bytes": b"no picture", "path": None}} for record in records]
    made = datasets.Dataset.from_list(rows, features=features).cast_column("picture", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    assert [e.output for e in load_examples(hub(tmp_path / "saved"), 0).examples] == ["a", "answer 1"]


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_a_saved_data_set_has_no_names_and_no_slices(tmp_path: Path, datasets: Any, as_dictionary: bool) -> None:
    made = datasets.Dataset.from_list([alpaca(i) for i in range(5)])
    both = datasets.DatasetDict({"train": made, "more": made})
    (both if as_dictionary else made).save_to_disk(str(tmp_path / "saved"))
    has = "has the splits train, more; slices" if as_dictionary else "has no splits and is read whole, as train; slices"
    for split in ("test", "train[:10%]"):
        with pytest.raises(DataError, match=has):
            load_examples(hub(tmp_path / "saved", split=split), 0)
    with pytest.raises(DataError, match=r"data\.name = 'large'.*no configurations"):
        load_examples(hub(tmp_path / "saved", name="large"), 0)


def test_a_saved_split_goes_by_its_own_name_too(tmp_path: Path, datasets: Any) -> None:
    made = datasets.Dataset.from_list([alpaca(i) for i in range(5)], split="test")
    made.save_to_disk(str(tmp_path / "saved"))
    for split in ("train", "test"):
        assert len(load_examples(hub(tmp_path / "saved", split=split), 0).examples) == 5


@pytest.mark.parametrize("names", [("a.jsonl", "a.ndjson"), ("a.jsonl.gz", "a.JSONL")])
def test_files_that_differ_in_their_ending_only_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in ("b.jsonl", *names):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="differ in their ending only"):
        find_files(str(tmp_path))


def test_what_cannot_be_loaded_is_named(tmp_path: Path, datasets: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", alpaca(1))
    with pytest.raises(DataError, match=r"split 'training'\) cannot be loaded: .*Check data\.path"):
        load_examples(hub(folder, split="training"), 0)
    # what went wrong deep inside is said, and nothing of the hub where a folder is meant
    (tmp_path / "unequal").mkdir()
    write_lines(tmp_path / "unequal" / "a.jsonl", alpaca(1))
    write_lines(tmp_path / "unequal" / "b.jsonl", {"text": ["x"], "number": 1})
    with pytest.raises(DataError, match=r"(?s)generating the dataset: .+data\.path, data\.name and data\.split\.$"):
        load_examples(hub(tmp_path / "unequal"), 0)
    with pytest.raises(DataError, match=r"'someone/gone' .*cannot be loaded.* the hub can be reached"):
        load_examples(hub("someone/gone"), 0)
    with pytest.raises(DataError, match=r"'someone/dolly-of-sorts' .*cannot be loaded"):
        load_examples(dolly("someone/dolly-of-sorts"), 0)
    with pytest.raises(DataError, match=r"client_field = 'ward', but no record"):
        load_examples(hub(folder, client_field="ward"), 0)
    with pytest.raises(DataError, match=r"task_field = 'ward', but no record"):
        load_examples(hub(folder, task_field="ward"), 0)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SetupError, match=r"pip install 'fedmira\[huggingface\]'"):
        load_examples(hub("someone/something"), 0)
