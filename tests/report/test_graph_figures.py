"""What a report says about a graph: what it reveals, its pieces and stability, its blocks, its course over rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.errors import IntegrityError
from fedmira.report.graph_charts import MAXIMUM_NAMES
from fedmira.report.page import render
from fedmira.report.reading import read

Make = Callable[..., Path]


def changed(run: Path, numbers: dict[str, list[float]], **graph: Any) -> Path:
    """Put `numbers` by round into the metrics and `graph` into graph.json."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "round":
            event["numbers"] |= {
                name: by_round[event["round"] - 1]
                for name, by_round in numbers.items()
                if len(by_round) >= event["round"]
            }
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    content = json.loads((run / "graph.json").read_text())
    (run / "graph.json").write_text(json.dumps({**content, **graph}))
    return run


def test_a_graph_says_what_it_reveals_and_how_stable_it_is(make_run: Make) -> None:
    numbers = {"components": [4.0] * 8, "alone": [1.0] * 8, "lambda_2": [0.5] * 8, "lambda_max": [4.0] * 8}
    provenance = {"privacy": "Every client tells the server its task label <b>."}
    stable = changed(make_run(), {**numbers, "stability_margin": [2.5] * 8}, provenance=provenance)
    page = render(read(stable))
    assert "warm-up" not in page
    assert "What it reveals: every client tells the server its task label &lt;b&gt;." in page
    assert "4 connected components, 1 of them single clients. Laplacian eigenvalues from 0.5" in page
    assert "an explicit step would bear 2.5 times this strength" in page
    diverging = changed(make_run(), {**numbers, "stability_margin": [0.4] * 8})
    assert "an explicit step would diverge at this strength" in render(read(diverging))


def test_blocks_have_pictures_of_their_own(make_run: Make) -> None:
    run = make_run(families=2, clients_per_family=2)
    matrix = json.loads((run / "graph.json").read_text())["adjacency"]
    page = render(read(changed(run, {}, blocks={"model.layers.0.q_proj": matrix, "model.layers.7.q_proj": matrix})))
    assert page.count("The layers of this block are mixed on a graph of their own.") == 2
    assert "mira, model.layers.7.q_proj" in page
    with pytest.raises(IntegrityError, match="no matrix of 4 x 4"):
        read(changed(run, {}, blocks={"broken": [[0.0]]}))


def test_only_learned_graphs_have_a_course(make_run: Make) -> None:
    shares = {"weight_in_tasks": [0.2, 0.5, 0.7], "weight_on_true_edges": [0.1, 0.4, 0.6]}
    learned = render(read(changed(make_run(), {**shares, "agreement": [0.5, 0.8, 0.9]})))
    assert "mira: the graph over rounds" in learned
    assert "on true edges" in learned
    assert "the graph over rounds" not in render(read(changed(make_run(), shares)))


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        (
            {"clusters": 4, "within_clusters": True},
            "Clients fall into 4 clusters; only neighbours in the same one count.",
        ),
        ({"clusters": 4}, "Clients fall into 4 clusters."),
        ({"clusters": None, "within_clusters": True}, "No clusters of clients are clear."),
        ({"clusters": [4, None], "within_clusters": True}, None),
        ({}, None),
    ],
)
def test_a_graph_says_which_clusters_it_saw(make_run: Make, provenance: dict[str, Any], words: str | None) -> None:
    page = render(read(changed(make_run(), {}, provenance=provenance)))
    assert ("clusters" in page) == (words is not None)
    assert words is None or words in page


@pytest.mark.parametrize(
    ("warmup", "whom"), [("uniform", "everybody with everybody alike"), ("none", "nobody with any")]
)
def test_the_graph_of_the_warm_up_is_not_called_learned(make_run: Make, warmup: str, whom: str) -> None:
    run = make_run(families=2, clients_per_family=2, rounds=3)
    weight = float(warmup == "uniform")
    matrix = [[weight * (row != column) for column in range(4)] for row in range(4)]
    provenance = {"warmup": warmup, "round": 3, "privacy": "The server compares."}
    page = render(read(changed(run, {}, adjacency=matrix, provenance=provenance)))
    assert f"This is the graph of the warm-up after round 3, {whom}" in page
    assert "nothing that was learned was used in that round" in page
    assert "mira, graph gram, warm-up</h3>" in page
    assert "What learning a graph reveals: the server compares." in page
    assert "of its weight joins clients of one label" not in page
    assert "related closely enough" not in page
    assert ("No edges: the warm-up joins nobody" in page) == (warmup == "none")


def test_a_graph_that_has_not_settled_says_how_much_of_it_was_learned(make_run: Make) -> None:
    provenance = {"warmup": "uniform", "round": 3, "learned_share": 0.4, "clusters": 4}
    page = render(read(changed(make_run(), {}, provenance=provenance)))
    assert "What was learned counts for 40.0&nbsp;% after round 3, since it has not settled" in page
    assert "for the rest this is everybody with everybody alike" in page
    assert "Clients fall into 4 clusters." in page
    assert ", warm-up</h3>" not in page


def test_without_labels_a_printed_graph_and_its_losses_name_every_client(make_run: Make, make_study: Make) -> None:
    """In rows, columns, nodes and bars; not only where one points."""
    unlabelled: dict[str, Any] = {
        "clients_per_family": 1,
        "name_of": lambda family, k: f"<i>ward{family}",
        "task_of": lambda family: "",
        "true_graph": False,
    }
    for num_clients in (3, MAXIMUM_NAMES):
        for path in (
            make_run(families=num_clients, **unlabelled),
            make_study(methods=("local_only", "mira"), seeds=(0,), families=num_clients, **unlabelled),
        ):
            page = render(read(path))
            for k in range(num_clients):
                assert page.count(f">&lt;i&gt;ward{k}</text>") == 4
            assert "Test loss of each client</h3>" in page
            assert "no task label</text>" not in page
            assert "ordered by label" not in page
    crowd = render(read(make_run(families=MAXIMUM_NAMES + 1, **unlabelled)))
    assert "ward1</text>" not in crowd
    assert "Test loss of each task</h3>" in crowd
    labelled = render(read(make_study(methods=("local_only", "mira"), seeds=(0,))))
    assert "client0</text>" not in labelled
    assert "ordered by label" in labelled


def test_without_labels_nothing_is_said_about_them(make_run: Make) -> None:
    page = render(read(make_run(families=2, clients_per_family=2, task_of=lambda family: "")))
    assert "joins clients of one label" not in page
    assert "grey ones join different labels" not in page
    assert "a thicker line is a heavier edge." in page
