"""Turns one example into the text a model reads (prompt) and the text it should write (answer).

Knows nothing about tokens, lengths, truncation or which part is supervised: tokenization decides that.
The answer never carries an end token here; tokenization appends the tokenizer's own.

Templates: ``alpaca`` (the two Stanford Alpaca forms, used by MIRA's experiments through FederatedScope-LLM),
``plain`` (instruction, input, answer on lines of their own) and ``chat`` (the tokenizer's chat template).
Chat templates that write today's date (Llama 3.2, Mistral, SmolLM3 and others, by ``strftime_now``) always read
26 July 2024 here, so that a run gives the same prompts, and can be resumed, on any day.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from jinja2 import TemplateError

from fedmira.config.data import Template
from fedmira.errors import ConfigError, DataError
from fedmira.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
TEMPLATES = get_args(Template)
TODAY = datetime(2024, 7, 26)
"""What chat templates are told is now: the date that Llama's fall back on where they cannot ask."""
_REFUSALS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError)
"""What a chat template raises, or the expressions in it, on turns that it was not written for."""
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAwdbBmyYHIpMSfjUWGuVcxX"] + ["%%"]
# transformers removes the line break after a block, and the template still begins at the beginning of a line
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({directive!r}, {TODAY.strftime(directive)!r})" for directive in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)


class Rendered(NamedTuple):
    """One example as text; the model reads ``prompt + answer`` with nothing in between."""

    prompt: str
    answer: str


def render(example: Example, template: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Rendered:
    r"""Write the example in a template.

    Earlier turns of a conversation (``example.turns``) come before the last user turn, which is always the
    example's instruction and input.

    Args:
        example: the example; ``output`` becomes the answer unchanged.
        template: one of ``TEMPLATES``.
        tokenizer: needed by ``chat`` only, for its chat template.

    Raises:
        ConfigError: the template is unknown, or ``chat`` has no tokenizer with a usable chat template.
        DataError: the chat template refuses the conversation, such as a role or an order of turns.

    >>> example = Example(instruction="Name the capital.", input="France", output="Paris")
    >>> render(example, "plain")
    Rendered(prompt='Name the capital.\nFrance\n', answer='Paris')
    """
    if template == "alpaca":
        return Rendered(_alpaca_prompt(example), example.output)
    if template == "plain":
        return Rendered(_plain_prompt(example), example.output)
    if template == "chat":
        return Rendered(_chat_prompt(example, tokenizer), example.output)
    raise ConfigError(
        f"unknown prompt template {template!r}; allowed: {', '.join(TEMPLATES)}. Set data.template to one of them."
    )


def _alpaca_prompt(example: Example) -> str:
    # str.format reads braces in the form only, so instructions with braces of their own pass unchanged.
    instruction = _history(example) + example.instruction
    if example.input:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=example.input)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def _plain_prompt(example: Example) -> str:
    return _history(example) + _last_user_turn(example) + "\n"


def _chat_prompt(example: Example, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        raise ConfigError(
            "the prompt template 'chat' was rendered without a tokenizer; it needs the base model's. "
            "Pass one, or set data.template to alpaca or plain."
        )
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which the prompt template "
            "'chat' needs. Set data.template to alpaca or plain, or use a base model with a chat template."
        )
    messages = [{"role": role, "content": text} for role, text in example.turns]
    messages.append({"role": "user", "content": _last_user_turn(example)})
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} cannot be used: {str(error).rstrip('.')}. Set "
            "data.template to alpaca or plain, or give the tokenizer one template or one called default."
        ) from error
    try:
        return _conversation(messages, tokenizer, add_generation_prompt=True)
    except _REFUSALS as error:
        why = (str(error) or type(error).__name__).rstrip(".")
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the example {example.id or 'unnamed'!r} with "
            f"turns of {roles}: {why}. Set data.template to alpaca or plain, or change the turns in "
            "the data: many templates refuse system turns (drop them), or want user and assistant to alternate."
        ) from error


def behind_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind an assistant's turn; empty if it has none or does not end a text with it."""
    if not tokenizer.chat_template:
        return ""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "some-answer"}
    try:
        text = _conversation([question, answer], tokenizer)
    except _REFUSALS:
        return ""
    return text.rpartition(answer["content"])[2] if answer["content"] in text else ""


def _conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        # a macro goes before transformers' function of the same name, which asks the clock
        options["chat_template"] = _CLOCK + template
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _last_user_turn(example: Example) -> str:
    return f"{example.instruction}\n{example.input}" if example.input else example.instruction


def _history(example: Example) -> str:
    """Earlier turns as lines of "Role: text", empty without any."""
    return "".join(f"{role.capitalize()}: {text}\n" for role, text in example.turns)
