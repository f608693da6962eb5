"""Clients that joined the data of a run that goes on: who may, and what the run has once they are in.

Clients that the run knows must hold the same examples as ever; they keep adapters, memory and random streams bit for
bit. Who joined comes after them and enters as a client never seen (`federation/joining.py`). Knows nothing about the
round loop or files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedmira.assembly import Assembly
from fedmira.data.splits import SPLITS
from fedmira.errors import IntegrityError, UsageError
from fedmira.federation.joining import joined
from fedmira.federation.method import State
from fedmira.formats import listed

_NAMED = 5


def known_clients(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The clients of the run with that manifest, in the order of its rows; none if nothing was written yet."""
    return tuple(client["name"] for client in manifest.get("clients", ()))


def refuse_other_data(manifest: Mapping[str, Any], parts: Assembly) -> None:
    """Refuse to go on where a client that the run knows is gone or changed, or the given graph between such clients is.

    Args:
        manifest: of the run so far.
        parts: assembled from the data as it is now, the known clients first.

    Raises:
        IntegrityError: names what changed.
    """
    # through JSON, as the manifest went
    now, before = json.loads(json.dumps(parts.manifest())), manifest["clients"]
    there = {client["name"]: client for client in now["clients"]}
    if gone := [client["name"] for client in before if client["name"] not in there]:
        raise _refusal("data", f"it no longer has {listed(gone, _NAMED)}, whose adapters the run keeps")
    if all("sha256" in client for client in before):
        pairs = [(client, there[client["name"]]) for client in before]
        changed = [f"{old['name']}: {_change(old, new)}" for old, new in pairs if old["sha256"] != new["sha256"]]
    else:
        # begun by a version that wrote down only what the files were
        changed = _differing(manifest["data"], now["data"])
    if changed:
        raise _refusal("data", f"{listed(changed, _NAMED)} differ; only new clients may be added")
    graph = parts.graph_facts(first=len(before))
    if changed := _differing(manifest.get("graph", graph), graph):
        raise _refusal("graph", f"{listed(changed, _NAMED)} differ")


def refuse_newcomers(known: Sequence[str], parts: Assembly) -> None:
    """Refuse clients beside those that are known, where nobody can join.

    Raises:
        IntegrityError: names who is new.
    """
    if new := [name for name in parts.clients.names if name not in known]:
        raise _refusal("data", f"{listed(new, _NAMED)} joined")


def refuse_to_end(names: Sequence[str], rounds: int) -> None:
    """Refuse to let clients join a run that has no round left for them.

    Raises:
        UsageError: says what to raise.
    """
    raise UsageError(
        f"{listed(names, _NAMED)} joined the data, but all {rounds} rounds of the run are over; raise "
        f"federation.rounds, for example to {rounds + max(1, rounds // 4)}, and resume again"
    )


def joins(manifest: Mapping[str, Any], held: int, num_clients: int, repeated: int) -> list[tuple[int, int]]:
    """Who joins a run that goes on when, as (after which round at the earliest, how many clients there are then).

    Args:
        manifest: of the run. Clients in it that the checkpoint lacks join again after the round they joined after.
        held: clients that the checkpoint knows.
        num_clients: all that there are now.
        repeated: the last round that must be made again without clients that are not in the manifest.

    >>> joins({"clients": [{"name": "a"}, {"name": "b", "joined_after": 3}]}, 1, 3, 5)
    [(3, 2), (5, 3)]
    """
    recorded = manifest["clients"]
    after = [client["joined_after"] for client in recorded[held:]]
    last = max([repeated, *after])
    after += [last] * (num_clients - held - len(after))
    return [
        (round_, held + place + 1) for place, round_ in enumerate(after) if after[place + 1 : place + 2] != [round_]
    ]


def take_in(before: Assembly, after: Assembly, state: State, round_: int) -> State:
    """Return `state` with the clients of `after` that `before` lacks, who join when round `round_` is over.

    What clients and server remember about messages goes over to the exchange of `after`.
    """
    after.exchange.restore(before.exchange.state())
    first = after.method.init(after.initial_adapters(), after.clients)
    return joined(after.method, state, first, round_)


def grown_manifest(manifest: Mapping[str, Any], parts: Assembly, num_before: int, round_: int) -> dict[str, Any]:
    """Return `manifest` with the clients that joined after round `round_` and the data as it is now.

    The facts of the data that the run had before are kept, the oldest first, in `data_before`.
    """
    now = parts.manifest()
    newcomers = [{**client, "joined_after": round_} for client in now["clients"][num_before:]]
    before = manifest.get("data_before", [])
    if manifest["data"] != now["data"]:
        before = [*before, manifest["data"]]
    clients = [*manifest["clients"][:num_before], *newcomers]
    return {**manifest, "data": now["data"], "data_before": before, "clients": clients, "graph": now["graph"]}


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    sizes = [f"{split} {before[split]} -> {now[split]}" for split in SPLITS if before[split] != now[split]]
    return ", ".join(sizes) or "other texts or another task"


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {**before, **now} if before.get(key) != now.get(key))


def _refusal(what: str, how: str) -> IntegrityError:
    return IntegrityError(
        f"the {what} changed since the run was started ({how}); restore the files, or start a new run. Where no file "
        "changed, the version that began the run read fewer kinds of files and records than this one"
    )
