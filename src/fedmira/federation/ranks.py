"""Clients whose adapters have a smaller rank than the arena: the components beyond are 0 in both factors.

A component that is 0 in both factors has gradients of 0, so it stays 0 while its client trains, and it need not cross.
Methods compute with the whole arena; what clients get is trimmed here, for all methods alike. Trimming is HetLoRA's
truncation, and a mean over trimmed rows its zero padding.

Where only clients of smaller rank took part, a mean is 0 in components that others have, and would stay so for good:
who has them starts them anew, from the A of the first round and a B of 0, which leaves its product as it is; so is
what it is pulled towards. Knows nothing about how adapters are trained or mixed.

Axes: K clients, C those compared, S rows handed in, R rank of the arena, P parameters of one adapter, I/O in and out
features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedmira.federation.graph import Matrix
from fedmira.federation.method import Info, Method, State
from fedmira.federation.similarity import row_distances
from fedmira.types import PAIRS, Arena, Clients, Job, Layout, Losses, Participants, Results, Trial

_AXIS = {group: axis for pair in PAIRS for axis, group in enumerate(pair)}
"""Which axis of a tensor counts components: A is (R, I), B is (O, R)."""


def trimmed(layout: Layout, values_SP: torch.Tensor, ranks_S: Sequence[int]) -> torch.Tensor:
    """Return a copy of the rows in which each keeps its first `ranks_S` components of every layer and pair."""
    arena = Arena(layout, values_SP.clone())
    for rank in sorted(set(ranks_S)):
        rows = [s for s, its in enumerate(ranks_S) if its == rank]
        for spec in layout.specs:
            if spec.group in _AXIS and spec.shape[_AXIS[spec.group]] > rank:
                beyond = (slice(rank, None),) if _AXIS[spec.group] == 0 else (slice(None), slice(rank, None))
                arena.view(spec)[(rows, *beyond)] = 0.0
    return arena.values_KP


def between(
    arena: Arena,
    rows: Sequence[int],
    ranks_K: Sequence[int] | None,
    measure: Callable[[Arena], tuple[Matrix, ...]],
    grows: float = 0.0,
) -> tuple[Matrix, ...]:
    """Return what `measure` finds between clients, each pair compared by the components that both have.

    What one of two lacks sets them apart whatever they learned, so that clients of like rank would look alike.

    Args:
        arena: all K clients.
        rows: the C to compare.
        ranks_K: their ranks; None means that of the arena.
        measure: of the rows of an arena, (C, C) each.
        grows: with which power of the number of components it does: 0 for cosines, 1/2 for distances, 1 for their
            squares. Pairs that have fewer are scaled up by it, to what the highest rank compared would come to.
    """
    if ranks_K is None:
        return measure(arena.rows(rows))
    ranks_C = np.array([ranks_K[k] for k in rows])
    found: tuple[Matrix, ...] = ()
    # of each pair the last rank that both have is the smaller one of theirs
    for rank in sorted(set(ranks_C.tolist())):
        having = np.flatnonzero(ranks_C >= rank).tolist()
        compared = arena.rows([rows[place] for place in having])
        shown = measure(compared.replace(trimmed(arena.layout, compared.values_KP, (rank,) * len(having))))
        if not found:
            found = tuple(np.zeros((len(rows), len(rows))) for _ in shown)
        for matrix_CC, of_rank in zip(found, shown, strict=True):
            matrix_CC[np.ix_(having, having)] = (ranks_C.max() / rank) ** grows * of_rank
    return found


def squares_between(arena: Arena, rows: Sequence[int], ranks_K: Sequence[int] | None) -> Matrix:
    """Return the squared distances between the clients `rows`, (C, C), compared as `between` does."""
    (squares_CC,) = between(arena, rows, ranks_K, lambda of: (row_distances(of.values_KP),), grows=1.0)
    return squares_CC


def _restarted(layout: Layout, values_SP: torch.Tensor, initial_P: torch.Tensor, ranks_S: Sequence[int]) -> None:
    """Give the components that a row has and that are 0 in both factors the A of `initial_P`, in place."""
    rows, first = Arena(layout, values_SP), Arena(layout, initial_P[None])
    ranks = torch.tensor(ranks_S, device=values_SP.device)
    for spec_a, spec_b in layout.pairs:
        a_SRI, b_SOR = rows.view(spec_a), rows.view(spec_b)
        has_SR = torch.arange(spec_a.shape[0], device=values_SP.device) < ranks[:, None]
        dead_SR = has_SR & ~(a_SRI != 0).any(dim=2) & ~(b_SOR != 0).any(dim=1)
        if dead_SR.any():
            a_SRI[dead_SR] = first.view(spec_a).expand_as(a_SRI)[dead_SR]


def within_ranks(method: Method, ranks_K: Sequence[int], pooled: bool = False) -> Method:
    """Return `method` for clients of the given ranks: what they get, send and keep is trimmed.

    Args:
        method: any that trains low-rank pairs.
        ranks_K: at most the rank of the arena each.
        pooled: whether the method trains one adapter on everybody's examples, which has the rank of the arena; only
            what clients keep of it is trimmed.
    """

    def init(initial: Arena, clients: Clients) -> State:
        state = method.init(initial, clients)
        return replace(state, memory={**state.memory, "initial": initial.values_KP[0].clone()})

    def plan(state: State, participants: Participants) -> Job:
        job, layout = method.plan(state, participants), state.adapters.layout
        ranks_S = [ranks_K[id_] for id_ in job.ids]

        def handed_out(rows_SP: torch.Tensor) -> torch.Tensor:
            rows_SP = trimmed(layout, rows_SP, ranks_S)
            _restarted(layout, rows_SP, state.memory["initial"], ranks_S)
            return rows_SP

        pull = job.pull and job.pull._replace(target_SP=handed_out(job.pull.target_SP))
        return job._replace(start_SP=handed_out(job.start_SP), pull=pull)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        layout, ranks_S = state.adapters.layout, [ranks_K[id_] for id_ in results.ids if id_ < len(ranks_K)]
        # what does not belong together is refused by the method
        if results.values_SP.shape == (len(ranks_S), layout.num_parameters):
            results = results._replace(values_SP=trimmed(layout, results.values_SP, ranks_S))
        after, info = method.merge(state, participants, results)
        return _remembering(after, state), info

    def personalise(state: State) -> Arena:
        kept = method.personalise(state)
        return kept.replace(trimmed(kept.layout, kept.values_KP, ranks_K))

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        asked = None if method.trial is None else method.trial(state, participants, results)
        if asked is None:
            return None
        layout, ranks_S = state.adapters.layout, [ranks_K[id_] for id_ in asked.ids]
        return asked._replace(candidate=lambda number: trimmed(layout, asked.candidate(number), ranks_S))

    def decide(state: State, asked: Trial, losses: Losses) -> tuple[State, Info]:
        assert method.decide is not None
        after, info = method.decide(state, asked, losses)
        return _remembering(after, state), info

    def join(state: State, num_before: int) -> State:
        assert method.join is not None
        # what clients share differs by trimming only, and one of the highest rank has all of it
        ranks = list(ranks_K[:num_before])
        whole = max(range(num_before), key=ranks.__getitem__)
        values_KP = state.adapters.values_KP
        own_KP, all_KP = values_KP[:num_before], values_KP[whole].expand(num_before, -1)
        layout = state.adapters.layout
        lifted_KP = trimmed(layout, own_KP, ranks) + (all_KP - trimmed(layout, all_KP, ranks))
        lifted = replace(state, adapters=state.adapters.replace(torch.cat([lifted_KP, values_KP[num_before:]])))
        after = method.join(lifted, num_before)
        joined_NP = trimmed(layout, after.adapters.values_KP[num_before:], ranks_K[num_before:])
        rows_KP = torch.cat([own_KP, joined_NP])
        return replace(after, adapters=after.adapters.replace(rows_KP))

    if pooled:
        return method._replace(personalise=personalise)
    return method._replace(
        init=init,
        plan=plan,
        merge=merge,
        personalise=personalise,
        trial=None if method.trial is None else trial,
        decide=None if method.decide is None else decide,
        join=None if method.join is None else join,
    )


def _remembering(after: State, before: State) -> State:
    return replace(after, memory={**after.memory, "initial": before.memory["initial"]})
