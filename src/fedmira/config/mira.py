"""The `method` sections of MIRA: ours, with what clients choose, and the published one. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, ValidationInfo, model_validator

from fedmira.config.basics import (
    FinitePositiveFloat,
    Fraction,
    NonNegativeFloat,
    Section,
    Share,
    is_recorded,
    refuse_strangers,
)
from fedmira.config.graph import GraphConfig
from fedmira.config.method_section import ALL_KINDS, AdapterKind, MethodSection


class MiraPublishedConfig(MethodSection):
    """Eq. (8) and (9) of the paper as printed: an explicit Laplacian step over the sampled clients."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    relates_participants: ClassVar[bool] = True
    name: Literal["mira_published"]
    graph: GraphConfig = GraphConfig(kind="random")
    """Who is related to whom."""
    strength: NonNegativeFloat = 0.5
    """lambda of the paper. Its published configs use 0.01 to 1."""
    server_lr: FinitePositiveFloat = 0.0015
    """eta of the paper. Its published code uses learning rate x local_step = 3e-4 x 5."""


_FEW = 4
"""Examples a question goes to by default (docs/log.md)."""


class ChoiceConfig(Section):
    enabled: bool = True
    """Validated mixing: each client decides by its validation loss, and what those of all say, how much of the mixed
    adapter it keeps, and whether it trains on from it."""
    every: PositiveInt = 1
    """Rounds from one question to the next. In the last round all clients with a stored adapter are asked."""
    examples: PositiveInt | Literal["auto"] | None = "auto"
    """At most this many of a client's validation examples are judged after a round, others the next time; its answers
    of several rounds count (`memory`). `auto`: 4, or `training.batch_size` where that is less, so that a question about
    two shares (`grid`) takes less time than a training step. null: as many as `evaluation.examples_per_question` says.
    After the last round it judges all of them in any case."""
    average: bool = True
    """After the last round clients answer for the average over rounds (`ema_decay`), too, and each keeps as much of its
    mixture in it as these answers say; all of them take home what the last round alone would give them if the mean of
    their losses is smaller with it."""
    shrinkage: bool = True
    """A client's few examples say little; so what it may keep is judged by its answer drawn towards the mean of all,
    the more the less clients differ beyond chance, and by two standard errors at most. Without, or where nobody is
    asked about two examples, each trusts its own alone."""
    tolerance: NonNegativeFloat = 0.1
    """Share by which the whole mixture may raise a client's validation loss above that of its own upload for it to be
    what the client trains on from; beyond, it is the own upload."""
    memory: Share = 0.5
    """Weight of the past in the moving average of a client's answers that decides what it trains on from."""
    margin: Share = 0.01
    """Share by which a client must expect its loss to fall for it to keep anything but its own upload. A
    client counts as harmed when its test loss is more than 1 % above that of training alone."""
    grid: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 1.0)
    """Shares of the mixed adapter that a client may keep, from 0 to 1 and ascending; the rest is its own upload. Each
    is judged whenever clients are asked."""

    def most_examples(self, batch_size: int = _FEW) -> int | None:
        """How many `examples` stands for where training takes batches of this size; None: no bound of its own."""
        return min(_FEW, batch_size) if self.examples == "auto" else self.examples

    @model_validator(mode="after")
    def _ascending(self, info: ValidationInfo) -> ChoiceConfig:
        if list(self.grid) != sorted({0.0, *self.grid, 1.0}):
            raise ValueError(f"grid = {list(self.grid)} must be different shares in ascending order, from 0 to 1")
        # what is recorded has all fields, with the defaults of its time
        if not self.enabled and (what := self.without_effect()) and not is_recorded(info):
            raise ValueError(f"{what} while enabled is false; remove it, or set enabled: true")
        return self


class MiraConfig(MethodSection):
    """Implicit, confidence-weighted Laplacian step over all clients with stored adapters."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["mira"] = "mira"
    graph: GraphConfig = GraphConfig()
    """Who is related to whom."""
    strength: NonNegativeFloat | Literal["auto"] = 2.0
    """tau: how hard related clients are pulled together; any value is stable. `auto`: after each round clients judge
    the mixtures of 0.0625, 0.25, 1 and 4 on their validation examples; the strength of the smallest losses on the whole
    is used in the next: three more adapters down and four more passes for each participant."""
    depth: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the strength that is gone in the last block of layers; it falls evenly from the first block on, so that
    shallow layers are shared and deep ones stay personal. 0: the same for all."""
    mixing: Literal["auto", "factors", "products", "least_squares", "shared_a"] = "auto"
    """What is mixed. `factors`: A and B, each on its own. With model.adapter.kind = lora also their products:
    `products` (the nearest pair of each client's rank), `least_squares` (each client keeps its A and gets the best B),
    `shared_a` (A stays at its initial values, so that mixing B mixes products; half the bytes). `auto`: `products`
    where clients have different ranks, since a mean of factors shrinks what only some of them have; else `factors`."""
    robust: Literal["none", "clip", "krum", "geometric_median"] = "none"
    """Against clients whose uploads cannot be trusted. `clip`: nobody moves a client further than its median neighbour
    does. `krum`: nobody listens to clients far away from the nearest half of the others, further than their examples
    and ranks explain. `geometric_median`: neighbours weigh less the further they are from the geometric median of all.
    Distances are in the form that is mixed. Graphs that are learned from adapters count every update by its direction
    alone, in any case. A round's numbers say to how many clients nobody listened any more (`unheard`)."""
    client_strength: dict[str, NonNegativeFloat] = Field(default={})
    """Factors on the strength of some clients by name, such as `{anna: 2.0}`; with 0 a client keeps its own upload."""
    staleness_decay: Fraction = 0.7
    """Confidence of a stored adapter falls by this factor for each round its client did not return. Rounds are counted
    by the share of the clients that returned: four of a quarter are one."""
    ema_decay: Share = 0.5
    choice: ChoiceConfig = ChoiceConfig()
    """How much of the mixed adapter each client takes; all of it unless `enabled`."""

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> MiraConfig:
        if self.client_strength and self.strength == 0:
            raise ValueError("client_strength has no effect with strength = 0; remove it, or set a strength")
        if not self.choice.average and not (self.ema_decay and self.choice.enabled):
            raise ValueError(
                "choice.average = false has no effect where there is no average (ema_decay = 0) or nobody chooses "
                "(choice.enabled = false); remove it"
            )
        return self

    def factors_of(self, names: Sequence[str]) -> tuple[float, ...]:
        """The factor on the strength of each client.

        Raises:
            ConfigError: `client_strength` names a client that does not exist.
        """
        refuse_strangers("method.client_strength", self.client_strength, names)
        return tuple(self.client_strength.get(name, 1.0) for name in names)
