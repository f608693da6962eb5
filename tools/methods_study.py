"""The study behind docs/results/methods.md: every method on the same draws of six federations, in resumable pieces.

    python tools/methods_study.py run  --data DIR [--only planted flan] [--methods mira fedit] [--workers 2]
    python tools/methods_study.py page > docs/results/methods.md

`studies/*.yaml` say which methods, draws and learning rates; `studies/settings/*.yaml` name further runs of them that
differ in other sections of the config, such as compression. Every finished run becomes one line of
`studies/results/NAME.jsonl`, a file that is kept under version control: a run whose line is there is not done again,
also on another machine. A line belongs to the config it was made with (without paths); when that changes, it is done
anew. Learning rates are chosen per method on validation data of other draws, and names with a hyphen, which change one
thing of a method, run at its rate; test data is looked at by `page` only.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.stats import t as student

from fedmira.evaluation.meters import HARM_TOLERANCE, worst_tenth

REPOSITORY = Path(__file__).resolve().parent.parent
STUDIES = REPOSITORY / "studies"
RESULTS = STUDIES / "results"
KEY = ("study", "method", "seed", "learning_rate", "tuning", "digest")
_PATHLESS = {"name", "output", "compare"}
_LATER: Mapping[str, Mapping[str, Any]] = {
    "data": {"cut": "beginning"},
    "training": {"keep_moments": False, "data_seed": None},
    "evaluation": {"examples_per_question": 16},
    "method": {"mixing": "auto", "robust": "none", "depth": 0.0, "client_strength": {}, "ema_decay": 0.0},
}
"""Keys that came after the first results, with the values that leave everything as it was before them."""
_GONE = {"warmup_rounds": 3}
"""What learned graphs were made with before they counted by their agreement: see methods_made.md."""
_NEAR: Mapping[str, float] = {"flan_few": 1.1, "instruction_induction": 1.1, "planted": 1.2, "planted_unequal": 1.2}
"""How far above the best a rate may be on one draw and still be tried on two more: two standard deviations, from draw
to draw, of what lies between neighbouring rates. 1.05 elsewhere."""
_TUNED_ALONE = (
    *("mira-true", "mira-labels", "mira-shared-a", "mira-shared-a-asks-nobody"),
    *("mira-private-weak", "mira-private", "mira-private-full"),
    *("pfedgraph-average", "local_only-average", "fedlease-warmup-2", "mira_published-strong", "mira_published-true"),
    *("local_only-rank-2", "local_only-rank-32", "mira-rank-2", "mira-rank-4", "mira-rank-16", "mira-rank-32"),
    *(
        "mira-ranks-mixed",
        "mira-ranks-mixed-factors",
        "local_only-ranks-mixed",
        "hetlora-ranks-mixed",
        "flexlora-ranks-mixed",
    ),
)


class Study(NamedTuple):
    """One federation and what is compared on it."""

    name: str
    config: Any
    settings: Mapping[str, Mapping[str, Any]]
    """Further names to compare: the method and the sections of the config that differ."""

    @property
    def methods(self) -> list[str]:
        return [*self.config.compare.methods, *self.settings]

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.compare.seeds)


class Task(NamedTuple):
    """One run of a study."""

    study: str
    config: dict[str, Any]
    """The whole config, JSON-able."""
    method: str
    seed: int
    learning_rate: float
    tuning: bool

    @property
    def key(self) -> tuple[str, str, int, float, bool, str]:
        return (self.study, self.method, self.seed, self.learning_rate, self.tuning, digest(self.config))


def digest(config: Mapping[str, Any]) -> str:
    """A short hash of what decides the numbers: not where data lies or results go, nor what a kind of graph ignores."""
    from fedmira.config.graph import GraphConfig
    from fedmira.config.mira import ChoiceConfig

    kept = {key: value for key, value in config.items() if key not in _PATHLESS}
    kept["data"] = {key: value for key, value in kept["data"].items() if key != "path"}
    for section, later in _LATER.items():
        of_section = kept[section].items()
        kept[section] = {key: value for key, value in of_section if key not in later or value != later[key]}
    choice = kept["method"].get("choice")
    if choice and choice["examples"] == "auto":
        examples = ChoiceConfig.model_construct(**choice).most_examples(kept["training"]["batch_size"])
        choice = kept["method"]["choice"] = {**choice, "examples": examples}
    if choice and (choice["examples"] is None or not choice["enabled"]):
        choice = kept["method"]["choice"] = {key: choice[key] for key in choice if key != "examples"}
    if choice and (not choice["enabled"] or choice["shrinkage"] == bool(choice["memory"])):
        # results of before there was shrinkage stay, see methods_made.md; without memory each answer counted alone
        kept["method"]["choice"] = {**{key: choice[key] for key in choice if key != "shrinkage"}, "pooling": 0.0}
    if "graph" in kept["method"]:
        graph = GraphConfig.model_construct(**kept["method"]["graph"])
        used = {key: value for key, value in graph.model_dump(mode="json").items() if key == "kind" or graph.uses(key)}
        kept["method"]["graph"] = {**used, **(_GONE if graph.uses("settled") else {})}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------ planning


def load_study(path: Path, data: Path | None) -> Study:
    """The study of a file; relative data paths are below `data`."""
    from fedmira.config.file import load_config

    config, beside = load_config(path), STUDIES / "settings" / path.name
    settings = yaml.safe_load(beside.read_text("utf-8")) if beside.is_file() else {}
    where = getattr(config.data, "path", None)
    if where is not None and data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(data / where)})})
    return Study(path.stem, config, settings)


def task_of(study: Study, name: str, seed: int, rate: float, *, tuning: bool) -> Task:
    from fedmira.config.run import RunConfig
    from fedmira.studies.compare import variant

    differs = dict(study.settings.get(name, {"method": name}))
    chosen = variant(study.config, differs.pop("method"), seed, rate, tuning=tuning).model_dump(mode="json")
    chosen["compare"] = {}
    if differs:
        changed = {section: {**chosen[section], **values} for section, values in differs.items()}
        chosen = RunConfig.model_validate({**chosen, **changed}).model_dump(mode="json")
        chosen["compare"] = {}
    return Task(study.name, chosen, name, seed, rate, tuning)


def missing(study: Study, methods: Sequence[str], found: Mapping[Any, Any], again: bool = False) -> Iterator[Task]:
    """The runs that can be done now: rates to try for every method, reported draws of those whose rate is chosen.

    With `again` reported draws that are there count as missing.
    """
    asked: set[str] = set()
    for name in methods:
        rate, untried = choose_rate(study, name, found)
        if rate is None:
            yield from () if tuned_as(name) in asked else untried
            asked.add(tuned_as(name))
            continue
        for seed in study.seeds:
            task = task_of(study, name, seed, rate, tuning=False)
            if again or task.key not in found:
                yield task


def tuned_as(name: str) -> str:
    """Whose learning rate a name runs at: a variant changes one thing of a method, and leaves its rate as it is.

    Rivals of `mira`, those that are told the true graph, and those that train other tensors or ranks would be held back
    by that; they are tuned themselves.
    """
    return name if name in _TUNED_ALONE else name.partition("-")[0]


def choose_rate(study: Study, name: str, found: Mapping[Any, Any]) -> tuple[float | None, list[Task]]:
    """The rate with the lowest validation loss on tuning draws, or None and the runs that must be tried first.

    Three neighbours in the middle of the grid are tried on one draw. Those that are near the best, see `_NEAR`, are
    tried on two more draws, and the mean of the three decides between them. While the best is the outermost of those
    tried, the next one on its side is tried, too. A rate that diverged counts as infinite; ties go to the smaller one.
    """
    name = tuned_as(name)
    grid, seed = sorted(study.config.compare.learning_rates), study.config.compare.tuning_seed

    def trials(rates: Sequence[float], draws: Sequence[int]) -> tuple[list[Task], list[float]]:
        """What is not known yet, and if everything is, the mean loss of each rate."""
        tasks = [[task_of(study, name, draw, rate, tuning=True) for draw in draws] for rate in rates]
        untried = [task for of_rate in tasks for task in of_rate if task.key not in found]
        losses = [] if untried else [[found[t.key]["validation_loss"] for t in of_rate] for of_rate in tasks]
        return untried, [math.inf if None in of_rate else float(np.mean(of_rate)) for of_rate in losses]

    def widened(best: float) -> tuple[int, int]:
        """The range of rates tried, and one more where the best is its outermost."""
        return max(0, low - (best == grid[low])), min(len(grid), high + (best == grid[high - 1]))

    low = max(0, (len(grid) - 3) // 2)
    high = min(len(grid), low + 3)
    while True:
        untried, losses = trials(grid[low:high], [seed])
        if untried:
            return None, untried
        best, furthest = grid[low + int(np.argmin(losses))], _NEAR.get(study.name, 1.05) * min(losses)
        near = [rate for rate, loss in zip(grid[low:high], losses, strict=True) if loss <= furthest]
        if widened(best) == (low, high) and len(near) > 1:
            untried, losses = trials(near, [seed, seed + 1, seed + 2])
            if untried:
                return None, untried
            best = near[int(np.argmin(losses))]
        if widened(best) == (low, high):
            return best, []
        low, high = widened(best)


def reported_tasks(study: Study, name: str, lines: dict[Any, dict[str, Any]]) -> list[Task]:
    """The reported draws of a method at the rate it was tuned to, for studies that build on those of this one."""
    rate, _ = choose_rate(study, name, lines)
    if rate is None:
        raise SystemExit(f"{name} has no learning rate yet: python tools/methods_study.py run --only {study.name}")
    return [task_of(study, name, seed, rate, tuning=False) for seed in study.seeds]


# ------------------------------------------------------------------------------------------------------------- running


def straight_through(config: Any, folder: Path) -> Path:
    """Carry out a run as `fedmira run` does, below `folder`, and return its directory."""
    from fedmira.experiment import run

    return run(config, directory=folder)


def carry_out(task: Task, way: Callable[[Any, Path], Path] = straight_through) -> dict[str, Any]:
    """Do one run in this process by `way`, in a folder that is removed, and return its line."""
    from fedmira.config.run import RunConfig
    from fedmira.errors import DivergedError

    line: dict[str, Any] = dict(zip(KEY, task.key, strict=True))
    folder, begun = Path(tempfile.mkdtemp(prefix="fedmira-study-")), time.process_time()
    try:
        path = way(RunConfig.model_validate(task.config), folder)
        line |= {**outcome(path), "seconds": round(time.process_time() - begun, 1)}
    except DivergedError as error:
        line |= {"validation_loss": None, "diverged": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return line


def outcome(path: Path) -> dict[str, Any]:
    """What a finished run came to, as its line says it."""
    from fedmira.report.reading import RunRecord, read
    from fedmira.runs.store import RunStore
    from fedmira.studies.compare import final_validation_loss

    record = read(path)
    assert isinstance(record, RunRecord)
    holds_some = record.config["data"]["partition"]["validation"] > 0
    loss = final_validation_loss(path) if holds_some else math.inf
    held = [client["sha256"] for client in RunStore.open(path).manifest()["clients"]]
    return {
        "validation_loss": loss if math.isfinite(loss) else None,
        "data": hashlib.sha256("".join(held).encode()).hexdigest()[:12],
        "upload_bytes": record.upload_bytes,
        "download_bytes": record.download_bytes,
        "clients": {
            one.name: [
                one.task,
                round(one.loss_sum, 4),
                one.tokens,
                round(one.rouge_l_sum, 4),
                one.exact_match_sum,
                one.generated,
            ]
            for one in record.records
        },
    }


def read_lines(study: str) -> list[dict[str, Any]]:
    """The finished runs, oldest first; what follows the last newline is a line that a kill tore."""
    file = RESULTS / f"{study}.jsonl"
    whole = file.read_bytes().rpartition(b"\n")[0] if file.is_file() else b""
    return [json.loads(line) for line in whole.split(b"\n") if line]


def cut_torn_line(file: Path) -> None:
    """Cut what follows the last newline, so that the next line begins a line of its own."""
    if file.is_file():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def by_key(lines: Sequence[dict[str, Any]], *first: str) -> dict[Any, dict[str, Any]]:
    """Lines by the key of their task, behind the fields `first`."""
    return {tuple(one[field] for field in (*first, *KEY)): one for one in lines}


def _end_with_parent() -> None:
    """Ask Linux to kill this process when whoever started it is gone: nobody would write down its results."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def sources_commit() -> str:
    """The commit of the sources, short, and whether they were changed since; empty where git does not know them."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--", "src", "tools", "studies", ":!studies/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit} with changes" if changes else commit


@functools.cache
def processor() -> str:
    """What Linux calls it, or nothing: seconds of different ones do not compare."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def record(
    file: str, work: Callable[..., dict[str, Any]], todo: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[dict[str, Any]]:
    """Call `work` with each of `todo` in processes of their own; every line it returns is kept in RESULTS/FILE.jsonl,
    with the commit and the processor, before it is handed on."""
    commit = sources_commit()
    RESULTS.mkdir(exist_ok=True)
    cut_torn_line(RESULTS / f"{file}.jsonl")
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        for done in as_completed([pool.submit(work, *arguments) for arguments in todo]):
            line = {**done.result(), "commit": commit, "processor": processor()}
            with (RESULTS / f"{file}.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            yield line


def run(arguments: argparse.Namespace) -> None:
    for path in sorted(STUDIES.glob("*.yaml")):
        if arguments.only and path.stem not in arguments.only:
            continue
        study = load_study(path, arguments.data)
        methods = [name for name in study.methods if not arguments.methods or name in arguments.methods]
        again = arguments.again
        # first all grids, then all reported draws
        while todo := list(missing(study, methods, by_key(read_lines(path.stem)), again)):
            again = False
            print(f"{path.stem}: {len(todo)} runs to do", flush=True)
            for line in record(path.stem, carry_out, [(task,) for task in todo], arguments.workers):
                shown = line["validation_loss"]
                print(
                    f"  {line['method']} seed {line['seed']} at {line['learning_rate']:g}: validation "
                    f"{'diverged' if shown is None else f'{shown:.3f}'}, {line.get('seconds', 0):.0f} s",
                    flush=True,
                )


# ------------------------------------------------------------------------------------------------------------- showing


class Judged(NamedTuple):
    """One reported run: its clients in a fixed order."""

    losses_K: np.ndarray
    """Test loss, nats per answer token."""
    rouge_l: float
    """Mean over clients."""
    line: Mapping[str, Any]


def judged(line: Mapping[str, Any]) -> Judged:
    names = sorted(line["clients"])
    sums = [line["clients"][name] for name in names]
    losses = np.array([loss_sum / tokens for _, loss_sum, tokens, *_ in sums])
    answered = [rouge / asked for *_, rouge, _, asked in sums if asked]
    return Judged(losses, float(np.mean(answered)) if answered else math.nan, line)


def difference(ones: Sequence[Judged], others: Sequence[Judged]) -> tuple[float, float, float]:
    """Mean paired difference of the mean losses and its 95 % interval: Student's t over draws, which are independent.

    One draw alone tells nothing about others.
    """
    gaps_D = np.array([one.losses_K.mean() - other.losses_K.mean() for one, other in zip(ones, others, strict=True)])
    middle, draws = float(gaps_D.mean()), len(gaps_D)
    if draws < 2:
        return middle, -math.inf, math.inf
    reach = float(student.ppf(0.975, draws - 1) * gaps_D.std(ddof=1)) / math.sqrt(draws)
    return middle, middle - reach, middle + reach


def chosen(study: Study) -> dict[str, tuple[float, list[Judged]]]:
    """Per name the chosen learning rate and the reported runs in the order of their draws; whole ones only."""
    reported: dict[str, tuple[float, list[Judged]]] = {}
    data: dict[Any, Any] = {}
    for name, (rate, lines) in tuned_lines(study).items():
        if not all(line.get("clients") for line in lines):
            continue
        splits = str(study.settings.get(name, {}).get("data", ""))
        for seed, line in zip(study.seeds, lines, strict=True):
            # lines of before there was a hash say nothing
            has, tested = line.get("data"), {client: of[2] for client, of in line["clients"].items()}
            same = (not has or data.setdefault((seed, splits), has) == has) and data.setdefault(seed, tested) == tested
            if not same:
                raise SystemExit(f"{study.name}, {name}, seed {seed}: not the examples of other methods")
        reported[name] = (rate, [judged(line) for line in lines])
    return reported


def tuned_lines(study: Study) -> dict[str, tuple[float, list[Mapping[str, Any]]]]:
    """Per name whose learning rate is chosen: that rate, and a line for each reported draw, empty if it is not done."""
    found, tuned = by_key(read_lines(study.name)), dict[str, tuple[float, list[Mapping[str, Any]]]]()
    for name in study.methods:
        rate, _ = choose_rate(study, name, found)
        if rate is not None:
            tasks = [task_of(study, name, seed, rate, tuning=False) for seed in study.seeds]
            tuned[name] = (rate, [found.get(task.key, {}) for task in tasks])
    return tuned


def not_shown(study: Study, reported: Iterable[str]) -> list[str]:
    """A sentence each about the names that are not among `reported` because they diverged, or are not done."""
    tuned, sentences = tuned_lines(study), []
    diverged = {
        name: [seed for seed, line in zip(study.seeds, lines, strict=True) if "diverged" in line]
        for name, (_, lines) in tuned.items()
        if name not in reported
    }
    told = [f"{name} (draws {', '.join(map(str, seeds))})" for name, seeds in diverged.items() if seeds]
    if told:
        sentences.append(f"Diverged: {', '.join(told)}.")
    absent = [name for name in study.methods if name not in reported and not diverged.get(name)]
    if absent:
        sentences.append(f"Not run yet: {', '.join(absent)}.")
    return sentences


def section(study: Study) -> str:
    """The table of one study, best first."""
    reported = chosen(study)
    if "local_only" not in reported:
        return "\n\n".join([f"## {study.name}", *not_shown(study, reported)])
    local = reported["local_only"][1]
    came_from = dict.fromkeys(of for _, runs in reported.values() for of in origins(runs))
    made = dict(zip(came_from, LETTERS, strict=False))
    header = ["method", "mean loss", "vs local_only [95 %]", "vs mira [95 %]", "worst tenth", "harmed", "Rouge-L"]
    header += ["MB up + down", "s", "learning rate", "made"]
    rows = []
    for name, (rate, runs) in sorted(reported.items(), key=lambda item: mean_loss(item[1][1])):
        worst = np.mean([worst_tenth(run.losses_K.tolist()) for run in runs])
        megabytes = np.mean([run.line["upload_bytes"] + run.line["download_bytes"] for run in runs]) / 1e6
        against_mira = "-" if name == "mira" or "mira" not in reported else interval(runs, reported["mira"][1])
        rows.append(
            [
                name,
                f"{mean_loss(runs):.3f} ({standard_error(runs):.3f})",
                "-" if name == "local_only" else interval(runs, local),
                against_mira,
                f"{worst:.3f}",
                "-" if name == "local_only" else f"{harm(runs, local):.1%}",
                f"{np.mean([run.rouge_l for run in runs]):.3f}",
                f"{megabytes:,.0f}",
                f"{np.median([run.line['seconds'] for run in runs]):,.0f}",
                f"{rate:g}",
                "".join(sorted(made[of] for of in origins(runs))),
            ]
        )
    config, compare = study.config, study.config.compare
    steps, epochs = config.training.steps_or_default, config.training.local_epochs
    work = f"{epochs} epochs" if epochs else f"{steps} steps"
    facts = (
        f"{len(local[0].losses_K)} clients, {config.federation.rounds} rounds of {work}, {compare.seeds} draws; "
        f"rates of {', '.join(f'{rate:g}' for rate in compare.learning_rates)}."
    )
    legend = "; ".join(
        f"{letter}: {commit}, {processor or 'not noted'}" for (commit, processor), letter in made.items()
    )
    hours = sum(line.get("seconds", 0.0) for line in read_lines(study.name)) / 3600
    return "\n\n".join(
        [
            f"## {study.name}",
            facts,
            markdown(header, rows, last="---"),
            f"Made by: {legend}. All runs so far, tuning among them: {hours:.1f} hours of one core.",
            *not_shown(study, reported),
        ]
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], last: str = "---:") -> str:
    """A table; the first column is left-aligned, the others right, the last as `last` says."""
    rule = ["---", *["---:"] * (len(head) - 2), last]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def origins(runs: Sequence[Judged]) -> list[tuple[str, str]]:
    """Commits and processors of the runs, each once, in their order; the first lines do not name the latter."""
    return list(dict.fromkeys((str(run.line.get("commit", "")), str(run.line.get("processor", ""))) for run in runs))


