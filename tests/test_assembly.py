"""What a run is put together from: graphs of every kind of file, and caches that notice when a file was written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedmira
from fedmira import assembly, experiment
from fedmira.assembly import Assembly, assemble, cached_federation, read_graph
from fedmira.config.graph import GraphConfig
from fedmira.config.run import ModelConfig, RunConfig
from fedmira.errors import ConfigError, DataError, IntegrityError, SetupError
from fedmira.exchange.in_process import InProcess
from fedmira.experiment import run
from fedmira.model.base import load_base
from fedmira.runs.same_base import moved, refuse_other_base, refuse_other_dtype, versions
from fedmira.types import Losses, Trial

NAMES = ("anna", "ben", "cleo")
MATRIX = np.array([[0.0, 2.0, 0.5], [2.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
CSV = "0,2,0.5\n2,0,0\n0.5,0,0\n"


def given(path: Path) -> GraphConfig:
    return GraphConfig(kind="given", path=str(path))


def as_json(**content: Any) -> bytes:
    return json.dumps(content).encode()


def test_a_graph_that_is_not_given_needs_no_file() -> None:
    assert read_graph(GraphConfig(kind="uniform"), NAMES) is None


@pytest.mark.parametrize("name", ["g.json", "g.npy", "G.NPY", "g.csv", "G.CSV", "from-excel.csv"])
def test_json_npy_and_csv_say_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.lower() == "g.npy":
        with path.open("wb") as file:
            np.save(file, MATRIX)
    elif name == "g.json":
        path.write_bytes(as_json(adjacency=MATRIX.tolist()))
    else:
        path.write_text(CSV, encoding="utf-8-sig" if "excel" in name else "utf-8")
    read = read_graph(given(path), NAMES)
    assert read is not None
    assert np.array_equal(read, MATRIX)


def test_names_say_whose_row_is_which(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    order = [2, 0, 1]
    shuffled = MATRIX[np.ix_(order, order)]
    path.write_bytes(as_json(names=[NAMES[k] for k in order], adjacency=shuffled.tolist()))
    assert not np.array_equal(shuffled, MATRIX)
    read = read_graph(given(path), NAMES)
    assert read is not None
    assert np.array_equal(read, MATRIX)


@pytest.mark.parametrize(
    "text",
    [
        ",cleo,anna,ben\ncleo,0,0.5,0\nanna,0.5,0,2\nben,0,2,0\n",
        "cleo,anna,ben\n0,0.5,0\n0.5,0,2\n0,2,0\n",
        "client;anna;ben;cleo\nanna;0;2;0,5\nben;2;0;0\n\ncleo;0,5;0;0\n",
        "0\t2\t0.5\n2\t0\t0\n0.5\t0\t0\n",
        "# made by numpy; 3 x 3\n0,2,0.5\n2,0,0\n0.5,0,0\n",
        '"anna", ben, cleo\n0, 2, 0.5\n2, 0, 0\n0.5, 0, 0\n',
    ],
)
def test_spreadsheets_name_clients_above_and_beside(tmp_path: Path, text: str) -> None:
    path = tmp_path / "g.csv"
    path.write_text(text)
    read = read_graph(given(path), NAMES)
    assert read is not None
    assert np.array_equal(read, MATRIX)


def test_the_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "g.csv").write_text(CSV)
    assert read_graph(GraphConfig(kind="given", path="~/g.csv"), NAMES) is not None


def npy(values: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.array(values))


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, MATRIX)


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


UNUSABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("g.json", lambda path: None, "No such file"),
    "a folder": ("g.json", Path.mkdir, "Is a directory"),
    "not JSON": ("g.json", content(b"{"), "is no graph"),
    "nested too deep": ("g.json", content(b"[" * 100_000), "is no graph"),
    "no adjacency": ("g.json", content(b"[[0, 1], [1, 0]]"), "it has no `adjacency`"),
    "ragged": ("g.json", content(as_json(adjacency=[[0, 1], [1]])), "is no graph"),
    "a number beyond all floats": ("g.json", content(b'{"adjacency": [[' + b"9" * 400 + b"]]}"), "is no graph"),
    "names that are one word": ("g.json", content(as_json(names="abc", adjacency=[])), "`names` is not a list"),
    "a wrong size": ("g.csv", content(b"0,1\n1,0\n"), r"shape is \(2, 2\); expected 3 x 3"),
    "an empty file": ("g.csv", content(b"\n"), "it is empty"),
    "words": ("g.csv", content(b"anna,ben\n0,x\n1,0\n"), "is no graph"),
    "other names": ("g.csv", content(b"anna,ben,cleopatra\n" + CSV.encode()), "unknown.*cleopatra.*missing.*cleo"),
    "another order beside": (
        "g.csv",
        content(b",anna,ben,cleo\nanna,0,2,1\ncleo,2,0,0\nben,1,0,0\n"),
        "columns are named .*rows",
    ),
    "ragged rows": ("g.csv", content(b"0,1,0\n1,0\n0,0,0\n"), "rows of 2 and of 3 cells"),
    "bytes that are no text": ("g.csv", content(b"\xff\xfe\x00"), "is no graph"),
    "NaN": ("g.csv", content(b"0,nan,0\nnan,0,0\n0,0,0\n"), "is nan: not finite"),
    "infinite": ("g.csv", content(b"0,inf,0\ninf,0,0\n0,0,0\n"), "is inf: not finite"),
    "negative": ("g.csv", content(b"0,-1,0\n-1,0,0\n0,0,0\n"), "is -1: negative"),
    "directed": ("g.csv", content(b"0,1,0\n2,0,0\n0,0,0\n"), "not symmetric"),
    "nothing in it": ("g.npy", content(b""), "is no graph"),
    "cut short": ("g.npy", content(b"\x93NUMPY\x01\x00v\x00{'descr'"), "is no graph"),
    "an archive": ("g.npy", archive, "an archive, not one matrix"),
    "half an archive": ("g.npy", content(b"PK\x03\x04 and so on"), "is no graph"),
    "pickled objects": ("g.npy", npy([[None, 1], [1, None]]), "allow_pickle=False"),
    "complex numbers": ("g.npy", npy(MATRIX * 1j), "complex128, not one matrix of real numbers"),
    "a cube": ("g.npy", npy(np.zeros((3, 3, 3))), r"shape is \(3, 3, 3\)"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_graph_file_is_a_data_error(tmp_path: Path, case: str) -> None:
    name, write, words = UNUSABLE[case]
    write(tmp_path / name)
    with pytest.raises(DataError, match=words) as raised:
        read_graph(given(tmp_path / name), NAMES)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["anna", "ben", "cloe"], r"unknown \['cloe'\]; did you mean 'cleo'\?, missing \['cleo'\]"),
        (["anna", "ben"], r"missing \['cleo'\]"),
        (["anna", "ben", "ben"], r"\['ben'\] appear more than once"),
    ],
)
def test_the_names_must_be_those_of_the_clients(tmp_path: Path, names: list[str], words: str) -> None:
    path = tmp_path / "g.json"
    path.write_bytes(as_json(names=names, adjacency=MATRIX.tolist()))
    with pytest.raises(DataError, match=words):
        read_graph(given(path), NAMES)


# ------------------------------------------------------------------------------------------------------------- caches


def records(answer: str) -> str:
    return "".join(json.dumps({"instruction": f"say {n}", "output": answer}) + "\n" for n in range(12))


@pytest.mark.parametrize("where", ["d[1]/a.jsonl", "d[1]", "d[[]1]/*.jsonl", "**/*.jsonl"])
def test_a_data_file_that_was_written_is_read_again(tmp_path: Path, where: str) -> None:
    """A long-lived Python process must not go on with the data of this morning."""
    file = tmp_path / "d[1]" / "a.jsonl"
    file.parent.mkdir()
    file.write_text(records("yes"))
    (file.parent / "b.jsonl").symlink_to("/nowhere")
    # what the folder's name would match as a pattern
    (tmp_path / "d1").mkdir()
    config = RunConfig.model_validate(
        {"data": {"source": "jsonl", "path": str(tmp_path / where), "partition": {"by": "field"}}}
    )
    first = cached_federation(config)
    assert cached_federation(config) is first
    file.write_text(records("no"))
    # a second within the clock's resolution would look like the first
    os.utime(file, ns=(1, 1))
    assert {example.output for example in cached_federation(config).clients[0].train} == {"no"}


# ---------------------------------------------------------------------------------------------------- settings and data


def tiny(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"cohort_size": 4},
            **sections,
        }
    )


def test_strength_beyond_the_stable_bound_is_a_config_error_with_the_numbers() -> None:
    """Four clients in a complete unit graph: the largest eigenvalue is 4, so tau may be 0.5 at most."""
    method = {"name": "mira_published", "graph": {"kind": "uniform"}, "server_lr": 1.0}
    assert assemble(tiny(method={**method, "strength": 0.5})).cohort_size == 4
    with pytest.raises(ConfigError, match=r"0\.5") as raised:
        assemble(tiny(method={**method, "strength": 0.51}))
    assert raised.value.exit_code == 2


def test_every_kind_of_graph_is_in_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "g.npy"
    np.save(path, np.ones((4, 4)) - np.eye(4))
    facts = {}
    for graph in ({"kind": "gram"}, {"kind": "given", "path": str(path)}):
        facts[graph["kind"]] = assemble(tiny(method={"name": "mira", "graph": graph})).manifest()["graph"]
    assert facts["gram"] == {"kind": "gram"}
    assert facts["given"]["kind"] == "given"
    assert len(facts["given"]["sha256"]) == 64
    assert assemble(tiny(method={"name": "local_only"})).manifest()["graph"] == {}


def test_the_server_counts_the_examples_that_are_trained_on() -> None:
    parts = assemble(tiny())
    assert parts.clients.names == parts.federation.names
    assert parts.clients.num_examples_K == tuple(len(client.train) for client in parts.tokenized)
    assert parts.clients.tasks == ("family-0", "family-0", "family-1", "family-1")


def test_a_question_goes_to_no_more_examples_than_a_training_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    judge = InProcess.judge

    def listening(exchange: InProcess, trial: Trial) -> Losses:
        asked.append(trial.most_examples)
        return judge(exchange, trial)

    monkeypatch.setattr(InProcess, "judge", listening)
    partition = {"by": "field", "validation": 0.5, "test": 0}
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12, "partition": partition}
    run(
        tiny(
            data=data,
            training={"batch_size": 1, "local_steps": 1},
            federation={"rounds": 2},
            evaluation={"test": False, "generation": {"enabled": False}},
        ),
        directory=tmp_path,
    )
    # after the last round they judge all
    assert asked == [1, None]


def test_a_tokenizer_larger_than_the_model_is_refused_where_its_tokens_are_used(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(Path(fedmira.__file__).parent / "assets" / "base", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"filler{n}" for n in range(num_rows - len(tokenizer))] + ["zyzzyva"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "a.jsonl").write_text(records("yes") + json.dumps({"instruction": "a zyzzyva", "output": "no"}))
    data = {"source": "jsonl", "path": str(tmp_path / "a.jsonl"), "partition": {"by": "field"}}
    model = {"path": str(folder), "adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"}
    words = (
        rf"writes token {num_rows} \('zyzzyva', in the example 'a\.jsonl:13'\).* {num_rows} embeddings.*resize_token"
    )
    with pytest.raises(SetupError, match=words):
        assemble(tiny(data=data, model=model, method={"name": "local_only"}))
    # added but never used
    (tmp_path / "a.jsonl").write_text(records("yes"))
    assert assemble(tiny(data=data, model=model, method={"name": "local_only"})).clients.names == ("a",)


# -------------------------------------------------------------------------------------------------------- cohort size


def test_another_config_of_the_base_model_is_another_base(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(fedmira.embedded_base_path(), folder)
    wanted = ModelConfig(path=str(folder), device="cpu", dtype="float32")
    recorded = load_base(wanted).facts()
    for dtype in ("float32", "float64"):
        # adapters go over the base in any dtype
        refuse_other_base(tmp_path, recorded, load_base(wanted.model_copy(update={"dtype": dtype})))
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "transformers_version": "4.0", "_name_or_path": "elsewhere"}))
    refuse_other_base(tmp_path, recorded, load_base(wanted))
    path.write_text(json.dumps({**content, "rms_norm_eps": 0.5}))
    changed = load_base(wanted)
    with pytest.raises(IntegrityError, match=r"\(config_sha256 differ\); adapters fit only the model"):
        refuse_other_base(tmp_path, recorded, changed)
    # as runs were recorded before
    del recorded["config_sha256"]
    refuse_other_base(tmp_path, recorded, changed)


def test_a_run_does_not_go_on_in_another_dtype(tmp_path: Path) -> None:
    base = load_base(ModelConfig(device="cpu", dtype="float64"))
    refuse_other_dtype(tmp_path, base.facts(), base)
    refuse_other_dtype(tmp_path, {}, base)
    with pytest.raises(
        IntegrityError, match=r"in bfloat16 on cuda, but .* gives float64 on cpu.*model\.dtype: bfloat16"
    ):
        refuse_other_dtype(tmp_path, {**base.facts(), "dtype": "bfloat16", "device": "cuda"}, base)


def test_what_differs_of_the_machine_is_told_and_recorded() -> None:
    base = load_base(ModelConfig(device="cpu"))
    manifest = {"fedmira": fedmira.__version__, "versions": versions(), "model": base.facts(), "seed": 3}
    assert moved(manifest, base) == ("", manifest)
    before = {**manifest, "versions": {**versions(), "torch": "1.0"}, "model": {**base.facts(), "device": "cuda"}}
    line, after = moved(before, base)
    assert line.startswith(
        f"it goes on with device cpu (was cuda), torch {versions()['torch']} (was 1.0): what follows"
    )
    was = {"fedmira": fedmira.__version__, "device": "cuda", **versions(), "torch": "1.0"}
    assert after == {**manifest, "versions_before": [was]}
    assert moved(after, base) == ("", after)
    _, last = moved({**after, "versions": {**versions(), "torch": "2.0"}}, base)
    assert last["versions_before"] == [was, {**was, "device": "cpu", "torch": "2.0"}]


def test_the_config_says_what_a_long_prompt_loses(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": f"say {n}", "input": "very " * 50, "output": "yes"}) for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts = {}
    for cut in ("input", "beginning"):
        data = {"source": "jsonl", "path": str(tmp_path), "template": "plain", "max_length": 40, "cut": cut}
        partition = {"by": "field", "validation": 0, "test": 0}
        parts = assemble(tiny(data={**data, "partition": partition}, evaluation={"test": False}))
        examples = parts.tokenized[0].train
        texts[cut] = {parts.base.tokenizer.decode(one.tokens[: one.prompt_length]) for one in examples}
    assert len(texts["input"]) == 12
    assert all("say " in text for text in texts["input"])
    assert len(texts["beginning"]) == 1


def test_an_automatic_cohort_fits_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = tiny(training={"cohort_size": "auto"})
    monkeypatch.setattr(assembly, "available_bytes", lambda device: 0)
    assert assemble(automatic).cohort_size == 1
    monkeypatch.setattr(assembly, "available_bytes", lambda device: 2**40)
    assert assemble(automatic).cohort_size == 4
    assert assemble(tiny(training={"cohort_size": 3})).cohort_size == 3


def test_a_resumed_run_keeps_its_cohorts_whatever_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another cohort size would change the last bits of the sums."""
    config = tiny(training={"cohort_size": "auto", "local_steps": 1, "batch_size": 1}, federation={"rounds": 1})
    monkeypatch.setattr(assembly, "available_bytes", lambda device: 0)
    path = run(config, directory=tmp_path)
    monkeypatch.setattr(assembly, "available_bytes", lambda device: 2**40)
    assert assemble(config).cohort_size == 4
    built: list[Assembly] = []

    def spy(wanted: RunConfig, **arguments: Any) -> Assembly:
        built.append(assemble(wanted, **arguments))
        return built[-1]

    monkeypatch.setattr(experiment, "assemble", spy)
    assert run(config, directory=tmp_path, resume=True) == path
    assert [one.cohort_size for one in built] == [1]
