"""Differential privacy of uploads: clipped, noised and counted.

An upload is start + min(1, C / |d|) d + sigma C z, with d the difference that local training made over the uploaded
tensors and z standard Gaussian (the Gaussian mechanism of Dwork and Roth 2014; clipping as in McMahan et al., *Learning
differentially private recurrent language models*, ICLR 2018). What is protected is a client's whole data: neighbours
are worlds in which it sends its difference or a zero one; between two of its differences lie up to 2 C, and epsilon is
that of half the noise multiplier. The server sees who takes part, so sampling clients amplifies nothing and each upload
counts in full. Mixing, graphs and compression afterwards cost nothing more.

With one trained factor the noise is linear in the product B A; with both, sigma^2 C^2 z_B z_A comes on top.

In a simulation the noise comes from streams named by client and round: it can be repeated, and removed by whoever knows
the seed or another run with it. Otherwise every number comes from the operating system, so that there is no seed to
guess. Noise is drawn as floating-point numbers, whose lowest bits are not protected against (Mironov 2012).

Axes: S rows, P parameters of one adapter.
"""

from __future__ import annotations

import functools
import math
import secrets
import warnings
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedmira.config.exchange import PrivacyConfig
from fedmira.errors import ParticipationError, SetupError
from fedmira.exchange.messages import crossing
from fedmira.formats import counted
from fedmira.randomness import generator
from fedmira.types import Layout

_ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *map(float, range(11, 64)), *map(float, range(64, 1025, 16)))
"""Renyi orders among which the accountant looks for the best bound."""
_MOST_UPLOADS = 1 << 20
NO_LOSSES = (
    "exchange.privacy covers adapters only, but with these settings the method asks clients for losses on their own "
    "examples, which nothing would noise. Switch exchange.privacy.enabled off, or take a method that asks nobody"
)
"""Why a trial of clients is refused."""


def privatise_(
    layout: Layout,
    groups: Collection[str],
    values_SP: torch.Tensor,
    start_SP: torch.Tensor,
    streams: Sequence[tuple[str | int, ...]],
    config: PrivacyConfig,
    seed: int,
) -> None:
    """Clip and noise, in place, what crosses of each row.

    Args:
        layout: of the rows.
        groups: what crosses; other tensors stay at the client and stay as they are.
        values_SP: trained rows.
        start_SP: where they started.
        streams: the name of each row's noise, such as (client, round, row).
        config: C, sigma, and where the noise comes from.
        seed: of the run.
    """
    specs = crossing(layout, groups)
    for value_P, start_P, stream in zip(values_SP, start_SP, streams, strict=True):
        parts = [spec.columns for spec in specs]
        differences = [(value_P[part] - start_P[part].to(value_P)).float() for part in parts]
        norms = [torch.linalg.vector_norm(difference.double()) for difference in differences]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        if not math.isfinite(norm):
            # what cannot be clipped says nothing but that, and is rejected
            for part in parts:
                value_P[part] = math.nan
            continue
        factor = min(1.0, config.clip_norm / norm) if norm else 1.0
        drawn = generator(seed, "privacy", *stream).standard_normal if config.noise_seed == "run" else _from_system
        for part, difference in zip(parts, differences, strict=True):
            noise = torch.from_numpy(drawn(len(difference))).to(difference)
            moved = factor * difference + config.noise_multiplier * config.clip_norm * noise
            value_P[part] = (start_P[part].to(difference) + moved).to(value_P)


def _from_system(count: int) -> npt.NDArray[np.float64]:
    """Standard Gaussian numbers, each from 52 bits of the operating system's entropy: values up to 8.1 in size."""
    bits = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64) >> np.uint64(12)
    uniform = (bits + 0.5) / 2.0**52
    normal: npt.NDArray[np.float64] = torch.special.ndtri(torch.from_numpy(uniform)).numpy()
    return normal


@functools.lru_cache(maxsize=4096)
def epsilon(num_uploads: int, noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of `num_uploads` uploads of one client, by Opacus' Renyi accountant; 0 for none.

    The Gaussian mechanism has Renyi divergence alpha / (2 sigma^2) of order alpha, uploads add (Mironov 2017), and the
    best order is turned into (epsilon, delta). With a large delta that bound can be below 0, which is 0.

    Raises:
        SetupError: the package opacus is missing.
    """
    if not num_uploads:
        return 0.0
    accountant = require_accountant()()
    accountant.history = [(noise_multiplier, 1.0, num_uploads)]
    with warnings.catch_warnings():
        # a bound at the first or last order is a bound
        warnings.filterwarnings("ignore", message="Optimal order")
        return max(0.0, float(accountant.get_epsilon(delta, alphas=list(_ORDERS))))


def require_accountant() -> type:
    """Return Opacus' accountant.

    Raises:
        SetupError: the package opacus is missing.
    """
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise SetupError(
            "exchange.privacy counts epsilon with the package opacus, which is not installed; "
            'install it with: pip install "fedmira[privacy]", or set exchange.privacy.enabled: false'
        ) from error
    return RDPAccountant  # type: ignore[no-any-return]


def refuse_overspending(config: PrivacyConfig, round_: int, names: Sequence[str], uploads_after: Sequence[int]) -> None:
    """Refuse a round in which a client would give away more than its budget.

    Args:
        config: with the budget; None allows everything.
        round_: for the message.
        names: of the clients.
        uploads_after: how many uploads of each there would be with those of this round.

    Raises:
        ParticipationError: the budget of a client would be spent; it names the client and says what is possible.
    """
    if config.budget is None:
        return
    settings = config.noise_multiplier, config.delta
    spent = {name: epsilon(uploads, *settings) for name, uploads in zip(names, uploads_after, strict=True)}
    over = [name for name, value in spent.items() if value > config.budget]
    if over:
        most, saved = max_uploads(config), "What the rounds before it learned is saved. " if round_ > 1 else ""
        raise ParticipationError(
            f"round {round_}: the privacy budget of {len(over)} of {len(names)} participants would be spent, first "
            f"{over[0]}: epsilon {spent[over[0]]:.4g} at delta {config.delta:g}, allowed is "
            f"exchange.privacy.budget = {config.budget:g}, enough for {counted(most, 'upload')}. "
            f"{saved}A new run spends anew on the same data: give it fewer rounds, fewer clients per round or a larger "
            "noise_multiplier"
        )


def max_uploads(config: PrivacyConfig) -> int:
    """Return how many uploads of one client the budget allows."""
    assert config.budget is not None
    low, high = 0, 1
    while high < _MOST_UPLOADS and epsilon(high, config.noise_multiplier, config.delta) <= config.budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = epsilon(middle, config.noise_multiplier, config.delta) <= config.budget
        low, high = (middle, high) if fits else (low, middle)
    return low


def advice(layout: Layout, uploaded: Collection[str], trainable: Collection[str]) -> str:
    """What speaks against these groups of tensors under noise; empty if nothing does."""
    moving = {spec.group for spec in layout.specs if spec.group in set(uploaded) & set(trainable)}
    for first in sorted(group for group in moving if group.endswith("_a")):
        second = f"{first[:-1]}b"
        if second in moving:
            return (
                f"exchange.privacy noises both {first} and {second}: the noise in their product is quadratic. A method "
                "that trains and sends one of them (a frozen A) keeps it linear"
            )
    return ""
