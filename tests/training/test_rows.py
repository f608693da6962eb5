"""Jobs with several rows a client, of which some stay there, and jobs whose examples are pooled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.reference.tiny_models import ragged_clients, random_arena, tiny_base, tiny_layout

from fedmira.config.exchange import ExchangeConfig
from fedmira.config.training import TrainingConfig
from fedmira.data.tokenization import TokenizedClient
from fedmira.exchange.in_process import InProcess
from fedmira.training.cohort import StopRequested, train
from fedmira.types import Job, Pull, Results

BASE = tiny_base("llama", torch.float64)
LAYOUT = tiny_layout(BASE, "llama")
COUNTS = (5, 1, 6, 3)
CLIENTS: tuple[TokenizedClient, ...] = ragged_clients(COUNTS)
BOTH = frozenset({"lora_a", "lora_b"})
START_SP = random_arena(LAYOUT, len(COUNTS), torch.float64).values_KP


def job(ids: tuple[int, ...] = (0, 1, 2, 3)) -> Job:
    return Job(2, ids, START_SP[:1].repeat(len(ids), 1), BOTH, BOTH, BOTH)


def exchange(training: TrainingConfig, clients: tuple[TokenizedClient, ...] = CLIENTS) -> InProcess:
    return InProcess(BASE, LAYOUT, clients, training, dropout=0.0, total_rounds=3, seed=9, cohort_size=3)


def run(what: Job, training: TrainingConfig, clients: tuple[TokenizedClient, ...] = CLIENTS) -> Results:
    return exchange(training, clients).run(what)


STEPS = TrainingConfig(local_steps=3, batch_size=2, learning_rate=1e-2)
EPOCHS = TrainingConfig(local_epochs=2, batch_size=2, learning_rate=1e-2)


@pytest.mark.parametrize(("training", "steps"), [(STEPS, 9), (EPOCHS, 2 * 6)])
def test_pooled_rows_are_one_client_with_all_examples_and_all_steps(training: TrainingConfig, steps: int) -> None:
    """The examples of clients 0, 1 and 2 are 12: with two epochs of batches of 2 that is 12 steps."""
    pooled = run(job((0, 1, 2))._replace(pooled=True), training)
    together = replace(CLIENTS[0], name="pooled", train=tuple(e for client in CLIENTS[:3] for e in client.train))
    alone = run(job((0,)), training.model_copy(update={"local_steps": training.local_steps and 9}), (together,))
    assert torch.equal(pooled.values_SP, alone.values_SP.expand(3, -1))
    assert pooled.ids == (0, 1, 2)
    assert sum(report.num_steps for report in pooled.reports) == alone.reports[0].num_steps == steps
    for count in ("num_tokens", "num_supervised_tokens", "loss_sum"):
        assert sum(getattr(report, count) for report in pooled.reports) == getattr(alone.reports[0], count)
    assert [report.num_examples for report in pooled.reports] == list(COUNTS[:3])


def test_a_pooled_job_of_one_client_is_its_own_training_in_another_order() -> None:
    """With all its examples in every batch the order does not matter."""
    whole = TrainingConfig(local_steps=3, batch_size=8, learning_rate=1e-2)
    pooled, alone = run(job((2,))._replace(pooled=True), whole), run(job((2,)), whole)
    torch.testing.assert_close(pooled.values_SP, alone.values_SP, rtol=0, atol=1e-9)


def test_a_pooled_job_continues_after_an_interruption_bit_for_bit() -> None:
    wanted = job()._replace(pooled=True, pull=Pull(START_SP, (0.5,) * 4))
    whole = run(wanted, STEPS)
    asked = iter([False] * 4 + [True])
    settings = {"total_rounds": 3, "seed": 9, "cohort_size": 3, "dropout": 0.0}
    with pytest.raises(StopRequested) as stopped:
        train(BASE, LAYOUT, wanted, CLIENTS, STEPS, **settings, should_stop=lambda: next(asked))  # type: ignore[arg-type]
    rows_SP, reports = train(BASE, LAYOUT, wanted, CLIENTS, STEPS, **settings, progress=stopped.value.progress)  # type: ignore[arg-type]
    assert torch.equal(rows_SP, whole.values_SP)
    assert reports == whole.reports


def test_rows_that_stay_with_their_clients_cost_no_bytes() -> None:
    two = job((1, 3, 1, 3))._replace(work=0.5)
    crossing, staying = run(two, STEPS), run(two._replace(local_rows=2), STEPS)
    one = run(job((1, 3)), STEPS)
    assert torch.equal(crossing.values_SP, staying.values_SP)
    assert (staying.upload_bytes, staying.download_bytes) == (one.upload_bytes, one.download_bytes)
    assert (crossing.upload_bytes, crossing.download_bytes) == (2 * one.upload_bytes, 2 * one.download_bytes)
    assert one.upload_bytes == 2 * START_SP[0].nbytes


@pytest.mark.parametrize(("whole", "half"), [(4, 2), (5, 3), (1, 1)])
def test_a_share_of_the_work_is_the_first_steps_of_the_whole(whole: int, half: int) -> None:
    shared = run(job()._replace(work=0.5), TrainingConfig(local_steps=whole, batch_size=2, learning_rate=1e-2))
    plain = run(job(), TrainingConfig(local_steps=half, batch_size=2, learning_rate=1e-2))
    assert torch.equal(shared.values_SP, plain.values_SP)


def test_compression_touches_only_the_rows_that_cross() -> None:
    two = job((1, 3, 1, 3))._replace(work=0.5, local_rows=2)
    plain = run(two, STEPS)
    compressed = InProcess(
        BASE,
        LAYOUT,
        CLIENTS,
        STEPS,
        dropout=0.0,
        total_rounds=3,
        seed=9,
        cohort_size=3,
        exchange=ExchangeConfig(compression="int8"),
    ).run(two)
    assert torch.equal(compressed.values_SP[2:], plain.values_SP[2:])
    assert not torch.equal(compressed.values_SP[:2], plain.values_SP[:2])
    assert 0 < compressed.upload_bytes < plain.upload_bytes / 4


def test_a_client_whose_upload_is_rejected_begins_its_next_round_afresh() -> None:
    keeping = STEPS.model_copy(update={"keep_moments": True})
    strict = InProcess(
        BASE,
        LAYOUT,
        CLIENTS,
        keeping,
        dropout=0.0,
        total_rounds=3,
        seed=9,
        cohort_size=3,
        exchange=ExchangeConfig(max_norm_ratio=1.0001),
    )
    results = strict.run(job())
    returned = [not report.failure for report in results.reports]
    assert 0 < sum(returned) < 4
    steps = strict.state().tensors["moments.0.steps"].tolist()
    assert steps == [3 * there for there in returned]
