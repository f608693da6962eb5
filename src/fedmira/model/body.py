"""The parts of a transformer body as values: norms, frozen layers that share an input, blocks.

Knows nothing about adapters, packing or how blocks are passed through; `fused` does that, `families` finds the parts.

Axes: N rows (forward, norms and layers take them in groups as well), d hidden features, I/O in and out features of
stacked layers, D features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedmira.model.attention import Settings
from fedmira.model.products import product

Soften = Callable[[torch.Tensor], torch.Tensor]
"""Embeddings of the packed tokens (N, d) to the same with soft prompts in their rows."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions of rows, (N, 1, D / 2)."""

STACKS = ("attention_in", "attention_out", "feed_in", "feed_out")
"""The fields of a block that hold layers."""


_BLOCK_ROWS = 256
"""Rows that several operations pass over one after the other while they lie in a core's cache."""


def in_cache(*tensors_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of a block of rows of each tensor after the other, on a CPU; elsewhere of all rows at once."""
    if tensors_N[0].device.type != "cpu" or len(tensors_N[0]) <= _BLOCK_ROWS:
        return iter([tensors_N])
    return zip(*(torch.split(tensor, _BLOCK_ROWS) for tensor in tensors_N), strict=True)


class Stack(NamedTuple):
    """Frozen linear layers that share an input, as one."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None
    columns: dict[str, slice]
    """Module path -> its outputs."""

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        return product(x_NI, self.weight_OI, self.bias_O)

    def onto(self, residual_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        """residual + layer(x)."""
        return product(x_NI, self.weight_OI, self.bias_O).add_(residual_NO)

    def backward(self, grad_NO: torch.Tensor) -> torch.Tensor:
        """Gradient of x."""
        return product(grad_NO, self.weight_OI.T)


class Norm(NamedTuple):
    """RMSNorm, in float32 at least; or LayerNorm where there is a bias."""

    weight_d: torch.Tensor
    bias_d: torch.Tensor | None
    epsilon: float

    def __call__(self, x_Nd: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The normalised rows, and the statistics that `again` and `backward` need."""
        if self.bias_d is not None:
            h_Nd, mean_N1, scale_N1 = torch.native_layer_norm(
                x_Nd, (x_Nd.shape[-1],), self.weight_d, self.bias_d, self.epsilon
            )
            return h_Nd, (mean_N1, scale_N1)
        norm_N1 = torch.linalg.vector_norm(_wide(x_Nd), dim=-1, keepdim=True)
        scale_N1 = norm_N1.square_().div_(x_Nd.shape[-1]).add_(self.epsilon).rsqrt_()
        return self.again(x_Nd, (scale_N1,)), (scale_N1,)

    def again(self, x_Nd: torch.Tensor, statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The normalised rows once more."""
        if self.bias_d is not None:
            return torch.native_layer_norm(x_Nd, (x_Nd.shape[-1],), self.weight_d, self.bias_d, self.epsilon)[0]
        return (_wide(x_Nd) * statistics[0]).to(x_Nd.dtype).mul_(self.weight_d)

    def backward(
        self,
        grad_Nd: torch.Tensor,
        x_Nd: torch.Tensor,
        statistics: tuple[torch.Tensor, ...],
        around_Nd: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradient of x, plus that of what goes around the norm; `grad_Nd` is used up."""
        if self.bias_d is not None:
            mean_N1, scale_N1 = statistics
            mask = [True, False, False]
            features = [x_Nd.shape[1]]
            result: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
                grad_Nd, x_Nd, features, mean_N1, scale_N1, self.weight_d, self.bias_d, mask
            )[0]
            return result if around_Nd is None else result.add_(around_Nd)
        for grad, x, scale_n1, *around in in_cache(
            grad_Nd, x_Nd, *statistics, *([] if around_Nd is None else [around_Nd])
        ):
            scaled, wide = _wide(grad.mul_(self.weight_d)), _wide(x)
            dot_n1 = torch.linalg.vecdot(scaled, wide).unsqueeze(-1)
            dot_n1 = dot_n1.mul_(scale_n1.pow(3)).div_(-x_Nd.shape[1])
            of_x = scaled.mul_(scale_n1).addcmul_(wide, dot_n1)
            if of_x.dtype != grad.dtype:
                grad.copy_(of_x)
            for others in around:
                grad.add_(others)
        return grad_Nd


class Block(NamedTuple):
    """One transformer block."""

    attention_norm: Norm
    attention_in: Stack
    """Queries, keys and values, in this order."""
    attention_out: Stack
    look_back: Settings
    feed_norm: Norm
    feed_in: Stack
    """The gate and what it gates, or the one layer before the activation."""
    feed_out: Stack


@dataclass(frozen=True, slots=True)
class Body:
    """A body whose blocks are known."""

    words: Callable[[torch.Tensor], torch.Tensor]
    """Tokens (N,) to their embeddings (N, d)."""
    places: Callable[[torch.Tensor], torch.Tensor] | None
    """Positions (N,) to what is added to the embeddings (N, d); None where positions turn queries and keys."""
    rotate: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None
    """Length T to cosines and sines (T, 1, D / 2); None where positions are learned."""
    blocks: tuple[Block, ...]
    final_norm: Norm
    num_heads: int
    num_key_heads: int
    gated: bool
    """silu(gate) * up; else gelu in its tanh form."""

    def embed(self, tokens_N: torch.Tensor, positions_N: torch.Tensor, soften: Soften | None = None) -> torch.Tensor:
        """The rows that enter the first block, (N, d); `soften` puts soft prompts among the embeddings."""
        x_Nd = self.words(tokens_N).to(self.dtype)
        if soften is not None:
            x_Nd = soften(x_Nd)
        return x_Nd if self.places is None else x_Nd + self.places(positions_N)

    def rotation(self, positions_N: torch.Tensor, longest: int) -> Rotation | None:
        """What turns queries and keys at these positions, all below `longest`; None where positions are learned."""
        if self.rotate is None:
            return None
        cosine, sine = self.rotate(longest)
        return cosine[positions_N], sine[positions_N]

    @property
    def dtype(self) -> torch.dtype:
        """What rows are kept in; where that is wider than the frozen weights, only their products are narrow."""
        return self.final_norm.weight_d.dtype

    @property
    def reach(self) -> float:
        """Positions that every block looks back over with plain attention in 32 bits or more; 0 without it."""
        looks = [block.look_back for block in self.blocks]
        if self.dtype.itemsize < 4 or any(look.softcap is not None for look in looks):
            return 0
        return min((math.inf if look.sliding_window is None else look.sliding_window for look in looks), default=0)

    @property
    def layers(self) -> frozenset[str]:
        """Module paths of all layers that can be adapted."""
        return frozenset(layer for block in self.blocks for name in STACKS for layer in getattr(block, name).columns)


def state_dtype(weight: torch.Tensor) -> torch.dtype:
    """What the rows of a body with such weights are kept in: on a CPU never less than float32, see `products`."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
