"""What lies between the two layers of a feed-forward block, with its backward pass by hand.

Axes: N rows, O outputs of the first layer, F features of the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fedmira.model.body import in_cache


def activate(inner_NO: torch.Tensor, gated: bool) -> torch.Tensor:
    """The activated features, (N, F); rows may come in groups."""
    if not gated:
        return F.gelu(inner_NO, approximate="tanh")
    gate_NF, up_NF = inner_NO.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)


def activate_backward(grad_NF: torch.Tensor, inner_NO: torch.Tensor, gated: bool) -> torch.Tensor:
    """Gradient of `inner_NO`, which it may lie in; both arguments are used up."""
    if not gated:
        result: torch.Tensor = torch.ops.aten.gelu_backward(grad_NF, inner_NO, approximate="tanh")
        return result
    for grad, inner in in_cache(grad_NF, inner_NO):
        gate, up = inner.chunk(2, dim=1)
        silu = F.silu(gate)
        grad_gate = torch.mul(grad, up)
        torch.mul(grad, silu, out=up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=gate)
    return inner_NO
