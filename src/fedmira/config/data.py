"""The `data` section of the config: where examples come from and how they become clients. No torch, no transformers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from fedmira.config.basics import FinitePositiveFloat, Section, Share, is_recorded
from fedmira.errors import nearest


class PartitionConfig(Section):
    by: Literal["task", "field", "dirichlet", "iid"] = "task"
    """`task`: every task becomes `clients_per_task` clients. `field`: the source's own client names.
    `dirichlet`: `num_clients` clients, label shares drawn from Dirichlet(alpha). `iid`: `num_clients` equal draws."""
    clients_per_task: PositiveInt = 1
    """With `by: task`. The paper's Dolly-15k: 10 clients for each of 8 categories."""
    num_clients: PositiveInt | None = None
    """Needed with `by: dirichlet` and `by: iid`."""
    alpha: FinitePositiveFloat = 0.5
    """With `by: dirichlet`: concentration; small means one label per client."""
    examples_per_client: PositiveInt | tuple[PositiveInt, ...] | None = None
    """At most this many examples (train, validation and test together) per client; the rest is left out and counted. A
    list such as `[64, 32, 16]` makes clients of unequal size: they take its numbers in turn, in the order of `fedmira
    data`; who joins a run comes after all who are there."""
    validation: Share = 0.15
    """Share of a client's examples held out for choosing settings."""
    test: Share = 0.25
    """Share of a client's examples held out for the final numbers."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> PartitionConfig:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test = {self.validation + self.test:g} leaves nothing to train on; keep the sum below 1"
            )
        if self.by in ("dirichlet", "iid") and self.num_clients is None:
            raise ValueError(f"partition.by = {self.by} needs num_clients; add num_clients: 10, for example")
        if self.by in ("task", "field") and self.num_clients is not None:
            raise ValueError(
                f"num_clients has no effect with by = {self.by}; remove it, or use by: dirichlet or by: iid"
            )
        if self.by != "task" and self.clients_per_task != 1:
            raise ValueError(f"clients_per_task has no effect with by = {self.by}; remove it, or use by: task")
        if self.by != "dirichlet" and self.changed(("alpha",)) and not is_recorded(info):
            raise ValueError(f"alpha has no effect with by = {self.by}; remove it, or use by: dirichlet")
        if self.examples_per_client == ():
            raise ValueError("examples_per_client is an empty list; give it a number for each size, or null for all")
        return self

    def caps(self, num_clients: int) -> tuple[int | None, ...]:
        """Return how many examples each of the clients may hold at most, in their order; None: any number."""
        sizes = self.examples_per_client
        in_turn = sizes if isinstance(sizes, tuple) else (sizes,)
        return tuple(in_turn[k % len(in_turn)] for k in range(num_clients))


Template = Literal["alpaca", "plain", "chat"]
Cut = Literal["input", "beginning"]


def _parts_of_an_example(fields: dict[str, str]) -> dict[str, str]:
    parts = ("instruction", "input", "output")
    for part, field in fields.items():
        if part not in parts:
            raise ValueError(
                f"fields names {part!r}; allowed: {', '.join(parts)}, each with the name of a field of yours"
                f"{nearest(part, parts)}"
            )
        if not field or list(fields.values()).count(field) > 1:
            problem = f"is {field!r}, as another one is" if field else "has no name"
            raise ValueError(f"fields.{part} {problem}; give each a field of its own, or leave it out")
    return fields


FieldNames = Annotated[dict[str, str], AfterValidator(_parts_of_an_example)]


class _Source(Section):
    template: Template = "alpaca"
    """How an example becomes text: the paper's Alpaca template, bare text, or the tokenizer's chat template, in which
    today is always 26 July 2024."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of prompt and answer together. A longer prompt is cut; an example with a longer answer is left out."""
    cut: Cut = "input"
    """What a prompt that is too long loses. `input`: the beginning of the example's input, so that the instruction
    stays; where there is none or that is not enough, as `beginning`. `beginning`: that of the whole prompt. A prompt
    whose answer would not fit into the base's context loses the same."""
    partition: PartitionConfig = PartitionConfig()
    """How examples become clients, and which of them are held out."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out keys that came later while they say nothing: runs of before keep the hashes that name them."""
        return {key: value for key, value in handler(self).items() if value or key not in ("fields", "split_field")}


