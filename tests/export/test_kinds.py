"""Soft prompts are exported as peft keeps them and whole models as transformers does: both load and answer alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.export.test_peft import SETTINGS, peft_logits, tiny_model, write
from tests.reference.tiny_models import COMMON, LLAMA_LIKE, layout_of_kind
from transformers import AutoModelForCausalLM

from fedmira.data.packing import pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.export.card import model_card
from fedmira.export.peft import adapter_files, new_folder
from fedmira.export.whole_model import write_model
from fedmira.model.adapted import AdaptedModel
from fedmira.model.base import BaseModel, freeze
from fedmira.model.full import one_by_one
from fedmira.model.kinds import initial_adapters
from fedmira.types import Arena

TOKENS_T = torch.randint(97, (12,), generator=torch.Generator().manual_seed(2))


def trained_arena(base: BaseModel, kind: str) -> Arena:
    arena = initial_adapters(base, layout_of_kind(base, kind), 2, seed=0)
    noise = torch.randn(arena.values_KP.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return arena.replace(arena.values_KP + noise.to(arena.values_KP))


def engine_logits(base: BaseModel, arena: Arena, row: int) -> torch.Tensor:
    """Of every token but the last, through the stock body; all of them count as supervised."""
    stock = dataclasses.replace(base, body=None)
    example = TokenizedExample(TOKENS_T.numpy(), 1, "text")
    batch = pack([[example]], virtual_tokens=arena.layout.num_virtual_tokens)
    one = arena.replace(arena.values_KP[row : row + 1])
    with torch.no_grad(), AdaptedModel(stock, one) as adapted:
        return base.logits(adapted.hidden(batch))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_peft_loads_a_soft_prompt_and_gives_the_engines_logits(family: str, kind: str, tmp_path: Path) -> None:
    base = freeze(tiny_model(family), None, family)
    arena = trained_arena(base, kind)
    write(tmp_path / "adapter", adapter_files(arena.layout, arena.values_KP[1], SETTINGS))
    model = tiny_model(family)
    model.load_state_dict(base.model.state_dict())
    loaded = peft_logits(model, tmp_path / "adapter", TOKENS_T)[arena.layout.num_virtual_tokens : -1]
    torch.testing.assert_close(loaded, engine_logits(base, arena, 1), rtol=1e-5, atol=1e-5)
    assert float((loaded - engine_logits(base, arena, 0)).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_the_folder_states_what_peft_states(kind: str, tmp_path: Path) -> None:
    """What PEFT itself saves of the loaded adapter agrees with what was written."""
    from peft import PeftModel

    base = freeze(tiny_model("llama"), None, "llama")
    arena = trained_arena(base, kind)
    write(tmp_path / "ours", adapter_files(arena.layout, arena.values_KP[0], SETTINGS))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "ours"))
    loaded.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    ours, theirs = (json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("ours", "theirs"))
    assert ours["peft_type"] == {"prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING"}[kind]
    # PEFT names the base by where it found it
    ours.pop("base_model_name_or_path")
    assert ours == {name: theirs[name] for name in ours}
    tensors = [load_file(tmp_path / of / "adapter_model.safetensors") for of in ("ours", "theirs")]
    assert list(tensors[0]) == list(tensors[1]) == ["prompt_embeddings"]
    assert torch.equal(tensors[0]["prompt_embeddings"], tensors[1]["prompt_embeddings"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_whole_model_loads_and_gives_the_engines_logits(family: str, tmp_path: Path) -> None:
    base = freeze(tiny_model(family), None, family)
    arena = trained_arena(base, "full")
    for number, _ in enumerate(one_by_one(base, arena)):
        with new_folder(tmp_path / str(number)) as folder:
            write_model(folder, base, model_card("some/base", kind="full"))
    for number in range(2):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert type(loaded) is type(base.model)
        with torch.no_grad():
            logits_TV = loaded(input_ids=TOKENS_T[None], use_cache=False).logits[0, :-1]
        torch.testing.assert_close(logits_TV, engine_logits(base, arena, number), rtol=1e-5, atol=1e-5)
    assert "PeftModel" not in (tmp_path / "0" / "README.md").read_text()


FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TEXT = {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = {
    "text_config": TEXT,
    "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 4,
    "image_token_index": 92,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Qwen3MoeConfig", {**LLAMA_LIKE, **FEW, "head_dim": 8}), ("Gemma3Config", SEES), ("GPT2Config", COMMON)],
)
def test_a_whole_model_has_the_tensors_that_its_family_is_published_with(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 5 stacks experts and renames modules while it loads; other tools know the published names."""
    if name == "GPT2Config":
        settings = {**settings, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    made = AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).float()
    made.save_pretrained(tmp_path / "published")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published").float()
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", freeze(model, None, name), model_card("some/base", kind="full"))
    published, ours = (load_file(tmp_path / of / "model.safetensors") for of in ("published", "ours"))
    assert list(ours) == list(published)
    assert all(torch.equal(ours[key], published[key]) for key in ours)
