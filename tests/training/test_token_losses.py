"""Losses and their gradient by blocks of rows and tokens are those of one softmax over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.reference.tiny_models import tiny_base

from fedmira.training import objective


def _by_blocks(base: object, hidden_Md: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_Md = hidden_Md.clone().requires_grad_()
    losses_M = objective.token_losses(base, hidden_Md, labels_M)  # type: ignore[arg-type]
    (losses_M * torch.arange(1, len(labels_M) + 1)).sum().backward()
    assert hidden_Md.grad is not None
    return losses_M.detach(), hidden_Md.grad


def _at_once(base: object, hidden_Md: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_Md = hidden_Md.clone().requires_grad_()
    losses_M = F.cross_entropy(base.logits(hidden_Md), labels_M, reduction="none")  # type: ignore[attr-defined]
    (losses_M * torch.arange(1, len(labels_M) + 1)).sum().backward()
    assert hidden_Md.grad is not None
    return losses_M.detach(), hidden_Md.grad


def _blocks_of(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    monkeypatch.setitem(objective._BLOCK_COLUMNS, "cpu", columns)
    monkeypatch.setitem(objective._BLOCK_ELEMENTS, "cpu", rows * columns)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 32), (100, 10_000)])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, family: str, rows: int, columns: int) -> None:
    base = tiny_base(family)
    generator = torch.Generator().manual_seed(0)
    features = base.model.get_output_embeddings().weight.shape[1]
    # logits of some hundred: their exponentials overflow without the largest taken off
    hidden_Md = 300 * torch.randn(11, features, generator=generator, dtype=torch.float64)
    labels_M = torch.randint(base.vocabulary, (11,), generator=generator)
    labels_M[:2] = torch.tensor([0, base.vocabulary - 1])
    expected = _at_once(base, hidden_Md, labels_M)
    _blocks_of(monkeypatch, rows, columns)
    for found, wanted in zip(_by_blocks(base, hidden_Md, labels_M), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_row_that_is_not_finite_reaches_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    hidden_Md = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels_M = torch.arange(6)
    _blocks_of(monkeypatch, 4, 10)
    losses_M, grad_Md = _by_blocks(base, hidden_Md, labels_M)
    hidden_Md[2] = torch.nan
    others = torch.arange(6) != 2
    broken_M, broken_Md = _by_blocks(base, hidden_Md, labels_M)
    assert not broken_M[2].isfinite()
    assert torch.equal(broken_M[others], losses_M[others])
    assert torch.equal(broken_Md[others], grad_Md[others])


def test_tokens_that_cannot_be_said_have_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    head = base.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(base.vocabulary, dtype=torch.float64), requires_grad=False)
    head.bias[:20] = -torch.inf
    hidden_Md = torch.randn(4, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels_M = torch.tensor([20, 25, 30, 31])
    expected = _at_once(base, hidden_Md, labels_M)
    _blocks_of(monkeypatch, 3, 8)
    for found, wanted in zip(_by_blocks(base, hidden_Md, labels_M), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_gradient_next_to_nothing_stays_exact_in_16_bits() -> None:
    """1 minus the label's share is a thousandth; rounded to bfloat16 the share itself would be 1."""
    base = tiny_base("llama")
    base.model.to(torch.bfloat16)
    wide = tiny_base("llama")
    wide.model.load_state_dict({name: value.double() for name, value in base.model.state_dict().items()})
    head = wide.model.get_output_embeddings()
    labels_M = torch.tensor([5])
    direction_d = head.weight[5] - head.weight.mean(0)
    hidden_Md = (direction_d / direction_d.square().sum() * 12)[None].detach()
    _, wanted = _at_once(wide, hidden_Md, labels_M)
    _, found = _by_blocks(base, hidden_Md.float(), labels_M)
    share = torch.softmax(wide.logits(hidden_Md), 1)[0, 5]
    assert 0.99 < share < 1.0
    assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


def test_sums_of_narrow_losses_are_wide() -> None:
    """The next number of 32 bits after 2^24 is 2^24 + 2."""
    losses_M = torch.tensor([2.0**24, 1.0, 3.0])
    assert objective.sums_of_parts(losses_M, (2, 0, 1)).tolist() == [2.0**24 + 1, 0.0, 3.0]
