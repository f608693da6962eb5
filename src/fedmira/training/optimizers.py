"""AdamW, Adam and SGD on the rows of an arena: per-client steps, learning rates, clipping and schedules.

Agrees with torch.optim row by row. Updates happen in place, in memory that the
caller owns. Knows nothing about models, batches or losses.

Axes: C clients, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fedmira.config.training import TrainingConfig

_CLIP_EPSILON = 1e-6
"""torch's clip_grad_norm_ divides by norm + 1e-6."""
_BLOCK_BYTES = 2**20
"""On a CPU, rows are updated in blocks of about this size, which stay in the cache from one operation to the next."""


class Moments(NamedTuple):
    """What an optimizer remembers, a row per client. A tensor that the optimizer does not use has no columns."""

    first_CP: torch.Tensor
    """Adam's mean of gradients, or sgd's momentum buffer."""
    second_CP: torch.Tensor
    """Adam's mean of squared gradients."""
    steps_C: torch.Tensor
    """Updates made; float64, on the CPU."""


def num_moments(training: TrainingConfig) -> int:
    """How many (C, P) matrices the optimizer keeps: 2 for adam and adamw, 1 for sgd with momentum, else 0."""
    if training.optimizer == "sgd":
        return 1 if training.momentum else 0
    return 2


