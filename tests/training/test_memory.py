"""Cohort sizes fit the memory, and the estimates grow with what needs memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.reference.tiny_models import (
    FAMILIES,
    client_of,
    ragged_clients,
    random_arena,
    random_examples,
    tiny_base,
    tiny_layout,
)

from fedmira.config.run import AdapterConfig
from fedmira.config.training import TrainingConfig
from fedmira.data.packing import PackedBatch, pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.model.adapted import AdaptedModel
from fedmira.model.base import BaseModel
from fedmira.model.full import full_layout
from fedmira.model.kinds import adapter_layout
from fedmira.training import memory, objective
from fedmira.types import Layout

TRAINING = TrainingConfig(batch_size=2)


def test_bytes_per_client_count_the_moments() -> None:
    layout = tiny_layout(tiny_base("llama"), "llama")
    row = layout.num_parameters * 4
    adam, sgd = (
        memory.bytes_per_client(layout, TrainingConfig()),
        memory.bytes_per_client(layout, TrainingConfig(optimizer="sgd")),
    )
    assert adam - sgd == 2 * row
    assert memory.bytes_per_client(layout, TrainingConfig(optimizer="sgd", momentum=0.9)) - sgd == row
    assert memory.bytes_per_client(layout, TrainingConfig(optimizer="adam"), 8) == 2 * adam


def test_activations_are_measured_per_token() -> None:
    base = tiny_base("llama", torch.float32)
    layout = tiny_layout(base, "llama")
    single = memory.activation_bytes_per_token(base, layout)
    # 2 layers of width 32: the inputs of the four adapted projections alone are 2 * 2 * 32 * 4 bytes
    assert 2 * 2 * 32 * 4 < single < 100_000
    double = tiny_base("llama", torch.float64)
    assert 1.4 * single < memory.activation_bytes_per_token(double, tiny_layout(double, "llama")) < 2.2 * single


def test_logits_count_for_as_many_rows_as_have_them_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", torch.float32)
    layout, whole = tiny_layout(base, "llama"), full_layout(base)
    vocabulary, features = base.model.get_output_embeddings().weight.shape
    monkeypatch.setitem(objective._BLOCK_COLUMNS, "cpu", vocabulary // 2)
    monkeypatch.setitem(objective._BLOCK_ELEMENTS, "cpu", 10 * (vocabulary // 2))
    assert objective.logits_at_once(base) == (10, vocabulary // 2)
    few, many = (memory.head_bytes(base, layout, rows) for rows in (7, 1000))
    assert few == 7 * (12 * (vocabulary // 2) + 4 * features)
    assert many == 20 * 12 * (vocabulary // 2) + 1000 * 4 * features, "two parts of a step at a time"
    assert memory.head_bytes(base, whole, 1000) == 1000 * 12 * vocabulary


def test_what_is_measured_is_as_long_as_what_is_trained_on() -> None:
    base = tiny_base("llama", torch.float32)
    assert memory.probe_length(base, ragged_clients((5, 3))) == max(
        example.num_inputs for client in ragged_clients((5, 3)) for example in client.train
    )
    example = random_examples(1, seed=0, longest=20)[0]
    endless = example._replace(tokens=np.zeros(5000, dtype=np.int32))
    assert memory.probe_length(base, [client_of("a", (example, endless))]) == memory._PROBE_TOKENS
    # weights that attention keeps grow with the length
    layout, base = tiny_layout(base, "llama"), tiny_base("llama", torch.float32)
    short, long = (memory.activation_bytes_per_token(base, layout, 0.0, length) for length in (16, 60))
    assert long > short


def test_the_largest_cohort_that_fits_is_chosen() -> None:
    base = tiny_base("llama", torch.float32)
    layout = tiny_layout(base, "llama")
    clients = ragged_clients((5, 1, 7, 3, 4))
    token_bytes = memory.activation_bytes_per_token(base, layout, 0.0, memory.probe_length(base, clients))
    needs = [memory.estimate(base, layout, clients, TRAINING, size, token_bytes) for size in range(1, 6)]
    totals = [need.total_bytes for need in needs]
    assert totals == sorted(set(totals))
    # the server's adapters lie beside the cohort's
    held = memory._SERVER_ARENAS * 5 * layout.num_parameters * 4
    for size, need in enumerate(needs, start=1):
        enough = int((need.total_bytes - need.base_bytes) / 0.8) + 1 + held
        assert memory.choose_cohort_size(base, layout, clients, TRAINING, enough) == size
    assert memory.choose_cohort_size(base, layout, clients, TRAINING, 0) == 1


@pytest.mark.parametrize(("threads", "most"), [(1, 2048), (2, 16384)])
def test_on_a_cpu_a_cohort_stops_growing_at_2048_rows_and_later_where_it_is_computed_in_parts(
    threads: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    base = tiny_base("llama", torch.float32)
    layout = tiny_layout(base, "llama")
    long = tuple(random_examples(1, seed=k, longest=120)[0] for k in range(40))
    example = max(long, key=lambda e: len(e.tokens))._replace(prompt_length=60)
    clients = [client_of(f"client-{k}", (example,) * 16) for k in range(20)]
    training = TrainingConfig(batch_size=16)
    size = memory.choose_cohort_size(base, layout, clients, training, 2**40)
    rows = len(pack([[example] * 16]).tokens_N)
    assert rows < 16 * (len(example.tokens) - 1), "their prompts are alike"
    assert size == round(most / rows)
    assert 1 <= size < 20 or threads > 1


def test_free_memory_is_what_the_system_says(tmp_path: Path) -> None:
    available = memory.available_bytes(torch.device("cpu"))
    assert 0 < available < 2**50
    (tmp_path / "meminfo").write_text("MemTotal: 20 kB\nMemAvailable: 12 kB\n")
    assert memory.number_beside("MemAvailable:", tmp_path / "meminfo") == 12
    assert memory.number_beside("MemFree:", tmp_path / "meminfo") is None
    assert memory.number_beside("MemAvailable:", tmp_path / "none") is None
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("150\n")
    assert memory._cgroup_available(tmp_path) == 50
    (tmp_path / "memory.stat").write_text("anon 10\nfile 85\ninactive_file 80\n")
    assert memory._cgroup_available(tmp_path) == 130


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_measuring_leaves_the_base_as_it_was(family: str) -> None:
    base = tiny_base(family)
    layout = tiny_layout(base, family)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    memory.activation_bytes_per_token(base, layout)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert random_arena(layout, 1).values_KP.shape == (1, layout.num_parameters)


def test_dropout_saves_what_the_stock_model_does_and_a_mask_for_each_pair() -> None:
    base = tiny_base("llama", torch.float32)
    layout = tiny_layout(base, "llama")
    stock = memory.activation_bytes_per_token(replace(base, body=None), layout)
    masks = 4 * sum(spec.shape[1] for spec in layout.specs if spec.group == "lora_a")
    assert memory.activation_bytes_per_token(base, layout, 0.1) >= stock + masks


@pytest.mark.parametrize(("threads", "dropout", "tokens"), [(1, 0.0, 12_000), (2, 0.0, 6_000), (2, 0.5, 12_000)])
def test_where_a_step_is_computed_in_parts_two_of_them_are_in_memory(
    threads: int, dropout: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(memory, "_largest_batch", lambda client, batch_size: (3000, 0))
    base = tiny_base("llama", torch.float32)
    clients = [client_of(f"client-{k}", random_examples(1, seed=k)) for k in range(4)]
    found = memory.estimate(base, tiny_layout(base, "llama"), clients, TrainingConfig(), 4, 10, dropout)
    assert found.activation_bytes == int(1.3 * tokens * 10)


def kept_bytes(base: BaseModel, layout: Layout, batch: PackedBatch) -> int:
    """What one forward pass of all clients saves for its backward pass."""
    arena = random_arena(layout, len(batch.rows_per_client), base.adapter_dtype)
    held = [*base.model.parameters(), *base.model.buffers(), arena.values_KP]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor.detach()

    gradient_CP, groups = torch.zeros_like(arena.values_KP), frozenset(layout.groups)
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        AdaptedModel(base, arena, gradient_CP=gradient_CP, trainable=groups) as adapted,
    ):
        adapted.hidden(batch)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("virtual_tokens", [20, 100])
@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_examples_behind_virtual_tokens_keep_stays_within_the_estimate(
    family: str, kind: str, virtual_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences behind the first keep the keys of the virtual tokens again, and short ones share calls."""
    monkeypatch.setitem(FAMILIES[family][1], "n_positions" if family == "gpt2" else "max_position_embeddings", 512)
    base = tiny_base(family, torch.float32)
    settings = {"kind": kind, "num_virtual_tokens": virtual_tokens}
    encoder = {"encoder_hidden_size": 16} if kind == "p_tuning" else {}
    layout = adapter_layout(base, AdapterConfig.model_validate(settings | encoder))
    for length in (10, 20, 50, 120):
        token_bytes = memory.activation_bytes_per_token(base, layout, 0.0, length)
        for count in (1, 4, 16):
            examples = tuple(
                TokenizedExample(np.full(length + 1, 3 + k, dtype=np.int32), 1 + length // 2, f"{k}")
                for k in range(count)
            )
            batch = pack([examples] * 2, virtual_tokens=virtual_tokens)
            kept = kept_bytes(base, layout, batch)
            tokens = 2 * (virtual_tokens + count * length)
            assert 0.4 * tokens * token_bytes < kept < 1.3 * tokens * token_bytes, (length, count)


def test_measuring_activations_leaves_none_behind() -> None:
    """A graph that its own hooks hold is freed by nobody, with all clients that its run had."""
    base = tiny_base("llama", torch.float32)

    def graphs() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "_AttentionBackward" for thing in gc.get_objects())

    before = graphs()
    memory.activation_bytes_per_token(base, tiny_layout(base, "llama"))
    assert graphs() == before
