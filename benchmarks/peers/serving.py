"""The other end of `worker`: does a round for every line on standard input, and answers on standard output.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told when it starts."""

    workload: Workload
    threads: int
    rows_file: Path


def read_order() -> Order:
    """The order on the command line; threads are set at once."""
    content = json.loads(sys.argv[1])
    torch.set_num_threads(content["threads"])
    return Order(read_workload(content["workload"]), content["threads"], Path(content["rows_file"]))


def read_workload(fields: dict[str, Any]) -> Workload:
    """A workload from its JSON fields, where tuples have become lists."""
    tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Workload(**tuples)


def serve(round_: Callable[[], np.ndarray], rows_file: Path) -> None:
    """Announce readiness, then answer every line with a round until the input ends.

    Args:
        round_: trains every client; the rows (S, P).
        rows_file: where the rows go.
    """
    # frameworks print as they like: answers keep the real output to themselves
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        np.save(rows_file, round_())
        print(json.dumps({"done": True}), file=answers, flush=True)
