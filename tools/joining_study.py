"""What clients that join late find: docs/results/joining.md, in resumable pieces.

    python tools/joining_study.py run  [--methods mira] [--workers 2]
    python tools/joining_study.py page > docs/results/joining.md

On the planted tasks of `methods_study`, with its draws, settings and learning rates. The last client of each family is
not there for the first half of the rounds; then the run goes on with it, as `fedmira run --resume` does. Those who
joined are judged, and those who were there, beside runs in which everybody was there from the start (the lines of
`methods_study`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    # one thread a run, as in methods_study, and before torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import methods_study as methods
from fedmira import assembly, experiment
from fedmira.assembly import Assembly
from fedmira.config.run import RunConfig
from fedmira.data.sources import planted
from fedmira.federation.joining import with_rows
from fedmira.federation.method import State

NAMES = ("local_only", "fedit", "pfedgraph", "mira", "mira-true")
STARTS = ("welcomed", "fresh")
"""From what the server has for a client never seen, or from the initial adapter, as everybody did in round 1."""


def late(name: str) -> bool:
    """The last client of each family."""
    return name.endswith("-client-3")


@contextmanager
def without_the_late() -> Iterator[None]:
    """The planted tasks have no clients that join late."""
    whole = planted.codebooks

    def there(*settings: Any) -> dict[str, dict[str, str]]:
        return {name: book for name, book in whole(*settings).items() if not late(name)}

    # clients are kept from run to run by their config, which says nothing of this
    uncached = assembly._federation.__wrapped__
    with mock.patch.object(planted, "codebooks", there), mock.patch.object(assembly, "_federation", uncached):
        yield


@contextmanager
def joining_fresh() -> Iterator[None]:
    """Who joins trains on from its initial adapter, whatever the server has for it."""
    welcoming = experiment.take_in

    def fresh(before: Assembly, after: Assembly, state: State, round_: int) -> State:
        initial = after.method.init(after.initial_adapters(), after.clients).adapters.values_KP
        num_before = state.adapters.num_clients
        return with_rows(welcoming(before, after, state, round_), num_before, initial[num_before:])

    with mock.patch.object(experiment, "take_in", fresh):
        yield


def in_two_halves(config: RunConfig, folder: Path, start: str) -> Path:
    """Carry out a run that is half over when those who are late join, and return its directory."""
    half = config.federation.model_copy(update={"rounds": config.federation.rounds // 2})
    with without_the_late():
        experiment.run(config.model_copy(update={"federation": half}), directory=folder)
    with joining_fresh() if start == "fresh" else nullcontext():
        return experiment.run(config, directory=folder, resume=True)


def carry_out(task: methods.Task, start: str) -> dict[str, Any]:
    return {**methods.carry_out(task, partial(in_two_halves, start=start)), "start": start}


def read() -> dict[Any, dict[str, Any]]:
    """The finished runs, by start and by the key of their task."""
    return methods.by_key(methods.read_lines("joining"), "start")


def run(arguments: argparse.Namespace) -> None:
    study = methods.load_study(methods.STUDIES / "planted.yaml", None)
    peace, found = methods.by_key(methods.read_lines(study.name)), read()
    tasks = [task for name in arguments.methods or NAMES for task in methods.reported_tasks(study, name, peace)]
    # alone everybody is fresh
    todo = [
        (task, start)
        for task in tasks
        for start in (STARTS if task.key[1] != "local_only" else STARTS[:1])
        if (start, *task.key) not in found
    ]
    print(f"{len(todo)} runs to do", flush=True)
    for line in methods.record("joining", carry_out, todo, arguments.workers):
        print(f"  {line['method']} seed {line['seed']}, {line['start']}", flush=True)


def only(line: dict[str, Any] | None, joined: bool) -> methods.Judged | None:
    """Those who joined, or those who were there."""
    return methods.judged_part(line, lambda name: late(name) == joined)


def cell(lines: list[dict[str, Any] | None], joined: bool) -> str:
    runs = [run for run in (only(line, joined) for line in lines) if run is not None]
    if len(runs) < len(lines):
        return f"{len(runs)} of {len(lines)} runs"
    return f"{methods.mean_loss(runs):.3f} ({methods.standard_error(runs):.3f})"


def page(_arguments: argparse.Namespace) -> None:
    study = methods.load_study(methods.STUDIES / "planted.yaml", None)
    peace, found = methods.by_key(methods.read_lines(study.name)), read()
    head = [
        "method",
        "joined, welcomed",
        "joined, fresh",
        "there from the start",
        "the others",
        "the same, nobody late",
    ]
    table, shown = [head], list[dict[str, Any] | None]()
    for name in NAMES:
        tasks = methods.reported_tasks(study, name, peace)
        welcomed, fresh = ([found.get((start, *task.key)) for task in tasks] for start in STARTS)
        always = [peace.get(task.key) for task in tasks]
        cells = [cell(welcomed, True), cell(fresh, True) if name != "local_only" else "-", cell(always, True)]
        table.append([f"`{name}`", *cells, cell(welcomed, False), cell(always, False)])
        shown += [*welcomed, *fresh]
    methods.print_side_page("joining", table, [line for line in shown if line is not None])


if __name__ == "__main__":
    methods.side_main(__doc__, NAMES, run, page)
