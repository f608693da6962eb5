"""The `method` section of the config: the federated algorithms with their settings, and the graph between clients.

Adding a method: a class here that joins `MethodConfig`, a module in `federation/methods`, a line in its `registry.py`.
Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field, PositiveInt, TypeAdapter, model_validator

from fedmira.config.basics import FinitePositiveFloat, Fraction, NonNegativeFloat, NonNegativeInt, Section, Share
from fedmira.config.graph import GraphConfig
from fedmira.errors import ConfigError, nearest

AdapterKind: TypeAlias = Literal["lora", "prompt", "p_tuning", "full"]
"""What is trained on top of the base; see `model.adapter.kind`."""
ALL_KINDS: tuple[AdapterKind, ...] = get_args(AdapterKind)


class MethodSection(Section):
    name: str
    """Which method this section describes; the other keys follow from it."""

    num_pairs: ClassVar[int] = 1
    """Low-rank pairs per layer that the method needs at each client."""
    kinds: ClassVar[tuple[AdapterKind, ...]] = ("lora",)
    """Kinds of adapters that the method can use."""
    asks_for_losses: ClassVar[bool] = False
    """Whether clients always tell the server losses on examples of theirs."""
    sends_scalars: ClassVar[bool] = False
    """Whether clients train without gradients and send scalars instead of tensors."""
    moves_the_base: ClassVar[bool] = False
    """Whether the server adds to the base what adapters cannot hold."""
    draws_factors: ClassVar[bool] = False
    """Whether clients start each round from new random factors."""
    pools_examples: ClassVar[bool] = False
    """Whether clients' examples are trained on in one place."""
    alternates: ClassVar[bool] = False
    """Whether clients train other tensors in one round than in the next."""

    ema_decay: Share = 0.0
    """Share of what a client had after the round before in what it takes home: a moving average over rounds. Clients
    train on from the last round all the same. 0: what the last round gave it."""

    @model_validator(mode="after")
    def _average_fits_the_base(self) -> MethodSection:
        if self.ema_decay and self.moves_the_base:
            raise ValueError("ema_decay = 0 is needed: this method moves the base, earlier adapters no longer fit it")
        return self


class LocalOnlyConfig(MethodSection):
    """Each client trains alone; nothing is exchanged."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["local_only"]


class FedITConfig(MethodSection):
    """FedAvg over what is tuned: one global adapter, weighted by training examples. With `model.adapter.kind` lora it
    is FedIT, with prompt FedPrompt, with p_tuning FedPTuning, with full the traditional FedAvg."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["fedit"]


class MiraPublishedConfig(MethodSection):
    """Eq. (8) and (9) of the paper as printed: an explicit Laplacian step over the sampled clients."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["mira_published"]
    graph: GraphConfig = GraphConfig(kind="random")
    """Who is related to whom."""
    strength: NonNegativeFloat = 0.5
    """lambda of the paper. Its published configs use 0.01 to 1."""
    server_lr: FinitePositiveFloat = 0.0015
    """eta of the paper. Its published code uses learning rate x local_step = 3e-4 x 5."""


class ChoiceConfig(Section):
    enabled: bool = True
    """Validated mixing: each client decides by its validation loss, and what those of all say, how much of the mixed
    adapter it keeps, and whether it trains on from it."""
    every: PositiveInt = 1
    """Rounds from one question to the next. In the last round all clients with a stored adapter are asked."""
    average: bool = True
    """After the last round clients also judge the average over rounds (`ema_decay`); all of them take home what that
    round gave them if the mean of their losses is smaller with it."""
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

    @model_validator(mode="after")
    def _ascending(self) -> ChoiceConfig:
        if list(self.grid) != sorted({0.0, *self.grid, 1.0}):
            raise ValueError(f"grid = {list(self.grid)} must be different shares in ascending order, from 0 to 1")
        if not self.enabled and (what := self.without_effect()):
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
    """Confidence of a stored adapter falls by this factor for each round its client was not sampled."""
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
        for name in self.client_strength:
            if name not in names:
                raise ConfigError(
                    f"method.client_strength names {name!r}, which is no client{nearest(name, names)}; "
                    "`fedmira data` lists them"
                )
        return tuple(self.client_strength.get(name, 1.0) for name in names)


KNOWN_GRAPHS = ("labels", "given", "embeddings", "uniform", "random", "true", "permuted")
"""Kinds of graphs that are known before the first round."""


class FedITFinetunedConfig(MethodSection):
    """FedIT, whose last rounds are local fine-tuning of the global adapter."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["fedit_finetuned"]
    local_rounds: NonNegativeInt | None = None
    """Rounds at the end in which each client trains alone; null: a quarter of `federation.rounds`."""


class DittoConfig(MethodSection):
    """A global adapter, averaged, and personal ones pulled towards it; each gets half of the local work."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["ditto"]
    strength: NonNegativeFloat = 0.1
    """lambda, in units of the loss per squared distance of the factors. The authors choose it on validation data."""


class MrMtlConfig(MethodSection):
    """Personal adapters pulled towards the mean of all of them."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["mr_mtl"]
    strength: NonNegativeFloat = 0.1
    """lambda, in units of the loss per squared distance of the factors. The authors choose it on validation data."""


