"""How much memory a run will need on a GPU that this machine lacks: arithmetic on sizes, no time.

The weights, the adapters and their moments follow from sizes; what activations take is measured on the CPU and scaled
to the dtype that the GPU would compute in. Keeps nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from fedmira.assembly import assemble
from fedmira.config.run import RunConfig
from fedmira.federation import participation
from fedmira.forecast.remarks import warnings
from fedmira.formats import format_mib
from fedmira.model.kept_attention import MOST_KEPT
from fedmira.training.memory import activation_bytes_per_token, estimate, server_bytes


class MemoryElsewhere(NamedTuple):
    """Predicted bytes on a device that is not here, while a cohort trains."""

    device: str
    dtype: str
    """Of the base there."""
    num_clients: int
    clients_per_round: int
    adapter_parameters: int
    base_bytes: int
    server_bytes: int
    """The adapters of all clients, as often as the server holds them."""
    bytes_per_client: int
    """Of a cohort: adapter, gradient, moments and activations of the client with the longest batch."""
    cohort_size: int | None
    """As the config sets it; None: as many as fit, see `training.cohort_size`."""
    warnings: tuple[str, ...] = ()

    def memory_bytes(self, cohort_size: int) -> int:
        """With so many clients in a cohort."""
        return self.base_bytes + self.server_bytes + cohort_size * self.bytes_per_client

    def facts(self) -> dict[str, object]:
        """As JSON."""
        sizes = {self.cohort_size or 1, self.cohort_size or self.clients_per_round}
        totals = {str(size): self.memory_bytes(size) for size in sorted(sizes)}
        return {**self._asdict(), "memory_bytes_by_cohort_size": totals}

    def lines(self) -> list[str]:
        """One line per fact, for people."""
        if self.cohort_size:
            total = f"{format_mib(self.memory_bytes(self.cohort_size))} with {self.cohort_size} in a cohort"
        else:
            total = (
                f"{format_mib(self.memory_bytes(1))} with one client in a cohort, "
                f"{format_mib(self.memory_bytes(self.clients_per_round))} with all {self.clients_per_round} of a round"
                "; training.cohort_size: auto takes as many as fit"
            )
        return [
            f"clients            {self.num_clients}, {self.clients_per_round} per round",
            f"adapter            {self.adapter_parameters:,} parameters",
            f"memory             about {total}",
            f"of which           base {format_mib(self.base_bytes)} in {self.dtype}, adapters at the server "
            f"{format_mib(self.server_bytes)}, each client of a cohort {format_mib(self.bytes_per_client)}",
            *(f"warning: {line}" for line in self.warnings),
        ]


def memory_elsewhere(config: RunConfig) -> MemoryElsewhere:
    """Predict the memory of the run `config` on its `model.device`, which this machine lacks. Loads the base here.

    Raises what starting the run would raise: unusable data, models or settings.
    """
    device, dtype = config.model.device, config.base_model.dtype
    if dtype == "auto":
        dtype = "bfloat16"
    model = config.model.model_copy(update={"device": "cpu", "dtype": dtype})
    parts = assemble(config.model_copy(update={"model": model}), cohort_size=1)
    base, layout, dropout = parts.base, parts.layout, config.model.adapter.dropout
    # sequences so long that attention keeps no weights here, as on a GPU
    token_bytes = activation_bytes_per_token(base, layout, dropout, MOST_KEPT + 1)
    if base.body is not None:
        # a CPU keeps rows in 32 bits, a GPU in those of the base
        token_bytes = token_bytes * base.dtype.itemsize // base.body.dtype.itemsize
    one = estimate(base, layout, parts.tokenized, config.training, 1, token_bytes, dropout)
    num_clients, wanted = len(parts.clients.names), config.training.cohort_size
    said = (
        f"model.device = {device} is not here: memory is arithmetic, with activations as measured on the CPU, and time "
        "is not predicted. Evaluation, answers and CUDA itself (some hundred MiB) come on top; say model.device=cpu "
        "for what a run on this machine needs"
    )
    return MemoryElsewhere(
        device=device,
        dtype=str(base.dtype).removeprefix("torch."),
        num_clients=num_clients,
        clients_per_round=participation.num_participants(num_clients, config.federation),
        adapter_parameters=layout.num_parameters,
        base_bytes=one.base_bytes,
        server_bytes=server_bytes(layout, num_clients, config.training, base.adapter_dtype.itemsize),
        bytes_per_client=one.clients_bytes + one.activation_bytes,
        cohort_size=1 if config.model.adapter.kind == "full" else None if wanted == "auto" else int(wanted),
        warnings=(*warnings(parts), said),
    )
