"""The `method.graph` section of the config: who is related to whom. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import Field, PositiveInt, model_validator

from fedmira.config.basics import FinitePositiveFloat, Section, Share

GraphKind: TypeAlias = Literal[
    "gram",
    "gram_layers",
    "pfedgraph",
    "kalofolias",
    "mtrl",
    "clusters",
    "trust",
    "probe",
    "embeddings",
    "labels",
    "given",
    "uniform",
    "random",
    "true",
    "permuted",
]


class _Kind(NamedTuple):
    """What is to be known of a kind of graph."""

    learned_from: Literal["adapters", "answers", ""]
    """The adapters' low-rank products, or answers that are asked for; nothing: it is known before the first round."""
    own_keys: tuple[str, ...] = ()
    """Keys of the section that the kind looks at, beside those of all that are learned."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.own_keys, "memory", "settled", "warmup") if self.learned_from else self.own_keys


_KINDS: Mapping[GraphKind, _Kind] = {
    "gram": _Kind("adapters", ("neighbours", "power", "within_clusters")),
    "gram_layers": _Kind("adapters", ("neighbours", "power", "within_clusters", "pooling")),
    "mtrl": _Kind("adapters", ("neighbours", "power")),
    "trust": _Kind("answers", ("neighbours", "power", "judged")),
    "probe": _Kind("answers", ("neighbours", "power", "probe_path", "probe_examples")),
    "labels": _Kind(""),
    "given": _Kind("", ("path",)),
    "embeddings": _Kind("", ("neighbours", "power")),
    "uniform": _Kind(""),
    "random": _Kind(""),
    "true": _Kind(""),
    "permuted": _Kind(""),
    "pfedgraph": _Kind("adapters", ("spread",)),
    "kalofolias": _Kind("adapters", ("neighbours",)),
    "clusters": _Kind("adapters"),
}
"""All there is to say of a kind, in the order in which messages list kinds."""

KNOWN_GRAPHS = tuple(kind for kind, facts in _KINDS.items() if not facts.learned_from)
"""Kinds of graphs that are known before the first round."""
LOW_RANK_GRAPHS = tuple(kind for kind, facts in _KINDS.items() if facts.learned_from == "adapters")
"""Kinds of graphs that are learned from the low-rank products of the adapters."""
ASKING_GRAPHS = tuple(kind for kind, facts in _KINDS.items() if facts.learned_from == "answers")
"""Kinds of graphs that are learned from answers, which are asked for after a round and serve the next."""


class GraphConfig(Section):
    kind: GraphKind = "gram"
    """Learned from the adapters: `gram` (mutual nearest neighbours), `gram_layers` (the same for each block of layers),
    `pfedgraph` (rows on the simplex), `kalofolias` (smooth graph), `mtrl` (task covariance), `clusters` (hard groups).
    Learned by asking: `trust` (clients judge each other's adapters on validation examples), `probe` (agreement of
    predictions on texts of the server). Before round 1: `embeddings` (clients' prompts as the base model reads them),
    `labels` (clients of one task are joined; oracle), `given` (a file), `uniform` (everyone with everyone), `random`
    (the published code's), `true` (the graph planted in the data), `permuted` (that with its clients shuffled)."""
    path: str | None = None
    """With `given`: a JSON file {"names": [...], "adjacency": [[...]]}, or a .npy / .csv matrix in client order; a .csv
    file may have the clients' names in its first row and column."""
    neighbours: PositiveInt = 5
    """With `gram`, `gram_layers`, `mtrl`, `trust`, `probe`, `embeddings`: mutual nearest neighbours kept per client.
    With `kalofolias`: edges per client that its one parameter is set for."""
    power: FinitePositiveFloat = 1.0
    """With mutual nearest neighbours: exponent on the similarity, which is relative to that of the nearest."""
    within_clusters: bool = True
    """With `gram`, `gram_layers`: neighbours in another cluster of clients do not count. Clusters are those of
    `clusters`, if they are clear (silhouette above 0.25); where they are not, all neighbours count."""
    memory: Share = 0.0
    """With graphs learned over rounds: weight of the past in the moving average of what is compared. What clients learn
    first is what their answers look like; remembering it blurs which tasks are alike."""
    settled: Annotated[float, Field(ge=0, le=1)] = 0.8
    """With graphs learned over rounds: agreement (cosine of the weights) with the graph learned before from which
    on what was learned counts alone. Below, its weights count for agreement / settled, and `warmup` for the rest. Where
    few clients take part, the agreement is over several rounds; with fewer pairs looked at again than there are
    clients, it counts for less. Nothing agrees in round 1 (with `trust` and `probe`: before round 3). 0: what is
    learned counts alone from the first round on."""
    warmup: Literal["uniform", "none"] = "uniform"
    """With graphs learned over rounds: who is related to whom as far as the graph has not settled: everyone with
    everyone, so that all clients start from much the same place when they are first compared, or nobody."""
    pooling: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With `gram_layers`: weight of the mean over all layers in the similarity of each block; 1 is `gram`."""
    spread: FinitePositiveFloat = 0.8
    """With `pfedgraph`: lambda of its rows; more moves them from the most similar clients to all, by examples. The
    default of its published code."""
    judged: PositiveInt = 8
    """With `trust`: foreign adapters that each participant downloads and judges in a round, in turn over the rounds."""
    probe_path: str | None = None
    """With `probe`: file of instructions with answers, in the forms that data.source = jsonl reads; null
    makes them of random tokens."""
    probe_examples: PositiveInt = 32
    """With `probe`: texts that are compared, the first of the file."""

    @property
    def is_learned(self) -> bool:
        """Whether the graph is learned over rounds."""
        return self.kind not in KNOWN_GRAPHS

    @property
    def asks(self) -> bool:
        """Whether it is learned from answers, so that what a round tells serves the next."""
        return self.kind in ASKING_GRAPHS

    def uses(self, key: str) -> bool:
        """Whether this kind of graph looks at `key`."""
        return key in _KINDS[self.kind].keys

    @model_validator(mode="after")
    def _keys_with_their_kinds(self) -> GraphConfig:
        if self.kind == "given" and self.path is None:
            raise ValueError("kind: given needs path")
        for name in self.changed(key for key in type(self).model_fields if key != "kind" and not self.uses(key)):
            kinds = ", ".join(kind for kind, facts in _KINDS.items() if name in facts.keys)
            raise ValueError(f"{name} has no effect with kind = {self.kind}; it goes with {kinds}")
        return self
