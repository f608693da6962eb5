"""Reads a run directory or a study directory back into values; writes nothing.

Everything read here may be hostile (names come from data files), so this module only parses; whoever shows a text
escapes it. Knows nothing about tables, charts or pages.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedmira.errors import IntegrityError, UsageError
from fedmira.evaluation.meters import ClientRecord, Mean, mean
from fedmira.runs.lines import read_events, recorded_epsilon
from fedmira.runs.manifest import MANIFEST, refuse_other_schema
from fedmira.runs.store import no_finished_round
from fedmira.runs.telling import read_left_out

REFERENCE_METHOD = "local_only"
"""The method that every client is compared with."""
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What reading something raises that no run and no comparison writes."""


@dataclass(frozen=True)
class GraphRecord:
    """The graph a run was last mixed with, over all K clients."""

    names: tuple[str, ...]
    adjacency: tuple[tuple[float, ...], ...]
    name: str
    provenance: Mapping[str, Any]
    true_adjacency: tuple[tuple[float, ...], ...] | None
    """The graph the data was made from, where it is known."""
    blocks: Mapping[str, tuple[tuple[float, ...], ...]]
    """Where layers are mixed on graphs of their own: those of some blocks, by the block's name; else empty."""


@dataclass(frozen=True)
class RunRecord:
    """What one run directory holds."""

    path: Path
    method: str
    """The name of the method, or of its variant in a comparison."""
    seed: int
    config: Mapping[str, Any]
    config_text: str
    manifest: Mapping[str, Any]
    graph: GraphRecord | None
    rounds: tuple[Mapping[str, Any], ...]
    """Events `round`, one per round, ascending."""
    evaluations: tuple[Mapping[str, Any], ...]
    """Events `evaluation`, one per evaluated round, ascending."""
    final: Mapping[str, Any] | None
    """The event `final`; None in a run that is not finished or was not judged on test data."""
    ended_by: Mapping[str, str]
    """Why results were left out, by client, of the round after the last one in `rounds`: of that one nothing came."""

    @functools.cached_property
    def records(self) -> tuple[ClientRecord, ...]:
        """The clients on their test examples, in the run's order; empty without a final event."""
        if self.final is None:
            return ()
        return tuple(
            ClientRecord(
                name=name,
                task=str(values.get("task", "")),
                category=str(values.get("category", "")),
                loss_sum=number(values["loss_sum"]),
                tokens=int(values["tokens"]),
                rouge_l_sum=number(values.get("rouge_l_sum", 0.0)),
                exact_match_sum=number(values.get("exact_match_sum", 0.0)),
                generated=int(values.get("generated", 0)),
            )
            for name, values in self.final["clients"].items()
        )

    @functools.cached_property
    def mean_loss(self) -> float | None:
        """Test loss per supervised token, nats, unweighted over the clients; None where nothing was judged."""
        return mean(loss for record in self.records if (loss := record.loss.value) is not None)

    @property
    def next_round(self) -> int:
        return _next_round(self.rounds)

    @property
    def joined_after(self) -> dict[str, int]:
        """The last round without them, of the clients that joined later."""
        clients = self.manifest.get("clients", ())
        return {str(client["name"]): int(client["joined_after"]) for client in clients if "joined_after" in client}

    @property
    def num_test_examples(self) -> dict[str, int]:
        """Held by each client, by its name; clients of which nothing was written down are missing."""
        clients = self.manifest.get("clients", ())
        return {str(client["name"]): int(client["test"]) for client in clients if client.get("test") is not None}

    @functools.cached_property
    def epsilon(self) -> dict[str, float]:
        """What each client has given away after its last upload, by its name; empty where nothing was noised."""
        return recorded_epsilon(self.rounds)

    @property
    def largest_epsilon(self) -> float | None:
        """Of any client; None where nothing was noised."""
        return max(self.epsilon.values(), default=None)

    @property
    def delta(self) -> float | None:
        """The delta that epsilon is counted at; None where nothing was noised."""
        return next((float(event["privacy"]["delta"]) for event in self.rounds if event.get("privacy")), None)

    @property
    def max_answers(self) -> int | None:
        """Test examples per client that were answered, at most; None where all were."""
        return self._generation("examples_per_client")

    @property
    def max_answer_tokens(self) -> int | None:
        """Where an answer was cut, tokens; None where the config does not say."""
        return self._generation("max_new_tokens")

    def _generation(self, key: str) -> int | None:
        value = self.config.get("evaluation", {}).get("generation", {}).get(key)
        return None if value is None else int(value)

    @property
    def is_reference(self) -> bool:
        """Whether the clients trained alone."""
        return self.method == REFERENCE_METHOD

    @property
    def upload_bytes(self) -> int:
        return sum(int(event["upload_bytes"]) for event in self.rounds)

    @property
    def download_bytes(self) -> int:
        return sum(int(event["download_bytes"]) for event in self.rounds)

    @property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        """Everything that was recorded and took time."""
        return (*self.rounds, *self.evaluations, *([self.final] if self.final else []))

    @property
    def seconds(self) -> float:
        """Training, merging and evaluating, without loading."""
        return math.fsum(seconds_of(event, kind) for event in self.events for kind in ("train", "merge", "evaluate"))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens read while training, over the seconds of training; None before the first round."""
        tokens = sum(int(event.get("tokens", 0)) for event in self.rounds)
        seconds = math.fsum(seconds_of(event, "train") for event in self.rounds)
        return tokens / seconds if tokens and seconds else None

    @property
    def peak_memory_bytes(self) -> int:
        """Of training, mixing, evaluating and saving, without loading."""
        return max((int(event.get("timing", {}).get("peak_memory_bytes") or 0) for event in self.events), default=0)

    def validation_losses(self) -> dict[str, list[tuple[int, float]]]:
        """Per client, in the run's order: (round, validation loss per supervised token, nats)."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for event in self.evaluations:
            for name, values in event["clients"].items():
                loss = Mean(number(values["loss_sum"]), int(values["tokens"])).value
                if loss is not None:
                    curves.setdefault(name, []).append((int(event["round"]), loss))
        return curves

    def mean_validation_losses(self) -> list[tuple[int, float]]:
        """(round, validation loss), unweighted over the clients."""
        by_round: dict[int, Mean] = {}
        for curve in self.validation_losses().values():
            for round_, loss in curve:
                by_round[round_] = by_round.get(round_, Mean()) + Mean(loss, 1)
        return [(round_, found.value) for round_, found in sorted(by_round.items()) if found.value is not None]

    def last_validation_loss(self) -> float | None:
        """That mean after the last evaluated round; None before the first."""
        curve = self.mean_validation_losses()
        return curve[-1][1] if curve else None

    def lowest_validation_loss(self) -> tuple[int, float] | None:
        """(round, validation loss) of the mean's minimum over rounds that judged the same clients as the last one."""
        everybody_there = max(self.joined_after.values(), default=0)
        known = [
            point for point in self.mean_validation_losses() if point[0] > everybody_there and math.isfinite(point[1])
        ]
        return min(known, key=lambda point: point[1], default=None)


