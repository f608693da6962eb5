"""A layout of two layers, jobs and trained rows for the tests of the seam."""

from __future__ import annotations

import torch

from fedmira.types import ClientReport, Job, Layout, TensorSpec

LAYOUT = Layout(
    specs=(
        TensorSpec("a.lora_a", "lora_a", "a", (2, 5), 0),
        TensorSpec("a.lora_b", "lora_b", "a", (4, 2), 10),
        TensorSpec("b.lora_a", "lora_a", "b", (2, 3), 18),
        TensorSpec("b.lora_b", "lora_b", "b", (6, 2), 24),
    )
)
GROUPS = frozenset({"lora_a", "lora_b"})
NAMES = ("anna", "ben", "cleo", "dora")


def rows(seed: int, num_rows: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, LAYOUT.num_parameters, generator=generator).to(dtype)


def job(start_SP: torch.Tensor, round_: int = 1, ids: tuple[int, ...] = (0, 1, 2, 3), **changes: object) -> Job:
    return Job(round_, ids, start_SP, GROUPS, GROUPS, GROUPS)._replace(**changes)  # type: ignore[arg-type]


def reports(ids: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[ClientReport, ...]:
    return tuple(ClientReport(id_, 3, 2, 1.0, 4, 9) for id_ in ids)
