"""Loading a base model: what works, and what is refused with which message."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.reference.tiny_models import LLAMA_LIKE, VOCABULARY, random_examples, tiny_base, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedTokenizerFast

from fedmira.config.run import AdapterConfig, ModelConfig
from fedmira.data.packing import pack
from fedmira.errors import ConfigError, DataError, SetupError
from fedmira.evaluation.loss import evaluate_loss
from fedmira.evaluation.predictions import prompt_products
from fedmira.model.arena import adaptable_layers, initial_arena, lora_layout
from fedmira.model.base import freeze, load_base
from fedmira.model.full import full_layout
from fedmira.model.kinds import adapter_layout
from fedmira.model.source import resolve_device, resolve_dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as save_pretrained leaves it."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path)
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_local_folder_loads_frozen_in_the_dtype_asked_for(folder: Path) -> None:
    base = load_base(ModelConfig(path=str(folder), device="cpu", dtype="float64"))
    assert base.dtype == base.adapter_dtype == torch.float64
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.tokenizer.eos_token_id == 2
    assert base.max_length == 128
    facts = base.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts["weights_sha256"]) == {"model.safetensors"}


def test_the_embedded_base_loads_and_writes() -> None:
    base = load_base(ModelConfig(device="cpu"))
    assert base.dtype == base.adapter_dtype == torch.float32
    with torch.no_grad():
        hidden_ND = base.hidden(pack([random_examples(2, seed=0)]))
        assert torch.isfinite(base.logits(hidden_ND)).all()


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(SetupError, match=r"\./no-such-folder is not a folder.*safetensors"):
        load_base(ModelConfig(path="./no-such-folder"))


def test_an_unknown_hub_id_says_what_to_do_offline() -> None:
    with pytest.raises(SetupError, match=r"nobody/no-such-model.*HF_HUB_OFFLINE.*HF_TOKEN"):
        load_base(ModelConfig(path="nobody/no-such-model"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no config\.json"):
        load_base(ModelConfig(path=str(tmp_path)))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SetupError, match=r"only \.bin weights.*save_pretrained"):
        load_base(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "part.safetensors.index.json"])
def test_an_index_leads_to_no_pickle_and_out_of_no_folder(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SetupError, match=rf"'{re.escape(name)}'.*can run code.*save_pretrained"):
        load_base(ModelConfig(path=str(folder)))


def test_a_config_leads_to_no_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    edit_config(folder, transformers_weights="adapter_model.bin")
    with pytest.raises(SetupError, match=r"'adapter_model\.bin'.*can run code"):
        load_base(ModelConfig(path=str(folder)))


def test_an_index_beside_the_config_is_followed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_base(ModelConfig(path=str(folder))).num_parameters


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_of_another_shape_is_a_fault_of_the_folder(folder: Path, file: str) -> None:
    if file != "config.json":
        (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / file).write_text("[1]")
    with pytest.raises(SetupError, match=r"cannot be loaded"):
        load_base(ModelConfig(path=str(folder)))


def test_code_of_its_own_is_refused(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    with pytest.raises(SetupError, match=r"auto_map.*never runs"):
        load_base(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "someone/kernel"),
        ("attn_implementation", "someone/kernel"),
        ("experts_implementation", "someone/kernel"),
        ("text_config", {"attn_implementation": "someone/kernel"}),
    ],
)
def test_an_implementation_of_its_own_is_refused(folder: Path, key: str, value: Any) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(SetupError, match=rf"an implementation of its own \({key}.* in a local copy"):
        load_base(ModelConfig(path=str(folder)))


def test_an_adapter_is_no_base_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/model"}))
    with pytest.raises(SetupError, match=r"is an adapter \(adapter_config.json\), not a base model"):
        load_base(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("model_type", ["no-such-type", "t5", None])
def test_an_unknown_architecture_is_refused(folder: Path, model_type: str | None) -> None:
    edit_config(folder, model_type=model_type)
    with pytest.raises(SetupError, match=r"no causal language model.*GPT-2, Llama"):
        load_base(ModelConfig(path=str(folder)))


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SetupError, match=r"damaged|cannot be loaded"):
        load_base(ModelConfig(path=str(folder)))


def test_missing_weights_are_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(SetupError, match=r"lack 9 tensors of its architecture, such as model\.layers\.2"):
        load_base(ModelConfig(path=str(folder)))


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SetupError, match="tokenizer"):
        load_base(ModelConfig(path=str(folder)))


def test_a_tokenizer_of_special_tokens_alone_is_refused(folder: Path) -> None:
    """What transformers 5.3 makes of missing files: every word is unknown to it."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    with pytest.raises(SetupError, match=r"special tokens alone; its files are missing"):
        load_base(ModelConfig(path=str(folder)))


