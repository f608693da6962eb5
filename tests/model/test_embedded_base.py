"""The language model that ships with the package: offline, small, safe, and better than a tiny story teller."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fedmira.data.prompts import TEMPLATES, render
from fedmira.types import Example

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "src" / "fedmira" / "assets" / "base"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the training tool that split the corpus and score a folder."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import base_folder
    import base_network
    import base_text

    loaded = {"base_folder": base_folder, "base_network": base_network, "base_text": base_text}
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    return loaded


def test_folder_holds_safetensors_only_and_no_code() -> None:
    files = {path.name: path for path in BASE.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]
    assert sum(path.stat().st_size for path in files.values()) < 16 * MEGABYTE
    assert "auto_map" not in files["config.json"].read_text() + files["tokenizer_config.json"].read_text()


def test_loads_as_a_small_float32_llama_with_tied_embeddings(model) -> None:  # type: ignore[no-untyped-def]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_500_000


@pytest.mark.parametrize(
    "text",
    [
        "plain text, 1234 and 56.78",
        " leading and trailing  spaces \n\n\ttabs\r\n",
        "\u00e9\u00df\u20ac \u4f60\u597d \U0001f600 zero\u200bwidth e\u0301",
        "{braces} <tags> \\backslash 'quotes' \"double\"",
    ],
)
def test_tokenizer_gives_every_text_back(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_stand_alone(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.tokenize("x1234")[-4:] == ["1", "2", "3", "4"]


def test_special_tokens_are_distinct_and_known_to_the_configuration(tokenizer, model) -> None:  # type: ignore[no-untyped-def]
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special)) == 3
    assert special == [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_chat_template_ends_assistant_turns_and_opens_the_next(tokenizer) -> None:  # type: ignore[no-untyped-def]
    example = Example(instruction="And you?", output="Well.", turns=(("user", "Hello."), ("assistant", "Hi.")))
    prompt = render(example, "chat", tokenizer).prompt
    assert prompt == "<bos><|user|>Hello.<|assistant|>Hi.<eos><|user|>And you?<|assistant|>"


def _prompt_ids(tokenizer, example: Example, template: str) -> list[int]:  # type: ignore[no-untyped-def]
    prompt = render(example, template, tokenizer).prompt
    return tokenizer(prompt, add_special_tokens=not prompt.startswith(tokenizer.bos_token))["input_ids"]


def test_continues_a_rule_shown_in_pairs(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    words = ["kemo", "rabu", "fidal", "jonu", "stopai", "vilem", "hagor", "trulo"]
    rules = {"suffix": "{0}pel", "double": "{0} {0}", "front": "zor {0}", "brackets": "[{0}]"}
    right = 0
    for form in rules.values():
        for template in TEMPLATES:
            shown = "\n".join(f"{word} -> {form.format(word)}" for word in words[:-1])
            example = Example(instruction=f"{shown}\n{words[-1]} ->", output=form.format(words[-1]))
            prompt_ids = _prompt_ids(tokenizer, example, template)
            answer_ids = [*tokenizer(example.output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
            right += logits.argmax(-1).tolist() == answer_ids
    assert right >= 6, f"{right} of 12 answers right in every token"


def test_greedy_answers_end(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    questions = ["Give the last word.", "Copy the list.", "Reverse the list."]
    ended = 0
    for template in TEMPLATES:
        for question in questions:
            example = Example(instruction=question, input="kemo, rabu, fidal", output="")
            ids = torch.tensor([_prompt_ids(tokenizer, example, template)])
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60
            )
            ended += output[0, -1].item() == tokenizer.eos_token_id
    assert ended >= 6, f"{ended} of 9 answers ended within 60 tokens"


def test_held_out_split_shares_no_long_sentence(tools: dict[str, ModuleType], shared_dir: Path) -> None:
    corpus = tools["base_text"].read_corpus(shared_dir / "data" / "pretraining" / "corpus.jsonl.gz")
    pieces = tools["base_text"]._pieces
    frequency: dict[str, int] = {}
    for example in (*corpus.train, *corpus.held_out):
        for piece in set(pieces(example)):
            frequency[piece] = frequency.get(piece, 0) + 1
    trained_on = {piece for example in corpus.train for piece in pieces(example)}
    shared = {
        piece
        for example in corpus.held_out
        for piece in pieces(example)
        if piece in trained_on and frequency[piece] <= tools["base_text"].BOILERPLATE_RECORDS
    }
    assert shared == set()
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.03


def test_beats_the_story_teller_on_held_out_text(tools: dict[str, ModuleType], shared_dir: Path) -> None:
    stories = shared_dir / "models" / "stories260K"
    corpus = tools["base_text"].read_corpus(shared_dir / "data" / "pretraining" / "corpus.jsonl.gz")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (BASE, stories)]
    texts = tools["base_folder"].clip_to_context(tools["base_folder"].held_out_texts(corpus, limit=24), tokenizers)
    ours, theirs = (tools["base_folder"].score(folder, texts) for folder in (BASE, stories))
    assert ours["characters"] == theirs["characters"]
    assert ours["nats_per_character"] < 0.7 * theirs["nats_per_character"]


def test_model_card_states_what_the_record_says() -> None:
    card = (BASE / "README.md").read_text(encoding="utf-8")
    config = json.loads((BASE / "config.json").read_text())
    assert f"vocabulary {config['vocab_size']:,}" in card
    for heading in ("Data", "Training", "Held-out", "Intended use", "Limits"):
        assert f"## {heading}" in card


def test_network_of_the_tool_is_hugging_face_llama(tools: dict[str, ModuleType]) -> None:
    network = tools["base_network"]
    config = network.llama_config(vocab_size=512, pad=0, bos=1, eos=2)
    parameters = network.initial_parameters(config, seed=0, device="cpu")
    twin = LlamaForCausalLM(config)
    twin.load_state_dict({name: value.detach() for name, value in parameters.items()}, strict=False)
    twin.tie_weights()
    tokens_BT = torch.randint(0, 512, (2, 258), generator=torch.Generator().manual_seed(0))
    loss = network.next_token_loss(parameters, config, tokens_BT)
    expected = torch.nn.functional.cross_entropy(
        twin(tokens_BT[:, :-1]).logits.flatten(0, 1), tokens_BT[:, 1:].flatten()
    )
    loss.backward()
    expected.backward()
    # The tool multiplies in bfloat16 (eight bits of mantissa); a wrong mask, rotation or scale costs far more.
    assert loss.item() == pytest.approx(expected.item(), abs=2e-3)
    for name, weight in twin.named_parameters():
        similarity = torch.nn.functional.cosine_similarity(weight.grad.flatten(), parameters[name].grad.flatten(), 0)
        assert similarity > 0.999, name


def _train(corpus: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "tools/train_base_model.py", "--corpus", str(corpus), "--out", str(out), "--no-compile"]
    sizes = ["--window", "32", "--long-window", "64", "--batch-tokens", "256", "--vocab-size", "320"]
    finished = subprocess.run(
        [*command, *sizes, "--minutes", "0.03", "--snapshot-minutes", "0.01", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_tool_trains_exports_and_resumes(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl.gz"
    with gzip.open(corpus, "wt", encoding="utf-8") as lines:
        for number in range(1500):
            record = {
                "task": "say",
                "instruction": "Repeat the number given in the input.",
                "input": f"The number of this line is {number} today.",
                "output": str(number),
            }
            lines.write(json.dumps(record) + "\n")
    _train(corpus, tmp_path / "first")
    # as on a slow machine
    shutil.rmtree(tmp_path / "first" / "snapshot", ignore_errors=True)
    _train(corpus, tmp_path / "second", "--resume", str(tmp_path / "first"))
    first, second = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("first", "second"))
    assert second["progress"]["step"] > first["progress"]["step"] > 0
    assert second["progress"]["minutes"] > first["progress"]["minutes"]
    tokenizers = [(tmp_path / name / "model" / "tokenizer.json").read_text() for name in ("first", "second")]
    assert tokenizers[0] == tokenizers[1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second" / "model").dtype == torch.float32
