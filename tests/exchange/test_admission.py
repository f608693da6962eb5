"""Claims: every kind of damaged upload is rejected by name with the reason, and the sound ones are untouched by it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exchange.builders import GROUPS, LAYOUT, NAMES, rows
from tests.federation.builders import CONFIGS, clients, initial, layout, trained

from fedmira.exchange.admission import Admitted, admit, sound
from fedmira.federation.registry import build_method
from fedmira.types import Participants

START = rows(0)
Upload = dict[str, Any]


def uploads(groups: frozenset[str] = GROUPS) -> list[Upload]:
    values_SP = START + 0.1 * rows(1)
    return [
        {s.name: row[s.offset : s.offset + s.size].view(s.shape).clone() for s in LAYOUT.specs if s.group in groups}
        for row in values_SP
    ]


def judged(sent: list[Any], groups: frozenset[str] = GROUPS, ratio: float | None = 100.0) -> Admitted:
    return admit(LAYOUT, groups, sent, NAMES, START, ratio)


def changed(**tensors: Any) -> Callable[[Upload], Any]:
    return lambda upload: {**upload, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def poisoned(value: float) -> Callable[[Upload], Any]:
    def poison(upload: Upload) -> Upload:
        upload["b.lora_b"][3, 1] = value
        return upload

    return poison


class Refusing(torch.Tensor):
    """Anything that is asked of it raises."""

    @classmethod
    def __torch_function__(cls, *arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no")


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(5), torch.ones(5)])


DAMAGE: dict[str, tuple[Callable[[Upload], Any], str]] = {
    "no names": (lambda upload: list(upload.values()), "named tensors were expected, given list"),
    "nothing": (lambda upload: None, "given NoneType"),
    "empty": (lambda upload: {}, "it lacks a.lora_a, a.lora_b, b.lora_a and 1 more"),
    "a missing tensor": (lambda upload: {k: v for k, v in upload.items() if k != "b.lora_a"}, "it lacks b.lora_a"),
    "a strange name": (
        changed(a__lora_aa=torch.zeros(2, 5)),
        "a.lora_aa, which nobody asked for; did you mean 'a.lora",
    ),
    "a name that is no text": (lambda upload: {**upload, 7: torch.zeros(1)}, "it holds 7, which nobody asked for"),
    "no tensor": (changed(a__lora_a=[[0.0] * 5] * 2), "a.lora_a is no tensor but list"),
    "another rank": (changed(a__lora_a=torch.zeros(3, 5)), "shape (3, 5), expected (2, 5): rank 3 instead of 2"),
    "another rank of B": (changed(b__lora_b=torch.zeros(6, 4)), "shape (6, 4), expected (6, 2): rank 4 instead of 2"),
    "transposed": (changed(a__lora_a=torch.zeros(5, 2)), "shape (5, 2), expected (2, 5)"),
    "flat": (changed(a__lora_a=torch.zeros(10)), "shape (10,), expected (2, 5)"),
    "another dtype": (changed(a__lora_a=torch.zeros(2, 5).double()), "dtype torch.float64, expected torch.float32"),
    "whole numbers": (changed(a__lora_a=torch.zeros(2, 5).long()), "dtype torch.int64"),
    "sparse": (changed(a__lora_a=torch.zeros(2, 5).to_sparse()), "a.lora_a holds no dense numbers"),
    "nested": (changed(a__lora_a=nested()), "a.lora_a holds no dense numbers"),
    "a tensor that refuses": (changed(a__lora_a=torch.zeros(2, 5).as_subclass(Refusing)), "is no tensor but Refusing"),
    "on no device": (changed(a__lora_a=torch.zeros(2, 5, device="meta")), "a.lora_a holds no dense numbers"),
    "nan": (poisoned(math.nan), "values that are not finite in b.lora_b"),
    "inf": (poisoned(-math.inf), "values that are not finite in b.lora_b"),
    "an impossible norm": (poisoned(1e6), "times the median"),
    "a norm beyond float32": (poisoned(3e38), "its norm 3e+38 is too large to compute with, allowed is 1e+16"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_upload_is_rejected_by_name_and_the_others_are_admitted(kind: str) -> None:
    damage, reason = DAMAGE[kind]
    healthy, sent = judged(uploads()), uploads()
    sent[2] = damage(sent[2])
    found = judged(sent)
    assert found.accepted == (0, 1, 3)
    assert list(found.rejected) == [2]
    assert found.rejected[2].startswith("the upload of client cleo was rejected: ")
    assert reason in found.rejected[2]
    assert torch.equal(found.values_SP, healthy.values_SP[[0, 1, 3]])


def test_sound_uploads_are_the_rows_they_were() -> None:
    found = judged(uploads())
    assert (found.accepted, found.rejected) == ((0, 1, 2, 3), {})
    assert torch.equal(found.values_SP, START + 0.1 * rows(1))


def test_only_the_groups_asked_for_are_expected_and_the_rest_stays_as_it_started() -> None:
    only_b = frozenset({"lora_b"})
    found = judged(uploads(only_b), only_b)
    assert found.rejected == {}
    assert torch.equal(found.values_SP[:, :10], START[:, :10])
    assert torch.equal(found.values_SP[:, 10:18], (START + 0.1 * rows(1))[:, 10:18])
    assert "a.lora_a, b.lora_a, which nobody asked for" in judged(uploads(), only_b).rejected[0]


def test_all_can_be_rejected_each_for_its_own_reason() -> None:
    sent: list[Any] = [damage(upload) for (damage, _), upload in zip(list(DAMAGE.values())[:4], uploads(), strict=True)]
    found = judged(sent)
    assert list(found.rejected) == [0, 1, 2, 3]
    assert found.values_SP.shape == (0, LAYOUT.num_parameters)
    for (_, reason), told in zip(list(DAMAGE.values())[:4], found.rejected.values(), strict=True):
        assert reason in told


def updates(*norms: float) -> torch.Tensor:
    values_SP = torch.zeros(len(norms), LAYOUT.num_parameters)
    values_SP[:, 7] = torch.tensor(norms)
    return values_SP


@pytest.mark.parametrize(
    ("norms", "ratio", "rejected"),
    [
        ((1.0, 1.0, 99.0), 100.0, []),
        ((1.0, 1.0, 100.0), 100.0, []),
        ((1.0, 1.0, 101.0), 100.0, [2]),
        ((1.0, 1.0, 101.0), None, []),
        # two clients cannot say which of them is wrong
        ((1.0, 1e6), 100.0, []),
        ((1.0, 3.0), 1.2, []),
        # most did not move at all: no scale to compare with
        ((0.0, 0.0, 1.0), 100.0, []),
        ((1.0, math.nan, 2.0, 900.0), 100.0, [1, 3]),
        # too large to compute with, whatever the others are
        ((1.0, 3e19), 100.0, [1]),
        ((1.0, 3e19), None, [1]),
        ((3e19,), None, [0]),
        ((1.0, 3e19, 3e19, 1.0, 101.0), 100.0, [1, 2, 4]),
    ],
)
def test_the_norm_is_compared_with_the_median_of_the_finite(
    norms: tuple[float, ...], ratio: float | None, rejected: list[int]
) -> None:
    values_SP = updates(*norms)
    start_SP = torch.zeros_like(values_SP)
    found = sound(LAYOUT, GROUPS, values_SP, (*NAMES, "emil")[: len(norms)], start_SP, ratio)
    assert list(found.rejected) == rejected


def test_a_start_that_is_too_large_to_compute_with_is_no_excuse() -> None:
    start_SP = updates(1.0, 3e19)
    found = sound(LAYOUT, GROUPS, start_SP + 0.1, NAMES[:2], start_SP, None)
    assert list(found.rejected) == [1]


@pytest.mark.parametrize("size", [1e15, 3e19])
@pytest.mark.parametrize("name", ["fedadam", "fedex_lora", "flora", "florist", "mira-gram-least_squares"])
def test_what_is_admitted_leaves_nothing_in_a_state_that_is_not_finite(name: str, size: float) -> None:
    # the products are scaled as with alpha = 64 at rank 1
    who, of = clients(2), layout(scaling=64.0)
    method = build_method(CONFIGS[name], who)
    state = method.init(initial(2, of=of), who)
    for round_ in range(1, 4):
        job = method.plan(state, Participants(round_, (0, 1)))
        results = trained(job, who.names)
        if round_ == 1:
            results.values_SP[0, results.values_SP[0] != job.start_SP[0]] = size
        admitted = sound(of, job.upload, results.values_SP, who.names, job.start_SP, None)
        assert admitted.accepted == ((0, 1) if round_ > 1 or size < 1e16 else (1,))
        came = results._replace(ids=admitted.accepted, values_SP=admitted.values_SP)
        state, _ = method.merge(state, Participants(round_, (0, 1)), came)
        kept = (state.adapters.values_KP, *state.memory.values())
        assert all(torch.isfinite(tensor).all() for tensor in kept)


def test_tensors_that_do_not_cross_have_no_norm() -> None:
    values_SP = updates(1.0, 1.0, 1e26)
    assert sound(LAYOUT, {"lora_b"}, values_SP, NAMES[:3], torch.zeros_like(values_SP), 2.0).rejected == {}


def test_tensors_that_do_not_cross_must_be_finite_too() -> None:
    values_SP = updates(1.0, math.nan, 1.0)
    assert list(sound(LAYOUT, {"lora_b"}, values_SP, NAMES[:3], torch.zeros_like(values_SP), 2.0).rejected) == [1]


def test_of_rows_that_stay_with_their_clients_nobody_knows_the_norm() -> None:
    values_SP = updates(1.0, 1.0, 1.0, 1e6)
    start_SP = torch.zeros_like(values_SP)
    assert list(sound(LAYOUT, GROUPS, values_SP, NAMES[:4], start_SP, 2.0).rejected) == [3]
    assert sound(LAYOUT, GROUPS, values_SP, NAMES[:4], start_SP, 2.0, num_crossing=3).rejected == {}
    values_SP[3, 7] = math.nan
    assert list(sound(LAYOUT, GROUPS, values_SP, NAMES[:4], start_SP, 2.0, num_crossing=3).rejected) == [3]
