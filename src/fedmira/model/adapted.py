"""One base model seen through the adapters of many clients: through the fused body where there is one.

Where adapters are differences to all weights there is one client at a time, the weights are its own inside the `with`
block, and autograd goes through the stock model: the fused body computes no gradients of weights. Knows nothing about
losses, optimizers or rounds.

Axes: C clients, P parameters of one adapter, M rows asked for, d hidden features.
"""

from __future__ import annotations

import torch

from fedmira.data.packing import PackedBatch
from fedmira.model import fused
from fedmira.model.base import BaseModel
from fedmira.model.body import Body
from fedmira.model.full import FULL, MovedWeights, is_full
from fedmira.model.lora import ALL_GROUPS, Dropout, attached
from fedmira.model.soft_prompt import SoftPrompts
from fedmira.types import Arena, Layout


def computes_in_parts(base: BaseModel, layout: Layout, dropout: float = 0.0) -> bool:
    """Whether batches of different clients are to be computed at the same time: on several threads of a CPU, where
    nothing is written then but the gradients of the clients that have rows."""
    apart = base.device.type == "cpu" and not is_full(layout) and not layout.num_virtual_tokens and not dropout
    body = body_for(base, layout)
    return apart and body is not None and body.dtype == base.adapter_dtype and torch.get_num_threads() > 1


def body_for(base: BaseModel, layout: Layout) -> Body | None:
    """The body written out, if it has all layers that are adapted."""
    layers = {spec.layer for spec, _ in layout.pairs}
    return base.body if base.body is not None and layers <= base.body.layers else None


class AdaptedModel:
    """The base with the adapters of an arena, as long as the arena lies where it lies and the `with` block lasts."""

    def __init__(
        self,
        base: BaseModel,
        arena: Arena,
        *,
        gradient_CP: torch.Tensor | None = None,
        trainable: frozenset[str] = ALL_GROUPS,
    ) -> None:
        """See `base` through `arena`.

        Args:
            base: the frozen model.
            arena: (C, P), on the device of the base. Its values may change between calls, not before backward is done.
                Of one client, where adapters are differences to all weights.
            gradient_CP: where backward adds the gradients; None computes none.
            trainable: groups that get a gradient; the others' columns of `gradient_CP` are left alone.
        """
        self._base, self.arena = base, arena
        self._gradient_CP, self._trainable = gradient_CP, trainable
        self._weights: MovedWeights | None = None
        self._prompts: SoftPrompts | None = None
        if is_full(arena.layout):
            if arena.num_clients != 1:
                raise ValueError(f"{arena.num_clients} clients have weights of their own; give one at a time")
            gradient_P = None if gradient_CP is None or FULL not in trainable else gradient_CP[0]
            self._weights = MovedWeights(base, arena.layout, gradient_P)
            return
        if arena.layout.num_virtual_tokens:
            self._prompts = SoftPrompts(arena, gradient_CP, trainable)
        self._computed = arena
        self._body = body_for(base, arena.layout)
        if self._body is not None:
            if arena.values_KP.dtype != self._body.dtype:
                # adapters are kept in a wider type than a body in 16 bits computes in
                self._computed = arena.replace(torch.empty_like(arena.values_KP, dtype=self._body.dtype))
            self._adapters = fused.bind(self._body, self._computed, gradient_CP, trainable)

    def __enter__(self) -> AdaptedModel:
        if self._weights is not None:
            self._weights.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._weights is not None:
            self._weights.__exit__()

    def hidden(self, batch: PackedBatch, dropout: Dropout | None = None, *, isolate: bool = False) -> torch.Tensor:
        """Final hidden states of the supervised rows of a batch, (M, d).

        Args:
            batch: of as many clients as the arena has, with the virtual tokens of its layout.
            dropout: None goes without.
            isolate: whether a client that is not finite must reach nobody else; slower on a GPU, always so on a CPU.

        Raises:
            DataError: a sequence is longer than the base's context.
        """
        base, device = self._base, self._base.device
        wanted_M = batch.supervised_rows_M.to(device)
        if self._weights is not None:
            self._weights.move(self.arena.values_KP[0])
            return base.hidden(batch).index_select(0, wanted_M)
        soften = None if self._prompts is None else self._prompts.into(batch.rows_per_client)
        if self._body is None or dropout is not None:
            with attached(
                base,
                self.arena,
                batch.rows_per_client,
                gradient_CP=self._gradient_CP,
                trainable=self._trainable,
                dropout=dropout,
            ):
                return base.hidden(batch, soften).index_select(0, wanted_M)
        if self._computed is not self.arena:
            self._computed.values_KP.copy_(self.arena.values_KP)
        return fused.hidden(
            self._body,
            self._adapters,
            batch.tokens_N.to(device),
            batch.positions_N.to(device),
            base.plan(batch, stand_alone=True),
            batch.rows_per_client,
            wanted_M,
            batch.supervised_per_client,
            "segments" if isolate else None,
            soften,
        )
