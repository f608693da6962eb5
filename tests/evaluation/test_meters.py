"""Claims: totals and weights add exactly; each summary is the mean its docstring says; nan never hides."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.errors import DataError
from fedmira.evaluation.meters import (
    ClientRecord,
    Mean,
    Scores,
    mean,
    perplexity,
    relative_changes,
    scores,
    scores_by_task,
    share_harmed,
    summarise,
    worst_tenth,
)

counts = st.integers(0, 10_000)


def record(name: str, loss: float, tokens: int = 10, task: str = "t", **more: float) -> ClientRecord:
    return ClientRecord(name=name, task=task, loss_sum=loss * tokens, tokens=tokens, **more)


@given(st.lists(st.tuples(counts, counts), max_size=8), st.integers(0, 8))
def test_means_add_in_any_grouping(parts: list[tuple[int, int]], cut: int) -> None:
    means = [Mean(total, weight) for total, weight in parts]
    grouped = sum(means[:cut], Mean()) + sum(means[cut:], Mean())
    assert grouped == sum(means, Mean())
    assert grouped == Mean(sum(total for total, _ in parts), sum(weight for _, weight in parts))


def test_a_mean_of_nothing_is_none_and_negative_weights_are_refused() -> None:
    assert Mean().value is None
    assert Mean(0.0, 4.0).value == 0.0
    with pytest.raises(ValueError, match="count"):
        Mean(1.0, -1.0)
    with pytest.raises(ValueError, match="count"):
        Mean(1.0, math.nan)


def test_a_pooled_mean_is_not_the_average_of_averages() -> None:
    pooled = Mean(10.0, 1.0) + Mean(10.0, 9.0)
    assert pooled.value == 2.0
    assert pooled.value != (10.0 / 1.0 + 10.0 / 9.0) / 2


def test_mean_loss_counts_clients_and_task_mean_counts_tokens_within_a_task() -> None:
    records = [record("a", 1.0, 10, "x"), record("b", 3.0, 30, "x"), record("c", 6.0, 5, "y")]
    summary = summarise(records)
    assert summary.mean_loss == pytest.approx((1.0 + 3.0 + 6.0) / 3)
    assert summary.task_mean_loss == pytest.approx(((1.0 * 10 + 3.0 * 30) / 40 + 6.0) / 2)
    assert summary.perplexity == pytest.approx(math.exp(10 / 3))
    assert summary.share_harmed is None
    assert {t: s.loss for t, s in scores_by_task(records).items()} == {"x": 2.5, "y": 6.0}


def test_without_task_labels_there_is_no_mean_over_tasks() -> None:
    unlabelled = [record("a", 1.0, 10, ""), record("b", 3.0, 30, "")]
    assert summarise(unlabelled).task_mean_loss is None
    # beside a label, those without one are a task of their own
    assert summarise([*unlabelled, record("c", 6.0, 5, "y")]).task_mean_loss == pytest.approx((2.5 + 6.0) / 2)


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3), (30, 3)])
def test_worst_tenth_rounds_the_number_of_clients_up(clients: int, worst: int) -> None:
    losses = [float(loss) for loss in range(clients)]
    assert worst_tenth(losses) == pytest.approx(sum(losses[-worst:]) / worst)
    assert worst_tenth(losses[::-1]) == worst_tenth(losses)


def test_harmed_is_more_than_one_percent_above_the_same_client_after_local_training() -> None:
    local = [record("a", 2.0), record("b", 2.0), record("c", 2.0), record("d", 1.0)]
    other = [record("d", 2.0), record("a", 2.019), record("b", 2.021), record("c", 0.5)]
    assert share_harmed(other, local) == 0.5
    assert share_harmed(local, local) == share_harmed([record("a", 101.0)], [record("a", 100.0)]) == 0.0
    assert summarise(other, local).share_harmed == 0.5
    assert relative_changes(other, local)["c"] == pytest.approx(-0.75)


def test_records_of_other_clients_are_refused() -> None:
    with pytest.raises(DataError, match=r"'b'.*same seed"):
        share_harmed([record("a", 1.0)], [record("a", 1.0), record("b", 1.0)])
    with pytest.raises(DataError, match="'a'"):
        summarise([record("a", 1.0), record("a", 2.0)])


def test_a_client_without_test_tokens_is_left_out_and_counted() -> None:
    summary = summarise([record("a", 2.0), ClientRecord("empty")], [record("a", 1.0), ClientRecord("empty")])
    assert (summary.num_clients, summary.num_judged, summary.mean_loss) == (2, 1, 2.0)
    assert summary.share_harmed == 1.0
    nothing = summarise([ClientRecord("empty")], [ClientRecord("empty")])
    assert (nothing.mean_loss, nothing.worst_tenth_loss, nothing.perplexity, nothing.share_harmed) == (None,) * 4
    assert summarise([]).task_mean_loss is None


def test_a_loss_that_is_not_finite_shows_and_harms() -> None:
    local = [record("a", 1.0), record("b", math.inf), record("c", math.nan)]
    mine = [record("a", math.nan), record("b", 1.0), record("c", math.nan)]
    summary = summarise(mine, local)
    assert math.isnan(summary.mean_loss or 0.0)
    assert math.isnan(summary.worst_tenth_loss or 0.0)
    assert relative_changes(mine, local) == {"a": math.inf, "b": -math.inf, "c": 0.0}
    assert summary.share_harmed == pytest.approx(1 / 3)
    assert relative_changes([record("a", 0.1)], [record("a", 0.0)]) == {"a": math.inf}
    assert perplexity(1e9) == math.inf


def test_answers_are_averaged_within_a_client_then_over_the_clients_that_generated() -> None:
    records = [
        record("a", 1.0, rouge_l_sum=1.0, exact_match_sum=1, generated=1),
        record("b", 1.0, rouge_l_sum=1.0, exact_match_sum=0, generated=4),
        record("c", 1.0),
    ]
    summary = summarise(records)
    assert summary.rouge_l == pytest.approx((1.0 + 0.25) / 2)
    assert summary.exact_match == pytest.approx(0.5)


@given(st.lists(st.floats(0.01, 20.0), min_size=1, max_size=25), st.randoms(use_true_random=False))
def test_the_order_of_clients_changes_nothing(losses: list[float], random: object) -> None:
    records = [ClientRecord(f"c{k}", loss_sum=loss, tokens=1) for k, loss in enumerate(losses)]
    shuffled = records.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = summarise(records), summarise(shuffled)
    assert (one.mean_loss, one.worst_tenth_loss) == (other.mean_loss, other.worst_tenth_loss)
    assert min(losses) <= (mean(losses) or 0.0) * (1 + 1e-12)
    assert (one.mean_loss or 0.0) <= (one.worst_tenth_loss or 0.0) * (1 + 1e-12)


def test_scores_of_a_task_pool_its_tokens_and_answers() -> None:
    """(2 + 6) / (1 + 3) tokens, not the mean of 2 and 2; answers alike; a task nobody answered has no Rouge-L."""
    records = [
        ClientRecord("a", "t", loss_sum=2.0, tokens=1, rouge_l_sum=1.0, exact_match_sum=1.0, generated=1),
        ClientRecord("b", "t", loss_sum=10.0, tokens=3, rouge_l_sum=0.5, exact_match_sum=0.0, generated=3),
        ClientRecord("c", "u", loss_sum=5.0, tokens=10),
    ]
    task = scores_by_task(records)
    assert list(task) == ["t", "u"]
    assert task["t"] == Scores(3.0, pytest.approx(math.exp(3.0)), 1.5 / 4, 1 / 4)
    assert task["u"] == Scores(0.5, pytest.approx(math.exp(0.5)), None, None)
    assert scores(records[:1]) == Scores(2.0, pytest.approx(math.exp(2.0)), 1.0, 1.0)
    assert scores([]) == Scores(None, None, None, None)