class FedSALoRAConfig(MethodSection):
    """A is averaged, B stays with its client."""

    name: Literal["fedsa_lora"]


class FedALoRAConfig(MethodSection):
    """B is averaged, A stays with its client."""

    name: Literal["fed_alora"]


class FedDPAConfig(MethodSection):
    """A global pair, averaged in odd rounds, beside an own pair, trained in even rounds."""

    num_pairs: ClassVar[int] = 2
    alternates: ClassVar[bool] = True
    name: Literal["feddpa"]


class FedALTConfig(MethodSection):
    """An own adapter trained beside a frozen mean of the others' adapters."""

    num_pairs: ClassVar[int] = 2
    name: Literal["fedalt"]
    own_weight: Fraction = 0.5
    """Weight of the own adapter; 1 minus it is that of the others' mean. The authors learn it for every input."""


class FedAMPConfig(MethodSection):
    """Personal adapters pulled towards means in which similar clients weigh more."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["fedamp"]
    strength: NonNegativeFloat = 0.1
    """lambda / alpha of the paper: of the pull, in units of the loss per squared distance of the factors."""
    attention: Share = 0.5
    """Weight that the others would have together if they were all equal to the client."""
    sigma: FinitePositiveFloat = 1.0
    """Width of the attention, in mean squared distances between clients. The authors: absolute squared distances."""


class PFedGraphConfig(MethodSection):
    """A mean for each client, weighted by the similarity of updates and the size of data."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["pfedgraph"]
    strength: FinitePositiveFloat = 0.8
    """lambda: how much data sizes count beside similarity; without bound it is FedIT. The authors' code: 0.8."""
    pull: NonNegativeFloat = 0.0
    """Strength of the pull towards the client's mean while it trains. The authors: 0.01 times a cosine."""


class IFCAConfig(MethodSection):
    """A few models; each client belongs to the one with the lowest loss on its training examples."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    asks_for_losses: ClassVar[bool] = True
    name: Literal["ifca"]
    models: PositiveInt = 4
    """Number of models; at most that of the clients is used. The authors: the true number of clusters."""


class FedLEASEConfig(MethodSection):
    """Clusters found once from B; each shares one adapter."""

    name: Literal["fedlease"]
    warmup_rounds: PositiveInt = 1
    """Rounds of training alone, after the last of which clusters are found. The authors: a few epochs."""
    most_clusters: Annotated[int, Field(ge=2)] = 8
    """Clusters at most; the silhouette chooses between 2 and this."""


class FedTreeLoRAConfig(MethodSection):
    """One tree of clients, cut deeper for deeper layers; each layer is averaged within its clusters."""

    name: Literal["fedtreelora"]
    warmup_rounds: PositiveInt = 1
    """Rounds of training alone, after the last of which the tree is grown."""
    most_clusters: PositiveInt = 8
    """Clusters of a layer at most; the silhouette chooses."""


class PCLConfig(MethodSection):
    """Each client mixes all adapters by their losses on its own validation examples."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    asks_for_losses: ClassVar[bool] = True
    name: Literal["pcl"]
    temperature: FinitePositiveFloat = 0.1
    """Nats per token by which a loss must be higher for e times less trust."""


class FedUConfig(MethodSection):
    """An explicit Laplacian step on the graph of all clients."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["fedu"]
    graph: GraphConfig = GraphConfig(kind="random")
    """Who is related to whom; known in advance. The authors' code draws it at random."""
    strength: NonNegativeFloat = 0.5
    """eta of the paper, lambda elsewhere: how hard related clients are pulled together."""
    server_lr: FinitePositiveFloat = 0.0015
    """Step size. The authors: the learning rate times the local steps."""

    @model_validator(mode="after")
    def _known_graph(self) -> FedUConfig:
        _refuse_learned(self.graph)
        return self


class OracleClustersConfig(MethodSection):
    """FedIT within the true groups of clients: an upper reference."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["oracle_clusters"]
    graph: GraphConfig = GraphConfig(kind="labels")
    """Its connected components are the groups; known in advance, such as `labels` or `true`."""

    @model_validator(mode="after")
    def _known_graph(self) -> OracleClustersConfig:
        _refuse_learned(self.graph)
        return self


class CentralisedConfig(MethodSection):
    """One adapter trained on everybody's examples as one data set: a reference, not a federated method."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    pools_examples: ClassVar[bool] = True
    name: Literal["centralised"]


def _refuse_learned(graph: GraphConfig) -> None:
    if graph.kind not in KNOWN_GRAPHS:
        raise ValueError(
            f"graph.kind = {graph.kind} is learned while the run goes on, but this method needs a graph that is known "
            f"before; allowed: {', '.join(KNOWN_GRAPHS)}"
        )


