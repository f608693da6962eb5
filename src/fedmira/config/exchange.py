"""The `exchange` section of the config: how messages cross between server and clients. No torch, no transformers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmira.config.basics import FinitePositiveFloat, Fraction, Section

Compression = Literal["none", "bf16", "int8", "topk"]


WEAK_EPSILON = 10.0
"""Above it an attacker may become e^10 times as sure: what is proven is next to nothing."""


class PrivacyConfig(Section):
    """Clipped and noised uploads with a count of what each client has given away."""

    enabled: bool = False
    """Clip and noise every upload. What clients report besides (losses, counts of examples) is not covered; a method
    that asks clients for losses is refused."""
    clip_norm: FinitePositiveFloat = 1.0
    """C: largest Euclidean norm of an upload's difference to its start, over all uploaded tensors of one row."""
    noise_multiplier: Annotated[float, Field(ge=1e-12, le=1e12)] = 1.0
    """sigma: every uploaded number gets Gaussian noise of standard deviation sigma * C. Below the least value noise is
    lost in rounding, above the largest the adapter is lost in noise."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The delta of (epsilon, delta)-differential privacy; well below 1 / number of clients."""
    budget: FinitePositiveFloat | None = None
    """Largest epsilon of any client in this run; a round that would go beyond it is refused with exit code 6. Several
    runs on the same data, such as those of a comparison, add up, and nothing adds them. null: no limit."""
    noise_seed: Literal["run", "system"] = "run"
    """`run`: noise follows from the run's seed, so a simulation can be repeated, and whoever knows the seed, or has
    another run with it, can remove it. `system`: from the operating system's entropy, for adapters that leave your
    hands; a resumed run then differs, and output.checkpoint_every must be 1, so that no upload is forgotten."""

    @model_validator(mode="after")
    def _switched_on(self) -> PrivacyConfig:
        # forgetting the switch would send everything as it is
        if not self.enabled and (what := self.without_effect()):
            raise ValueError(f"{what} while enabled is false; set enabled: true, or remove it")
        return self


class ExchangeConfig(Section):
    """What crosses the seam between server and clients, in which form, and what the server refuses."""

    compression: Compression = "none"
    """Of uploads: the difference to where the client started, as `bf16`, as `int8` with a scale for each of the r
    vectors of a factor, or as the `topk` largest numbers with their places. `none` sends the tensors as they are."""
    top_k: Fraction = 0.1
    """With `topk`: share of a row's uploaded numbers that is sent."""
    error_feedback: bool = True
    """Clients remember what compression left out and add it to their next upload. Must be off with methods that draw
    new factors each round."""
    download_compression: Literal["none", "bf16", "int8"] = "none"
    """Of downloads: the difference to what the client received last. The first download of a client, and candidates
    that it judges, are sent as they are."""
    max_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 100.0
    """An upload whose difference to its start is more than this many times the median of its round is rejected, among
    three clients or more. null: any that can be computed with, up to a norm of 1e16."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Differential privacy of uploads."""

    @model_validator(mode="after")
    def _no_effect(self) -> ExchangeConfig:
        if self.changed(("top_k",)) and self.compression != "topk":
            raise ValueError(f"top_k has no effect with compression = {self.compression}; remove it, or use topk")
        return self
