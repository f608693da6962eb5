"""Soft prompts and whole models are trained as PEFT, or traditional fine-tuning, trains each client alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from tests.reference.engine_twin import exact_norms, train_one_by_one
from tests.reference.tiny_models import FAMILIES, layout_of_kind, ragged_clients, random_examples, tiny_base
from tests.training.test_equals_peft import OPTIMIZERS

from fedmira.config.training import TrainingConfig
from fedmira.data.packing import pack
from fedmira.evaluation.loss import evaluate_loss
from fedmira.model.base import BaseModel
from fedmira.model.full import full_layout
from fedmira.model.kinds import initial_adapters
from fedmira.training.cohort import StopRequested, train
from fedmira.training.memory import activation_bytes_per_token, choose_cohort_size
from fedmira.types import Arena, ClientReport, Job, Layout, Pull

SEED = 5
KINDS = ("prompt", "p_tuning", "full")
PROMPTS = ("prompt", "p_tuning")


def arena_of(base: BaseModel, layout: Layout, num_clients: int, seed: int = 3) -> Arena:
    """Adapters that differ from client to client."""
    arena = initial_adapters(base, layout, num_clients, seed)
    noise = torch.randn(arena.values_KP.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return arena.replace(arena.values_KP + 0.05 * noise.to(arena.values_KP))


def job_of(layout: Layout, start_SP: torch.Tensor, trainable: frozenset[str] | None = None) -> Job:
    groups = frozenset(layout.groups)
    return Job(2, tuple(range(len(start_SP))), start_SP, groups, trainable or groups, groups)


def trained(
    base: BaseModel, layout: Layout, job: Job, training: TrainingConfig, cohort_size: int = 4
) -> tuple[torch.Tensor, tuple[ClientReport, ...]]:
    size = 1 if layout.groups == ("full",) else cohort_size
    clients = ragged_clients()
    return train(base, layout, job, clients, training, total_rounds=3, seed=SEED, cohort_size=size, dropout=0.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw clipped", "sgd with momentum"])
def test_a_cohort_equals_clients_trained_alone(family: str, kind: str, name: str) -> None:
    training = OPTIMIZERS[name]
    if kind == "full":
        # here weights decay towards the base's and not towards 0
        training = training.model_copy(update={"weight_decay": 0.0})
    base = tiny_base(family)
    # the stock norms round to float32, which hides every error below 1e-7
    exact_norms(base.model)
    layout = layout_of_kind(base, kind)
    start_SP = arena_of(base, layout, 4).values_KP
    job = job_of(layout, start_SP.clone())

    expected_SP, expected_losses = train_one_by_one(base, layout, job, ragged_clients(), training, SEED)
    rows_SP, reports = trained(base, layout, job, training)

    assert torch.equal(job.start_SP, start_SP), "the start belongs to the caller"
    for group in layout.groups:
        for client in range(4):
            moved = max(float((expected_SP - start_SP)[client, part].abs().max()) for part in layout.slices(group))
            assert moved > 1e-4, "every client must have moved in every group"
    torch.testing.assert_close(rows_SP, expected_SP, rtol=0, atol=1e-9)
    assert [report.loss_sum for report in reports] == pytest.approx(expected_losses, abs=1e-9)
    assert all(report.failure == "" for report in reports)


@pytest.mark.parametrize("trainable", ["prompt", "encoder"])
def test_a_frozen_group_of_a_prompt_encoder_and_a_pull_equal_peft(trainable: str) -> None:
    training = OPTIMIZERS["adamw clipped"]
    base = tiny_base("llama")
    layout = layout_of_kind(base, "p_tuning")
    start_SP = arena_of(base, layout, 4).values_KP
    pull = Pull(arena_of(base, layout, 4, seed=11).values_KP, strength_S=(0.3, 0.3, 0.3, 0.3))
    job = job_of(layout, start_SP, frozenset({trainable}))._replace(pull=pull)
    expected_SP, _ = train_one_by_one(base, layout, job, ragged_clients(), training, SEED)
    rows_SP, _ = trained(base, layout, job, training)
    torch.testing.assert_close(rows_SP, expected_SP, rtol=0, atol=1e-9)
    for group in layout.groups:
        for part in layout.slices(group):
            assert torch.equal(rows_SP[:, part], start_SP[:, part]) == (group != trainable)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PROMPTS)
def test_the_fused_and_the_stock_body_agree(family: str, kind: str) -> None:
    """Cohort by cohort or client by client, with the body written out or without it."""
    training = OPTIMIZERS["plain sgd"]
    base = tiny_base(family)
    stock = dataclasses.replace(base, body=None)
    layout = layout_of_kind(base, kind)
    job = job_of(layout, arena_of(base, layout, 4).values_KP)
    rows_SP, _ = trained(base, layout, job, training)
    # the stock norms and capped attention of the others round to float32
    tolerance = 1e-9 if family == "gpt2" else 1e-5
    torch.testing.assert_close(trained(stock, layout, job, training, 1)[0], rows_SP, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_weights_of_the_base_are_its_own_again(family: str) -> None:
    base = tiny_base(family)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    layout = layout_of_kind(base, "full")
    arena = arena_of(base, layout, 4)
    examples = [client.train for client in ragged_clients()][:4]
    trained(base, layout, job_of(layout, arena.values_KP), OPTIMIZERS["plain sgd"])
    evaluate_loss(base, arena, examples, 64)
    poisoned = arena.values_KP.clone()
    poisoned[0, 0] = torch.nan
    trained(base, layout, job_of(layout, poisoned), OPTIMIZERS["plain sgd"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.model.parameters())


def test_tied_embeddings_are_one_tensor_of_the_adapter() -> None:
    tied, untied = tiny_base("gpt2"), tiny_base("llama")
    assert "lm_head.weight" not in [spec.name for spec in layout_of_kind(tied, "full").specs]
    assert "lm_head.weight" in [spec.name for spec in layout_of_kind(untied, "full").specs]
    for base in (tied, untied):
        assert layout_of_kind(base, "full").num_parameters == base.num_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_is_not_finite_leaves_alone(kind: str) -> None:
    training = OPTIMIZERS["plain sgd"]
    base = tiny_base("llama")
    layout = layout_of_kind(base, kind)
    start_SP = arena_of(base, layout, 4).values_KP
    healthy_SP, _ = trained(base, layout, job_of(layout, start_SP), training)
    poisoned_SP = start_SP.clone()
    poisoned_SP[1] = torch.nan
    rows_SP, reports = trained(base, layout, job_of(layout, poisoned_SP), training)
    assert [bool(report.failure) for report in reports] == [False, True, False, False]
    assert "client-1" in reports[1].failure
    torch.testing.assert_close(rows_SP, healthy_SP[[0, 2, 3]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_continues_bit_for_bit(kind: str) -> None:
    training = OPTIMIZERS["adamw clipped"]
    base = tiny_base("gpt2")
    layout = layout_of_kind(base, kind)
    job = job_of(layout, arena_of(base, layout, 4).values_KP)
    size = 1 if kind == "full" else 2
    arguments = {"total_rounds": 3, "seed": SEED, "cohort_size": size, "dropout": 0.0}
    whole_SP, _ = train(base, layout, job, ragged_clients(), training, **arguments)
    asked = iter(range(1000))
    with pytest.raises(StopRequested) as stopped:
        train(base, layout, job, ragged_clients(), training, should_stop=lambda: next(asked) == 6, **arguments)
    resumed = {**arguments, "progress": stopped.value.progress}
    rows_SP, _ = train(base, layout, job, ragged_clients(), training, **resumed)
    assert torch.equal(rows_SP, whole_SP)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_each_client_alone(kind: str) -> None:
    """However many clients and examples are judged together; and an adapter does change them."""
    base = tiny_base("llama")
    layout = layout_of_kind(base, kind)
    arena = arena_of(base, layout, 3)
    examples = [client.train for client in ragged_clients((4, 0, 6))]
    together = evaluate_loss(base, arena, examples, 4096)
    assert together[1] == (0.0, 0)
    for client in (0, 2):
        alone = [
            evaluate_loss(base, arena.replace(arena.values_KP[client : client + 1]), [[example]], 1)[0]
            for example in examples[client]
        ]
        assert together[client][0] == pytest.approx(math.fsum(loss for loss, _ in alone), abs=1e-9)
        other = evaluate_loss(base, arena.replace(arena.values_KP[1:2]), [examples[client]], 4096)[0]
        assert abs(other[0] - together[client][0]) > 1e-6


def test_virtual_tokens_are_there_once_per_client() -> None:
    first, _, second = (client.train for client in ragged_clients((3, 1, 2)))
    batch = pack([first, [], second], virtual_tokens=4)
    plain = pack([first, [], second])
    assert batch.rows_per_client == (plain.rows_per_client[0] + 4, 0, plain.rows_per_client[2] + 4)
    assert batch.tokens_per_client == plain.tokens_per_client
    assert [prefix.length for prefix in batch.prefixes] == [0, 4, 4, 0, 4]
    assert batch.positions_N[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(batch.labels_M, plain.labels_M)
    # the token after a supervised row is its label, or the row is the last of its sequence
    assert torch.equal(batch.tokens_N[batch.supervised_rows_M], plain.tokens_N[plain.supervised_rows_M])


def test_a_prompt_is_drawn_from_the_vocabulary_and_the_same_for_all() -> None:
    base = tiny_base("llama")
    layout = layout_of_kind(base, "prompt")
    few, many = initial_adapters(base, layout, 2, 7), initial_adapters(base, layout, 6, 7)
    assert torch.equal(many.values_KP, few.values_KP[:1].expand(6, -1))
    words = base.model.get_input_embeddings().weight.float()
    for token in few.view(layout.specs[0])[0].float():
        assert bool((words == token).all(dim=1).any())
    assert not torch.equal(initial_adapters(base, layout, 2, 8).values_KP, few.values_KP)


def test_clients_with_weights_of_their_own_are_trained_one_at_a_time() -> None:
    base = tiny_base("llama")
    full, prompt = layout_of_kind(base, "full"), layout_of_kind(base, "prompt")
    training = TrainingConfig(batch_size=2)
    assert choose_cohort_size(base, full, ragged_clients(), training, 10**12) == 1
    assert choose_cohort_size(base, prompt, ragged_clients(), training, 10**12) == 5
    assert activation_bytes_per_token(base, full) > 0
    with pytest.raises(ValueError, match="one at a time"):
        train(
            base,
            full,
            job_of(full, arena_of(base, full, 2).values_KP),
            ragged_clients(),
            training,
            total_rounds=1,
            seed=0,
            cohort_size=2,
            dropout=0.0,
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_client_is_judged_with_its_own_norms_also_in_16_bits(family: str) -> None:
    base = tiny_base(family, torch.bfloat16)
    layout = full_layout(base)
    delta_1P = torch.zeros(1, layout.num_parameters)
    draw = torch.Generator().manual_seed(0)
    for spec in layout.specs:
        if len(spec.shape) == 1:
            part = slice(spec.offset, spec.offset + spec.size)
            delta_1P[0, part] = 0.5 * torch.randn(spec.size, generator=draw)
    examples = [random_examples(6, seed=1)]
    pairs = ((base, delta_1P), (replace(base, body=None), delta_1P), (base, torch.zeros_like(delta_1P)))
    own, stock, before = (
        evaluate_loss(seen, Arena(layout, values_1P), examples, 4096)[0][0] for seen, values_1P in pairs
    )
    assert own == pytest.approx(stock, rel=1e-3)
    assert abs(own - before) > 10 * abs(own - stock)
