"""Three ways to the low-rank products of many clients, and the plain sum they must agree with."""

from __future__ import annotations

import pytest
import torch

from fedmira.model import low_rank
from fedmira.model.low_rank import Branch, Target, Way, add_low_rank_, assign_rows, low_rank_backward_

COUNTS = (3, 0, 5, 1)
RANK, INPUTS, SCALING = 8, 16, 0.5
COLUMNS = (slice(0, 24), slice(24, 32))


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_branch() -> Branch:
    """Two layers over one input, with gradients that are not zero before."""
    widths = [columns.stop - columns.start for columns in COLUMNS]
    targets = tuple(
        Target(
            columns,
            slice(RANK * index, RANK * (index + 1)),
            draw(len(COUNTS), width, RANK, seed=index),
            draw(len(COUNTS), width, RANK, seed=10 + index),
        )
        for index, (columns, width) in enumerate(zip(COLUMNS, widths, strict=True))
    )
    a_CRI, grad_a_CRI = (draw(len(COUNTS), 2 * RANK, INPUTS, seed=seed) for seed in (20, 21))
    return Branch(a_CRI, grad_a_CRI, targets, SCALING)


def by_the_book(branch: Branch, x_NI: torch.Tensor, grad_NO: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients of x, A and B as autograd finds them, one client and layer after the other."""
    leaves = [branch.a_CRI, *(target.b_COr for target in branch.targets)]
    a, *bs = (leaf.clone().requires_grad_() for leaf in leaves)
    x = x_NI.clone().requires_grad_()
    rows = []
    for client, part in enumerate(x.split(list(COUNTS))):
        rows.append(
            torch.cat(
                [
                    SCALING * part @ a[client, target.ranks].T @ b[client].T
                    for target, b in zip(branch.targets, bs, strict=True)
                ],
                dim=1,
            )
        )
    out = torch.cat(rows)
    gradients = torch.autograd.grad(out, [x, a, *bs], grad_NO)
    return (out.detach(), *gradients)


@pytest.mark.parametrize(
    ("way", "together"),
    [(None, 9), ("segments", 9), ("masked", 9), ("masked", 2), ("masked", 1), ("masked", 0), ("grouped", 9)],
)
def test_every_way_computes_the_same(way: Way | None, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    monkeypatch.setattr(low_rank, "_MOST_MASKED_RANKS", together * 2 * RANK)
    branch = make_branch()
    x_NI, grad_NO = draw(sum(COUNTS), INPUTS, seed=30), draw(sum(COUNTS), 32, seed=31)
    out, grad_x, grad_a, *grad_bs = by_the_book(branch, x_NI, grad_NO)
    before_a = branch.grad_a_CRI.clone() if branch.grad_a_CRI is not None else None
    before_bs = [target.grad_b_COr.clone() for target in branch.targets if target.grad_b_COr is not None]
    rows = assign_rows(COUNTS, torch.device("cpu"), way)
    base_NO, base_x_NI = draw(sum(COUNTS), 32, seed=32), draw(sum(COUNTS), INPUTS, seed=33)
    out_NO, grad_x_NI = base_NO.clone(), base_x_NI.clone()
    low = add_low_rank_(branch, rows, x_NI, out_NO)
    low_rank_backward_(branch, rows, x_NI, low, grad_NO, grad_x_NI)
    torch.testing.assert_close(out_NO, base_NO + out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x_NI, base_x_NI + grad_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(branch.grad_a_CRI, before_a + grad_a, rtol=1e-4, atol=1e-4)
    for target, before, grad_b in zip(branch.targets, before_bs, grad_bs, strict=True):
        torch.testing.assert_close(target.grad_b_COr, before + grad_b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["segments", "masked", "grouped"])
def test_frozen_groups_and_inputs_without_gradient(way: Way) -> None:
    if way == "grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    whole = make_branch()
    x_NI, grad_NO = draw(sum(COUNTS), INPUTS, seed=30), draw(sum(COUNTS), 32, seed=31)
    _, _, grad_a, *_ = by_the_book(whole, x_NI, grad_NO)
    branch = whole._replace(
        grad_a_CRI=torch.zeros_like(whole.a_CRI),
        targets=tuple(target._replace(grad_b_COr=None) for target in whole.targets),
    )
    rows = assign_rows(COUNTS, torch.device("cpu"), way)
    low = add_low_rank_(branch, rows, x_NI, torch.zeros(sum(COUNTS), 32))
    low_rank_backward_(branch, rows, x_NI, low, grad_NO, None)
    torch.testing.assert_close(branch.grad_a_CRI, grad_a, rtol=1e-4, atol=1e-4)


def test_rows_are_masked_with_what_was_made_once() -> None:
    branch = make_branch()
    rows = assign_rows(COUNTS, torch.device("cpu"), "masked")
    x_NI = draw(sum(COUNTS), INPUTS, seed=30)
    masks = []
    for _ in range(2):
        add_low_rank_(branch, rows, x_NI, torch.zeros(sum(COUNTS), 32))
        masks.append(rows.foreign[len(COUNTS), 2 * RANK])
    assert masks[0] is masks[1]
    assert (~masks[0]).sum(dim=1).tolist() == [2 * RANK] * sum(COUNTS)
    assert not assign_rows(COUNTS, torch.device("cpu"), "masked").foreign


def test_what_is_masked_together_stays_few_however_many_clients_there_are() -> None:
    counts, branch = (1,) * 1000, make_branch()
    many = branch._replace(
        a_CRI=draw(1000, 2 * RANK, INPUTS, seed=1),
        grad_a_CRI=None,
        targets=tuple(
            target._replace(b_COr=draw(1000, *target.b_COr.shape[1:], seed=2), grad_b_COr=None)
            for target in branch.targets
        ),
    )
    outputs = []
    for way in ("masked", "segments"):
        out_NO = torch.zeros(1000, 32)
        low = add_low_rank_(many, assign_rows(counts, torch.device("cpu"), way), draw(1000, INPUTS, seed=3), out_NO)
        outputs.append(out_NO)
        assert low.numel() <= 1000 * 256
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_only_one_after_the_other_keeps_trouble_to_itself() -> None:
    x_NI = draw(sum(COUNTS), INPUTS, seed=30)
    outputs = {}
    for way in ("segments", "masked"):
        branch = make_branch()
        branch.targets[0].b_COr[2] = float("nan")
        out_NO = torch.zeros(sum(COUNTS), 32)
        add_low_rank_(branch, assign_rows(COUNTS, torch.device("cpu"), way), x_NI, out_NO)
        outputs[way] = out_NO
    assert outputs["segments"][3:8].isnan().any()
    assert outputs["segments"][:3].isfinite().all()
    assert outputs["masked"][:3].isnan().any()
