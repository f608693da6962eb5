"""What lies between the two layers of a feed-forward block, with its backward pass by hand.

Axes: N rows, O outputs of the first layer, F features of the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activate(inner_NO: torch.Tensor, gated: bool) -> torch.Tensor:
    """The activated features, (N, F)."""
    if not gated:
        return F.gelu(inner_NO, approximate="tanh")
    gate_NF, up_NF = inner_NO.chunk(2, dim=1)
    return F.silu(gate_NF).mul_(up_NF)


def activate_backward(grad_NF: torch.Tensor, inner_NO: torch.Tensor, gated: bool) -> torch.Tensor:
    """Gradient of `inner_NO`; `grad_NF` is used up."""
    if not gated:
        result: torch.Tensor = torch.ops.aten.gelu_backward(grad_NF, inner_NO, approximate="tanh")
        return result
    gate_NF, up_NF = inner_NO.chunk(2, dim=1)
    grad_inner_NO = torch.empty_like(inner_NO)
    grad_gate_NF, grad_up_NF = grad_inner_NO.chunk(2, dim=1)
    torch.mul(grad_NF, F.silu(gate_NF), out=grad_up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
    return grad_inner_NO