def judged_part(line: Mapping[str, Any] | None, keep: Callable[[str], bool]) -> Judged | None:
    """The clients whose names `keep` wants; None for a run that diverged or was not done."""
    if line is None or not line.get("clients"):
        return None
    return judged({**line, "clients": {name: of for name, of in line["clients"].items() if keep(name)}})


def mean_loss(runs: Sequence[Judged]) -> float:
    return float(np.mean([run.losses_K.mean() for run in runs]))


def standard_error(runs: Sequence[Judged]) -> float:
    return float(np.std([run.losses_K.mean() for run in runs], ddof=1) / math.sqrt(len(runs))) if len(runs) > 1 else 0.0


def interval(runs: Sequence[Judged], others: Sequence[Judged]) -> str:
    middle, low, high = difference(runs, others)
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def harmed(loss: float, base: float) -> bool:
    """Whether `loss` is more than 1 % above `base`, or not finite where `base` is; as `meters.share_harmed`."""
    return math.isfinite(base) and not loss <= (1 + HARM_TOLERANCE) * base


def harm(runs: Sequence[Judged], *alone: Sequence[Judged]) -> float:
    """Share of the clients that are more than 1 % worse off than with each of `alone`, draw by draw."""
    draws = [zip(*(run.losses_K for run in of_draw), strict=True) for of_draw in zip(runs, *alone, strict=True)]
    return float(np.mean([np.mean([all(harmed(loss, base) for base in bases) for loss, *bases in d]) for d in draws]))


