"""The config of a run: frozen data with a description under each field. Imports neither torch nor transformers.

Reading YAML, reporting every mistake at once and naming a run by the hash of its config is `file`'s work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from fedmira.config.basics import (
    RUN_NAME,
    FinitePositiveFloat,
    NonNegativeInt,
    Section,
    Share,
    is_recorded,
    refuse_strangers,
)
from fedmira.config.data import DataConfig, PlantedConfig
from fedmira.config.exchange import ExchangeConfig
from fedmira.config.method import METHOD_NAMES, MethodConfig, method_with_defaults
from fedmira.config.method_section import AdapterKind
from fedmira.config.mira import MiraConfig
from fedmira.config.refusals import methods_for, refusal, refusal_beside, refusal_of_dtype, refusal_of_training
from fedmira.config.training import FederationConfig, TrainingConfig
from fedmira.errors import nearest

# --------------------------------------------------------------------------------------------------------------- model


class AdapterConfig(Section):
    kind: AdapterKind = "lora"
    """What is trained on top of the frozen base. `lora`: low-rank pairs beside its layers. `prompt`: the embeddings of
    virtual tokens in front of every sequence (prompt tuning). `p_tuning`: the same, computed by a small network that is
    trained too. `full`: every weight of the base, as a difference to it; one client at a time."""
    rank: PositiveInt = 8
    """With `lora`: rank r of each pair of factors. The paper chooses 16 from {4, 8, 16}."""
    alpha: FinitePositiveFloat = 16.0
    """With `lora`: the product is scaled by alpha / rank, whatever the rank of a client or a layer."""
    rank_pattern: dict[str, PositiveInt] = Field(default={})
    """With `lora`: other ranks of some layers, such as `{v_proj: 16}`; matched as `targets` are, the first match
    counts."""
    client_ranks: dict[str, PositiveInt] | tuple[PositiveInt, ...] = ()
    """With `lora`: other ranks of some clients by name, such as `{anna: 4}`; or a list such as `[4, 8, 16]`, which the
    clients take in turn, in the order of `fedmira data`."""
    dropout: Share = 0.0
    """With `lora`: dropout on the input of the low-rank branch while training. The paper's code trains with it switched
    off."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """With `lora`: names of the layers to adapt, matched at the end of the module path (`q_proj`, `attn.c_attn`), or
    `all-linear` for every linear layer but the output head. The paper: q_proj for Data-Juicer, c_attn and c_proj for
    GPT-2."""
    num_virtual_tokens: PositiveInt = 20
    """With `prompt` and `p_tuning`: virtual tokens in front of every sequence, beyond data.max_length. MIRA's baselines
    use 20."""
    encoder_hidden_size: PositiveInt = 128
    """With `p_tuning`: hidden features of the network that computes the prompt. MIRA's baseline uses 128."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> AdapterConfig:
        effective: dict[str, tuple[str, ...]] = {
            "lora": ("rank", "alpha", "rank_pattern", "client_ranks", "dropout", "targets"),
            "prompt": ("num_virtual_tokens",),
            "p_tuning": ("num_virtual_tokens", "encoder_hidden_size"),
            "full": (),
        }
        fields = ("kind", *effective[self.kind])
        for name in self.changed(name for name in type(self).model_fields if name not in fields):
            kinds = " or ".join(kind for kind, names in effective.items() if name in names)
            raise ValueError(f"{name} has no effect with kind = {self.kind}; remove it, or use kind: {kinds}")
        if self.rank_pattern and self.client_ranks:
            raise ValueError("rank_pattern and client_ranks exclude each other; keep one")
        return self

    @property
    def largest_rank(self) -> int:
        """The largest rank of a client in layers that `rank_pattern` does not name."""
        if isinstance(self.client_ranks, dict):
            return max(self.rank, *self.client_ranks.values(), 1)
        return max(self.client_ranks, default=self.rank)

    def ranks_of(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """The rank of each client, or None where all have the same.

        Raises:
            ConfigError: `client_ranks` names a client that does not exist.
        """
        if not self.client_ranks:
            return None
        if not isinstance(self.client_ranks, dict):
            return tuple(self.client_ranks[k % len(self.client_ranks)] for k in range(len(names)))
        refuse_strangers("model.adapter.client_ranks", self.client_ranks, names)
        return tuple(self.client_ranks.get(name, self.rank) for name in names)


class ModelConfig(Section):
    path: str = "embedded"
    """`embedded` (shipped with fedmira), a local folder in Hugging Face format, or a Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Of the frozen base. `auto`: float32 on a CPU, bfloat16 on a GPU that supports it.

    On a CPU `bfloat16` halves the base's weights and rounds the inputs and outputs of its products; GPT-2, Llama,
    Mistral and Qwen2 keep all else in float32. It pays where the processor multiplies bfloat16 in tiles (`amx_bf16`
    in /proc/cpuinfo: Intel from 2023 on); elsewhere it can be slower than float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`. Not `mps`: the server compares and mixes adapters in float64."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained on top of the base."""

    @field_validator("device")
    @classmethod
    def _device_that_could_be(cls, device: str) -> str:
        if device == "mps":
            raise ValueError("device = mps has no float64, in which adapters are compared and mixed; use cpu")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"device = {device} is unknown; allowed: auto, cpu, cuda, cuda:1 and so on")
        return device


