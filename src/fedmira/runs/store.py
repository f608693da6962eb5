"""The run directory: one folder that holds everything a run was told, did and found out.

    config.yaml             as given                    manifest.json   versions, seeds, data hashes, ...
    config.resolved.yaml    every field                 graph.json      the last graph
    metrics.jsonl           append-only, one event a line; the truth that reports are made from
    run.log                 what people were told       checkpoints/    see `checkpoint`
    profile.json            where the time went         uploads.json    of noise that cannot be drawn again
    splits.json             ids of examples             answers.jsonl   to test examples

One process writes a run at a time (a lock says so), any number may read it. Knows nothing about how a run is carried
out; of what events say it reads how far a run has come.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from fedmira.config.file import config_difference, config_hash, parse_resolved, resolved_yaml, with_rounds
from fedmira.config.prolonging import refuse_to_prolong
from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError, IntegrityError, SetupError, UsageError
from fedmira.formats import printable
from fedmira.runs.atomic import (
    disk_error,
    disk_errors_named,
    make_folder,
    read_bytes,
    remove_tree,
    sync_folder,
    unwritable_line,
    write_bytes_atomically,
)
from fedmira.runs.generations import FOLDER as CHECKPOINTS
from fedmira.runs.generations import has_checkpoints
from fedmira.runs.lines import add_line, cut_back, event_line, open_lines, plain, read_events, synced_size
from fedmira.runs.lock import LOCK, lock_folder
from fedmira.runs.manifest import MANIFEST, SCHEMA, refuse_other_schema
from fedmira.runs.naming import run_directory, run_stem
from fedmira.stages import stage

CONFIG, RESOLVED = "config.yaml", "config.resolved.yaml"
METRICS, GRAPH, PROFILE, LOG = "metrics.jsonl", "graph.json", "profile.json", "run.log"
SPLITS_FILE, ANSWERS = "splits.json", "answers.jsonl"
UPLOADS = "uploads.json"
REPORT = "report"

_OWN_NAMES = {CONFIG, RESOLVED, MANIFEST, METRICS, GRAPH, PROFILE, UPLOADS, SPLITS_FILE, ANSWERS}
_OWN_NAMES |= {LOG, LOCK, CHECKPOINTS, REPORT}
_HALF_WRITTEN = re.compile(r"\..+\.tmp-")


class RunStore:
    """One run directory. Reading needs no lock; the first write takes it and keeps it until `close`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self._begun_rounds = config.federation.rounds
        self._prolonged: tuple[int, str | None] | None = None
        self.rounds_before = 0
        """Rounds that the run had before this process prolonged it; 0 if it did not."""
        self.most_unsaved = config.output.checkpoint_every
        """Rounds that may be recorded and not saved, by the config that the run was begun with or by this one."""
        self._provisional = False
        """Whether this process made the directory and nothing says yet that it will be needed; see `keep`."""
        self._lock: int | None = None
        self._files: dict[str, int] = {}

    @property
    def config_hash(self) -> str:
        """Names this run and all of its checkpoints: the hash of the config it was begun with.

        Of all that decides what is computed, only `federation.rounds` can have grown since.
        """
        return config_hash(with_rounds(self.config, self._begun_rounds))

    # --------------------------------------------------------------------------------------------- making and opening

    @classmethod
    def create(cls, config: RunConfig, source_text: str | None, directory: Path | None = None) -> RunStore:
        """Make the run directory of `config` and hold its lock; `source_text` is the config file as given.

        Raises:
            UsageError: the directory holds a run already, or something else, or another process writes it.
            SetupError, IntegrityError: the disk refused.
        """
        path = run_directory(config, directory)
        store = cls(path, config)
        store._provisional = not os.path.lexists(path)
        if not store._provisional:
            _refuse_link(path)
            # a process that was killed may have left a file half written
            foreign = sorted(name for name in set(_names(path)) - _OWN_NAMES if not _HALF_WRITTEN.match(name))
            if foreign:
                raise UsageError(
                    f"{path} exists and holds something else ({', '.join(foreign[:3])}); "
                    "remove it or choose another output.directory"
                )
        make_folder(path)
        store._hold_lock()
        try:
            if store.has_progress():
                raise UsageError(
                    f"{path} holds this run already{_how_to_go_on(path, config)} to continue it, "
                    "or remove it or choose another output.directory to start again"
                )
            if source_text is not None:
                write_bytes_atomically(path / CONFIG, source_text.encode())
            write_bytes_atomically(path / RESOLVED, resolved_yaml(config).encode())
        except BaseException:
            store._withdraw()
            store.close()
            raise
        return store

    @classmethod
    def open(cls, path: Path | str) -> RunStore:
        """Open an existing run directory; the lock is taken by the first write.

        Raises:
            UsageError: there is no run directory at `path`.
            IntegrityError: it is damaged or cannot be read.
        """
        path = Path(path)
        if not os.path.lexists(path):
            raise UsageError(f"there is no run directory {path}; `fedmira run CONFIG` makes one")
        _refuse_link(path)
        if not path.is_dir():
            raise UsageError(f"{path} is a file; give the run directory that holds {RESOLVED}")
        if RESOLVED not in (names := _names(path)):
            raise UsageError(f"{path} is not a run directory: it has no {RESOLVED}{_runs_inside(path)}")
        with disk_errors_named(path / RESOLVED, "read"):
            data = read_bytes(path / RESOLVED)
        try:
            config = parse_resolved(data.decode())
        except (ConfigError, UnicodeDecodeError) as error:
            raise IntegrityError(
                f"{path / RESOLVED} is damaged or was written by another version of fedmira: {error}"
            ) from None
        store = cls(path, config)
        if MANIFEST in names:
            manifest = store.manifest()
            store._begun_rounds = manifest.get("begun_rounds", config.federation.rounds)
            if (recorded := manifest.get("config_hash")) != store.config_hash:
                raise IntegrityError(
                    f"{path / RESOLVED} was changed after the run began (its hash is {store.config_hash}, "
                    f"{MANIFEST} says {recorded}); put the original back"
                )
        return store

    @classmethod
    def resume(cls, config: RunConfig, source_text: str | None, directory: Path | None = None) -> RunStore:
        """Open the run of `config` for writing, or create it if nothing of that name, method and seed was begun.

        A run that differs in nothing but fewer rounds is opened too, with those of `config`; see `write_rounds`.

        Raises:
            IntegrityError: a run of that name, method and seed exists, but under another config; the message lists
                the differences.
            UsageError, IntegrityError: as `open` and `create`.
        """
        if not os.path.lexists(run_directory(config, directory)):
            others, damaged = cls._others(config, directory)
            for other in others:
                if other._leads_to(config):
                    if (before := other.config.federation.rounds) < config.federation.rounds:
                        refuse_to_prolong(config, before)
                    other._hold_lock()
                    if before < config.federation.rounds:
                        other.config = with_rounds(other.config, config.federation.rounds)
                        other._prolonged = before, source_text
                    other._take_output(config)
                    return other
            for other in others:
                other.refuse_other_config(config)
            if damaged:
                # it may be the run that is meant
                raise IntegrityError(
                    f"{damaged[0]}. If it is another run than the one to resume, move its folder away or give another "
                    "name or output.directory; leave out --resume to start a new run"
                )
        return cls.open_or_create(config, source_text, directory)

    def _leads_to(self, config: RunConfig) -> bool:
        """Whether this run has begun, and is that of `config` so far."""
        rounds = config.federation.rounds
        fewer_or_equal = self.config.federation.rounds <= rounds
        same = not config_difference(with_rounds(self.config, rounds), config)
        return fewer_or_equal and same and bool(self.manifest())

    def write_rounds(self) -> None:
        """Write down the rounds that `resume` added, if it did, once nothing speaks against going on.

        The directory keeps its name, and the manifest says how many rounds the run began with.
        """
        if self._prolonged is None:
            return
        before, source_text = self._prolonged
        self._prolonged, self.rounds_before = None, before
        # the manifest first: with the old config beside it, it describes the run as it was
        self.write_manifest(self.manifest())
        write_bytes_atomically(self.path / RESOLVED, resolved_yaml(self.config).encode())
        if source_text is not None:
            write_bytes_atomically(self.path / CONFIG, source_text.encode())
        self.log(f"prolonged from {before} to {self.config.federation.rounds} rounds")

    @classmethod
    def open_or_create(cls, config: RunConfig, source_text: str | None, directory: Path | None = None) -> RunStore:
        """Open exactly the run of `config` for writing, or create it; runs under other configs do not matter."""
        path = run_directory(config, directory)
        if os.path.lexists(path / RESOLVED):
            store = cls.open(path)
            store.refuse_other_config(config)
            store._hold_lock()
            store._take_output(config)
            return store
        lost = cls(path, config)
        if not lost.has_progress():
            return cls.create(config, source_text, directory)
        # the file was lost, but the folder's name is the hash of this config, and every checkpoint repeats it
        lost._hold_lock()
        try:
            write_bytes_atomically(path / RESOLVED, resolved_yaml(config).encode())
        except BaseException:
            lost.close()
            raise
        return lost

    @classmethod
    def _others(cls, config: RunConfig, directory: Path | None) -> tuple[list[RunStore], list[IntegrityError]]:
        """Runs of the same name, method and seed that got somewhere, the latest first, and what is wrong with the
        others of them, such as those begun by another version."""
        parent = run_directory(config, directory).parent
        pattern = re.compile(re.escape(run_stem(config)) + r"-[0-9a-f]{8}")
        found = [parent / name for name in (_names(parent) if parent.is_dir() else []) if pattern.fullmatch(name)]
        begun = [path for path in found if not path.is_symlink() and os.path.isfile(path / RESOLVED)]
        others, damaged = list[RunStore](), list[IntegrityError]()
        for path in sorted(begun, key=lambda path: path.lstat().st_mtime, reverse=True):
            try:
                if cls(path, config).has_progress():
                    others.append(cls.open(path))
            except IntegrityError as error:
                damaged.append(error)
        return others, damaged

    def refuse_other_config(self, config: RunConfig) -> None:
        """Raise an `IntegrityError` with the differences unless `config` computes the same as this run's config."""
        differences, rounds = config_difference(self.config, config), self.config.federation.rounds
        if differences:
            if config.federation.rounds > rounds:
                # more rounds alone would be no reason
                differences = config_difference(self.config, with_rounds(config, rounds)) or differences
            lines = "".join(f"\n  {line}" for line in differences)
            how = "Put these values back"
            if self._begun_rounds < rounds and not config_difference(self.config, with_rounds(config, rounds)):
                how = f"This run was prolonged to {rounds} rounds: write federation.rounds={rounds}, also in the file,"
            # without --resume, the config that the run was begun with means this directory too
            same_place = config_hash(config) == self.config_hash
            anew = "give another name or output.directory" if same_place else "leave out --resume"
            raise IntegrityError(
                f"{self.path} was started under another config and cannot be resumed with this one:{lines}\n"
                f"{how} to resume, or {anew} to start a new run."
            )

    def _take_output(self, config: RunConfig) -> None:
        """Keep and save checkpoints as `config` says from now on; it decides nothing that is computed."""
        self.config = self.config.model_copy(update={"output": config.output})
        self.most_unsaved = max(self.most_unsaved, config.output.checkpoint_every)

    def has_progress(self) -> bool:
        """Whether anything would be lost with this directory: an event or a checkpoint."""
        try:
            size = os.lstat(self.path / METRICS).st_size
        except (FileNotFoundError, NotADirectoryError):
            size = 0
        except OSError as error:
            raise disk_error(error, self.path, "look into") from error
        return size > 0 or has_checkpoints(self.path)

    # ---------------------------------------------------------------------------------------------------- small files

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Replace manifest.json by `facts`, the schema number and the hash of the config the run was begun with."""
        begun = {"begun_rounds": self._begun_rounds} if self._begun_rounds != self.config.federation.rounds else {}
        self._write_json(MANIFEST, {"schema": SCHEMA, "config_hash": self.config_hash, **begun, **facts})

    def manifest(self) -> dict[str, Any]:
        """Return the content of manifest.json; {} if none was written yet.

        Raises:
            IntegrityError: it is damaged, of another version, or lost: it is written before the first checkpoint.
        """
        manifest = self._read_json(MANIFEST)
        refuse_other_schema(self.path, manifest)
        if not manifest and has_checkpoints(self.path):
            raise IntegrityError(
                f"{self.path / MANIFEST} was lost; put it back, or remove the run directory and start again"
            )
        return manifest

    def write_graph(self, graph: Mapping[str, Any]) -> None:
        """Replace graph.json; in one line, as K x K numbers take long to write one by one."""
        self._write_json(GRAPH, graph, indent=None)

    def write_uploads(self, uploads_K: Sequence[int], round_: int) -> None:
        """Replace uploads.json: how many noised uploads each client has made by the end of that round."""
        self._write_json(UPLOADS, {"uploads": list(uploads_K), "round": round_}, indent=None)

    def announced_round(self) -> int:
        """The round of the last `write_uploads`; 0 if there was none."""
        return int(self._read_json(UPLOADS).get("round", 0))

    def uploads(self) -> list[int]:
        """Return the uploads that `write_uploads` wrote; [] if it never did.

        Raises:
            IntegrityError: it is damaged; to go on without it would forget uploads.
        """
        found = self._read_json(UPLOADS)
        uploads = found.get("uploads") if os.path.lexists(self.path / UPLOADS) else []
        counts = [*uploads, found.get("round", 0)] if isinstance(uploads, list) else [None]
        if any(type(count) is not int or count < 0 for count in counts):
            raise IntegrityError(
                f"{self.path / UPLOADS} is damaged: it must hold how many uploads each client has made; restore it "
                "from a copy"
            )
        return list(uploads or ())

    def write_profile(self, profile: Mapping[str, Any]) -> None:
        """Replace profile.json."""
        self._write_json(PROFILE, profile)

    def profile(self) -> dict[str, Any]:
        """Return the content of profile.json; {} if the run was not profiled."""
        return self._read_json(PROFILE)

    def _write_json(self, name: str, value: Mapping[str, Any], indent: int | None = 1) -> None:
        self._hold_lock()
        with stage("disk"):
            text = json.dumps(plain(value)[0], indent=indent, ensure_ascii=False, allow_nan=False)
            # half a character, as of a file name that is not UTF-8, becomes an escape that JSON reads back
            write_bytes_atomically(self.path / name, text.encode(errors="backslashreplace") + b"\n")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = json.loads(read_bytes(path))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise disk_error(error, path, "read") from error
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{path} is damaged: {error}") from None
        if not isinstance(value, dict):
            raise IntegrityError(f"{path} is damaged: it must hold a JSON object")
        return value

    # --------------------------------------------------------------------------------------------------------- events

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event to metrics.jsonl, as `lines.event_line` writes it.

        Raises:
            SetupError, IntegrityError: the disk refused; no part of the event is left in the file.
            UsageError: another process writes this run.
        """
        with stage("disk"):
            add_line(self.path / METRICS, self._descriptor(METRICS), event_line(event))

    def events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first; see `lines.read_events`."""
        return read_events(self.path / METRICS)

    def metrics_position(self) -> int:
        """Make all events durable and return the size of metrics.jsonl in bytes, for a checkpoint to remember."""
        return synced_size(self.path / METRICS, self._descriptor(METRICS))

    def truncate_metrics(self, position: int) -> None:
        """Cut metrics.jsonl back to a `metrics_position` of the past; see `lines.cut_back`."""
        cut_back(self.path / METRICS, self._descriptor(METRICS), position)

    def log(self, line: str) -> None:
        """Add a line to run.log with the time in UTC; control characters are shown, not obeyed."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        add_line(self.path / LOG, self._descriptor(LOG), f"{now}Z {printable(line)}")

    def _descriptor(self, name: str) -> int:
        """The file `name` open for appending."""
        self._hold_lock()
        if name not in self._files:
            self._files[name] = open_lines(self.path / name)
        return self._files[name]

    # ----------------------------------------------------------------------------------------------------------- lock

    def _hold_lock(self) -> None:
        """Become the only writer of this run."""
        if self._lock is not None:
            return
        if line := unwritable_line(self.path):
            # a lock that can be taken says nothing about the files that come later
            raise SetupError(line)
        self._lock = lock_folder(self.path)
        try:
            with disk_errors_named(self.path, "sync"):
                sync_folder(self.path)
        except BaseException:
            # nobody would close it: whoever comes next would be told that another process is writing
            try:
                self._withdraw()
            finally:
                self.close()
            raise

    def keep(self) -> None:
        """Leave the directory where it is from now on, even if the run fails before its first event."""
        self._provisional = False

    def _withdraw(self) -> None:
        """Remove the directory if this process made it and nothing came of it."""
        # what failed says more than that the disk cannot be listed either
        with suppress(SetupError, IntegrityError):
            if self._provisional and not self.has_progress():
                remove_tree(self.path)
        self._provisional = False

    def close(self) -> None:
        """Release the lock and the files; a later write takes them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._withdraw()
        self.close()


# ------------------------------------------------------------------------------------------------------------- helpers


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link; give the run directory itself, {path.resolve()}")


def _names(path: Path) -> list[str]:
    with disk_errors_named(path, "list"):
        return os.listdir(path)


def _how_to_go_on(path: Path, config: RunConfig) -> str:
    """What continues the run at `path`, which was begun as `config` and may have got more rounds since."""
    rounds = RunStore.open(path).config.federation.rounds if os.path.lexists(path / RESOLVED) else 0
    if rounds <= config.federation.rounds:
        return "; add --resume"
    return f", prolonged to {rounds} rounds; write federation.rounds={rounds}, also in the file, and add --resume"


def _runs_inside(path: Path) -> str:
    runs = sorted(item.name for item in path.iterdir() if (item / RESOLVED).is_file())
    return f"; give one of the runs in it: {', '.join(runs[:5])}" if runs else ""


def no_finished_round(path: Path) -> UsageError:
    """What to say of a run that has nothing to show yet."""
    return UsageError(f"{path} has no finished round yet; continue it with `fedmira run CONFIG --resume`")


def has_run(path: Path) -> bool:
    """Whether `path` is the directory of a run that began."""
    return (path / METRICS).exists() or (path / MANIFEST).exists() or has_checkpoints(path)
