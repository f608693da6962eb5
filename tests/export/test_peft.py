"""An exported folder loads in peft, gives the engine's logits bit for bit, and has the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fedmira
from fedmira.config.run import AdapterConfig, ModelConfig
from fedmira.errors import SetupError, UsageError
from fedmira.export.card import model_card
from fedmira.export.peft import Settings, adapter_files, new_folder, write_files
from fedmira.model.arena import initial_arena, lora_layout
from fedmira.model.base import BaseModel, freeze, load_base
from fedmira.model.lora import attached
from fedmira.types import Arena, Layout, TensorSpec

TINY = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **TINY,
}


def tiny_model(family: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **TINY))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**GROUPED))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **GROUPED))


def trained_arena(base: BaseModel, adapter: AdapterConfig, num_clients: int = 2) -> Arena:
    """An arena in which B is not zero either, as after training."""
    arena = initial_arena(lora_layout(base, adapter), num_clients, seed=0, dtype=base.dtype)
    noise = torch.randn(arena.values_KP.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return arena.replace(arena.values_KP + noise.to(base.dtype))


def engine_logits(base: BaseModel, arena: Arena, row: int, tokens_T: torch.Tensor) -> torch.Tensor:
    one = arena.replace(arena.values_KP[row : row + 1])
    with torch.no_grad(), attached(base, one, [len(tokens_T)]):
        return base.model(input_ids=tokens_T[None], use_cache=False).logits[0]


def peft_logits(model: Any, folder: Path, tokens_T: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        return adapted(input_ids=tokens_T[None], use_cache=False).logits[0]


def export(arena: Arena, adapter: AdapterConfig, out: Path, row: int = 1, fan_in_fan_out: bool = False) -> None:
    settings = Settings(
        adapter.rank, adapter.alpha, adapter.dropout, base_path="some/base", fan_in_fan_out=fan_in_fan_out
    )
    write(out, adapter_files(arena.layout, arena.values_KP[row], settings))


def write(out: Path, files: dict[str, bytes]) -> None:
    with new_folder(out) as folder:
        write_files(folder, files)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", ("c_attn", "c_proj")),
        ("gpt2", ("attn.c_proj",)),
        ("llama", "all-linear"),
        ("llama", ("q_proj", "v_proj")),
        ("qwen3", "all-linear"),
    ],
)
def test_peft_loads_it_and_gives_the_engines_logits_bit_for_bit(family: str, targets: Any, tmp_path: Path) -> None:
    base = freeze(tiny_model(family), None, family)
    adapter = AdapterConfig(rank=4, alpha=6, targets=targets)
    arena = trained_arena(base, adapter)
    export(arena, adapter, tmp_path / "adapter", fan_in_fan_out=family == "gpt2")
    tokens_T = torch.randint(97, (11,), generator=torch.Generator().manual_seed(2))
    expected = engine_logits(base, arena, 1, tokens_T)
    bare = base.model(input_ids=tokens_T[None], use_cache=False).logits[0]
    assert not torch.equal(expected, bare)
    model = tiny_model(family)
    model.load_state_dict(base.model.state_dict())
    assert torch.equal(peft_logits(model, tmp_path / "adapter", tokens_T), expected)


def test_the_embedded_base_loads_with_the_commands_of_the_readme(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = load_base(ModelConfig())
    adapter = AdapterConfig(rank=4)
    arena = trained_arena(base, adapter)
    export(arena, adapter, tmp_path / "adapter")
    tokens_T = torch.arange(5, 25)
    expected = engine_logits(base, arena, 1, tokens_T)
    model = AutoModelForCausalLM.from_pretrained(fedmira.embedded_base_path())
    assert torch.equal(peft_logits(model, tmp_path / "adapter", tokens_T), expected)


def test_the_folder_follows_the_rules_of_vllm(tmp_path: Path) -> None:
    """No modules_to_save, no DoRA, no bias; the rank is stated; every tensor is a LoRA factor of a named layer."""
    from safetensors import safe_open

    base = freeze(tiny_model("llama"), None, "llama")
    adapter = AdapterConfig(rank=4, alpha=6, dropout=0.05)
    export(trained_arena(base, adapter), adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["use_dora"] is False
    assert config["bias"] == "none"
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6, "some/base")
    assert config["lora_dropout"] == 0.05
    assert list(config) == sorted(config)
    with safe_open(str(tmp_path / "adapter" / "adapter_model.safetensors"), "pt") as tensors:
        names = set(tensors.keys())
        assert names == {
            f"base_model.model.{layer}.lora_{factor}.weight" for layer in config["target_modules"] for factor in "AB"
        }
        assert all(min(tensors.get_tensor(name).shape) == 4 for name in names)


PROGRAM = """
import sys
from pathlib import Path
import torch
from fedmira.export.peft import Settings, adapter_files, new_folder, write_files
from fedmira.types import Layout, TensorSpec
specs, offset = [], 0
for layer in ("model.b", "model.a", "model.c.d"):
    for group, shape in (("lora_a", (2, 3)), ("lora_b", (5, 2))):
        specs.append(TensorSpec(f"{layer}.{group}", group, layer, shape, offset))
        offset += specs[-1].size
