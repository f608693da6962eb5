"""Products with frozen weights are the same by either library, and may lie in memory that is there already."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fedmira.model import products

X_NI, WEIGHT_OI, BIAS_O = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("bias_O", [None, BIAS_O], ids=["no bias", "bias"])
@pytest.mark.parametrize("transposed", [False, True])
def test_both_libraries_multiply(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, bias_O: torch.Tensor | None, transposed: bool
) -> None:
    monkeypatch.setattr(products, "_ONEDNN", onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    weight_OI = WEIGHT_OI.T.contiguous().T if transposed else WEIGHT_OI
    expected = X_NI.double() @ WEIGHT_OI.double().T + (0.0 if bias_O is None else bias_O.double())
    for room in (None, torch.full((40,), torch.nan)):
        found = products.product(X_NI, weight_OI, bias_O, room)
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_result_lies_in_the_room_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_ONEDNN", False)
    room = torch.zeros(40)
    assert products.product(X_NI, WEIGHT_OI, room=room).data_ptr() == room.data_ptr()
    assert not room[15:].any()


def test_no_rows_and_other_dtypes_are_multiplied_too() -> None:
    assert products.product(X_NI[:0], WEIGHT_OI).shape == (0, 3)
    assert products.product(X_NI.double(), WEIGHT_OI.double()).dtype == torch.float64


@pytest.mark.parametrize("bias_O", [None, BIAS_O], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_product_is_narrow_where_weights_are(dtype: torch.dtype, bias_O: torch.Tensor | None) -> None:
    bias_O = None if bias_O is None else bias_O.to(dtype)
    expected = torch.nn.functional.linear(X_NI.to(dtype), WEIGHT_OI.to(dtype), bias_O).float()
    room = torch.full((40,), torch.nan)
    for given in (None, room):
        assert torch.equal(products.product(X_NI, WEIGHT_OI.to(dtype), bias_O, given), expected)
    assert torch.equal(room[:15].view(5, 3), expected)
    assert products.product(X_NI[:0], WEIGHT_OI.to(dtype), bias_O).shape == (0, 3)


@pytest.mark.parametrize("asked", [None, "7"])
def test_caches_of_shapes_are_small_unless_the_user_says_otherwise(asked: str | None) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: text for name, text in os.environ.items() if name not in names}
    if asked is not None:
        environment |= dict.fromkeys(names, asked)
    program = f"import os; from fedmira.model import products; print(*map(os.getenv, {names}))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [asked or "32"] * 2
