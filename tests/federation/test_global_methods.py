"""Methods with one global model: their equations on a few clients, and what they reduce to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.federation.builders import CONFIGS, FEDIT, clients, initial, layout, play, same_bytes, trained
from tests.reference import mixing_twin, products_twin

from fedmira.config.method import FedAdamConfig, FedKSeedConfig, FedProxConfig, FloristConfig
from fedmira.federation.method import Method, State
from fedmira.federation.products import in_products
from fedmira.federation.registry import build_method
from fedmira.federation.shifting import pair_bytes
from fedmira.types import Arena, Job, Participants, Results, SeedPool

ROUNDS = [(0, 1, 3), (1, 2, 4), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)]
IDS = (0, 3, 4)
SHARES = [clients().num_examples_K[k] / sum(clients().num_examples_K[j] for j in IDS) for k in IDS]


def fresh(method: Method, dtype: torch.dtype = torch.float64) -> State:
    return method.init(initial(dtype=dtype), clients())


def one_round(name: str, ids: tuple[int, ...] = IDS) -> tuple[Job, Results, State]:
    method = build_method(CONFIGS[name], clients())
    state = fresh(method)
    job = method.plan(state, Participants(1, ids))
    results = trained(job, clients().names)
    return job, results, method.merge(state, Participants(1, ids), results)[0]


def whole(state: State) -> dict[str, torch.Tensor]:
    """Per layer what the first client's model adds to the base: its adapter and the shift, scaled."""
    products = products_twin.dense(state.adapters, 0)
    scaled = {layer: state.adapters.layout.scaling * product for layer, product in products.items()}
    if "shift" not in state.memory:
        return scaled
    parts = torch.split(state.memory["shift"], [product.numel() for product in scaled.values()])
    return {
        layer: product + part.view_as(product) for (layer, product), part in zip(scaled.items(), parts, strict=True)
    }


