"""A round of local training: ours against the peers on the same batches, behind the equality gate.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.floors import training_floor
from benchmarks.gate import check_adapters, check_loss, final_loss
from benchmarks.memory import with_peak, with_peak_of
from benchmarks.options import Options
from benchmarks.padding import padding_factor
from benchmarks.peers.peer import (
    OURS,
    SEVERAL_PROCESSES,
    Peer,
    PeerMissingError,
    forms,
    make_peer,
    start_processes,
)
from benchmarks.peers.worker import Processes, WorkerPeer
from benchmarks.results import Row, Section
from benchmarks.timing import Times, interleave
from benchmarks.workloads import Task, Workload, build

OVER_FLOOR, SHARE_OF_GEMM = "over floor", "share of the matrix-product rate"
_LONGEST_WARM_UP_SECONDS = 40.0
"""Where one round of everyone takes longer, the judged rounds are the only ones to warm up."""


class _Judged(NamedTuple):
    """A round that is not timed: it is judged, its memory is measured, and it warms up."""

    form: int | None
    """Which of the contestant's forms; None if it has one."""
    seconds: float
    peak_bytes: int
    final_loss: float


class _Ready(NamedTuple):
    """A contestant that may be timed."""

    name: str
    peer: Peer
    judged: _Judged


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
    with ExitStack() as ending:
        processes = ending.enter_context(closing(start_processes(contestants, options)))
        contestants = gate(workload, contestants, section, options, say, processes)
        task = build(workload, options.device)
        ready = [
            one
            for contestant in contestants
            if (one := _prepare(contestant, task, workload, section, options, say, processes, ending))
        ]
        own_loss = ready[0].judged.final_loss
        for one in ready:
            check_loss(one.name, own_loss, one.judged.final_loss, task.base.dtype)
        section.facts["start_loss"] = final_loss(task, task.start_SP)
        losses = ", ".join(f"{one.judged.final_loss:.5f}" for one in ready)
        say(f"  final losses agree: {losses} from {section.facts['start_loss']:.5f}")
        # where rounds are long a second one to warm up changes nothing
        together = sum(one.judged.seconds for one in ready)
        warm_up = options.warm_up if together <= _LONGEST_WARM_UP_SECONDS else 0
        times = interleave(
            {one.name: one.peer.lap if isinstance(one.peer, WorkerPeer) else one.peer.round for one in ready},
            warm_up=warm_up,
            repeats=options.repeats,
            device=options.device,
            failure=PeerMissingError,
        )
    if times[OURS].missing:
        raise PeerMissingError(f"{OURS}: {times[OURS].missing}")
    section.rows = [_row(one, times[one.name]) for one in ready] + section.rows
    for row in section.rows:
        if row.seconds is not None:
            say(f"  {row.contestant}: {row.seconds:.3f} s")
        elif row.contestant in times:
            say(f"  {row.contestant}: {row.note}")
    section.add_ratios(OURS)
    section.facts |= {"warm_up": warm_up + 1, "repeats": options.repeats}
    _add_facts(section, task)
    cohort_size = getattr(ready[0].peer, "cohort_size", None)
    if cohort_size is not None:
        section.facts["cohort_size"] = cohort_size
    return section


def gate(
    workload: Workload,
    contestants: Sequence[str],
    section: Section,
    options: Options,
    say: Callable[[str], None],
    processes: Processes | None = None,
) -> list[str]:
    """Train the tiny twins of the workload with every contestant in all its forms; who passed. The others get a row
    that says why.

    The twins are trained by AdamW behind a clip, as the workload is, and by plain SGD: Adam's steps and a clipped
    gradient do not tell a gradient from its double.

    Raises:
        UnequalError: a contestant trains other adapters.
    """
    twins = [workload.tiny(), replace(workload.tiny(), plain=True)]
    tasks = [build(twin, options.device) for twin in twins]
    passed = []
    largest = 0.0
    ours: list[torch.Tensor] = []
    for contestant in contestants:
        try:
            rows = [
                (task, form, _train_once(contestant, task, twin, options, processes, form))
                for task, twin in zip(tasks, twins, strict=True)
                for form in forms(contestant, len(task.clients))
            ]
        except PeerMissingError as error:
            if contestant == OURS:
                raise
            section.rows.append(Row(contestant, note=f"not measured: {error}"))
            say(f"  {contestant}: not measured: {error}")
            continue
        if contestant == OURS:
            ours = [rows_SP for _, _, rows_SP in rows]
        for task, form, rows_SP in rows:
            name = contestant if form is None else f"{contestant} of {form} clients"
            ours_SP = next(own_SP for own_SP, own in zip(ours, tasks, strict=True) if own is task)
            largest = max(largest, check_adapters(name, ours_SP, rows_SP, task.start_SP))
        passed.append(contestant)
    section.facts["gate_difference"] = largest
    say(f"  gate: adapters of {len(passed)} contestants agree to {largest:.1e} in float64")
    return passed


