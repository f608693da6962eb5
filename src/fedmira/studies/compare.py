"""Many methods on the same draws: every method meets the same clients, initial adapters and batches, seed by seed.

Learning rates are tried for every method alike, on a draw of their own and on validation data only; all runs of a study
were tuned by the rates and the draw that its `config.resolved.yaml` names. A comparison can be stopped and started
again: finished runs are kept, an unfinished one continues. Knows nothing about how a run works.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmira.assembly import assemble
from fedmira.config.file import config_difference, parse_resolved, resolved_yaml
from fedmira.config.method import METHOD_NAMES
from fedmira.config.refusals import refusal, refusal_beside, refusal_of_dtype
from fedmira.config.run import RunConfig
from fedmira.errors import (
    ConfigError,
    DataError,
    DivergedError,
    FedmiraError,
    IntegrityError,
    Interrupted,
    ParticipationError,
    UsageError,
)
from fedmira.experiment import Display, SilentDisplay, carry_out
from fedmira.joining import known_clients, refuse_newcomers, refuse_other_data
from fedmira.paths import home_expanded
from fedmira.runs.atomic import make_folder, write_bytes_atomically
from fedmira.runs.lock import locked
from fedmira.runs.manifest import MANIFEST
from fedmira.runs.naming import run_directory
from fedmira.runs.same_base import recorded_commit, refuse_other_base, refuse_other_dtype
from fedmira.runs.signals import StopFlag, stop_on_signals
from fedmira.runs.store import RunStore, has_run

STUDY, RESOLVED = "study.json", "config.resolved.yaml"
SHOWN = 5
"""Differing keys that a refusal lists."""
FAILURES = (DivergedError, ParticipationError)
"""What ends one run of a comparison and not the others."""


def compare(
    config: RunConfig, *, directory: str | os.PathLike[str] | None = None, display: Display | None = None
) -> Path:
    """Run every method of `config.compare` on every seed and return the study's directory.

    Writes `study.json` (which runs there are, what was tuned, what failed) and one run directory per method and seed
    below `runs/`. A run that diverges, or that has too few clients, is told to `display` and left out; the others go
    on. Methods and seeds of earlier calls in the same directory stay in the study; where other learning rates are
    tried than before, it begins anew.

    Args:
        config: The run; `compare` says which methods, seeds and learning rates.
        directory: The study's directory; by default a folder under `output.directory` named after the config.
        display: Told about progress.

    Raises:
        ConfigError: settings would be chosen on a draw that is reported, or on no validation data; a method cannot use
            the config's adapters; or nobody would be tested.
        UsageError: the directory is one of a run, of a study of another config, or of one that tried other learning
            rates for methods that would stay, or holds something else; or another process writes it.
        DivergedError, ParticipationError: a method has no learning rate at which it trains, or a run failed; when
            everything else is done, with all that failed in the message and the kind of the first.
        Interrupted: SIGINT, SIGTERM or SIGHUP; everything is saved, the same call goes on.
    """
    directory = study_directory(config) if directory is None else Path(directory)
    refuse(config, directory)
    display = _WarnsOnce(display or SilentDisplay())
    make_folder(directory)
    with locked(directory), stop_on_signals() as stop:
        failures = _Comparison(config, directory, display, stop).carry_out()
    if failures:
        first = next(iter(failures.values()))
        raise type(first)("\n".join(f"{what}: {error}" for what, error in failures.items()))
    return directory


def refuse(config: RunConfig, directory: Path) -> None:
    """Refuse a comparison that could not be made in `directory`; errors as in `compare`."""
    _refuse_unusable(config)
    _refuse_biased_tuning(config)
    _refuse_what_is_no_study(directory)
    _refuse_other_study(config, directory)


class _WarnsOnce:
    """Passes on what the runs of a study tell. A warning that holds for all of them is said by the first alone."""

    def __init__(self, display: Display) -> None:
        self.start, self.step, self.round, self.finish = display.start, display.step, display.round, display.finish
        self._display, self._said = display, set[str]()

    def message(self, line: str) -> None:
        if line.startswith("warning: "):
            if line in self._said:
                return
            self._said.add(line)
        self._display.message(line)


class _Comparison:
    """The runs of a comparison, one after the other, and `study.json`, which says where they stand."""

    def __init__(self, config: RunConfig, directory: Path, display: Display, stop: StopFlag) -> None:
        self.config, self.directory, self.display, self.stop = config, directory, display, stop
        self.failures: dict[str, FedmiraError] = {}
        """What failed, by the method, or the method and the seed."""
        before = _config_of_study(directory)
        self.anew = before is not None and _tuned_by(before) != _tuned_by(config)
        """Whether other rates are tried than before, so that nothing of earlier calls can stand beside these runs."""
        runs, tuning = ([], []) if self.anew else _earlier(directory)
        self.study: dict[str, Any] = {
            "name": config.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "methods": list(config.compare.methods),
            "seeds": list(range(config.seed, config.seed + config.compare.seeds)),
            "runs": runs,
            "tuning": tuning,
            "failures": [],
        }

    def carry_out(self) -> dict[str, FedmiraError]:
        """Tune and run every method, and return what failed."""
        if self.anew:
            self.display.message(
                "other learning rates are tried than before, so the study begins anew; earlier runs stay on disk"
            )
        self._refuse_other_inputs()
        # in this order: stopped in between, no runs stand beside rates that did not tune them
        self._write()
        write_bytes_atomically(self.directory / RESOLVED, resolved_yaml(self.config).encode())
        rates: dict[str, float] = {}
        for name in self.study["methods"]:
            try:
                rates[name] = self._choose_learning_rate(name)
            except FAILURES as error:
                self._leave_out(name, error)
        wanted = {
            (seed, name): variant(self.config, name, seed, rates[name])
            for seed in self.study["seeds"]
            for name in rates
        }
        paths = {key: self._path(one) for key, one in wanted.items()}
        others = self._others(rates)
        # runs that an earlier call finished stand in the study while this one comes by them
        finished = {entry["path"] for entry in self.study["runs"]}
        there = {key for key, path in paths.items() if path in finished}
        for (seed, name), one in wanted.items():
            try:
                self._run(one, "runs")
                there.add((seed, name))
            except FAILURES as error:
                there.discard((seed, name))
                self._leave_out(f"{name} seed {seed}", error)
            self.study["runs"] = others + [
                {"method": of, "seed": draw, "path": paths[draw, of], "learning_rate": rates[of]}
                for draw, of in wanted
                if (draw, of) in there
            ]
            self._write()
        return self.failures

    def _refuse_other_inputs(self) -> None:
        """Refuse to go on where files changed: runs that stay would stand beside new ones over other data."""
        for path in (self.directory / entry["path"] for entry in self.study["runs"]):
            try:
                store = RunStore.open(path)
                manifest = store.manifest()
            except FedmiraError:
                # all were made from the same files, so whichever can be read tells
                continue
            known = known_clients(manifest)
            if not known:
                continue
            parts = assemble(store.config, known=known, commit=recorded_commit(manifest))
            try:
                refuse_other_data(manifest, parts)
                refuse_newcomers(known, parts)
                refuse_other_base(path, manifest["model"], parts.base)
                refuse_other_dtype(path, manifest["model"], parts.base)
            except IntegrityError as error:
                raise IntegrityError(
                    f"{self.directory} holds runs that new ones could not be compared with: {error}. To compare all "
                    "methods as things are now, give another --out"
                ) from error
            return

    def _path(self, config: RunConfig) -> str:
        return str(run_directory(config, self.directory / "runs").relative_to(self.directory))

    def _others(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """Earlier runs that are not asked for anew: other methods, and other seeds of runs that are made alike."""
        kept = []
        for entry in self.study["runs"]:
            name, seed = entry["method"], entry["seed"]
            if name not in self.study["methods"]:
                kept.append(entry)
            elif name in rates and seed not in self.study["seeds"]:
                alike = variant(self.config, name, seed, rates[name])
                kept += [entry] if self._path(alike) == entry["path"] else []
        return kept

    def _choose_learning_rate(self, method: str) -> float:
        """The rate of the grid with the lowest mean validation loss after the last round, on the tuning draw."""
        config = self.config
        grid = rates_to_try(config)
        others = [entry for entry in self.study["tuning"] if entry["method"] != method]
        tried = {entry["learning_rate"]: entry for entry in self.study["tuning"] if entry["method"] == method}
        if len(grid) == 1:
            self.study["tuning"] = others
            return grid[0]
        losses: dict[float, float] = {}
        for rate in grid:
            trial = variant(config, method, config.compare.tuning_seed, rate, tuning=True)
            try:
                losses[rate] = final_validation_loss(self._run(trial, "tuning"))
            except DivergedError as error:
                losses[rate] = math.inf
                self.display.message(f"{method} at learning rate {rate:g}: {error}")
            loss = losses[rate] if math.isfinite(losses[rate]) else None
            tried[rate] = {"method": method, "learning_rate": rate, "validation_loss": loss}
            self.study["tuning"] = others + [tried[one] for one in grid if one in tried]
            self._write()
        if not any(map(math.isfinite, losses.values())):
            raise DivergedError(
                f"{method} diverges at every learning rate of compare.learning_rates "
                f"({', '.join(f'{rate:g}' for rate in grid)}); add lower ones"
            )
        return min(grid, key=lambda rate: losses[rate])

    def _run(self, config: RunConfig, folder: str) -> Path:
        if self.stop():
            raise Interrupted(
                f"stopped by {self.stop.signal_name} between two runs; everything is saved in {self.directory}. "
                "Start it again to continue",
                self.stop.signal_number,
            )
        store = RunStore.open_or_create(config, resolved_yaml(config), self.directory / folder)
        return carry_out(store, self.display, stop=self.stop, commit=_commit_of(self.directory))

    def _leave_out(self, what: str, error: FedmiraError) -> None:
        self.failures[what] = error
        self.study["failures"] = [{"run": name, "error": str(reason)} for name, reason in self.failures.items()]
        self._write()
        self.display.message(f"{what} is left out: {error}")

    def _write(self) -> None:
        write_bytes_atomically(self.directory / STUDY, (json.dumps(self.study, indent=1) + "\n").encode())


def _refuse_what_is_no_study(directory: Path) -> None:
    if (directory / STUDY).exists() or not directory.exists():
        return
    if has_run(directory):
        raise UsageError(f"{directory} holds a run, which a comparison would overwrite; give another --out")
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a folder; give another --out")
    # a study that was stopped before it was written down has at most these, and what writing leaves behind
    others = [path.name for path in directory.iterdir() if path.name != RESOLVED and not path.name.startswith(".")]
    if others:
        raise UsageError(f"{directory} holds something else ({sorted(others)[0]}); give a new folder with --out")


def _refuse_other_study(config: RunConfig, directory: Path) -> None:
    """Refuse a folder whose study would be overwritten by runs that cannot be compared with those in it.

    Other methods, variants and seeds of `compare` are the same study going on. So are other learning rates if every
    method of the study is asked for, as all are tuned anew then.
    """
    before = _config_of_study(directory)
    if before is None:
        return
    differences = [line for line in config_difference(before, config) if not line.startswith("seed: ")]
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:SHOWN])
        more = f"\n  ... ({len(differences)} in all)" if len(differences) > SHOWN else ""
        raise UsageError(
            f"{directory} holds a study of another config, which this one would overwrite:{shown}{more}\n"
            "Give another --out for a new study, or put these values back to go on with that one."
        )
    runs, _ = _earlier(directory)
    staying = dict.fromkeys(entry["method"] for entry in runs if entry["method"] not in config.compare.methods)
    if staying and _tuned_by(before) != _tuned_by(config):
        raise UsageError(
            f"{directory} holds runs of {', '.join(staying)}, for which other learning rates were tried; a "
            "comparison is fair only if every method is given the same:\n"
            f"  there: {_rates_in_words(before)}\n  here: {_rates_in_words(config)}\n"
            "Put these values back to go on with that study, give another --out for a new one, or name these methods "
            "in compare.methods too, so that all are tuned anew."
        )


def _config_of_study(directory: Path) -> RunConfig | None:
    """The config that the study in `directory` was last carried out with; None where there is none."""
    path = directory / RESOLVED
    if not (directory / STUDY).exists() or not path.exists():
        return None
    try:
        return parse_resolved(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError) as error:
        raise IntegrityError(f"{path} is damaged or was written by another version of fedmira: {error}") from error


def rates_to_try(config: RunConfig) -> tuple[float, ...]:
    """The learning rates that every method is tried at; one alone is used untried."""
    return tuple(dict.fromkeys(config.compare.learning_rates)) or (config.training.learning_rate,)


def _tuned_by(config: RunConfig) -> tuple[list[float], int | None]:
    """All that must be the same for methods of one study: the rates, and the draw they are tried on if there is one."""
    grid = sorted(rates_to_try(config))
    return grid, config.compare.tuning_seed if len(grid) > 1 else None


def _rates_in_words(config: RunConfig) -> str:
    grid, draw = _tuned_by(config)
    if draw is None:
        key = "compare.learning_rates" if config.compare.learning_rates else "training.learning_rate"
        return f"{key} = {grid[0]:g} for every method"
    return f"compare.learning_rates = [{', '.join(f'{rate:g}' for rate in grid)}], compare.tuning_seed = {draw}"


def _earlier(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs that earlier calls wrote down and that are still there, and what was tuned for them.

    Raises:
        IntegrityError: what they wrote is damaged; to go on would take methods out of the study without a word.
    """
    if not os.path.lexists(directory / STUDY):
        return [], []
    try:
        study = json.loads((directory / STUDY).read_text(encoding="utf-8"))
        runs = [
            {field: entry[field] for field in ("method", "seed", "path", "learning_rate")}
            for entry in study["runs"]
            if (directory / entry["path"]).is_dir()
        ]
        tuning = [
            {field: entry[field] for field in ("method", "learning_rate", "validation_loss")}
            for entry in study["tuning"]
        ]
        return runs, tuning
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{directory / STUDY} is damaged ({error!r}): which methods were compared is not known any more. Restore "
            "it from a copy, or give another --out"
        ) from error


