"""How many bytes training takes, and how many clients fit into a cohort.

The activations of the body are measured on a few tokens, once per call, so that every family is counted as it is.
Knows nothing about rounds or methods.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fedmira.config.training import TrainingConfig
from fedmira.data.packing import common_prefix, pack
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.adapted import AdaptedModel, computes_in_parts
from fedmira.model.attention import MOST_TOGETHER
from fedmira.model.base import BaseModel
from fedmira.model.full import is_full
from fedmira.model.kept_attention import MOST_KEPT
from fedmira.model.lora import Dropout
from fedmira.side_by_side import portions
from fedmira.training.objective import logits_at_once
from fedmira.training.optimizers import num_moments
from fedmira.types import Arena, Layout

_HEADROOM = 1.3
"""Saved activations are not all: backward holds gradients of activations and workspaces beside them."""
_USABLE = 0.8
"""Share of the free memory that a cohort may take."""
_CPU_ROWS, _CPU_ROWS_IN_PARTS = 2048, 16384
"""On a CPU this many packed rows are computed at full speed: more would only leave the cache. Where a step is computed
in parts, they take the same time where there are many clients to make them of."""
AT_ONCE = 2
"""Parts of a step that are computed at the same time on several threads of a CPU."""
_PROBE_TOKENS = 256
"""What is measured where sequences are longer than those whose attention keeps its weights, which grow with them."""
_SERVER_ARENAS = 6
"""Adapters of all clients that lie on the device while some train: `mira` holds most, 5.5 to 6.2 of them (its state,
uploads, starts, average, the job and what came back)."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Predicted bytes while one cohort trains."""

    base_bytes: int
    clients_bytes: int
    """Adapters, gradients and moments of the cohort."""
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.clients_bytes + self.activation_bytes


def bytes_per_client(layout: Layout, training: TrainingConfig, element_bytes: int = 4) -> int:
    """Bytes of one client's adapter, gradient and moments while it trains; updates need none beside them."""
    return (2 + num_moments(training)) * layout.num_parameters * element_bytes


def server_bytes(layout: Layout, num_clients: int, training: TrainingConfig, element_bytes: int = 4) -> int:
    """Bytes of the adapters of all clients that lie on the device while some of them train."""
    arenas = _SERVER_ARENAS + (3 if training.keep_moments else 0)
    return arenas * num_clients * layout.num_parameters * element_bytes


def probe_length(base: BaseModel, clients: Sequence[TokenizedClient]) -> int:
    """How long a sequence `activation_bytes_per_token` should measure for clients like these, in tokens."""
    longest = max((example.num_inputs for client in clients for example in client.train), default=_PROBE_TOKENS)
    return longest if base.device.type == "cpu" and longest <= MOST_KEPT else _PROBE_TOKENS


