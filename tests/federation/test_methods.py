"""What each method does: its equation, its reductions to others, its memory of absent clients, its refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.federation.builders import (
    FEDIT,
    LOCAL,
    clients,
    initial,
    mira,
    mira_with,
    play,
    published,
    same_bytes,
    trained,
)
from tests.reference import mixing_twin

from fedmira.config.graph import GraphConfig
from fedmira.config.mira import MiraConfig, MiraPublishedConfig
from fedmira.config.training import FederationConfig
from fedmira.errors import ConfigError
from fedmira.federation import known_graphs as known
from fedmira.federation.graph import laplacian
from fedmira.federation.method import Method, State
from fedmira.federation.mixing import implicit_matrix
from fedmira.federation.participation import draw
from fedmira.federation.registry import build_method
from fedmira.types import Arena, Layout, Participants, Results, TensorSpec

ROUNDS = [(0, 1, 3), (1, 2, 4), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)]
EVERYBODY = Participants(1, tuple(range(6)))


def fresh(method: Method, dtype: torch.dtype = torch.float64) -> State:
    return method.init(initial(dtype=dtype), clients())


def one_round(method: Method, ids: tuple[int, ...]) -> tuple[torch.Tensor, State]:
    """Returned rows and the state after round 1 with participants `ids`."""
    state = fresh(method)
    results = trained(method.plan(state, Participants(1, ids)), clients().names)
    return results.values_SP, method.merge(state, Participants(1, ids), results)[0]


# --------------------------------------------------------------------------------------------------------- local, fedit


def test_local_only_keeps_what_was_trained() -> None:
    method = build_method(LOCAL, clients())
    values_SP, state = one_round(method, (1, 4))
    assert same_bytes(state.adapters.values_KP[[1, 4]], values_SP)
    assert same_bytes(state.adapters.values_KP[[0, 2, 3, 5]], initial(dtype=torch.float64).values_KP[[0, 2, 3, 5]])
    assert state.last_round_K == (0, 1, 0, 0, 1, 0)


def test_fedit_is_the_mean_weighted_by_training_examples_for_everybody() -> None:
    method = build_method(FEDIT, clients())
    values_SP, state = one_round(method, (0, 3, 4))
    weights = [clients().num_examples_K[k] for k in (0, 3, 4)]
    expected = mixing_twin.weighted_mean(list(values_SP), weights)
    assert torch.allclose(state.adapters.values_KP, expected.expand(6, -1), rtol=0, atol=1e-14)
    assert all(same_bytes(row, state.adapters.values_KP[0]) for row in state.adapters.values_KP)


def test_fedit_starts_everybody_alike_even_from_different_initial_adapters() -> None:
    arena = initial()
    different = arena.replace(arena.values_KP + torch.arange(6.0)[:, None])
    state = build_method(FEDIT, clients()).init(different, clients())
    assert all(same_bytes(row, different.values_KP[0]) for row in state.adapters.values_KP)


# ------------------------------------------------------------------------------------------------------- mira_published


def test_published_step_is_equation_eight_among_the_returned_and_nine_for_the_rest() -> None:
    method = build_method(published("random", strength=0.5, server_lr=0.3), clients())
    values_SP, state = one_round(method, (0, 2, 3, 5))
    adjacency = known.random(6, 0).adjacency_KK[np.ix_((0, 2, 3, 5), (0, 2, 3, 5))]
    expected = mixing_twin.explicit_step(values_SP.numpy(), adjacency, tau=0.15)
    assert np.allclose(state.adapters.values_KP[[0, 2, 3, 5]], expected, rtol=0, atol=1e-12)
    assert same_bytes(state.adapters.values_KP[[1, 4]], initial(dtype=torch.float64).values_KP[[1, 4]])


def test_published_step_on_the_complete_graph_is_the_mean() -> None:
    method = build_method(published("uniform", strength=1.0, server_lr=1 / 6), clients())
    values_SP, state = one_round(method, EVERYBODY.ids)
    assert torch.allclose(state.adapters.values_KP, values_SP.mean(dim=0).expand(6, -1), rtol=0, atol=1e-14)


def test_the_published_method_learns_of_those_alone_that_take_part() -> None:
    who, ids = clients(), (0, 2, 3, 5)
    method = build_method(published("gram"), who)
    state = play(method, fresh(method), who.names, [EVERYBODY.ids])
    _, info = method.merge(state, some := Participants(2, ids), trained(method.plan(state, some), who.names))
    assert info.graph is not None
    related = set(np.flatnonzero(info.graph.adjacency_KK.any(axis=1)).tolist())
    assert related
    assert related <= set(ids)


def test_disagreement_of_the_published_step_falls_by_the_predicted_factor() -> None:
    # every eigenvalue of the complete unit graph but one is 6
    method = build_method(published("uniform", strength=1.0, server_lr=0.05), clients())
    state = fresh(method)
    _, info = method.merge(state, EVERYBODY, trained(method.plan(state, EVERYBODY), clients().names))
    ratio = info.numbers["disagreement_after"] / info.numbers["disagreement_before"]
    assert ratio == pytest.approx((1 - 0.05 * 6) ** 2)
    assert info.numbers["tau_times_max_degree"] == pytest.approx(0.25)


def test_too_much_strength_is_refused_before_the_first_round() -> None:
    who = clients()
    with pytest.raises(ConfigError, match=r"Set server_lr \* strength <= 0\.3333"):
        build_method(published("uniform", strength=1.0, server_lr=0.34), who)
    build_method(published("uniform", strength=1.0, server_lr=0.33), who)


def test_strength_is_checked_against_the_subgraphs_that_rounds_will_meet() -> None:
    who, sampled = clients(80), FederationConfig(rounds=60, participation=0.1)
    # the published random graph: largest eigenvalue about 44 among 80 clients, about 5 among 8
    config = published("random", strength=1.0, server_lr=0.2)
    with pytest.raises(ConfigError, match="among 80 clients"):
        build_method(config, who)
    with pytest.raises(ConfigError, match="among 80 clients"):
        build_method(config, who, federation=FederationConfig())
    method = build_method(config, who, federation=sampled)
    state = method.init(initial(80), who)
    for round_ in range(1, 61):
        participants = draw(80, sampled, who.seed, round_)
        state, info = method.merge(state, participants, trained(method.plan(state, participants), who.names))
        assert info.numbers["disagreement_after"] <= info.numbers["disagreement_before"]
    with pytest.raises(ConfigError, match="among 8 clients"):
        build_method(published("random", strength=1.0, server_lr=0.4), who, federation=sampled)


def test_a_subgraph_nobody_planned_is_still_checked() -> None:
    who, few = clients(80), FederationConfig(rounds=1, participation=0.1)
    method = build_method(published("random", strength=1.0, server_lr=0.2), who, federation=few)
    everybody = Participants(2, tuple(range(80)))
    state = method.init(initial(80), who)
    with pytest.raises(ConfigError, match="among 80 clients"):
        method.merge(state, everybody, trained(method.plan(state, everybody), who.names))


# ----------------------------------------------------------------------------------------------------------------- mira


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [published(strength=0), mira(strength=0), mira("labels", strength=0)])
def test_strength_zero_equals_local_only_bit_for_bit(config: MiraConfig, dtype: torch.dtype) -> None:
    names = clients().names
    local, other = build_method(LOCAL, clients()), build_method(config, clients())
    alone, mixed = fresh(local, dtype), fresh(other, dtype)
    for round_, ids in enumerate(ROUNDS, start=1):
        alone, mixed = (play(m, s, names, [ids], first=round_) for m, s in ((local, alone), (other, mixed)))
        assert same_bytes(mixed.adapters.values_KP, alone.adapters.values_KP)


def test_boundless_strength_is_the_weighted_mean_of_each_task() -> None:
    values_SP, state = one_round(build_method(mira("labels", strength=1e9), clients()), EVERYBODY.ids)
    for task in "ab":
        ids = [k for k in range(6) if clients().tasks[k] == task]
        mean = mixing_twin.weighted_mean([values_SP[k] for k in ids], [clients().num_examples_K[k] for k in ids])
        assert torch.allclose(state.adapters.values_KP[ids], mean.expand(3, -1), atol=1e-7)


def test_boundless_strength_on_the_complete_graph_is_fedit() -> None:
    _, state = one_round(build_method(mira("uniform", strength=1e9), clients()), EVERYBODY.ids)
    _, averaged = one_round(build_method(FEDIT, clients()), EVERYBODY.ids)
    assert torch.allclose(state.adapters.values_KP, averaged.adapters.values_KP, atol=1e-7)


def test_confidence_is_size_over_mean_size_times_decay_per_round_of_all_since() -> None:
    who, config = clients(), mira("random", strength=0.8)
    method = build_method(config, who)
    state = play(method, fresh(method), who.names, ROUNDS[:3])
    assert state.last_round_K == (3, 2, 3, 3, 2, 3)
    size = np.array(who.num_examples_K) / np.mean(who.num_examples_K)
    # the third was a round of four of the six
    decay = config.staleness_decay ** (4 / 6)
    confidence = size * np.array([1, decay, 1, 1, decay, 1])
    matrix = implicit_matrix(known.random(6, 0), 0.8, confidence.tolist())
    expected = matrix @ state.memory["uploads"].numpy()
    assert np.allclose(state.adapters.values_KP, expected, rtol=0, atol=1e-12)


def test_a_round_of_few_clients_makes_nobody_fresh_again() -> None:
    who, everybody = clients(), (0, 1, 2, 3, 4, 5)
    method = build_method(mira_with("labels", staleness_decay=0.5), who)

    def after(state: State, participants: Participants, failed: tuple[int, ...] = ()) -> State:
        results = trained(method.plan(state, participants), who.names, set(failed))
        return method.merge(state, participants, results)[0]

    state = fresh(method)
    for round_, failed in enumerate([(), (0,), (0, 1, 2), (0, 2, 3, 4, 5)], start=1):
        state = after(state, Participants(round_, everybody), failed)
    # what has gone by since each returned, in rounds of all: 5/6, 3/6 and 1/6
    assert state.memory["away"].tolist() == pytest.approx([9 / 6, 0, 4 / 6, 1 / 6, 1 / 6, 1 / 6])
    size = np.array(who.num_examples_K) / np.mean(who.num_examples_K)
    confidence = (size * 0.5 ** state.memory["away"].numpy()).tolist()
    expected = implicit_matrix(known.labels(who.tasks), 1.0, confidence) @ state.memory["uploads"].numpy()
    assert np.allclose(state.adapters.values_KP, expected, rtol=0, atol=1e-12)
    # a checkpoint of before this was kept counts rounds, whoever took part
    older = replace(state, memory={name: value for name, value in state.memory.items() if name != "away"})
    later = after(older, Participants(5, (1,)))
    assert later.memory["away"].tolist() == pytest.approx([3 + 1 / 6, 0, 2 + 1 / 6, 1 + 1 / 6, 1 + 1 / 6, 1 + 1 / 6])


def test_stored_uploads_stay_as_sent_so_that_nobody_is_mixed_twice() -> None:
    who, method = clients(), build_method(mira("uniform", strength=0.7), clients())
    state = play(method, fresh(method), who.names, ROUNDS[:1])
    sent = state.memory["uploads"].clone()
    later = play(method, state, who.names, [(4,), (4,), (4,)], first=2)
    assert same_bytes(later.memory["uploads"][[0, 1, 3]], sent[[0, 1, 3]])
    # but what an absent client would get follows its neighbours
    assert not torch.allclose(later.adapters.values_KP[0], state.adapters.values_KP[0], atol=1e-3)
    # and where nobody returned, mixing again changes nothing, not even the confidences
    nobody = Participants(2, (4,))
    empty = trained(method.plan(state, nobody), who.names, failed={4})
    again, _ = method.merge(state, nobody, empty)
    expected = implicit_matrix(known.uniform(6), 0.7, _confidence_after_first_round())
    assert np.allclose(again.adapters.values_KP, expected @ sent.numpy(), rtol=0, atol=1e-12)


def _confidence_after_first_round() -> list[float]:
    sizes = clients().num_examples_K
    return [sizes[k] / float(np.mean(sizes)) if k in ROUNDS[0] else 0.0 for k in range(6)]


def test_who_was_seen_long_ago_is_not_a_stranger() -> None:
    # its neighbours and it fade together, and keep what they have between them
    who = clients(4)._replace(num_examples_K=(5,) * 4, tasks=("a", "b", "b", "a"))
    method = build_method(mira_with("labels", staleness_decay=0.01, client_strength={"client-0": 0.1}), who)
    state = method.init(initial(4, torch.float64), who)
    sent_SP = initial(4, torch.float64).values_KP + torch.tensor([[10.0], [0.0], [0.0], [10.0]])
    everybody = Participants(1, (0, 1, 2, 3))
    state, _ = method.merge(state, everybody, Results(everybody.ids, sent_SP, (), 0, 0, 0.0))
    # 0.01 to the power of 400 is less than any number
    state = replace(state, memory={**state.memory, "away": torch.full((4,), 400.0, dtype=torch.float64)})
    later = Participants(400, (1, 2))
    state, _ = method.merge(state, later, Results(later.ids, sent_SP[1:3], (), 0, 0, 0.0))
    assert torch.allclose(state.adapters.values_KP[[0, 3]], sent_SP[[0, 3]])


def test_a_client_never_seen_starts_from_its_neighbours_or_else_from_the_mean_of_all() -> None:
    values_SP, state = one_round(build_method(mira("labels"), clients()), (0, 2))
    untouched = initial(dtype=torch.float64).values_KP
    # client 4 shares the task of 0 and 2: with equal weights it lies midway between their mixed adapters
    midway = (state.adapters.values_KP[0] + state.adapters.values_KP[2]) / 2
    assert torch.allclose(state.adapters.values_KP[4], midway, rtol=0, atol=1e-12)
    assert not torch.allclose(state.adapters.values_KP[4], untouched[4], atol=1e-3)
    sizes = clients().num_examples_K
    mean = (sizes[0] * state.adapters.values_KP[0] + sizes[2] * state.adapters.values_KP[2]) / (sizes[0] + sizes[2])
    assert torch.allclose(state.adapters.values_KP[[1, 3, 5]], mean.expand(3, -1), rtol=0, atol=1e-12)
    assert values_SP.shape[0] == 2
    # the Gram graph knows nothing about clients never seen
    _, learned = one_round(build_method(mira("gram"), clients()), (0, 1, 2, 3))
    weights = torch.tensor(sizes[:4], dtype=torch.float64) / sum(sizes[:4])
    mean = weights @ learned.adapters.values_KP[:4]
    assert torch.allclose(learned.adapters.values_KP[4:], mean.expand(2, -1), rtol=0, atol=1e-12)
    # without any strength everybody stays alone
    _, alone = one_round(build_method(mira("gram", strength=0.0), clients()), (0, 1, 2, 3))
    assert same_bytes(alone.adapters.values_KP[4:], untouched[4:])


@pytest.mark.parametrize("kind", ["labels", "gram"])
def test_a_factor_of_one_for_everybody_changes_no_bit(kind: str) -> None:
    names, config = clients().names, mira(kind)
    ones = config.model_copy(update={"client_strength": dict.fromkeys(names, 1.0)})
    plain, same = (play(m, fresh(m), names, ROUNDS) for m in (build_method(c, clients()) for c in (config, ones)))
    assert same_bytes(same.adapters.values_KP, plain.adapters.values_KP)


def test_factors_scale_how_hard_each_client_is_pulled() -> None:
    """c_k (x_k - w_k) + tau f_k sum_l a_kl (x_k - x_l) = 0, solved as it stands; f_k = 0 keeps every bit of w_k."""
    who, factors_K = clients(), np.array([2.0, 0.0, 1.0, 0.3, 0.0, 7.0])
    config = mira("uniform", strength=0.8).model_copy(
        update={"client_strength": dict(zip(who.names, factors_K.tolist(), strict=True))}
    )
    state = play(method := build_method(config, who), fresh(method), who.names, [EVERYBODY.ids])
    uploads = state.memory["uploads"]
    size_KK = np.diag(np.array(who.num_examples_K) / np.mean(who.num_examples_K))
    pulled_KK = size_KK + 0.8 * np.diag(factors_K) @ laplacian(known.uniform(6))
    expected = np.linalg.solve(pulled_KK, size_KK @ uploads.numpy())
    assert np.allclose(state.adapters.values_KP, expected, rtol=0, atol=1e-12)
    assert same_bytes(state.adapters.values_KP[[1, 4]], uploads[[1, 4]])


def test_of_a_learned_graph_the_warm_up_is_checked_before_the_first_round() -> None:
    who = clients()
    graph = GraphConfig(kind="gram")
    bold = MiraPublishedConfig(name="mira_published", graph=graph, strength=1.0, server_lr=0.5)
    # everybody with everybody has the eigenvalue K: 0.5 * 6 is beyond 2, 0.5 * 3 is not
    with pytest.raises(ConfigError, match="makes the explicit step diverge"):
        build_method(bold, who)
    build_method(bold, who, federation=FederationConfig(participation=0.5))
    build_method(bold.model_copy(update={"graph": graph.model_copy(update={"warmup": "none"})}), who)


def test_a_factor_for_nobody_is_refused_with_the_nearest_name() -> None:
    config = MiraConfig(client_strength={"client-9": 2.0})
    with pytest.raises(
        ConfigError, match=r"client_strength names 'client-9', which is no client; did you mean 'client-"
    ):
        build_method(config, clients())
    with pytest.raises(ValueError, match="client_strength has no effect with strength = 0"):
        MiraConfig(client_strength={"client-0": 2.0}, strength=0.0)


def test_a_question_about_an_average_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"choice\.average = false has no effect where there is no average"):
        MiraConfig.model_validate({"ema_decay": 0.0, "choice": {"average": False}})


def test_nobody_mixes_before_a_graph_agrees_with_that_of_a_round_before() -> None:
    who, method = clients(), build_method(mira("gram", settled=0.8, warmup="none"), clients())
    local = build_method(LOCAL, clients())
    names = who.names
    warm, alone = (play(m, fresh(m), names, [EVERYBODY.ids]) for m in (method, local))
    assert same_bytes(warm.adapters.values_KP, alone.adapters.values_KP)
    warm, alone = (play(m, s, names, [EVERYBODY.ids], first=2) for m, s in ((method, warm), (local, alone)))
    assert not torch.allclose(warm.adapters.values_KP, alone.adapters.values_KP, atol=1e-3)


def test_the_learned_graph_needs_a_low_rank_adapter() -> None:
    prompts = Arena(Layout((TensorSpec("prompt", "prompt", "", (4, 10), 0),)), torch.zeros(6, 40))
    with pytest.raises(ConfigError, match="low-rank"):
        build_method(mira("gram"), clients()).init(prompts, clients())
