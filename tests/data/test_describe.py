"""What `fedmira data` shows is what the model will see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fedmira
from fedmira.config.data import JsonlConfig
from fedmira.data.describe import describe, marked, token_pieces
from fedmira.data.partition import build_federation
from fedmira.data.tokenization import tokenize_federation
from fedmira.types import Client, Example, Federation


def example(question: str, answer: str, id_: str) -> Example:
    return Example(instruction=question, output=answer, id=id_)


def made_federation() -> Federation:
    held_out = (example("h", "y", "held-out"),)
    train = (example("ab", "xyz", "short"), example("c" * 30, "12", "cut"), example("d", "9" * 30, "long"))
    clients = (
        Client("one", train, held_out, held_out, task="letters", category="toy"),
        Client("two", (example("q", "a", "only"),), (), held_out),
    )
    return Federation(clients, None, {"source": "made"})


def test_rows_count_what_each_client_holds(tokenizer: Any) -> None:
    federation = made_federation()
    tokenized, report = tokenize_federation(federation, tokenizer, "plain", 20)
    description = describe(federation, tokenized, report, tokenizer)
    one, two = description.rows
    assert (one.client, one.task, one.category) == ("one", "letters", "toy")
    assert (one.train, one.validation, one.test) == (2, 1, 1)
    assert (one.truncated_prompts, one.dropped_examples, one.longest) == (1, 1, 20)
    # <s>ab.xyz</s> is 8 tokens, the cut one 20, <s>h.y</s> twice 5
    assert one.mean_tokens == (8 + 20 + 5 + 5) / 4
    assert one.supervised_share == (4 + 3 + 2 + 2) / 38
    assert (two.train, two.validation, two.test) == (1, 0, 1)
    total = description.total
    assert (total.train, total.validation, total.test) == (3, 1, 2)
    assert total.mean_tokens == (38 + 10) / 6
    assert total.supervised_share == (11 + 4) / 48
    assert description.dropped == (("one", ("long",)),)
    assert description.provenance == {"source": "made"}


def test_the_supervised_tokens_are_marked(tokenizer: Any) -> None:
    federation = made_federation()
    tokenized, report = tokenize_federation(federation, tokenizer, "plain", 20)
    description = describe(federation, tokenized, report, tokenizer)
    sample = description.samples[0]
    assert (sample.client, sample.id) == ("one", "short")
    assert [piece.text for piece in sample.pieces if piece.supervised] == ["x", "y", "z", "</s>"]
    assert marked(sample) == "<s>ab\n[[xyz</s>]]"
    assert marked(sample) in description.text()


def test_examples_of_some_clients_leave_the_table_as_it_is(tokenizer: Any) -> None:
    federation = made_federation()
    tokenized, report = tokenize_federation(federation, tokenizer, "plain", 20)
    everybody, first = (describe(federation, tokenized, report, tokenizer, count) for count in (None, 1))
    assert (first.rows, first.total, first.samples) == (everybody.rows, everybody.total, everybody.samples[:1])
    assert "--- two (" in everybody.text()
    assert "more clients" not in everybody.text()
    assert first.text().endswith("[[xyz</s>]]\n\n--- 1 more clients: --json shows an example of each")


def test_text_and_facts_tell_the_same(tokenizer: Any) -> None:
    federation = made_federation()
    tokenized, report = tokenize_federation(federation, tokenizer, "plain", 20)
    description = describe(federation, tokenized, report, tokenizer)
    facts = json.loads(json.dumps(description.facts()))
    assert [row["client"] for row in facts["clients"]] == ["one", "two"]
    assert facts["total"]["train"] == 3
    assert facts["dropped"] == {"one": ["long"]}
    lines = description.text().split("\n")
    assert " ".join(lines[0].split()) == "client task category train val test tokens longest trained on cut dropped"
    assert lines[1].split() == ["one", "letters", "toy", "2", "1", "1", "9.5", "20", "28.9%", "1", "1"]
    assert lines[3].split()[0] == "total"
    assert "dropped at one: long" in description.text()


def test_the_pieces_of_the_shipped_tokenizer_join_to_the_text() -> None:
    from transformers import AutoTokenizer

    folder = Path(fedmira.__file__).parent / "assets" / "base"
    shipped = AutoTokenizer.from_pretrained(folder)
    train = (example("caf\u00e9 \U0001f600 \u6f22\u5b57\n\n  two", "na\u00efve \U0001f680\u00e9", "odd"),)
    federation = Federation((Client("one", train, (), (example("else", "yes", "test"),)),))
    [client], _ = tokenize_federation(federation, shipped, "plain", 64)
    pieces = token_pieces(client.train[0], shipped)
    prompt = "".join(piece.text for piece in pieces if not piece.supervised)
    answer = "".join(piece.text for piece in pieces if piece.supervised)
    assert prompt.endswith("caf\u00e9 \U0001f600 \u6f22\u5b57\n\n  two\n")
    assert answer == "na\u00efve \U0001f680\u00e9" + shipped.eos_token
    assert "\ufffd" not in prompt + answer


def test_what_was_left_out_is_told_with_the_first_reasons(tokenizer: Any, tmp_path: Path) -> None:
    for number in range(8):
        bad = ["{", json.dumps({"text\n": "t"})] if number else []
        good = [json.dumps({"instruction": f"say {number} {n}", "output": "yes"}) for n in range(6)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*good, *bad]))
    data = JsonlConfig.model_validate(
        {"source": "jsonl", "path": str(tmp_path), "partition": {"by": "field", "examples_per_client": 5}}
    )
    federation = build_federation(data, 0)
    tokenized, report = tokenize_federation(federation, tokenizer, "plain", 40)
    lines = describe(federation, tokenized, report, tokenizer).text().split("\n")
    [unusable] = [line for line in lines if line.startswith("unusable")]
    assert unusable.startswith("unusable: 14 of 62 records, in 7 of 8 files (1.jsonl record 7: not JSON (")
    assert "; 1.jsonl record 8: no known shape; its fields are text; 2.jsonl record 7: not JSON (" in unusable
    assert unusable.endswith("; ...)")
    assert "left out: 8 examples, which data.partition.examples_per_client leaves to no client" in lines


def test_duplicates_are_counted_for_each_client(tokenizer: Any) -> None:
    same = tuple(example("q", "a", f"same-{number}") for number in range(3))
    other_answer = example("q", "b", "other")
    clients = (
        Client("one", (*same, other_answer), (example("v", "y", "one"),), (example("t", "y", "one"),)),
        Client("two", (same[0], example("r", "a", "single")), (), (example("s", "y", "test"),)),
    )
    federation = Federation(clients, None, {"source": "made"})
    tokenized, report = tokenize_federation(federation, tokenizer, "plain", 20)
    description = describe(federation, tokenized, report, tokenizer)
    assert [row.duplicate_examples for row in description.rows] == [2, 0]
    assert description.facts()["total"]["duplicate_examples"] == 2
    line = "duplicates: 2 examples are the same as another one of their client and are kept (one 2)"
    assert line in description.text().split("\n")
    alone = Federation(clients[1:], None, {"source": "made"})
    tokenized, report = tokenize_federation(alone, tokenizer, "plain", 20)
    assert "duplicates" not in describe(alone, tokenized, report, tokenizer).text()


def test_nothing_is_told_where_nothing_was_left_out(tokenizer: Any) -> None:
    federation = made_federation()
    tokenized, report = tokenize_federation(federation, tokenizer, "plain", 20)
    text = describe(federation, tokenized, report, tokenizer).text()
    assert "unusable:" not in text
    assert "left out:" not in text
