"""One run: the round loop of Algorithm 1 with evaluation, checkpoints and signals around it.

Knows nothing about how clients train (`exchange`) or how adapters are mixed (`federation`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import torch

from fedmira.assembly import Assembly, assemble
from fedmira.config.run import RunConfig
from fedmira.errors import DivergedError, Interrupted, ParticipationError
from fedmira.exchange.admission import was_rejected
from fedmira.exchange.privacy import advice
from fedmira.exchange.seam import Kept
from fedmira.federation import participation
from fedmira.federation.method import Info, State
from fedmira.federation.questions import bounded
from fedmira.forecast.remarks import warnings
from fedmira.joining import (
    grown_manifest,
    joins,
    known_clients,
    refuse_newcomers,
    refuse_other_data,
    refuse_to_end,
    take_in,
)
from fedmira.profile import profiled
from fedmira.recording import Recorder
from fedmira.runs.checkpoint import Checkpoint, load_latest, save
from fedmira.runs.generations import expect_checkpoints, refuse_lost_checkpoints
from fedmira.runs.same_base import moved, recorded_commit, refuse_other_base, refuse_other_dtype
from fedmira.runs.signals import StopFlag, stop_on_signals
from fedmira.runs.store import RunStore
from fedmira.runs.telling import left_out_line
from fedmira.stages import settle_with, stage
from fedmira.training.cohort import Progress, StopRequested
from fedmira.types import Arena, Job, Participants, Results


class Display(Protocol):
    """Where a run tells what it does; see `cli/display.py`."""

    def start(self, title: str, total_rounds: int) -> None: ...
    def step(self, round_: int, done: int, total: int) -> None: ...
    def round(self, round_: int, line: str) -> None: ...
    def message(self, line: str) -> None: ...
    def finish(self, line: str) -> None: ...


class SilentDisplay:
    """A display that shows nothing."""

    def start(self, title: str, total_rounds: int) -> None: ...
    def step(self, round_: int, done: int, total: int) -> None: ...
    def round(self, round_: int, line: str) -> None: ...
    def message(self, line: str) -> None: ...
    def finish(self, line: str) -> None: ...


def run(
    config: RunConfig,
    *,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    source_text: str | None = None,
    display: Display | None = None,
    profile: bool = False,
) -> Path:
    """Carry out the run `config` and return its directory.

    Args:
        config: What to run.
        directory: The folder in which the run directory is made; `output.directory` if left out.
        resume: Continue the run if it was begun before; clients may have joined its data, rounds may have been added.
        source_text: The config file as the user wrote it, kept in the run directory.
        display: Told about progress.
        profile: Write where the time went; see `fedmira.profile`.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP; everything is saved, `resume=True` continues bit for bit.
        IntegrityError: the directory belongs to another config, or no checkpoint in it is valid.
        DivergedError: no client of a round came to finite numbers.
    """
    make = RunStore.resume if resume else RunStore.create
    place = None if directory is None else Path(directory)
    return carry_out(make(config, source_text, place), display, profile=profile)


def carry_out(
    store: RunStore,
    display: Display | None = None,
    *,
    profile: bool = False,
    stop: StopFlag | None = None,
    commit: str | None = None,
) -> Path:
    """Carry out the run of `store` from where it stands and return its directory; closes the store.

    A signal that arrives when all rounds are done ends nothing. Whoever has more to do afterwards passes the flag of
    its own `stop_on_signals` and asks it then. A run that goes on loads the commit that it was begun with of a base of
    the hub, one that begins `commit`.
    """
    with (
        store,
        profiled(store) if profile else nullcontext(),
        stop_on_signals() if stop is None else nullcontext(stop) as flag,
    ):
        return _Run(store, display or SilentDisplay(), flag, commit).carry_out()


class _Run:
    """The round loop and what it writes."""

    def __init__(self, store: RunStore, display: Display, stop: StopFlag, commit: str | None) -> None:
        self.config, self.store, self.display, self.stop = store.config, store, display, stop
        self.joins: list[tuple[int, Assembly]] = []
        """Clients that have yet to be taken in: after which round at the earliest, and all that there are then."""
        with stage("start"):
            self.checkpoint = self._open_checkpoint()
            announced = store.uploads()
            # what was sent was sent by the clients that there were
            manifest = store.manifest() if self.checkpoint or announced else {}
            known, size = known_clients(manifest), manifest.get("cohort_size")
            commit = recorded_commit(manifest) or commit
            took = partial(assemble, self.config, cohort_size=size, known=known, commit=commit)
            self.parts: Assembly = took()
            if known:
                refuse_other_data(manifest, self.parts)
            if self.checkpoint:
                refuse_other_base(store.path, manifest["model"], self.parts.base)
                if int(self.checkpoint.facts["completed_rounds"]) < self.config.federation.rounds:
                    refuse_other_dtype(store.path, manifest["model"], self.parts.base)
                held, whole = len(self.checkpoint.facts["last_round_K"]), self.parts
                if held < len(whole.clients.names):
                    # rounds that are made again are made of whom they were: what was sent then is sent again
                    repeated = 0 if self._forgets_noise() else store.announced_round()
                    for after, count in joins(manifest, held, len(whole.clients.names), repeated):
                        all_then = whole if count == len(whole.clients.names) else took(first=count)
                        self.joins.append((after, all_then))
                    self.parts = took(first=held)
            else:
                if known:
                    refuse_newcomers(known, self.parts)
                expect_checkpoints(store.path)
                created = datetime.now(UTC).isoformat(timespec="seconds")
                store.write_manifest({**self.parts.manifest(), "created": created})
            store.write_rounds()
        if self.parts.base.device.type == "cuda":
            settle_with(partial(torch.cuda.synchronize, self.parts.base.device))
        self.recorder = Recorder(store, self.config, str(self.parts.base.device))

    def carry_out(self) -> Path:
        config = self.config
        with stage("start"):
            state, first_round, progress = self._starting_point()
        if self.joins and max(first_round + (progress is not None), self.joins[-1][0] + 1) > config.federation.rounds:
            refuse_to_end(self._newcomers(self.joins[-1][1]), config.federation.rounds)
        if first_round > config.federation.rounds:
            self.display.finish(f"{self.store.path}: finished before, nothing to do")
            return self.store.path
        self.display.start(f"{config.method.name} seed {config.seed}", config.federation.rounds)
        if self.checkpoint:
            self._tell(f"{self.store.path} goes on after round {first_round - 1}")
        for line in warnings(self.parts):
            self._tell(f"warning: {line}")
        line, manifest = moved(self.store.manifest(), self.parts.base)
        if line:
            self.store.write_manifest(manifest)
            self._tell(f"warning: {line}")
        self.recorder.splits(self.parts)
        if 0 < self.store.rounds_before < first_round and self.parts.method.trial is not None:
            self._tell(
                f"round {self.store.rounds_before} was the last one and asked clients accordingly, so what follows may "
                f"not be bit for bit a run begun with {config.federation.rounds} rounds"
            )
        for round_ in range(first_round, config.federation.rounds + 1):
            while self.joins and progress is None and round_ > self.joins[0][0]:
                state = self._take_in(self.joins.pop(0)[1], state, round_ - 1)
            method, num_clients = self.parts.method, len(self.parts.clients.names)
            participants = participation.draw(num_clients, config.federation, config.seed, round_)
            # what could be wrong with the settings has shown by now
            self.store.keep()
            results = self._exchange(state, participants, progress)
            progress = None
            merge_started = time.perf_counter()
            with stage("mixing"):
                state, info = method.merge(state, participants, results)
            merge_seconds = time.perf_counter() - merge_started
            trial_started = time.perf_counter()
            state, info, results = self._hold_trial(state, participants, results, info)
            trial_seconds = time.perf_counter() - trial_started
            loss = self.recorder.round(self.parts, participants, results, info, merge_seconds, trial_seconds)
            last = round_ == config.federation.rounds
            line = f"train loss {loss:.4f}"
            # the rows of this round would otherwise lie beside those of the next one
            del results
            if last or round_ % config.evaluation.every == 0:
                kept = method.personalise(state)
                line += self.recorder.evaluation(self.parts, round_, kept)
                if last and config.evaluation.test:
                    line += f", test loss {self.recorder.final(self.parts, round_, kept):.4f}"
                del kept
            self.display.round(round_, line)
            self.store.log(f"round {round_}: {line}")
            # asked once: what is told to be saved is
            stopped = self.stop()
            if last or stopped or round_ % config.output.checkpoint_every == 0:
                self._save(round_, state)
            if stopped and not last:
                self._interrupted(round_)
        self.display.finish(f"{self.store.path}")
        return self.store.path

    # ------------------------------------------------------------------------------------------------------- one round

    def _newcomers(self, larger: Assembly) -> tuple[str, ...]:
        return larger.clients.names[len(self.parts.clients.names) :]

    def _take_in(self, larger: Assembly, state: State, round_: int) -> State:
        """The state with those who joined the data after round `round_`, recorded and saved."""
        num_before, names = len(self.parts.clients.names), self._newcomers(larger)
        with stage("mixing"):
            state = take_in(self.parts, larger, state, round_)
        self.parts, manifest = larger, self.store.manifest()
        if len(known_clients(manifest)) < len(larger.clients.names):
            # the manifest first: a checkpoint that knows fewer clients is met by taking them in again
            self.store.write_manifest(grown_manifest(manifest, larger, num_before, round_))
        self.recorder.splits(self.parts)
        self.store.append({"event": "joined", "round": round_, "clients": list(names)})
        self._tell(f"joined after round {round_}: {', '.join(names)}")
        self._save(round_, state)
        return state

    def _exchange(self, state: State, participants: Participants, progress: Progress | None) -> Results:
        round_ = participants.round
        with stage("mixing"):
            job = self.parts.method.plan(state, participants)
        noised = round_ == 1 and self.config.exchange.privacy.enabled
        if noised and (line := advice(self.parts.layout, job.upload, job.trainable)):
            self._tell(f"warning: {line}")
        self._announce(round_, job)
        try:
            results = self.parts.exchange.run(
                job,
                progress=progress,
                should_stop=self.stop,
                on_step=lambda done, total: self.display.step(round_, done, total),
            )
        except StopRequested as stopped:
            self._announce(round_ - 1)
            self._save(round_ - 1, state, stopped.progress)
            self._interrupted(round_)
        except ParticipationError:
            self._announce(round_ - 1)
            if (round_ - 1) % self.config.output.checkpoint_every:
                self._save(round_ - 1, state)
            raise
        # who failed has uploaded nothing
        self._announce(round_)
        for report in results.reports:
            if report.failure:
                self._tell(left_out_line(round_, self.parts.clients.names[report.id], report.failure))
        if not results.ids:
            raise DivergedError(f"round {round_}: no client returned a result{_why_nobody(results, self.config)}")
        return results

    def _forgets_noise(self) -> bool:
        """Whether a round that is made again sends something else, as nobody can draw its noise again."""
        return self.config.exchange.privacy.noise_seed == "system"

    def _announce(self, round_: int, job: Job | None = None) -> None:
        """Write down the uploads that `job` will make in round `round_` before it does; None: those made by its end.

        Noise that nobody can draw again makes each of them count, also of a round that is repeated after a crash.
        Where it can be drawn again, such a round must be the same again: nobody joins before its end.
        """
        if not self.config.exchange.privacy.enabled:
            return
        uploads = list(self.parts.exchange.state().facts["uploads"])
        for id_ in job.ids[: job.num_crossing] if job is not None and job.upload else ():
            uploads[id_] += 1
        with stage("disk"):
            self.store.write_uploads(uploads, round_)

    def _hold_trial(
        self, state: State, participants: Participants, results: Results, info: Info
    ) -> tuple[State, Info, Results]:
        """Ask clients what the method wants to know after merging, if anything."""
        method = self.parts.method
        if method.trial is None or method.decide is None:
            return state, info, results
        trial = method.trial(state, participants, results)
        if trial is None:
            return state, info, results
        with stage("evaluation"):
            limit = self.config.evaluation.examples_per_question
            losses = self.parts.exchange.judge(bounded(trial, participants, limit))
        with stage("mixing"):
            state, more = method.decide(state, trial, losses)
        crossed = results._replace(
            upload_bytes=results.upload_bytes + losses.upload_bytes,
            download_bytes=results.download_bytes + losses.download_bytes,
        )
        if results.uncompressed_bytes:
            # answers are numbers and candidates are sent as they are
            plain = results.uncompressed_bytes + losses.upload_bytes + losses.download_bytes
            crossed = crossed._replace(uncompressed_bytes=plain)
        return state, Info({**info.numbers, **more.numbers}, more.graph or info.graph), crossed

    # -------------------------------------------------------------------------------------------------------- disk

    def _open_checkpoint(self) -> Checkpoint | None:
        checkpoint = load_latest(self.store.path, config_hash=self.store.config_hash)
        if checkpoint is None:
            refuse_lost_checkpoints(self.store.path, self.store.events(), self.store.most_unsaved)
        self.store.truncate_metrics(0 if checkpoint is None else int(checkpoint.facts["metrics_position"]))
        for reason in () if checkpoint is None else checkpoint.skipped:
            self._tell(f"skipped a damaged checkpoint: {reason}")
        return checkpoint

    def _tell(self, line: str) -> None:
        self.display.message(line)
        self.store.log(line)

    def _starting_point(self) -> tuple[State, int, Progress | None]:
        """The state, the next round, and the progress inside it."""
        announced = self.store.uploads() if self._forgets_noise() else []
        if self.checkpoint is None:
            if announced:
                self.parts.exchange.restore(Kept({}, {"uploads": announced}))
            return self.parts.method.init(self.parts.initial_adapters(), self.parts.clients), 1, None
        tensors, facts = self.checkpoint.tensors, self.checkpoint.facts
        device = self.parts.base.device
        state = State(
            adapters=Arena(self.parts.layout, tensors["state.adapters"].to(device)),
            last_round_K=tuple(facts["last_round_K"]),
            memory={name: tensor.to(device) for name, tensor in _under("state.memory.", tensors).items()},
        )
        kept = dict(facts["exchange"])
        kept["uploads"] = [max(pair) for pair in zip_longest(kept["uploads"], announced, fillvalue=0)]
        self.parts.exchange.restore(Kept(_under("exchange.", tensors), kept))
        progress = None
        if facts["progress"] is not None:
            progress = Progress(tensors=_under("progress.", tensors), facts=facts["progress"])
        return state, int(facts["completed_rounds"]) + 1, progress

    def _save(self, completed_rounds: int, state: State, progress: Progress | None = None) -> None:
        tensors, kept = self.parts.saved_tensors(state), self.parts.exchange.state()
        tensors |= {f"exchange.{name}": tensor for name, tensor in kept.tensors.items()}
        if progress is not None:
            tensors |= {f"progress.{name}": tensor for name, tensor in progress.tensors.items()}
        with stage("disk"):
            save(
                self.store.path,
                completed_rounds,
                tensors,
                {
                    "completed_rounds": completed_rounds,
                    "last_round_K": list(state.last_round_K),
                    "exchange": dict(kept.facts),
                    "metrics_position": self.store.metrics_position(),
                    "progress": None if progress is None else progress.facts,
                    "partial": progress is not None,
                },
                config_hash=self.store.config_hash,
                keep=self.config.output.keep_checkpoints,
            )

    def _interrupted(self, round_: int) -> None:
        name = self.stop.signal_name
        self.store.log(f"stopped by {name} in round {round_}; everything is saved")
        raise Interrupted(
            f"stopped by {name} in round {round_}; everything is saved in {self.store.path}. "
            "Start it again to continue; `fedmira run` needs --resume for that",
            self.stop.signal_number,
        )


def _why_nobody(results: Results, config: RunConfig) -> str:
    """What to say of a round from which nobody returned, and what to do."""
    tamer = "lower training.learning_rate or set training.clip_norm"
    first = results.reports[0].failure
    if not all(was_rejected(report.failure) for report in results.reports):
        return f". First failure: {first}. {tamer.capitalize()}"
    # losses were finite, or they would have been left out for that
    reason, noise = f": all uploads were rejected. The first: {first}. ", config.exchange.privacy
    if noise.enabled:
        size = noise.noise_multiplier * noise.clip_norm
        return (
            f"{reason}Every number got noise of standard deviation {size:g}, exchange.privacy.noise_multiplier times "
            f"clip_norm: lower them, or where that is small, {tamer}"
        )
    return f"{reason}All losses were finite until the last step: if that step is to blame, {tamer}"


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
