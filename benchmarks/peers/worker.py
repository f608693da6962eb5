"""Contestants in processes of their own that wait between their rounds.

A process is started once; a line of JSON on its standard input asks for something, a line of JSON answers. Start-up is
therefore outside of every round, rounds can be interleaved with those of others, and a contestant's memory is that of
its process. Flower and pfl-research have an environment of their own beside; the others run in this one.

Every process has the same number of threads. Ours is prepared as the command line of fedmira prepares itself; users of
the others have no such preparation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gate import UnequalError
from benchmarks.timing import Lap

REPOSITORY = Path(__file__).resolve().parents[2]
SPINS = "10000"
"""How often OpenMP's threads of peers look before they sleep, as in the Makefile: to spin on, their default, takes many
times as long where something else runs too, and nothing less where nothing does."""
_LAST_WORDS = 160
"""Characters of a dead worker's last line that are shown."""


class PeerMissingError(Exception):
    """A contestant cannot be run here; the message says why."""


class Worker:
    """A process that runs `module` and answers.

    Raises:
        PeerMissingError: the process ended, when it was started or while it was asked.
    """

    def __init__(self, python: Path, module: str, order: dict[str, Any], threads: int, *, prepared: bool) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedmira-benchmark-")
        self.rows_file = Path(self._folder.name) / "rows.npy"
        self.answers_file = Path(self._folder.name) / "answers.json"
        self._log_file = Path(self._folder.name) / "log.txt"
        files = {"rows_file": str(self.rows_file), "answers_file": str(self.answers_file)}
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", module, json.dumps({**order, **files, "threads": threads, "prepared": prepared})],
                cwd=REPOSITORY,
                env=environment(dict(os.environ), threads, self._folder.name, prepared=prepared),
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
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            lines = self._log_file.read_text(encoding="utf-8", errors="replace").split("\n")
            words = next((line.strip()[:_LAST_WORDS] for line in reversed(lines) if line.strip()), "it said nothing")
            raise PeerMissingError(f"its process ended with status {self._process.returncode}: {words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Processes:
    """Of the contestants of a section that share this environment, a process each; all start at once.

    Args:
        contestants: who gets one.
        prepared: those that prepare it as the command line of fedmira does.
        threads: of each.
    """

    def __init__(self, contestants: Iterable[str], prepared: Iterable[str], threads: int) -> None:
        module, python = "benchmarks.peers.own_process", Path(sys.executable)
        self._workers = {
            contestant: Worker(python, module, {"contestant": contestant}, threads, prepared=contestant in prepared)
            for contestant in contestants
        }

    def __contains__(self, contestant: str) -> bool:
        return contestant in self._workers

    def __getitem__(self, contestant: str) -> Worker:
        return self._workers[contestant]

    def close(self) -> None:
        """End all."""
        for worker in self._workers.values():
            worker.close()


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


def environment(ours: Mapping[str, str], threads: int, folder: str, *, prepared: bool) -> dict[str, str]:
    """The environment `ours` for a worker: sources on the path, pinned threads, nothing sent anywhere.

    How threads wait and memory is kept is left to the process that prepares itself; the others get `SPINS` and glibc's
    defaults.
    """
    kept = {
        name: value
        for name, value in ours.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") and not name.startswith("MALLOC_")
    }
    return {
        **kept,
        **({} if prepared else {"GOMP_SPINCOUNT": SPINS}),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src")]),
        "OMP_NUM_THREADS": str(threads),
        "FLWR_HOME": folder,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
