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
import json
import math
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

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
ATTACKS = {
    "turned": "the own update, turned around and four times as large",
    "random": "a random direction, four times as far as the own update",
}
RESULTS = methods.RESULTS / "attacks.jsonl"


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
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.is_file() else []
    found = map(json.loads, lines)
    return {(line["attack"], *(line[field] for field in methods.KEY)): line for line in found}


def planned(names: list[str] | None = None) -> list[tuple[methods.Task, str]]:
    study = methods.load_study(methods.STUDIES / "planted.yaml", None)
    found, tasks = methods.by_key(methods.read_lines(study.name)), []
    for name in names or NAMES:
        rate, _ = methods.choose_rate(study, name, found)
        if rate is None:
            raise SystemExit(f"{name} has no learning rate yet: python tools/methods_study.py run --only planted")
        tasks += [
            (methods.task_of(study, name, seed, rate, tuning=False), attack)
            for seed in study.seeds
            for attack in ATTACKS
            if name != "local_only"
        ]
    return tasks


def run(arguments: argparse.Namespace) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=methods.REPOSITORY
    ).stdout.strip()
    found = read()
    todo = [(task, attack) for task, attack in planned(arguments.methods) if (attack, *task.key) not in found]
    print(f"{len(todo)} runs to do", flush=True)
    with ProcessPoolExecutor(arguments.workers) as pool:
        for done in as_completed([pool.submit(carry_out, task, attack) for task, attack in todo]):
            line = {**done.result(), "commit": commit, "processor": methods.processor()}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"  {line['method']} seed {line['seed']}, {line['attack']}", flush=True)


def honest_only(line: dict[str, Any] | None) -> methods.Judged | None:
    if line is None or not line.get("clients"):
        return None
    return methods.judged({**line, "clients": {name: of for name, of in line["clients"].items() if not lies(name)}})


def page(_arguments: argparse.Namespace) -> None:
    study = methods.load_study(methods.STUDIES / "planted.yaml", None)
    peace, attacked = methods.by_key(methods.read_lines(study.name)), read()
    local: list[methods.Judged] = []
    rows = []
    for name in NAMES:
        rate, _ = methods.choose_rate(study, name, peace)
        assert rate is not None
        tasks = [methods.task_of(study, name, seed, rate, tuning=False) for seed in study.seeds]
        by_attack = {"": [honest_only(peace.get(task.key)) for task in tasks]}
        if name == "local_only":
            local = [run for run in by_attack[""] if run is not None]
        else:
            by_attack |= {
                attack: [honest_only(attacked.get((attack, *task.key))) for task in tasks] for attack in ATTACKS
            }
        cells = [f"`{name}`"]
        for attack in ("", *ATTACKS):
            runs = [run for run in by_attack.get(attack, []) if run is not None]
            if name == "local_only" and attack:
                cells += ["-", "-"]
            elif len(runs) < len(tasks):
                # a run that diverged has no clients
                lost = sum((attack, *task.key) in attacked for task in tasks) - len(runs)
                cells += [f"{lost} of {len(tasks)} diverged" if lost > 0 else "not run", "-"]
            else:
                harmed = "-" if name == "local_only" else f"{methods.harm(runs, local):.0%}"
                worst = np.mean([worst_tenth(run.losses_K.tolist()) for run in runs])
                mean, error = methods.mean_loss(runs), methods.standard_error(runs)
                cells.append(f"{mean:.3f} ({error:.3f}), {worst:.2f}" if math.isfinite(mean) else "not finite")
                cells.append(harmed)
        rows.append(cells)
    head = ["method", *(cell for attack in ("nobody", *ATTACKS) for cell in (attack, "harmed"))]
    table = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    print((methods.STUDIES / "attacks.md").read_text("utf-8").rstrip() + "\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in table))
    made = sorted({(line["commit"], line["processor"]) for line in attacked.values()})
    print("\nHostile runs made by " + ", ".join(f"{commit} ({processor})" for commit, processor in made) + ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run_parser = commands.add_parser("run")
    run_parser.add_argument("--methods", nargs="+", metavar="NAME", choices=NAMES)
    run_parser.add_argument("--workers", type=int, default=1)
    run_parser.set_defaults(function=run)
    commands.add_parser("page").set_defaults(function=page)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
