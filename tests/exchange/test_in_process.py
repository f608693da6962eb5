"""The seam counts the bytes of what crosses it, and nothing else."""

from __future__ import annotations

import torch

from fedmira.exchange.in_process import crossing_bytes
from fedmira.types import Layout, TensorSpec

LAYOUT = Layout(
    specs=(
        TensorSpec("a.lora_a", "lora_a", "a", (2, 3), 0),
        TensorSpec("a.lora_b", "lora_b", "a", (4, 2), 6),
        TensorSpec("b.lora_a", "lora_a", "b", (2, 5), 14),
    )
)


def test_only_the_named_groups_cost_bytes() -> None:
    values_SP = torch.zeros(3, LAYOUT.num_parameters)
    assert crossing_bytes(LAYOUT, values_SP, frozenset()) == 0
    assert crossing_bytes(LAYOUT, values_SP, {"lora_b"}) == 3 * 8 * 4
    assert crossing_bytes(LAYOUT, values_SP, {"lora_a", "lora_b"}) == values_SP.nbytes


def test_the_dtype_of_the_message_decides() -> None:
    values_SP = torch.zeros(2, LAYOUT.num_parameters, dtype=torch.bfloat16)
    assert crossing_bytes(LAYOUT, values_SP, LAYOUT.groups) == 2 * 24 * 2