@dataclass(frozen=True)
class StudyRecord:
    """What one study directory holds: many runs, method by method on paired seeds."""

    path: Path
    name: str
    created: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[RunRecord, ...]
    learning_rates: Mapping[str, float]
    """The rate each method ran with."""
    tuning: tuple[Mapping[str, Any], ...]
    """(method, learning_rate, validation_loss) of every rate that was tried."""

    def of(self, method: str) -> tuple[RunRecord, ...]:
        """The runs of one method, by seed."""
        return tuple(sorted((run for run in self.runs if run.method == method), key=lambda run: run.seed))

    def rates_tried(self, method: str) -> dict[float, float]:
        """The rates that one method was tried at, in ascending order, each with its validation loss; nan if lost."""
        losses = {float(e["learning_rate"]): e["validation_loss"] for e in self.tuning if str(e["method"]) == method}
        return {rate: math.nan if losses[rate] is None else float(losses[rate]) for rate in sorted(losses)}

    def best_at_edge(self, method: str) -> bool:
        """Whether the rate that one method ran with is the lowest or the highest of several that were tried."""
        rates = list(self.rates_tried(method))
        return len(rates) > 1 and self.learning_rates.get(method) in (rates[0], rates[-1])

    @functools.cached_property
    def shared_seeds(self) -> tuple[int, ...]:
        """The seeds on which every method that has test numbers has them; empty where there is none."""
        judged = [{run.seed for run in runs if run.records} for runs in map(self.of, self.methods)]
        return tuple(sorted(set.intersection(*found))) if (found := [seeds for seeds in judged if seeds]) else ()

    def compared(self, method: str) -> tuple[RunRecord, ...]:
        """The judged runs of one method on the shared seeds; all its judged runs where no seed is shared."""
        judged = tuple(run for run in self.of(method) if run.records)
        return tuple(run for run in judged if run.seed in self.shared_seeds) or judged

    def reference(self, seed: int) -> RunRecord | None:
        """The judged run of `local_only` on the same draw."""
        return next((run for run in self.runs if run.seed == seed and run.is_reference and run.records), None)

    def differences(self, method: str) -> dict[int, float]:
        """Mean test loss of the compared runs of `method` minus that of `local_only`, by seed; empty for that itself.

        Only on seeds where `local_only` has a finite one: nothing can be compared with another, and other seeds still
        say something.
        """
        found: dict[int, float] = {}
        for run in () if method == REFERENCE_METHOD else self.compared(method):
            alone = reference.mean_loss if (reference := self.reference(run.seed)) else None
            if run.mean_loss is not None and alone is not None and math.isfinite(alone):
                found[run.seed] = run.mean_loss - alone
        return found


def read(path: Path) -> RunRecord | StudyRecord:
    """The run or the study in `path`.

    Raises:
        UsageError: `path` is neither, or a run that has not begun its first round.
        IntegrityError: one of its files is missing or damaged.
    """
    if (path / "study.json").is_file():
        return read_study(path)
    if (path / "metrics.jsonl").is_file():
        return read_run(path)
    what = "does not exist" if not path.exists() else "holds neither metrics.jsonl (a run) nor study.json (a study)"
    raise UsageError(f"{path} {what}; give the folder that `fedmira run` or `fedmira compare` printed")