class FedProxConfig(MethodSection):
    """FedAvg whose clients are held near the adapter they downloaded."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["fedprox"]
    strength: NonNegativeFloat = 0.01
    """mu: how hard clients are held; 0 is fedit. The authors try 0.001 to 1 on whole models."""


class FfaLoraConfig(MethodSection):
    """A stays at its initial values, B is trained and averaged."""

    name: Literal["ffa_lora"]


class RoLoraConfig(MethodSection):
    """B and A are trained and averaged in turn, B first."""

    alternates: ClassVar[bool] = True
    name: Literal["rolora"]


class FedAdamConfig(MethodSection):
    """The server takes a step of Adam, or of gradient descent with momentum, along the clients' mean change."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["fedadam"]
    rule: Literal["adam", "momentum"] = "adam"
    """`adam`: FedAdam. `momentum`: FedAvgM."""
    server_lr: FinitePositiveFloat = 0.01
    """Length of the server's step; with `momentum` 1 is the usual value. The authors tune it, 0.001 to 10."""
    beta1: Share = 0.9
    """Decay of the moving average of changes, or the momentum. The authors: 0.9."""
    beta2: Share = 0.99
    """With `adam`: decay of the moving average of squared changes. The authors: 0.99."""
    adaptivity: FinitePositiveFloat = 0.001
    """With `adam`: tau of the paper, added to the root of the second moment. The authors: 0.001 mostly."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> FedAdamConfig:
        if self.rule == "momentum":
            for name in ("beta2", "adaptivity"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect with rule = momentum; remove it, or use rule: adam")
        return self


class FedKSeedConfig(MethodSection):
    """One global adapter, trained without gradients along directions from a pool of seeds; only scalars cross. Steps
    are of `training.learning_rate` times `training.schedule` alone: no optimizer, weight decay or clipping acts."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    sends_scalars: ClassVar[bool] = True
    name: Literal["fedkseed"]
    seeds: PositiveInt = 4096
    """K: seeds in the pool; as many scalars are downloaded. The authors: 4096."""
    epsilon: FinitePositiveFloat = 0.0005
    """How far from its adapter a client evaluates its loss, in units of a standard normal direction. The authors:
    0.0005."""


class FlexLoraConfig(MethodSection):
    """The mean of the products, decomposed into a pair for each client's rank."""

    name: Literal["flexlora"]
    align: bool = True
    """Turn each new pair by the rotation that brings it nearest to the one it replaces. The authors do not."""

    @model_validator(mode="after")
    def _average_of_aligned_pairs(self) -> FlexLoraConfig:
        if self.ema_decay and not self.align:
            raise ValueError("ema_decay = 0 is needed with align: false, where the pairs of two rounds do not match")
        return self


class HetLoraConfig(MethodSection):
    """Zero-padded mean of adapters of different ranks, weighted by the norm of each one's product."""

    name: Literal["hetlora"]


class FedExLoraConfig(MethodSection):
    """The factors are averaged, and the difference to the mean of the products is added to the base."""

    moves_the_base: ClassVar[bool] = True
    name: Literal["fedex_lora"]


class FloraConfig(MethodSection):
    """The mean of the products is merged into the base after each round, exactly."""

    moves_the_base: ClassVar[bool] = True
    draws_factors: ClassVar[bool] = True
    name: Literal["flora"]


class FloristConfig(MethodSection):
    """The mean of the products is merged into the base after each round, cut to the rank that its energy needs."""

    moves_the_base: ClassVar[bool] = True
    draws_factors: ClassVar[bool] = True
    name: Literal["florist"]
    energy: Fraction = 0.9
    """Share of the squared singular values of each layer that is kept; 1 is flora. The authors tune it."""


MethodConfig = Annotated[
    LocalOnlyConfig
    | FedITConfig
    | MiraPublishedConfig
    | MiraConfig
    | FedITFinetunedConfig
    | DittoConfig
    | MrMtlConfig
    | FedSALoRAConfig
    | FedALoRAConfig
    | FedDPAConfig
    | FedALTConfig
    | FedAMPConfig
    | PFedGraphConfig
    | IFCAConfig
    | FedLEASEConfig
    | FedTreeLoRAConfig
    | PCLConfig
    | FedUConfig
    | OracleClustersConfig
    | FedProxConfig
    | FfaLoraConfig
    | RoLoraConfig
    | FedAdamConfig
    | FedKSeedConfig
    | FlexLoraConfig
    | HetLoraConfig
    | FedExLoraConfig
    | FloraConfig
    | FloristConfig
    | CentralisedConfig,
    Field(discriminator="name"),
]


METHOD_SECTIONS: dict[str, type[MethodSection]] = {
    get_args(one.model_fields["name"].annotation)[0]: one for one in get_args(get_args(MethodConfig)[0])
}
METHOD_NAMES: tuple[str, ...] = tuple(METHOD_SECTIONS)
_METHOD_ADAPTER: TypeAdapter[MethodConfig] = TypeAdapter(MethodConfig)


def method_with_defaults(name: str) -> MethodConfig:
    """The section of the method `name` with nothing else set."""
    return _METHOD_ADAPTER.validate_python({"name": name})
