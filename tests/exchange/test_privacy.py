"""Claims: uploads are clipped to C and noised by sigma C, epsilon is the published one, a spent budget is refused."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from tests.exchange.builders import GROUPS, LAYOUT, NAMES, job, reports, rows

from fedmira.config.exchange import ExchangeConfig, PrivacyConfig
from fedmira.errors import ParticipationError, SetupError
from fedmira.exchange.privacy import advice, epsilon, max_uploads, privatise_
from fedmira.exchange.seam import Seam
from fedmira.types import Layout, TensorSpec

WIDE = Layout((TensorSpec("w.lora_b", "lora_b", "w", (5000, 4), 0),))


def test_clipping_by_hand() -> None:
    """Almost without noise: a difference of norm 10 becomes one of norm 2, one of norm 1 stays."""
    config = PrivacyConfig(enabled=True, clip_norm=2.0, noise_multiplier=1e-12)
    start = rows(0, 2)
    difference = torch.zeros(2, LAYOUT.num_parameters)
    difference[0, [1, 20]], difference[1, 3] = torch.tensor([6.0, 8.0]), 1.0
    values = start + difference
    privatise_(LAYOUT, GROUPS, values, start, [("a",), ("b",)], config, 0)
    moved = values - start
    assert moved[0, [1, 20]].tolist() == pytest.approx([1.2, 1.6], abs=1e-6)
    assert moved[1, 3].item() == pytest.approx(1.0, abs=1e-6)
    assert moved.abs().sum().item() == pytest.approx(3.8, abs=1e-4)


def test_noise_has_standard_deviation_sigma_times_c() -> None:
    config = PrivacyConfig(enabled=True, clip_norm=0.5, noise_multiplier=3.0)
    values = torch.zeros(1, WIDE.num_parameters)
    privatise_(WIDE, {"lora_b"}, values, torch.zeros_like(values), [("a", 1, 0)], config, 0)
    assert values.std().item() == pytest.approx(1.5, rel=0.03)
    assert abs(values.mean().item()) < 4 * 1.5 / math.sqrt(20_000)


def test_noise_of_the_system_is_gaussian_and_has_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PrivacyConfig(enabled=True, clip_norm=0.5, noise_multiplier=3.0, noise_seed="system")

    def noise() -> torch.Tensor:
        values = torch.zeros(1, WIDE.num_parameters)
        privatise_(WIDE, {"lora_b"}, values, torch.zeros_like(values), [("a", 1, 0)], config, 0)
        return values[0] / 1.5

    drawn = noise()
    assert kstest(drawn.numpy(), "norm").pvalue > 1e-6
    assert len(drawn.unique()) > 0.99 * len(drawn)
    # PyTorch's generator on a CPU knows 32 bits of a seed, which can be tried one after the other
    monkeypatch.setattr(torch, "randn", None)
    monkeypatch.setattr(torch, "Generator", None)
    assert not torch.isclose(drawn, noise()).all()
    for byte, sign in ((b"\x00", -1.0), (b"\xff", 1.0)):
        monkeypatch.setattr("secrets.token_bytes", lambda count, byte=byte: byte * count)
        assert 8 < float(noise()[0]) * sign < 9, "finite at both ends"


def test_noise_is_named_by_run_client_round_and_row() -> None:
    def noise(*stream: str | int, seed: int = 0, source: str = "run") -> torch.Tensor:
        config = PrivacyConfig.model_validate({"enabled": True, "noise_seed": source})
        values = torch.zeros(1, LAYOUT.num_parameters)
        privatise_(LAYOUT, GROUPS, values, torch.zeros_like(values), [stream], config, seed)
        return values

    first = noise("anna", 1, 0)
    assert torch.equal(first, noise("anna", 1, 0))
    for other in (noise("ben", 1, 0), noise("anna", 2, 0), noise("anna", 1, 1), noise("anna", 1, 0, seed=1)):
        assert not torch.isclose(first, other).any()
    assert not torch.equal(noise("anna", 1, 0, source="system"), noise("anna", 1, 0, source="system"))


def test_what_does_not_cross_is_not_touched() -> None:
    values, start = rows(1), rows(0)
    privatise_(LAYOUT, {"lora_b"}, values, start, [(k,) for k in range(4)], PrivacyConfig(enabled=True), 0)
    assert torch.equal(values[:, :10], rows(1)[:, :10])
    assert not torch.isclose(values[:, 10:18], rows(1)[:, 10:18]).any()


@pytest.mark.parametrize(
    ("uploads", "sigma", "delta"), [(1, 1.0, 1e-5), (8, 1.0, 1e-5), (60, 8.0, 1e-6), (1, 50.0, 1e-5)]
)
def test_epsilon_is_what_the_formula_says(uploads: int, sigma: float, delta: float) -> None:
    """min over alpha of T alpha / (2 sigma^2) + log((alpha - 1) / alpha) - (log delta + log alpha) / (alpha - 1):
    Mironov 2017 for the Gaussian mechanism, Canonne, Kamath and Steinke 2020, Prop. 12, for the conversion."""
    orders = [1 + step / 1000 for step in range(1, 1_000_000)]
    bound = min(
        uploads * a / (2 * sigma**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders
    )
    assert bound <= epsilon(uploads, sigma, delta) <= 1.02 * bound


def test_epsilon_grows_with_uploads_and_falls_with_noise() -> None:
    assert epsilon(0, 1.0, 1e-5) == 0.0
    assert epsilon(1, 2.0, 1e-5) < epsilon(2, 2.0, 1e-5) < epsilon(2, 1.0, 1e-5)


def test_epsilon_is_never_below_nothing() -> None:
    assert epsilon(1, 5.0, 0.5) == epsilon(1, 1e12, 0.9) == 0.0
    assert epsilon(1000, 5.0, 0.5) > 0
    assert epsilon(1, 1e-12, 1e-5) < math.inf


def test_a_budget_is_spent_client_by_client_and_then_refused_before_anything_crosses() -> None:
    budget = epsilon(2, 4.0, 1e-5)
    privacy = PrivacyConfig(enabled=True, noise_multiplier=4.0, budget=budget)
    assert max_uploads(privacy) == 2
    one = Seam(ExchangeConfig(privacy=privacy), LAYOUT, NAMES, 0)
    for round_, ids in ((1, (0, 1)), (2, (0, 2))):
        asked = job(rows(0, 2), round_, ids=ids)
        one.refuse(asked)
        one.receive(asked, rows(1, 2), reports(ids))
        assert [one.state().facts["uploads"][id_] for id_ in ids] == [round_, 1]
    with pytest.raises(ParticipationError, match=r"round 3: .* budget of 1 of 2 participants .* anna: ") as raised:
        one.refuse(job(rows(0, 2), 3, ids=(0, 3)))
    assert raised.value.exit_code == 6
    assert "enough for 2 uploads" in str(raised.value)
    assert one.state().facts == {"uploads": [2, 1, 1, 0]}
    # others may go on, and so may whoever sends nothing
    one.refuse(job(rows(0, 2), 3, ids=(1, 3)))
    one.refuse(job(rows(0, 2), 3, ids=(0, 3), upload=frozenset()))
    # two rows of a client are two uploads
    with pytest.raises(ParticipationError, match="first ben"):
        one.refuse(job(rows(0, 4), 3, ids=(1, 3, 1, 3)))
    # and rows that stay are none
    one.refuse(job(rows(0, 4), 3, ids=(1, 3, 1, 3), local_rows=2))


def test_each_row_that_crosses_is_an_upload_with_noise_of_its_own() -> None:
    config, ids = ExchangeConfig(privacy=PrivacyConfig(enabled=True)), (1, 3, 1, 3)

    def noise(round_: int, *lost: int) -> tuple[torch.Tensor, list[int]]:
        one, asked = Seam(config, LAYOUT, NAMES, 0), job(rows(0), round_, ids=ids)
        came = [row for row in range(4) if row not in lost]
        told = tuple(r._replace(failure="gone" if row in lost else "") for row, r in enumerate(reports(ids)))
        got = one.receive(asked, rows(0)[came], told)
        return got.values_SP - rows(0)[came], one.state().facts["uploads"]

    first_SP, uploads = noise(1)
    assert uploads == [0, 2, 0, 2]
    for row, other in ((0, 1), (0, 2), (1, 3)):
        assert not torch.isclose(first_SP[row], first_SP[other]).any()
    assert not torch.isclose(first_SP, noise(2)[0]).any()
    fewer_SP, uploads = noise(1, 0)
    assert torch.equal(fewer_SP, first_SP[1:])
    assert uploads == [0, 1, 0, 2]


def test_who_failed_gave_nothing_away_and_who_was_rejected_did() -> None:
    one = Seam(ExchangeConfig(privacy=PrivacyConfig(enabled=True)), LAYOUT, NAMES, 0)
    failed = list(reports())
    failed[0] = failed[0]._replace(failure="gone")
    trained = rows(1, 3)
    trained[2, 0] = math.nan
    got = one.receive(job(rows(0)), trained, tuple(failed))
    assert got.ids == (1, 2)
    assert trained[2].isnan().all(), "what cannot be clipped does not cross"
    assert one.state().facts["uploads"] == [0, 1, 1, 1]


def test_both_factors_are_advised_against() -> None:
    assert "quadratic" in advice(LAYOUT, GROUPS, GROUPS)
    assert advice(LAYOUT, GROUPS, {"lora_b"}) == advice(LAYOUT, {"lora_b"}, GROUPS) == ""


def test_a_missing_accountant_is_a_friendly_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opacus"):
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SetupError, match=r'pip install "fedmira\[privacy\]"'):
        Seam(ExchangeConfig(privacy=PrivacyConfig(enabled=True)), LAYOUT, NAMES, 0)
