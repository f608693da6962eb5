"""Tunes every parameter of the base: a client is its difference to the frozen weights.

Clients cannot share one product with the base, because each has weights of its own: they are trained and judged one
after the other. The weights are the caller's own bytes again behind a `with` block: they are copied back, not
subtracted. Knows nothing about losses, optimizers or rounds.

Axes: K clients, P parameters of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from fedmira.model.base import BaseModel
from fedmira.types import Arena, Layout

FULL = "full"
"""The group of all parameters of the base."""


def full_layout(base: BaseModel) -> Layout:
    """Every parameter of the base that text reaches, in its own order and shape; tied weights are there once."""
    text, head = base.language_path, base.model.get_output_embeddings().weight
    return Layout.of(
        (name, FULL, name.rpartition(".")[0], tuple(parameter.shape))
        for name, parameter in base.model.named_parameters()
        if name.startswith(text) or parameter is head
    )


def is_full(layout: Layout) -> bool:
    """Whether adapters of this layout are differences to all weights."""
    return FULL in layout.groups


class MovedWeights:
    """Inside a `with` block, the base can be given a client's weights; behind it, it has its own again."""

    def __init__(self, base: BaseModel, layout: Layout, gradient_P: torch.Tensor | None = None) -> None:
        """Over `base`.

        Args:
            base: the frozen model.
            layout: from `full_layout`.
            gradient_P: where backward adds the gradient; None computes none.
        """
        self._layout, self._gradient_P = layout, gradient_P
        self._parameters = [base.model.get_parameter(spec.name) for spec in layout.specs]
        self._kept: list[torch.Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> MovedWeights:
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        if self._gradient_P is not None:
            for spec, parameter in zip(self._layout.specs, self._parameters, strict=True):
                part = self._gradient_P[spec.columns].view(spec.shape)
                parameter.requires_grad_(True)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(_move, part)))
        return self

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        with torch.no_grad():
            for parameter, kept in zip(self._parameters, self._kept, strict=True):
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.copy_(kept)
        self._kept = []

    def move(self, delta_P: torch.Tensor) -> None:
        """Give the base the weights W + delta; added in the wider of both types."""
        with torch.no_grad():
            for spec, parameter, kept in zip(self._layout.specs, self._parameters, self._kept, strict=True):
                parameter.copy_(kept + delta_P[spec.columns].view(spec.shape))


def _move(part: torch.Tensor, parameter: torch.Tensor) -> None:
    """Add the gradient of a parameter to where it is kept."""
    assert parameter.grad is not None, "called behind the accumulation of a gradient"
    part.add_(parameter.grad)
    parameter.grad = None


def one_by_one(base: BaseModel, arena: Arena) -> Iterator[tuple[BaseModel, Arena]]:
    """For every client, give the base its weights and yield it with an arena (1, 0) that adds nothing to them."""
    # a body that is kept wider than the base has norms of its own, which do not move
    seen = base if base.body is None or base.body.dtype == base.dtype else replace(base, body=None)
    with MovedWeights(base, arena.layout) as weights:
        for delta_P in arena.values_KP:
            weights.move(delta_P.to(base.device))
            yield seen, base.no_adapter
