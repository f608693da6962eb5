"""AdamW, Adam and SGD on the rows of an arena: per-client steps, learning rates, clipping and schedules.

Pure functions that agree with torch.optim row by row. Knows nothing about models, batches or losses.

Axes: C clients, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from fedmira.config import TrainingConfig

_CLIP_EPSILON = 1e-6
"""torch's clip_grad_norm_ divides by norm + 1e-6."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What an optimizer remembers, a row per client. A tensor that the optimizer does not use has no columns."""

    first_CP: torch.Tensor
    """Adam's mean of gradients, or sgd's momentum buffer."""
    second_CP: torch.Tensor
    """Adam's mean of squared gradients."""
    steps_C: torch.Tensor
    """Updates made; float64, on the CPU."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


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


def clip_rows(gradient_CP: torch.Tensor, norm_C: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Scale each row down to norm `clip_norm` as torch's clip_grad_norm_ does for one client, (C, P)."""
    return gradient_CP * (clip_norm / (norm_C + _CLIP_EPSILON)).clamp(max=1.0)[:, None]


def update(
    values_CP: torch.Tensor,
    gradient_CP: torch.Tensor,
    moments: Moments,
    training: TrainingConfig,
    learning_rates: Sequence[float],
    active: Sequence[bool],
    trainable_P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Moments]:
    """One optimizer update of every active client; returns new values (C, P) and new moments.

    Equal to torch.optim.AdamW, Adam (weight decay as L2) or SGD on each row.

    Args:
        values_CP: the adapters.
        gradient_CP: their (clipped) gradients.
        moments: from `fresh_moments` or the update before.
        training: optimizer and its constants.
        learning_rates: of this update, per client.
        active: clients that are not active keep values and moments bit for bit, whatever their gradient.
        trainable_P: bool; columns that are not trainable never move. None: all are.
    """
    steps_C = moments.steps_C + torch.tensor(active, dtype=moments.steps_C.dtype)
    rate_C = torch.tensor(learning_rates, dtype=torch.float64)

    def column(numbers_C: torch.Tensor) -> torch.Tensor:
        return numbers_C.to(device=values_CP.device, dtype=values_CP.dtype)[:, None]

    first_CP, second_CP = moments.first_CP, moments.second_CP
    new_CP = values_CP
    if training.optimizer == "adamw":
        new_CP = values_CP * column(1.0 - rate_C * training.weight_decay)
    elif training.weight_decay:
        gradient_CP = gradient_CP + training.weight_decay * values_CP
    if training.optimizer == "sgd":
        if training.momentum:
            # torch starts the buffer at the first gradient, which is momentum * 0 + gradient
            first_CP = first_CP * training.momentum + gradient_CP
        new_CP = new_CP - (first_CP if training.momentum else gradient_CP) * column(rate_C)
    else:
        first_CP = torch.lerp(first_CP, gradient_CP, 1.0 - training.beta1)
        second_CP = (second_CP * training.beta2).addcmul_(gradient_CP, gradient_CP, value=1.0 - training.beta2)
        # a row that was never active has made no step: 1 avoids dividing by zero in numbers that are thrown away
        count_C = steps_C.clamp(min=1.0)
        root_C = (1.0 - training.beta2**count_C).sqrt()
        denominator_CP = second_CP.sqrt().div_(column(root_C)).add_(training.epsilon)
        new_CP = new_CP - (first_CP / denominator_CP).mul_(column(rate_C / (1.0 - training.beta1**count_C)))
    if trainable_P is not None:
        new_CP = torch.where(trainable_P, new_CP, values_CP)
    if not all(active):
        active_C1 = torch.tensor(active, device=values_CP.device)[:, None]
        new_CP = torch.where(active_C1, new_CP, values_CP)
        first_CP = torch.where(active_C1, first_CP, moments.first_CP)
        second_CP = torch.where(active_C1, second_CP, moments.second_CP)
    return new_CP, Moments(first_CP, second_CP, steps_C)


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