def read_study(path: Path) -> StudyRecord:
    """The study in `path`; errors as in `read`. Runs whose folder is gone count as missing."""
    study = _json(path / "study.json")
    try:
        entries = [entry for entry in study["runs"] if (path / entry["path"]).is_dir()]
        runs = tuple(
            read_run(path / entry["path"], method=entry["method"], seed=int(entry["seed"])) for entry in entries
        )
        record = StudyRecord(
            path=path,
            name=str(study.get("name", "")),
            created=str(study.get("created", "")),
            methods=tuple(dict.fromkeys([*study["methods"], *(run.method for run in runs)])),
            seeds=tuple(sorted({int(seed) for seed in study["seeds"]} | {run.seed for run in runs})),
            runs=runs,
            learning_rates={entry["method"]: number(entry.get("learning_rate")) for entry in entries},
            tuning=tuple(study.get("tuning", ())),
        )
        _ = [record.rates_tried(str(entry["method"])) for entry in record.tuning]
    except _DAMAGE as error:
        raise IntegrityError(f"{path / 'study.json'} is not a study: {_describe(error)}") from error
    pairs = [(run.method, run.seed) for run in runs]
    repeated = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if repeated:
        raise IntegrityError(f"{path / 'study.json'} lists {repeated[0][0]!r} with seed {repeated[0][1]} twice")
    return record


def read_run(path: Path, *, method: str | None = None, seed: int | None = None) -> RunRecord:
    """The run in `path`; a study knows it as `method` and `seed`. Errors as in `read`."""
    config_text = _text(path / "config.resolved.yaml")
    try:
        config = yaml.safe_load(config_text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path / 'config.resolved.yaml'} is not YAML: {error}") from error
    events = read_events(path / "metrics.jsonl")
    if not events and not (path / MANIFEST).exists():
        raise no_finished_round(path)
    try:
        manifest = _json(path / MANIFEST)
        refuse_other_schema(path, manifest)
        final, rounds = _by_round(events, "final"), _by_round(events, "round")
        run = RunRecord(
            path=path,
            method=method if method is not None else str(config["method"]["name"]),
            seed=seed if seed is not None else int(config["seed"]),
            config=config,
            config_text=config_text,
            manifest=manifest,
            graph=_graph(path / "graph.json"),
            rounds=rounds,
            evaluations=_by_round(events, "evaluation"),
            # of a run that was prolonged and is not over, what it was judged by before is not the end
            final=final[-1] if final and rounds and final[-1]["round"] == rounds[-1]["round"] else None,
            ended_by=read_left_out(path / "run.log", _next_round(rounds)),
        )
        # parse all numbers now, so that damage is reported with the file's name
        _ = run.joined_after, run.records, run.upload_bytes, run.download_bytes, run.seconds, run.validation_losses()
        _ = run.max_answers, run.max_answer_tokens, run.num_test_examples, run.epsilon, run.delta
    except _DAMAGE as error:
        raise IntegrityError(f"{path} is not a whole run directory: {_describe(error)}") from error
    return run


def number(value: Any) -> float:
    """A recorded number; null stands for one that was not finite."""
    return math.nan if value is None else float(value)


def seconds_of(event: Mapping[str, Any], kind: str) -> float:
    """Seconds an event spent on `train`, `merge` or `evaluate`; 0 where it has none."""
    return float(event.get("timing", {}).get(f"{kind}_seconds") or 0.0)


def _graph(path: Path) -> GraphRecord | None:
    if not path.is_file():
        return None
    content = _json(path)
    names = tuple(str(name) for name in content["names"])
    true = content.get("true_adjacency")
    return GraphRecord(
        names=names,
        adjacency=_square(content["adjacency"], len(names)),
        name=str(content.get("name", "")),
        provenance=content.get("provenance") or {},
        true_adjacency=None if true is None else _square(true, len(names)),
        blocks={str(block): _square(rows, len(names)) for block, rows in (content.get("blocks") or {}).items()},
    )


def _square(rows: Sequence[Sequence[Any]], size: int) -> tuple[tuple[float, ...], ...]:
    matrix = tuple(tuple(number(value) for value in row) for row in rows)
    if len(matrix) != size or any(len(row) != size for row in matrix):
        raise ValueError(f"graph.json has {size} names but no matrix of {size} x {size}")
    return matrix


def _next_round(rounds: Sequence[Mapping[str, Any]]) -> int:
    return int(rounds[-1]["round"]) + 1 if rounds else 1


def _by_round(events: Iterable[Mapping[str, Any]], kind: str) -> tuple[Mapping[str, Any], ...]:
    """Events of one kind, ascending; the later one wins where a resumed run wrote a round again."""
    found = {int(event["round"]): event for event in events if event.get("event") == kind}
    return tuple(found[round_] for round_ in sorted(found))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} is not a JSON object")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"cannot read {path}: {error}") from error


def _describe(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
