"""The nouns of fedmira: what flows from a data file to a personalised adapter. Values only, no behaviour beyond views.

Knows nothing about where examples come from, how adapters are trained, or how they are mixed.

Axes: K clients, S participants of a round, P parameters of one adapter, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction with its answer."""

    instruction: str
    """What is asked; for multi-turn data the last user turn."""
    output: str
    """The answer to train on (the first reference)."""
    input: str = ""
    """Further context of the instruction; may be empty."""
    references: tuple[str, ...] = ()
    """All acceptable answers, `output` among them; empty means (output,)."""
    task: str = ""
    """The task this example belongs to; empty if unknown."""
    category: str = ""
    """A coarser label than `task`; empty if unknown."""
    id: str = ""
    """Identifies the example in messages about it."""
    turns: tuple[tuple[str, str], ...] = ()
    """Earlier turns as (role, text), oldest first, role in {"system", "user", "assistant"}."""
    client: str = ""
    """The client that holds it, where the source says so; empty otherwise."""


@dataclass(frozen=True, slots=True)
class Client:
    """One participant: its name, its task label and its examples, already split."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    task: str = ""
    """Task label if known; graphs of kind `labels` and per-task means use it."""
    category: str = ""
    """Coarser label if known (for planted data: the family)."""


@dataclass(frozen=True, slots=True)
class Federation:
    """All clients of a run, in a fixed order that is the row order of every arena."""

    clients: tuple[Client, ...]
    true_adjacency_KK: np.ndarray | None = None
    """The graph the data was made from, where it is known (planted data); float64, symmetric, zero diagonal."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able: file names with sha256, counts, the seed of the partition, what was dropped and why."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.clients)


# ------------------------------------------------------------------------------------------------------------ adapters


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one named tensor of an adapter lies in the flat row of an arena."""

    name: str
    """For example `model.layers.0.self_attn.q_proj.lora_a`."""
    group: str
    """What mixers and jobs select by: `lora_a`, `lora_b`, `prompt`, ..."""
    layer: str
    """Name of the base module it adapts."""
    shape: tuple[int, ...]
    offset: int
    """Index of its first element in the row."""

    @property
    def size(self) -> int:
        product = 1
        for extent in self.shape:
            product *= extent
        return product


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of one adapter, in row order without gaps."""

    specs: tuple[TensorSpec, ...]
    scaling: float = 1.0
    """Factor of the low-rank product: alpha / rank."""

    @property
    def num_parameters(self) -> int:
        """P, the length of one row."""
        return sum(spec.size for spec in self.specs)

    @property
    def groups(self) -> tuple[str, ...]:
        """The distinct groups, in order of first appearance."""
        return tuple(dict.fromkeys(spec.group for spec in self.specs))

    def slices(self, group: str) -> tuple[slice, ...]:
        """The ranges of a row that belong to `group`."""
        return tuple(slice(s.offset, s.offset + s.size) for s in self.specs if s.group == group)


@dataclass(frozen=True, slots=True)
class Arena:
    """The adapters of many clients as one matrix, a row per client, with named views."""

    layout: Layout
    values_KP: torch.Tensor

    @property
    def num_clients(self) -> int:
        return int(self.values_KP.shape[0])

    def view(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor `spec` of all clients, `(K, *spec.shape)`, sharing memory with the arena."""
        rows = self.values_KP[:, spec.offset : spec.offset + spec.size]
        return rows.view(self.num_clients, *spec.shape)

    def replace(self, values_KP: torch.Tensor) -> Arena:
        """The same layout over other values."""
        return replace(self, values_KP=values_KP)


# ------------------------------------------------------------------------------------ between server and participants


class Clients(NamedTuple):
    """What the server knows about all clients; never their examples."""

    names: tuple[str, ...]
    num_examples_K: tuple[int, ...]
    """Number of training examples of each client."""
    tasks: tuple[str, ...]
    """Task label of each client; empty string where unknown."""
    seed: int
    """Seed of the run, for methods that draw."""
    true_adjacency_KK: np.ndarray | None = None


class Participants(NamedTuple):
    """Who takes part in a round."""

    round: int
    """1 for the first round."""
    ids: tuple[int, ...]
    """Rows of the arena, ascending."""


class Pull(NamedTuple):
    """A proximal term `strength / 2 * ||theta - target||^2` added to each participant's objective."""

    target_SP: torch.Tensor
    strength: float


class Job(NamedTuple):
    """What the server asks the participants of one round to do. Row s belongs to participant `ids[s]`."""

    round: int
    ids: tuple[int, ...]
    start_SP: torch.Tensor
    """Where each participant starts."""
    download: frozenset[str]
    """Groups of tensors the server sends; the others are already at the client."""
    trainable: frozenset[str]
    """Groups that move during local training."""
    upload: frozenset[str]
    """Groups that come back to the server."""
    pull: Pull | None = None


class ClientReport(NamedTuple):
    """What happened at one participant."""

    id: int
    num_examples: int
    """Training examples it holds."""
    num_steps: int
    loss_sum: float
    """Cross entropy summed over the supervised tokens it trained on, nats."""
    num_supervised_tokens: int
    num_tokens: int
    failure: str = ""
    """Why its result is missing; empty if it is present."""


class Results(NamedTuple):
    """What comes back from a job: rows of the participants that succeeded, reports of all."""

    ids: tuple[int, ...]
    """Rows of the arena that came back, ascending; a subset of the job's ids."""
    values_SP: torch.Tensor
    """Their locally trained rows, in the order of `ids`."""
    reports: tuple[ClientReport, ...]
    upload_bytes: int
    download_bytes: int
    train_seconds: float
    peak_memory_bytes: int
