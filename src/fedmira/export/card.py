"""README.md of an exported folder: what it is, how it is loaded, and the prompts it was trained on.

Knows nothing about runs or tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedmira.data.prompts import render
from fedmira.errors import FedmiraError
from fedmira.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedmira.config.method_section import AdapterKind

EMBEDDED_NAME = "fedmira-embedded-base"
"""What an exported folder names as its base where that is the embedded model and no copy lies beside it."""

_TITLES: Mapping[AdapterKind, str] = {
    "lora": "LoRA adapter",
    "prompt": "Soft prompt",
    "p_tuning": "Soft prompt",
    "full": "Fine-tuned model",
}


def model_card(
    base_path: str,
    facts: Mapping[str, object] | None = None,
    kind: AdapterKind = "lora",
    revision: str | None = None,
    prompts: Sequence[str] = (),
) -> str:
    """Return README.md of an exported folder: what it is, its `facts` as a list, how to load it and what to ask it.

    Args:
        base_path: of the base.
        facts: what else to say.
        kind: of the adapter; `full` for all that is a whole model.
        revision: of the base on the hub, if it is not the newest.
        prompts: lines from `prompt_lines`.
    """
    library = "transformers" if kind == "full" else "peft"
    header = ["---", f"base_model: {json.dumps(base_path)}", f"library_name: {library}"]
    header += ["pipeline_tag: text-generation", "tags:", f"- {kind}", "- fedmira", "---", ""]
    body = [f"# {_TITLES[kind]} of one client", "", "Made by fedmira: federated multi-task fine-tuning (MIRA).", ""]
    body += [f"- {name}: {value}" for name, value in (facts or {}).items()]
    body += [f"- revision of the base: {revision}"] if revision else []
    if kind == "full":
        load = "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
        usage = ["", "```python", "from transformers import AutoModelForCausalLM", "", load, "```", ""]
        return "\n".join([*header, *body, *usage, "FOLDER is the folder of this file.", "", *prompts])
    at = f", revision={revision!r}" if revision else ""
    usage = [
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained(BASE{at})  # see below",
        "model = PeftModel.from_pretrained(base, FOLDER)",
        "```",
        "",
        "FOLDER is the folder of this file. BASE is " + _where_base_is(base_path),
        "",
    ]
    return "\n".join([*header, *body, *usage, *prompts])


def prompt_lines(template: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """What a card says about the text that was trained on, for whoever serves the model with other tools.

    Texts are written as Python reads them, so that spaces and line breaks at their ends are seen. Empty where the
    tokenizer's chat template refuses a question without earlier turns.
    """
    try:
        texts = [
            render(Example(instruction="{instruction}", input=given, output=""), template, tokenizer).prompt
            for given in ("", "{input}")
        ]
    except FedmiraError:
        return []
    chat = [
        "This is the tokenizer's chat template, its start token included: send the text as it is to what adds none, or",
        "the question as a turn of the user to what applies the template itself.",
        "",
    ]
    return [
        "## Prompts",
        "",
        f"It was trained on prompts made with the template `{template}`, and answers these best. Send one of them with",
        "`{instruction}` and `{input}` replaced, and nothing behind it:",
        "",
        "```python",
        f"without_input = {texts[0]!a}",
        f"with_input = {texts[1]!a}",
        "```",
        "",
        *(chat if template == "chat" else []),
    ]


def card_bytes(card: str) -> bytes:
    """A model card as a file; bytes of a path that are no UTF-8 are written out."""
    return card.encode(errors="backslashreplace")


def _where_base_is(base_path: str) -> str:
    if base_path == EMBEDDED_NAME:
        return "the small model that ships with fedmira: `fedmira.embedded_base_path()`."
    if base_path in ("base", "../base"):
        return f"the folder `{base_path}` beside this file, a copy of the small model that ships with fedmira."
    return f"`{base_path}`."
