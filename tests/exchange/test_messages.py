"""Claims: a message stands for its rows as closely as its form can, and its bytes are what would be sent."""

from __future__ import annotations

import pytest
import torch
from tests.exchange.builders import GROUPS, LAYOUT, rows

from fedmira.config.exchange import Compression
from fedmira.exchange.messages import PLACES, carried, crossing_bytes, decode, encode, encoded_bytes, message_bytes
from fedmira.federation.ranks import trimmed


def back(
    rows_SP: torch.Tensor, compression: Compression, top_k: float = 1.0, groups: frozenset[str] = GROUPS
) -> torch.Tensor:
    return decode(LAYOUT, groups, encode(LAYOUT, groups, rows_SP, compression, top_k), rows_SP)


def test_int8_by_hand() -> None:
    """One scale for each row of A (5 numbers) and each column of B (4 numbers): largest / 127."""
    row_SP = torch.zeros(1, LAYOUT.num_parameters)
    row_SP[0, :5] = torch.tensor([127.0, -63.6, 0.4, 0.6, 1.0])
    row_SP[0, 10:18] = torch.tensor([[254.0, 0.0], [1.0, 0.0], [3.1, 0.0], [-254.0, 0.0]]).flatten()
    message = encode(LAYOUT, GROUPS, row_SP, "int8")
    assert message["a.lora_a"][0].tolist() == [[127, -64, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert message["a.lora_a.scale"].shape == (1, 2, 1)
    assert message["a.lora_b"][0].tolist() == [[127, 0], [0, 0], [2, 0], [-127, 0]]
    assert message["a.lora_b.scale"].flatten().tolist() == [2.0, 0.0]
    assert back(row_SP, "int8")[0, 10:18].tolist() == [254.0, 0.0, 0.0, 0.0, 4.0, 0.0, -254.0, 0.0]


def test_int8_is_off_by_half_a_step_at_most() -> None:
    values_SP = rows(0) * 10
    decoded_SP = back(values_SP, "int8")
    for spec, axis in zip(LAYOUT.specs, (2, 1, 2, 1), strict=True):
        columns = slice(spec.offset, spec.offset + spec.size)
        given, got = (x[:, columns].view(4, *spec.shape) for x in (values_SP, decoded_SP))
        step = given.abs().amax(dim=axis, keepdim=True) / 127
        assert ((given - got).abs() <= step / 2 * (1 + 1e-5)).all()


def test_topk_by_hand() -> None:
    row_SP = torch.arange(36.0)[None] - 17.75
    message = encode(LAYOUT, GROUPS, row_SP, "topk", 0.1)
    assert sorted(message[PLACES][0].tolist()) == [0, 1, 34, 35], "ceil(3.6) numbers of largest absolute value"
    expected = torch.zeros(36)
    expected[[0, 1, 34, 35]] = torch.tensor([-17.75, -16.75, 16.25, 17.25])
    assert torch.equal(back(row_SP, "topk", 0.1)[0], expected)
    assert message_bytes(message) == 4 * (4 + 4)
    assert torch.equal(back(row_SP, "topk", 1.0), row_SP)


def test_bf16_rounds_and_none_changes_nothing() -> None:
    values_SP = rows(1)
    assert torch.equal(back(values_SP, "bf16"), values_SP.bfloat16().float())
    assert torch.equal(back(values_SP, "none"), values_SP)


@pytest.mark.parametrize("compression", ["none", "bf16", "int8", "topk"])
def test_only_the_groups_asked_for_cross(compression: Compression) -> None:
    values_SP = rows(2)
    values_SP[:, 0] = 1e6
    decoded_SP = back(values_SP, compression, 0.5, frozenset({"lora_b"}))
    assert (decoded_SP[:, :10] == 0).all()
    assert (decoded_SP[:, 10:18] != 0).any()
    assert (decoded_SP[:, 18:24] == 0).all()
    assert encode(LAYOUT, frozenset(), values_SP, compression) == {}


@pytest.mark.parametrize("compression", ["bf16", "int8", "topk"])
def test_rows_are_encoded_as_if_alone_and_what_is_not_finite_stays_so(compression: Compression) -> None:
    values_SP = rows(3)
    together = back(values_SP, compression, 0.3)
    alone = torch.cat([back(values_SP[k : k + 1], compression, 0.3) for k in range(4)])
    assert torch.equal(together, alone)
    for poison in (float("nan"), float("inf")):
        values_SP[1, 11] = poison
        poisoned = back(values_SP, compression, 0.3)
        assert not torch.isfinite(poisoned[1]).all()
        assert torch.equal(poisoned[[0, 2, 3]], together[[0, 2, 3]])


@pytest.mark.parametrize(
    ("compression", "per_row"),
    [("none", 36 * 4), ("bf16", 36 * 2), ("int8", 36 + 8 * 4), ("topk", 9 * 8)],
)
def test_the_bytes_of_each_form(compression: Compression, per_row: int) -> None:
    values_SP = rows(4)
    assert message_bytes(encode(LAYOUT, GROUPS, values_SP, compression, 0.25)) == 4 * per_row
    assert encoded_bytes(LAYOUT, GROUPS, values_SP, compression, 0.25) == 4 * per_row
    assert encoded_bytes(LAYOUT, GROUPS, values_SP[:0], compression, 0.25) == 0


def test_only_the_named_groups_cost_bytes_in_the_dtype_of_the_tensors() -> None:
    values_SP = rows(5, 3)
    assert crossing_bytes(LAYOUT, frozenset(), values_SP) == 0
    assert crossing_bytes(LAYOUT, {"lora_b"}, values_SP) == 3 * 20 * 4
    assert crossing_bytes(LAYOUT, GROUPS, values_SP.bfloat16()) == 3 * 36 * 2


def test_components_beyond_the_rank_of_a_client_do_not_cross() -> None:
    values_SP = torch.ones(2, LAYOUT.num_parameters)
    values_SP[1, 5:10] = 0.0
    # with its column of B the second component of layer a still needs its row of A
    assert crossing_bytes(LAYOUT, GROUPS, values_SP) == 2 * 36 * 4
    values_SP[1, 11:18:2] = 0.0
    assert crossing_bytes(LAYOUT, GROUPS, values_SP) == (2 * 36 - 5 - 4) * 4
    assert crossing_bytes(LAYOUT, {"lora_b"}, values_SP) == (2 * 20 - 4) * 4
    # a component that does nothing yet, B = 0, crosses
    values_SP[0, 11:18:2] = 0.0
    assert crossing_bytes(LAYOUT, {"lora_a"}, values_SP) == (2 * 16 - 5) * 4


@pytest.mark.parametrize(
    ("compression", "whole", "half"),
    [("bf16", 36 * 2, 18 * 2), ("int8", 36 + 8 * 4, 18 + 4 * 4), ("topk", 9 * 8, 5 * 8)],
)
def test_a_client_of_half_the_rank_sends_half_in_every_form(compression: Compression, whole: int, half: int) -> None:
    values_SP = trimmed(LAYOUT, rows(6), (2, 1, 2, 1))
    got_SP, num_bytes = carried(LAYOUT, GROUPS, values_SP, values_SP, compression, 0.25)
    assert num_bytes == 2 * (whole + half)
    assert encoded_bytes(LAYOUT, GROUPS, values_SP, compression, 0.25) == num_bytes
    # rows of full rank are as they would be among their like, and zeros stay zeros
    assert torch.equal(got_SP[[0, 2]], back(values_SP[[0, 2]], compression, 0.25))
    assert torch.equal(got_SP, trimmed(LAYOUT, got_SP, (2, 1, 2, 1)))
    if compression == "topk":
        # ceil(0.25 x 18) of its own numbers, the largest
        assert (got_SP != 0).sum(dim=1).tolist() == [9, 5, 9, 5]
        assert got_SP[1].abs().max() == values_SP[1].abs().max()
    else:
        assert torch.equal(got_SP, back(values_SP, compression))


@pytest.mark.parametrize("compression", ["none", "bf16", "int8", "topk"])
def test_rows_of_one_rank_are_carried_as_one_message(compression: Compression) -> None:
    values_SP = rows(7)
    got_SP, num_bytes = carried(LAYOUT, GROUPS, values_SP, values_SP, compression, 0.3)
    message = encode(LAYOUT, GROUPS, values_SP, compression, 0.3)
    assert torch.equal(got_SP, decode(LAYOUT, GROUPS, message, values_SP))
    assert num_bytes == message_bytes(message)


def test_what_is_there_crosses_even_where_nothing_of_it_moved() -> None:
    known_SP, still_SP = rows(8), torch.zeros(4, LAYOUT.num_parameters)
    assert carried(LAYOUT, GROUPS, still_SP, known_SP, "bf16")[1] == 4 * 36 * 2
    assert carried(LAYOUT, GROUPS, known_SP, still_SP, "bf16")[1] == 4 * 36 * 2
    assert carried(LAYOUT, GROUPS, still_SP, still_SP, "bf16")[1] == 0
    assert carried(LAYOUT, GROUPS, still_SP, still_SP, "topk")[1] == 0
