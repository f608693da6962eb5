"""Graphs that need data and model, in whole runs: what is asked, what it costs, what is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmira.assembly import assemble
from fedmira.config.run import RunConfig
from fedmira.errors import DataError, IntegrityError
from fedmira.experiment import run
from fedmira.federation.graph import PRIVACY
from fedmira.federation.known_graphs import resolve_graph
from fedmira.runs.store import GRAPH, RunStore


def config(kind: str, rounds: int = 2, **graph: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {
                "source": "planted",
                "families": 3,
                "clients_per_family": 3,
                "examples": 12,
                "words": 8,
                "shared": 1.0,
            },
            "model": {"adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 5, "batch_size": 4, "learning_rate": 0.01},
            "federation": {"rounds": rounds},
            "evaluation": {"test": False},
            "method": {"name": "mira", "graph": {"kind": kind, **_NO_WARM_UP.get(kind, {"settled": 0}), **graph}},
        }
    )


_NO_WARM_UP: dict[str, dict[str, float]] = {"embeddings": {}}
"""Embeddings are known before the first round."""


@pytest.mark.parametrize("kind", ["gram_layers", "trust", "probe", "embeddings"])
def test_a_run_learns_a_graph_and_says_what_it_is(tmp_path: Path, kind: str) -> None:
    store = RunStore.open(run(config(kind), directory=tmp_path))
    graph = json.loads((store.path / GRAPH).read_bytes())
    assert graph["name"] == kind
    assert np.array(graph["adjacency"]).any()
    assert graph["provenance"]["privacy"] == PRIVACY[kind]
    rounds = [event for event in store.events() if event["event"] == "round"]
    first = rounds[0]["numbers"]
    # what is asked after the first round serves the second
    assert (first["edges"] == 0) == (kind in ("trust", "probe"))
    last = rounds[-1]["numbers"]
    assert {"components", "lambda_2", "lambda_max", "stability_margin", "weight_in_tasks"} <= last.keys()


def test_trust_costs_the_adapters_that_are_judged_and_a_probe_costs_nothing(tmp_path: Path) -> None:
    bytes_of, in_the_last = {}, set()
    for name, wanted in (
        ("gram", config("gram", rounds=2)),
        ("probe", config("probe", rounds=2)),
        ("trust", config("trust", rounds=2, judged=2)),
    ):
        path = run(wanted, directory=tmp_path / name)
        events = [event for event in RunStore.open(path).events() if event["event"] == "round"]
        first, last = ((event["upload_bytes"], event["download_bytes"]) for event in events)
        bytes_of[name] = first
        in_the_last.add(last)
    up, down = bytes_of["gram"]
    assert bytes_of["probe"] == (up, down)
    # nine clients: two foreign adapters each, and the losses of three
    assert bytes_of["trust"] == (up + 9 * 3 * 4, down + 2 * down)
    # two more losses of each client, with the average over rounds, and how sure it is which is smaller
    assert in_the_last == {(up + 9 * 3 * 4, down)}, "no round follows that a graph could serve"


def test_probe_texts_that_changed_since_the_start_are_refused_on_resume(tmp_path: Path) -> None:
    texts = tmp_path / "probe.jsonl"
    texts.write_text('{"instruction": "say", "output": "yes"}\n')
    wanted = config("probe", rounds=1, probe_path=str(texts))
    run(wanted, directory=tmp_path / "runs")
    run(wanted, directory=tmp_path / "runs", resume=True)
    texts.write_text('{"instruction": "say", "output": "no"}\n')
    with pytest.raises(IntegrityError, match=r"the graph changed since the run was started \(sha256 differ\)"):
        run(wanted, directory=tmp_path / "runs", resume=True)


def test_embeddings_tell_families_apart_that_speak_differently() -> None:
    parts = assemble(config("embeddings"))
    assert parts.given_graph is not None
    assert parts.given_graph.shape == (9, 9)
    graph = resolve_graph(parts.config.method.graph, parts.clients, parts.given_graph)  # type: ignore[union-attr]
    assert graph is not None
    assert graph.num_edges
    assert "sha256" not in parts.manifest()["graph"]


def test_probe_texts_come_from_a_file_or_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "probe.jsonl"
    lines = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = assemble(config("probe", probe_path=str(path), probe_examples=3)).exchange._texts
    drawn = [assemble(config("probe", probe_examples=5)).exchange._texts for _ in range(2)]
    assert len(read) == 3
    assert len(drawn[0]) == 5
    for one, again in zip(*drawn, strict=True):
        assert np.array_equal(one.tokens, again.tokens)
    assert not np.array_equal(drawn[0][0].tokens, drawn[0][1].tokens)
    with pytest.raises(DataError, match="nowhere"):
        assemble(config("probe", probe_path=str(tmp_path / "nowhere.jsonl")))
