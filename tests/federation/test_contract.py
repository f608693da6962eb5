"""What every method must do, run over all of them."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
import torch
from tests.federation.builders import (
    CONFIGS,
    ROUNDS,
    adapters,
    bits,
    build,
    clients,
    equal_bits,
    given,
    initial,
    judged,
    layout_for,
    one_round,
    play,
    same_bytes,
    start,
    trained,
)

from fedmira.config.method import MethodConfig
from fedmira.errors import FedmiraError
from fedmira.federation.joining import joined
from fedmira.federation.method import Method, State
from fedmira.federation.registry import METHODS, build_method
from fedmira.types import Arena, Clients, Participants

every_method = pytest.mark.parametrize("name", list(CONFIGS))


def test_all_methods_are_here() -> None:
    assert {name.split("-")[0] for name in CONFIGS} == set(METHODS)
    in_config = {get_args(part.model_fields["name"].annotation)[0] for part in get_args(get_args(MethodConfig)[0])}
    assert in_config == set(METHODS)


@every_method
def test_same_inputs_give_the_same_bits(name: str) -> None:
    assert equal_bits(*(play(build(name), start(name)[1], clients().names, ROUNDS) for _ in range(2)))


@every_method
def test_nothing_handed_in_is_changed_or_shared(name: str) -> None:
    method, state, who = start(name)
    state = play(method, state, who.names, ROUNDS[:2])
    participants = Participants(3, ROUNDS[2])
    before = [tensor.clone() for tensor in bits(state)]
    job = method.plan(state, participants)
    results = trained(job, who.names)
    returned = results.values_SP.clone()
    after, _ = method.merge(state, participants, results)
    trial = method.trial(after, participants, results) if method.trial else None
    if trial is not None and method.decide is not None:
        after, _ = method.decide(after, trial, judged(trial, who.names))
    kept = [tensor.clone() for tensor in bits(after)]
    results.values_SP.fill_(7.0)
    job.start_SP.fill_(7.0)
    assert all(same_bytes(tensor, copy) for tensor, copy in zip(bits(state), before, strict=True))
    assert all(same_bytes(tensor, copy) for tensor, copy in zip(bits(after), kept, strict=True))
    assert not same_bytes(results.values_SP, returned)
    arena = adapters(name)
    untouched = arena.values_KP.clone()
    fresh = method.init(arena, who)
    fresh.adapters.values_KP.fill_(7.0)
    assert same_bytes(arena.values_KP, untouched)


@every_method
def test_jobs_are_well_formed(name: str) -> None:
    method, state, who = start(name)
    groups = frozenset(layout_for(CONFIGS[name]).groups)
    for round_ in (1, 2, 3, 4):
        job = method.plan(state, Participants(round_, (1, 5)))
        assert job.round == round_
        assert set(job.ids) == {1, 5}
        assert job.trainable
        assert job.trainable | job.upload | job.download <= groups
        assert job.start_SP.shape == (len(job.ids), layout_for(CONFIGS[name]).num_parameters)
        assert torch.isfinite(job.start_SP).all()
        assert 0 < job.work <= 1
        # nobody is asked for more local work than training alone takes
        assert job.work * len(job.ids) <= 2
        if job.pull is not None:
            assert job.pull.target_SP.shape == job.start_SP.shape
            assert len(job.pull.strength_S) == len(job.ids)
        state = play(method, state, who.names, [(1, 5)], first=round_)


@every_method
def test_a_graph_comes_with_its_privacy_note_and_what_it_is_like(name: str) -> None:
    method, state, who = start(name)
    for round_, ids in enumerate(ROUNDS, start=1):
        participants = Participants(round_, ids)
        results = trained(method.plan(state, participants), who.names)
        state, info = method.merge(state, participants, results)
        infos, trial = [info], method.trial(state, participants, results) if method.trial else None
        if trial is not None and method.decide is not None:
            state, info = method.decide(state, trial, judged(trial, who.names))
            infos.append(info)
        for graph, numbers in ((info.graph, info.numbers) for info in infos if info.graph is not None):
            assert graph.provenance["privacy"]
            assert {"components", "alone"} <= set(numbers)


@every_method
def test_a_returning_client_starts_from_an_adapter_that_it_was_judged_by(name: str) -> None:
    method, state, who = start(name)
    unaveraged = build_method(CONFIGS[name].model_copy(update={"ema_decay": 0.0}), who, given(name))
    for round_, ids in enumerate(ROUNDS, start=1):
        state = play(method, state, who.names, [ids], first=round_)
        # an average over rounds of what it was judged by is what it takes home, not where it starts
        kept = unaveraged.personalise(state)
        job = method.plan(state, Participants(round_ + 1, tuple(range(6))))
        for k in range(6):
            own = [row_P for id_, row_P in zip(job.ids, job.start_SP, strict=True) if id_ == k]
            judged_by = [kept.values_KP[k]]
            if method.trial is not None:
                # it was asked about its upload and its row, and may keep one and train on from the other
                judged_by += [state.adapters.values_KP[k], state.memory.get("uploads", kept.values_KP)[k]]
            assert any(same_bytes(row_P, one_P) for row_P in own for one_P in judged_by)
        assert (job.shift_W is None) == (kept.shift_W is None)
        assert kept.shift_W is None or same_bytes(job.shift_W, kept.shift_W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@every_method
def test_state_keeps_names_shapes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    method, state, who = start(name, dtype)
    described = {key: (tensor.shape, tensor.dtype) for key, tensor in state.memory.items()}
    for round_, ids in enumerate(ROUNDS, start=1):
        state = play(method, state, who.names, [ids], first=round_)
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in state.memory.items()} == described
        size = layout_for(CONFIGS[name]).num_parameters
        assert (state.adapters.values_KP.shape, state.adapters.values_KP.dtype) == ((6, size), dtype)
        assert all(tensor.is_contiguous() and torch.isfinite(tensor).all() for tensor in bits(state))
        assert all(isinstance(last, int) for last in state.last_round_K)
        # safetensors, in which checkpoints are kept, refuses tensors that share memory
        assert len({tensor.untyped_storage().data_ptr() for tensor in bits(state)}) == len(bits(state))


@every_method
def test_a_state_put_together_from_a_checkpoint_continues_with_the_same_bits(name: str) -> None:
    method, state, who = start(name)
    halfway = play(method, state, who.names, ROUNDS[:2])
    restored = State(
        Arena(layout_for(CONFIGS[name]), halfway.adapters.values_KP.clone()),
        tuple(json.loads(json.dumps(halfway.last_round_K))),
        {key: tensor.clone() for key, tensor in halfway.memory.items()},
    )
    through = play(method, halfway, who.names, ROUNDS[2:], first=3)
    assert equal_bits(through, play(build(name), restored, who.names, ROUNDS[2:], first=3))


@every_method
def test_names_of_clients_do_not_matter(name: str) -> None:
    who, other = clients(), clients()._replace(names=tuple("uvwxyz"))
    state, renamed = start(name)[1], build(name, other).init(adapters(name), other)
    # the same training under both sets of names
    one = play(build(name), state, who.names, ROUNDS)
    assert equal_bits(one, play(build(name, other), renamed, who.names, ROUNDS))


# draws know clients by their places
DRAWN = ("random", "permuted")


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith(DRAWN)])
def test_permuting_clients_permutes_results(name: str) -> None:
    order = [4, 0, 5, 2, 1, 3]
    who = clients()
    assert who.true_adjacency_KK is not None
    shuffled = Clients(
        tuple(who.names[k] for k in order),
        tuple(who.num_examples_K[k] for k in order),
        tuple(who.tasks[k] for k in order),
        who.seed,
        who.true_adjacency_KK[np.ix_(order, order)],
    )
    rounds = [tuple(sorted(order.index(k) for k in ids)) for ids in ROUNDS]
    plain = play(build(name), build(name).init(adapters(name, dtype=torch.float64), who), who.names, ROUNDS)
    matrix = given(name)
    method = build_method(CONFIGS[name], shuffled, None if matrix is None else matrix[np.ix_(order, order)])
    moved = play(method, method.init(adapters(name, dtype=torch.float64), shuffled), shuffled.names, rounds)
    assert torch.allclose(moved.adapters.values_KP, plain.adapters.values_KP[order], rtol=0, atol=1e-10)
    assert moved.last_round_K == tuple(plain.last_round_K[k] for k in order)


@every_method
def test_a_client_whose_result_is_missing_counts_as_not_sampled(name: str) -> None:
    method, state, who = start(name)
    state = play(method, state, who.names, ROUNDS[:2])
    asked = Participants(3, (0, 1, 2, 4))
    lost, _ = one_round(method, state, who.names, asked, failed={1, 4})
    assert equal_bits(lost, one_round(method, state, who.names, Participants(3, (0, 2)))[0])
    assert lost.last_round_K == (3, 2, 3, 1, 2, 0)


@every_method
def test_a_round_in_which_nobody_returns_is_survived(name: str) -> None:
    method, state, who = start(name)
    for round_ in (1, 2):
        asked = Participants(round_, (0, 1))
        state, info = one_round(method, state, who.names, asked, failed={0, 1})
        assert info.numbers["returned"] == 0
    assert same_bytes(method.personalise(state).values_KP, adapters(name).values_KP)
    assert state.last_round_K == (0,) * 6


@every_method
def test_info_holds_finite_numbers_and_the_graph_of_all_clients(name: str) -> None:
    method, state, who = start(name)
    for round_, ids in enumerate(ROUNDS, start=1):
        participants = Participants(round_, ids)
        state, info = one_round(method, state, who.names, participants)
        assert all(isinstance(number, float) and np.isfinite(number) for number in info.numbers.values())
        assert info.numbers["returned"] == len(ids)
        if info.graph is not None:
            assert info.graph.num_clients == 6
            assert json.dumps(dict(info.graph.provenance))


@every_method
def test_results_that_cannot_be_are_refused(name: str) -> None:
    method, state, who = start(name)
    asked = Participants(1, (0, 2))
    good = trained(method.plan(state, asked), who.names)
    each = len(good.ids) // 2
    size = layout_for(CONFIGS[name]).num_parameters
    broken = good.values_SP.clone()
    broken[-1, 3] = torch.inf
    for results, message in (
        (good._replace(ids=(0, 3) * each), r"not asked \[3\]"),
        (good._replace(ids=(2, 0) * each), "ascending order"),
        (good._replace(values_SP=good.values_SP[:, 1:]), rf"have shape \(\d+, {size - 1}\), expected"),
        (
            good._replace(values_SP=good.values_SP[:1]),
            rf"have shape \(1, {size}\), expected \(2, {size}\)|2 participants answers once",
        ),
        (good._replace(values_SP=broken), r"clients \[2\] .* not finite"),
    ):
        with pytest.raises(FedmiraError, match=message):
            method.merge(state, asked, results)


def five_then_six(name: str, rounds: list[tuple[int, ...]]) -> tuple[Method, State, State]:
    """The method of six clients, the state of five after `rounds`, and that of six once the last one joined."""
    few, all_ = clients(5), clients(6)
    before = build(name, few)
    state = play(before, before.init(adapters(name, 5), few), few.names, rounds)
    method = build(name, all_)
    return method, state, joined(method, state, method.init(adapters(name), all_), len(rounds))


@every_method
def test_who_joins_before_the_first_round_was_there_from_the_start(name: str) -> None:
    method, _, state = five_then_six(name, [])
    assert equal_bits(state, method.init(adapters(name), clients()))


@every_method
def test_who_joins_changes_no_bit_of_the_others_and_is_one_never_seen(name: str) -> None:
    method, before, state = five_then_six(name, [(0, 1, 3), (1, 2, 4), (0, 2, 3, 4)])
    assert state.last_round_K == (*before.last_round_K, 0)
    assert same_bytes(state.adapters.values_KP[:5], before.adapters.values_KP)
    first = method.init(adapters(name), clients()).memory
    assert set(state.memory) == set(before.memory) == set(first)
    for key, tensor in state.memory.items():
        corner = tuple(slice(extent) for extent in before.memory[key].shape)
        assert same_bytes(tensor[corner].contiguous(), before.memory[key])
        fresh = first[key].clone()
        fresh[corner] = before.memory[key].to(fresh)
        assert same_bytes(tensor, fresh.to(tensor))
    after = play(method, state, clients().names, [(0, 5), (1, 2, 3, 4, 5), (5,)], first=4)
    assert after.last_round_K == (4, 5, 5, 5, 5, 6)
    assert all(torch.isfinite(tensor.double()).all() for tensor in bits(after))
    assert method.personalise(after).num_clients == 6


def test_an_arena_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="5 rows for 6 clients"):
        build("local_only").init(initial(5), clients())
