"""Clients whose adapters have a smaller rank than the arena: the components beyond are 0 in both factors.

A component that is 0 in both factors has gradients of 0, so it stays 0 while its client trains, and it need not cross.
Methods compute with the whole arena; what clients get is trimmed here, for all methods alike. Trimming is HetLoRA's
truncation, and a mean over trimmed rows its zero padding. Knows nothing about how adapters are trained or mixed.

Axes: K clients, S rows handed in, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmira.federation.method import Info, Method, State
from fedmira.types import PAIRS, Arena, Job, Layout, Participants, Results, Trial

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


def within_ranks(method: Method, ranks_K: Sequence[int]) -> Method:
    """Return `method` for clients of the given ranks: what they get, send and keep is trimmed."""

    def plan(state: State, participants: Participants) -> Job:
        job, layout = method.plan(state, participants), state.adapters.layout
        ranks_S = [ranks_K[id_] for id_ in job.ids]
        pull = job.pull and job.pull._replace(target_SP=trimmed(layout, job.pull.target_SP, ranks_S))
        return job._replace(start_SP=trimmed(layout, job.start_SP, ranks_S), pull=pull)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        layout, ranks_S = state.adapters.layout, [ranks_K[id_] for id_ in results.ids if id_ < len(ranks_K)]
        # what does not belong together is refused by the method
        if results.values_SP.shape == (len(ranks_S), layout.num_parameters):
            results = results._replace(values_SP=trimmed(layout, results.values_SP, ranks_S))
        return method.merge(state, participants, results)

    def personalise(state: State) -> Arena:
        kept = method.personalise(state)
        return kept.replace(trimmed(kept.layout, kept.values_KP, ranks_K))

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        asked = None if method.trial is None else method.trial(state, participants, results)
        if asked is None:
            return None
        layout, ranks_S = state.adapters.layout, [ranks_K[id_] for id_ in asked.ids]
        return asked._replace(candidate=lambda number: trimmed(layout, asked.candidate(number), ranks_S))

    asking = None if method.trial is None else trial
    return method._replace(plan=plan, merge=merge, personalise=personalise, trial=asking)
