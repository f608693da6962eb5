"""Products of rows with frozen weights, by whichever library is fast for them.

PyTorch multiplies float32 matrices on a CPU with MKL, which leaves a tenth to a third of what some processors can do;
oneDNN, which it carries for its compiler, does not. Results agree to rounding. Knows nothing about models.

Axes: N rows, I/O in and out features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, (N, O); takes no part in autograd."""
    if _ONEDNN and x_NI.dtype == torch.float32 and x_NI.device.type == "cpu" and len(x_NI):
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x_NI.detach(), weight_OI.detach(), bias_O, "none", [], ""
        )
        return result
    return F.linear(x_NI, weight_OI, bias_O)
