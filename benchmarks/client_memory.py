"""What one more client in a cohort costs in memory: adapter, gradient and two moments, and nothing else that grows.

Trains a large adapter on a tiny model with one short example per client, so that activations hardly count, with few
and with many clients in one cohort. Counts what torch allocates, not what the system lends, so that the answer is the
same every time. Knows nothing about peers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.models import make_base
from fedmira.config.run import AdapterConfig, TrainingConfig
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.arena import lora_layout
from fedmira.model.lora import ALL_GROUPS
from fedmira.training.cohort import train
from fedmira.types import Client, Job

ARENAS = 4
"""Adapter, gradient and two moments."""


class ClientMemory(NamedTuple):
    """The slope of the peak over the clients of a cohort."""

    parameters: int
    bytes_per_client: float
    """Beside the adapters that training starts from, which are the caller's."""

    @property
    def over_floor(self) -> float:
        """Over 16 bytes a parameter, which four float32 arenas need."""
        return self.bytes_per_client / (ARENAS * 4 * self.parameters)


def measure_client_memory(
    device: str,
    training: TrainingConfig,
    *,
    dtype: torch.dtype | None = None,
    rank: int = 4096,
    few: int = 2,
    many: int = 10,
) -> ClientMemory:
    """Train `few` and `many` clients for two steps in one cohort each and compare the peaks.

    The base is in `dtype`; by default in float32, on a GPU in bfloat16, as the workloads there have it: such a base
    reads a narrow copy of the adapters.
    """
    usual = torch.bfloat16 if device.startswith("cuda") else torch.float32
    base = make_base("llama-tiny", device, dtype or usual)
    layout = lora_layout(base, AdapterConfig(rank=rank, alpha=1.0))
    peaks = []
    for size in (few, many):
        clients = [_client(f"client-{number}") for number in range(size)]
        start_SP = torch.zeros(size, layout.num_parameters, device=device)
        job = Job(1, tuple(range(size)), start_SP, ALL_GROUPS, ALL_GROUPS, ALL_GROUPS)

        def call(job: Job = job, clients: list[TokenizedClient] = clients) -> None:
            train(
                base, layout, job, clients, training,
                total_rounds=1, seed=0, cohort_size=len(clients), dropout=0.0,
            )  # fmt: skip

        call()
        peaks.append(peak_allocated(call, device))
    return ClientMemory(layout.num_parameters, (peaks[1] - peaks[0]) / (many - few))


def peak_allocated(call: Callable[[], Any], device: str) -> int:
    """The most bytes that torch held for tensors during a call, beside those it held before."""
    if device.startswith("cuda"):
        before = int(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], index, event["args"]["Bytes"])
        for index, event in enumerate(events)
        if event.get("name") == "[memory]"
    )
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _client(name: str) -> TokenizedClient:
    examples = (TokenizedExample(np.array([5, 6, 7, 8], dtype=np.int32), 2, "one"),)
    return TokenizedClient(name, examples, (), (), Client(name, (), (), ()))