def failures_of(directory: Path) -> list[dict[str, str]]:
    """What failed when the study in `directory` was last carried out: `run`, a method or a method and seed; `error`."""
    failures: list[dict[str, str]] = json.loads((directory / STUDY).read_text(encoding="utf-8"))["failures"]
    return failures


def _commit_of(directory: Path) -> str | None:
    """The commit of a base of the hub that the runs of a study are over: those that follow are over it too."""
    for path in directory.glob(f"*/*/{MANIFEST}"):
        with suppress(FedmiraError):
            # all are over one base, so whichever can be read tells
            return recorded_commit(RunStore.open(path.parent).manifest())
    return None


def study_directory(config: RunConfig) -> Path:
    """Where the comparison of `config` is kept if nobody says otherwise."""
    digest = hashlib.sha256(resolved_yaml(config).encode()).hexdigest()[:8]
    return home_expanded(config.output.directory) / f"{config.name}-compare-{digest}"


def variant(config: RunConfig, method: str, seed: int, learning_rate: float, *, tuning: bool = False) -> RunConfig:
    """The run of one method: `config` with that method, seed and learning rate.

    Tuning judges nothing on its own draw's test data. Draws split the same files anew, so examples that a reported draw
    tests may be among those that a tuning draw trains and validates on, for all methods alike.
    """
    settings = config.method_named(method)
    changes: dict[str, Any] = {
        "name": config.name if method == settings.name else method,
        "seed": seed,
        "method": settings,
        "training": config.training.model_copy(update={"learning_rate": learning_rate}),
    }
    if tuning:
        rounds = config.federation.rounds
        changes["evaluation"] = config.evaluation.model_copy(update={"test": False, "every": rounds})
    return config.model_copy(update=changes)


