"""What is recorded of a client: its own loss, its own answers against its own references, as sums and counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.reference.tiny_models import random_arena, random_examples, tiny_layout, tiny_model

from fedmira.config.run import EvaluationConfig, ModelConfig
from fedmira.data.tokenization import TokenizedClient, prompt_tokens, tokenize_federation
from fedmira.evaluation import judge
from fedmira.evaluation.judge import final_records, shortened_line, validation_losses
from fedmira.evaluation.loss import evaluate_loss
from fedmira.model.base import BaseModel, freeze, load_base
from fedmira.types import Arena, Client, Example, Federation

COUNTS = (3, 2, 4)


class Words:
    """A tokenizer whose tokens are numbers."""

    eos_token_id = 2
    pad_token_id = 0

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(str(token) for token in tokens)


def base() -> BaseModel:
    return freeze(tiny_model("llama", torch.float64), Words(), "tiny-llama")


def client(k: int, test: tuple[Example, ...]) -> TokenizedClient:
    """A client whose validation and test splits differ in their tokens."""
    return TokenizedClient(
        f"client-{k}",
        (),
        random_examples(2, seed=50 + k),
        random_examples(COUNTS[k], seed=k),
        Client(f"client-{k}", (), (), test, task=f"task-{k % 2}", category="all"),
    )


@pytest.fixture
def clients() -> list[TokenizedClient]:
    return [
        client(k, tuple(Example("ask", f"right {k} {n}", id=f"{k}-{n}") for n in range(count)))
        for k, count in enumerate(COUNTS)
    ]


def settings(**generation: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"generation": {"max_new_tokens": 3, **generation}})


def arena_for(model: BaseModel) -> Arena:
    return random_arena(tiny_layout(model, "llama"), len(COUNTS))


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[list[str]]) -> list[Any]:
    """Let the clients answer as told; returns what generation is asked."""
    asked: list[Any] = []

    def generate(base: BaseModel, arena: Arena, prompts: Any, max_new_tokens: int, **_: Any) -> list[list[str]]:
        asked.append((arena, prompts, max_new_tokens))
        return answers

    monkeypatch.setattr(judge, "generate", generate)
    return asked


def test_validation_judges_the_validation_split_and_final_the_test_split(clients: list[TokenizedClient]) -> None:
    model = base()
    arena = arena_for(model)
    validation = validation_losses(model, arena, clients, settings())
    assert validation == evaluate_loss(model, arena, [client.validation for client in clients], 4096)
    test = evaluate_loss(model, arena, [client.test for client in clients], 4096)
    records = final_records(model, arena, clients, settings(enabled=False))
    assert [(record.loss_sum, record.tokens) for record in records] == test
    assert test != validation


def test_each_client_is_judged_with_its_own_row(clients: list[TokenizedClient]) -> None:
    model = base()
    arena = arena_for(model)
    before = final_records(model, arena, clients, settings(enabled=False))
    swapped = final_records(model, arena.replace(arena.values_KP[[1, 0, 2]]), clients, settings(enabled=False))
    changed = [abs(b.loss_sum - a.loss_sum) > 1e-6 for b, a in zip(before, swapped, strict=True)]
    assert changed == [True, True, False]


def test_answers_meet_the_references_of_the_same_client_and_example(
    clients: list[TokenizedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["right 0 0", "right 0 2", "right 0 2"], ["wrong", "right 1 1"], [" right 2 0 ", "", "x", "y"]]
    answering(monkeypatch, answers)
    model = base()
    records = final_records(model, arena_for(model), clients, settings(examples_per_client=None))
    assert [record.exact_match_sum for record in records] == [2.0, 1.0, 1.0]
    # "right 0 2" shares two of three words with "right 0 1"
    assert [record.rouge_l_sum for record in records] == pytest.approx([1 + 2 / 3 + 1, 0 + 1, 1.0])
    assert [record.generated for record in records] == [3, 2, 4]
    assert [record.name for record in records] == [client.name for client in clients]
    assert [record.task for record in records] == ["task-0", "task-1", "task-0"]
    assert {record.category for record in records} == {"all"}


def test_the_best_of_several_references_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Example("ask", "one", references=("one", "two or three"))
    clients = [client(k, (ask,) * count) for k, count in enumerate(COUNTS)]
    answering(monkeypatch, [["two or three"] * count for count in COUNTS])
    model = base()
    records = final_records(model, arena_for(model), clients, settings(examples_per_client=None))
    assert [record.exact_match_sum for record in records] == [3.0, 2.0, 4.0]


def test_generation_is_asked_the_prompts_alone_and_no_more_than_the_cap(
    clients: list[TokenizedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, [["a", "b"]] * 3)
    model = base()
    arena = arena_for(model)
    records = final_records(model, arena, clients, settings(examples_per_client=2))
    [(judged, prompts, max_new_tokens)] = asked
    assert torch.equal(judged.values_KP, arena.values_KP)
    assert max_new_tokens == 3
    for client, client_prompts in zip(clients, prompts, strict=True):
        wanted = [example.tokens[: example.prompt_length].tolist() for example in client.test[:2]]
        assert [prompt.tolist() for prompt in client_prompts] == wanted
    assert [record.generated for record in records] == [2, 2, 2]
    # the loss is still that of all test examples
    everything = evaluate_loss(model, arena, [client.test for client in clients], 4096)
    assert [(record.loss_sum, record.tokens) for record in records] == everything


def test_an_answer_ends_with_what_all_were_taught_to_end_one_with(
    clients: list[TokenizedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Any] = []

    def generate(*_: Any, **named: Any) -> list[list[str]]:
        ends.append(set(named["ends"]))
        return [[] for _ in clients]

    monkeypatch.setattr(judge, "generate", generate)
    model = base()
    final_records(model, arena_for(model), clients, settings())
    clients[1].test[0].tokens[-1] = 7
    final_records(model, arena_for(model), clients, settings())
    assert ends == [{2}, set()]


def test_without_generation_nothing_is_answered(
    clients: list[TokenizedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, [])
    model = base()
    records = final_records(model, arena_for(model), clients, settings(enabled=False))
    assert asked == []
    assert {(record.generated, record.rouge_l_sum, record.exact_match_sum) for record in records} == {(0, 0.0, 0.0)}


def test_prompts_that_make_room_for_answers_are_counted(clients: list[TokenizedClient]) -> None:
    model = base()
    layout = tiny_layout(model, "llama")
    longest = max(example.prompt_length for client in clients for example in client.test)
    fits = settings(max_new_tokens=model.max_length - longest)
    assert shortened_line(model, layout, clients, fits) == ""
    one_more = settings(max_new_tokens=model.max_length - longest + 1)
    longest_ones = [e for client in clients for e in client.test if e.prompt_length == longest]
    line = shortened_line(model, layout, clients, one_more)
    assert line.startswith(f"{len(longest_ones)} of {sum(COUNTS)} test prompts are answered without their beginning")
    assert "evaluation.generation.max_new_tokens" in line


def test_prompts_that_nobody_answers_are_not_counted(clients: list[TokenizedClient]) -> None:
    model = base()
    layout = tiny_layout(model, "llama")
    few = settings(max_new_tokens=model.max_length, examples_per_client=1)
    assert f" of {len(COUNTS)} test prompts" in shortened_line(model, layout, clients, few)
    assert shortened_line(model, layout, clients, few.model_copy(update={"test": False})) == ""
    off = settings(max_new_tokens=model.max_length, enabled=False)
    assert shortened_line(model, layout, clients, off) == ""


LONG = Example("Name the last colour.", "blue", input=f"red green {'and then yellow ' * 60}blue")
BARE = Example(f"Say yes {'again and ' * 60}again.", "yes")
SHORT = Example("Say yes.", "yes", input="now")


@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize("cut", ["input", "beginning"])
def test_a_prompt_that_makes_room_for_its_answer_loses_what_it_loses_in_training(
    template: str, cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(ModelConfig(device="cpu"))
    federation = Federation((Client("a", (LONG,), (), (LONG, BARE, SHORT)), Client("b", (SHORT,), (), (SHORT, LONG))))
    # the long ones have lost something already
    clients, _ = tokenize_federation(federation, model.tokenizer, template, 130, cut)
    arena, room = random_arena(tiny_layout(model, "llama"), 2, torch.float32), 80
    generating = settings(max_new_tokens=model.max_length - room)
    asked = answering(monkeypatch, [["x"] * 3, ["x"] * 2])
    final_records(model, arena, clients, generating)
    [(_, prompts, _)] = asked
    whole = [[one.tokens[: one.prompt_length].tolist() for one in client.test] for client in clients]
    assert [[len(one) > room for one in own] for own in whole] == [[True, True, False], [False, True]]
    read = prompt_tokens(LONG, model.tokenizer, template, room, cut=cut).tolist()
    if cut == "beginning":
        # which generation does, of all its prompts
        assert [[prompt.tolist() for prompt in own] for own in prompts] == whole
        assert read[1:] == whole[0][0][1 - room :]
    else:
        (long, bare, short), (short_too, long_too) = [[prompt.tolist() for prompt in own] for own in prompts]
        assert long == long_too == read
        assert (short, short_too) == (whole[0][2], whole[1][0])
        assert len(long) == len(bare) == room
        assert bare[1:] == whole[0][1][1 - room :]
        text = model.tokenizer.decode(long)
        assert "Name the last colour." in text
        assert "red green" not in text
        assert "yellow blue" in text
    lost = {
        "beginning": "their beginning",
        "input": "the beginning of their input, or their own where that is not enough",
    }
    line = shortened_line(model, arena.layout, clients, generating)
    assert line.startswith(f"3 of 5 test prompts are answered without {lost[cut]}: ")


def test_a_single_token_of_a_prompt_is_generations_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(ModelConfig(device="cpu"))
    clients, _ = tokenize_federation(Federation((Client("a", (LONG,), (), (LONG,)),)), model.tokenizer, "plain", 64)
    asked = answering(monkeypatch, [["x"]])
    generating = settings(max_new_tokens=model.max_length)
    final_records(model, random_arena(tiny_layout(model, "llama"), 1, torch.float32), clients, generating)
    [example] = clients[0].test
    assert asked[0][1][0][0].tolist() == example.tokens[: example.prompt_length].tolist()
