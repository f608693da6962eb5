"""The least time a round could take: floating-point operations over the rate of this machine's matrix products.

Both are measured in the same run: the rate of each shape of matrix at the workload's number of rows, and the rate of
copying. Counted are the operations nobody can leave out: the frozen layers forward and backward towards the input, the
low-rank products, causal attention, and the output head on supervised rows; a beginning that all examples of a client
share is counted once per client and step.

Axes: N rows, I/O in and out features.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.timing import wait_for
from benchmarks.workloads import Task
from fedmira.data.tokenization import TokenizedExample
from fedmira.model.arena import adaptable_layers

_COPY_BYTES = 256 * 2**20
_TIMED_CALLS = 5
_CALLS_TOGETHER = 50


class Floor(NamedTuple):
    """Of one round."""

    flops: float
    seconds: float
    gemm_flops_per_second: float
    """Of the frozen layers, at the rows of one step of all clients together."""


class _Counts(NamedTuple):
    """Of one step of all clients."""

    rows: int
    supervised: int
    attention_pairs: int
    """Pairs of a position and one that it may look at, summed over the sequences."""


def training_floor(task: Task) -> Floor:
    """The floor of a round in which every step takes all clients together."""
    steps = list(zip(*task.steps_of_clients, strict=True))
    counts = [_count(clients) for clients in steps]
    rows = statistics.median_low([count.rows for count in counts])
    supervised = statistics.median_low([count.supervised for count in counts])
    shapes = Counter(adaptable_layers(task.base).values())
    device, dtype = str(task.base.device), task.base.dtype
    rates = {shape: gemm_rate(rows, *shape, device, dtype) for shape in shapes}
    vocabulary, width = task.base.model.get_output_embeddings().weight.shape
    head_rate = gemm_rate(supervised, width, vocabulary, device, dtype)
    flops = seconds = 0.0
    body_flops = {shape: 4.0 * shape[0] * shape[1] * number for shape, number in shapes.items()}
    body_rate = sum(body_flops.values()) / sum(body_flops[shape] / rates[shape] for shape in shapes)
    for count in counts:
        body = count.rows * sum(body_flops.values())
        low_rank = count.rows * 6.0 * task.layout.num_parameters
        # two products forward and five backward, each 2 operations per pair and feature
        attention = 14.0 * count.attention_pairs * width * int(task.base.model.config.num_hidden_layers)
        head = count.supervised * 4.0 * width * vocabulary
        flops += body + low_rank + attention + head
        seconds += (body + low_rank + attention) / body_rate + head / head_rate
    return Floor(flops, seconds, body_rate)


def _count(examples_per_client: tuple[list[TokenizedExample], ...]) -> _Counts:
    rows = pairs = supervised = 0
    for examples in examples_per_client:
        shared = _shared_length(examples)
        rows += shared
        pairs += shared * (shared + 1) // 2
        for example in examples:
            length = len(example.tokens) - 1
            rows += length - shared
            pairs += length * (length + 1) // 2 - shared * (shared + 1) // 2
            supervised += len(example.tokens) - example.prompt_length
    return _Counts(rows, supervised, pairs)


def _shared_length(examples: list[TokenizedExample]) -> int:
    """Tokens that all prompts begin with; none of a batch of one."""
    if len(examples) < 2:
        return 0
    first = examples[0].tokens
    shared = min(example.prompt_length - 1 for example in examples)
    for example in examples[1:]:
        differs = np.flatnonzero(first[:shared] != example.tokens[:shared])
        shared = int(differs[0]) if differs.size else shared
    return shared


def gemm_rate(rows: int, num_inputs: int, num_outputs: int, device: str, dtype: torch.dtype) -> float:
    """Operations per second of (rows, I) @ (I, O)."""
    x_NI = torch.randn(rows, num_inputs, dtype=dtype, device=device)
    w_IO = torch.randn(num_inputs, num_outputs, dtype=dtype, device=device)
    y_NO = torch.empty(rows, num_outputs, dtype=dtype, device=device)
    seconds = _best_seconds(lambda: torch.mm(x_NI, w_IO, out=y_NO), device)
    return 2.0 * rows * num_inputs * num_outputs / seconds


def copy_rate(device: str) -> float:
    """Bytes read plus bytes written per second when one block of memory is copied to another."""
    source = torch.zeros(_COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return 2.0 * _COPY_BYTES / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], object], device: str) -> float:
    """Seconds of a call in the fastest of some measurements: a floor is what the machine can do.

    On a GPU a measurement holds many calls, because to start one and to wait for it takes time that no kernel uses.
    """
    call()
    together = _CALLS_TOGETHER if device.startswith("cuda") else 1
    seconds = []
    for _ in range(_TIMED_CALLS):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(together):
            call()
        wait_for(device)
        seconds.append((time.perf_counter() - started) / together)
    return min(seconds)