def _refuse_unusable(config: RunConfig) -> None:
    """Not a rule of the config: `fedmira run` reads the same file and does not look at this section."""
    for name, settings in config.compare.variants.items():
        # tables and reports take what is called local_only for training alone
        if name in METHOD_NAMES and settings.name != name:
            raise ConfigError(
                f"compare.variants.{name} is called like a method, but has name = {settings.name}; call it something "
                f"else, such as {settings.name}-2, or use name: {name}"
            )
    for name in config.compare.methods:
        method, ranks = config.method_named(name), bool(config.model.adapter.client_ranks)
        if reason := (
            refusal(method, config.model.adapter.kind)
            or refusal_beside(method, config.exchange, ranks, config.training.keep_moments)
            or refusal_of_dtype(method, config.model.dtype)
        ):
            raise ConfigError(f"compare.methods names {name}: {reason}")
    if not config.evaluation.test:
        raise ConfigError("evaluation.test = false leaves nothing to compare methods by; set it to true")


def _refuse_biased_tuning(config: RunConfig) -> None:
    """Not a rule of the config: every run of a study, the tuning runs among them, carries the study's section."""
    section = config.compare
    if len(rates_to_try(config)) < 2:
        return
    if config.seed <= section.tuning_seed < config.seed + section.seeds:
        raise ConfigError(
            f"compare.tuning_seed = {section.tuning_seed} is one of the seeds that are reported, {config.seed} to "
            f"{config.seed + section.seeds - 1}; settings must be chosen on another draw"
        )
    if config.data.partition.validation == 0 and not getattr(config.data, "split_field", None):
        raise ConfigError(
            "compare.learning_rates is a grid, but data.partition.validation = 0 leaves nothing to choose by; "
            "set it to 0.15, for example, or give one learning rate"
        )


def final_validation_loss(path: Path) -> float:
    """Mean over clients of the last recorded validation loss per supervised token; infinite if it is not finite.

    Raises:
        DataError: no client has validation examples.
    """
    with RunStore.open(path) as store:
        last = [event for event in store.events() if event["event"] == "evaluation"][-1]
    losses = [
        client["loss_sum"] / client["tokens"] if client["loss_sum"] is not None else math.inf
        for client in last["clients"].values()
        if client["tokens"]
    ]
    if not losses:
        raise DataError(
            f"no client of {path} has validation examples to choose a learning rate by; hold some out "
            "(data.partition.validation, data.split_field) or give one learning rate"
        )
    return sum(losses) / len(losses)
