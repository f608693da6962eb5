"""What models make of texts, for graphs: how alike adapters predict, and what clients' prompts are about.

Knows nothing about graphs, rounds or how the adapters came to be.

Axes: S adapters compared, K clients, m answer tokens of a text, V vocabulary, d hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedmira.data.packing import pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.evaluation.loss import batches
from fedmira.model.adapted import AdaptedModel
from fedmira.model.base import BaseModel
from fedmira.model.full import is_full, one_by_one
from fedmira.model.shift import shifted
from fedmira.types import Arena


def agreement(base: BaseModel, arena: Arena, texts: Sequence[TokenizedExample], batch_tokens: int) -> torch.Tensor:
    """Return how alike adapters predict, (S, S) float64 on the CPU: sum_v sqrt(p_s(v) p_t(v)), mean over answer tokens.

    The Bhattacharyya coefficient: 1 for equal predictions, 0 for disjoint ones, and an inner product of vectors
    sqrt(p), so the matrix is positive semi-definite.

    Args:
        base: the frozen model.
        arena: (S, P), the adapters.
        texts: what all of them read; compared where tokens are supervised.
        batch_tokens: packed tokens read together at most.

    Raises:
        ValueError: there is no text.
    """
    if not texts:
        raise ValueError("predictions can only be compared on texts; none were given")
    total_SS = torch.zeros(arena.num_clients, arena.num_clients, dtype=torch.float64)
    num_tokens = 0
    with torch.inference_mode():
        for text in texts:
            logits_SmV = _logits(base, arena, text, batch_tokens)
            num_tokens += logits_SmV.shape[1]
            for logits_SV in logits_SmV.unbind(1):
                # the root of a softmax is the softmax of half the logits, up to its scale
                root_SV = torch.nn.functional.normalize(torch.softmax(logits_SV.double() / 2, dim=1), dim=1)
                total_SS += (root_SV @ root_SV.T).cpu()
    return total_SS / num_tokens


def _logits(base: BaseModel, arena: Arena, text: TokenizedExample, batch_tokens: int) -> torch.Tensor:
    """Predictions of the supervised tokens of one text by every adapter, (S, m, V)."""
    if is_full(arena.layout):
        return torch.cat([_logits(moved, bare, text, batch_tokens) for moved, bare in one_by_one(base, arena)])
    found = []
    adapted = AdaptedModel(base, arena.replace(arena.values_KP.to(base.device)))
    with shifted(base, arena.layout, arena.shift_W):
        for batch_examples in batches([[text]] * arena.num_clients, batch_tokens):
            batch = pack(batch_examples, virtual_tokens=arena.layout.num_virtual_tokens)
            found.append(base.logits(adapted.hidden(batch)))
    return torch.cat(found).view(arena.num_clients, text.num_supervised, -1)


def prompt_products(
    base: BaseModel, examples_per_client: Sequence[Sequence[TokenizedExample]], batch_tokens: int
) -> np.ndarray:
    """Return the inner products of the clients' prompt embeddings, (K, K) float64.

    An embedding is the mean over a client's examples of the mean final hidden state of the prompt's tokens under the
    base model itself; no adapter is needed. A client without examples has the embedding 0.
    """
    # as wide as what the head reads, which some families make narrower than their layers
    size = int(base.model.get_output_embeddings().weight.shape[1])
    means_Kd = torch.zeros(len(examples_per_client), size, dtype=torch.float64)
    with torch.inference_mode():
        for batch_examples in batches(examples_per_client, batch_tokens):
            # without shared prefixes, so that the rows of each sequence lie behind one another
            batch = pack(batch_examples, share_prefixes=False)
            rows = iter(torch.split(base.hidden(batch).double().cpu(), list(batch.sequence_lengths)))
            for client, examples in enumerate(batch_examples):
                for example in examples:
                    mean_d = next(rows)[: example.prompt_length].mean(dim=0)
                    means_Kd[client] += mean_d / len(examples_per_client[client])
    products_KK: np.ndarray = (means_Kd @ means_Kd.T).numpy()
    return products_KK