def activation_bytes_per_token(
    base: BaseModel, layout: Layout, dropout: float = 0.0, length: int = _PROBE_TOKENS
) -> int:
    """Bytes that the body saves for backward per packed token of a sequence of `length`, measured; the output head is
    left out.

    With dropout it goes through the stock model, and each pair has a mask of its inputs. Behind virtual tokens as many
    sequences are measured as share two calls of attention: each call keeps keys of all virtual tokens, and weights for
    what its sequences do not see of one another.
    """
    virtual = layout.num_virtual_tokens
    length = min(length, base.max_length - virtual)
    # half of the tokens are supervised: behind the last attention a fused body keeps nothing of the others
    example = TokenizedExample(torch.zeros(length + 1, dtype=torch.int32).numpy(), 1 + length // 2, "probe")
    examples = [example] * (1 + 2 * max(1, MOST_TOGETHER // length) if virtual else 1)
    batch = pack([examples], share_prefixes=False, virtual_tokens=virtual)
    values_CP = torch.zeros(1, layout.num_parameters, dtype=base.adapter_dtype, device=base.device)
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}
    weights |= {buffer.untyped_storage().data_ptr() for buffer in base.model.buffers()}
    weights.add(values_CP.untyped_storage().data_ptr())
    saved: dict[int, int] = {}
    kept: list[torch.UntypedStorage] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            # a freed storage could lend its address to the next one; a tensor would keep the graph that keeps it
            kept.append(storage)
        return tensor.detach()

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        AdaptedModel(
            base,
            Arena(layout, values_CP),
            gradient_CP=torch.zeros_like(values_CP),
            trainable=frozenset(layout.groups),
        ) as adapted,
    ):
        adapted.hidden(batch, Dropout(dropout, lambda client, name: torch.Generator()) if dropout else None)
    masks = sum(spec.shape[1] for spec, _ in layout.pairs) * values_CP.element_size() if dropout else 0
    return math.ceil(sum(saved.values()) / (virtual + len(examples) * length)) + masks


def estimate(
    base: BaseModel,
    layout: Layout,
    clients: Sequence[TokenizedClient],
    training: TrainingConfig,
    cohort_size: int,
    token_bytes: int,
    dropout: float = 0.0,
) -> MemoryEstimate:
    """Predict the memory of a cohort of `cohort_size` of the clients with the longest batches.

    Args:
        base: the frozen model, already in memory.
        layout: of one adapter.
        clients: all clients; the largest batches they can draw count.
        training: batch size and optimizer.
        cohort_size: clients trained together.
        token_bytes: from `activation_bytes_per_token`.
        dropout: rate on the input of the low-rank branch.
    """
    heaviest = sorted((_largest_batch(client, training.batch_size) for client in clients), reverse=True)[:cohort_size]
    of_clients = [batch_tokens + layout.num_virtual_tokens for batch_tokens, _ in heaviest]
    tokens = _at_once(of_clients) if computes_in_parts(base, layout, dropout) else sum(of_clients)
    supervised = sum(batch_supervised for _, batch_supervised in heaviest)
    of_client = bytes_per_client(layout, training, base.adapter_dtype.itemsize)
    if base.dtype != base.adapter_dtype and not is_full(layout):
        # what the base reads it as
        of_client += layout.num_parameters * base.dtype.itemsize
    base_bytes = sum(p.numel() * p.element_size() for p in base.model.parameters())
    return MemoryEstimate(
        # where a client has weights of its own, those of the base are kept beside them
        base_bytes=2 * base_bytes if is_full(layout) else base_bytes,
        clients_bytes=cohort_size * of_client,
        activation_bytes=math.ceil(_HEADROOM * tokens * token_bytes) + head_bytes(base, layout, supervised),
    )


def num_parts(rows: int) -> int:
    """In how many parts a step of that many packed rows is computed on several threads of a CPU."""
    return AT_ONCE * max(1, math.ceil(rows / (AT_ONCE * _CPU_ROWS)))


def _at_once(tokens: Sequence[int]) -> int:
    """How many of the tokens of a cohort's batches are in memory at a time where a step is computed in parts."""
    parts = portions(tokens, num_parts(sum(tokens)))
    return sum(tokens[place] for part in parts[:AT_ONCE] for place in part)


def head_bytes(base: BaseModel, layout: Layout, supervised: int) -> int:
    """Bytes of so many supervised rows behind the output head: logits, and their log-softmax and gradient in float32.

    Where the head is frozen these exist for a block of rows and tokens at a time (of two parts of a step, for two),
    beside the gradient of the hidden states of all.
    """
    features = base.model.get_output_embeddings().weight.shape[1]
    of_logit = base.dtype.itemsize + 2 * max(4, base.dtype.itemsize)
    if is_full(layout):
        return int(supervised * base.vocabulary * of_logit)
    rows, columns = logits_at_once(base)
    at_once = min(supervised, AT_ONCE * rows)
    return int(at_once * columns * of_logit + supervised * features * base.dtype.itemsize)


def choose_cohort_size(
    base: BaseModel,
    layout: Layout,
    clients: Sequence[TokenizedClient],
    training: TrainingConfig,
    available_bytes: int,
    dropout: float = 0.0,
) -> int:
    """The largest cohort that fits `available_bytes` beside what the server holds; on a CPU no more than make 2048
    rows, where steps are computed in parts 16384. At least 1.

    Clients with weights of their own are trained one at a time.
    """
    if is_full(layout):
        return 1
    token_bytes = activation_bytes_per_token(base, layout, dropout, probe_length(base, clients))
    held_bytes = server_bytes(layout, len(clients), training, base.adapter_dtype.itemsize)

    def fits(size: int) -> bool:
        needed = estimate(base, layout, clients, training, size, token_bytes, dropout)
        return needed.total_bytes - needed.base_bytes <= _USABLE * (available_bytes - held_bytes)

    most = len(clients)
    if base.device.type == "cpu":
        mean_rows = sum(_mean_batch_rows(client, training.batch_size) for client in clients) / len(clients)
        mean_rows += layout.num_virtual_tokens
        rows = _CPU_ROWS_IN_PARTS if computes_in_parts(base, layout, dropout) else _CPU_ROWS
        most = max(1, min(most, round(rows / mean_rows)))
    # estimates grow with the size, so the largest that fits can be bisected
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, as the system reports them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    kibibytes = number_beside("MemAvailable:", Path("/proc/meminfo"))
    candidates = [None if kibibytes is None else kibibytes * 1024, _cgroup_available(Path("/sys/fs/cgroup"))]
    known = [value for value in candidates if value is not None]
    # where the system says nothing, half of what is built in
    return min(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def number_beside(label: str, path: Path) -> int | None:
    """The number behind `label` at the beginning of a line; None where there is no such line or file."""
    with suppress(OSError):
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(label)), None)
    return None


def _cgroup_available(folder: Path) -> int | None:
    """What a container's limit leaves, files that can be let go included; None where there is no limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    used -= number_beside("inactive_file ", folder / "memory.stat") or 0
    return max(0, int(limit) - max(0, used)) if limit.isdigit() else None


def _largest_batch(client: TokenizedClient, batch_size: int) -> tuple[int, int]:
    """(tokens, supervised tokens) of the longest batch this client can draw."""
    longest = sorted(client.train, key=lambda example: len(example.tokens), reverse=True)[:batch_size]
    return (
        sum(example.num_inputs for example in longest),
        sum(example.num_supervised for example in longest),
    )


def _mean_batch_rows(client: TokenizedClient, batch_size: int) -> float:
    """Packed rows of a batch of mean length; what all examples of the client begin with is there once."""
    lengths = [example.num_inputs for example in client.train]
    shared = common_prefix(client.train)
    return shared + min(batch_size, len(lengths)) * (sum(lengths) / max(1, len(lengths)) - shared)
