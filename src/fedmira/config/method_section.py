"""What the `method` sections of all methods have in common, and what each class says of its method.

Knows no method. Imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias, get_args

from pydantic import model_validator

from fedmira.config.basics import Section, Share
from fedmira.config.graph import KNOWN_GRAPHS

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
    clusters_by_factors: ClassVar[bool] = False
    """Whether clients are put into clusters by factors of theirs, in which a smaller rank shows more than a task."""
    shows_new_graphs: ClassVar[bool] = False
    """Whether the method itself, without a `graph` of the config, relates clients anew in its rounds."""
    alternates: ClassVar[bool] = False
    """Whether clients train other tensors in one round than in the next."""
    ends_alone: ClassVar[bool] = False
    """Whether clients train alone in the last rounds, so that what the others do depends on how many there are."""
    relates_participants: ClassVar[bool] = False
    """Whether only those that take part in a round are related to one another, not all that have an adapter."""
    needs_known_graph: ClassVar[bool] = False
    """Whether `graph` must be known before the first round."""
    rests_on_validation: ClassVar[str] = ""
    """What the method makes of losses on validation examples whatever its settings, in words; or nothing."""

    ema_decay: Share = 0.0
    """Weight of the past in a moving average over rounds of what a client takes home; training goes on from the last
    round, not from the average. A round in which a share p of the clients returned weighs the past by ema_decay^p.
    0: no average, what the last round gave it."""

    @model_validator(mode="after")
    def _average_fits_the_base(self) -> MethodSection:
        if self.ema_decay and self.moves_the_base:
            raise ValueError("ema_decay = 0 is needed: this method moves the base, earlier adapters no longer fit it")
        return self

    @model_validator(mode="after")
    def _known_graph(self) -> MethodSection:
        graph = getattr(self, "graph", None)
        if self.needs_known_graph and graph is not None and graph.kind not in KNOWN_GRAPHS:
            raise ValueError(
                f"graph.kind = {graph.kind} is learned while the run goes on, but this method needs a graph that is "
                f"known before; allowed: {', '.join(KNOWN_GRAPHS)}"
            )
        return self