def fresh_moments(training: TrainingConfig, values_CP: torch.Tensor) -> Moments:
    """The moments before the first update."""
    kept = num_moments(training)
    nothing = values_CP.new_zeros((values_CP.shape[0], 0))
    return Moments(
        first_CP=torch.zeros_like(values_CP) if kept >= 1 else nothing,
        second_CP=torch.zeros_like(values_CP) if kept >= 2 else nothing,
        steps_C=torch.zeros(values_CP.shape[0], dtype=torch.float64),
    )


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What a gradient of norm `norm` is multiplied with, as torch's clip_grad_norm_ does; 1 without clipping.

    >>> clip_factor(4.0, 1.0) < 0.25, clip_factor(0.5, 1.0), clip_factor(9.0, None)
    (True, 1.0, 1.0)
    """
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + _CLIP_EPSILON))


def update_(
    values_CP: torch.Tensor,
    gradient_CP: torch.Tensor,
    moments: Moments,
    training: TrainingConfig,
    learning_rates: Sequence[float],
    active: Sequence[bool],
    trainable_P: torch.Tensor | None = None,
) -> None:
    """One optimizer update of every active client, in place on values and moments.

    Allocates nothing of the arena's size: at most one row, where a mask decides what decays.

    Equal to torch.optim.AdamW, Adam (weight decay as L2) or SGD on each row. Rows that are not active are not touched.

    Args:
        values_CP: the adapters.
        gradient_CP: their (clipped) gradients; zero in columns that are not trainable. Used as a scratchpad.
        moments: from `fresh_moments`, and the updates before.
        training: optimizer and its constants.
        learning_rates: of this update, per client.
        active: which clients move.
        trainable_P: bool; columns that are not trainable never move; their moments must be zero. None: all are.
    """
    moments.steps_C.add_(torch.tensor(active, dtype=moments.steps_C.dtype))
    decay: float | torch.Tensor = training.weight_decay
    if trainable_P is not None and decay:
        # a column of factors is made of it for every client, so rows are taken one by one
        decay = trainable_P.to(values_CP.dtype) * decay
    for start, stop in _blocks(values_CP, active, by_row=isinstance(decay, torch.Tensor)):
        rates_C = torch.tensor(learning_rates[start:stop], dtype=torch.float64)
        block = Moments(moments.first_CP[start:stop], moments.second_CP[start:stop], moments.steps_C[start:stop])
        step = _sgd_ if training.optimizer == "sgd" else _adam_
        step(values_CP[start:stop], gradient_CP[start:stop], block, training, rates_C, decay)


def _adam_(
    values_CP: torch.Tensor,
    gradient_CP: torch.Tensor,
    moments: Moments,
    training: TrainingConfig,
    rates_C: torch.Tensor,
    decay: float | torch.Tensor,
) -> None:
    if training.weight_decay and training.optimizer == "adamw":
        values_CP.mul_(1.0 - _column(rates_C, values_CP) * decay)
    elif training.weight_decay:
        _decay_(gradient_CP, values_CP, decay)
    moments.first_CP.lerp_(gradient_CP, 1.0 - training.beta1)
    moments.second_CP.mul_(training.beta2).addcmul_(gradient_CP, gradient_CP, value=1.0 - training.beta2)
    root_C = (1.0 - training.beta2**moments.steps_C).sqrt()
    size_C = rates_C / (1.0 - training.beta1**moments.steps_C)
    # the gradient has been heard: its memory takes the step
    step_CP = torch.sqrt(moments.second_CP, out=gradient_CP).div_(_column(root_C, values_CP)).add_(training.epsilon)
    torch.div(moments.first_CP, step_CP, out=step_CP)
    values_CP.sub_(step_CP.mul_(_column(size_C, values_CP)))


def _sgd_(
    values_CP: torch.Tensor,
    gradient_CP: torch.Tensor,
    moments: Moments,
    training: TrainingConfig,
    rates_C: torch.Tensor,
    decay: float | torch.Tensor,
) -> None:
    if training.weight_decay:
        _decay_(gradient_CP, values_CP, decay)
    direction_CP = gradient_CP
    if training.momentum:
        # torch starts the buffer at the first gradient, which is momentum * 0 + gradient
        direction_CP = moments.first_CP.mul_(training.momentum).add_(gradient_CP)
    values_CP.sub_(torch.mul(direction_CP, _column(rates_C, values_CP), out=gradient_CP))


def _decay_(gradient_CP: torch.Tensor, values_CP: torch.Tensor, decay: float | torch.Tensor) -> None:
    """gradient += decay * values, without a copy of the values."""
    if isinstance(decay, torch.Tensor):
        gradient_CP.addcmul_(values_CP, decay)
    else:
        gradient_CP.add_(values_CP, alpha=decay)


def _column(numbers_C: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return numbers_C.to(device=like.device, dtype=like.dtype)[:, None]


def _blocks(values_CP: torch.Tensor, active: Sequence[bool], by_row: bool) -> list[tuple[int, int]]:
    """Runs of consecutive active rows: single ones on request, on a CPU no longer than what stays in the cache."""
    rows = 1 if by_row else len(active)
    if values_CP.device.type == "cpu" and not by_row:
        rows = max(1, _BLOCK_BYTES // max(1, values_CP.shape[1] * values_CP.element_size()))
    blocks: list[tuple[int, int]] = []
    for row, is_active in enumerate(active):
        if is_active and blocks and blocks[-1][1] == row and row - blocks[-1][0] < rows:
            blocks[-1] = (blocks[-1][0], row + 1)
        elif is_active:
            blocks.append((row, row + 1))
    return blocks


def schedule_factor(round_: int, step: int, steps_in_round: int, total_rounds: int, training: TrainingConfig) -> float:
    """What the learning rate is multiplied with at one update, in (0, 1].

    Args:
        round_: 1 for the first round.
        step: 0 for the first update of the round.
        steps_in_round: updates this client makes in this round.
        total_rounds: over which linear and cosine fall towards 0.
        training: schedule and warmup_rounds.

    >>> cosine = TrainingConfig(schedule="cosine")
    >>> [round(schedule_factor(r, 0, 1, 4, cosine), 3) for r in (1, 2, 3, 4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    warmup = training.warmup_rounds
    begun = round_ - 1 + step / steps_in_round
    ended = round_ - 1 + (step + 1) / steps_in_round
    factor = min(1.0, ended / warmup) if warmup else 1.0
    # the fall begins where the warm-up ends
    left = total_rounds - warmup
    progress = min(1.0, max(0.0, (begun - warmup) / left)) if left > 0 else 0.0
    if training.schedule == "linear":
        factor *= 1.0 - progress
    elif training.schedule == "cosine":
        factor *= 0.5 * (1.0 + math.cos(math.pi * progress))
    return factor