class PlantedConfig(_Source):
    """Tasks made by fedmira with a known graph: private codebooks that members of a family mostly share."""

    source: Literal["planted"] = "planted"
    """Which source this section describes; the other keys follow from it."""
    template: Template = "plain"
    max_length: Annotated[int, Field(ge=8)] = 64
    partition: PartitionConfig = PartitionConfig(by="field", validation=0.15, test=0.25)
    families: PositiveInt = 4
    """Groups of related clients; families conflict."""
    clients_per_family: PositiveInt = 4
    """Clients of each family."""
    words: Annotated[int, Field(ge=4)] = 16
    """Size of the vocabulary that the codebooks map."""
    codes: Annotated[int, Field(ge=2)] = 8
    """Number of different codes."""
    shared: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of codebook entries that a client has in common with its family; the others are its own."""
    examples: Annotated[int, Field(ge=4)] = 40
    """Examples per client before the split."""
    words_per_example: PositiveInt = 2
    """Words to encode in one example."""


class NaturalInstructionsConfig(_Source):
    source: Literal["natural_instructions"]
    """Which source this section describes; the other keys follow from it."""
    path: str
    """Folder with task files in the official Super-NaturalInstructions schema."""
    tasks: tuple[str, ...] | None = None
    """File names without `.json`; all files of the folder if left out."""


class DollyConfig(_Source):
    source: Literal["dolly"]
    """Which source this section describes; the other keys follow from it."""
    path: str
    """A file as source jsonl reads them, with instruction, context, response, category; or a Hugging Face id."""


class JsonlConfig(_Source):
    """Local files, a record in each line or row."""

    source: Literal["jsonl"]
    """Which source this section describes; the other keys follow from it."""
    path: str
    """A file with JSON Lines, a .json file with one list, or a table with a header, .csv or .tsv (each may end in .gz);
    or a folder or glob of such files; a folder's hidden files are left out."""
    fields: FieldNames = Field(default={})
    """Which fields, or columns of a table, are what, as in `{instruction: Frage, input: Akte, output: Antwort}`. Those
    left out go by the names of the known shapes: instruction, question or prompt; input or context, if any; output,
    response, answer or completion."""
    client_field: str | None = None
    """Field that names the client (`partition.by: field`); by default `client`, else one client per file."""
    task_field: str = "task"
    """Field that names the task of an example."""
    category_field: str = "category"
    """Field with a coarser label than the task."""
    split_field: str | None = None
    """Field that says where an example goes: train, validation or test. Those that name none are drawn so that the
    client comes to its shares by `partition`; null draws all."""


class HuggingFaceConfig(_Source):
    source: Literal["huggingface"]
    """Which source this section describes; the other keys follow from it."""
    path: str
    """Hugging Face data set id or local folder, loaded by the `datasets` package."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set that is partitioned; held-out examples are taken from it."""
    fields: FieldNames = Field(default={})
    """Which fields are what, as in `{instruction: Frage, input: Akte, output: Antwort}`. Those left out go by the names
    of the known shapes: instruction, question or prompt; input or context, if any; output, response, answer or
    completion."""
    client_field: str | None = None
    """Field that names the client (`partition.by: field`); by default `client`."""
    task_field: str = "task"
    """Field that names the task of an example."""
    category_field: str = "category"
    """Field with a coarser label than the task."""
    split_field: str | None = None
    """Field that says where an example goes: train, validation or test. Those that name none are drawn so that the
    client comes to its shares by `partition`; null draws all."""


DataConfig = Annotated[
    PlantedConfig | NaturalInstructionsConfig | DollyConfig | JsonlConfig | HuggingFaceConfig,
    Field(discriminator="source"),
]
