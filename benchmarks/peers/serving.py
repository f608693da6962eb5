"""The other end of `worker`: answers every line on standard input with a line on standard output.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import Workload
from fedmira.evaluation.costs import PeakMemory


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told when it starts."""

    content: dict[str, Any]

    @property
    def threads(self) -> int:
        return int(self.content["threads"])

    @property
    def workload(self) -> Workload:
        """Of a worker that serves one only."""
        return read_workload(self.content["workload"])

    @property
    def settings(self) -> dict[str, str]:
        """How threads wait and what was asked for freed memory."""
        # whether it did as it was asked, glibc does not tell
        kept = "asked to be kept" if self.content["prepared"] else "left to glibc"
        return {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", ""), "freed memory": kept}


def read_order() -> Order:
    """The order on the command line; threads are set at once."""
    order = Order(json.loads(sys.argv[1]))
    torch.set_num_threads(order.threads)
    return order


def read_workload(fields: dict[str, Any]) -> Workload:
    """A workload from its JSON fields, where tuples have become lists."""
    tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Workload(**tuples)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], order: Order, **facts: Any) -> None:
    """Announce readiness with settings and facts, then answer every line until the input ends."""
    # frameworks print as they like: answers keep the real output to themselves
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({"settings": order.settings, **facts}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def serve_rounds(round_: Callable[[], np.ndarray], order: Order, fingerprint: str) -> None:
    """Serve a worker of one workload.

    Args:
        round_: trains every client; the rows (S, P).
        order: of the worker.
        fingerprint: of the task.
    """
    serve(lambda _request: measured(round_, order), order, fingerprint=fingerprint)


def measured(call: Callable[[], Any], order: Order) -> dict[str, Any]:
    """Call, write what it returns to the file for its kind, and answer with seconds and the highest memory."""
    gc.collect()
    memory = PeakMemory()
    processor, wall = time.process_time(), time.perf_counter()
    result = call()
    seconds, processor_seconds = time.perf_counter() - wall, time.process_time() - processor
    peak_bytes = memory.lap()
    if isinstance(result, list):
        Path(order.content["answers_file"]).write_text(json.dumps(result), encoding="utf-8")
    else:
        np.save(order.content["rows_file"], np.asarray(result))
    return {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": peak_bytes}
