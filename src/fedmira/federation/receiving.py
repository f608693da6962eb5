"""What every method does first with the results of a round: check them and put them into their rows.

Knows nothing about how they are mixed. Axes: K clients, S returned, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedmira.errors import FedmiraError
from fedmira.federation.method import Info, State
from fedmira.types import Arena, Clients, Job, Participants, Results


def received(into: Arena, state: State, participants: Participants, results: Results) -> tuple[Arena, tuple[int, ...]]:
    """Return `into` with the returned rows in place, and the last round of each client after this one.

    Nothing handed in is changed. Clients whose result is missing keep their row and their last round.

    Raises:
        FedmiraError: a result of a client that was not asked, of the wrong size, or with a value that is not finite.
    """
    ids, values_SP = results.ids, results.values_SP
    strangers = sorted(set(ids) - set(participants.ids))
    if strangers or list(ids) != sorted(set(ids)):
        raise FedmiraError(
            f"round {participants.round}: results of the clients {list(ids)[:8]}, not asked {strangers[:8]}; each "
            f"of the {len(participants.ids)} participants answers once, in ascending order"
        )
    expected = (len(ids), into.layout.num_parameters)
    if tuple(values_SP.shape) != expected:
        raise FedmiraError(
            f"round {participants.round}: the results have shape {tuple(values_SP.shape)}, expected {expected}: a row "
            "per returned client and a column per parameter of the adapter; is the adapter the same at all clients?"
        )
    finite_S = torch.isfinite(values_SP).all(dim=1).tolist()
    if not all(finite_S):
        bad = [id_ for id_, finite in zip(ids, finite_S, strict=True) if not finite]
        raise FedmiraError(
            f"round {participants.round}: the adapters of the clients {bad} (row numbers) hold values that are not "
            "finite; they would spread to their neighbours. Lower training.learning_rate, or set training.clip_norm"
        )
    values_KP, here = into.values_KP.clone(), set(ids)
    values_KP[list(ids)] = values_SP.to(values_KP)
    last_round_K = tuple(participants.round if k in here else last for k, last in enumerate(state.last_round_K))
    return into.replace(values_KP), last_round_K


def stored(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
    """Return the state with the returned rows in place: `Method.merge` where nothing is mixed."""
    adapters, last_round_K = received(state.adapters, state, participants, results)
    return State(adapters, last_round_K), Info({"returned": float(len(results.ids))})


def split(results: Results, num_rows: int) -> tuple[Results, ...]:
    """Return the results of a job in which every participant had `num_rows` rows, one for each row of a participant.

    Such a job lists the first row of every participant, then the second of every one, and so on. A client that lost one
    of its rows is missing in all.
    """
    returned = [number for number, report in enumerate(results.reports) if not report.failure]
    if not len(returned) == len(results.ids) == len(results.values_SP):
        # what does not belong together is refused by `received`, which knows what was asked
        return (results,) * num_rows
    per_block = len(results.reports) // num_rows
    places = [[place for place, number in enumerate(returned) if number // per_block == b] for b in range(num_rows)]
    complete = set.intersection(*({results.ids[place] for place in of_block} for of_block in places))
    parts = []
    for of_block in places:
        kept = [place for place in of_block if results.ids[place] in complete]
        parts.append(
            results._replace(ids=tuple(results.ids[place] for place in kept), values_SP=results.values_SP[kept])
        )
    return tuple(parts)


def first_state(initial: Arena, clients: Clients) -> State:
    """Return the state before round 1: everybody holds its initial adapter and nobody took part.

    Raises:
        ValueError: the arena does not have a row per client.
    """
    if initial.num_clients != len(clients.names):
        raise ValueError(f"an arena of {initial.num_clients} rows for {len(clients.names)} clients")
    return State(initial.replace(initial.values_KP.clone()), (0,) * initial.num_clients)


def exchange_everything(state: State, participants: Participants) -> Job:
    """Return the job in which each participant gets its own row, trains all of it and sends all of it back."""
    groups = frozenset(state.adapters.layout.groups)
    start_SP = state.adapters.values_KP[list(participants.ids)]
    return Job(participants.round, participants.ids, start_SP, download=groups, trainable=groups, upload=groups)


def exchange_groups(groups: frozenset[str] | None) -> Callable[[State, Participants], Job]:
    """Return the plan in which only `groups` are sent, trained and sent back; None means all."""

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        return job if groups is None else job._replace(download=groups, trainable=groups, upload=groups)

    return plan


def own_adapters(state: State) -> Arena:
    """Return the adapters of the state: each client is judged by its own row."""
    return state.adapters


def share_of_round(results: Results, num_clients: int) -> float:
    """How much of a round this one was: the share of all clients that returned, 0 .. 1."""
    return len(set(results.ids)) / num_clients


def away(state: State, results: Results) -> torch.Tensor:
    """Return how many rounds have gone by since each client returned, (K,), each counted by its share of the clients.

    Args:
        state: before the round; its memory holds what this returned for the round before as `away`.
        results: of the round.
    """
    # a checkpoint of before it was kept knows rounds, whoever took part in them
    rounds = [max(state.last_round_K) - last for last in state.last_round_K]
    rounds_K = torch.tensor(rounds, dtype=torch.float64)
    away_K = state.memory.get("away", rounds_K) + share_of_round(results, state.adapters.num_clients)
    away_K[list(results.ids)] = 0.0
    return away_K