def tasks_harmed(runs: Sequence[Judged], local: Sequence[Judged]) -> str:
    """How many tasks are more than 1 % worse off than with `local`, by the mean over their clients in all draws."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for run, base in zip(runs, local, strict=True):
        for name, loss, alone in zip(sorted(run.line["clients"]), run.losses_K, base.losses_K, strict=True):
            pairs.setdefault(run.line["clients"][name][0], []).append((loss, alone))
    means = [np.mean(of_task, axis=0) for of_task in pairs.values()]
    return f"{sum(harmed(loss, alone) for loss, alone in means)} of {len(means)}"


def aims(studies: Sequence[Study]) -> str:
    """What `mira` with its defaults should reach on each federation, and whether it did: a column for each."""
    columns = {"": list(_AIMS)}
    for study in studies:
        reported = {name: runs for name, (_, runs) in chosen(study).items()}
        if {"mira", "local_only", "fedit"} <= set(reported):
            columns[study.name] = _reached(reported, study.settings)
    return markdown(list(columns), list(zip(*columns.values(), strict=True)))


_AIMS = (
    "best method but `mira`",
    "`mira` minus it [95 %]",
    "best, or within one standard error of the paired difference",
    "the same, of the best's own mean",
    "best rival with a part of `mira` or more warm-up",
    "`mira` minus it [95 %]",
    "best of all, or within one standard error of that difference",
    "best rival that trains on the validation examples, too",
    "`mira` minus it [95 %]",
    "best, or within one standard error of that difference",
    "better than `local_only`",
    "better than `fedit`",
    "at most 2 % of the clients harmed",
    "harmed where the true graph or clusters are told",
    "harmed beside both orders of the examples alone",
    "harmed by another order of the examples alone",
    "tasks harmed",
    "tasks harmed by another order of the examples alone",
    "80 % of the gap to the true graph or clusters closed",
)


def _reached(reported: Mapping[str, list[Judged]], settings: Mapping[str, Any]) -> list[str]:
    """The cells of `_AIMS` for one federation."""
    mira, local, again = reported["mira"], reported["local_only"], reported.get("local_only-other-batches")
    of_others = [
        name
        for name in reported
        if not (name in settings and "-" in name)
        and name not in ("mira", "mira_published-true", "oracle_clusters", "centralised")
        and not name.startswith("mira-")
    ]

    def lowest(names: Sequence[str]) -> str:
        return min(names, key=lambda name: mean_loss(reported[name]))

    best = lowest([name for name in of_others if "-" not in name])
    own_error = standard_error(reported[best])

    def verdict(holds: bool) -> str:
        return "met" if holds else "missed"

    def within_error(name: str) -> str:
        gaps = [m.losses_K.mean() - b.losses_K.mean() for m, b in zip(mira, reported[name], strict=True)]
        error = float(np.std(gaps, ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else 0.0
        return f"{verdict(float(np.mean(gaps)) <= error)} ({error:.3f})"

    def against(name: str) -> str:
        low, high = difference(mira, reported[name])[1:]
        clear = "" if high < 0 or low > 0 else ", not clear"
        return f"{verdict(mean_loss(mira) < mean_loss(reported[name]))}{clear}: {interval(mira, reported[name])}"

    def against_lowest(names: Sequence[str]) -> list[str]:
        """Who of `names` is lowest, the difference to it, and the verdict on that."""
        if not names:
            return ["-"] * 3
        rival = lowest(names)
        return [rival, interval(mira, reported[rival]), within_error(rival)]

    oracles = [name for name in ("mira-true", "mira-labels", "oracle_clusters") if name in reported]
    gains = {name: mean_loss(local) - mean_loss(reported[name]) for name in ("mira", *oracles)}
    closed = {name: gains["mira"] / gains[name] for name in oracles if gains[name] > 0}
    return [
        *against_lowest([best]),
        f"{verdict(mean_loss(mira) - mean_loss(reported[best]) <= own_error)} ({own_error:.3f})",
        *against_lowest([name for name in of_others if "-" in name]),
        *against_lowest([name for name in reported if name.endswith("-all-labels")]),
        against("local_only"),
        against("fedit"),
        f"{verdict(harm(mira, local) <= 0.02)}: {harm(mira, local):.1%}",
        "; ".join(f"{harm(reported[name], local):.1%} by {name}" for name in oracles) or "-",
        f"{harm(mira, local, again):.1%}" if again else "-",
        f"{harm(again, local):.1%}" if again else "-",
        tasks_harmed(mira, local),
        tasks_harmed(again, local) if again else "-",
        "; ".join(f"{verdict(share >= 0.8)}: {share:.0%} of {name}" for name, share in closed.items()) or "-",
    ]


_ADVANCES = {
    "(3) no choice: everybody keeps its mixture": "mira-no-choice",
    "(3) each client trusts its own examples alone": "mira-own-answers",
    "(3) choice without tolerance for the start": "mira-all-tolerated",
    "(3) five shares to choose from": "mira-five-shares",
    "(3) the last answer alone, no average: never worse on validation examples": "mira-guarantee",
    "no average over rounds": "mira-no-average",
    "the average whatever clients say": "mira-always-average",
    "neither choice nor average": "mira-bare",
    "neighbours of other clusters count too": "mira-all-neighbours",
    "a graph for each block": "mira-layers",
    "a graph that remembers": "mira-memory",
    "what is learned counts in full from the first round on": "mira-no-warmup",
    "graph: clusters": "mira-clusters",
    "graph: smooth (Kalofolias)": "mira-kalofolias",
    "graph: task covariance (MTRL)": "mira-mtrl",
    "graph: validation trust": "mira-trust",
    "graph: embeddings of prompts": "mira-embeddings",
    "graph: agreement of predictions": "mira-probe",
    "graph: the rows of pFedGraph": "mira-pfedgraph",
    "graph: random": "mira-random",
    "graph: everybody with everybody": "mira-uniform",
    "graph: the true one, shuffled": "mira-permuted",
    "graph: the labels; the true one, tuned anew": "mira-labels mira-true",
    "(1) a quarter of the clients a round, and absent ones never fade; fade faster, against `mira-sampled`": (
        "mira-sampled-no-decay mira-sampled-forgetful vs mira-sampled"
    ),
    "(1) every adapter counts the same, however many examples trained it": "mira-equal-confidence",
    "strength 1; 4": "mira-strength-1 mira-strength-4",
    "(2) strength chosen in the run": "mira-auto",
    "(2) deep blocks more personal": "mira-depth",
    "(4) mixed as products": "mira-products",
    "(4) mixed by least squares": "mira-least-squares",
    "(4) one A that nobody trains, tuned anew; without choice": "mira-shared-a mira-shared-a-asks-nobody",
    "(4) rank 2; 4; 16; 32, tuned anew": "mira-rank-2 mira-rank-4 mira-rank-16 mira-rank-32",
    "(4) ranks 2, 8 and 32 in turn, tuned anew; mixed as factors": "mira-ranks-mixed mira-ranks-mixed-factors",
    "(5) clipped; without Krum's outliers; geometric median": "mira-clip mira-krum mira-median",
    "moments that stay with clients": "mira-moments",
    "(6) bf16 up; int8 up; int8 both ways": "mira-bf16 mira-int8 mira-int8-both-ways",
    "(6) top 10 % up; 3 %; 1 %; 10 % up and int8 down": "mira-top-10 mira-top-3 mira-top-1 mira-top-10-both-ways",
    "(7) noise of NOISES, tuned anew, against one A that nobody trains without choice": (
        "mira-private-weak mira-private mira-private-full vs mira-shared-a-asks-nobody"
    ),
}
"""What is changed, and the names of the runs that do it; `vs` whom they are compared with, if not with `mira`."""


def noises(studies: Sequence[Study]) -> str:
    """What the noisy runs promise, by the project's own accountant: each client sends an upload a round."""
    from fedmira.exchange.privacy import epsilon

    study = next(study for study in studies if "mira-private" in study.settings)
    rounds, told = study.config.federation.rounds, []
    for name in ("mira-private-weak", "mira-private", "mira-private-full"):
        noise = float(study.settings[name]["exchange"]["privacy"]["noise_multiplier"])
        delta = study.config.exchange.privacy.delta
        told.append(f"{noise:g} C (epsilon {epsilon(rounds, noise, delta):,.0f})")
    return "; ".join(told)


