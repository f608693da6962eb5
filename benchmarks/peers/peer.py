"""The contestants by name, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from benchmarks.peers.ours import Ours
from benchmarks.peers.padded_cohort import PaddedCohort
from benchmarks.peers.peft_mixed import PeftMixed
from benchmarks.peers.peft_sequential import PeftSequential
from benchmarks.peers.worker import PeerMissingError, WorkerPeer
from fedmira.training.memory import available_bytes

if TYPE_CHECKING:
    import torch

    from benchmarks.options import Options
    from benchmarks.workloads import Task, Workload

OURS, ONE_CLIENT = "ours", "ours, one client at a time"
PEFT, MIXED, PADDED = "PEFT, sequential", "PEFT, mixed batch", "padded cohort"
FLOWER, PFL = "Flower simulation", "pfl-research"


class Peer(Protocol):
    """One way to train a round."""

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        ...

    def close(self) -> None:
        """Let go of processes."""
        ...


_IN_PROCESS: dict[str, Callable[[Task], Peer]] = {
    OURS: Ours,
    ONE_CLIENT: lambda task: Ours(task, cohort_size=1),
    PEFT: PeftSequential,
    MIXED: PeftMixed,
    PADDED: PaddedCohort,
}
_WORKERS = {FLOWER: "benchmarks.peers.flower_worker", PFL: "benchmarks.peers.pfl_worker"}
"""Contestants in an environment of their own, and the modules that serve them."""


_WITH_ALL_LOGITS = frozenset({MIXED, PADDED})
"""Contestants that hold the logits of every position of a batch of all clients, padded to the longest example."""
_LOGITS_HELD = 4
"""Logits, their logarithms, and the gradients of both."""
_USABLE = 0.8
"""Share of the free memory that a contestant may take."""


def runs_here(contestant: str) -> bool:
    """Whether the contestant works in this process, so that its memory and processor time can be seen."""
    return contestant in _IN_PROCESS


def needs_environment(contestants: Iterable[str]) -> bool:
    """Whether one of the contestants lives in the peers' environment."""
    return any(contestant in _WORKERS for contestant in contestants)


def make_peer(contestant: str, task: Task, workload: Workload, options: Options) -> Peer:
    """Make a contestant for a task.

    Raises:
        PeerMissingError: it cannot be run here.
    """
    if contestant in _WITH_ALL_LOGITS:
        _refuse_if_too_large(task)
    if runs_here(contestant):
        return _IN_PROCESS[contestant](task)
    if options.peers_python is None:
        raise PeerMissingError(options.peers_note)
    return WorkerPeer(_WORKERS[contestant], workload, options)


def _refuse_if_too_large(task: Task) -> None:
    """Refuse what would drive the machine out of memory.

    Raises:
        PeerMissingError: the logits alone would not fit.
    """
    steps = [[example for batch in step for example in batch] for step in zip(*task.steps_of_clients, strict=True)]
    positions = max(len(examples) * max(len(example.tokens) for example in examples) for examples in steps)
    needed = _LOGITS_HELD * 4 * positions * int(task.base.model.config.vocab_size)
    free = available_bytes(task.base.device)
    if needed > _USABLE * free:
        raise PeerMissingError(f"its full logits need some {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
