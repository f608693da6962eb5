"""Batched generation answers as PEFT does one prompt at a time."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
import torch
from tests.reference.generation_twin import client_by_client, one_by_one
from tests.reference.tiny_models import FAMILIES, layout_of_kind, random_arena, tiny_layout, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, DeepseekV3Config, DiffLlamaConfig, GenerationConfig

from fedmira.config.run import AdapterConfig, ModelConfig
from fedmira.data.packing import pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.errors import SetupError
from fedmira.evaluation import generation
from fedmira.evaluation.generation import generate
from fedmira.model import cache, inference
from fedmira.model.arena import lora_layout
from fedmira.model.base import BaseModel, freeze, load_base
from fedmira.model.body import Norm
from fedmira.model.buckets import CacheBucket, Growing, Newest, Pair
from fedmira.model.kinds import initial_adapters

END = 2


class Words:
    """A tokenizer whose tokens are numbers: just what generation asks of one."""

    eos_token_id = END
    pad_token_id: int | None = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return " ".join(str(token) for token in tokens)


def base_of(family: str) -> BaseModel:
    # the stock Gemma 2 gives NaN for padded prompts in float64: it lowers the float64 mask to float32, which overflows
    dtype = torch.float32 if family == "gemma2" else torch.float64
    return freeze(tiny_model(family, dtype), Words(), f"tiny-{family}")


def random_prompts(counts: tuple[int, ...], seed: int = 0) -> list[list[np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [
        [draw.integers(3, 97, size=int(draw.integers(1, 20))).astype(np.int32) for _ in range(count)]
        for count in counts
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("batch_sequences", [1, 4, 64])
def test_batches_answer_as_peft_does_one_by_one(family: str, batch_sequences: int) -> None:
    base = base_of(family)
    arena = random_arena(tiny_layout(base, family), 4, base.dtype)
    prompts = random_prompts((3, 0, 4, 2))
    expected = one_by_one(base, arena, prompts, 12, END)
    answers = generate(base, arena, prompts, 12, batch_sequences=batch_sequences)
    assert answers == expected
    assert len({answer for client in answers for answer in client}) > 2, "the prompts must matter"


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "full"])
def test_other_kinds_of_adapters_answer_one_by_one(family: str, kind: str) -> None:
    base = base_of(family)
    arena = initial_adapters(base, layout_of_kind(base, kind), 4, seed=3)
    noise = torch.randn(arena.values_KP.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = max(0.1, 0.5 * float(arena.values_KP.std()))
    arena = arena.replace(arena.values_KP + scale * noise.to(arena.values_KP))
    prompts = random_prompts((3, 0, 4, 2))
    expected = one_by_one(base, arena, prompts, 12, END)
    for batch_sequences in (2, 64):
        assert generate(base, arena, prompts, 12, batch_sequences=batch_sequences) == expected
    others = arena.replace(arena.values_KP[[2, 1, 0, 3]])
    assert generate(base, others, prompts, 12) != expected, "the adapters must matter"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_known_families_grow(family: str) -> None:
    cache.check_growing(base_of(family))


def test_a_model_that_keeps_something_else_is_found_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**FAMILIES["llama"][1], "vocab_size": 90}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(DiffLlamaConfig(**settings)).double().eval()
    # older transformers do not pass the packing on
    with pytest.raises(SetupError, match=r"looks back twice in one layer|its packed logits differ"):
        cache.check_growing(freeze(model, Words(), "twice"))
    base = replace(base_of("qwen3"), body=None)
    original = Newest.look_back
    monkeypatch.setattr(Newest, "look_back", lambda *arguments: 1.1 * original(*arguments))
    with pytest.raises(SetupError, match=r"its logits differ by .*evaluation\.generation\.enabled to false"):
        cache.check_growing(base)


def test_values_may_have_a_size_of_their_own() -> None:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    routed = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    settings = {**FAMILIES["llama"][1], **latent, **routed, "num_experts_per_tok": 2, "first_k_dense_replace": 2}
    config = DeepseekV3Config(**{**settings, "num_key_value_heads": settings["num_attention_heads"]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = freeze(AutoModelForCausalLM.from_config(config).float().eval(), Words(), "latent")
    cache.check_growing(base)
    # adapters that do nothing, as PEFT does not know the family
    arena = initial_adapters(base, lora_layout(base, AdapterConfig(rank=2)), 1, 0)
    [prompts] = random_prompts((3,))
    [answers] = generate(base, arena, [prompts], 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.from_numpy(prompt).long()[None]
        for _ in range(6):
            with torch.no_grad():
                newest = base.model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()
            tokens = torch.cat([tokens, newest[None, None]], dim=1)
        new = tokens[0, len(prompt) :].tolist()
        assert answer == " ".join(map(str, takewhile(lambda token: token != END, new)))


def test_virtual_tokens_take_room_in_the_context() -> None:
    """A prompt loses its beginning so that virtual tokens, what is left of it and the answer fit together."""
    base = base_of("llama")
    arena = initial_adapters(base, layout_of_kind(base, "prompt"), 1, seed=3)
    long = np.arange(200, dtype=np.int32) % 90 + 3
    room = base.max_length - arena.layout.num_virtual_tokens - 6
    assert generate(base, arena, [[long]], 6) == one_by_one(base, arena, [[long[-room:]]], 6, END)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_the_body_written_out_answers_as_the_stock_model_does(family: str) -> None:
    base = base_of(family)
    assert base.body is not None
    arena = random_arena(tiny_layout(base, family), 3, base.dtype)
    prompts = random_prompts((3, 1, 4))
    start = np.arange(3, 20, dtype=np.int32)
    prompts[2] = [np.concatenate([start, prompt]) for prompt in prompts[2]]
    expected = generate(replace(base, body=None), arena, prompts, 12)
    assert generate(base, arena, prompts, 12) == expected
    assert one_by_one(base, arena, prompts, 12, END) == expected


def test_an_answer_ends_at_the_end_token() -> None:
    base = base_of("llama")
    arena = random_arena(tiny_layout(base, "llama"), 1)
    prompts = random_prompts((12,), seed=4)
    full = one_by_one(base, arena, prompts, 12, END)
    stop = int(full[0][0].split()[3])
    base.model.generation_config.eos_token_id = [END, stop]
    (answers,) = generate(base, arena, prompts, 12)
    assert answers == [" ".join(takewhile(lambda word: word != str(stop), answer.split())) for answer in full[0]]
    assert len(answers[0].split()) == 3
    never = next(token for token in range(97) if str(token) not in " ".join(full[0]).split())
    assert generate(base, arena, prompts, 12, ends=[never]) == [answers], "the model's own count as well"
    base.model.generation_config.eos_token_id = END
    assert generate(base, arena, prompts, 12, ends=[stop]) == [answers]


def test_sampling_and_penalties_of_the_model_are_left_out_and_put_back() -> None:
    base = base_of("llama")
    arena = random_arena(tiny_layout(base, "llama"), 1)
    prompts = random_prompts((4,))
    expected = generate(base, arena, prompts, 12)
    theirs = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=END, pad_token_id=0)
    base.model.generation_config = theirs
    assert generate(base, arena, prompts, 12) == expected
    assert base.model.generation_config is theirs


def test_a_tokenizer_without_a_pad_token_changes_nothing() -> None:
    base = base_of("gpt2")
    arena = random_arena(tiny_layout(base, "gpt2"), 2)
    prompts = random_prompts((3, 3))
    expected = generate(base, arena, prompts, 8)
    base.tokenizer.pad_token_id = None
    assert generate(base, arena, prompts, 8) == expected


def test_a_prompt_that_fills_the_context_loses_its_beginning() -> None:
    base = base_of("gpt2")
    arena = random_arena(tiny_layout(base, "gpt2"), 1)
    prompt = np.random.default_rng(0).integers(3, 97, size=140).astype(np.int32)
    answers = generate(base, arena, [[prompt]], 10)
    assert answers == one_by_one(base, arena, [[prompt[-118:]]], 10, END)


def test_a_prompt_that_loses_its_beginning_keeps_its_start_token() -> None:
    base = base_of("llama")
    base.tokenizer.bos_token_id = 1
    arena = random_arena(tiny_layout(base, "llama"), 1)
    draw = np.random.default_rng(0)
    prompts = [np.append(1, draw.integers(3, 97, size=139)).astype(np.int32) for _ in range(6)]
    kept = [np.append(prompt[:1], prompt[-117:]) for prompt in prompts]
    expected = one_by_one(base, arena, [kept], 10, END)
    assert generate(base, arena, [prompts], 10) == expected
    assert expected != one_by_one(base, arena, [[prompt[-118:] for prompt in prompts]], 10, END)


def test_a_prompt_with_room_for_one_token_keeps_its_last() -> None:
    assert generation._shortened(np.array([1, 5]), 1, 1).tolist() == [5]


def test_prompts_of_very_different_lengths_and_numbers_do_not_disturb_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # one bucket for each length, so that sequences of different lengths are arranged anew as others leave
    monkeypatch.setattr(cache, "_CPU_BUCKET_BYTES", 1.0)
    base = base_of("mistral")
    arena = random_arena(tiny_layout(base, "mistral"), 3, base.dtype)
    draw = np.random.default_rng(5)
    lengths = ([100, 1, 1, 40, 3, 7, 99], [2], [60, 61])
    prompts = [[draw.integers(3, 97, size=length).astype(np.int32) for length in client] for client in lengths]
    base.model.generation_config.eos_token_id = list(range(50, 60))
    answers = generate(base, arena, prompts, 20, batch_sequences=5)
    full = one_by_one(base, arena, prompts, 20, END)
    ended = [[" ".join(takewhile(lambda word: int(word) not in range(50, 60), a.split())) for a in c] for c in full]
    assert answers == ended
    assert len({len(answer.split()) for client in answers for answer in client}) > 3, (
        "answers must end at different steps"
    )


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_rare_looks_change_no_answer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(family)
    arena = random_arena(tiny_layout(base, family), 3, base.dtype)
    prompts = random_prompts((4, 1, 3))
    base.model.generation_config.eos_token_id = list(range(50, 60))
    expected = generate(base, arena, prompts, 20, batch_sequences=5)
    # as on a GPU
    monkeypatch.setattr(generation, "_CPU_STEPS_BETWEEN_LOOKS", 8)
    monkeypatch.setattr(cache, "_CPU_BUCKET_BYTES", 1e8)
    assert generate(base, arena, prompts, 20, batch_sequences=5) == expected
    assert len({len(answer.split()) for client in expected for answer in client}) > 2, "answers must differ in length"


@pytest.mark.usefixtures("two_threads")
def test_two_parts_side_by_side_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    arena = random_arena(tiny_layout(base, "llama"), 4, base.dtype)
    # as many tokens on both sides within the second client's
    prompts = random_prompts((2, 9, 0, 3))
    base.model.generation_config.eos_token_id = list(range(50, 60))
    expected = generate(base, arena, prompts, 20, batch_sequences=6)
    written: list[tuple[str, int]] = []
    write = generation._Writer.write

    def noting(self: generation._Writer, answers: Sequence[generation._Answer]) -> None:
        written.append((threading.current_thread().name, len(answers)))
        write(self, answers)

    monkeypatch.setattr(generation._Writer, "write", noting)
    monkeypatch.setattr(generation, "_FEWEST_ROWS", 3)
    assert generate(base, arena, prompts, 20, batch_sequences=6) == expected
    assert sum(count for _, count in written) == 14
    assert len({name for name, _ in written}) == 2, "both parts have a thread"


def test_without_memory_answers_are_written_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    arena = random_arena(tiny_layout(base, "llama"), 2)
    prompts = random_prompts((3, 2))
    expected = generate(base, arena, prompts, 6)
    monkeypatch.setattr(generation, "available_bytes", lambda device: 0)
    held: list[int] = []
    rows = cache.KeyValueCache.rows

    def counting(
        self: cache.KeyValueCache, names_B: list[int | None], clients: list[int]
    ) -> AbstractContextManager[None]:
        held.append(len(names_B))
        return rows(self, names_B, clients)

    monkeypatch.setattr(cache.KeyValueCache, "rows", counting)
    assert generate(base, arena, prompts, 6) == expected
    assert max(held) == 1


def test_keys_that_moved_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """While sequences are arranged anew one module at a time is held twice, not the whole cache."""
    base = base_of("llama")
    held: list[StorageWeakRef] = []
    alive = []
    allocate = CacheBucket.allocate

    def noting(self: CacheBucket, module: Hashable, like: Pair) -> Pair:
        pair = allocate(self, module, like)
        held.extend(StorageWeakRef(states.untyped_storage()) for states in pair)
        alive.append(sum(not storage.expired() for storage in held))
        return pair

    monkeypatch.setattr(CacheBucket, "allocate", noting)
    growing = cache.KeyValueCache(base, random_arena(tiny_layout(base, "llama"), 1, base.dtype))
    prompts = [TokenizedExample(np.array([5, 6, 7]), 2, ""), TokenizedExample(np.array([8, 9]), 1, "")]
    with torch.inference_mode():
        growing.read(pack([prompts]), [Growing(0, 2, 4), Growing(1, 1, 4)])
        for names in ([0, 1], [1]):
            with growing.rows(names, [0]):
                growing.advance(torch.tensor(names))
    # keys and values of two modules, arranged twice
    assert alive[:3] == [2, 4, 6]
    assert alive[3] < 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rms_norms_are_those_of_training(dtype: torch.dtype) -> None:
    """In 16 bits PyTorch's own rounds once where transformers rounds twice."""
    random = torch.Generator().manual_seed(0)
    norm = Norm(torch.randn(48, generator=random).to(dtype), None, 1e-5)
    x_Nd = torch.randn(500, 48, generator=random).to(dtype)
    rounding = 0.0 if dtype == torch.bfloat16 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(inference.normalised(norm, x_Nd), norm(x_Nd)[0], rtol=rounding, atol=0.0)


