"""Packed rows give what each sequence gives alone, in every family, and no row sees another sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.reference.tiny_models import FAMILIES, random_examples, tiny_base

from fedmira.data.packing import PackedBatch, pack
from fedmira.model import attention
from fedmira.model.attention import PACKED, Alone, Settings, asking_for, attend, plan_packing
from fedmira.model.base import BaseModel

# longer than the sliding windows, and ragged enough for several buckets
BATCH = pack([random_examples(6, seed=1, longest=9), random_examples(3, seed=2, longest=40)])


def stock_hidden(base: BaseModel, batch: PackedBatch) -> torch.Tensor:
    """The final hidden states of each sequence alone under the stock model, one after the other."""
    parts = torch.split(batch.tokens_N, list(batch.sequence_lengths))
    return torch.cat(
        [base.model.base_model(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in parts]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_sequences_alone(family: str) -> None:
    base = tiny_base(family)
    with torch.no_grad():
        packed_ND, alone_ND = base.hidden(BATCH), stock_hidden(base, BATCH)
    # Gemma 2 rounds its attention weights to float32 inside: equal inputs up to 1e-16 may round apart
    tolerance = 1e-5 if family == "gemma2" else 1e-9
    torch.testing.assert_close(packed_ND, alone_ND, rtol=0, atol=tolerance)
    assert base.model.config._attn_implementation != PACKED, "the stock attention must be back in place"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sequence_gets_the_bits_of_the_stock_model(family: str) -> None:
    base = tiny_base(family, torch.float32)
    batch = pack([random_examples(1, seed=5, longest=30)])
    with torch.no_grad():
        stock = base.model(input_ids=batch.tokens_N[None], use_cache=False).logits[0]
        assert torch.equal(base.logits(base.hidden(batch)), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_sees_another_sequence_or_its_own_future(family: str) -> None:
    base = tiny_base(family)
    starts = torch.tensor([0, *BATCH.sequence_lengths]).cumsum(0)
    changed = 2
    middle = int(starts[changed]) + BATCH.sequence_lengths[changed] // 2
    tokens_N = BATCH.tokens_N.clone()
    tokens_N[middle] = (tokens_N[middle] + 1) % 90 + 3
    with torch.no_grad():
        before_ND, after_ND = base.hidden(BATCH), base.hidden(BATCH._replace(tokens_N=tokens_N))
    differs_N = (before_ND != after_ND).any(dim=1)
    assert differs_N[middle]
    assert not differs_N[:middle].any()
    assert not differs_N[starts[changed + 1] :].any()


def test_gradients_of_packed_rows_equal_those_of_sequences_alone() -> None:
    base = tiny_base("llama")
    embedding = base.model.get_input_embeddings().weight
    weights_N = torch.randn(len(BATCH.tokens_N), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for forward in (base.hidden, lambda batch: stock_hidden(base, batch)):
        embedding.requires_grad_(True)
        (forward(BATCH).square().sum(dim=1) * weights_N).sum().backward()
        gradients.append(embedding.grad.clone())
        embedding.grad = None
        embedding.requires_grad_(False)
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [(4,), (4, 4, 4), (3, 20, 4), (30, 1, 30, 29), (5, 4, 3, 2, 1)])
def test_a_plan_computes_every_row_in_one_slot(lengths: tuple[int, ...]) -> None:
    plan = plan_packing(lengths, torch.device("cpu"))
    rows_N = torch.arange(sum(lengths))
    slots = torch.cat([rows_N if bucket.rows is None else bucket.rows for bucket in plan.buckets])
    assert torch.equal(slots if plan.slots_n is None else slots[plan.slots_n], rows_N)
    assert len(slots) == sum(bucket.num_sequences * bucket.length for bucket in plan.buckets)
    assert sum(bucket.num_sequences for bucket in plan.buckets) == len(lengths)
    assert plan.repeated_rows is None


def test_a_shared_prefix_fills_slots_in_every_sequence_that_begins_with_it() -> None:
    # rows 0..4 are a whole sequence; rows 5..6 and 7 follow its first 3 rows
    plan = plan_packing((5, 2, 1), torch.device("cpu"), prefixes=((0, 0), (0, 3), (0, 3)))
    (bucket,) = plan.buckets
    assert bucket.rows is not None
    assert plan.slots_n is not None
    assert bucket.rows.view(3, 5).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [0, 1, 2, 7, 7]]
    assert plan.slots_n.tolist() == [0, 1, 2, 3, 4, 8, 9, 13]
    assert plan.repeated_rows is not None
    assert plan.repeated_rows.tolist() == [0, 1, 2, 0, 1, 2]
    assert plan.repeated_slots is not None
    assert plan.repeated_slots.tolist() == [5, 6, 7, 10, 11, 12]


def test_long_sequences_stand_alone_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LEAST_ALONE", 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    # rows 0..4 are a whole sequence; rows 5..6, 7..10 and 11 follow its first 3 rows; rows 12..14 share nothing
    lengths, prefixes = (5, 2, 4, 1, 3), ((0, 0), (0, 3), (0, 3), (0, 3), (12, 0))
    plan = plan_packing(lengths, torch.device("cpu"), prefixes, stand_alone=True, reach=3)
    assert plan.alone == (
        Alone(slice(0, 5), slice(0, 0), slice(0, 5), (5,)),
        Alone(slice(7, 11), slice(0, 3), slice(7, 11), (4,)),
    )
    assert plan.longest == 7
    (bucket,) = plan.buckets
    assert bucket.rows is not None
    assert bucket.rows.view(3, 5).tolist() == [[0, 1, 2, 5, 6], [0, 1, 2, 11, 11], [12, 13, 14, 12, 12]]
    assert plan.rows_n is not None
    assert plan.rows_n.tolist() == [5, 6, 11, 12, 13, 14]
    assert plan.slots_n is not None
    assert plan.slots_n.tolist() == [3, 4, 8, 10, 11, 12]
    assert not plan_packing(lengths, torch.device("cpu"), prefixes).alone
    assert not plan_packing(lengths, torch.device("meta"), prefixes, stand_alone=True).alone
    monkeypatch.setattr(attention, "_LEAST_ALONE", 0)
    everything = plan_packing(lengths, torch.device("cpu"), prefixes, stand_alone=True, reach=3)
    assert (len(everything.alone), everything.buckets, everything.slots_n) == (5, (), None)


def test_short_sequences_behind_one_prefix_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_TOGETHER", 6)
    # rows 0..4 are a whole sequence; rows 5..6, 7..10, 11 and 12..18 follow its first 3 rows; rows 19..20 and 21 are
    # another client's: the last follows the first row of it
    lengths, prefixes = (5, 2, 4, 1, 7, 2, 1), ((0, 0), (0, 3), (0, 3), (0, 3), (0, 3), (19, 0), (19, 1))
    plan = plan_packing(lengths, torch.device("cpu"), prefixes, stand_alone=True, reach=9)
    behind = slice(0, 3)
    assert plan.alone == (
        Alone(slice(5, 11), behind, slice(5, 11), (2, 4)),
        Alone(slice(11, 12), behind, slice(11, 12), (1,)),
        Alone(slice(12, 19), behind, slice(12, 19), (7,)),
        Alone(slice(21, 22), slice(19, 20), slice(21, 22), (1,)),
    )
    assert [one.length for one in plan.alone] == [7, 4, 10, 2]
    assert plan.longest == 10
    # the other sequences are short
    assert plan.rows_n is not None
    assert plan.rows_n.tolist() == [0, 1, 2, 3, 4, 19, 20]
    near = plan_packing(lengths, torch.device("cpu"), prefixes, stand_alone=True, reach=8)
    assert [one.rows.start for one in near.alone] == [21]
    asked = asking_for(plan, torch.tensor([4, 8, 9, 11]))
    assert [one.asking.start for one in asked.alone] == [8, 11, 18, 21]


def test_only_rows_from_the_first_wanted_one_on_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LEAST_ALONE", 0)
    prefixes = ((0, 0), (0, 3), (0, 3), (0, 0))
    plan = plan_packing((5, 2, 4, 3), torch.device("cpu"), prefixes, stand_alone=True, reach=0)
    asked = asking_for(plan, torch.tensor([3, 4, 5, 9]))
    # nothing is wanted of the last sequence; its last row asks all the same
    assert [one.asking for one in asked.alone] == [slice(3, 5), slice(5, 7), slice(9, 11), slice(13, 14)]
    assert [one._replace(asking=one.rows) for one in asked.alone] == list(plan.alone)
    together = plan_packing((5, 2), torch.device("cpu"))
    assert asking_for(together, torch.tensor([3])) is together


@pytest.mark.parametrize(
    ("device", "dtype", "in_groups"),
    [("cpu", torch.float32, True), ("meta", torch.bfloat16, True), ("meta", torch.float32, False)],
)
def test_a_gpu_shares_keys_in_16_bits_only(
    device: str, dtype: torch.dtype, in_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel for float32 that does not keep (T, T) weights knows no groups."""
    seen = []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append((settings["enable_gqa"], key.shape[1]))
        return query

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    query, key = (torch.empty(1, heads, 5, 4, device=device, dtype=dtype) for heads in (6, 2))
    attend(query, key, key, Settings(None, None, None))
    assert seen == [(in_groups, 2 if in_groups else 6)]
