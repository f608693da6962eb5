"""Claims about clients that join: what they hold at once, method by method. What holds for all methods is in the
contract suite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.federation.builders import (
    CONFIGS,
    clients,
    initial,
    layout_for,
    mira,
    play,
    published,
    same_bytes,
    trained,
)
from tests.reference import products_twin

from fedmira.config.method import FlexLoraConfig, IFCAConfig, MethodConfig
from fedmira.config.mira import MiraConfig
from fedmira.errors import ConfigError
from fedmira.federation.graph import Graph
from fedmira.federation.joining import joined
from fedmira.federation.known_graphs import labels
from fedmira.federation.method import State
from fedmira.federation.mixing import implicit_matrix
from fedmira.federation.ranks import trimmed
from fedmira.federation.registry import build_method
from fedmira.types import Clients, Participants

EVERYBODY = (0, 1, 2, 3)
SHARED = ("fedit", "fedprox", "ffa_lora", "rolora", "fedadam", "fedkseed", "flexlora", "hetlora", "fedex_lora", "flora")


def grown(
    config: MethodConfig, rounds: Sequence[tuple[int, ...]], ranks: tuple[int, ...] | None = None, tasks: str = "ababab"
) -> State:
    """Four clients play `rounds`, then a fifth and a sixth join."""

    def some(count: int) -> Clients:
        its_ranks = None if ranks is None else ranks[:count]
        return clients(count)._replace(ranks_K=its_ranks, tasks=tuple(tasks[:count]))

    before = build_method(config, some(4))
    state = play(before, before.init(initial(4, of=layout_for(config)), some(4)), some(4).names, list(rounds))
    after = build_method(config, some(6))
    return joined(after, state, after.init(initial(6, of=layout_for(config)), some(6)), len(rounds))


@pytest.mark.parametrize("name", [*SHARED, "centralised"])
@pytest.mark.parametrize("rounds", [2, 3])
def test_where_all_share_one_adapter_who_joins_gets_it(name: str, rounds: int) -> None:
    rows_KP = grown(CONFIGS[name], [(0, 1, 2), EVERYBODY, (1, 3)][:rounds]).adapters.values_KP
    assert all(same_bytes(row_P, rows_KP[0]) for row_P in rows_KP)
    assert not same_bytes(rows_KP[0], initial(1).values_KP[0])


@pytest.mark.parametrize(("name", "shared"), [("fedsa_lora", "lora_a"), ("fed_alora", "lora_b")])
def test_where_all_share_a_factor_who_joins_gets_it_and_starts_its_own(name: str, shared: str) -> None:
    state = grown(CONFIGS[name], [EVERYBODY] * 2)
    for spec in state.adapters.layout.specs:
        tensor = state.adapters.view(spec)
        start = state.adapters.values_KP[0] if spec.group == shared else initial(1).values_KP[0]
        assert same_bytes(tensor[4].flatten(), start[spec.offset : spec.offset + spec.size])


def test_who_trains_alone_starts_from_its_initial_adapter() -> None:
    rows_KP = grown(CONFIGS["local_only"], [EVERYBODY] * 2).adapters.values_KP
    assert same_bytes(rows_KP[4:], initial(2).values_KP)


def test_with_another_rank_who_joins_gets_the_pair_of_its_rank_or_the_largest() -> None:
    rows_KP = grown(FlexLoraConfig(name="flexlora"), [EVERYBODY] * 2, ranks=(1, 2, 2, 2, 1, 2)).adapters.values_KP
    assert same_bytes(rows_KP[4], rows_KP[0])
    assert same_bytes(rows_KP[5], rows_KP[1])
    assert not same_bytes(rows_KP[0], rows_KP[1])
    rows_KP = grown(FlexLoraConfig(name="flexlora"), [EVERYBODY] * 2, ranks=(2, 2, 2, 2, 1, 2)).adapters.values_KP
    assert same_bytes(rows_KP[5], rows_KP[0])


@pytest.mark.parametrize("align", [True, False])
def test_with_a_rank_that_nobody_has_who_joins_gets_the_nearest_pair_of_it(align: bool) -> None:
    config = FlexLoraConfig(name="flexlora", align=align)
    adapters = grown(config, [EVERYBODY] * 2, ranks=(2, 2, 2, 2, 1, 1)).adapters
    for layer, product in products_twin.dense(adapters, 0).items():
        best = products_twin.nearest_of_rank(product, 1)
        torch.testing.assert_close(products_twin.dense(adapters, 4)[layer], best, rtol=0, atol=1e-5)
    assert same_bytes(adapters.values_KP[4], adapters.values_KP[5])
    assert same_bytes(adapters.values_KP[4], trimmed(adapters.layout, adapters.values_KP[4:5], [1])[0])
    adapters = grown(config, [EVERYBODY] * 2, ranks=(1, 1, 1, 1, 2, 2)).adapters
    for layer, product in products_twin.dense(adapters, 0).items():
        torch.testing.assert_close(products_twin.dense(adapters, 4)[layer], product, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fedit", "rolora", "feddpa", "flora"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_who_joins_gets_what_is_shared_though_others_hold_less_of_it(name: str, rounds: int) -> None:
    adapters = grown(CONFIGS[name], [EVERYBODY] * rounds, ranks=(1, 2, 1, 2, 2, 1)).adapters
    shared = [spec for spec in adapters.layout.specs if not spec.group.startswith("second")]
    assert shared
    for spec in shared:
        # both have the rank of the arena
        assert torch.equal(adapters.view(spec)[4], adapters.view(spec)[1])


def test_nobody_joins_once_there_is_no_common_adapter() -> None:
    config = CONFIGS["fedit_finetuned"]
    assert grown(config, [EVERYBODY] * 3).adapters.num_clients == 6
    with pytest.raises(ConfigError, match="clients cannot join any more"):
        grown(config, [EVERYBODY] * 4)


@pytest.mark.parametrize(("tasks", "kin"), [("ababab", (0, 1)), ("aabbba", (2, 0))])
def test_who_joins_an_oracles_cluster_gets_its_adapter(tasks: str, kin: tuple[int, int]) -> None:
    rows_KP = grown(CONFIGS["oracle_clusters-labels"], [EVERYBODY] * 2, tasks=tasks).adapters.values_KP
    assert same_bytes(rows_KP[4:], rows_KP[list(kin)])
    assert not same_bytes(rows_KP[4], rows_KP[5])


def test_with_fedalt_the_rest_of_the_world_is_there_at_once() -> None:
    state = grown(CONFIGS["fedalt"], [EVERYBODY] * 2)
    for own, rest, factor in (("lora_a", "second_a", 1.0), ("lora_b", "second_b", 0.4 / 0.6)):
        for mine, theirs in zip(*map(state.adapters.layout.slices, (own, rest)), strict=True):
            mean = factor * state.adapters.values_KP[:4, mine].mean(dim=0)
            torch.testing.assert_close(state.adapters.values_KP[4, theirs], mean)
            assert same_bytes(
                state.adapters.values_KP[4, mine], initial(1, of=layout_for(CONFIGS["fedalt"])).values_KP[0, mine]
            )


# ---------------------------------------------------------------------------------------------------------------- mira


def task_graph(count: int) -> Graph:
    return labels(clients(count).tasks)


@pytest.mark.parametrize("choice", [False, True])
def test_with_labels_who_joins_starts_from_the_uploads_of_its_task(choice: bool) -> None:
    """Confidence 0: the row of (C + tau L)^-1 C over the stored uploads, at the end of the last round."""
    config = MiraConfig.model_validate(
        {"graph": {"kind": "labels"}, "strength": 1.0, "staleness_decay": 0.5, "choice": {"enabled": choice}}
    )
    state = grown(config, [EVERYBODY, (0, 1, 3)])
    examples_K = np.array(clients(6).num_examples_K)
    # three of the four that there were returned in the last round
    confidence_K = examples_K / examples_K.mean() * np.array([1.0, 1.0, 0.5**0.75, 1.0, 0.0, 0.0])
    expected_KP = implicit_matrix(task_graph(6), 1.0, confidence_K) @ state.memory["uploads"].double().numpy()
    rows_KP = state.adapters.values_KP.double().numpy()
    np.testing.assert_allclose(rows_KP[4:], expected_KP[4:], atol=1e-6)
    # of two neighbours with confidence, who joined lies between them: clients 0 and 2 of its task
    uploads_KP = state.memory["uploads"].double().numpy()
    lower_P, upper_P = uploads_KP[[0, 2]].min(axis=0), uploads_KP[[0, 2]].max(axis=0)
    assert ((rows_KP[4] >= lower_P - 1e-6) & (rows_KP[4] <= upper_P + 1e-6)).all()
    assert same_bytes(state.memory["uploads"][4:], initial(2).values_KP)


@pytest.mark.parametrize("warmup", ["uniform", "none"])
@pytest.mark.parametrize(("settled", "rounds"), [(0.0, 2), (0.8, 1), (0.8, 2)])
def test_where_the_graph_does_not_know_who_joined_it_starts_from_the_mean_of_all(
    warmup: str, settled: float, rounds: int
) -> None:
    state = grown(mira("gram", settled=settled, warmup=warmup), [EVERYBODY] * rounds)
    shares = torch.tensor(clients(4).num_examples_K, dtype=torch.float64)
    uploads_KP = state.memory["uploads"].double()[:4]
    adapters_KP = state.adapters.values_KP.double()
    nobody_mixed = settled and rounds == 1 and warmup == "none"
    assert torch.allclose(adapters_KP[:4], uploads_KP, atol=1e-6) == bool(nobody_mixed)
    mean = (shares / shares.sum()) @ adapters_KP[:4]
    assert torch.allclose(adapters_KP[4:], mean.expand(2, -1), rtol=0, atol=1e-6)


def test_the_published_step_leaves_who_joins_alone() -> None:
    assert same_bytes(grown(published("labels"), [EVERYBODY] * 2).adapters.values_KP[4:], initial(2).values_KP)


def test_an_axis_that_is_as_long_as_there_are_clients_by_chance_stays() -> None:
    """Two blocks of layers and two clients: (2, 2, 2) becomes (2, 3, 3), not (3, 3, 3)."""
    few, more = clients(2), clients(3)
    before, after = (build_method(mira("gram_layers"), some) for some in (few, more))
    state = before.init(initial(2), few)
    before_GKK = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]]], dtype=torch.float64)
    state.memory["similarity"][:] = before_GKK
    similarity_GKK = joined(after, state, after.init(initial(3), more), 0).memory["similarity"]
    assert similarity_GKK.shape == (2, 3, 3)
    assert torch.equal(similarity_GKK[:, :2, :2], before_GKK)
    assert similarity_GKK.sum() == before_GKK.sum()


def test_who_joins_brings_no_model_that_nobody_trained() -> None:
    ifca = IFCAConfig(name="ifca", models=5)
    state = grown(ifca, [EVERYBODY] * 3)
    method = build_method(ifca, clients(6))
    results = trained(method.plan(state, Participants(4, tuple(range(6)))), clients(6).names)
    state, _ = method.merge(state, Participants(4, tuple(range(6))), results)
    assert method.trial is not None
    trial = method.trial(state, Participants(4, tuple(range(6))), results)
    assert trial is not None
    assert trial.num_candidates == 4, "as many as there were clients when the models began"
    untrained = initial(1).values_KP[0]
    assert not any(same_bytes(trial.candidate(number)[0], untrained) for number in range(4))
