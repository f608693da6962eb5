"""A merged model gives the adapter's logits without peft, whatever the ranks, and is refused where it means nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.tiny_models import tiny_base
from transformers import AutoModelForCausalLM

from fedmira import embedded_base_path
from fedmira.config.run import AdapterConfig, RunConfig
from fedmira.errors import UsageError
from fedmira.experiment import run
from fedmira.export.card import model_card
from fedmira.export.clients import export_clients, load_trained
from fedmira.export.whole_model import merged, write_model
from fedmira.model.arena import initial_arena, lora_layout
from fedmira.model.base import BaseModel
from fedmira.model.lora import attached
from fedmira.model.shift import shifted
from fedmira.types import Arena

TOKENS_T = torch.arange(4, 15)
CLIENT = "family-0-client-0"


def logits_with(base: BaseModel, arena: Arena, row: int, tokens_T: torch.Tensor = TOKENS_T) -> torch.Tensor:
    one = arena.replace(arena.values_KP[row : row + 1])
    with torch.no_grad(), shifted(base, arena.layout, arena.shift_W), attached(base, one, [len(tokens_T)]):
        return base.model(input_ids=tokens_T[None], use_cache=False).logits[0]


def logits_of(model: Any, tokens_T: torch.Tensor = TOKENS_T) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_T[None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("way", ["pair", "ranks", "two pairs", "shift"])
def test_a_merged_model_gives_the_logits_of_the_adapter(family: str, way: str, tmp_path: Path) -> None:
    base = tiny_base(family, torch.float32)
    last = {"gpt2": "c_proj"}.get(family, "o_proj")
    ranks = {last: 5} if way == "ranks" else {}
    adapter = AdapterConfig(rank=3, alpha=5, targets="all-linear", rank_pattern=ranks)
    arena = initial_arena(lora_layout(base, adapter, 2 if way == "two pairs" else 1), 2, seed=0)
    drawn = torch.Generator().manual_seed(1)
    arena = arena.replace(arena.values_KP + 0.1 * torch.randn(arena.values_KP.shape, generator=drawn))
    if way == "shift":
        size = sum(base.model.get_submodule(layer).weight.numel() for layer in arena.layout.layers)
        arena = Arena(arena.layout, arena.values_KP, 0.1 * torch.randn(size, generator=drawn))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    expected = [logits_with(base, arena, row) for row in (0, 1)]
    (tmp_path / "out").mkdir()
    with merged(base, arena, 1):
        torch.testing.assert_close(logits_of(base.model), expected[1], rtol=1e-4, atol=1e-4)
        write_model(tmp_path / "out", base, model_card("some/base", kind="full"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert float((expected[1] - expected[0]).abs().max()) > 1e-2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded), expected[1], rtol=1e-4, atol=1e-4)


def finished(tmp_path: Path, adapter: dict[str, Any], path: str = "embedded") -> Path:
    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 1, "examples": 8},
            "model": {"path": path, "adapter": adapter, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 1, "batch_size": 2, "learning_rate": 0.01},
            "federation": {"rounds": 1},
            "method": {"name": "local_only"},
            "evaluation": {"test": False},
        }
    )
    return run(config, directory=tmp_path / "runs")


def test_every_client_of_a_run_is_merged(tmp_path: Path) -> None:
    made = finished(tmp_path, {"rank": 2, "targets": ["q_proj", "v_proj"]})
    folders = export_clients(made, None, tmp_path / "out", merged=True)
    trained = load_trained(made)
    for row, name in enumerate(trained.names):
        assert not (folders[name] / "adapter_config.json").exists()
        card = (folders[name] / "README.md").read_text()
        assert "- adapter: low-rank, merged into the weights\n" in card
        assert "AutoModelForCausalLM.from_pretrained(FOLDER)" in card
        loaded = AutoModelForCausalLM.from_pretrained(folders[name])
        torch.testing.assert_close(logits_of(loaded), logits_with(trained.base, trained.adapters, row))
    with pytest.raises(UsageError, match="--with-base has no effect with --merged"):
        export_clients(made, CLIENT, tmp_path / "both", merged=True, with_base=True)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {"kind": "prompt", "num_virtual_tokens": 2},
            "rows before the prompt.* leave it out, and load the folder with peft",
        ),
        ({"kind": "full"}, "--merged has no effect: this run tuned every weight"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_what_to_do(adapter: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = finished(tmp_path, adapter)
    with pytest.raises(UsageError, match=said):
        export_clients(made, CLIENT, tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()


def test_a_base_of_ones_own_is_not_copied_but_merged(tmp_path: Path) -> None:
    shutil.copytree(embedded_base_path(), tmp_path / "base", copy_function=shutil.copyfile)
    made = finished(tmp_path, {"rank": 2, "targets": ["q_proj"]}, str(tmp_path / "base"))
    with pytest.raises(UsageError, match="or take --merged instead, which writes a whole model"):
        export_clients(made, CLIENT, tmp_path / "out", with_base=True)