def advances(studies: Sequence[Study]) -> str:
    """The table of what each part of `mira`, and each that is off by default, changes on each federation."""
    all_runs = {study.name: {name: runs for name, (_, runs) in chosen(study).items()} for study in studies}
    runs_of = {study: runs for study, runs in all_runs.items() if runs}
    rows = []
    for changed, wanted in _ADVANCES.items():
        names, _, reference = wanted.partition(" vs ")
        cells = [
            "; ".join(
                _change(reported, name, reference or "mira") if {name, reference or "mira"} <= set(reported) else "-"
                for name in names.split()
            )
            for reported in runs_of.values()
        ]
        label = changed.replace("NOISES", noises(studies)) if "NOISES" in changed else changed
        rows.append([label, *("-" if set(cell) <= set("-; ") else cell for cell in cells)])
    return markdown(["changed", *runs_of], rows)


def _change(reported: Mapping[str, list[Judged]], name: str, reference: str) -> str:
    share = harm(reported[name], reported["local_only"])
    return f"{interval(reported[name], reported[reference])} ({share:.0%})"


_CHANGED = """## Which parts pay

Loss with one thing changed minus loss of `mira` with its defaults: what is above 0 pays to leave as it is, what is
below would pay to change; in brackets the share of clients harmed. All run at `mira`'s learning rate but what is said
to be tuned anew. Where an interval holds 0, these draws do not tell. Rows with a number belong to an advance over MIRA:
1 confidence in stored adapters, 2 strength, 3 validated mixing, 4 mixing as products and ranks, 5 robust neighbours, 6
smaller messages, 7 privacy. What is on by default is what a row takes away; 4, 5, 6 and 7 are off, and so is a strength
that is chosen in the run or falls with depth. Validated mixing and the average over rounds are on because nothing shows
that they cost where they do not pay."""

