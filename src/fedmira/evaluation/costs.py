"""What a run costs in bytes: model, adapter and optimizer as the paper counts them, and measured peak memory.

The accounting is arithmetic on sizes (section IV-C of the paper: memory C_w + C_dw + C_O, communication U + D); the
measured counterparts are the bytes counted at the seam and `PeakMemory`. Knows nothing about clients or training.

The paper's Table II checked against this accounting: 12 MB for Data-Juicer (24 layers x 2048, rank 16 on q_proj,
float32, upload + download) is exactly 12 MiB. Its 7.74 MB for GPT-2 large does not follow from the stated rank 16:
c_attn and c_proj have 8,110,080 parameters, so float32 U + D is 61.9 MiB; 7.73 MiB is one byte a parameter, one way.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from fedmira.config.training import TrainingConfig
from fedmira.training.memory import number_beside
from fedmira.training.optimizers import num_moments
from fedmira.types import Layout


def model_bytes(num_parameters: int, dtype: torch.dtype) -> int:
    """C_w: bytes of a base model with `num_parameters` parameters, tied ones counted once."""
    return num_parameters * dtype.itemsize


def adapter_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """C_dw: bytes of one client's adapter."""
    return layout.num_parameters * dtype.itemsize


def optimizer_bytes(layout: Layout, training: TrainingConfig, dtype: torch.dtype) -> int:
    """C_O: bytes of the moments that an optimizer keeps for one client."""
    return num_moments(training) * adapter_bytes(layout, dtype)


_HIGHEST_BEFORE = {"cpu": 0, "cuda": 0}
"""What the high-water marks had reached before the last lap of a `PeakMemory` began them anew."""


def highest_memory_bytes() -> int:
    """Highest memory use since this process started, whatever laps of `PeakMemory` were in it.

    The bytes torch allocated on the fullest CUDA device if there were any, else the resident set.
    """
    allocated = [int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())]
    on_cuda = max([_HIGHEST_BEFORE["cuda"], *allocated])
    return on_cuda or max(_high_water_mark_bytes(), _HIGHEST_BEFORE["cpu"])


def memory_bytes(device: str | torch.device) -> int:
    """Memory in use now: what torch allocated on a CUDA device, else the resident set; 0 where the system is silent."""
    if str(device).startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    return _status_bytes("VmRSS:")


class PeakMemory:
    """Measures the highest memory use from its making, or from its last lap, to the next one. One at a time.

    On CUDA: the bytes torch allocated on the device. Elsewhere: the resident set of this process, all of it, with the
    interpreter and the base model; since the process started where the system keeps one high-water mark for its life.

    >>> memory = PeakMemory()
    >>> block = b"x" * 10_000_000
    >>> memory.lap() > len(block)
    True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = str(device)
        self.lap()

    def lap(self) -> int:
        """Bytes that were in use at most since the last lap began; the next one begins."""
        if self._device.startswith("cuda"):
            kind, reached = "cuda", int(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            kind, reached = "cpu", _high_water_mark_bytes()
            _reset_high_water_mark()
        _HIGHEST_BEFORE[kind] = max(_HIGHEST_BEFORE[kind], reached)
        return reached


def _reset_high_water_mark() -> None:
    """Ask Linux to start VmHWM anew; it cannot be in every container, nor on other systems."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _high_water_mark_bytes() -> int:
    return _status_bytes("VmHWM:") or _maximum_resident_bytes()


def _status_bytes(label: str) -> int:
    """What Linux says about this process under `label`; 0 elsewhere."""
    return 1024 * (number_beside(label, Path("/proc/self/status")) or 0)


def _maximum_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes
    return maximum if sys.platform == "darwin" else maximum * 1024
