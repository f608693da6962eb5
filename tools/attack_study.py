"""What hostile clients can do to language models: docs/results/attacks.md, in resumable pieces.

    python tools/attack_study.py run  [--methods mira mira-krum] [--workers 2]
    python tools/attack_study.py page > docs/results/attacks.md

On the planted tasks of `methods_study`, with its draws, settings and learning rates. One client of each family trains
as all do and uploads something else. What the honest clients take home is judged, beside the same clients where nobody
is hostile (the lines of `methods_study`). The factor keeps hostile updates far below `exchange.max_norm_ratio`, which
rejects what is impossible: what is rejected cannot harm, and would show nothing about robust neighbours.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    # one thread a run, as in methods_study, and before torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import methods_study as methods
from fedmira.evaluation.meters import worst_tenth
from fedmira.exchange import in_process
from fedmira.randomness import torch_generator

NAMES = (
    *("local_only", "fedit", "pfedgraph", "mira", "mira-no-choice", "mira-uniform"),
    *("mira-clip", "mira-krum", "mira-median"),
)
FACTOR = 4.0
"""How much larger than an honest update a hostile one is."""
ATTACKS = ("turned", "random")


def hostile(train: Callable[..., Any], attack: str, seed: int) -> Callable[..., Any]:
    """`training.cohort.train` as a federation sees it in which one client of each family lies."""

    def lying(base: Any, layout: Any, job: Any, clients: Any, *rest: Any, **named: Any) -> Any:
        values_SP, reports = train(base, layout, job, clients, *rest, **named)
        came = [row for row, report in enumerate(reports) if not report.failure]
        for place, row in enumerate(came):
            if not lies(clients[job.ids[row]].name):
                continue
            start_P = job.start_SP[row]
            update_P = values_SP[place] - start_P
            if attack == "turned":
                update_P = -update_P
            else:
                noise_P = torch.randn(update_P.shape, generator=torch_generator(seed, "attack", job.round, row))
                # what a method does not train, or does not send, stays
                noise_P = torch.where(update_P == 0, 0.0, noise_P.to(update_P))
                update_P = noise_P * (update_P.norm() / noise_P.norm().clamp(min=1e-12))
            values_SP[place] = start_P + FACTOR * update_P
        return values_SP, reports

    return lying


def lies(name: str) -> bool:
    """The first client of each family."""
    return name.endswith("-client-0")


def carry_out(task: methods.Task, attack: str) -> dict[str, Any]:
    honest = in_process.train
    in_process.train = hostile(honest, attack, task.seed)
    try:
        return {**methods.carry_out(task), "attack": attack}
    finally:
        in_process.train = honest


def read() -> dict[Any, dict[str, Any]]:
    """The finished runs, by attack and by the key of their task."""
    return methods.by_key(methods.read_lines("attacks"), "attack")


def run(arguments: argparse.Namespace) -> None:
    study = methods.load_study(methods.STUDIES / "planted.yaml", None)
    peace, found = methods.by_key(methods.read_lines(study.name)), read()
    # under local_only nobody hears what others upload
    names = [name for name in arguments.methods or NAMES if name != "local_only"]
    tasks = [task for name in names for task in methods.reported_tasks(study, name, peace)]
    todo = [(task, attack) for task in tasks for attack in ATTACKS if (attack, *task.key) not in found]
    print(f"{len(todo)} runs to do", flush=True)
    for line in methods.record("attacks", carry_out, todo, arguments.workers):
        print(f"  {line['method']} seed {line['seed']}, {line['attack']}", flush=True)


def honest_only(line: dict[str, Any] | None) -> methods.Judged | None:
    return methods.judged_part(line, lambda name: not lies(name))


def cells(runs: list[methods.Judged], local: list[methods.Judged]) -> list[str]:
    """What a method's runs under one attack came to: losses, and the share harmed."""
    if len(runs) < len(local):
        return [f"{len(runs)} of {len(local)} runs", "-"]
    worst = np.mean([worst_tenth(run.losses_K.tolist()) for run in runs])
    losses = f"{methods.mean_loss(runs):.3f} ({methods.standard_error(runs):.3f}), {worst:.2f}"
    return [losses, "-" if runs is local else f"{methods.harm(runs, local):.0%}"]


def page(_arguments: argparse.Namespace) -> None:
    study = methods.load_study(methods.STUDIES / "planted.yaml", None)
    peace, attacked = methods.by_key(methods.read_lines(study.name)), read()
    shown: list[methods.Judged] = []

    def honest(name: str, attack: str) -> list[methods.Judged]:
        found = [
            honest_only(attacked.get((attack, *task.key)) if attack else peace.get(task.key))
            for task in methods.reported_tasks(study, name, peace)
        ]
        runs = [run for run in found if run is not None]
        shown.extend(runs if attack else [])
        return runs

    local = honest("local_only", "")
    head = ["method", *(cell for attack in ("nobody", *ATTACKS) for cell in (attack, "harmed"))]
    table = [head, ["`local_only`", *cells(local, local), *["-"] * 4]]
    table += [
        [f"`{name}`", *(cell for attack in ("", *ATTACKS) for cell in cells(honest(name, attack), local))]
        for name in NAMES[1:]
    ]
    methods.print_side_page("attacks", table, [run.line for run in shown])


if __name__ == "__main__":
    methods.side_main(__doc__, NAMES, run, page)
