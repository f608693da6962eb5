"""Contestants in processes of their own that wait between their rounds.

A process is started once; a line of JSON on its standard input asks for something, a line of JSON answers. Start-up is
therefore outside of every round, rounds can be interleaved with those of others, and a contestant's memory is that of
its process. Flower and pfl-research have an environment of their own beside; the others run in this one.

Every process has the same number of threads. Ours is prepared as the command line of fedmira prepares itself; users of
the others have no such preparation. One that died or does not answer is ended with all its children.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.gate import UnequalError
from benchmarks.timing import Lap

REPOSITORY = Path(__file__).resolve().parents[2]
SPINS = "10000"
"""How often OpenMP's threads of peers look before they sleep, as in the Makefile: to spin on, their default, takes many
times as long where something else runs too, and nothing less where nothing does."""
_LAST_WORDS = 160
"""Characters of a dead worker's last line that are shown."""
_LONGEST_ANSWER_SECONDS = 20 * 60.0
"""Of any start or round; who takes longer is stuck."""


class PeerMissingError(Exception):
    """A contestant cannot be run here; the message says why."""


class Worker:
    """A process that runs `module` and answers.

    Args:
        python: its interpreter.
        module: what it runs.
        order: what it is told.
        threads: how many it has.
        prepared: whether it prepares itself as the command line of fedmira does.
        spins: whether its threads spin `SPINS` times; else as it prepares them.

    Raises:
        PeerMissingError: the process ended or was silent for too long, when it was started or while it was asked.
    """

    def __init__(
        self, python: Path, module: str, order: dict[str, Any], threads: int, *, prepared: bool, spins: bool
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedmira-benchmark-")
        self.rows_file = Path(self._folder.name) / "rows.npy"
        self.answers_file = Path(self._folder.name) / "answers.json"
        self._log_file = Path(self._folder.name) / "log.txt"
        files = {"rows_file": str(self.rows_file), "answers_file": str(self.answers_file)}
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", module, json.dumps({**order, **files, "threads": threads, "prepared": prepared})],
                cwd=REPOSITORY,
                env=environment(dict(os.environ), threads, self._folder.name, spins=spins),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.process_id = self._process.pid
        self._ready: dict[str, Any] | None = None

    @property
    def ready(self) -> dict[str, Any]:
        """What the process says of itself when it is ready; waits until it is."""
        if self._ready is None:
            self._ready = self._answer()
        return self._ready

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        assert self.ready
        assert self._process.stdin is not None
        # where it ended between two requests, why stands in its log
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self._process.poll() is not None

    def lap(self) -> tuple[Lap, int]:
        """Let it do what it has taken; the time, and the highest memory of all the process, as it measures them."""
        answer = self.ask({"do": "lap"})
        return Lap(answer["seconds"], answer["processor_seconds"]), answer["peak_bytes"]

    def close(self) -> None:
        """Ask the process to end, and wait."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process.stdout.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # an answer is one line, so that nothing can wait in the buffer
        answering, _, _ = select.select([self._process.stdout], [], [], _LONGEST_ANSWER_SECONDS)
        if not answering:
            self._kill()
            raise PeerMissingError(
                f"its process did not answer in {_LONGEST_ANSWER_SECONDS / 60:g} minutes: {self._last_words()}"
            )
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise PeerMissingError(f"its process {how}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:_LAST_WORDS] for line in reversed(lines) if line.strip()), "it said nothing")

    def _kill(self) -> None:
        """End the process and its children, such as a simulation's."""
        family: list[psutil.Process] = []
        with suppress(psutil.Error):
            family = psutil.Process(self.process_id).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for child in family:
            with suppress(psutil.Error):
                child.kill()


class Processes:
    """Of the contestants of a section that share this environment, a process each; all start at once, and anew for
    whoever is asked for after it died.

    Args:
        contestants: who gets one.
        prepared: those that prepare it as the command line of fedmira does.
        spinning: those whose threads spin `SPINS` times even so, as those of all that are not prepared.
        threads: of each.
    """

    def __init__(
        self, contestants: Iterable[str], prepared: Collection[str], spinning: Collection[str], threads: int
    ) -> None:
        self._prepared, self._spinning, self._threads = prepared, spinning, threads
        self._workers = {contestant: self._start(contestant) for contestant in contestants}

    def __contains__(self, contestant: str) -> bool:
        return contestant in self._workers

    def __getitem__(self, contestant: str) -> Worker:
        if self._workers[contestant].ended:
            self._workers[contestant].close()
            self._workers[contestant] = self._start(contestant)
        return self._workers[contestant]

    def close(self) -> None:
        """End all."""
        for worker in self._workers.values():
            worker.close()

    def _start(self, contestant: str) -> Worker:
        prepared = contestant in self._prepared
        return Worker(
            Path(sys.executable),
            "benchmarks.peers.own_process",
            {"contestant": contestant},
            self._threads,
            prepared=prepared,
            spins=not prepared or contestant in self._spinning,
        )


class WorkerPeer:
    """A contestant that trains in another process, which has taken the same task.

    Args:
        worker: the process.
        taken: what it said when it had the task.
        expected: the fingerprint of the task here.
        ends: whether the process ends with the peer; else it takes other tasks after this one.

    Raises:
        PeerMissingError: the process ended.
        UnequalError: its weights, starting adapters or batches are not the same as here.
    """

    def __init__(self, worker: Worker, taken: Mapping[str, Any], expected: str, *, ends: bool) -> None:
        self._worker, self._ends = worker, ends
        self.process_id = worker.process_id
        self.settings: dict[str, str] = worker.ready["settings"]
        self.cohort_size: int | None = taken.get("cohort_size")
        self.peak_bytes = 0
        """Of the last round: the highest memory of the process, all of it."""
        if taken["fingerprint"] != expected:
            raise UnequalError(f"a process made another task ({taken['fingerprint']}) than this one ({expected})")

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        self.lap()
        return torch.from_numpy(np.load(self._worker.rows_file))

    def lap(self) -> Lap:
        """The time of a round, as the process measures it."""
        lap, self.peak_bytes = self._worker.lap()
        return lap

    def close(self) -> None:
        """End the process, unless it takes other tasks."""
        if self._ends:
            self._worker.close()


def environment(ours: Mapping[str, str], threads: int, folder: str, *, spins: bool) -> dict[str, str]:
    """The environment `ours` for a worker: sources on the path, pinned threads, nothing sent anywhere.

    Threads spin `SPINS` times, or as the process prepares them; memory is kept as it prepares that, or by glibc's
    defaults.
    """
    kept = {
        name: value
        for name, value in ours.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") and not name.startswith("MALLOC_")
    }
    return {
        **kept,
        **({"GOMP_SPINCOUNT": SPINS} if spins else {}),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src")]),
        "OMP_NUM_THREADS": str(threads),
        "FLWR_HOME": folder,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