_PICTURE = """## What smaller messages cost

Planted tasks; one standard error over draws; made by `python tools/methods_picture.py`.

![Loss of mira against the bytes that cross, by compression](bytes.svg)"""


def page(_arguments: argparse.Namespace) -> None:
    studies = [load_study(path, None) for path in sorted(STUDIES.glob("*.yaml"))]
    opening, ending = ((STUDIES / f"{name}.md").read_text("utf-8").rstrip() for name in ("methods", "methods_made"))
    tables = map(section, studies)
    print("\n\n".join([opening, aims(studies), _CHANGED, advances(studies), *tables, _PICTURE, ending]))


def print_side_page(name: str, table: Sequence[Sequence[str]], lines: Iterable[Mapping[str, Any]]) -> None:
    """Print the page of a study that builds on this one: its words, its table, and who made the `lines` in it."""
    print((STUDIES / f"{name}.md").read_text("utf-8").rstrip() + "\n")
    print(markdown(table[0], table[1:]))
    made = sorted({(line["commit"], line["processor"]) for line in lines})
    print("\nRuns made by " + ", ".join(f"{commit} ({processor})" for commit, processor in made) + ".")


def side_main(
    words: str | None,
    names: Sequence[str],
    run: Callable[[argparse.Namespace], None],
    page: Callable[[argparse.Namespace], None],
) -> None:
    """The command line of a study that builds on this one: `run` with methods and workers, and `page`."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run_parser = commands.add_parser("run")
    run_parser.add_argument("--methods", nargs="+", metavar="NAME", choices=names)
    run_parser.add_argument("--workers", type=int, default=1)
    run_parser.set_defaults(function=run)
    commands.add_parser("page").set_defaults(function=page)
    arguments = parser.parse_args()
    arguments.function(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", type=Path, help="folder that relative data paths are below")
    runs.add_argument("--only", nargs="+", metavar="STUDY")
    runs.add_argument("--methods", nargs="+", metavar="NAME")
    runs.add_argument("--again", action="store_true", help="repeat reported draws, so that all are of one version")
    runs.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)))
    runs.set_defaults(do=run)
    commands.add_parser("page").set_defaults(do=page)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    # one thread a run: two runs side by side are faster than one on two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
