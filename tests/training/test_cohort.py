"""What a client gets from training depends on itself alone: not on its cohort, an interruption or another's failure."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tests.reference.tiny_models import client_of, ragged_clients, random_arena, tiny_base, tiny_layout

from fedmira.config.run import AdapterConfig
from fedmira.config.training import TrainingConfig
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.errors import IntegrityError
from fedmira.model import fused, low_rank
from fedmira.model.arena import lora_layout
from fedmira.model.base import BaseModel
from fedmira.training import cohort
from fedmira.training.cohort import Progress, StopRequested, train
from fedmira.types import ClientReport, Job, Layout

BOTH = frozenset({"lora_a", "lora_b"})
TRAINING = TrainingConfig(
    local_epochs=2, batch_size=2, learning_rate=1e-2, weight_decay=0.1, schedule="cosine", warmup_rounds=0.5
)
COUNTS = (5, 1, 7, 3, 4, 2, 6, 3)
"""Training examples of eight clients: up to eight steps for one, two for another."""
Outcome = tuple[torch.Tensor, tuple[ClientReport, ...]]


class Setup:
    """A federation of eight ragged clients on a tiny base."""

    def __init__(self, dtype: torch.dtype = torch.float64, family: str = "llama") -> None:
        self.base: BaseModel = tiny_base(family, dtype)
        self.layout: Layout = tiny_layout(self.base, family)
        self.clients: tuple[TokenizedClient, ...] = ragged_clients(COUNTS)
        self.start_SP = random_arena(self.layout, len(COUNTS), dtype).values_KP

    def job(self, ids: tuple[int, ...] = tuple(range(len(COUNTS))), trainable: frozenset[str] = BOTH) -> Job:
        return Job(2, ids, self.start_SP[list(ids)], BOTH, trainable, BOTH)

    def train(
        self,
        job: Job,
        cohort_size: int,
        *,
        training: TrainingConfig = TRAINING,
        dropout: float = 0.0,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Outcome:
        return train(
            self.base,
            self.layout,
            job,
            self.clients,
            training,
            total_rounds=3,
            seed=9,
            cohort_size=cohort_size,
            dropout=dropout,
            progress=progress,
            should_stop=should_stop,
            on_step=on_step,
        )


def at_question(number: int) -> Callable[[], bool]:
    """Says yes when it is asked for that time."""
    asked = itertools.count(1)
    return lambda: next(asked) == number


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cohorts_of_one_three_and_eight_agree(dropout: float) -> None:
    setup = Setup()
    job = setup.job()
    alone_SP, alone = setup.train(job, 1, dropout=dropout)
    assert float((alone_SP - setup.start_SP).abs().max(dim=1).values.min()) > 1e-3
    for size in (3, 8):
        rows_SP, reports = setup.train(job, size, dropout=dropout)
        torch.testing.assert_close(rows_SP, alone_SP, rtol=0, atol=1e-9)
        assert [report._replace(loss_sum=0) for report in reports] == [report._replace(loss_sum=0) for report in alone]
        assert [report.loss_sum for report in reports] == pytest.approx([report.loss_sum for report in alone], abs=1e-9)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_one_cohort_size_gives_the_same_bits_again(size: int) -> None:
    setup = Setup(torch.float32)
    rows_SP, reports = setup.train(setup.job(), size)
    again_SP, again = Setup(torch.float32).train(setup.job(), size)
    assert torch.equal(rows_SP, again_SP)
    assert reports == again


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_halves_of_a_cohort_in_threads_of_their_own_agree_with_one_thread(family: str) -> None:
    setup = Setup(family=family)
    torch.set_num_threads(1)
    whole_SP, whole = setup.train(setup.job(), 8)
    torch.set_num_threads(2)
    in_threads, here = set(), threading.get_ident()
    both_there = threading.Barrier(2, timeout=30)
    forward = fused.hidden

    def seen(*arguments: Any) -> torch.Tensor:
        if threading.get_ident() not in {here, *in_threads}:
            in_threads.add(threading.get_ident())
            # without it one thread may be done with its half before the other begins, and take that one too
            both_there.wait()
        return forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "hidden", seen)
        rows_SP, reports = setup.train(setup.job(), 8)
    assert len(in_threads) == 2
    torch.testing.assert_close(rows_SP, whole_SP, rtol=0, atol=1e-9)
    assert [report._replace(loss_sum=0) for report in reports] == [report._replace(loss_sum=0) for report in whole]
    again_SP, again = setup.train(setup.job(), 8)
    assert torch.equal(again_SP, rows_SP)
    assert again == reports


@pytest.mark.usefixtures("two_threads")
def test_halves_are_interrupted_and_fail_as_a_whole_does() -> None:
    setup = Setup(torch.float32)
    expected_SP, expected = setup.train(setup.job(), 8)
    with pytest.raises(StopRequested) as caught:
        setup.train(setup.job(), 8, should_stop=at_question(3))
    rows_SP, reports = setup.train(setup.job(), 8, progress=caught.value.progress)
    assert torch.equal(rows_SP, expected_SP)
    assert reports == expected
    healthy_SP, _ = setup.train(setup.job(ids=(0, 1, 2, 4, 5, 6, 7)), 8)
    setup.start_SP[3, 17] = float("nan")
    rows_SP, reports = setup.train(setup.job(), 8)
    assert [report.id for report in reports if report.failure] == [3]
    assert torch.equal(rows_SP, healthy_SP)


def test_cohorts_agree_in_float32_within_its_rounding() -> None:
    setup = Setup(torch.float32)
    plain = TrainingConfig(local_steps=3, batch_size=2, optimizer="sgd", learning_rate=0.1)
    alone_SP, _ = setup.train(setup.job(), 1, training=plain)
    rows_SP, _ = setup.train(setup.job(), 8, training=plain)
    assert float((alone_SP - setup.start_SP).abs().max()) > 1e-2
    torch.testing.assert_close(rows_SP, alone_SP, rtol=0, atol=1e-5)


def test_dropout_changes_the_result_and_is_drawn_anew_in_every_round() -> None:
    setup = Setup()
    without_SP, _ = setup.train(setup.job(), 8)
    once_SP, _ = setup.train(setup.job(), 8, dropout=0.3)
    again_SP, _ = setup.train(setup.job(), 8, dropout=0.3)
    next_round_SP, _ = setup.train(setup.job()._replace(round=3), 8, dropout=0.3)
    assert torch.equal(once_SP, again_SP)
    assert not torch.equal(once_SP, without_SP)
    assert not torch.equal(once_SP, next_round_SP)


def test_dropout_is_drawn_anew_for_every_client_step_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str | int, ...]] = []
    original = cohort.torch_generator

    def spy(seed: int, *purpose: str | int) -> torch.Generator:
        drawn.append(purpose)
        return original(seed, *purpose)

    monkeypatch.setattr(cohort, "torch_generator", spy)
    setup = Setup()
    _, reports = setup.train(setup.job(), 8, dropout=0.3)
    num_masks = sum(report.num_steps for report in reports) * len(setup.layout.layers)
    assert len(set(drawn)) == len(drawn) == num_masks


def test_examples_that_begin_alike_share_rows_and_no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []
    original = cohort.pack

    def spy(*arguments: Any, **named: Any) -> Any:
        batch = original(*arguments, **named)
        shared.extend(prefix.length for prefix in batch.prefixes)
        return batch

    monkeypatch.setattr(cohort, "pack", spy)
    setup = Setup()
    alike = (np.array([*range(3, 15), last, 2], dtype=np.int32) for last in (20, 21))
    setup.clients = (client_of("alike", tuple(TokenizedExample(tokens, 12, "e") for tokens in alike)),)
    once = TrainingConfig(local_steps=1, batch_size=2)
    setup.train(setup.job(ids=(0,)), 1, training=once)
    setup.train(setup.job(ids=(0,)), 1, training=once, dropout=0.3)
    assert shared == [0, 11, 0, 0]


def test_another_data_seed_is_another_order_of_the_examples_and_nothing_else() -> None:
    setup = Setup()
    of_run_SP, _ = setup.train(setup.job(), 8, dropout=0.3)
    same_SP, _ = setup.train(setup.job(), 8, dropout=0.3, training=TRAINING.model_copy(update={"data_seed": 9}))
    assert torch.equal(same_SP, of_run_SP)
    shuffled = TRAINING.model_copy(update={"data_seed": 10})
    other_SP, _ = setup.train(setup.job(), 8, dropout=0.3, training=shuffled)
    close = [torch.allclose(*rows, rtol=0, atol=1e-9) for rows in zip(other_SP, of_run_SP, strict=True)]
    # one example has no order; of two, dropout falls on either
    assert close == [n == 1 for n in COUNTS]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_client_trains_the_same_in_any_company(dropout: float) -> None:
    setup = Setup()
    everyone_SP, _ = setup.train(setup.job(), 8, dropout=dropout)
    few_SP, _ = setup.train(setup.job(ids=(4, 6)), 8, dropout=dropout)
    torch.testing.assert_close(few_SP, everyone_SP[[4, 6]], rtol=0, atol=1e-9)


def test_an_interruption_before_any_step_changes_no_bit() -> None:
    setup = Setup(torch.float32)
    job = setup.job()
    expected_SP, expected = setup.train(job, 3, dropout=0.2)
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    setup.train(job, 3, should_stop=count)
    assert asked == 8 + 4 + 6  # the longest client of each cohort of three decides
    for stop_at in range(1, asked + 1):
        with pytest.raises(StopRequested) as caught:
            setup.train(job, 3, dropout=0.2, should_stop=at_question(stop_at))
        stored = caught.value.progress
        restored = Progress(load(save(stored.tensors)), json.loads(json.dumps(stored.facts)))
        # a resumed run may be offered another cohort size: the progress knows the right one
        rows_SP, reports = setup.train(job, 8, dropout=0.2, progress=restored)
        assert torch.equal(rows_SP, expected_SP)
        assert reports == expected


def test_progress_can_be_used_twice() -> None:
    setup = Setup()
    with pytest.raises(StopRequested) as caught:
        setup.train(setup.job(), 8, should_stop=at_question(4))
    progress = caught.value.progress
    first_SP, _ = setup.train(setup.job(), 8, progress=progress)
    second_SP, _ = setup.train(setup.job(), 8, progress=progress)
    assert torch.equal(first_SP, second_SP)


def test_progress_of_another_round_is_refused() -> None:
    setup = Setup()
    with pytest.raises(StopRequested) as caught:
        setup.train(setup.job(), 8, should_stop=lambda: True)
    with pytest.raises(IntegrityError, match="round 2"):
        setup.train(setup.job()._replace(round=3), 8, progress=caught.value.progress)
    with pytest.raises(IntegrityError, match="participants"):
        setup.train(setup.job(ids=(0, 1)), 8, progress=caught.value.progress)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_client_that_is_not_finite_is_named_and_touches_nobody(poison: float) -> None:
    setup = Setup(torch.float32)
    healthy_ids = tuple(k for k in range(8) if k != 3)
    expected_SP, expected = setup.train(setup.job(ids=healthy_ids), 8)
    setup.start_SP[3, 17] = poison
    rows_SP, reports = setup.train(setup.job(), 8)
    assert torch.equal(rows_SP, expected_SP)
    assert tuple(report for report in reports if report.id != 3) == expected
    failed = reports[3]
    assert failed.num_steps == 0
    assert "client-3 is not finite in round 2, step 1" in failed.failure
    assert "example-103-" in failed.failure
    assert torch.isfinite(rows_SP).all()


def test_on_a_path_that_spreads_trouble_only_the_culprit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # a GPU masks products, and 0 * nan is nan: the step is done again with every client apart
    monkeypatch.setattr(low_rank, "_way", lambda branch, rows, x_NI: rows.way or "masked")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    setup = Setup()
    healthy_ids = tuple(k for k in range(8) if k != 3)
    expected_SP, _ = setup.train(setup.job(ids=healthy_ids), 8)
    setup.start_SP[3] = float("nan")
    tried: list[bool] = []
    attempt = cohort._try_step

    def spy(*arguments: Any, isolate: bool = False) -> Any:
        tried.append(isolate)
        return attempt(*arguments, isolate=isolate)

    monkeypatch.setattr(cohort, "_try_step", spy)
    rows_SP, reports = setup.train(setup.job(), 8)
    assert [report.id for report in reports if report.failure] == [3]
    torch.testing.assert_close(rows_SP, expected_SP, rtol=0, atol=1e-9)
    assert tried[:2] == [False, True]
    assert not any(tried[2:]), "only the step in which it failed is done again"


def test_a_client_that_fails_later_leaves_the_others_where_they_were() -> None:
    setup = Setup()
    setup.base = replace(setup.base, body=None)
    expected_SP, _ = setup.train(setup.job(), 8)
    base, broken = setup.base, 5
    hidden = type(base).hidden
    steps = 0

    class Overflowing:
        """A base whose activations overflow for one client from the second step on."""

        def __getattr__(self, name: str) -> object:
            return getattr(base, name)

        def hidden(self, batch: object, soften: object = None) -> torch.Tensor:
            nonlocal steps
            steps += 1
            hidden_ND = hidden(base, batch)  # type: ignore[arg-type]
            if steps == 1 or not batch.rows_per_client[broken]:  # type: ignore[attr-defined]
                return hidden_ND
            start = sum(batch.rows_per_client[:broken])  # type: ignore[attr-defined]
            factor_N1 = torch.ones(len(hidden_ND), 1, dtype=hidden_ND.dtype)
            factor_N1[start : start + batch.rows_per_client[broken]] = float("inf")  # type: ignore[attr-defined]
            return hidden_ND * factor_N1

    setup.base = Overflowing()  # type: ignore[assignment]
    done: list[tuple[int, int]] = []
    rows_SP, reports = setup.train(setup.job(), 8, on_step=lambda *counts: done.append(counts))
    others = [k for k in range(8) if k != broken]
    torch.testing.assert_close(rows_SP, expected_SP[others], rtol=0, atol=1e-9)
    assert reports[broken].num_steps == 1
    assert "step 2" in reports[broken].failure
    assert done[-1][0] == done[-1][1], "the steps a failed client will never make count as done"


def test_a_job_in_which_everybody_fails_returns_no_rows() -> None:
    setup = Setup()
    setup.start_SP[:] = float("nan")
    rows_SP, reports = setup.train(setup.job(), 3)
    assert rows_SP.shape == (0, setup.layout.num_parameters)
    assert all(report.failure for report in reports)


def test_a_frozen_group_keeps_its_bits_under_weight_decay() -> None:
    setup = Setup(torch.float32)
    for optimizer in ("adamw", "adam", "sgd"):
        training = TrainingConfig(local_steps=2, optimizer=optimizer, weight_decay=0.5, learning_rate=0.05)
        rows_SP, _ = setup.train(setup.job(trainable=frozenset({"lora_b"})), 8, training=training)
        for columns in setup.layout.slices("lora_a"):
            assert torch.equal(rows_SP[:, columns], setup.start_SP[:, columns])
        assert any(not torch.equal(rows_SP[:, c], setup.start_SP[:, c]) for c in setup.layout.slices("lora_b"))


def test_reports_count_what_was_trained_on() -> None:
    setup = Setup()
    _, reports = setup.train(setup.job(), 8)
    for count, client, report in zip(COUNTS, setup.clients, reports, strict=True):
        assert report.num_examples == count
        assert report.num_steps == 2 * -(-count // 2)
        assert report.num_tokens == 2 * sum(len(example.tokens) - 1 for example in client.train)
        assert report.num_supervised_tokens == 2 * sum(len(e.tokens) - e.prompt_length for e in client.train)


def test_on_step_counts_client_steps() -> None:
    setup = Setup()
    seen: list[tuple[int, int]] = []
    _, reports = setup.train(setup.job(), 3, on_step=lambda *counts: seen.append(counts))
    total = sum(report.num_steps for report in reports)
    assert seen[0] == (3, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_every_linear_layer_can_be_trained() -> None:
    setup = Setup(family="gpt2")
    setup.layout = lora_layout(setup.base, AdapterConfig(rank=2))
    setup.start_SP = random_arena(setup.layout, len(COUNTS)).values_KP
    rows_SP, _ = setup.train(setup.job(), 8)
    for spec in setup.layout.specs:
        moved = (
            rows_SP[:, spec.offset : spec.offset + spec.size]
            != setup.start_SP[:, spec.offset : spec.offset + spec.size]
        )
        assert moved.any(dim=1).all(), spec.name
