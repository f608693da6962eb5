"""The fused body computes what the stock model with hooks computes, forwards and backwards."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.reference.engine_twin import exact_norms
from tests.reference.tiny_models import FAMILIES, random_arena, random_examples, tiny_base, tiny_layout, tiny_model

from fedmira.config.run import AdapterConfig
from fedmira.data.packing import PackedBatch, pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.model import attention, families, low_rank
from fedmira.model.adapted import AdaptedModel
from fedmira.model.arena import lora_layout
from fedmira.model.base import BaseModel, freeze
from fedmira.model.families import fused_body
from fedmira.model.lora import ALL_GROUPS
from fedmira.model.low_rank import Way
from fedmira.types import Arena, Layout, TensorSpec

FUSED = ("gpt2", "llama", "qwen2", "mistral")
LEAST_ALONE = [0, 150, 10**6]
"""All sequences stand alone, some do, none does."""


def stock_of(base: BaseModel) -> BaseModel:
    """The same weights without a fused body, its norms in float64 as the fused ones are."""
    model = copy.deepcopy(base.model)
    exact_norms(model)
    return BaseModel(model, None, base.name)


def examples_with_prefixes() -> list[tuple[TokenizedExample, ...]]:
    """Four clients: three ragged examples, none, two, and four that begin with the same twelve tokens."""
    clients = [random_examples(count, seed=count, longest=30) for count in (3, 0, 2, 4)]
    prefix = np.arange(5, 17, dtype=np.int32)
    clients[3] = tuple(
        TokenizedExample(np.concatenate([prefix, e.tokens]), e.prompt_length + 12, e.id) for e in clients[3]
    )
    return clients


def run(
    base: BaseModel, arena: Arena, batch: PackedBatch, trainable: frozenset[str] = ALL_GROUPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (M, d) of the supervised rows and the gradients (C, P) of a random function of them."""
    gradient_CP = torch.zeros_like(arena.values_KP)
    hidden_Md = AdaptedModel(base, arena, gradient_CP=gradient_CP, trainable=trainable).hidden(batch)
    draw = torch.Generator().manual_seed(1)
    drawn_Md = torch.randn(hidden_Md.shape, dtype=torch.float64, generator=draw)
    (hidden_Md * drawn_Md.to(hidden_Md.dtype)).sum().backward()
    return hidden_Md.detach(), gradient_CP


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize(("share_prefixes", "most_together"), [(False, 100), (True, 100), (True, 8), (True, 10**6)])
@pytest.mark.parametrize("least_alone", LEAST_ALONE)
def test_equals_the_stock_model_with_hooks(
    family: str, share_prefixes: bool, most_together: int, least_alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_LEAST_ALONE", least_alone)
    # a million reach further than any call: what begins with a prefix then lies in buckets, too
    monkeypatch.setattr(attention, "MOST_TOGETHER", most_together)
    base = tiny_base(family)
    assert base.body is not None
    arena = random_arena(tiny_layout(base, family), 4)
    clients = examples_with_prefixes()
    expected = run(stock_of(base), arena, pack(clients, share_prefixes=False))
    batch = pack(clients, share_prefixes)
    assert (len(batch.tokens_N) < sum(batch.tokens_per_client)) == share_prefixes
    for fused, stock in zip(run(base, arena, batch), expected, strict=True):
        assert stock.abs().max() > 1
        torch.testing.assert_close(fused, stock, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", ["all-linear", ("c_fc", "up_proj"), ("q_proj", "v_proj", "down_proj", "c_attn")])
def test_any_targets(family: str, targets: str | tuple[str, ...]) -> None:
    base = tiny_base(family)
    assert base.body is not None
    names = {layer.rsplit(".", 1)[-1] for layer in base.body.layers}
    chosen = targets if isinstance(targets, str) else tuple(t for t in targets if t in names)
    arena = random_arena(lora_layout(base, AdapterConfig(rank=3, targets=chosen)), 4)
    batch = pack(examples_with_prefixes())
    for fused, stock in zip(run(base, arena, batch), run(stock_of(base), arena, batch), strict=True):
        torch.testing.assert_close(fused, stock, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", ["self_attn.v_proj", "mlp.down_proj"])
def test_blocks_below_the_lowest_adapted_one_take_no_part_in_the_backward_pass(layer: str) -> None:
    base = tiny_base("llama")
    layout = lora_layout(base, AdapterConfig(rank=3, targets=(f"model.layers.1.{layer}",)))
    arena = random_arena(layout, 4)
    batch = pack(examples_with_prefixes())
    for fused, stock in zip(run(base, arena, batch), run(stock_of(base), arena, batch), strict=True):
        torch.testing.assert_close(fused, stock, rtol=1e-9, atol=1e-9)
    hidden_Md = AdaptedModel(base, arena, gradient_CP=torch.zeros_like(arena.values_KP)).hidden(batch)
    names = []
    node = hidden_Md.grad_fn
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    assert sum("_Attention" in name for name in names) == 1


@pytest.mark.parametrize("trainable", ["lora_a", "lora_b"])
def test_frozen_groups_get_no_gradient(trainable: str) -> None:
    base = tiny_base("llama")
    arena = random_arena(tiny_layout(base, "llama"), 4)
    batch = pack(examples_with_prefixes())
    _, everything_CP = run(base, arena, batch)
    _, gradient_CP = run(base, arena, batch, frozenset({trainable}))
    for group in ("lora_a", "lora_b"):
        for columns in arena.layout.slices(group):
            wanted = everything_CP[:, columns] if group == trainable else torch.zeros(4, columns.stop - columns.start)
            torch.testing.assert_close(gradient_CP[:, columns], wanted.to(gradient_CP.dtype), rtol=1e-12, atol=1e-12)


def test_the_order_of_an_adapters_tensors_does_not_matter() -> None:
    base = tiny_base("llama")
    layout = tiny_layout(base, "llama")
    arena = random_arena(layout, 4)
    specs: list[TensorSpec] = []
    for spec in sorted(layout.specs, key=lambda spec: spec.name):
        offset = sum(s.size for s in specs)
        specs.append(TensorSpec(spec.name, spec.group, spec.layer, spec.shape, offset))
    other = Arena(Layout(tuple(specs), layout.scaling), torch.empty_like(arena.values_KP))
    places = {spec.name: spec for spec in layout.specs}
    for spec in specs:
        other.view(spec).copy_(arena.view(places[spec.name]))
    batch = pack(examples_with_prefixes())
    hidden, gradient_CP = run(base, arena, batch)
    other_hidden, other_gradient_CP = run(base, other, batch)
    torch.testing.assert_close(other_hidden, hidden, rtol=1e-12, atol=1e-12)
    for spec in specs:
        torch.testing.assert_close(
            other.replace(other_gradient_CP).view(spec), arena.replace(gradient_CP).view(places[spec.name])
        )


@pytest.mark.parametrize("least_alone", LEAST_ALONE)
def test_a_client_that_is_not_finite_does_not_reach_the_others(
    least_alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_LEAST_ALONE", least_alone)
    base = tiny_base("llama")
    arena = random_arena(tiny_layout(base, "llama"), 4)
    batch = pack(examples_with_prefixes())
    hidden_Md, gradient_CP = run(base, arena, batch)
    broken = arena.replace(arena.values_KP.clone())
    broken.values_KP[2] = float("nan")
    broken_Md, broken_CP = run(base, broken, batch)
    start = sum(batch.supervised_per_client[:2])
    of_broken = torch.zeros(len(hidden_Md), dtype=torch.bool)
    of_broken[start : start + batch.supervised_per_client[2]] = True
    assert broken_Md[of_broken].isnan().all()
    assert torch.equal(broken_Md[~of_broken], hidden_Md[~of_broken])
    assert torch.equal(broken_CP[[0, 1, 3]], gradient_CP[[0, 1, 3]])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", FUSED)
def test_a_base_in_16_bits_multiplies_with_rounded_weights_and_keeps_wide_gradients(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = tiny_model(family, torch.bfloat16)
    exact = freeze(tiny_model(family, torch.bfloat16).double(), None, "exact")
    arena = random_arena(tiny_layout(exact, family), 4, torch.float32)
    batch = pack(examples_with_prefixes())
    hidden_Md, gradient_CP = run(exact, arena.replace(arena.values_KP.double()), batch)
    on_a_cpu = freeze(rounded, None, "rows in 32 bits")
    monkeypatch.setattr(families, "state_dtype", lambda weight: weight.dtype)
    as_on_a_gpu = freeze(rounded, None, "rows in 16 bits")
    stock = replace(as_on_a_gpu, body=None)
    distances: dict[object, tuple[float, float]] = {}
    for base, dtype in ((on_a_cpu, torch.float32), (as_on_a_gpu, torch.bfloat16), (stock, torch.bfloat16)):
        found_Md, found_CP = run(base, arena, batch)
        assert found_Md.dtype == dtype
        assert found_CP.dtype == torch.float32
        distances[dtype if base.body is not None else "stock"] = (
            distance(found_Md, hidden_Md),
            distance(found_CP, gradient_CP),
        )
    for of_hidden, of_gradient in distances.values():
        assert of_hidden < 0.02
        assert of_gradient < 0.05
    for of_wide, of_narrow in zip(distances[torch.float32], distances[torch.bfloat16], strict=True):
        assert of_wide < of_narrow


@pytest.mark.parametrize("way", ["masked", "grouped"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_ways_of_a_gpu_in_16_bits_are_near_the_exact_one(
    family: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    exact = freeze(tiny_model(family, torch.bfloat16).double(), None, "exact")
    # kernels want multiples of eight
    arena = random_arena(tiny_layout(exact, family, rank=8), 4, torch.float32)
    batch = pack(examples_with_prefixes())
    hidden_Md, gradient_CP = run(exact, arena.replace(arena.values_KP.double()), batch)
    monkeypatch.setattr(families, "state_dtype", lambda weight: weight.dtype)
    narrow = freeze(tiny_model(family, torch.bfloat16), None, "as on a GPU")
    by_segments = run(narrow, arena, batch)
    taken = []

    def forced(*_: object) -> Way:
        taken.append(way)
        return way

    monkeypatch.setattr(low_rank, "_way", forced)
    found_Md, found_CP = run(narrow, arena, batch)
    assert taken, "the way was not asked for"
    assert (found_Md.dtype, found_CP.dtype) == (torch.bfloat16, torch.float32)
    assert not found_CP[1].any(), "a client without examples"
    assert distance(found_Md, hidden_Md) < 0.03
    assert distance(found_CP, gradient_CP) < 0.05
    # no farther from the exact ones than the plain way in 16 bits is, but for luck
    assert distance(found_CP, gradient_CP) < 1.5 * distance(by_segments[1], gradient_CP)
    for client in (0, 2, 3):
        assert distance(found_CP[client], gradient_CP[client]) < 0.1


@pytest.mark.parametrize("narrow_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_written_later_are_seen(dtype: torch.dtype, narrow_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if narrow_rows:
        monkeypatch.setattr(families, "state_dtype", lambda weight: weight.dtype)
    base = freeze(tiny_model("llama", dtype), None, "tiny")
    arena = random_arena(tiny_layout(base, "llama"), 4, torch.float32)
    batch = pack(examples_with_prefixes())
    with torch.no_grad():
        adapted = AdaptedModel(base, arena)
        before_Md = adapted.hidden(batch)
        arena.values_KP.mul_(0.5)
        assert torch.equal(adapted.hidden(batch), AdaptedModel(base, arena).hidden(batch))
        assert not torch.equal(adapted.hidden(batch), before_Md)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_stacking_keeps_names_and_values(family: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    body = fused_body(model)
    assert (body is not None) == (family in FUSED)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_config_that_asks_for_something_else_has_no_fused_body(family: str, setting: str, value: object) -> None:
    model = tiny_model(family)
    setattr(model.config, setting, value)
    assert fused_body(model) is None
