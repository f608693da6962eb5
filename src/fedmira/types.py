"""The nouns of fedmira: what flows from a data file to a personalised adapter. Values only, no behaviour beyond views.

Knows nothing about where examples come from, how adapters are trained, or how they are mixed.

Axes: K clients, S participants of a round, P parameters of one adapter, T tokens of a sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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

PAIRS = (("lora_a", "lora_b"), ("second_a", "second_b"))
"""Groups of the pairs of factors that a layer may have, A (R, I) and B (O, R); their products add up. Methods that keep
a shared and an own adapter at each client (FedDPA, FedALT) use the second."""


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
        return math.prod(self.shape)

    @property
    def columns(self) -> slice:
        """Its elements in a row."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of one adapter, in row order without gaps."""

    specs: tuple[TensorSpec, ...]
    scaling: float = 1.0
    """Factor of the low-rank product: alpha / rank."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, str, str, tuple[int, ...]]], scaling: float = 1.0) -> Layout:
        """Lay tensors (name, group, layer, shape) behind one another."""
        specs: list[TensorSpec] = []
        offset = 0
        for name, group, layer, shape in tensors:
            specs.append(TensorSpec(name, group, layer, shape, offset))
            offset += specs[-1].size
        return cls(tuple(specs), scaling)

    @property
    def num_parameters(self) -> int:
        """P, the length of one row."""
        return sum(spec.size for spec in self.specs)

    @property
    def groups(self) -> tuple[str, ...]:
        """The distinct groups, in order of first appearance."""
        return tuple(dict.fromkeys(spec.group for spec in self.specs))

    @property
    def layers(self) -> tuple[str, ...]:
        """The distinct adapted layers, in order of first appearance."""
        return tuple(dict.fromkeys(spec.layer for spec in self.specs))

    @property
    def pairs(self) -> tuple[tuple[TensorSpec, TensorSpec], ...]:
        """The factors (A, B) of every low-rank pair of every layer, in row order of A."""
        places = {(spec.layer, spec.group): spec for spec in self.specs}
        partner = dict(PAIRS)
        keys = ((spec, (spec.layer, partner[spec.group])) for spec in self.specs if spec.group in partner)
        return tuple((spec, places[key]) for spec, key in keys if key in places)

    @property
    def num_virtual_tokens(self) -> int:
        """Rows that the adapter puts before every sequence; 0 unless it is a soft prompt."""
        return sum(spec.shape[0] for spec in self.specs if spec.group == "prompt")

    def slices(self, group: str) -> tuple[slice, ...]:
        """The ranges of a row that belong to `group`."""
        return tuple(s.columns for s in self.specs if s.group == group)


@dataclass(frozen=True, slots=True)
class Arena:
    """The adapters of many clients as one matrix, a row per client, with named views."""

    layout: Layout
    values_KP: torch.Tensor
    shift_W: torch.Tensor | None = None
    """Added to the weights of the adapted layers, for all clients alike: (O, I) of each layer, flat, in the order of
    `layout.layers`; None adds nothing. What methods merge into the base ends up here."""

    @property
    def num_clients(self) -> int:
        return int(self.values_KP.shape[0])

    def view(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor `spec` of all clients, `(K, *spec.shape)`, sharing memory with the arena."""
        rows = self.values_KP[:, spec.columns]
        return rows.view(self.num_clients, *spec.shape)

    def replace(self, values_KP: torch.Tensor) -> Arena:
        """The same layout and shift over other values."""
        return replace(self, values_KP=values_KP)

    def rows(self, ids: Sequence[int]) -> Arena:
        """The adapters of the clients `ids`, to be read only: those of all, in order, are this arena itself."""
        rows = list(ids)
        return self if rows == list(range(self.num_clients)) else self.replace(self.values_KP[rows])


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
    ranks_K: tuple[int, ...] | None = None
    """Rank of each client's adapter, at most that of the arena; None means that of the arena for all."""


class Participants(NamedTuple):
    """Who takes part in a round."""

    round: int
    """1 for the first round."""
    ids: tuple[int, ...]
    """Rows of the arena, ascending."""
    last: bool = False
    """Whether no round follows: what clients have after it is what they keep."""


class Pull(NamedTuple):
    """A proximal term `strength_s / 2 * ||theta_s - target_s||^2` added to the objective of each row."""

    target_SP: torch.Tensor
    strength_S: tuple[float, ...]


