"""Questions asked together come apart again, with the answers and what they were compared with."""

from __future__ import annotations

import pytest
import torch

from fedmira.federation.questions import apart, together
from fedmira.types import Losses, Trial


def question(num_candidates: int, versus: tuple[int, ...] = (), sent: int = 1) -> Trial:
    return Trial((0, 3), num_candidates, lambda number: torch.full((2, 1), float(number)), sent, versus=versus)


@pytest.mark.parametrize(("versus", "both"), [((), ()), ((0,), (2,)), ((2,), (4,)), ((0, 2), (2, 4))])
def test_each_part_keeps_its_answers_and_what_they_are_compared_with(
    versus: tuple[int, ...], both: tuple[int, ...]
) -> None:
    trial = together(question(2), question(3, versus, sent=0))
    assert trial is not None
    assert (trial.num_candidates, trial.sent, trial.versus) == (5, 1, both)
    assert [float(trial.candidate(number)[0, 0]) for number in range(5)] == [0, 1, 0, 1, 2]
    mean_SQ = torch.arange(10, dtype=torch.float64).reshape(2, 5)
    losses = Losses(mean_SQ, (4, 4), 0, 0, scatter_SQ=-mean_SQ if both else None)
    (first, of_first), (rest, of_rest) = apart(trial, losses)
    assert first is not None
    assert rest is not None
    assert (first.num_candidates, first.versus) == (2, ())
    assert (rest.num_candidates, rest.versus) == (3, versus)
    assert [float(rest.candidate(number)[0, 0]) for number in range(3)] == [0, 1, 2]
    assert torch.equal(of_first.mean_SQ, mean_SQ[:, :2])
    assert torch.equal(of_rest.mean_SQ, mean_SQ[:, 2:])
    if not both:
        assert of_rest.scatter_SQ is None
    else:
        assert of_rest.scatter_SQ is not None
        assert torch.equal(of_rest.scatter_SQ, -mean_SQ[:, 2:])


def test_three_questions_come_apart_one_after_the_other() -> None:
    trial = together(question(1), together(question(2), question(3, versus=(0,))))
    assert trial is not None
    assert trial.versus == (3,)
    answers = Losses(torch.zeros(2, 6), (4, 4), 0, 0, scatter_SQ=torch.arange(6.0).repeat(2, 1))
    (_, _), (rest, losses) = apart(trial, answers)
    assert rest is not None
    (second, _), (third, of_third) = apart(rest, losses)
    assert of_third.scatter_SQ is not None
    assert of_third.scatter_SQ[0].tolist() == [3.0, 4.0, 5.0]
    assert second is not None
    assert third is not None
    assert (second.num_candidates, second.versus, third.num_candidates, third.versus) == (2, (), 3, (0,))


def test_two_questions_may_compare_each_with_its_own() -> None:
    trial = together(question(2, versus=(0,)), question(3, versus=(0,)))
    assert trial is not None
    assert trial.versus == (0, 2)
    (first, _), (rest, _) = apart(trial, Losses(torch.zeros(2, 5), (4, 4), 0, 0))
    assert first is not None
    assert rest is not None
    assert (first.versus, rest.versus) == ((0,), (0,))


def test_questions_that_cannot_be_asked_together_are_refused() -> None:
    with pytest.raises(ValueError, match="other clients"):
        together(question(1), question(1)._replace(ids=(0, 1)))
    with pytest.raises(ValueError, match="asked after all others"):
        together(question(1, versus=(0,)), question(1))
    with pytest.raises(ValueError, match="asked after all others"):
        together(question(2, versus=(0,)), question(3, versus=(1,)))


def test_one_question_alone_is_itself() -> None:
    trial = together(None, question(3, versus=(0,)))
    assert trial is not None
    (first, _), (rest, _) = apart(trial, Losses(torch.zeros(2, 3), (4, 4), 0, 0))
    assert first is None
    assert rest is not None
    assert (rest.num_candidates, rest.versus) == (3, (0,))
    alone = together(question(2), None)
    assert alone is not None
    (first, _), (rest, _) = apart(alone, Losses(torch.zeros(2, 2), (4, 4), 0, 0))
    assert first is not None
    assert (first.num_candidates, rest) == (2, None)


@pytest.mark.parametrize(("first", "rest", "both"), [(4, 2, 4), (None, 2, None), (4, None, None), (None, None, None)])
def test_together_they_go_to_the_examples_of_the_one_that_wants_more(
    first: int | None, rest: int | None, both: int | None
) -> None:
    one, other = question(1)._replace(most_examples=first), question(2)._replace(most_examples=rest)
    assert together(one, other).most_examples == both  # type: ignore[union-attr]
    # what the server compares by itself asks nobody about examples
    by_itself = question(0)._replace(compare_SP=torch.zeros(2, 1))
    assert together(by_itself, other).most_examples == rest  # type: ignore[union-attr]
