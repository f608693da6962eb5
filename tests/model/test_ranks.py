"""Ranks that differ by layer or by client train as they would alone."""

from __future__ import annotations

import pytest
import torch
from tests.model.test_fused import examples_with_prefixes, run, stock_of
from tests.reference.tiny_models import ragged_clients, random_arena, tiny_base, tiny_layout

from fedmira.config.run import AdapterConfig
from fedmira.config.training import TrainingConfig
from fedmira.data.packing import pack
from fedmira.errors import ConfigError
from fedmira.federation.ranks import trimmed
from fedmira.model.arena import lora_layout
from fedmira.training.cohort import train
from fedmira.types import Arena, Job

PATTERN = AdapterConfig(rank=2, alpha=6, rank_pattern={"v_proj": 5, "layers.1.self_attn.q_proj": 1, "attn.c_proj": 3})


def pattern_for(family: str) -> AdapterConfig:
    known = {"llama": ("v_proj", "layers.1.self_attn.q_proj"), "gpt2": ("attn.c_proj",)}[family]
    return AdapterConfig(rank=2, alpha=6, rank_pattern={name: PATTERN.rank_pattern[name] for name in known})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("num_pairs", [1, 2])
def test_ranks_by_layer_are_computed_alike_by_both_engines(family: str, num_pairs: int) -> None:
    base = tiny_base(family)
    layout = lora_layout(base, pattern_for(family), num_pairs)
    ranks = {spec.layer: spec.shape[0] for spec in layout.specs if spec.group == "lora_a"}
    assert layout.scaling == 3.0
    if family == "llama":
        assert ranks["model.layers.0.self_attn.v_proj"] == 5
        assert ranks["model.layers.1.self_attn.q_proj"] == 1
        assert ranks["model.layers.0.self_attn.q_proj"] == 2
    else:
        assert (ranks["transformer.h.0.attn.c_proj"], ranks["transformer.h.0.mlp.c_proj"]) == (3, 2)
    arena, batch = random_arena(layout, 4), pack(examples_with_prefixes())
    for fused, stock in zip(run(base, arena, batch), run(stock_of(base), arena, batch), strict=True):
        assert stock.abs().max() > 1
        torch.testing.assert_close(fused, stock, rtol=1e-9, atol=1e-9)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern names 'v_porj', but no adapted layer ends with it.*v_proj"):
        lora_layout(tiny_base("llama"), AdapterConfig(rank_pattern={"v_porj": 4}))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_client_of_smaller_rank_trains_as_in_an_arena_of_its_own(optimizer: str) -> None:
    base, clients = tiny_base("llama"), ragged_clients()
    layout, ranks, both = tiny_layout(base, "llama", rank=3), (3, 1, 2), frozenset({"lora_a", "lora_b"})
    training = TrainingConfig(local_steps=4, batch_size=2, optimizer=optimizer, learning_rate=1e-2, weight_decay=0.1)
    start_SP = trimmed(layout, random_arena(layout, 3).values_KP, ranks)
    job = Job(1, (0, 1, 2), start_SP, both, both, both)
    rows_SP, _ = train(base, layout, job, clients, training, total_rounds=1, seed=0, cohort_size=3, dropout=0.0)
    assert torch.equal(rows_SP, trimmed(layout, rows_SP, ranks))
    for row, rank in enumerate(ranks):
        # alpha 6 stands for rank 3: the scaling is that of the arena
        own = lora_layout(
            base, AdapterConfig(rank=rank, alpha=2.0 * rank, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
        )
        assert own.scaling == layout.scaling
        alone = job._replace(
            ids=(row,),
            start_SP=_cut(Arena(layout, start_SP), Arena(own, start_SP.new_zeros(3, own.num_parameters)), row),
        )
        expected_SP, _ = train(base, own, alone, clients, training, total_rounds=1, seed=0, cohort_size=1, dropout=0.0)
        found_SP = _cut(Arena(layout, rows_SP), Arena(own, start_SP.new_zeros(3, own.num_parameters)), row)
        assert float((found_SP - alone.start_SP).abs().max()) > 1e-3
        torch.testing.assert_close(found_SP, expected_SP, rtol=0, atol=1e-9)


def _cut(whole: Arena, own: Arena, row: int) -> torch.Tensor:
    """The first components of one row, (1, P) in the layout of `own`."""
    for big, small in zip(whole.layout.specs, own.layout.specs, strict=True):
        assert big.name == small.name
        own.view(small)[row] = whole.view(big)[row][: small.shape[0], : small.shape[1]]
    return own.values_KP[row : row + 1].clone()


def test_ranks_of_clients_by_name_or_in_turn() -> None:
    names = ("anna", "ben", "cleo")
    assert AdapterConfig().ranks_of(names) is None
    by_name = AdapterConfig(rank=4, client_ranks={"ben": 16})
    assert (by_name.ranks_of(names), by_name.largest_rank) == ((4, 16, 4), 16)
    in_turn = AdapterConfig(rank=4, client_ranks=(2, 3))
    assert (in_turn.ranks_of(names), in_turn.largest_rank) == ((2, 3, 2), 3)
    with pytest.raises(ConfigError, match=r"names 'bne', which is no client.*ben"):
        AdapterConfig(client_ranks={"bne": 2}).ranks_of(names)
    with pytest.raises(ValueError, match="exclude each other"):
        AdapterConfig(client_ranks=(2,), rank_pattern={"q_proj": 2})
