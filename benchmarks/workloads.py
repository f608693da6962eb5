"""What is trained in a round of the benchmark: model, adapters, clients, batches, the same for every peer.

Knows nothing about peers, time or results.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.lengths import make_clients
from benchmarks.models import make_base, tiny_twin
from fedmira.config.run import AdapterConfig, TrainingConfig
from fedmira.data.packing import batches_in_round
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.arena import initial_arena, lora_layout
from fedmira.model.base import BaseModel
from fedmira.randomness import torch_generator
from fedmira.types import Job, Layout

SEED = 0
ROUND = 1
GROUPS = frozenset({"lora_a", "lora_b"})
LEARNING_RATE = 1e-3
CLIP_NORM = 1.0
SHRINK_TO_TINY = 2
"""Real lengths are divided by this for tiny models: less, and no sequence would stand alone in attention."""
PLAIN_LEARNING_RATE = 3.0
"""Of SGD: gradients of tiny models are small."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the benchmark, by name; `build` makes the objects."""

    model: str
    lengths: str
    """`dolly` or `natural_instructions`."""
    batch_size: int
    rank: int
    targets: tuple[str, ...] | Literal["all-linear"]
    """Layers with adapters, or `all-linear`."""
    num_clients: int = 8
    local_steps: int = 2
    dtype: str = "float32"
    shrink: int = 1
    plain: bool = False
    """SGD without clipping instead of AdamW behind a clip, to both of which the size of a gradient means little."""

    @property
    def title(self) -> str:
        """For people."""
        targets = self.targets if isinstance(self.targets, str) else " and ".join(self.targets)
        return (
            f"{self.model}, {self.dtype}: {self.num_clients} clients, batch {self.batch_size}, "
            f"lengths of {self.lengths}, rank {self.rank} on {targets}, local steps {self.local_steps}"
        )

    def tiny(self) -> Workload:
        """The same on a tiny model of the family, in float64 and with lengths scaled down."""
        return replace(
            self,
            model=tiny_twin(self.model),
            rank=min(self.rank, 4),
            dtype="float64",
            shrink=SHRINK_TO_TINY,
            num_clients=min(self.num_clients, 4),
            local_steps=2,
        )


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is given: the same frozen model, starting adapters and examples for everyone."""

    base: BaseModel
    layout: Layout
    rank: int
    clients: tuple[TokenizedClient, ...]
    training: TrainingConfig
    start_SP: torch.Tensor
    """On the device of the base."""

    @property
    def job(self) -> Job:
        return Job(ROUND, tuple(range(len(self.clients))), self.start_SP, GROUPS, GROUPS, GROUPS)

    @property
    def steps_of_clients(self) -> list[list[list[TokenizedExample]]]:
        """Per client, per local step, the examples: those that `fedmira.training.cohort.train` draws."""
        return [
            [[client.train[index] for index in batch] for batch in batches_in_round(client, self.training, SEED, ROUND)]
            for client in self.clients
        ]


def build(workload: Workload, device: str) -> Task:
    """Make the model, the clients and the starting adapters of a workload."""
    base = make_base(workload.model, device, getattr(torch, workload.dtype))
    layout = lora_layout(base, AdapterConfig(rank=workload.rank, targets=workload.targets))
    vocabulary = int(base.model.config.vocab_size)
    clients = make_clients(
        workload.lengths, workload.num_clients, vocabulary, longest=base.max_length, shrink=workload.shrink
    )
    training = TrainingConfig(
        local_steps=workload.local_steps,
        batch_size=workload.batch_size,
        optimizer="sgd" if workload.plain else "adamw",
        learning_rate=PLAIN_LEARNING_RATE if workload.plain else LEARNING_RATE,
        clip_norm=None if workload.plain else CLIP_NORM,
    )
    start_SP = starting_adapters(layout, workload.num_clients, base.adapter_dtype).to(base.device)
    return Task(base, layout, workload.rank, clients, training, start_SP)


def fingerprint(task: Task) -> str:
    """What a task is made of in a few letters: weights, starting adapters and the tokens of all batches.

    Processes that show the same have the same work to do.
    """
    found = hashlib.sha256()
    weights = (weight for _, weight in sorted(task.base.model.named_parameters()))
    for tensor in (*weights, task.start_SP):
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for steps in task.steps_of_clients:
        for example in (one for batch in steps for one in batch):
            found.update(example.tokens.tobytes() + example.prompt_length.to_bytes(4, "little"))
    return found.hexdigest()[:16]


def starting_adapters(layout: Layout, num_clients: int, dtype: torch.dtype) -> torch.Tensor:
    """Adapters (S, P) as after some rounds: they differ, and B is not zero, so that no gradient vanishes."""
    start_SP = initial_arena(layout, num_clients, SEED, dtype).values_KP
    noise_SP = torch.empty(start_SP.shape, dtype=torch.float32)
    noise_SP.normal_(0.0, 0.01, generator=torch_generator(SEED, "benchmark adapters"))
    return start_SP + noise_SP.to(dtype)
