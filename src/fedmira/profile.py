"""Writes where the time of a run went: `profile.json` in its directory, and the same as a table in `run.log`.

Counts what `fedmira.stages` marks, from the moment the run is asked for to its end. Changes nothing that the run
computes. Knows nothing about what happens in a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedmira.errors import Interrupted
from fedmira.evaluation.costs import highest_memory_bytes
from fedmira.formats import format_mib
from fedmira.runs.store import RunStore
from fedmira.stages import STAGES, Stopwatch, watching


@contextmanager
def profiled(store: RunStore) -> Iterator[None]:
    """Profile the `with` block, which carries out the run of `store`, and keep what was found when it ends.

    A run that was interrupted keeps the profile of what it did; a resumed one that of what was left. Where nothing
    was trained the profile stays that is there.
    """
    stopwatch = Stopwatch()
    try:
        with watching(stopwatch):
            yield
    except Interrupted:
        _keep(store, stopwatch)
        raise
    _keep(store, stopwatch)


def _keep(store: RunStore, stopwatch: Stopwatch) -> None:
    facts = {
        "seconds": dict(stopwatch.seconds),
        "run_seconds": sum(seconds for name, seconds in stopwatch.seconds.items() if name != "start"),
        "peak_memory_bytes": highest_memory_bytes(),
    }
    if not stopwatch.seconds.get("forward") and store.profile():
        return
    store.write_profile(facts)
    for line in lines(facts):
        store.log(line)


def lines(facts: Mapping[str, Any]) -> list[str]:
    """The table of a profile as it is in profile.json; shares are of the run after its start.

    >>> facts = {"seconds": {"start": 2.0, "forward": 1.0, "backward": 3.0}, "run_seconds": 4.0,
    ...          "peak_memory_bytes": 2**29}
    >>> print("\\n".join(lines(facts)))
    stage        seconds  share
    start           2.00
    forward         1.00   25 %
    backward        3.00   75 %
    run             4.00  100 %
    peak memory 512 MiB
    """
    total = facts["run_seconds"]
    table = [f"{'stage':10}  {'seconds':>8}  share"]
    for name in (*STAGES, "run"):
        seconds = total if name == "run" else facts["seconds"].get(name)
        if seconds is not None:
            share = "" if name == "start" or not total else f"{100 * seconds / total:5.0f} %"
            table.append(f"{name:10}  {seconds:8.2f}{share}")
    return [*table, f"peak memory {format_mib(facts['peak_memory_bytes'])}"]
