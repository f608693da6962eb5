"""What is said before the first round: in words that name the key, and only where it is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedmira.assembly import assemble
from fedmira.config.run import RunConfig
from fedmira.config.training import FederationConfig
from fedmira.exchange.privacy import epsilon
from fedmira.federation.participation import draw
from fedmira.forecast import remarks
from fedmira.forecast.estimate import dry_run
from fedmira.forecast.remarks import warnings


def tiny(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 1, "batch_size": 2},
            "federation": {"rounds": 4},
            "evaluation": {"generation": {"max_new_tokens": 2}},
            **sections,
        }
    )


def test_nothing_is_said_of_a_run_that_is_as_it_seems() -> None:
    assert warnings(assemble(tiny())) == ()


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ({"name": "mira"}, "method.choice"),
        ({"name": "mira", "choice": {"enabled": False}, "strength": "auto"}, "method.strength = auto"),
        ({"name": "mira", "choice": {"enabled": False}, "graph": {"kind": "trust"}}, "method.graph.kind = trust"),
        ({"name": "pcl"}, "the trust between clients"),
        ({"name": "fedit"}, None),
        ({"name": "mira", "choice": {"enabled": False}}, None),
    ],
)
def test_what_rests_on_validation_examples_that_nobody_holds_is_named(
    method: dict[str, Any], named: str | None
) -> None:
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12}
    bare = tiny(method=method, data={**data, "partition": {"by": "field", "validation": 0}})
    told = warnings(assemble(bare))
    assert len(told) == (named is not None)
    assert named is None or f"nothing comes of {named} in" in told[0]
    assert warnings(assemble(tiny(method=method))) == ()


def test_what_is_not_trained_on_for_its_length_is_told() -> None:
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12}
    (told,) = warnings(assemble(tiny(data={**data, "max_length": 8, "cut": "beginning"})))
    counts = re.fullmatch(
        r"data\.max_length = 8: of 48 examples (?:(\d+) left out, as their answers do not fit and )?"
        r"(?:(\d+) left out, as their prompts, once cut, are both trained on and held out and )?"
        r"(\d+) read without the beginning of their prompt; `fedmira data` says whose",
        told,
    )
    assert counts is not None
    assert sum(map(int, filter(None, counts.groups()))) <= 48


def test_judging_that_takes_longer_than_training_is_told_with_what_to_set() -> None:
    # 8 validation examples of each client after every round, for 2 trained on
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12}
    large = {**data, "partition": {"by": "field", "validation": 0.66, "test": 0.17}}
    (told,) = warnings(assemble(tiny(data=large)))
    assert "evaluation.every = 1: judging all validation examples" in told
    assert "1.3 times as long as training" in told
    assert told.endswith("with evaluation.every: 7 it takes a fifth")
    for settled in ({"every": 2}, {"every": 7}):
        assert warnings(assemble(tiny(data=large, evaluation={**settled, "generation": {"enabled": False}}))) == ()
    once = tiny(data=large, federation={"rounds": 1}, method={"name": "fedit"})
    assert warnings(assemble(once)) == ()
    # everybody is judged, also those that were not drawn
    (told,) = warnings(assemble(tiny(data=large, federation={"rounds": 4, "clients_per_round": 2})))
    assert "2.6 times" in told


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"name": "mira"}, "federation": {"rounds": 1}}, "1: everybody is joined with everybody to the end"),
        (
            {"method": {"name": "mira", "graph": {"warmup": "none"}}, "federation": {"rounds": 1}},
            "1: nobody is joined with anybody to the end, and no learned graph is used before round 2",
        ),
        (
            {"method": {"name": "mira", "graph": {"kind": "probe"}}, "federation": {"rounds": 2}},
            "no learned graph is used before round 3 with method.graph.kind = probe and settled = 0.8",
        ),
        (
            {"method": {"name": "mira", "graph": {"kind": "probe", "settled": 0}}, "federation": {"rounds": 1}},
            "1: nobody is joined with anybody to the end, and no learned graph is used before round 2",
        ),
        ({"method": {"name": "mira", "graph": {"kind": "probe"}}, "federation": {"rounds": 3}}, None),
        ({"method": {"name": "mira", "graph": {"settled": 0}}, "federation": {"rounds": 1}}, None),
        ({"method": {"name": "mira"}, "federation": {"rounds": 2}}, None),
        ({"method": {"name": "mira", "graph": {"kind": "labels"}}}, None),
        (
            {"method": {"name": "fedlease", "warmup_rounds": 5}},
            "method.warmup_rounds = 5 and federation.rounds = 4",
        ),
        ({"method": {"name": "fedlease", "warmup_rounds": 4}}, None),
        ({"method": {"name": "fedit_finetuned", "local_rounds": 4}}, "method.local_rounds = 4 and"),
        ({"method": {"name": "fedit_finetuned", "local_rounds": 3}}, None),
        ({"method": {"name": "fedit_finetuned"}}, None),
        (
            {"method": {"name": "fedit_finetuned"}, "federation": {"rounds": 2}},
            "no round is left for local fine-tuning",
        ),
        ({"training": {"warmup_rounds": 4}}, "training.warmup_rounds = 4 and federation"),
        ({"training": {"warmup_rounds": 3.5}}, None),
    ],
)
def test_a_phase_that_takes_all_rounds_is_told(sections: dict[str, Any], told: str | None) -> None:
    lines = warnings(assemble(tiny(**sections)))
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "mira_published", "graph": {"kind": "gram"}, "server_lr": 0.1},
        {"name": "mira", "graph": {"kind": "probe"}},
    ],
)
def test_that_two_at_a_time_are_too_few_where_those_who_take_part_are_compared(method: dict[str, Any]) -> None:
    few = {"rounds": 4, "clients_per_round": 2}
    (line,) = warnings(assemble(tiny(method=method, federation=few)))
    assert "fewer than 3 clients at a time: everybody is joined with everybody" in line
    assert not warnings(assemble(tiny(method={"name": "mira"}, federation=few)))


def test_that_two_clients_are_too_few_for_a_learned_graph_is_told() -> None:
    two = {"source": "planted", "families": 1, "clients_per_family": 2, "examples": 12}
    (line,) = warnings(assemble(tiny(data=two)))
    assert "kind = gram cannot tell who is related among fewer than 3 clients at a time: everybody is joined" in line
    assert line.endswith("set method.graph.warmup: none where they are not related")
    (line,) = warnings(assemble(tiny(data=two, method={"name": "mira", "graph": {"warmup": "none"}})))
    assert "nobody is joined with anybody; set method.graph.kind: uniform where they are related" in line
    assert not warnings(assemble(tiny(data=two, method={"name": "mira", "graph": {"kind": "uniform"}})))


@pytest.mark.parametrize(
    ("method", "families", "per_family", "why", "instead"),
    [
        ({"name": "mira", "graph": {"kind": "embeddings"}}, 1, 2, "fewer than 3 clients cannot be compared", False),
        ({"name": "mira", "graph": {"kind": "labels"}}, 3, 1, "no two clients have the same task", True),
        ({"name": "mira", "graph": {"kind": "labels"}}, 2, 1, "no two clients have the same task", False),
        ({"name": "oracle_clusters"}, 3, 1, "no two clients have the same task", False),
        ({"name": "fedu", "graph": {"kind": "true"}}, 3, 1, "it has no edges", False),
    ],
)
def test_that_a_known_graph_joins_nobody_is_told_with_what_to_set(
    method: dict[str, Any], families: int, per_family: int, why: str, instead: bool
) -> None:
    data = {"source": "planted", "families": families, "clients_per_family": per_family, "examples": 12}
    kind = method.get("graph", {"kind": "labels"})["kind"]
    (line,) = warnings(assemble(tiny(data=data, method=method)))
    assert line == (
        f"method.graph.kind = {kind} joins nobody with anybody, as {why}: everybody trains alone, as with local_only; "
        "set method.graph.kind: uniform where they are related" + ", or kind: gram to find out who is" * instead
    )


@pytest.mark.parametrize("kind", ["embeddings", "labels", "true", "uniform"])
def test_of_a_known_graph_with_edges_nothing_is_said(kind: str) -> None:
    assert not warnings(assemble(tiny(method={"name": "mira", "graph": {"kind": kind}})))


def test_that_what_a_graph_is_learned_from_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, known = (assemble(tiny(method={"name": "mira", "graph": {"kind": kind}})) for kind in ("gram", "labels"))
    num_clients, num_layers = len(learned.clients.names), len(learned.layout.layers)
    # float64, those of before and of now
    needed = 2 * num_layers * num_clients**2 * 8
    assert needed == 1.5 * 2**10
    monkeypatch.setattr(remarks, "available_bytes", lambda _: needed - 1)
    (told,) = warnings(learned)
    assert f"compares {num_clients} clients in each of {num_layers} layers, which takes 1.5 KiB" in told
    assert not warnings(known)
    monkeypatch.setattr(remarks, "available_bytes", lambda _: needed)
    assert not warnings(learned)


@pytest.mark.parametrize(
    ("method", "uploads", "refused"),
    [
        *(("fedit", uploads, refused) for uploads, refused in ((3, None), (2, 3), (1, 2), (0, 1))),
        # uploads in odd rounds only, and never
        ("feddpa", 2, None),
        ("feddpa", 1, 3),
        ("local_only", 0, None),
    ],
)
def test_the_round_that_the_privacy_budget_will_not_allow_is_known_before_the_first(
    method: str, uploads: int, refused: int | None
) -> None:
    budget = epsilon(uploads, 2.0, 1e-5) + 1e-6
    privacy = {"enabled": True, "noise_multiplier": 2.0, "budget": budget}
    config = tiny(method={"name": method}, exchange={"privacy": privacy}, federation={"rounds": 3})
    told = [line for line in warnings(assemble(config)) if "budget" in line]
    assert len(told) == (refused is not None)
    if refused is not None:
        assert f"is enough for {uploads} upload" in told[0]
        assert f"round {refused} will be refused" in told[0]
        assert ("lower federation.rounds" in told[0]) == (uploads > 0), "with no upload fewer rounds do not help"


def noised(method: str = "fedit", noise: float = 8.0, **sections: Any) -> tuple[str, ...]:
    privacy = {"enabled": True, "noise_multiplier": noise}
    return warnings(assemble(tiny(method={"name": method}, exchange={"privacy": privacy}, **sections)))


def test_what_noise_promises_and_drowns_is_told_before_the_first_round() -> None:
    spent, seed, drowned = noised()
    value = epsilon(4, 8.0, 1e-5)
    assert spent == (
        f"exchange.privacy: a client that takes part in all 4 rounds gives away epsilon {value:.4g} at delta 1e-05"
    )
    # 6 layers of rank 2 between 192 features: 8 * 1 * sqrt(4,608)
    assert "noise_seed = run: the noise follows from seed = 0," in seed
    assert "has norm 543 (noise_multiplier * clip_norm * sqrt(4,608 numbers))" in drowned
    assert "at most clip_norm = 1:" in drowned
    assert "above about 10 that protects little" in noised(noise=0.5)[0]
    assert "protects little" not in spent
    # too little noise to drown anything promises nothing
    assert len(noised(noise=0.01)) == 2
    from_system = {"enabled": True, "noise_multiplier": 8.0, "noise_seed": "system"}
    told = warnings(assemble(tiny(method={"name": "fedit"}, exchange={"privacy": from_system})))
    assert told == (spent, drowned)


@pytest.mark.parametrize(("method", "uploads", "numbers"), [("feddpa", 2, 4608), ("rolora", 4, 2304)])
def test_what_is_uploaded_is_what_the_method_plans(method: str, uploads: int, numbers: int) -> None:
    spent, _, drowned = noised(method)
    assert f"epsilon {epsilon(uploads, 8.0, 1e-5):.4g} " in spent
    assert f"sqrt({numbers:,} numbers)" in drowned


def test_of_clients_that_are_drawn_the_one_drawn_most_often_counts() -> None:
    *_, spent, _, _ = noised(federation={"rounds": 4, "clients_per_round": 1})
    drawn = [
        id_ for round_ in range(1, 5) for id_ in draw(4, FederationConfig(rounds=4, clients_per_round=1), 0, round_).ids
    ]
    most = max(map(drawn.count, drawn))
    assert 1 <= most < 4
    assert f"is drawn most often, for {most} of 4 rounds, gives away epsilon {epsilon(most, 8.0, 1e-5):.4g}" in spent


def test_noise_on_nothing_has_no_effect() -> None:
    assert noised("local_only") == ("exchange.privacy has no effect: with this method nothing is uploaded",)


def test_a_dry_run_says_what_the_run_would_say() -> None:
    privacy = {"enabled": True, "noise_multiplier": 2.0, "budget": 1e-3}
    lines = dry_run(tiny(method={"name": "fedit"}, exchange={"privacy": privacy})).lines()
    told = [line for line in lines if line.startswith("warning: ")]
    assert len(told) == 5
    assert "gives away epsilon" in told[0]
    assert "budget" in told[3]
    assert "quadratic" in told[4]


def test_one_client_alone_is_told_how_records_name_theirs(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text("".join(f'{{"instruction": "{n}", "output": "x", "site": "{n % 2}"}}\n' for n in range(20)))
    data = {"source": "jsonl", "path": str(file), "partition": {"by": "field"}}
    told = warnings(assemble(tiny(data=data, method={"name": "fedit"})))
    assert told == (
        "'all' is the only client, so there is nobody to learn from; give each client a file of its own, or set "
        "data.client_field to the field that names it",
    )
    assert not warnings(assemble(tiny(data={**data, "client_field": "site"}, method={"name": "fedit"})))
    pooled = {**data, "partition": {"by": "iid", "num_clients": 1}}
    assert "see data.partition.by = iid" in warnings(assemble(tiny(data=pooled, method={"name": "fedit"})))[0]