def exact_mean(results: Results) -> dict[str, torch.Tensor]:
    """Per layer the mean of the scaled products of the returned adapters, weighted by training examples."""
    of = layout()
    products = products_twin.mixed(Arena(of, results.values_SP), SHARES)
    return {layer: of.scaling * product for layer, product in products.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for layer, expected in other.items():
        torch.testing.assert_close(one[layer], expected, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- fedprox


def test_fedprox_pulls_each_client_to_what_it_downloaded() -> None:
    method = build_method(FedProxConfig(name="fedprox", strength=0.3), clients())
    state = play(method, fresh(method), clients().names, ROUNDS[:2])
    job = method.plan(state, Participants(3, IDS))
    assert job.pull is not None
    assert same_bytes(job.pull.target_SP, job.start_SP)
    assert job.pull.strength_S == (0.3,) * 3


def test_fedprox_without_strength_is_fedit() -> None:
    method, plain = build_method(FedProxConfig(name="fedprox", strength=0), clients()), build_method(FEDIT, clients())
    one, other = (play(m, fresh(m), clients().names, ROUNDS) for m in (method, plain))
    assert same_bytes(one.adapters.values_KP, other.adapters.values_KP)
    pull = method.plan(one, Participants(5, IDS)).pull
    assert pull is not None
    assert set(pull.strength_S) == {0}


# ------------------------------------------------------------------------------------------------------------- fedkseed


def test_fedkseed_is_fedit_whose_clients_move_along_seeds() -> None:
    config = FedKSeedConfig(name="fedkseed", seeds=7, epsilon=0.02)
    method, plain = build_method(config, clients()), build_method(FEDIT, clients())
    one, other = (play(m, fresh(m), clients().names, ROUNDS) for m in (method, plain))
    assert same_bytes(one.adapters.values_KP, other.adapters.values_KP)
    job = method.plan(one, Participants(5, IDS))
    assert job.seeds == SeedPool(7, 0.02)
    assert job._replace(seeds=None, start_SP=IDS) == plain.plan(other, Participants(5, IDS))._replace(start_SP=IDS)


def test_fedkseed_sends_no_sums_before_somebody_has_returned() -> None:
    method, who = build_method(CONFIGS["fedkseed"], clients()), clients()
    state = fresh(method)
    for round_, failed in ((1, set(IDS)), (2, {0})):
        job = method.plan(state, Participants(round_, IDS))
        assert job.download == frozenset()
        assert job.upload == {"lora_a", "lora_b"}
        state, _ = method.merge(state, Participants(round_, IDS), trained(job, who.names, failed))
    # also for a client that takes part for the first time
    assert method.plan(state, Participants(3, (5,))).download == {"lora_a", "lora_b"}


# ----------------------------------------------------------------------------------------------------- ffa_lora, rolora


def test_ffa_lora_moves_and_sends_b_alone_and_its_mean_is_the_mean_of_the_products() -> None:
    job, results, state = one_round("ffa_lora")
    assert job.trainable == job.upload == job.download == {"lora_b"}
    for part in layout().slices("lora_a"):
        assert same_bytes(state.adapters.values_KP[:, part], initial(dtype=torch.float64).values_KP[:, part])
    assert_same(whole(state), exact_mean(results))


def test_rolora_alternates_b_and_a_and_both_means_are_exact() -> None:
    method, who = build_method(CONFIGS["rolora"], clients()), clients()
    state = fresh(method)
    for round_, (moving, resting) in enumerate([("lora_b", "lora_a"), ("lora_a", "lora_b")] * 2, start=1):
        participants = Participants(round_, IDS)
        job = method.plan(state, participants)
        assert job.trainable == job.upload == {moving}
        # what rests is with those who took part in the round before, what moved then is not
        assert job.download == ({"lora_a", "lora_b"} if round_ == 1 else {resting})
        assert method.plan(state, Participants(round_, (1, 3))).download == {"lora_a", "lora_b"}
        results = trained(job, who.names)
        before = state.adapters.values_KP
        state, _ = method.merge(state, participants, results)
        for part in layout().slices(resting):
            assert same_bytes(state.adapters.values_KP[:, part], before[:, part])
        assert_same(whole(state), exact_mean(results))


def test_ffa_lora_of_one_client_is_that_client_training_b_alone() -> None:
    """Reduction: with nobody else to average with, round after round, no server shows."""
    alone = clients(1)
    method = build_method(CONFIGS["ffa_lora"], alone)
    state = method.init(initial(1, torch.float64), alone)
    own_SP = state.adapters.values_KP.clone()
    for round_ in range(1, 4):
        state = play(method, state, alone.names, [(0,)], first=round_)
        job = Job(round_, (0,), own_SP, frozenset(), frozenset({"lora_b"}), frozenset())
        own_SP = trained(job, alone.names).values_SP
        assert same_bytes(state.adapters.values_KP, own_SP)
        assert same_bytes(method.personalise(state).values_KP, own_SP)


@pytest.mark.parametrize("ids", [IDS, tuple(range(6))])
def test_each_round_of_rolora_is_one_of_fedit_in_which_one_factor_rests(ids: tuple[int, ...]) -> None:
    rolora, fedit, who = (
        build_method(CONFIGS["rolora"], clients()),
        build_method(CONFIGS["fedit"], clients()),
        clients(),
    )
    one, other = fresh(rolora), fresh(fedit)
    for round_, moving in enumerate(["lora_b", "lora_a"] * 2, start=1):
        participants = Participants(round_, ids)
        one, _ = rolora.merge(one, participants, trained(rolora.plan(one, participants), who.names))
        job = fedit.plan(other, participants)._replace(trainable=frozenset({moving}))
        other, _ = fedit.merge(other, participants, trained(job, who.names))
        torch.testing.assert_close(one.adapters.values_KP, other.adapters.values_KP, rtol=0, atol=1e-14)
        assert one.last_round_K == other.last_round_K


# -------------------------------------------------------------------------------------------------------------- fedadam


def test_server_adam_on_two_rounds_by_hand() -> None:
    config = FedAdamConfig(name="fedadam", server_lr=0.1, beta1=0.5, beta2=0.75, adaptivity=0.2)
    method, who = build_method(config, clients()), clients()
    state = fresh(method)
    theta = state.adapters.values_KP[0].clone()
    first, second = torch.zeros_like(theta), torch.full_like(theta, 0.04)
    for round_ in (1, 2):
        participants = Participants(round_, IDS)
        results = trained(method.plan(state, participants), who.names)
        change = mixing_twin.weighted_mean(list(results.values_SP), SHARES) - theta
        first = 0.5 * first + 0.5 * change
        second = 0.75 * second + 0.25 * change * change
        theta = theta + 0.1 * first / (second.sqrt() + 0.2)
        state, _ = method.merge(state, participants, results)
        torch.testing.assert_close(state.adapters.values_KP, theta.expand(6, -1), rtol=0, atol=1e-13)


def test_server_momentum_goes_on_in_the_direction_of_before() -> None:
    method, who = build_method(CONFIGS["fedadam-momentum"], clients()), clients()
    state = play(method, fresh(method), who.names, ROUNDS[:1])
    participants = Participants(2, (1, 2))
    unmoved = trained(method.plan(state, participants), who.names)
    unmoved = unmoved._replace(values_SP=state.adapters.values_KP[[1, 2]])
    after, _ = method.merge(state, participants, unmoved)
    moved = state.adapters.values_KP[0] - fresh(method).adapters.values_KP[0]
    torch.testing.assert_close(
        after.adapters.values_KP[0], state.adapters.values_KP[0] + 0.9 * moved, rtol=0, atol=1e-13
    )


def test_server_momentum_without_memory_is_fedit() -> None:
    config = FedAdamConfig(name="fedadam", rule="momentum", beta1=0, server_lr=1)
    method, plain = build_method(config, clients()), build_method(FEDIT, clients())
    one, other = (play(m, fresh(m), clients().names, ROUNDS) for m in (method, plain))
    torch.testing.assert_close(one.adapters.values_KP, other.adapters.values_KP, rtol=0, atol=1e-13)


def test_a_setting_without_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match="beta2 has no effect with rule = momentum"):
        FedAdamConfig(name="fedadam", rule="momentum", beta2=0.5)


# ---------------------------------------------------------------------------------------------------- flexlora, hetlora


@pytest.mark.parametrize("name", ["flexlora", "flexlora-unaligned"])
def test_flexlora_is_the_nearest_pair_to_the_mean_of_the_products(name: str) -> None:
    _, results, state = one_round(name)
    nearest = {layer: products_twin.nearest_of_rank(product, 2) for layer, product in exact_mean(results).items()}
    assert_same(whole(state), nearest)
    assert all(same_bytes(row, state.adapters.values_KP[0]) for row in state.adapters.values_KP)


def test_flexlora_of_one_client_keeps_its_product() -> None:
    _, results, state = one_round("flexlora", ids=(4,))
    one = products_twin.dense(Arena(layout(), results.values_SP), 0)
    assert_same(whole(state), {layer: 2.0 * product for layer, product in one.items()})


def test_alignment_keeps_flexlora_near_what_clients_had() -> None:
    job, _, turned = one_round("flexlora")
    _, _, plain = one_round("flexlora-unaligned")
    moved, unaligned = (float((s.adapters.values_KP[0] - job.start_SP[0]).norm()) for s in (turned, plain))
    assert moved < unaligned


def test_flexlora_turns_its_pair_towards_that_of_before_the_round() -> None:
    job, results, state = one_round("flexlora")
    before = Arena(layout(), job.start_SP[:1])
    expected = in_products(np.array([SHARES]), reference=before)(Arena(layout(), results.values_SP))
    torch.testing.assert_close(state.adapters.values_KP, expected.values_KP.expand(6, -1), rtol=0, atol=1e-12)


def test_hetlora_weighs_clients_by_the_norm_of_their_products() -> None:
    _, results, state = one_round("hetlora")
    arena = Arena(layout(), results.values_SP)
    norms = [
        math.sqrt(sum(float(part.square().sum()) for part in products_twin.dense(arena, row).values()))
        for row in range(3)
    ]
    expected = mixing_twin.weighted_mean(list(results.values_SP), norms)
    torch.testing.assert_close(state.adapters.values_KP, expected.expand(6, -1), rtol=0, atol=1e-13)


def test_hetlora_hears_those_that_returned_this_round_alone() -> None:
    method, who = build_method(CONFIGS["hetlora"], clients()), clients()
    state = play(method, fresh(method), who.names, [IDS])
    results = trained(method.plan(state, Participants(2, (1, 2))), who.names)
    after, _ = method.merge(state, Participants(2, (1, 2)), results)
    norms = [
        math.sqrt(
            sum(
                float(part.square().sum())
                for part in products_twin.dense(Arena(layout(), results.values_SP), row).values()
            )
        )
        for row in range(2)
    ]
    expected = mixing_twin.weighted_mean(list(results.values_SP), norms)
    torch.testing.assert_close(after.adapters.values_KP, expected.expand(6, -1), rtol=0, atol=1e-13)


def test_hetlora_of_clients_that_do_nothing_yet_weighs_examples() -> None:
    method = build_method(CONFIGS["hetlora"], clients())
    state = fresh(method)
    results = trained(method.plan(state, Participants(1, IDS)), clients().names)
    idle = results._replace(values_SP=initial(3, torch.float64).values_KP * torch.arange(1.0, 4.0)[:, None].double())
    after, _ = method.merge(state, Participants(1, IDS), idle)
    expected = mixing_twin.weighted_mean(list(idle.values_SP), SHARES)
    torch.testing.assert_close(after.adapters.values_KP[0], expected, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------- fedex_lora, flora, florist


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_with_the_shift_the_model_is_the_mean_of_the_products(name: str) -> None:
    _, results, state = one_round(name)
    assert_same(whole(state), exact_mean(results))


def test_fedex_keeps_the_mean_of_the_factors() -> None:
    _, results, state = one_round("fedex_lora")
    expected = mixing_twin.weighted_mean(list(results.values_SP), SHARES)
    torch.testing.assert_close(state.adapters.values_KP[0], expected, rtol=0, atol=1e-13)


def test_fedex_of_one_client_needs_no_shift() -> None:
    _, _, state = one_round("fedex_lora", ids=(4,))
    assert float(state.memory["shift"].abs().max()) < 1e-13


def test_rounds_of_flora_add_up_and_start_from_fresh_pairs() -> None:
    method, who = build_method(CONFIGS["flora"], clients()), clients()
    state = fresh(method)
    total = torch.zeros_like(state.memory["shift"])
    starts = [state.adapters.values_KP[0]]
    for round_ in (1, 2):
        results = trained(method.plan(state, Participants(round_, IDS)), who.names)
        state, _ = method.merge(state, Participants(round_, IDS), results)
        total = total + torch.cat([product.flatten() for product in exact_mean(results).values()])
        torch.testing.assert_close(state.memory["shift"], total, rtol=0, atol=1e-12)
        starts.append(state.adapters.values_KP[0])
        assert all(not state.adapters.values_KP[:, part].any() for part in layout().slices("lora_b"))
    assert not torch.equal(starts[1], starts[2])
    assert not torch.equal(starts[0], starts[1])


def test_fresh_pairs_are_drawn_as_far_as_first_ones() -> None:
    method, who = build_method(CONFIGS["flora"], clients()), clients()
    of = layout(rank=4, features=((50, 4), (30, 6)))
    state = method.init(initial(dtype=torch.float64, of=of), who)
    results = trained(method.plan(state, Participants(1, IDS)), who.names)
    state, _ = method.merge(state, Participants(1, IDS), results)
    for spec in of.specs:
        # A is uniform in +-1/sqrt(I)
        bound = spec.shape[1] ** -0.5 if spec.group == "lora_a" else 0.0
        assert 0.9 * bound <= float(state.adapters.view(spec).abs().max()) <= bound


def test_florist_keeps_the_share_of_the_energy_and_all_of_it_is_flora() -> None:
    _, results, exact = one_round("flora")
    everything = build_method(FloristConfig(name="florist", energy=1.0), clients())
    state, _ = everything.merge(fresh(everything), Participants(1, IDS), results)
    torch.testing.assert_close(state.memory["shift"], exact.memory["shift"], rtol=0, atol=1e-12)
    method = build_method(FloristConfig(name="florist", energy=0.7), clients())
    state, info = method.merge(fresh(method), Participants(1, IDS), results)
    ranks = []
    for layer, product in exact_mean(results).items():
        values = torch.linalg.svdvals(product)
        energy = (values**2).cumsum(0) / (values**2).sum()
        ranks.append(int((energy < 0.7).sum()) + 1)
        torch.testing.assert_close(
            whole(state)[layer], products_twin.nearest_of_rank(product, ranks[-1]), rtol=0, atol=1e-12
        )
    assert info.numbers["merged_rank"] == pytest.approx(np.mean(ranks))
    assert max(ranks) < 4


def test_the_shift_costs_the_factors_that_a_client_misses_and_never_more_than_the_dense_matrices() -> None:
    method, who = build_method(CONFIGS["flora"], clients()), clients()
    state = fresh(method)
    job = method.plan(state, Participants(1, (4,)))
    assert (job.shift_bytes, job.download) == (0, frozenset())
    state = play(method, state, who.names, [(4,)])
    # one client of rank 2: (5 + 4) * 2 and (3 + 6) * 2 numbers of 8 bytes, less than the 20 and 18 of the matrices
    assert method.plan(state, Participants(2, (4,))).shift_bytes == 8 * (9 * 2 + 9 * 2)
    assert (
        method.plan(state, Participants(2, (4,))).shift_bytes == method.plan(state, Participants(2, (0,))).shift_bytes
    )
    state = play(method, state, who.names, [(4,)], first=2)
    # client 4 knows the first round's; client 0 misses two rounds' factors, which the dense matrices undercut
    assert method.plan(state, Participants(3, (4,))).shift_bytes == 8 * 36
    assert method.plan(state, Participants(3, (0,))).shift_bytes == 8 * 38
    assert method.plan(state, Participants(3, (0, 4))).shift_bytes == 8 * 37
    # three clients of rank 2 would need 9 * 6 numbers a layer: dense is less
    state = play(method, state, who.names, [(0, 4, 5)], first=3)
    assert method.plan(state, Participants(4, (4,))).shift_bytes == 8 * 38


def test_a_component_costs_its_bytes_unless_it_is_0_in_both_factors() -> None:
    b_OQ, a_QI = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert pair_bytes(b_OQ, a_QI, 4) == 2 * (1 + 2) * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_shift_is_kept_in_float32_at_least(dtype: torch.dtype) -> None:
    state = fresh(build_method(CONFIGS["flora"], clients()), dtype)
    assert state.memory["shift"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_clients_are_judged_over_the_shifted_base() -> None:
    for name in ("fedex_lora", "flora", "florist"):
        method = build_method(CONFIGS[name], clients())
        state = play(method, fresh(method), clients().names, ROUNDS)
        kept, job = method.personalise(state), method.plan(state, Participants(5, IDS))
        assert kept.shift_W is not None
        assert job.shift_W is not None
        assert same_bytes(kept.shift_W, job.shift_W)
        assert float(kept.shift_W.abs().max()) > 0
