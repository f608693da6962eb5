"""Answers survive whole, prompts lose their beginning, and what is lost is counted. One character is one token here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.data.prompts import render
from fedmira.data.tokenization import (
    TokenizedExample,
    _cut_within,
    digest,
    end_token,
    prompt_tokens,
    tokenize_federation,
)
from fedmira.errors import DataError, SetupError
from fedmira.types import Client, Example, Federation

START, END = 1, 2


def example(question: str, answer: str, id_: str = "e") -> Example:
    return Example(instruction=question, output=answer, id=id_)


def federation(*train: Example) -> Federation:
    held_out = (example("held out", "yes"),)
    return Federation((Client("c", train, held_out, held_out),))


def first(tokenizer: Any, one: Example, max_length: int, template: str = "plain") -> TokenizedExample:
    [client], _ = tokenize_federation(federation(one), tokenizer, template, max_length)
    return client.train[0]


def spelt(tokenizer: Any, ids: Any) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(int(i)) for i in ids)


def test_a_sequence_is_start_prompt_answer_end(tokenizer: Any) -> None:
    sequence = first(tokenizer, example("ab", "xy"), 20)
    assert spelt(tokenizer, sequence.tokens) == "<s>ab\nxy</s>"
    assert sequence.prompt_length == 4
    assert sequence.tokens.dtype == np.int32
    assert sequence.id == "e"


def test_a_long_prompt_loses_its_beginning_but_not_the_start_token(tokenizer: Any) -> None:
    one = example("abcdefghij", "xyz")
    [client], report = tokenize_federation(federation(one), tokenizer, "plain", 13)
    sequence = client.train[0]
    assert spelt(tokenizer, sequence.tokens) == "<s>defghij\nxyz</s>"
    assert len(sequence.tokens) == 13
    assert sequence.prompt_length == 9
    # the two held-out prompts are one token too long as well
    assert (report.truncated_prompts, report.dropped_examples) == (3, 0)


LONG = "abcdefghijklmnopqrstuvwxyz"


def read(tokenizer: Any, one: Example, max_length: int, template: str = "plain", cut: Any = "input") -> str:
    [client], _ = tokenize_federation(federation(one), tokenizer, template, max_length, cut)
    sequence = client.train[0]
    reserve = len(sequence.tokens) - sequence.prompt_length
    prompt = prompt_tokens(one, tokenizer, template, max_length - reserve, cut)
    assert np.array_equal(prompt, sequence.tokens[: sequence.prompt_length])
    return spelt(tokenizer, prompt)


def test_a_long_input_loses_its_beginning_and_the_instruction_stays(tokenizer: Any) -> None:
    one = Example(instruction="Who?", input=LONG, output="me")
    assert read(tokenizer, one, 16) == "<s>Who?\nuvwxyz\n"
    assert read(tokenizer, one, 16, cut="beginning") == "<s>pqrstuvwxyz\n"
    # more than the input would have to go
    assert read(tokenizer, one, 10) == read(tokenizer, one, 10, cut="beginning") == "<s>vwxyz\n"
    # what fits is left alone
    assert read(tokenizer, one, 99) == read(tokenizer, one, 99, cut="beginning") == f"<s>Who?\n{LONG}\n"


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_every_template_keeps_what_stands_around_the_input(tokenizer: Any, template: str) -> None:
    turns = (("user", "Hello."), ("assistant", "Hi."))
    one = Example(instruction="Who?", input=LONG, output="me", turns=turns)
    whole = len(prompt_tokens(one, tokenizer, template, 999))
    # beside the answer of two tokens and its end
    for lost in (1, 20):
        prompt = read(tokenizer, one, whole - lost + 3, template)
        assert prompt == read(tokenizer, one, 999, template).replace(LONG, LONG[lost:])


@pytest.mark.parametrize("text", ["x" + LONG, LONG + "x", "xx" + LONG + "xx"])
def test_the_inputs_own_beginning_goes_whatever_it_is(tokenizer: Any, text: str) -> None:
    one = Example(instruction="Who?", input=text, output="me")
    for lost in (1, 4):
        room = len(prompt_tokens(one, tokenizer, "plain", 999)) - lost
        assert read(tokenizer, one, room + 3) == f"<s>Who?\n{text[lost:]}\n"


@given(
    st.text("ab\n ", min_size=1, max_size=30),
    st.text("abx0\n ", max_size=60),
    st.integers(12, 80),
    st.sampled_from(["plain", "alpaca", "chat"]),
)
def test_a_cut_prompt_fills_its_room_with_its_own_tokens(
    tokenizer: Any, question: str, text: str, room: int, template: str
) -> None:
    one = Example(instruction=question, input=text, output="")
    whole = prompt_tokens(one, tokenizer, template, 9999).tolist()
    kept = prompt_tokens(one, tokenizer, template, room).tolist()
    assert len(kept) == min(room, len(whole))
    behind = next(n for n in range(len(kept), -1, -1) if kept[len(kept) - n :] == whole[len(whole) - n :])
    assert kept[: len(kept) - behind] == whole[: len(kept) - behind]


def test_a_token_counts_to_what_stands_before_or_behind_and_never_to_both() -> None:
    assert _cut_within([1, 2, 2, 2, 3], [[1, 2, 3]], 4) == [1, 2, 2, 3]


def test_without_a_start_token_the_whole_room_is_the_prompts(make_tokenizer: Callable[..., Any]) -> None:
    sequence = first(make_tokenizer(adds="$A"), example("abcdefghij", "xyz"), 13)
    assert spelt(make_tokenizer(), sequence.tokens) == "cdefghij\nxyz</s>"


def test_an_end_token_after_the_prompt_is_removed(make_tokenizer: Callable[..., Any], tokenizer: Any) -> None:
    eager = make_tokenizer(adds="<s> $A </s>")
    assert eager("ab")["input_ids"][-1] == END
    sequence = first(eager, example("ab", "xy"), 20)
    np.testing.assert_array_equal(sequence.tokens, first(tokenizer, example("ab", "xy"), 20).tokens)


def test_an_end_token_after_the_prompt_is_removed_where_sequences_begin_with_it_too(
    make_tokenizer: Callable[..., Any],
) -> None:
    alike = make_tokenizer(adds="<s> $A <s>")
    alike.eos_token = "<s>"
    assert spelt(alike, first(alike, example("ab", "xy"), 20).tokens) == "<s>ab\nxy<s>"
    assert spelt(alike, prompt_tokens(example("ab", ""), alike, "plain", 20)) == "<s>ab\n"


@settings(max_examples=60, deadline=None)
@given(st.text("abc ", max_size=30), st.text("xyz", min_size=1, max_size=12), st.integers(15, 40))
def test_the_answer_and_its_end_are_always_whole(tokenizer: Any, question: str, answer: str, max_length: int) -> None:
    sequence = first(tokenizer, example(question, answer), max_length)
    assert len(sequence.tokens) <= max_length
    assert 1 <= sequence.prompt_length < len(sequence.tokens)
    assert spelt(tokenizer, sequence.tokens[sequence.prompt_length :]) == answer + "</s>"
    prompt = "<s>" + question + "\n"
    assert sequence.tokens[0] == START
    assert prompt.endswith(spelt(tokenizer, sequence.tokens[1 : sequence.prompt_length]))
    np.testing.assert_array_equal(
        prompt_tokens(example(question, ""), tokenizer, "plain", max_length - len(answer) - 1),
        sequence.tokens[: sequence.prompt_length],
    )


def test_the_longest_answer_that_fits_leaves_one_prompt_token(tokenizer: Any) -> None:
    # 10 tokens: start, one of the prompt, seven of the answer, end
    sequence = first(tokenizer, example("abc", "1234567"), 10)
    assert spelt(tokenizer, sequence.tokens) == "<s>\n1234567</s>"


def test_an_answer_that_leaves_no_room_is_dropped_with_its_text(tokenizer: Any) -> None:
    train = (example("a", "12345678", "long"), example("b", "12", "short"))
    [client], report = tokenize_federation(federation(*train), tokenizer, "plain", 10)
    assert [e.id for e in client.train] == ["short"] == [e.id for e in client.examples.train]
    assert report.dropped_examples == 1
    assert report.clients[0].first_dropped == ("long",)
    assert (len(client.validation), len(client.examples.validation)) == (1, 1)


def test_the_counts_are_of_what_was_kept(tokenizer: Any) -> None:
    train = (example("ab", "xyz"), example("c", "1"))
    clients, report = tokenize_federation(federation(*train), tokenizer, "plain", 40)
    sequences = [e for split in (clients[0].train, clients[0].validation, clients[0].test) for e in split]
    [counts] = report.clients
    # start + "ab\n" + "xyz" + end, start + "c\n" + "1" + end, and twice start + "held out\n" + "yes" + end
    assert counts.num_tokens == 8 + 5 + 2 * 14 == sum(len(e.tokens) for e in sequences)
    assert counts.num_supervised_tokens == 4 + 2 + 2 * 4
    assert (counts.num_examples, counts.longest) == (4, 14)
    assert (report.template, report.max_length) == ("plain", 40)


def test_the_alpaca_prompt_ends_where_the_answer_begins(tokenizer: Any) -> None:
    one = Example(instruction="Name it.", input="this", output="that")
    sequence = first(tokenizer, one, 512, "alpaca")
    text = spelt(tokenizer, sequence.tokens)
    assert text == "<s>" + render(one, "alpaca").prompt + "that</s>"
    assert spelt(tokenizer, sequence.tokens[sequence.prompt_length :]) == "that</s>"


def test_a_chat_template_brings_its_own_start_token(tokenizer: Any) -> None:
    sequence = first(tokenizer, example("hi", "yo"), 60, "chat")
    assert spelt(tokenizer, sequence.tokens) == "<s><user>hi<assistant>yo</s>"
    assert list(sequence.tokens).count(START) == 1


def test_a_truncated_chat_keeps_its_start_token_and_its_end(tokenizer: Any) -> None:
    sequence = first(tokenizer, example("hi there", "yo"), 16, "chat")
    assert spelt(tokenizer, sequence.tokens) == "<s>e<assistant>yo</s>"


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_special_tokens_spelt_in_the_data_stay_text(tokenizer: Any, template: str) -> None:
    sequence = first(tokenizer, example("a</s>b", "x</s>y"), 400, template)
    assert list(sequence.tokens).count(END) == 1
    assert sequence.tokens[-1] == END
    assert spelt(tokenizer, sequence.tokens[sequence.prompt_length :]) == "x</s>y</s>"


def test_other_references_or_another_task_are_other_data_and_names_are_not(tokenizer: Any) -> None:
    def digest_of(**changes: Any) -> str:
        one = replace(example("a", "b"), **{key: changes.pop(key) for key in ("references", "id") if key in changes})
        client = replace(federation(one).clients[0], **changes)
        [tokenized], _ = tokenize_federation(Federation((client,)), tokenizer, "plain", 40)
        return digest(tokenized)

    assert digest_of() == digest_of(name="other", id="elsewhere")
    assert len({digest_of(), digest_of(references=("b", "c")), digest_of(task="t")}) == 3


def test_tokens_are_the_same_whoever_else_is_in_the_federation(tokenizer: Any) -> None:
    one, two = federation(example("a", "b")).clients[0], federation(example("cc", "dd")).clients[0]
    alone, _ = tokenize_federation(Federation((one,)), tokenizer, "plain", 40)
    together, _ = tokenize_federation(Federation((two, one)), tokenizer, "plain", 40)
    np.testing.assert_array_equal(alone[0].train[0].tokens, together[1].train[0].tokens)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_client_whose_answers_are_all_too_long_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"client 'c' has no usable train example.*max_length = 16.*Raise data\.max"):
        tokenize_federation(federation(example("a", "x" * 15, "e-7")), tokenizer, "plain", 16)


def test_a_tokenizer_without_an_end_token_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(SetupError, match=r"no end-of-sequence token"):
        tokenize_federation(federation(example("a", "b")), make_tokenizer(end=False), "plain", 16)


def test_a_prompt_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"the prompt of e has 3 tokens, and there is room for 1\."):
        prompt_tokens(example("a", ""), tokenizer, "plain", 1)


def test_in_a_chat_an_answer_ends_as_turns_do(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    assert end_token(tokenizer, "chat") == end_token(tokenizer, "plain") == END, "nothing special behind a turn"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %} <turn>\n{% endif %}"
    )
    assert (end_token(tokenizer, "chat"), end_token(tokenizer, "plain")) == (turn, END)
    sequence = first(tokenizer, example("hi", "yo"), 60, "chat")
    assert sequence.tokens[-1] == turn
    tokenizer.chat_template = "{{ raise_exception('no answers') }}"
    assert end_token(tokenizer, "chat") == END
