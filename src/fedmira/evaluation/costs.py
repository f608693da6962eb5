"""What a run costs in bytes: model, adapter and optimizer as the paper counts them, and measured peak memory.

The accounting is arithmetic on sizes (section IV-C of the paper: memory C_w + C_dw + C_O, communication U + D); the
measured counterparts are the bytes counted at the seam and `PeakMemory`. Knows nothing about clients or training.

The paper's Table II checked against this accounting: 12 MB for Data-Juicer (24 layers x 2048, rank 16 on q_proj,
float32, upload + download) is exactly 12 MiB. Its 7.74 MB for GPT-2 large does not follow from the stated rank 16:
c_attn and c_proj have 8,110,080 parameters, so float32 U + D is 61.9 MiB; 7.73 MiB is one byte a parameter, one way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from fedmira.errors import UsageError, nearest
from fedmira.types import Layout

if TYPE_CHECKING:
    import torch

BYTES_PER_ELEMENT = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """Bytes at one client while it trains, as the paper counts them: activations are left out."""

    model_bytes: int
    """C_w: the frozen base."""
    adapter_bytes: int
    """C_dw: the tuned tensors of one client."""
    optimizer_bytes: int
    """C_O: the optimizer's moments for them."""

    @property
    def total_bytes(self) -> int:
        """C_w + C_dw + C_O."""
        return self.model_bytes + self.adapter_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class CommunicationCost:
    """Bytes between the server and one client in one round."""

    upload_bytes: int
    """U: client to server."""
    download_bytes: int
    """D: server to client."""

    @property
    def total_bytes(self) -> int:
        """U + D."""
        return self.upload_bytes + self.download_bytes


def element_bytes(dtype: str | torch.dtype) -> int:
    """Bytes of one number; `dtype` is a torch dtype or its name.

    Raises:
        UsageError: the dtype is unknown here.

    >>> element_bytes("bfloat16")
    2
    """
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES_PER_ELEMENT:
        allowed = ", ".join(BYTES_PER_ELEMENT)
        raise UsageError(f"unknown dtype {name!r}{nearest(name, BYTES_PER_ELEMENT)}; allowed: {allowed}")
    return BYTES_PER_ELEMENT[name]


def model_bytes(num_parameters: int, dtype: str | torch.dtype) -> int:
    """C_w: bytes of a base model with `num_parameters` parameters, tied ones counted once."""
    return num_parameters * element_bytes(dtype)


def adapter_bytes(layout: Layout, dtype: str | torch.dtype, groups: Collection[str] | None = None) -> int:
    """C_dw: bytes of one client's adapter, or of some of its groups of tensors.

    Args:
        layout: the tensors of one adapter.
        dtype: of the adapter's numbers.
        groups: the groups to count; all of them if None.

    Raises:
        UsageError: a group is not in the layout.
    """
    wanted = _known_groups(layout, groups)
    return sum(spec.size for spec in layout.specs if spec.group in wanted) * element_bytes(dtype)


def optimizer_bytes(
    layout: Layout,
    optimizer: str,
    dtype: str | torch.dtype = "float32",
    *,
    momentum: float = 0.0,
    trainable: Collection[str] | None = None,
) -> int:
    """C_O: bytes of the moments that an optimizer keeps for one client's trainable tensors.

    Args:
        layout: the tensors of one adapter.
        optimizer: `adamw` or `adam` (two moments a parameter), or `sgd` (one with momentum, none without).
        dtype: of the moments.
        momentum: of sgd.
        trainable: the groups that move; all of them if None.

    Raises:
        UsageError: the optimizer or a group is unknown.
    """
    moments = {"adamw": 2, "adam": 2, "sgd": 1 if momentum else 0}
    if optimizer not in moments:
        allowed = ", ".join(moments)
        raise UsageError(f"unknown optimizer {optimizer!r}{nearest(optimizer, moments)}; allowed: {allowed}")
    return moments[optimizer] * adapter_bytes(layout, dtype, trainable)


def communication_cost(
    layout: Layout,
    dtype: str | torch.dtype,
    *,
    upload: Collection[str] | None = None,
    download: Collection[str] | None = None,
) -> CommunicationCost:
    """What one participant and the server exchange in one round if these groups travel; all of them if None.

    An estimate for planning (`--dry-run`, Table II). What a run reports is counted at the seam instead.
    """
    return CommunicationCost(
        upload_bytes=adapter_bytes(layout, dtype, upload),
        download_bytes=adapter_bytes(layout, dtype, download),
    )


def _known_groups(layout: Layout, groups: Collection[str] | None) -> Collection[str]:
    if groups is None:
        return layout.groups
    unknown = sorted(set(groups) - set(layout.groups))
    if unknown:
        raise UsageError(f"the adapter has no group {unknown[0]!r}; its groups: {', '.join(layout.groups)}")
    return groups


_HIGHEST_BEFORE = {"cpu": 0, "cuda": 0}
"""What the high-water marks had reached before the last `PeakMemory` block began them anew."""


def highest_memory_bytes() -> int:
    """Highest memory use since this process started, whatever `PeakMemory` blocks were inside it.

    The bytes torch allocated on the fullest CUDA device if there were any, else the resident set.
    """
    import torch

    allocated = [int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())]
    on_cuda = max([_HIGHEST_BEFORE["cuda"], *allocated])
    return on_cuda or max(_high_water_mark_bytes(), _HIGHEST_BEFORE["cpu"])


def memory_bytes(device: str | torch.device) -> int:
    """Memory in use now: what torch allocated on a CUDA device, else the resident set; 0 where the system is silent."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated(device))
    return _status_bytes("VmRSS:") or 0


class PeakMemory:
    """Measures the highest memory use between `with` and its end. Blocks must not overlap.

    On CUDA: the bytes torch allocated on the device. Elsewhere: the resident set of this process, all of it, with the
    interpreter and the base model.

    >>> with PeakMemory() as memory:
    ...     block = b"x" * 10_000_000
    >>> memory.peak_bytes > len(block)
    True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = str(device)
        self.peak_bytes = 0
        """Set when the block ends."""
        self.source = ""
        """`cuda`; `resident set` of this block; or `resident set since start of process` where the system keeps only
        one high-water mark for the life of a process."""

    def __enter__(self) -> PeakMemory:
        if self._device.startswith("cuda"):
            import torch

            reached = int(torch.cuda.max_memory_allocated(self._device))
            _HIGHEST_BEFORE["cuda"] = max(_HIGHEST_BEFORE["cuda"], reached)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.source = "cuda"
        else:
            self.source = "resident set" if _reset_high_water_mark() else "resident set since start of process"
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.source == "cuda":
            import torch

            self.peak_bytes = int(torch.cuda.max_memory_allocated(self._device))
        else:
            self.peak_bytes = _high_water_mark_bytes()


def _reset_high_water_mark() -> bool:
    """Ask Linux to start VmHWM anew; whether that worked (not in every container, nor on other systems)."""
    _HIGHEST_BEFORE["cpu"] = max(_HIGHEST_BEFORE["cpu"], _high_water_mark_bytes())
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _high_water_mark_bytes() -> int:
    return _status_bytes("VmHWM:") or _maximum_resident_bytes()


def _status_bytes(label: str) -> int | None:
    """What Linux says about this process under `label`; None elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(label):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _maximum_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes
    return maximum if sys.platform == "darwin" else maximum * 1024
