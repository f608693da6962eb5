"""Claims: the headline says who is lowest on how many seeds, calls ties ties, and claims nothing from one seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fedmira.report.page import render
from fedmira.report.reading import read, read_run
from fedmira.report.summary import facts_of, lines_of
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


def test_only_seeds_with_a_finite_loss_of_training_alone_are_averaged(say) -> None:
    nan = float("nan")
    words = say({"local_only": [2.5, nan], "mira": [2.0, 2.0], "fedit": [3.0, 3.0]})
    assert "On the one seed on which training alone has a finite loss, mira lies 0.500 below it. Under mira" in words
    words = say({"local_only": [2.5, 2.5, nan], "mira": [2.0, 2.0, 2.0], "fedit": [3.0, 3.0, 3.0]})
    assert "On average over the 2 seeds on which training alone has a finite loss, mira lies 0.500 below it." in words


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


def test_one_is_one(make_run: Make) -> None:
    """One client, one round."""
    run = make_run(families=1, clients_per_family=1, rounds=1, true_graph=False)
    assert "over 1 client after 1 round;" in headline(read(run))[0]
    assert any(line.startswith("time") and line.endswith(" for 1 round") for line in lines_of(read_run(run)))
    assert "<summary>1 client</summary>" in render(read(run))


def with_validation(run: Path, losses: list[float], late: tuple[str, int] | None = None) -> Path:
    """Let all clients have these validation losses, a round each; `late` joined after that round, 1.0 above them."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in (event for event in events if event["event"] == "evaluation"):
        if late and event["round"] <= late[1]:
            del event["clients"][late[0]]
        for name, client in event["clients"].items():
            loss = losses[event["round"] - 1] + (late is not None and name == late[0])
            client |= {"loss_sum": None if math.isnan(loss) else loss * 100, "tokens": 100}
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if late:
        manifest = json.loads((run / "manifest.json").read_text())
        [client] = [client for client in manifest["clients"] if client["name"] == late[0]]
        client["joined_after"] = late[1]
        (run / "manifest.json").write_text(json.dumps(manifest))
    return run


ROSE = (
    "Validation loss was lowest after round 2 (1.525) and is {} after the last; "
    "fewer rounds or a lower learning rate may do better."
)


@pytest.mark.parametrize(
    ("losses", "last"),
    [
        ([2.0, 1.525, 3.832], "3.832"),
        ([2.0, 1.525, float("nan")], "nan"),
        ([2.0, 1.525, 1.6], None),
        ([2.0, 1.9, 1.525], None),
        ([float("nan")] * 3, None),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_trained_on_after_its_best_says_so(
    make_run: Make, losses: list[float], last: str | None, finished: bool
) -> None:
    run = with_validation(make_run(rounds=3, finished=finished), losses)
    sentences, lines = headline(read(run)), lines_of(read_run(run))
    if last is None:
        assert not any("fewer rounds" in sentence for sentence in (*sentences, *lines))
    else:
        assert sentences[1] == lines[-1] == ROSE.format(last)
        facts = facts_of(read_run(run))
        assert (facts["lowest_validation_round"], facts["lowest_validation_loss"]) == (2, pytest.approx(1.525))


LOG = """\
2026-11-27T21:35:52.471Z round {0}: anna was left out: her loss <b> is not finite; lower training.learning_rate
2026-11-27T21:35:52.472Z round {0}: ben: was left out: his too
2026-11-27T21:35:52.473Z round {1}: carl was left out: long ago
2026-11-27T21:35:53.000Z round {1}: train loss 6.8159
"""


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_run_that_lost_all_results_of_a_round_says_why_from_its_log(make_run: Make, rounds: int) -> None:
    run = make_run(rounds=rounds, finished=False)
    (run / "run.log").write_text(LOG.format(rounds + 1, rounds))
    sentences = headline(read(run))
    assert sentences[1] == (
        f"Round {rounds + 1} left 2 client results out and did not end. The first reason: "
        "her loss <b> is not finite; lower training.learning_rate."
    )
    section = render(read(run)).split("<h2>Left out</h2>")[1].split("</section>")[0]
    assert section.count(f"<td>{rounds + 1}</td>") == 2
    assert "her loss &lt;b&gt; is not finite" in section
    assert "long ago" not in section
    (run / "run.log").unlink()
    assert len(headline(read(run))) == 1


def test_a_client_that_joins_with_a_high_loss_is_no_rise(make_run: Make) -> None:
    """The mean before it joined was over others; what counts is what came after."""
    late = ("family0-client0", 1)

    def said(losses: list[float]) -> str:
        return " ".join(headline(read(with_validation(make_run(rounds=3, families=1), losses, late))))

    assert "lowest after" not in said([1.0, 1.0, 1.0])
    assert "lowest after round 2 (1.250) and is 2.250 after the last" in said([0.5, 1.0, 2.0])


def test_a_study_names_the_methods_that_trained_on_after_their_best_on_every_seed(make_study: Make) -> None:
    study = make_study(methods=("local_only", "fedit", "mira"), seeds=(0, 1), rounds=2)
    assert "clearly above" not in " ".join(headline(read(study)))
    for entry in json.loads((study / "study.json").read_text())["runs"]:
        if entry["method"] == "fedit" or (entry["method"], entry["seed"]) == ("mira", 0):
            with_validation(study / entry["path"], [1.0, 2.0])
    assert "Under fedit the validation loss ends clearly above its lowest; fewer rounds" in " ".join(
        headline(read(study))
    )
