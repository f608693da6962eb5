"""Strength chosen without labels: clients judge the mixtures of a few strengths, and all of them together choose one.

One number for everybody, from what all clients say over many rounds, cannot fit the noise of one client's few examples;
how much a client takes of its mixture is for itself to choose, see `choosing`. Knows nothing about how mixtures are
made. Axes: S asked, Q candidates, K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fedmira.federation.blocks import from_blocks, places, to_blocks
from fedmira.federation.graph import Graph
from fedmira.federation.method import Info, Method, State
from fedmira.federation.questions import answered, only_to_judge, together
from fedmira.federation.server_step import Mixture
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial

GRID = (0.0625, 0.25, 1.0, 4.0)
"""Strengths that are judged: among four clients joined with weight 1 they take 15, 38, 60 and 71 % from the others, of
75 % without bound."""
FIRST = 4.0
"""Before anybody was heard."""
_MEMORY = 0.7
"""Weight of the past in the moving average over rounds: some three rounds together decide."""
_HOPELESS = 1e100
"""Stands for a loss that is not finite any more: worse than any that is."""


def in_use(strength: float | str, memory: Mapping[str, torch.Tensor]) -> float:
    """Return the strength of this round: the one that was set, or with `auto` the one that was chosen."""
    return float(memory["strength"]) if isinstance(strength, str) else strength


def chosen_together(
    method: Method,
    mixtures: Callable[[Graph, Arena, tuple[int, ...], torch.Tensor], Callable[[float], Mixture]],
    groups: frozenset[str] | None = None,
) -> Method:
    """Return `method` with the question which strength to use in the next round, asked together with its own.

    The last round does not ask it. All mixtures but one cross for it: that of the strength in use is what clients start
    from, and the method's own question may be about it already. What they were made of must be at hand when clients are
    asked, so the graph is remembered by blocks of layers.

    Args:
        method: keeps what it mixes in its memory as `uploads`, how long ago that was as `away`, and mixes with `in_use`
            on the graph of its `Info`.
        mixtures: the mixture of each strength, from the graph, the uploads, their rounds and how long ago they were.
        groups: of tensors that cross; None means all.
    """

    def init(initial: Arena, clients: Clients) -> State:
        state, layers = method.init(initial, clients), initial.layout.layers
        num_clients, num_blocks = initial.num_clients, len(set(places(layers).values()))
        memory = {
            "strength": torch.tensor([FIRST], dtype=torch.float64),
            "strength_evidence": torch.zeros(len(GRID), dtype=torch.float64),
            "relations": torch.zeros(num_blocks, num_clients, num_clients, dtype=torch.float64),
        }
        return replace(state, memory={**state.memory, **memory})

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        after, info = method.merge(state, participants, results)
        assert info.graph is not None
        relations_GKK = to_blocks(info.graph, after.adapters.layout.layers)
        numbers = {**info.numbers, "strength": in_use("auto", state.memory)}
        return replace(after, memory={**after.memory, "relations": relations_GKK}), info._replace(numbers=numbers)

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        own = method.trial(state, participants, results) if method.trial else None
        if participants.last or not results.ids:
            return together(None, own)
        rows, uploads = list(results.ids), state.adapters.replace(state.memory["uploads"])
        related = from_blocks(state.memory["relations"], uploads.layout.layers, "remembered")
        of_strength = mixtures(related, uploads, state.last_round_K, state.memory["away"])

        def candidate(number: int) -> torch.Tensor:
            return of_strength(GRID[number]).adapters.values_KP[rows]

        sent = len(GRID) - 1 + (own is None) * only_to_judge(participants, uploads.num_clients)
        return together(Trial(results.ids, len(GRID), candidate, sent, groups=groups), own)

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        return answered(method, state, trial, losses, lambda _, answers: judged(state.memory, answers))

    return method._replace(init=init, merge=merge, trial=trial, decide=decide)


def judged(memory: Mapping[str, torch.Tensor], losses: Losses) -> dict[str, torch.Tensor]:
    """Return the evidence after these answers, and the strength of the smallest sum of relative losses.

    A client says by what share its loss with a mixture differs from its mean over all of them, so that hard and easy
    tasks count the same; the mean over clients joins a moving average over rounds. A loss that is not finite any more
    is the worst there is. A client without validation examples, or without a loss that is finite, says nothing.
    """
    loss_SQ = losses.mean_SQ.nan_to_num(nan=_HOPELESS, posinf=_HOPELESS)
    relative_SQ = loss_SQ / loss_SQ.mean(dim=1, keepdim=True) - 1.0
    # where nothing is lost no share can be told
    heard_S = torch.isfinite(losses.mean_SQ).any(dim=1) & torch.isfinite(relative_SQ).all(dim=1)
    if not heard_S.any():
        return {}
    evidence_Q = memory["strength_evidence"]
    past = _MEMORY if evidence_Q.any() else 0.0
    evidence_Q = past * evidence_Q + (1 - past) * relative_SQ[heard_S].mean(dim=0).to(evidence_Q)
    strength = torch.tensor([GRID[int(evidence_Q.argmin())]]).to(evidence_Q)
    return {"strength": strength, "strength_evidence": evidence_Q}
