"""Writes docs/configuration.md from the docstrings of the config classes: `python tools/configuration_page.py`.

A test compares the page with what this would write, so that it cannot fall behind.
"""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedmira.config.data import (
    DollyConfig,
    HuggingFaceConfig,
    JsonlConfig,
    NaturalInstructionsConfig,
    PartitionConfig,
    PlantedConfig,
)
from fedmira.config.exchange import ExchangeConfig, PrivacyConfig
from fedmira.config.graph import GraphConfig
from fedmira.config.method import METHOD_SECTIONS
from fedmira.config.mira import ChoiceConfig
from fedmira.config.run import (
    AdapterConfig,
    CompareConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
)
from fedmira.config.training import FederationConfig, TrainingConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("model", ModelConfig),
    ("model.adapter", AdapterConfig),
    ("data, source: planted", PlantedConfig),
    ("data, source: natural_instructions", NaturalInstructionsConfig),
    ("data, source: dolly", DollyConfig),
    ("data, source: jsonl", JsonlConfig),
    ("data, source: huggingface", HuggingFaceConfig),
    ("data.partition", PartitionConfig),
    ("training", TrainingConfig),
    ("federation", FederationConfig),
    *((f"method, name: {name}", section) for name, section in METHOD_SECTIONS.items()),
    ("method.graph", GraphConfig),
    ("method.choice", ChoiceConfig),
    ("exchange", ExchangeConfig),
    ("exchange.privacy", PrivacyConfig),
    ("evaluation", EvaluationConfig),
    ("evaluation.generation", GenerationConfig),
    ("output", OutputConfig),
    ("compare", CompareConfig),
)

INTRODUCTION = """\
# Configuration

<!-- Written by tools/configuration_page.py from the docstrings of the config classes in src/fedmira. Change those. -->

A config is a YAML file; `fedmira init` copies a commented one. Everything left out has the default given here.
Values on the command line win over the file: `fedmira run my.yaml training.learning_rate=1e-3`. Keys that begin with
`x-` at the top level are yours. `fedmira validate` lists every mistake at once. Relative paths are relative to the
current folder.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Top level\n", table(RunConfig, skip_sections=True)]
    for title, section in SECTIONS:
        parts.append(f"## {title}\n")
        own = section.__dict__.get("__doc__")
        if own:
            parts.append(inspect.cleandoc(own) + "\n")
        parts.append(table(section))
    return "\n".join(parts)


def table(section: type[BaseModel], *, skip_sections: bool = False) -> str:
    """The fields of one section as a Markdown table."""
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if skip_sections and "Config" in str(field.annotation):
            continue
        meaning = " ".join(_description(section, name).split())
        cells = [f"`{name}`", default(field), allowed(field.annotation, field.metadata), meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def default(field: FieldInfo) -> str:
    """The default as it would be written in YAML; nested sections have a table of their own."""
    if field.default is PydanticUndefined:
        return "must be given"
    value = field.default
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_unset=True)
        return f"`{json.dumps(changed)}`" if changed else "see below"
    return "`null`" if value is None else f"`{json.dumps(value)}`"


def allowed(annotation: Any, metadata: list[Any]) -> str:
    """The type of a field in words, with its bounds."""
    words = _words(annotation)
    return ", ".join([words, *_bounds(metadata)]) if words else ""


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(word for argument in arguments if (word := _words(argument)))
    if hasattr(annotation, "__metadata__"):
        return ", ".join([_words(annotation.__origin__), *_bounds(list(annotation.__metadata__))])
    if origin is tuple:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return "mapping"
    simple = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`"}
    return simple.get(annotation, "section")


def _bounds(metadata: list[Any]) -> list[str]:
    found = []
    for item in metadata:
        for bound in [item, *getattr(item, "metadata", [])]:
            for kind, name, sign in ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<=")):
                if isinstance(bound, kind):
                    found.append(f"{sign} {getattr(bound, name):g}")
    return found


def _description(section: type[BaseModel], name: str) -> str:
    """The docstring of a field, or of the field it overrides."""
    models = [base for base in section.__mro__ if issubclass(base, BaseModel)]
    found = (base.model_fields[name].description for base in models if name in base.model_fields)
    return next((text for text in found if text), "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
