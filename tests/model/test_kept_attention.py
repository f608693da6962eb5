"""Attention that keeps its weights agrees with the fused kernel, forwards and backwards."""

import pytest
import torch

from fedmira.model import kept_attention
from fedmira.model.attention import Settings, attend
from fedmira.model.kept_attention import SlowCall, look_back_, look_back_backward_


def rows_of(sequences: int, length: int, heads: int) -> torch.Tensor:
    """Rows that hold queries, keys and values, as the body hands them over."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(sequences, length, heads, 8, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize(("length", "num_queries"), [(2, 2), (37, 37), (37, 5), (37, 1), (230, 230), (230, 130)])
@pytest.mark.parametrize("sequences", [1, 3])
def test_equals_the_fused_kernel(
    sequences: int, length: int, num_queries: int, key_heads: int, scaling: float | None
) -> None:
    settings = Settings(scaling, None, None)
    states = rows_of(sequences, length, 6 + 2 * key_heads).requires_grad_()
    query, key, value = torch.split(states, [6, key_heads, key_heads], dim=2)
    query = query[:, length - num_queries :]
    gradient = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = attend(*(part.transpose(1, 2) for part in (query, key, value)), settings).transpose(1, 2)
    expected_grads = torch.autograd.grad(expected, (query, key, value), gradient)

    output, grad_query = torch.empty_like(query), torch.empty_like(query)
    with torch.no_grad():
        look = look_back_(query, key, value, settings, True, output)
        assert not isinstance(look, SlowCall)
        grads = (grad_query, *look_back_backward_(gradient, settings, look, grad_query))
        again = torch.empty_like(query)
        assert look_back_(query, key, value, settings, False, again) == ()
    assert torch.equal(again, output)
    for kept, fused in zip((output, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(kept, fused, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("num_queries", [9, 6, 1])
@pytest.mark.parametrize("num_shared", [0, 4])
def test_sequences_that_share_a_call_equal_calls_of_their_own(
    num_shared: int, num_queries: int, key_heads: int, scaling: float | None
) -> None:
    lengths, settings = (2, 4, 3), Settings(scaling, None, None)
    states = rows_of(1, num_shared + 9, 6 + 2 * key_heads)
    query, key, value = torch.split(states, [6, key_heads, key_heads], dim=2)
    query = query[:, num_shared + 9 - num_queries :]
    gradient = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output, grad_query = torch.empty_like(query), torch.empty_like(query)
    look = look_back_(query, key, value, settings, True, output, lengths)
    grad_key, grad_value = look_back_backward_(gradient, settings, look, grad_query)

    expected_keys, expected_values = torch.zeros_like(key), torch.zeros_like(value)
    first = 0
    for own in lengths:
        rows = [*range(num_shared), *range(num_shared + first, num_shared + first + own)]
        asking = slice(max(0, first - (9 - num_queries)), max(0, first + own - (9 - num_queries)))
        first += own
        if asking.stop == asking.start:
            continue
        alone, grad_alone = torch.empty_like(query[:, asking]), torch.empty_like(query[:, asking])
        look = look_back_(query[:, asking], key[:, rows], value[:, rows], settings, True, alone)
        grads = look_back_backward_(gradient[:, asking], settings, look, grad_alone)
        torch.testing.assert_close(output[:, asking], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_query[:, asking], grad_alone, rtol=1e-12, atol=1e-12)
        expected_keys[:, rows] += grads[0]
        expected_values[:, rows] += grads[1]
    torch.testing.assert_close(grad_key, expected_keys, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_value, expected_values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [Settings(None, None, None), Settings(None, 6, None), Settings(None, 6, 5.0)])
@pytest.mark.parametrize("num_queries", [1, 7])
def test_positions_that_do_not_ask_change_nothing_for_those_that_do(settings: Settings, num_queries: int) -> None:
    query, key, value = (part.transpose(1, 2) for part in torch.split(rows_of(2, 20, 12), 4, dim=2))
    everything = attend(query, key, value, settings)
    torch.testing.assert_close(
        attend(query[:, :, 20 - num_queries :], key, value, settings), everything[:, :, -num_queries:]
    )


@pytest.mark.parametrize(
    ("settings", "length", "kept"),
    [
        (Settings(None, None, None), 20, True),
        (Settings(None, None, None), 724, True),
        (Settings(None, 20, None), 20, True),
        (Settings(None, 19, None), 20, False),
        (Settings(None, None, 5.0), 20, False),
        (Settings(None, None, None), 725, False),
        (Settings(None, None, None), 1, False),
    ],
)
def test_what_it_cannot_do_goes_to_the_fused_kernel(
    settings: Settings, length: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(kept_attention, "attend", lambda *arguments: called.append(arguments) or attend(*arguments))
    states = rows_of(1, length, 2).requires_grad_()
    gradient = torch.ones_like(states)
    output, grad_query = torch.empty_like(states), torch.empty_like(states)
    with torch.no_grad():
        look = look_back_(states, states, states, settings, True, output)
        grad_key, grad_value = look_back_backward_(gradient, settings, look, grad_query)
    assert bool(called) != kept
    assert isinstance(look, SlowCall) != kept
    heads = states.transpose(1, 2)
    expected = attend(heads, heads, heads, settings).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grad_query + grad_key + grad_value, torch.autograd.grad(expected, states, gradient)[0])
