"""The equality gate: before anything is timed, every contestant must train the same adapters.

In float64 on a tiny model of the same family, with the workload's lengths scaled down. transformers lowers logits to
float32 inside its own loss, which alone is worth some 1e-8 here.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

import torch

from benchmarks.workloads import Task
from fedmira.evaluation.loss import evaluate_loss
from fedmira.types import Arena

_JUDGED_TOKENS = 4096

TOLERANCE = 5e-6
"""Largest difference of any trained parameter, float64."""
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Largest difference of the final losses of the timed rounds, nats per supervised token, by the dtype of the base."""


class UnequalError(Exception):
    """A contestant does other work than ours; its times would mean nothing."""


def check_adapters(contestant: str, ours_SP: torch.Tensor, theirs_SP: torch.Tensor, start_SP: torch.Tensor) -> float:
    """The largest difference of the trained adapters.

    Raises:
        UnequalError: it is more than `TOLERANCE`, or nothing was trained.
    """
    moved = float((ours_SP - start_SP).abs().amax())
    if moved < 100 * TOLERANCE:
        raise UnequalError(f"training moved the adapters by {moved:.1e} only: a gate that compares nothing")
    difference = float((ours_SP - theirs_SP.to(ours_SP)).abs().amax())
    # written so that a NaN fails
    if not difference <= TOLERANCE:
        raise UnequalError(
            f"{contestant} trains other adapters than ours in float64: they differ by {difference:.1e}, allowed are "
            f"{TOLERANCE:.0e}"
        )
    return difference


def check_loss(contestant: str, ours: float, theirs: float, dtype: torch.dtype) -> None:
    """Compare the final losses of the timed rounds.

    Raises:
        UnequalError: they differ by more than `LOSS_TOLERANCE`.
    """
    tolerance = LOSS_TOLERANCE[dtype]
    if not abs(ours - theirs) <= tolerance:
        raise UnequalError(
            f"{contestant} ends at a loss of {theirs:.5f}, ours at {ours:.5f}; they may differ by {tolerance:g}"
        )


def final_loss(task: Task, rows_SP: torch.Tensor) -> float:
    """Nats per supervised token of the last batches under the trained adapters, judged by our packed forward."""
    last = [steps[-1] for steps in task.steps_of_clients]
    sums = evaluate_loss(task.base, Arena(task.layout, rows_SP.to(task.start_SP)), last, batch_tokens=_JUDGED_TOKENS)
    return sum(total for total, _ in sums) / sum(count for _, count in sums)