layout = Layout(tuple(specs), 2.0)
files = adapter_files(layout, torch.arange(float(offset)), Settings(2, 4, 0.0, "b"))
with new_folder(Path(sys.argv[1])) as folder:
    write_files(folder, files)
"""


def test_the_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    digests = set()
    for seed in ("0", "4711"):
        out = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", PROGRAM, str(out)], env=environment, check=True)
        digests.add(tuple((p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(out.iterdir())))
    [files] = digests
    assert [name for name, _ in files] == ["adapter_config.json", "adapter_model.safetensors"]


def tiny_layout() -> tuple[Layout, torch.Tensor]:
    specs = (
        TensorSpec("m.q.lora_a", "lora_a", "m.q", (2, 3), 0),
        TensorSpec("m.q.lora_b", "lora_b", "m.q", (5, 2), 6),
    )
    return Layout(specs, 1.0), torch.arange(16.0)


SETTINGS = Settings(rank=2, alpha=2.0, dropout=0.0, base_path="b")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    layout, row_P = tiny_layout()
    before = os.umask(0o027)
    try:
        write(tmp_path / "x", adapter_files(layout, row_P, SETTINGS))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "x").iterdir()} == {0o640}


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    layout, row_P = tiny_layout()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("mine", "file"):
        with pytest.raises(UsageError, match="not an empty folder"):
            write(tmp_path / name, adapter_files(layout, row_P, SETTINGS))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "note"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", adapter_files(layout, row_P, SETTINGS))
    write(tmp_path / "deep" / "new", adapter_files(layout, row_P, SETTINGS))
    assert (tmp_path / "deep" / "new" / "adapter_config.json").is_file()


def test_an_empty_folder_may_be_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, row_P = tiny_layout()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path("."), adapter_files(layout, row_P, SETTINGS))
    assert (tmp_path / "here" / "adapter_config.json").is_file()
    # whoever stands in it still does
    assert sorted(os.listdir(".")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_failure_in_a_folder_that_was_there_leaves_it_empty(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path) as folder:
            (folder / "half").write_text("written")
            raise OSError(28, "No space left on device")

    with pytest.raises(SetupError, match="No space left"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with new_folder(tmp_path / "x") as folder:
            (folder / "half").write_text("written")
            raise OSError(28, "No space left on device")

    with pytest.raises(SetupError, match="No space left"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_lie_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SetupError, match="file: Not a directory"), new_folder(tmp_path / "file" / "x"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("base_path", "said"),
    [
        ("owner/model", "`owner/model`"),
        ("base", "the folder `base`"),
        ("fedmira-embedded-base", "embedded_base_path()"),
    ],
)
def test_the_card_says_how_to_load(base_path: str, said: str) -> None:
    card = model_card(base_path, {"client": "anna"})
    assert said in card
    assert "- client: anna" in card
    assert card.startswith("---\nbase_model: ")


def test_the_card_loads_the_revision_that_was_trained_on() -> None:
    card = model_card("some/model", revision="abc123")
    assert "from_pretrained(BASE, revision='abc123')" in card
    assert "- revision of the base: abc123" in card
    assert "revision" not in model_card("some/model")
