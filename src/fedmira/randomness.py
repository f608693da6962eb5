"""Seeded random streams, one per purpose.

A stream is named by the run's seed and by words and numbers such as `("batches", "client-007", 12)`; its draws depend
on nothing else, so adding a client, a metric or a round never changes what another stream draws. Knows nothing about
what the numbers are used for, and never touches global random state.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *purpose: str | int) -> int:
    """Return the 63-bit integer that names the stream `purpose` of `seed`.

    >>> stream_seed(0, "batches", "client-1", 3) == stream_seed(0, "batches", "client-1", 3)
    True
    >>> stream_seed(0, "a", "b") == stream_seed(0, "ab")
    False
    """
    # a numpy integer has another repr than the same int, which would silently name another stream
    words = tuple(part if isinstance(part, str) else int(part) for part in purpose)
    digest = hashlib.blake2b(repr((int(seed), *words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a fresh numpy generator for the stream `purpose` of `seed`."""
    return np.random.Generator(np.random.Philox(stream_seed(seed, *purpose)))


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a fresh CPU `torch.Generator` for the stream `purpose` of `seed`."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, *purpose))
