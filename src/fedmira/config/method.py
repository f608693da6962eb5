"""The `method` section of the config: the federated algorithms with their settings.

What all have in common is in `method_section`, MIRA in `mira`; the others are here. Adding a method: a class here that
joins `MethodConfig`, a module in `federation/methods`, a line in `federation/registry.py`; see docs/extending.md.
Imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from fedmira.config.basics import FinitePositiveFloat, Fraction, NonNegativeFloat, NonNegativeInt, Share
from fedmira.config.graph import GraphConfig
from fedmira.config.method_section import ALL_KINDS, AdapterKind, MethodSection
from fedmira.config.mira import MiraConfig, MiraPublishedConfig


class LocalOnlyConfig(MethodSection):
    """Each client trains alone; nothing is exchanged."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["local_only"]


class FedITConfig(MethodSection):
    """FedAvg over what is tuned: one global adapter, weighted by training examples. With `model.adapter.kind` lora it
    is FedIT, with prompt FedPrompt, with p_tuning FedPTuning, with full the traditional FedAvg."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    name: Literal["fedit"]


class FedITFinetunedConfig(MethodSection):
    """FedIT, whose last rounds are local fine-tuning of the global adapter."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    ends_alone: ClassVar[bool] = True
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
    shows_new_graphs: ClassVar[bool] = True
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
    shows_new_graphs: ClassVar[bool] = True
    name: Literal["pfedgraph"]
    strength: FinitePositiveFloat = 0.8
    """lambda: how much data sizes count beside similarity; without bound it is FedIT. The authors' code: 0.8."""
    pull: NonNegativeFloat = 0.0
    """Strength of the pull towards the client's mean while it trains. The authors: 0.01 times a cosine."""


class IFCAConfig(MethodSection):
    """A few models; each client belongs to the one with the lowest loss on its training examples."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    asks_for_losses: ClassVar[bool] = True
    shows_new_graphs: ClassVar[bool] = True
    name: Literal["ifca"]
    models: PositiveInt = 4
    """Number of models; at most that of the clients is used. The authors: the true number of clusters."""


class FedLEASEConfig(MethodSection):
    """Clusters found once from B; each shares one adapter."""

    clusters_by_factors: ClassVar[bool] = True
    name: Literal["fedlease"]
    warmup_rounds: PositiveInt = 1
    """Rounds of training alone, after the last of which clusters are found. The authors: a few epochs."""
    most_clusters: Annotated[int, Field(ge=2)] = 8
    """Clusters at most; the silhouette chooses between 2 and this."""


class FedTreeLoRAConfig(MethodSection):
    """One tree of clients, cut deeper for deeper layers; each layer is averaged within its clusters."""

    clusters_by_factors: ClassVar[bool] = True
    name: Literal["fedtreelora"]
    warmup_rounds: PositiveInt = 1
    """Rounds of training alone, after the last of which the tree is grown."""
    most_clusters: PositiveInt = 8
    """Clusters of a layer at most; the silhouette chooses."""


class PCLConfig(MethodSection):
    """Each client mixes all adapters by their losses on its own validation examples."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    asks_for_losses: ClassVar[bool] = True
    rests_on_validation: ClassVar[str] = "the trust between clients"
    shows_new_graphs: ClassVar[bool] = True
    name: Literal["pcl"]
    temperature: FinitePositiveFloat = 0.1
    """Nats per token by which a loss must be higher for e times less trust."""


class FedUConfig(MethodSection):
    """An explicit Laplacian step on the graph of all clients."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    needs_known_graph: ClassVar[bool] = True
    name: Literal["fedu"]
    graph: GraphConfig = GraphConfig(kind="random")
    """Who is related to whom; known in advance. The authors' code draws it at random."""
    strength: NonNegativeFloat = 0.5
    """eta of the paper, lambda elsewhere: how hard related clients are pulled together."""
    server_lr: FinitePositiveFloat = 0.0015
    """Step size. The authors: the learning rate times the local steps."""


class OracleClustersConfig(MethodSection):
    """FedIT within the true groups of clients: an upper reference."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    needs_known_graph: ClassVar[bool] = True
    name: Literal["oracle_clusters"]
    graph: GraphConfig = GraphConfig(kind="labels")
    """Its connected components are the groups; known in advance, such as `labels` or `true`."""


class CentralisedConfig(MethodSection):
    """One adapter trained on everybody's examples as one data set: a reference, not a federated method."""

    kinds: ClassVar[tuple[AdapterKind, ...]] = ALL_KINDS
    pools_examples: ClassVar[bool] = True
    name: Literal["centralised"]


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
        if self.rule == "momentum" and (changed := self.changed(("beta2", "adaptivity"))):
            raise ValueError(f"{changed[0]} has no effect with rule = momentum; remove it, or use rule: adam")
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


METHOD_SECTIONS: dict[str, type[MethodConfig]] = {
    get_args(one.model_fields["name"].annotation)[0]: one for one in get_args(get_args(MethodConfig)[0])
}
METHOD_NAMES: tuple[str, ...] = tuple(METHOD_SECTIONS)


def method_with_defaults(name: str) -> MethodConfig:
    """The section of the method `name` with nothing else set."""
    return METHOD_SECTIONS[name].model_validate({"name": name})
