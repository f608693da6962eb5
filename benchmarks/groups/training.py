"""A round of local training: ours against the peers on the same batches, behind the equality gate.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

import torch

from benchmarks.floors import training_floor
from benchmarks.gate import check_adapters, check_loss, final_loss
from benchmarks.memory import with_peak, with_peak_of
from benchmarks.options import Options
from benchmarks.padding import padding_factor
from benchmarks.peers.ours import Ours
from benchmarks.peers.peer import OURS, Peer, PeerMissingError, make_peer, runs_here
from benchmarks.peers.worker import WorkerPeer
from benchmarks.results import Row, Section
from benchmarks.timing import interleave
from benchmarks.workloads import Task, Workload, build

OVER_FLOOR, SHARE_OF_GEMM = "over floor", "share of the matrix-product rate"


class _Ready(NamedTuple):
    """A contestant that may be timed."""

    name: str
    peer: Peer
    peak_bytes: int
    final_loss: float


def measure_training(
    name: str, workload: Workload, contestants: Sequence[str], options: Options, say: Callable[[str], None]
) -> Section:
    """Gate, time and judge the contestants on one workload.

    Args:
        name: of the section.
        workload: what is trained.
        contestants: names of peers; ours comes first.
        options: device, threads, repetitions.
        say: told what happens.
    """
    section = Section(name, workload.title)
    contestants = gate(workload, contestants, section, options, say)
    task = build(workload, options.device)
    ready = _prepare(task, workload, contestants, section, options, say)
    try:
        times = interleave(
            {one.name: one.peer.round for one in ready},
            warm_up=options.warm_up,
            repeats=options.repeats,
            device=options.device,
        )
    finally:
        for one in ready:
            one.peer.close()
    timed = []
    for one in ready:
        row = Row.timed(one.name, times[one.name])
        row.peak_bytes, row.final_loss = one.peak_bytes, one.final_loss
        if not runs_here(one.name):
            row.processor_seconds = None
        timed.append(row)
        say(f"  {one.name}: {row.seconds:.3f} s")
    section.rows = timed + section.rows
    section.add_ratios(OURS)
    _add_facts(section, task, options)
    for one in ready:
        if one.name == OURS and isinstance(one.peer, Ours):
            section.facts["cohort_size"] = one.peer.cohort_size
    return section


def gate(
    workload: Workload, contestants: Sequence[str], section: Section, options: Options, say: Callable[[str], None]
) -> list[str]:
    """Train the tiny twin of the workload with every contestant; who passed. The others get a row that says why.

    Raises:
        UnequalError: a contestant trains other adapters.
    """
    tiny = workload.tiny()
    task = build(tiny, options.device)
    passed = []
    largest = 0.0
    ours_SP = torch.empty(0)
    for contestant in contestants:
        try:
            with closing(make_peer(contestant, task, tiny, options)) as peer:
                rows_SP = peer.round()
        except PeerMissingError as error:
            section.rows.append(Row(contestant, note=f"not measured: {error}"))
            say(f"  {contestant}: not measured: {error}")
            continue
        if contestant == OURS:
            ours_SP = rows_SP
        largest = max(largest, check_adapters(contestant, ours_SP, rows_SP, task.start_SP))
        passed.append(contestant)
    section.facts["gate_difference"] = largest
    say(f"  gate: adapters of {len(passed)} contestants agree to {largest:.1e} in float64")
    return passed


def _prepare(
    task: Task,
    workload: Workload,
    contestants: Sequence[str],
    section: Section,
    options: Options,
    say: Callable[[str], None],
) -> list[_Ready]:
    """Make every contestant and let it do one round, which is judged and whose memory is measured."""
    ready: list[_Ready] = []
    for contestant in contestants:
        peer = None
        try:
            peer = make_peer(contestant, task, workload, options)
            if isinstance(peer, WorkerPeer):
                rows_SP, peak_bytes = with_peak_of(peer.process_id, peer.round)
            else:
                rows_SP, peak_bytes = with_peak(peer.round, options.device)
        except (PeerMissingError, torch.OutOfMemoryError) as error:
            if peer is not None:
                peer.close()
            why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            section.rows.append(Row(contestant, note=f"not measured: {why}"))
            say(f"  {contestant}: {section.rows[-1].note}")
            continue
        loss = final_loss(task, rows_SP)
        ready.append(_Ready(contestant, peer, peak_bytes, loss))
        check_loss(contestant, ready[0].final_loss, loss, task.base.dtype)
    section.facts["start_loss"] = final_loss(task, task.start_SP)
    losses = ", ".join(f"{one.final_loss:.5f}" for one in ready)
    say(f"  final losses agree: {losses} from {section.facts['start_loss']:.5f}")
    return ready


def _add_facts(section: Section, task: Task, options: Options) -> None:
    steps = task.steps_of_clients
    batches = [batch for client in steps for batch in client]
    together = [[example for batch in step for example in batch] for step in zip(*steps, strict=True)]
    examples = [example for batch in batches for example in batch]
    floor = training_floor(task)
    seconds = section.row(OURS).seconds
    section.facts |= {
        "clients": len(task.clients),
        "steps_per_client": len(steps[0]),
        "tokens": sum(len(example.tokens) for example in examples),
        "supervised_tokens": sum(len(example.tokens) - example.prompt_length for example in examples),
        "padding_own_batch": padding_factor(batches),
        "padding_all_clients": padding_factor(together),
        "warm_up": options.warm_up + 1,
        "repeats": options.repeats,
        "floor_seconds": floor.seconds,
        "floor_flops": floor.flops,
        "gemm_flops_per_second": floor.gemm_flops_per_second,
    }
    if seconds is not None:
        section.measures[OVER_FLOOR] = seconds / floor.seconds
        section.measures[SHARE_OF_GEMM] = floor.seconds / seconds
