"""The contestants by name, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from benchmarks.peers.ours import Ours
from benchmarks.peers.padded_cohort import PaddedCohort
from benchmarks.peers.peft_mixed import PeftMixed
from benchmarks.peers.peft_sequential import PeftSequential
from benchmarks.peers.worker import PeerMissingError, Processes, Worker, WorkerPeer
from benchmarks.workloads import fingerprint
from fedmira.training.memory import available_bytes

if TYPE_CHECKING:
    import torch

    from benchmarks.options import Options
    from benchmarks.workloads import Task, Workload

OURS, ONE_CLIENT = "ours", "ours, one client at a time"
PEFT, MIXED, PADDED = "PEFT, sequential", "PEFT, mixed batch", "padded cohort"
KEPT = "PEFT, sequential, memory kept"
FLOWER, PFL = "Flower simulation", "pfl-research"


class Peer(Protocol):
    """One way to train a round."""

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        ...

    def close(self) -> None:
        """Let go of processes."""
        ...


_IN_PROCESS: dict[str, Callable[[Task, int | None], Peer]] = {
    OURS: lambda task, _: Ours(task),
    ONE_CLIENT: lambda task, _: Ours(task, cohort_size=1),
    PEFT: lambda task, _: PeftSequential(task),
    KEPT: lambda task, _: PeftSequential(task),
    MIXED: PeftMixed,
    PADDED: lambda task, _: PaddedCohort(task),
}
PREPARED = frozenset({OURS, ONE_CLIENT, KEPT})
"""Contestants whose process prepares itself as the command line of fedmira does; users of the others have none such."""
SPINNING = frozenset({KEPT})
"""Those of them whose threads wait as peers' do all the same, so that only the allocator differs."""
SEVERAL_PROCESSES = frozenset({FLOWER})
"""Contestants that work in children of their process."""
_CLIENTS_PER_BATCH = (1, 2, 4)
_WORKERS = {FLOWER: "benchmarks.peers.flower_worker", PFL: "benchmarks.peers.pfl_worker"}
"""Contestants in an environment of their own, and the modules that serve them."""


_WITH_ALL_LOGITS = frozenset({MIXED, PADDED})
"""Contestants that hold the logits of every position of a batch of many clients, padded to the longest example."""
_LOGITS_HELD = 4
"""Logits, their logarithms, and the gradients of both."""
_USABLE = 0.8
"""Share of the free memory that a contestant may take."""


def runs_here(contestant: str) -> bool:
    """Whether the contestant works in this process, so that its memory and processor time can be seen."""
    return contestant in _IN_PROCESS


def forms(contestant: str, num_clients: int) -> list[int | None]:
    """The forms of a contestant, of which the fastest is timed: clients per mixed batch. None where there is one."""
    if contestant != MIXED:
        return [None]
    return [*(size for size in _CLIENTS_PER_BATCH if size < num_clients), num_clients]


def needs_environment(contestants: Iterable[str]) -> bool:
    """Whether one of the contestants lives in the peers' environment."""
    return any(contestant in _WORKERS for contestant in contestants)


def make_here(contestant: str, task: Task, form: int | None) -> Peer:
    """Make a contestant in this process."""
    return _IN_PROCESS[contestant](task, form)


def start_processes(contestants: Iterable[str], options: Options) -> Processes:
    """A process for each contestant that shares this environment, none where all are to share this process."""
    own = [contestant for contestant in contestants if runs_here(contestant)] if options.own_processes else []
    return Processes(own, PREPARED, SPINNING, options.threads)


def make_peer(
    contestant: str,
    task: Task,
    workload: Workload,
    options: Options,
    processes: Processes | None = None,
    form: int | None = None,
) -> Peer:
    """Make a contestant for a task.

    Args:
        contestant: its name.
        task: what it trains.
        workload: the same by name, for another process.
        options: of the run.
        processes: of the section; a contestant that has none of its own trains here.
        form: one of `forms`.

    Raises:
        PeerMissingError: it cannot be run here.
        UnequalError: another process made another task of the workload.
    """
    if contestant in _WITH_ALL_LOGITS:
        _refuse_if_too_large(task, form or len(task.clients))
    described = {"workload": asdict(workload)}
    if processes is not None and contestant in processes:
        worker = processes[contestant]
        taken = worker.ask({"do": "take", **described, "form": form})
        return WorkerPeer(worker, taken, fingerprint(task), ends=False)
    if runs_here(contestant):
        return make_here(contestant, task, form)
    if options.peers_python is None:
        raise PeerMissingError(options.peers_note)
    worker = Worker(options.peers_python, _WORKERS[contestant], described, options.threads, prepared=False, spins=True)
    try:
        return WorkerPeer(worker, worker.ready, fingerprint(task), ends=True)
    except BaseException:
        worker.close()
        raise


def _refuse_if_too_large(task: Task, clients_per_batch: int) -> None:
    """Refuse what would drive the machine out of memory.

    Raises:
        PeerMissingError: the logits alone would not fit.
    """
    positions = 0
    for step in zip(*task.steps_of_clients, strict=True):
        for first in range(0, len(step), clients_per_batch):
            examples = [example for batch in step[first : first + clients_per_batch] for example in batch]
            positions = max(positions, len(examples) * max(len(example.tokens) for example in examples))
    needed = _LOGITS_HELD * 4 * positions * int(task.base.model.config.vocab_size)
    free = available_bytes(task.base.device)
    if needed > _USABLE * free:
        raise PeerMissingError(f"its full logits need some {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
