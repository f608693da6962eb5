"""Slopes of clients' losses along random directions, found with two forward passes (Qin et al., ICML 2024, FedKSeed).

z_j ~ N(0, I) depends on the run's seed and on j alone, so an adapter can be rebuilt from pairs (j, scalar). Which
direction a client takes depends on its name, the round and the step, never on its cohort. Knows nothing about models or
optimizers.

Axes: C clients of a cohort, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedmira.randomness import generator, torch_generator
from fedmira.types import SeedPool


def direction_number(pool: SeedPool, seed: int, client: str, round_: int, step: int) -> int:
    """j, uniform in 0 .. pool.size - 1.

    Args:
        pool: the directions.
        seed: of the run.
        client: its name.
        round_: 1 for the first round.
        step: 0 for the first of the round.
    """
    return int(generator(seed, "fedkseed number", client, round_, step).integers(pool.size))


def direction(seed: int, number: int, num_parameters: int) -> torch.Tensor:
    """z_j, (P,), float32 on the CPU: the same numbers whatever the device and the type of the adapters."""
    return torch.randn(num_parameters, generator=torch_generator(seed, "fedkseed direction", number))


def slopes(
    values_CP: torch.Tensor,
    direction_CP: torch.Tensor,
    moved_CP: torch.Tensor,
    epsilon: float,
    loss_sums: Callable[[], torch.Tensor],
    supervised_per_client: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(f(theta + eps z) - f(theta - eps z)) / (2 eps) of every client, f its mean loss per token; and its loss sum.

    Args:
        values_CP: theta; only read.
        direction_CP: z; 0 in columns that must not move.
        moved_CP: what `loss_sums` judges; left at theta - eps z.
        epsilon: in units of z.
        loss_sums: each client's loss in nats, (C,), summed over its supervised tokens.
        supervised_per_client: their numbers; a client without any has slope 0.

    Returns:
        The slopes (C,), and the means of the two loss sums (C,), which are f(theta) times tokens to O(eps^2).
    """
    sums = []
    for sign in (1, -1):
        torch.add(values_CP, direction_CP, alpha=sign * epsilon, out=moved_CP)
        sums.append(loss_sums())
    above_C, below_C = sums
    count_C = torch.tensor(supervised_per_client, device=above_C.device).clamp(min=1)
    return (above_C - below_C) / (2 * epsilon * count_C), (above_C + below_C) / 2