class SeedPool(NamedTuple):
    """Random directions that clients and server know by number: z_j ~ N(0, I), j < size, from the run's seed."""

    size: int
    epsilon: float
    """How far from its adapter, in units of z_j, a client evaluates its loss to find the slope along z_j."""


class Job(NamedTuple):
    """What the server asks the participants of one round to do. Row s belongs to client `ids[s]`.

    A client may have several rows, each of which it trains on its own (Ditto's global and personal adapter).
    """

    round: int
    ids: tuple[int, ...]
    start_SP: torch.Tensor
    """Where each row starts."""
    download: frozenset[str]
    """Groups of tensors the server sends; the others are already at the client."""
    trainable: frozenset[str]
    """Groups that move during local training."""
    upload: frozenset[str]
    """Groups that come back to the server."""
    pull: Pull | None = None
    work: float = 1.0
    """Share of the configured local steps or epochs that each row is trained for, in (0, 1]."""
    shift_W: torch.Tensor | None = None
    """Added to the weights of the adapted layers while this job is done; see `Arena.shift_W`."""
    shift_bytes: int = 0
    """Bytes that bring one participant what changed in the shift since the round before."""
    local_rows: int = 0
    """The last rows of the job that never cross: their clients hold them and keep them."""
    pooled: bool = False
    """All participants' examples form one data set, on which the rows, which start alike, are trained as one for the
    steps of all of them together. For references only: examples would have to leave their clients."""
    seeds: SeedPool | None = None
    """Rows are trained without gradients, each step along a direction of this pool, and only scalars cross: up the
    number and the scalar of each step, down a sum for each direction. Excludes `pull`. None: trained by gradients."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many earlier rows each row's client has: several rows of one client each have a memory of their own."""
        seen: Counter[int] = Counter()
        blocks = []
        for id_ in self.ids:
            blocks.append(seen[id_])
            seen[id_] += 1
        return tuple(blocks)

    @property
    def num_crossing(self) -> int:
        """Rows of the job that are sent and come back."""
        return len(self.ids) - self.local_rows


class Trial(NamedTuple):
    """Adapters that clients are asked to judge by the loss on examples of their own."""

    ids: tuple[int, ...]
    """Who is asked; ascending."""
    num_candidates: int
    candidate: Callable[[int], torch.Tensor]
    """Number of a candidate -> (S, P), what each client judges; made when needed, as all together may not fit."""
    sent: int
    """Adapters that cross for each client; it makes the others from these and its own."""
    split: Literal["train", "validation"] = "validation"
    parts: tuple[int, ...] = ()
    """Candidates of each question where several are asked together, in order; empty: one question."""
    compare_SP: torch.Tensor | None = None
    """Adapters of those asked whose predictions on the server's own texts are to be compared; the server does it by
    itself, so nothing crosses for it."""
    groups: frozenset[str] | None = None
    """Groups of tensors that cross of the adapters that are sent; None means all."""
    most_examples: int | None = None
    """Examples that each client judges at most; None means all."""
    turn: int = 0
    """Which of its examples those are: each turn goes on where the one before ended, and begins again at the end."""
    every: int = 1
    """Rounds from one such question to the next; turns count questions, not rounds."""
    versus: tuple[int, ...] = ()
    """Numbers of the candidates that those after them, up to the next, are compared with, ascending; clients then say
    how sure they are of that."""


class Losses(NamedTuple):
    """What clients answer to a trial."""

    mean_SQ: torch.Tensor
    """Cross entropy in nats per supervised token, float64 on the CPU; nan where a client has no such example."""
    examples_S: tuple[int, ...]
    """Examples behind each mean."""
    upload_bytes: int
    download_bytes: int
    agreement_SS: torch.Tensor | None = None
    """With `Trial.compare_SP`: mean over the tokens of the server's texts of sum_v sqrt(p_s(v) p_t(v)), 0 .. 1, p the
    predictions of two adapters; float64 on the CPU."""
    scatter_SQ: torch.Tensor | None = None
    """With `Trial.versus`: the sampling variance of the logarithm of a candidate's mean over that of the one it is
    compared with, times the examples behind it, see `evaluation.loss.scatter`; nan where fewer than two are, and of
    candidates before the first that others are compared with. float64 on the CPU."""


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
    """Clients whose rows came back, in the order of the job's rows."""
    values_SP: torch.Tensor
    """Their locally trained rows, in the order of `ids`."""
    reports: tuple[ClientReport, ...]
    upload_bytes: int
    download_bytes: int
    train_seconds: float
    uncompressed_bytes: int = 0
    """Upload and download together, had the tensors crossed as they are; 0 where nothing is compressed."""
