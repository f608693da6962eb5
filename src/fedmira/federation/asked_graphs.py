"""Graphs that need answers: how well clients do with each other's adapters, or how alike adapters predict.

The question is asked after a round is merged, so its answer serves the next round. `asking` puts it beside the question
a method may have of its own. Knows nothing about how answers come to be.

Axes: K clients, S asked, Q candidates, C those compared, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from fedmira.config.graph import GraphConfig
from fedmira.federation.graph import Graph, Matrix
from fedmira.federation.learning import Learner, LearnerBuilder, Mask, Memory, Seen, neighbour_graph
from fedmira.federation.method import Info, Method, State
from fedmira.federation.questions import answered, together
from fedmira.federation.similarity import MINIMUM_CLIENTS, centred_cosine, cosines, moved
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial


def trust(config: GraphConfig, clients: Clients) -> Learner:
    """Return the learner by validation trust (after Wagner, Fan and Jaggi 2024): whose adapter does well on whose data?

    Client k's regret of adapter l is its loss with it, less its smallest loss with any it judged. Near an optimum that
    is a squared distance, so regrets, the mean of both directions, are centred into cosines as squared distances are
    (classical scaling); centring removes how good an adapter is for everybody and how hard a client's data is. The
    moving average over rounds is one of regrets. Costs `judged` foreign adapters of download per participant and round,
    and one pass more than that over its validation examples.
    """
    num_clients = len(clients.names)

    def init(initial: Arena) -> dict[str, torch.Tensor]:
        nothing_KK = torch.zeros(num_clients, num_clients, dtype=torch.float64)
        return {"regret": nothing_KK.clone(), "heard": nothing_KK.clone(), "newly_heard": nothing_KK.clone()}

    def learn(memory: Memory, seen: Seen) -> tuple[dict[str, torch.Tensor], Graph]:
        regret, heard = memory["regret"], memory["heard"]
        similarity_KK = similarity_of_regrets(regret.cpu().numpy(), heard.cpu().numpy() > 0)
        remembered = {"regret": regret.clone(), "heard": heard.clone(), "newly_heard": torch.zeros_like(heard)}
        return remembered, neighbour_graph(similarity_KK, config)

    def ask(participants: Participants, results: Results) -> Trial | None:
        size = len(results.ids)
        if size < 2:
            return None
        offsets = _offsets(size, min(config.judged, size - 1), participants.round)
        # candidate 0 is a client's own upload, which it holds
        turns = (0, *offsets)
        rows_SP = results.values_SP.clone()
        return Trial(results.ids, len(turns), lambda number: rows_SP.roll(-turns[number], 0), sent=len(offsets))

    def hear(memory: Memory, round_: int, trial: Trial, losses: Losses) -> dict[str, torch.Tensor]:
        regret_KK, heard_KK, new_KK = memory["regret"].clone(), memory["heard"].clone(), memory["newly_heard"].clone()
        size = len(trial.ids)
        offsets = _offsets(size, trial.num_candidates - 1, round_)
        for s, k in enumerate(trial.ids):
            loss_Q = losses.mean_SQ[s]
            finite_Q = torch.isfinite(loss_Q)
            for offset, loss, finite in zip(offsets, loss_Q[1:].tolist(), finite_Q[1:].tolist(), strict=True):
                if not finite:
                    continue
                loss -= float(loss_Q[finite_Q].min())
                other = trial.ids[(s + offset) % size]
                past = config.memory if heard_KK[k, other] else 0.0
                regret_KK[k, other] = past * regret_KK[k, other] + (1 - past) * loss
                heard_KK[k, other] = new_KK[k, other] = 1.0
        return {"regret": regret_KK, "heard": heard_KK, "newly_heard": new_KK}

    return Learner(init, learn, ask, hear, _newly_heard)


def _newly_heard(memory: Memory, seen: Seen) -> Mask:
    """The pairs of which something was heard since the last graph, (K, K): answers serve the next round."""
    new_KK = memory["newly_heard"].cpu().numpy()
    new_KK = new_KK + new_KK.T > 0
    return np.asarray(new_KK & (new_KK.any(axis=0).sum() >= MINIMUM_CLIENTS))


def _offsets(size: int, count: int, round_: int) -> tuple[int, ...]:
    """How many places further those are that each of `size` clients judges this round: all of them in turn.

    >>> _offsets(5, 2, 1), _offsets(5, 2, 2), _offsets(5, 4, 7)
    ((1, 2), (3, 4), (1, 2, 3, 4))
    """
    first = (round_ - 1) * count
    return tuple(sorted(1 + (first + place) % (size - 1) for place in range(count)))


def similarity_of_regrets(regret_KK: Matrix, heard_KK: np.ndarray) -> Matrix:
    """Return cosines from regrets taken as squared distances, (K, K); 0 where nobody of a pair judged the other.

    A pair that was not heard counts, in the centring only, as the mean of what is known of its two clients.
    """
    times_KK = heard_KK.astype(np.float64) + heard_KK.T
    rows = np.flatnonzero(times_KK.any(axis=1))
    similarity_KK = np.zeros_like(regret_KK)
    if len(rows) < MINIMUM_CLIENTS:
        return similarity_KK
    block = np.ix_(rows, rows)
    known_CC = times_KK[block] > 0
    total_CC = np.where(heard_KK, regret_KK, 0.0)
    distance_CC = (total_CC + total_CC.T)[block] / np.maximum(times_KK[block], 1.0)
    mean_C = distance_CC.sum(axis=1) / known_CC.sum(axis=1)
    distance_CC = np.where(known_CC, distance_CC, (mean_C[:, None] + mean_C[None, :]) / 2)
    np.fill_diagonal(distance_CC, 0.0)
    similarity_KK[block] = np.where(known_CC, centred_cosine(-distance_CC / 2), 0.0)
    return similarity_KK


def probe(config: GraphConfig, clients: Clients) -> Learner:
    """Return the learner by agreement of predictions on the server's own texts.

    <sqrt p_k, sqrt p_l>, the mean over tokens of the Bhattacharyya coefficient of two adapters' predictions, is an
    inner product, so it is centred and scaled like the Gram matrix of updates. The server does all of it: nothing
    crosses. Costs one pass of every returned adapter over the texts, and S^2 V operations per token.
    """
    num_clients = len(clients.names)

    def init(initial: Arena) -> dict[str, torch.Tensor]:
        nothing_KK = torch.zeros(num_clients, num_clients, dtype=torch.float64)
        return {"similarity": nothing_KK.clone(), "newly_heard": nothing_KK.clone()}

    def learn(memory: Memory, seen: Seen) -> tuple[dict[str, torch.Tensor], Graph]:
        similarity = memory["similarity"]
        remembered = {"similarity": similarity.clone(), "newly_heard": torch.zeros_like(similarity)}
        return remembered, neighbour_graph(similarity.cpu().numpy(), config)

    def ask(participants: Participants, results: Results) -> Trial | None:
        if len(results.ids) < MINIMUM_CLIENTS:
            return None
        rows_SP = results.values_SP.clone()
        return Trial(results.ids, 0, lambda number: rows_SP, sent=0, compare_SP=rows_SP)

    def hear(memory: Memory, round_: int, trial: Trial, losses: Losses) -> dict[str, torch.Tensor]:
        before_KK = memory["similarity"].cpu().numpy()
        assert losses.agreement_SS is not None
        agreement_SS = losses.agreement_SS.cpu().numpy()
        sound = np.flatnonzero(np.isfinite(np.diagonal(agreement_SS)))
        rows = [trial.ids[s] for s in sound]
        if len(rows) < MINIMUM_CLIENTS:
            return {}
        now_CC = cosines(agreement_SS[np.ix_(sound, sound)])
        now_KK, new_KK = moved(before_KK, now_CC, rows, rows, config.memory), np.zeros_like(before_KK)
        new_KK[np.ix_(rows, rows)] = 1 - np.eye(len(rows))
        return {"similarity": torch.from_numpy(np.array(now_KK)), "newly_heard": torch.from_numpy(new_KK)}

    return Learner(init, learn, ask, hear, _newly_heard)


ASKED: Mapping[str, LearnerBuilder] = {"trust": trust, "probe": probe}
"""The learners that ask, by kind."""


# ------------------------------------------------------------------------------------------- beside a method's question


def asking(method: Method, learns: Learner) -> Method:
    """Return `method` with the question of its graph, if there is one, asked together with its own.

    The graph is for the next round, so the last one does not ask.
    """
    if learns.ask is None or learns.hear is None:
        return method
    ask, hear = learns.ask, learns.hear

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        own = method.trial(state, participants, results) if method.trial else None
        return together(None if participants.last else ask(participants, results), own)

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        heard = partial(hear, state.memory, max(state.last_round_K))
        return answered(method, state, trial, losses, heard)

    return method._replace(trial=trial, decide=decide)
