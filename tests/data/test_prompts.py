"""The templates, word for word; what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedmira.data.prompts import TEMPLATES, Rendered, render
from fedmira.errors import ConfigError
from fedmira.types import Example

WITH_INPUT = Example(instruction="Name the capital.", input="France", output="Paris")
WITHOUT_INPUT = Example(instruction="Say hello.", input="", output="Hello!")
CONVERSATION = Example(
    instruction="And of Spain?",
    input="",
    output="Madrid",
    turns=(("user", "Name the capital of France."), ("assistant", "Paris")),
)


class FakeChatTokenizer(SimpleNamespace):
    """Renders messages as <role>text and keeps what it was asked."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        self.options = options
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def chat_tokenizer(chat_template: str | None = "any") -> Any:
    return FakeChatTokenizer(chat_template=chat_template, name_or_path="fake/model")


def test_alpaca_forms_are_the_published_ones() -> None:
    assert render(WITH_INPUT, "alpaca") == Rendered(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:",
        "Paris",
    )
    assert render(WITHOUT_INPUT, "alpaca") == Rendered(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:",
        "Hello!",
    )


def test_plain_omits_the_line_of_an_empty_input() -> None:
    assert render(WITH_INPUT, "plain") == Rendered("Name the capital.\nFrance\n", "Paris")
    assert render(WITHOUT_INPUT, "plain") == Rendered("Say hello.\n", "Hello!")


def test_chat_asks_the_tokenizer_for_text_and_an_open_assistant_turn() -> None:
    tokenizer = chat_tokenizer()
    rendered = render(WITH_INPUT, "chat", tokenizer)
    assert rendered == Rendered("<user>Name the capital.\nFrance<assistant>", "Paris")
    assert tokenizer.options == {"add_generation_prompt": True, "tokenize": False}


def test_earlier_turns_come_before_the_last_user_turn() -> None:
    history = "User: Name the capital of France.\nAssistant: Paris\n"
    assert render(CONVERSATION, "plain").prompt == history + "And of Spain?\n"
    alpaca = render(CONVERSATION, "alpaca").prompt
    assert f"### Instruction:\n{history}And of Spain?\n\n### Response:" in alpaca
    assert render(CONVERSATION, "chat", chat_tokenizer()).prompt == (
        "<user>Name the capital of France.<assistant>Paris<user>And of Spain?<assistant>"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_and_odd_characters_pass_unchanged(template: str) -> None:
    example = Example(instruction="Fill {input} and {0}", input="{instruction} \u20ac\n", output="{}\n ")
    prompt, answer = render(example, template, chat_tokenizer())
    assert "Fill {input} and {0}" in prompt
    assert "{instruction} \u20ac\n" in prompt
    assert answer == "{}\n "


def test_unknown_template_names_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"'alpacca'.*alpaca, plain, chat"):
        render(WITH_INPUT, "alpacca")


@pytest.mark.parametrize("tokenizer", [None, chat_tokenizer(None)])
def test_chat_without_a_chat_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.template to alpaca or plain"):
        render(WITH_INPUT, "chat", tokenizer)
