"""A contestant in a process of its own, with another Python environment, that waits between its rounds.

It is started once per task; a line on its standard input starts a round, and a line of JSON answers. Start-up is
therefore outside of every round, and rounds can be interleaved with those of others.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.options import Options
from benchmarks.workloads import Workload

REPOSITORY = Path(__file__).resolve().parents[2]
_LAST_WORDS = 160
"""Characters of a dead worker's last line that are shown."""


class PeerMissingError(Exception):
    """A contestant cannot be run here; the message says why."""


class WorkerPeer:
    """Trains in the module `module`, run by the peers' interpreter.

    Raises:
        PeerMissingError: the process ended, when it was started or in a round.
    """

    def __init__(self, module: str, workload: Workload, options: Options) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedmira-benchmark-")
        self._rows_file = Path(self._folder.name) / "rows.npy"
        self._log_file = Path(self._folder.name) / "log.txt"
        arguments = json.dumps(
            {"workload": asdict(workload), "threads": options.threads, "rows_file": str(self._rows_file)}
        )
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [str(options.peers_python), "-m", module, arguments],
                cwd=REPOSITORY,
                env=_environment(options.threads, self._folder.name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.process_id = self._process.pid
        self._answer()

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        self._answer()
        return torch.from_numpy(np.load(self._rows_file))

    def close(self) -> None:
        """Ask the process to end, and wait."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            lines = self._log_file.read_text(encoding="utf-8", errors="replace").split("\n")
            words = next((line.strip()[:_LAST_WORDS] for line in reversed(lines) if line.strip()), "it said nothing")
            raise PeerMissingError(f"its process ended with status {self._process.returncode}: {words}")
        return json.loads(line)


def _environment(threads: int, folder: str) -> dict[str, str]:
    """This process's environment, with the sources on the path, pinned threads, and nothing sent anywhere."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src")]),
        "OMP_NUM_THREADS": str(threads),
        "FLWR_HOME": folder,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
