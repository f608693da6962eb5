"""Tables that departments save from their spreadsheets become examples as JSON Lines do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.config.data import DollyConfig, JsonlConfig, PartitionConfig
from fedmira.data.partition import build_federation
from fedmira.data.probe import probe_texts
from fedmira.data.sources import load_examples
from fedmira.data.sources.files import find_files, unusable_line
from fedmira.data.sources.tables import DELIMITERS, read_table
from fedmira.errors import DataError
from fedmira.types import Example

FIELDS = {"instruction": "Frage", "input": "system", "output": "Antwort"}
ALPACA = "instruction,input,output\n"


def table(path: Path | str, **options: Any) -> JsonlConfig:
    return JsonlConfig(source="jsonl", path=str(path), **options)


def examples(path: Path, text: str, **options: Any) -> tuple[Example, ...]:
    path.write_text(text, encoding="utf-8", newline="")
    return load_examples(table(path, **options), 0).examples


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_delimiters_line_ends_and_byte_order_marks_of_spreadsheets(
    tmp_path: Path, delimiter: str, line_end: str, mark: str
) -> None:
    lines = [
        ["instruction", "input", "output"],
        ['"Say ""a,b;c\td"""', "", '"one' + line_end + 'two"'],
        ["q", "context", "answer"],
        ["", "", ""],
    ]
    text = mark + line_end.join(delimiter.join(cells) for cells in lines)
    first, second = examples(tmp_path / "a.csv", text)
    assert first == Example(instruction='Say "a,b;c\td"', output="one\ntwo", id="a.csv:2")
    assert second == Example(instruction="q", input="context", output="answer", id="a.csv:4")


texts = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(texts, texts), max_size=8), st.sampled_from(DELIMITERS), st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_a_spreadsheet_writes_is_read_back(rows: list[tuple[str, str]], delimiter: str, quoted: bool) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerows([("question", "answer"), *rows])
    read = read_table(stream.getvalue())
    kept = [tuple(cell if cell.strip() else None for cell in row) for row in rows]
    assert [tuple(row.values()) for _, row in read.rows] == [row for row in kept if row != (None, None)]
    assert read.bad == ()


def test_the_delimiter_is_the_one_that_rows_agree_on() -> None:
    header = "question, or what it is about, in short;answer"
    rows = read_table(f"{header}\nWhere?;here, there\nWhen?;now\n").rows
    assert [list(row.values()) for _, row in rows] == [["Where?", "here, there"], ["When?", "now"]]


def test_rows_that_do_not_fit_are_named_by_line(tmp_path: Path) -> None:
    rows = 'q1,,a1\n"q2\nover lines",,a2\nq3,a3\nq4,,a4\n"q5"x,,a5\nq6,,\nq7,,a7\n'
    path = tmp_path / "a.csv"
    found = examples(path, ALPACA + rows)
    assert [one.id for one in found] == ["a.csv:2", "a.csv:3", "a.csv:6", "a.csv:9"]
    told = unusable_line(load_examples(table(path), 0).provenance)
    assert told.startswith(
        "unusable: 3 of 7 records, in 1 of 1 files (a.csv record 5: 2 cells, where the header has 3; "
    )
    assert "record 7: not a row of a table (" in told
    assert "record 8: the field output has no value" in told