def _train_once(
    contestant: str, task: Task, workload: Workload, options: Options, processes: Processes | None, form: int | None
) -> torch.Tensor:
    with closing(make_peer(contestant, task, workload, options, processes, form)) as peer:
        return peer.round()


def _prepare(
    contestant: str,
    task: Task,
    workload: Workload,
    section: Section,
    options: Options,
    say: Callable[[str], None],
    processes: Processes,
    ending: ExitStack,
) -> _Ready | None:
    """Make a contestant and let it do one round; of several forms each does one as long as they can, and the fastest
    stays.

    Returns:
        The contestant, to be closed by `ending`; None if it cannot do a round, with a row that says why.
    """
    found: list[_Judged] = []
    choices = forms(contestant, len(task.clients))
    missing = ""
    for form in choices:
        try:
            # beside other forms it lets go of its memory at once
            with ExitStack() as here:
                peer = make_peer(contestant, task, workload, options, processes, form)
                (ending if len(choices) == 1 else here).enter_context(closing(peer))
                found.append(_judge(contestant, form, peer, task, options))
        except (PeerMissingError, torch.OutOfMemoryError) as error:
            if contestant == OURS:
                raise
            missing = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            if form is not None:
                say(f"  {contestant}: not with {form} clients in a batch: {missing}")
            # larger batches take more
            break
        if form is not None:
            say(f"  {contestant}: {found[-1].seconds:.2f} s with {form} clients in a batch")
    if found and len(choices) > 1:
        best = min(found, key=lambda one: one.seconds)
        try:
            peer = ending.enter_context(closing(make_peer(contestant, task, workload, options, processes, best.form)))
        except (PeerMissingError, torch.OutOfMemoryError) as error:
            found, missing = [], str(error)
    if not found:
        section.rows.append(Row(contestant, note=f"not measured: {missing}"))
        say(f"  {contestant}: {section.rows[-1].note}")
        return None
    return _Ready(contestant, peer, min(found, key=lambda one: one.seconds))


def _judge(contestant: str, form: int | None, peer: Peer, task: Task, options: Options) -> _Judged:
    """Let a contestant do one round."""
    started = time.perf_counter()
    if not isinstance(peer, WorkerPeer):
        rows_SP, peak_bytes = with_peak(peer.round, options.device)
    elif contestant in SEVERAL_PROCESSES:
        rows_SP, peak_bytes = with_peak_of(peer.process_id, peer.round)
    else:
        rows_SP = peer.round()
        peak_bytes = peer.peak_bytes
    seconds = time.perf_counter() - started
    return _Judged(form, seconds, peak_bytes, final_loss(task, rows_SP))


def _row(one: _Ready, times: Times) -> Row:
    if times.missing:
        return Row(one.name, note=f"not measured: {times.missing}")
    row = Row.timed(one.name, times)
    row.peak_bytes, row.final_loss = one.judged.peak_bytes, one.judged.final_loss
    row.settings = dict(getattr(one.peer, "settings", {}))
    if one.judged.form is not None:
        row.clients_per_batch = one.judged.form
    if one.name in SEVERAL_PROCESSES:
        row.processor_seconds = None
    return row


def _add_facts(section: Section, task: Task) -> None:
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
        "supervised_tokens": sum(example.num_supervised for example in examples),
        "padding_own_batch": padding_factor(batches),
        "padding_all_clients": padding_factor(together),
        "floor_seconds": floor.seconds,
        "floor_flops": floor.flops,
        "gemm_flops_per_second": floor.gemm_flops_per_second,
    }
    if seconds is not None:
        section.measures[OVER_FLOOR] = seconds / floor.seconds
        section.measures[SHARE_OF_GEMM] = floor.seconds / seconds
