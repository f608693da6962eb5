"""The templates, word for word; what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fedmira.data.prompts import TEMPLATES, Rendered, behind_answer, render
from fedmira.errors import ConfigError, DataError
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

    def get_chat_template(self) -> str:
        return str(self.chat_template)

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


# how Llama 3.2, Mistral and SmolLM3 come by the date
DATED = {
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = 'no clock' %}{%- endif %}"
    "{%- endif %}{{- 'Today Date: ' + date_string }}": "Today Date: 26 Jul 2024",
    "{%- set today = strftime_now('%Y-%m-%d') %}{{ today }}{% if today < '2024-08' %} summer{% endif %}": (
        "2024-07-26 summer"
    ),
    "{% macro head() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{{ head() }}{{ messages[0].content }}": (
        "26 July 2024Say hello."
    ),
    "\n  {% if true %}\n{{ strftime_now('%A %-d.%-m.%y, 100%%') }}\n  {% endif %}\nend": (
        "\nFriday 26.7.24, 100%\nend"
    ),
}


@pytest.mark.parametrize("template", DATED)
def test_today_is_the_same_day_in_every_run(make_tokenizer: Callable[..., Any], template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert render(WITHOUT_INPUT, "chat", tokenizer).prompt == DATED[template]


def test_a_template_without_a_date_gives_what_transformers_gives(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    stock = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert render(WITHOUT_INPUT, "chat", tokenizer).prompt == stock == "<s><user>Say hello.<assistant>"


def test_what_a_chat_template_refuses_is_bad_data(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}fine"
    )
    assert render(CONVERSATION, "chat", tokenizer).prompt == "fine"
    example = Example(instruction="q", output="a", turns=(("system", "Be brief."),), id="ward.jsonl:7")
    with pytest.raises(
        DataError, match=r"'ward\.jsonl:7' with turns of system, user: System role not supported\. .*data\.template"
    ):
        render(example, "chat", tokenizer)


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ '%d' % 'a' }}", "{{ 'a'.index('b') }}"]
)
def test_a_chat_template_that_fails_is_bad_data(make_tokenizer: Callable[..., Any], template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"refuses the example 'unnamed' with turns of user: "):
        render(WITHOUT_INPUT, "chat", tokenizer)
    assert behind_answer(tokenizer) == ""


def test_several_chat_templates_and_no_default_are_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(ConfigError, match=r"cannot be used: .*Set data\.template to alpaca or plain"):
        render(WITHOUT_INPUT, "chat", tokenizer)
