"""Adds one dense matrix per adapted layer to the frozen base for as long as a `with` block lasts.

For methods that merge what they aggregated into the base weights (FLoRA, FedEx-LoRA). The weights are the caller's own
bytes again afterwards: they are copied, not subtracted. Knows nothing about adapters, training or rounds.

Axes: W elements of all shifted layers, I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedmira.model.base import BaseModel
from fedmira.model.products import as_OI
from fedmira.types import Layout


@contextmanager
def shifted(base: BaseModel, layout: Layout, shift_W: torch.Tensor | None) -> Iterator[None]:
    """Inside the `with` block the adapted layers of the base have the weights W + shift.

    Args:
        base: the frozen model.
        layout: of the adapters; its layers are shifted in their order.
        shift_W: (O, I) of each layer, flat, behind one another; None changes nothing.

    Raises:
        ValueError: `shift_W` has another number of elements than the layers' weights.
    """
    if shift_W is None:
        yield
        return
    weights = [as_OI(base.model.get_submodule(layer)) for layer in layout.layers]
    sizes = [weight.numel() for weight in weights]
    if shift_W.shape != (sum(sizes),):
        raise ValueError(f"a shift of shape {tuple(shift_W.shape)} for {sum(sizes)} weights of the adapted layers")
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, part in zip(weights, torch.split(shift_W, sizes), strict=True):
                weight.add_(part.view(weight.shape).to(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
