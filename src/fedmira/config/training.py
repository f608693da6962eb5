"""The `training` and `federation` sections of the config: what clients do in a round, and who takes part. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, ValidationInfo, model_validator

from fedmira.config.basics import (
    FinitePositiveFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Section,
    Share,
    is_recorded,
)


class TrainingConfig(Section):
    local_steps: PositiveInt | None = None
    """Optimizer updates per client and round. Exactly one of local_steps and local_epochs; 10 steps if neither."""
    local_epochs: PositiveInt | None = None
    """Passes over a client's training examples per round. (The paper's code calls 5 epochs `local_step`.)"""
    batch_size: PositiveInt = 4
    """Examples per client and step. The paper: 8."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """`adam` couples weight decay with the gradient (L2), as the paper's code does."""
    learning_rate: FinitePositiveFloat = 2e-3
    """Of the optimizer at full height; `schedule` and `warmup_rounds` scale it. The paper's code: 3e-5 to 3e-4."""
    weight_decay: NonNegativeFloat = 0.0
    """Pull towards 0 per step. The paper's code: 0.01."""
    beta1: Share = 0.9
    """First-moment decay of adam and adamw."""
    beta2: Share = 0.999
    """Second-moment decay of adam and adamw."""
    epsilon: FinitePositiveFloat = 1e-8
    """Added to the denominator of adam and adamw."""
    momentum: Share = 0.0
    """Of sgd."""
    keep_moments: bool = False
    """Clients keep their optimizer's moments between rounds, turned as the server turned their factors; they never
    cross. Otherwise each round begins with fresh ones, as in the paper's code."""
    clip_norm: FinitePositiveFloat | None = 1.0
    """Largest norm of one client's gradient; null switches clipping off. The paper's code: 5.0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate over all rounds."""
    warmup_rounds: NonNegativeFloat = 0.0
    """Rounds over which the learning rate rises linearly from 0; fractions are allowed."""
    data_seed: NonNegativeInt | None = None
    """Seed of the order of examples in batches alone; null takes the run's. Another one, with the same partition and
    initial adapters, shows how much of a difference between two runs is that of the order."""
    cohort_size: PositiveInt | Literal["auto"] = "auto"
    """Clients trained together in one batched computation; `auto` takes as many as fit in memory."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> TrainingConfig:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                f"local_steps = {self.local_steps} and local_epochs = {self.local_epochs} exclude each other; keep one"
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum has no effect with optimizer = {self.optimizer}; remove it, or use beta1")
        if self.keep_moments and self.optimizer == "sgd" and not self.momentum:
            raise ValueError("keep_moments has no effect with sgd without momentum; remove it, or use adamw")
        of_adam = self.changed(("beta1", "beta2", "epsilon")) if self.optimizer == "sgd" else []
        if of_adam and not is_recorded(info):
            raise ValueError(f"{of_adam[0]} has no effect with optimizer = sgd; remove it, or use adamw or adam")
        return self

    @property
    def steps_or_default(self) -> int | None:
        """Steps per round, or None where epochs count."""
        return self.local_steps if self.local_steps is not None else (None if self.local_epochs is not None else 10)

    def order_seed(self, seed: int) -> int:
        """Of the batches of a run with `seed`."""
        return seed if self.data_seed is None else self.data_seed

    @property
    def plain_sgd(self) -> TrainingConfig:
        """The same work by steps of nothing but the learning rate: no moments, no weight decay, no clipping."""
        return self.model_copy(
            update={
                "optimizer": "sgd",
                "momentum": 0.0,
                "weight_decay": 0.0,
                "clip_norm": None,
                "keep_moments": False,
            }
        )


class FederationConfig(Section):
    rounds: PositiveInt = 8
    """The paper: 60."""
    participation: Fraction = 1.0
    """Share of clients sampled uniformly per round. The paper: 0.1."""
    clients_per_round: PositiveInt | None = None
    """An absolute number instead of a share."""

    @model_validator(mode="after")
    def _one_way(self) -> FederationConfig:
        if self.clients_per_round is not None and self.participation != 1.0:
            raise ValueError("participation and clients_per_round exclude each other; keep one")
        return self
