"""Products of rows with frozen weights, by whichever library is fast for them.

PyTorch multiplies float32 matrices on a CPU with MKL. That is the fastest there is on Intel's processors, but leaves a
tenth to a third of what others can do; oneDNN, which PyTorch carries for its compiler, does not. The maker of the
processor decides, not a clock, so that a resumed run takes the same way. Results agree to rounding.

Where weights are kept in 16 bits and rows in 32, only the product is computed in 16: processors with tiles for bfloat16
(AMX) multiply ten times as fast, and everything else is slower or less exact in 16 bits. Knows nothing about models.

Axes: N rows, I/O in and out features.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F


def _by_intel() -> bool:
    """Whether Linux says so; elsewhere MKL is as good a guess."""
    with suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return True


_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and not _by_intel()

# Both caches keep what they made for a number of rows, 1,024 times, and packed batches seldom have the same number
# twice: they would grow to hundreds of MiB. This many serve the layers of one step, and both read it at first use.
# Whose processor it is does not matter: products in 16 bits are oneDNN's on all of them.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "32")


def as_OI(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (O, I): a view, where transformers' Conv1D keeps (I, O)."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, torch.nn.Linear) else weight.T


def product(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b, (N, O); takes no part in autograd.

    Args:
        x_NI: the rows; the result has their dtype.
        weight_OI: may be a transposed view, and narrower than the rows.
        bias_O: added to each row.
        room: memory of at least N * O elements that the result may lie in: large new memory costs as much as a product.
    """
    if x_NI.dtype != weight_OI.dtype:
        narrow_NO = F.linear(x_NI.to(weight_OI.dtype), weight_OI, bias_O)
        wide_NO = x_NI.new_empty(narrow_NO.shape) if room is None else room[: narrow_NO.numel()].view(narrow_NO.shape)
        return wide_NO.copy_(narrow_NO)
    if not (x_NI.dtype == torch.float32 and x_NI.device.type == "cpu" and len(x_NI)):
        return F.linear(x_NI, weight_OI, bias_O)
    if torch.is_grad_enabled():
        x_NI, weight_OI = x_NI.detach(), weight_OI.detach()
        bias_O = None if bias_O is None else bias_O.detach()
    if _ONEDNN:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
        return result
    if room is None:
        return F.linear(x_NI, weight_OI, bias_O)
    shape = (len(x_NI), len(weight_OI))
    out_NO = room[: shape[0] * shape[1]].view(shape)
    if bias_O is None:
        return torch.mm(x_NI, weight_OI.T, out=out_NO)
    return torch.addmm(bias_O, x_NI, weight_OI.T, out=out_NO)