def test_a_client_that_diverged_leaves_the_others_alone() -> None:
    base = base_of("llama")
    arena = random_arena(tiny_layout(base, "llama"), 3, base.dtype)
    prompts = random_prompts((3, 2, 3))
    expected = generate(base, arena, prompts, 12)
    diverged = arena.values_KP.clone()
    diverged[1] = torch.nan
    answers = generate(base, arena.replace(diverged), prompts, 12)
    assert (answers[0], answers[2]) == (expected[0], expected[2])
    assert len(answers[1]) == 2


def test_no_prompts_no_answers() -> None:
    base = base_of("llama")
    assert generate(base, random_arena(tiny_layout(base, "llama"), 2), [[], []], 5) == [[], []]
    with pytest.raises(ValueError, match="2 adapters cannot answer for 1"):
        generate(base, random_arena(tiny_layout(base, "llama"), 2), [[]], 5)
    with pytest.raises(ValueError, match="prompt 1 of client 0 is empty"):
        generate(base, random_arena(tiny_layout(base, "llama"), 1), [[np.array([3]), np.array([])]], 5)


def test_the_embedded_base_answers_as_transformers_does_client_by_client() -> None:
    base = load_base(ModelConfig(device="cpu"))
    arena = random_arena(lora_layout(base, AdapterConfig()), 3, torch.float32)
    arena = arena.replace(0.1 * arena.values_KP)
    words = [
        "Name a colour.",
        "Copy the word lamp, then the word door.",
        "How many legs has a dog? Answer with a number.",
    ]
    tokens = [np.asarray(base.tokenizer.encode(f"{text}\n"), dtype=np.int32) for text in words]
    prompts = [tokens, tokens[::-1], tokens[:2]]
    answers = generate(base, arena, prompts, 24)
    assert answers == client_by_client(base, arena, prompts, 24, base.tokenizer.eos_token_id)
    assert len({answer for client in answers for answer in client}) > 3, "adapters and prompts must matter"