# ---------------------------------------------------------------------------------------------------------- everything


class GenerationConfig(Section):
    enabled: bool = True
    """Answer test prompts by greedy generation, for Rouge-L and exact match."""
    max_new_tokens: PositiveInt = 32
    """The paper's protocol: 128."""
    examples_per_client: PositiveInt | None = 8
    """At most this many test examples per client are answered; null answers all."""


class EvaluationConfig(Section):
    every: PositiveInt = 1
    """Rounds between two evaluations of the validation loss; the last round is always evaluated."""
    examples_per_question: PositiveInt | None = 16
    """At most this many validation examples per client are judged when the method asks clients after a round, others
    the next time (`mira` asks about fewer, see method.choice.examples); null, and in any case after the last round: all
    of them."""
    test: bool = True
    """Judge the test split after the last round; comparisons switch it off while they choose settings."""
    batch_tokens: PositiveInt = 4096
    """Tokens judged together."""
    generation: GenerationConfig = GenerationConfig()
    """Answers to test prompts."""


class OutputConfig(Section):
    directory: str = "runs"
    """Folder in which run directories are made."""
    checkpoint_every: PositiveInt = 1
    """Rounds between two checkpoints; the last round is always saved."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""


class CompareConfig(Section):
    """What `fedmira compare` runs besides the config itself."""

    methods: tuple[str, ...] = ("local_only", "fedit", "mira_published", "mira")
    """Names of methods with their defaults, or of `variants`. The config's own method keeps its settings."""
    variants: dict[str, MethodConfig] = Field(default={})
    """More methods by a name of your choice, such as `mira-true: {name: mira, graph: {kind: true}}`; the name of a
    method is for other settings of that method."""
    seeds: PositiveInt = 1
    """Paired draws of partition, initial adapters and batches: seed, seed + 1, ..."""
    learning_rates: tuple[FinitePositiveFloat, ...] = ()
    """Grid tried for every method; the best on validation data is used. Empty: training.learning_rate for all. A study
    keeps its grid and tuning_seed until all of its methods are asked for with others."""
    tuning_seed: NonNegativeInt = 1000
    """The draw on which the grid is tried; never one of the seeds that are reported. It splits the same files anew."""

    @model_validator(mode="after")
    def _distinct_names(self) -> CompareConfig:
        if not self.methods:
            raise ValueError(f"methods is empty, so there is nothing to compare; allowed: {', '.join(METHOD_NAMES)}")
        doubled = sorted({name for name in self.methods if self.methods.count(name) > 1})
        if doubled:
            raise ValueError(f"methods names {', '.join(map(repr, doubled))} more than once; keep one of each")
        for name in self.variants:
            if not re.fullmatch(RUN_NAME, name):
                raise ValueError(
                    f"variants has the name {name!r}, which becomes part of a folder's name; use letters, digits, dot, "
                    "dash and underscore, 64 at most, beginning with a letter or digit"
                )
        return self


