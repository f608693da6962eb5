"""The least time a round, or answers, could take: floating-point operations over the rate of matrix products here.

Measured in the same run: the rate of each shape of matrix at the workload's number of rows, and the rate of copying.
Counted are the operations nobody can leave out. In a round: the frozen layers forward and backward towards the input,
the low-rank products, causal attention, and the output head on supervised rows; a beginning that all examples of a
client share is counted once per client and step. In answers, all growing together: the layers once for every token of
a prompt, and once for each new token with the head, whose keys and values are read at the rate of copying.

Axes: N rows, I/O in and out features.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
    """Of one round, or of all answers."""

    flops: float
    seconds: float
    gemm_flops_per_second: float
    """Of the frozen layers, at the rows of one step of all clients together; for answers, of one new token of each."""


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
    (forward, body_rate), (head_forward, head_rate) = _body(task, rows), _head(task, supervised)
    width = _width(task)
    flops = seconds = 0.0
    for count in counts:
        body = count.rows * 2.0 * forward
        low_rank = count.rows * 6.0 * task.layout.num_parameters
        # two products forward and five backward, each 2 operations per pair and feature
        attention = 14.0 * count.attention_pairs * width * int(task.base.model.config.num_hidden_layers)
        head = count.supervised * 2.0 * head_forward
        flops += body + low_rank + attention + head
        seconds += (body + low_rank + attention) / body_rate + head / head_rate
    return Floor(flops, seconds, body_rate)


def generation_floor(task: Task, prompts: Sequence[Sequence[np.ndarray]], new_tokens: int) -> Floor:
    """The floor of answering every client's prompts with `new_tokens` tokens each, all answers together."""
    lengths = [len(prompt) for client in prompts for prompt in client]
    rows = len(lengths)
    (forward, read_rate), (_, rate), (head, head_rate) = _body(task, sum(lengths)), _body(task, rows), _head(task, rows)
    of_row = forward + 2.0 * task.layout.num_parameters
    # the last token of an answer is not read; its first comes from the prompt
    written = rows * (new_tokens - 1)
    cached = sum(length * (new_tokens - 1) + new_tokens * (new_tokens - 1) // 2 for length in lengths)
    config = task.base.model.config
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    position_bytes = 2 * _width(task) * key_heads // heads * int(config.num_hidden_layers) * task.base.dtype.itemsize
    read, grown, chosen = sum(lengths) * of_row, written * of_row, rows * new_tokens * head
    # the rate of copying counts what is read and what is written
    keys = cached * position_bytes / copy_rate(str(task.base.device))
    return Floor(read + grown + chosen, read / read_rate + grown / rate + chosen / head_rate + keys, rate)


def _body(task: Task, rows: int) -> tuple[float, float]:
    """Operations of the frozen layers for one row, forward, and how many of them a second at `rows` rows."""
    shapes = Counter(adaptable_layers(task.base).values())
    flops = {shape: 2.0 * shape[0] * shape[1] * number for shape, number in shapes.items()}
    device, dtype = str(task.base.device), task.base.dtype
    seconds = sum(flops[shape] / gemm_rate(rows, *shape, device, dtype) for shape in shapes)
    return sum(flops.values()), sum(flops.values()) / seconds


def _head(task: Task, rows: int) -> tuple[float, float]:
    """The same of the output head."""
    vocabulary, width = task.base.model.get_output_embeddings().weight.shape
    return 2.0 * width * vocabulary, gemm_rate(rows, width, vocabulary, str(task.base.device), task.base.dtype)


def _width(task: Task) -> int:
    return int(task.base.model.get_output_embeddings().weight.shape[1])


def _count(examples_per_client: tuple[list[TokenizedExample], ...]) -> _Counts:
    rows = pairs = supervised = 0
    for examples in examples_per_client:
        shared = _shared_length(examples)
        rows += shared
        pairs += shared * (shared + 1) // 2
        for example in examples:
            length = example.num_inputs
            rows += length - shared
            pairs += length * (length + 1) // 2 - shared * (shared + 1) // 2
            supervised += example.num_supervised
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
