"""Interleaved timing, and the floor that measured times are compared with."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.floors import copy_rate, gemm_rate, generation_floor, training_floor
from benchmarks.memory import with_peak, with_peak_of
from benchmarks.timing import Lap, Times, interleave
from benchmarks.workloads import Workload, build

from benchmarks import floors

TINY = Workload("llama-15m", "natural_instructions", 3, 8, ("q_proj", "v_proj")).tiny()


def test_contestants_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    times = interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"},  # type: ignore[misc]
        warm_up=1,
        repeats=3,
    )
    assert [calls[start : start + 3] for start in range(0, 12, 3)] == [
        list("abc"),
        list("bca"),
        list("cab"),
        list("abc"),
    ]
    assert {name: len(one.wall) for name, one in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_waiting_takes_wall_time_and_no_processor_time() -> None:
    times = interleave({"sleep": lambda: time.sleep(0.02)}, warm_up=0, repeats=2)["sleep"]
    assert times.median >= 0.02
    assert times.processor_median < 0.02


def test_what_works_elsewhere_says_how_long_it_took() -> None:
    times = interleave({"elsewhere": lambda: Lap(4.0, 3.0)}, warm_up=1, repeats=2)["elsewhere"]
    assert (times.wall, times.processor) == ([4.0, 4.0], [3.0, 3.0])


def test_who_fails_is_left_out_from_then_on() -> None:
    calls: list[str] = []

    def fails_at_its_second() -> None:
        calls.append("b")
        if calls.count("b") == 2:
            raise OSError("it died")

    contestants = {"a": lambda: calls.append("a"), "b": fails_at_its_second}
    times = interleave(contestants, warm_up=0, repeats=4, failure=OSError)
    assert (times["a"].missing, len(times["a"].wall)) == ("", 4)
    assert (times["b"].missing, calls.count("b")) == ("it died", 2)
    calls.clear()
    with pytest.raises(OSError, match="it died"):
        interleave(contestants, warm_up=0, repeats=4)


def test_median_and_quartiles() -> None:
    times = Times([5.0, 1.0, 2.0, 4.0, 3.0], [1.0, 1.0, 2.0])
    assert times.median == 3.0
    assert times.quartiles == (2.0, 4.0)
    assert times.processor_median == 1.0


def test_peak_memory_is_what_a_call_adds() -> None:
    def allocate() -> float:
        return float(torch.ones(40_000_000).sum())

    result, peak_bytes = with_peak(allocate, "cpu")
    assert result == 40_000_000
    assert 150e6 < peak_bytes < 260e6


_TAKES_WHEN_ASKED = """
import subprocess, sys
if len(sys.argv) > 1:
    print("ready", flush=True)
    sys.stdin.readline()
    block = b"x" * 100_000_000
    print("taken", flush=True)
    sys.stdin.readline()
else:
    subprocess.run([sys.executable, __file__, "child"])
"""


def test_memory_of_another_process_is_that_of_its_children_too(tmp_path: Path) -> None:
    script = tmp_path / "takes.py"
    script.write_text(_TAKES_WHEN_ASKED, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def ask() -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline()

        answer, peak_bytes = with_peak_of(process.pid, ask)
        process.stdin.write("\n")
    assert answer == "taken\n"
    assert 95e6 < peak_bytes < 180e6, "interpreters included"


def test_the_floor_of_answers_counts_every_token_once() -> None:
    """By hand: layers for prompts and for all new tokens but the last, the head for all new ones."""
    task = build(TINY, "cpu")
    prompts = [[example.tokens[: example.prompt_length] for example in client.train[:2]] for client in task.clients]
    width, inner, layers, vocabulary, new = 32, 48, 2, 2500, 5
    body = layers * (4 * width * width + 3 * width * inner) + task.layout.num_parameters
    read = sum(len(prompt) for client in prompts for prompt in client)
    rows = sum(len(client) for client in prompts)
    floor = generation_floor(task, prompts, new)
    assert floor.flops == pytest.approx(2 * body * (read + rows * (new - 1)) + 2 * width * vocabulary * rows * new)
    assert floor.seconds > 0


def test_the_floor_counts_what_nobody_can_leave_out() -> None:
    """By hand: layers and head forward and backward, low-rank products, attention; the shared beginning once."""
    task = build(TINY, "cpu")
    width, inner, layers, vocabulary = 32, 48, 2, 2500
    body = layers * (4 * width * width + 3 * width * inner)
    flops = 0.0
    for steps in task.steps_of_clients:
        for batch in steps:
            shared = min(example.prompt_length for example in batch) - 1
            prompts = np.stack([example.tokens[:shared] for example in batch])
            differs = np.flatnonzero((prompts != prompts[0]).any(axis=0))
            shared = int(differs[0]) if differs.size else shared
            assert shared > 2
            rows = shared + sum(len(example.tokens) - 1 - shared for example in batch)
            pairs = sum(range(1, shared + 1))
            pairs += sum(sum(range(shared + 1, len(example.tokens))) for example in batch)
            supervised = sum(len(example.tokens) - example.prompt_length for example in batch)
            flops += rows * (4 * body + 6 * task.layout.num_parameters)
            flops += 14 * pairs * width * layers + 4 * supervised * width * vocabulary
    floor = training_floor(task)
    assert floor.flops == pytest.approx(flops)
    assert floor.seconds > 0


def test_rates_are_plausible() -> None:
    assert 1e8 < gemm_rate(256, 128, 128, "cpu", torch.float32) < 1e14
    assert 1e8 < copy_rate("cpu") < 1e13


def test_on_a_gpu_waiting_is_shared_by_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    waited = 0

    def wait(_device: str) -> None:
        nonlocal now, waited
        now += 1e-3
        waited += 1

    def call() -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(floors, "wait_for", wait)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert floors._best_seconds(call, "cuda") == pytest.approx(1 + 1e-3 / floors._CALLS_TOGETHER)
    assert floors._best_seconds(call, "cpu") == pytest.approx(1 + 1e-3)
    assert waited == 4 * floors._TIMED_CALLS
