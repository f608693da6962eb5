"""Claims: the headline says who is lowest on how many seeds, calls ties ties, and claims nothing from one seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fedmira.report.reading import read
from fedmira.report.words import headline

Make = Callable[..., Path]


@pytest.fixture
def say(make_study: Make) -> Callable[[Mapping[str, list[float | None]]], str]:
    """The headline of a study whose two clients have these test losses by method and seed; None is unfinished."""

    def said(losses: Mapping[str, list[float | None]]) -> str:
        seeds = range(max(map(len, losses.values())))
        study = make_study(methods=tuple(losses), seeds=tuple(seeds), families=1, clients_per_family=2, rounds=1)
        for entry in json.loads((study / "study.json").read_text())["runs"]:
            metrics = study / entry["path"] / "metrics.jsonl"
            *others, last = metrics.read_text().splitlines()
            per_seed = losses[entry["method"]]
            if entry["seed"] < len(per_seed) and per_seed[entry["seed"]] is not None:
                final = json.loads(last)
                for client in final["clients"].values():
                    client |= {"loss_sum": per_seed[entry["seed"]] * 100, "tokens": 100}
                others.append(json.dumps(final))
            metrics.write_text("\n".join(others) + "\n")
        return " ".join(headline(read(study)))

    return said


def test_a_clear_winner(say) -> None:
    words = say({"local_only": [2.5, 2.6, 2.7], "mira": [2.0, 2.1, 2.2], "fedit": [3.0, 2.0, 3.0]})
    assert words.startswith(
        "mira has the lowest mean test loss on 2 of 3 seeds: 2.100 nats per token on average; "
        "next is local_only with 2.600."
    )
    assert "read it as a tie" not in words
    assert "mira lies 0.500 below training alone. Under mira no client is harmed" in words


def test_a_gap_within_the_spread_is_called_a_tie(say) -> None:
    words = say({"local_only": [2.5, 2.5], "mira": [2.0, 2.6]})
    assert "on 1 of 2 seeds" in words
    assert "not clear of its spread over the seeds (0.424): read it as a tie" in words
    assert "Under mira 50.0 % of the clients are harmed" in words


def test_equal_losses_tie(say) -> None:
    words = say({"local_only": [3.0, 3.0], "mira": [2.0, 2.2], "fedit": [2.2, 2.0]})
    assert words.startswith("mira and fedit tie for the lowest mean test loss: 2.100 nats per token over 2 seeds.")


def test_a_tie_on_one_seed_is_mentioned(say) -> None:
    words = say({"local_only": [3.0, 3.0], "mira": [2.0, 2.0], "fedit": [2.0, 2.5]})
    assert "mira has the lowest mean test loss on 2 of 3" not in words
    assert "mira has the lowest mean test loss on 2 of 2 seeds" in words
    assert "(tied on 1 seed)" in words


def test_training_alone_can_win(say) -> None:
    words = say({"local_only": [2.0, 2.1], "fedit": [2.5, 2.7]})
    assert words.startswith("local_only has the lowest mean test loss on 2 of 2 seeds")
    assert "harmed" not in words


def test_one_seed_claims_nothing_about_others(say) -> None:
    words = say({"local_only": [2.5], "mira": [2.0]})
    assert "seeds" not in words.split(".")[0]
    assert "This is one seed" in words


def test_only_seeds_that_all_methods_finished_are_compared(say) -> None:
    words = say({"local_only": [2.5, 2.5, 9.0], "mira": [2.0, 2.0], "fedit": [2.4, 2.4, 1.0]})
    assert words.startswith("mira has the lowest mean test loss on 2 of 2 seeds: 2.000")
    assert "not complete" in words


def test_what_is_said_of_the_winner_is_about_the_method_that_won_on_the_shared_seeds(say) -> None:
    """fedit lacks the hard seed, so the mean over all it has is the lowest; mira beats it wherever both are."""
    words = say({"local_only": [2.5, 2.5, 9.0], "mira": [2.0, 2.0, 8.0], "fedit": [2.4, 2.4]})
    assert words.startswith("mira has the lowest mean test loss on 2 of 2 seeds: 2.000")
    assert "On average mira lies 0.500 below training alone. Under mira no client is harmed" in words
    assert words.count("fedit") == 1
    assert words.endswith("The comparison is not complete: 1 of 9 runs has no test numbers.")


def test_a_loss_that_is_not_finite_is_counted_and_not_called_unfinished(say) -> None:
    words = say({"local_only": [2.5, 2.5], "mira": [2.0, 2.0], "fedit": [2.4, float("nan")]})
    assert words.startswith("mira has the lowest mean test loss on 2 of 2 seeds: 2.000")
    assert words.endswith("1 run ended with a test loss that is not finite: fedit.")
    lost = say({"local_only": [float("nan")], "mira": [float("inf")]})
    expected = "No method of this study has a finite mean test loss. "
    assert lost == expected + "2 runs ended with a test loss that is not finite: local_only, mira."
    # nothing is said of training alone where it has no loss to compare with
    assert "training alone" not in say({"local_only": [float("nan")], "mira": [2.0], "fedit": [3.0]}).split("harmed")[0]


def test_no_shared_seed_compares_nothing(say) -> None:
    words = say({"local_only": [2.5, 2.5], "mira": [None, 2.0], "fedit": [2.4]})
    assert words.startswith("No seed has been finished by all methods, so the methods cannot be compared yet.")
    assert "training alone" not in words


def test_one_method_is_not_compared(say) -> None:
    assert say({"mira": [2.0]}).startswith("mira reaches a mean test loss of 2.000")


def test_nothing_finished_yet(make_study: Make) -> None:
    words = headline(read(make_study(finished=False)))
    assert words == ["No run of this study has finished with test numbers yet."]


def test_a_run_says_where_it_ends(make_run: Make) -> None:
    words = headline(read(make_run(rounds=3)))
    assert words[0].startswith("mira ends at a mean test loss of ")
    assert "over 16 clients after 3 rounds" in words[0]
    assert "fedmira compare" in words[1]
    assert "validation loss" in headline(read(make_run(finished=False)))[0]
    assert len(headline(read(make_run(method="local_only")))) == 1