def test_fused_attention_of_older_transformers_does_not_leave_out_the_soft_cap() -> None:
    model = tiny_model("gemma2", torch.float32)
    model.config._attn_implementation = "sdpa"
    assert freeze(model, tokenizer=None, name="capped").model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SetupError, match=r"model\.device = .*allowed: auto, cpu, cuda"):
        resolve_device(name)


def test_a_family_that_scales_its_logits_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(GraniteConfig(**LLAMA_LIKE, logits_scaling=7.0))
    with pytest.raises(SetupError, match=r"family 'granite'.*logits differ"):
        freeze(model, tokenizer=None, name="scaled")


def from_config(name: str, **settings: Any) -> Any:
    config = getattr(transformers, name)(**{**LLAMA_LIKE, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        # grouped products of experts know no float64
        return AutoModelForCausalLM.from_config(config).float().eval()


def test_a_window_that_is_in_the_mask_alone_is_refused() -> None:
    few = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    with pytest.raises(SetupError, match="its sliding window is in the mask alone"):
        freeze(from_config("Qwen2MoeConfig", **few, **window), None, "experts with a window")
    freeze(from_config("Qwen2MoeConfig", **few), None, "experts without")


def test_a_router_is_no_layer_that_can_be_adapted() -> None:
    base = freeze(from_config("PhimoeConfig", num_local_experts=4), None, "routed")
    assert base.model.get_submodule("model.layers.0.mlp.router") is not None
    assert not [name for name in adaptable_layers(base) if "router" in name]


def test_virtual_tokens_are_refused_where_layers_look_tokens_up() -> None:
    model = from_config(
        "Gemma3nTextConfig",
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=6,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        intermediate_size=[48] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        laurel_rank=4,
    )
    base = freeze(model, None, "looks up")
    with pytest.raises(ConfigError, match=r"kind = prompt does not fit looks up.*use model\.adapter\.kind = lora"):
        adapter_layout(base, AdapterConfig(kind="prompt", num_virtual_tokens=2), 1)
    adapter_layout(base, AdapterConfig(rank=2), 1)


def test_prompts_are_as_wide_as_what_the_head_reads() -> None:
    base = freeze(from_config("OPTConfig", ffn_dim=40, word_embed_proj_dim=16), None, "narrow")
    assert prompt_products(base, [random_examples(2, seed=0)], 4096).shape == (1, 1)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    base = tiny_base("gpt2")
    batch = pack([[random_examples(1, seed=0)[0]._replace(tokens=torch.arange(3, 140).numpy() % 90, prompt_length=1)]])
    with pytest.raises(DataError, match=r"136 tokens.*at most 128.*data\.max_length"):
        base.hidden(batch)


def test_a_window_that_the_stock_model_does_not_know_is_none() -> None:
    """Configs of converted models may hold keys that their architecture does not read."""
    config = transformers.LlamaConfig(**LLAMA_LIKE)
    config.sliding_window = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        base = freeze(AutoModelForCausalLM.from_config(config).double().eval(), None, "llama with a window")
    assert base.body is not None
    examples = random_examples(3, seed=0, longest=60)
    assert max(len(example.tokens) for example in examples) > 20
    arena = initial_arena(lora_layout(base, AdapterConfig(rank=2)), 1, 0, torch.float64)
    [own], [stock] = (evaluate_loss(seen, arena, [examples], 4096) for seen in (base, replace(base, body=None)))
    assert own == pytest.approx(stock)


def test_longrope_reads_no_further_than_its_original_context() -> None:
    """Beyond it positions turn otherwise for a whole batch, and a client would depend on its neighbours."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    }
    settings = {**LLAMA_LIKE, "original_max_position_embeddings": 32, "rope_parameters": rope}
    config = transformers.Phi3Config(**settings)
    assert freeze(AutoModelForCausalLM.from_config(config).double().eval(), None, "phi").max_length == 32
    assert tiny_base("llama").max_length == 128


def test_of_a_model_that_sees_only_the_language_model_is_adapted() -> None:
    text = {
        **LLAMA_LIKE,
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=92
    )
    base = freeze(AutoModelForCausalLM.from_config(config).double().eval(), None, "gemma that sees")
    layers = adaptable_layers(base)
    assert len(layers) == 2 * 7
    assert all("language_model" in name for name in layers)
    names = [spec.name for spec in full_layout(base).specs]
    assert names
    assert not any("vision" in name for name in names)
    assert any("embed_tokens" in name for name in names)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_is_bfloat16_where_a_gpu_computes_in_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated it is slower than float32; and the GPU that is asked is the one that will be used."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    device = torch.device("cuda:1")
    assert resolve_dtype("auto", device) is dtype
    assert asked == [device]
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