class RunConfig(Section):
    """Everything that decides what a run computes."""

    name: Annotated[str, Field(pattern=RUN_NAME)] = "run"
    """Prefix of the run directory: letters, digits, dot, dash, underscore."""
    seed: NonNegativeInt = 0
    """Decides every draw: partition, initial adapters, batches, participation, dropout, random graphs."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = PlantedConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    method: MethodConfig = MiraConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    compare: CompareConfig = CompareConfig()

    @property
    def base_model(self) -> ModelConfig:
        """The base as it is loaded: in float32 where the method moves it, as 16 bits would round the movement away."""
        if self.method.moves_the_base and self.model.dtype == "auto":
            return self.model.model_copy(update={"dtype": "float32"})
        return self.model

    @property
    def settled_method(self) -> MethodConfig:
        """The method with what it leaves to other sections: of `method.choice.examples: auto` the number."""
        if not isinstance(self.method, MiraConfig):
            return self.method
        choice = self.method.choice
        examples = choice.most_examples(self.training.batch_size)
        return self.method.model_copy(update={"choice": choice.model_copy(update={"examples": examples})})

    @model_validator(mode="after")
    def _across_sections(self, info: ValidationInfo) -> RunConfig:
        graph = getattr(self.method, "graph", None)
        if graph is not None and graph.kind in ("true", "permuted") and self.data.source != "planted":
            raise ValueError(
                f"method.graph.kind = {graph.kind} needs data.source = planted (given: {self.data.source}); "
                "no other source knows its true graph. Use labels, gram, given, uniform or random"
            )
        kind = self.model.adapter.kind
        if reason := refusal(self.method, kind):
            if kind not in self.method.kinds:
                reason += f". Methods that can use kind {kind}: {', '.join(methods_for(kind))}"
            raise ValueError(reason)
        if kind == "full" and self.training.cohort_size not in ("auto", 1):
            raise ValueError(
                f"training.cohort_size = {self.training.cohort_size}, but with model.adapter.kind = full every client "
                "has weights of its own and is trained alone; use auto or 1"
            )
        ranks, moments = bool(self.model.adapter.client_ranks), self.training.keep_moments
        reason = refusal_beside(self.method, self.exchange, ranks, moments)
        reason = reason or refusal_of_training(self.method, self.training) or self._unused_client_field()
        if reason := ("" if is_recorded(info) else reason) or refusal_of_dtype(self.method, self.model.dtype):
            raise ValueError(reason)
        if self.exchange.privacy.enabled:
            if self.exchange.privacy.noise_seed == "system" and self.output.checkpoint_every > 1:
                raise ValueError(
                    f"output.checkpoint_every = {self.output.checkpoint_every}, but exchange.privacy.noise_seed = "
                    "system draws new noise when rounds are repeated after a crash, and forgotten uploads would not "
                    "be counted; set it to 1"
                )
            if self.model.adapter.client_ranks:
                raise ValueError(
                    "exchange.privacy would fill the components that clients of smaller rank leave at 0 with noise; "
                    "remove model.adapter.client_ranks, or switch exchange.privacy.enabled off"
                )
        if self.evaluation.test and not self.data.partition.test:
            raise ValueError(
                "data.partition.test = 0 leaves nothing to judge clients by in the end; set it to 0.25, for example, "
                "or evaluation.test: false to train on everything"
            )
        if self.data.source == "planted" and self.federation.clients_per_round is not None:
            most = self.data.families * self.data.clients_per_family
            if self.federation.clients_per_round > most:
                raise ValueError(
                    f"federation.clients_per_round = {self.federation.clients_per_round}, but data.families * "
                    f"data.clients_per_family = {most}; lower it to at most {most}"
                )
        known = (*METHOD_NAMES, *self.compare.variants)
        for name in self.compare.methods:
            if name not in known:
                raise ValueError(f"compare.methods names {name!r}; allowed: {', '.join(known)}{nearest(name, known)}")
        return self

    def _unused_client_field(self) -> str:
        """Why the field that names clients should not be set; empty if it acts, or is not."""
        field, by = getattr(self.data, "client_field", None), self.data.partition.by
        if field is None or by == "field":
            return ""
        return f"data.client_field = {field!r} has no effect with data.partition.by = {by}; remove it, or use by: field"

    def method_named(self, name: str) -> MethodConfig:
        """The method that a comparison means by `name`: a variant, this config's own, or one with its defaults."""
        if name in self.compare.variants:
            return self.compare.variants[name]
        return self.method if name == self.method.name else method_with_defaults(name)
