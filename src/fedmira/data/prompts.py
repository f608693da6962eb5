"""Turns one example into the text a model reads (prompt) and the text it should write (answer).

Knows nothing about tokens, lengths, truncation or which part is supervised: tokenization decides that.
The answer never carries an end token here; tokenization appends the tokenizer's own.

Templates: ``alpaca`` (the two Stanford Alpaca forms, used by MIRA's experiments through FederatedScope-LLM),
``plain`` (instruction, input, answer on lines of their own) and ``chat`` (the tokenizer's chat template).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fedmira.errors import ConfigError
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
TEMPLATES = ("alpaca", "plain", "chat")


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
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if not isinstance(prompt, str):
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} gave {type(prompt).__name__}, not text. "
            "Set data.template to alpaca or plain."
        )
    return prompt


def _last_user_turn(example: Example) -> str:
    return f"{example.instruction}\n{example.input}" if example.input else example.instruction


def _history(example: Example) -> str:
    """Earlier turns as lines of "Role: text", empty without any."""
    return "".join(f"{role.capitalize()}: {text}\n" for role, text in example.turns)
