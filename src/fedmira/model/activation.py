"""What lies between the two layers of a feed-forward block, with its backward pass by hand.

Axes: N rows, O outputs of the first layer, F features of the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activate(inner_NO: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activated features (N, F); and silu of the gate, where there is one."""
    if not gated:
        return F.gelu(inner_NO, approximate="tanh"), None
    gate_NF, up_NF = inner_NO.chunk(2, dim=1)
    silu_NF = F.silu(gate_NF)
    return silu_NF * up_NF, silu_NF


def activate_backward(grad_NF: torch.Tensor, inner_NO: torch.Tensor, silu_NF: torch.Tensor | None) -> torch.Tensor:
    """Gradient of `inner_NO`; `grad_NF` is used up."""
    if silu_NF is None:
        result: torch.Tensor = torch.ops.aten.gelu_backward(grad_NF, inner_NO, approximate="tanh")
        return result
    gate_NF, up_NF = inner_NO.chunk(2, dim=1)
    grad_inner_NO = torch.empty_like(inner_NO)
    grad_gate_NF, grad_up_NF = grad_inner_NO.chunk(2, dim=1)
    torch.mul(grad_NF, silu_NF, out=grad_up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
    return grad_inner_NO