def test_cells_may_be_as_long_as_texts_of_other_files(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    [example] = examples(tmp_path / "a.csv", f"{ALPACA}q,{'x' * 300_000},a\n")
    assert len(example.input) == 300_000
    assert csv.field_size_limit() == before


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    [example] = examples(tmp_path / "a.csv", ",question,answer,\n0,q,a,\n")
    assert (example.instruction, example.output) == ("q", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'a\.csv' holds no records"),
        ("question,answer\n", r"'a\.csv' holds no records"),
        (
            "Frage;Antwort;Wer\nq;a;w\n",
            "columns of 'a.csv' are Frage, Antwort, Wer: none is known .*data.fields",
        ),
        (
            "instruction,answer\nq,a\n",
            "columns of 'a.csv' are instruction, answer: the field output is missing.*data.f",
        ),
        ("question,answer,answer\nq,a,b\n", r"a\.csv' is no table: two columns are called 'answer'\. Correct it"),
        (
            'question,answer\nq,a\n"q,a\nq,a\n',
            r"a\.csv' is no table: a quotation mark that is opened in line 3 is never",
        ),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples(tmp_path / "a.csv", text)


def test_a_table_that_is_not_utf8_says_what_excel_calls_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("question;answer\nWo?;Süd\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"not UTF-8 text: .* in line 2\. Convert it to UTF-8; .* 'CSV UTF-8'"):
        load_examples(table(tmp_path), 0)


def test_a_client_for_each_table_beside_other_files(tmp_path: Path) -> None:
    rows = [f"q{number}" for number in range(12)]
    (tmp_path / "Chirurgie.csv").write_text("question;answer\n" + "".join(f"{row} c;a\n" for row in rows))
    packed = gzip.compress(("question\tanswer\n" + "".join(f"{row} r\ta\n" for row in rows)).encode())
    # how macOS spells what is a letter of its own elsewhere
    (tmp_path / f"{unicodedata.normalize('NFD', 'Radiologie Süd')}.TSV.gz").write_bytes(packed)
    (tmp_path / "ward.jsonl").write_text("".join(f'{{"question": "{row} w", "answer": "a"}}\n' for row in rows))
    federation = build_federation(table(tmp_path, partition=PartitionConfig(by="field")), 0)
    assert federation.names == ("Chirurgie", "Radiologie Süd", "ward")
    (tmp_path / "ward.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(DataError, match="differ in their ending only"):
        find_files(str(tmp_path))


def test_what_only_a_spreadsheet_program_reads_is_to_be_saved_as_csv(tmp_path: Path) -> None:
    (tmp_path / "Chirurgie.xlsx").write_bytes(b"PK")
    for place in (tmp_path, tmp_path / "Chirurgie.xlsx", tmp_path / "*.xlsx"):
        with pytest.raises(DataError, match=r"(?i)save spreadsheets as CSV"):
            load_examples(table(place), 0)
    (tmp_path / "a.csv").write_text("question,answer\nq,a\n")
    told = unusable_line(load_examples(table(tmp_path), 0).provenance)
    assert told.startswith("skipped: 1 names")
    assert told.endswith("(Chirurgie.xlsx); save spreadsheets as CSV, in Excel as 'CSV UTF-8'")
    # saved, and the workbook left beside it
    (tmp_path / "Chirurgie.csv").write_text("question,answer\nq,a\n")
    assert unusable_line(load_examples(table(tmp_path), 0).provenance) == ""


def test_dolly_may_be_a_table(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("instruction,context,response,category\nq,,r,open_qa\n")
    [example] = load_examples(DollyConfig(source="dolly", path=str(path)), 0).examples
    assert (example.output, example.task) == ("r", "open_qa")


# ------------------------------------------------------------------------------------------------ which field is what


def test_the_config_says_which_column_is_what(tmp_path: Path) -> None:
    text = "Frage;Akte;Antwort;output\nWo?;a1;hier;x\nWann?;;nun;y\n"
    fields = {"instruction": "Frage", "input": "Akte", "output": "Antwort"}
    found = examples(tmp_path / "a.csv", text, fields=fields)
    assert [(one.instruction, one.input, one.output) for one in found] == [("Wo?", "a1", "hier"), ("Wann?", "", "nun")]
    # a column of any name can be one that is not taken
    [one] = examples(tmp_path / "a.csv", "Frage;history;system;Antwort\nWo?;long;lung;hier\n", fields=FIELDS)
    assert one == Example(instruction="Wo?", input="lung", output="hier", id="a.csv:2")
    # what is left out goes by its known names
    found = examples(tmp_path / "a.csv", text, fields={"instruction": "Frage"})
    assert [(one.instruction, one.input, one.output) for one in found] == [("Wo?", "", "x"), ("Wann?", "", "y")]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_misspelt_field_is_told_with_the_nearest_there_is(tmp_path: Path, name: str) -> None:
    text = "Frage,Akte,Antwort\nq,c,a\n" if name == "a.csv" else '{"Frage": "q", "Akte": "c", "Antwort": "a"}'
    for wrong, right in (("Farge", "Frage"), ("Antwrot", "Antwort"), ("Atke", "Akte")):
        fields = {"instruction": "Frage", "input": "Akte", "output": "Antwort"}
        misspelt = {part: wrong if field == right else field for part, field in fields.items()}
        with pytest.raises(DataError, match=rf"{wrong}.*; did you mean '{right}'\?"):
            examples(tmp_path / name, text, fields=misspelt)


@pytest.mark.parametrize(
    ("fields", "header", "expected"),
    [
        ({"instruction": "input", "output": "label"}, "input,label", ("1", "", "2")),
        ({"instruction": "output", "output": "input"}, "input,output", ("2", "", "1")),
        ({"input": "question"}, "question,prompt,output", ("2", "1", "3")),
        ({"instruction": "output"}, "output,answer", ("1", "", "2")),
        ({"instruction": "output"}, "output,label", "does not name the output, and no other field is called output or"),
        ({"input": "instruction"}, "instruction,output", "does not name the instruction, and no other field is called"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_no_field_is_two_parts_of_an_example(
    tmp_path: Path, name: str, fields: dict[str, str], header: str, expected: tuple[str, ...] | str
) -> None:
    columns = header.split(",")
    cells = [str(number + 1) for number in range(len(columns))]
    text = f"{header}\n{','.join(cells)}\n" if name == "a.csv" else json.dumps(dict(zip(columns, cells, strict=True)))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            examples(tmp_path / name, text, fields=fields)
    else:
        [one] = examples(tmp_path / name, text, fields=fields)
        assert (one.instruction, one.input, one.output) == expected


def test_a_table_may_lack_the_column_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Frage,Akte,Antwort\nq1,c,a\n")
    (tmp_path / "b.csv").write_text("Frage,Antwort\nq2,a\n")
    fields = {"instruction": "Frage", "input": "Akte", "output": "Antwort"}
    assert [one.input for one in load_examples(table(tmp_path, fields=fields), 0).examples] == ["c", ""]


@pytest.mark.parametrize("column", ["history", "messages", "conversations"])
def test_columns_are_no_lists_of_turns(tmp_path: Path, column: str) -> None:
    [one] = examples(tmp_path / "a.csv", f"question,answer,{column}\nq,a,smoker\n")
    assert one == Example(instruction="q", output="a", id="a.csv:2")
    [one] = examples(tmp_path / "a.csv", f"{column},answer\nq,a\n", fields={"instruction": column})
    assert one.instruction == "q"
    [one] = examples(tmp_path / "a.csv", f"question,answer,{column}\nq,a,t\n", task_field=column)
    assert one.task == "t"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_texts_of_the_server_are_not_told_of_a_key_that_is_for_clients_data(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("Frage,Antwort\nq,a\n" if name == "a.csv" else '{"Frage": "q", "Antwort": "a"}')
    with pytest.raises(DataError, match=r"data\.fields"):
        load_examples(table(path), 0)
    with pytest.raises(DataError, match="Frage") as caught:
        probe_texts(str(path), 1, None, "plain", 8, "input", 0)  # type: ignore[arg-type]  # refused before it is used
    assert "data.fields" not in str(caught.value)
    assert name == "a.jsonl" or str(caught.value).endswith(". Call them question and answer in the first line.")


# ------------------------------------------------------------------------------------------------------ splits by name


def rows(*splits: str) -> str:
    return "question,answer,part\n" + "".join(f"q{number},a,{split}\n" for number, split in enumerate(splits))


def test_examples_go_where_they_say_and_the_others_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(rows("Test", "", "train", "validation", *[""] * 16))
    config = table(path, split_field="part", partition=PartitionConfig(by="field"))
    for seed in range(4):
        [client] = build_federation(config, seed).clients
        assert "q0" in {one.instruction for one in client.test}
        assert "q2" in {one.instruction for one in client.train}
        assert "q3" in {one.instruction for one in client.validation}
        assert (len(client.train), len(client.validation), len(client.test)) == (12, 3, 5)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train", "tset"], "a.csv:3 has part = 'tset', .*; allowed: train, validation, test; did you mean 'test'"),
        (
            ["train"] * 8,
            "client 'a' has no example left for validation and test: .* 8 of them in the split that the data",
        ),
        (["test"] * 8, "client 'a' has no example left for train and validation"),
        (["train"] * 4 + ["test"] * 4, r"left for validation.*or set data\.partition\.validation to 0\."),
    ],
)
def test_splits_that_cannot_be_are_refused(tmp_path: Path, splits: list[str], message: str) -> None:
    (tmp_path / "a.csv").write_text(rows(*splits))
    with pytest.raises(DataError, match=message) as caught:
        build_federation(table(tmp_path, split_field="part", partition=PartitionConfig(by="field")), 0)
    advised = "or set data.partition.validation" in str(caught.value)
    assert advised == (len(splits) > 2 and "train" in splits), "only what helps is advised"


def test_one_prompt_is_not_said_to_be_in_two_splits(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(rows("train", "test") + "Q1 ,b,train\n")
    with pytest.raises(DataError, match=r"a\.csv:3 and a\.csv:4 have the same prompt, .* in test, the other in train"):
        load_examples(table(tmp_path, split_field="part"), 0)


def test_a_split_field_that_no_record_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(rows("train"))
    with pytest.raises(DataError, match=r"split_field = 'parts', but no record has this field; did you mean 'part'\?"):
        load_examples(table(tmp_path, split_field="parts"), 0)


@pytest.mark.parametrize(("cap", "sizes"), [(5, (3, 1, 1)), (8, (4, 2, 2)), (12, (6, 3, 3))])
def test_a_cap_keeps_the_shares_that_the_data_names(tmp_path: Path, cap: int, sizes: tuple[int, int, int]) -> None:
    (tmp_path / "a.csv").write_text(rows(*["train", "train", "validation", "test"] * 10))
    partition = PartitionConfig(by="field", examples_per_client=cap)
    for seed in range(6):
        [client] = build_federation(table(tmp_path, split_field="part", partition=partition), seed).clients
        assert (len(client.train), len(client.validation), len(client.test)) == sizes


def test_a_cap_keeps_shares_to_the_nearest_example(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(rows(*["train"] * 16, *["validation", "test"] * 2))
    partition = PartitionConfig(by="field", examples_per_client=12)
    [client] = build_federation(table(tmp_path, split_field="part", partition=partition), 0).clients
    assert (len(client.train), len(client.validation), len(client.test)) == (10, 1, 1)


@pytest.mark.parametrize("drawn", [0, 3])
def test_a_cap_leaves_every_split_something_however_little_is_named(tmp_path: Path, drawn: int) -> None:
    held_out = [""] * drawn if drawn else ["validation", "test"] * 2
    (tmp_path / "a.csv").write_text(rows(*["train"] * 90, *held_out))
    for seed in range(6):
        partition = PartitionConfig(by="iid", num_clients=1 if drawn else 2, examples_per_client=6)
        for client in build_federation(table(tmp_path, split_field="part", partition=partition), seed).clients:
            assert (len(client.train), len(client.validation), len(client.test)) == (4, 1, 1)


@pytest.mark.parametrize("cap", [None, 9])
def test_who_joins_does_not_name_the_split_of_what_others_hold(tmp_path: Path, cap: int | None) -> None:
    def write(client: str, records: list[tuple[str, str]]) -> None:
        lines = "".join(f"{question},x,{split}\n" for question, split in records)
        (tmp_path / f"{client}.csv").write_text("question,answer,part\n" + lines)

    write("b", [(f"b{number}", "train" if number < 3 else "") for number in range(12)])
    config = table(tmp_path, split_field="part", partition=PartitionConfig(by="field", examples_per_client=cap))
    [before] = build_federation(config, 0).clients
    theirs = [(f"b{number}", "train" if number < 3 else "test") for number in range(12)]
    write("a", [*theirs, *((f"a{number}", "validation" if number < 5 else "") for number in range(20))])
    after, joined = build_federation(config, 0, known=("b",)).clients
    assert after == before
    # what is theirs alone goes where they say
    assert not any(one.instruction in {f"a{number}" for number in range(5)} for one in (*joined.train, *joined.test))
