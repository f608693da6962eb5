"""Claims about runs that go on with clients that joined, and with more rounds: nobody who was there notices.

Tiny runs over the embedded base: three clients in files of a folder, a fourth whose file sorts before theirs.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmira import experiment
from fedmira.config.run import RunConfig
from fedmira.data.sources import jsonl
from fedmira.errors import IntegrityError, Interrupted, UsageError
from fedmira.exchange import seam
from fedmira.experiment import SilentDisplay, run
from fedmira.export.clients import load_trained
from fedmira.federation.known_graphs import labels
from fedmira.federation.mixing import implicit_matrix
from fedmira.recording import Recorder
from fedmira.report.page import write_report
from fedmira.report.reading import RunRecord, read, read_run
from fedmira.runs.checkpoint import Checkpoint, load_latest
from fedmira.runs.store import RESOLVED, RunStore

CLIENTS, LATE = ("ben", "cleo", "dora"), "anna"
TASKS = {"anna": "count", "ben": "count", "cleo": "spell", "dora": "count"}
MIRA = {"name": "mira", "graph": {"kind": "labels"}, "choice": {"enabled": False}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in CLIENTS:
        add(folder, name)
    return folder


def add(folder: Path, name: str, examples: int = 9) -> None:
    lines = [
        {"instruction": f"{TASKS[name]} {name} {n}", "output": f"{name[n % 3]} {n}", "task": TASKS[name]}
        for n in range(examples)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def config(data: Path, rounds: int, method: str | Mapping[str, Any] = "local_only", **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "late",
            "data": {"source": "jsonl", "path": str(data), "partition": {"by": "field"}},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.01, "cohort_size": 1},
            "federation": {"rounds": rounds},
            "method": {"name": method} if isinstance(method, str) else method,
            "evaluation": {"generation": {"enabled": False}},
            "output": {"directory": str(data.parent / "runs"), "keep_checkpoints": 9},
            **sections,
        }
    )


def newest(path: Path) -> Checkpoint:
    found = load_latest(path, config_hash=RunStore.open(path).config_hash)
    assert found is not None
    return found


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    found = [event for event in RunStore.open(path).events() if event["event"] == kind]
    return [{key: value for key, value in event.items() if key != "timing"} for event in found]


def same(one: Checkpoint, other: Checkpoint) -> bool:
    facts = [{key: value for key, value in c.facts.items() if key != "metrics_position"} for c in (one, other)]
    return facts[0] == facts[1] and all(
        torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors | other.tensors
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- more rounds


def without_questions(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last round also asks what clients keep: it shows in its bytes and numbers, and in what is judged after it."""
    return [{**event, **dict.fromkeys(("numbers", "upload_bytes", "clients"))} for event in recorded[:-1]]


@pytest.mark.parametrize("method", ["local_only", MIRA, {"name": "mira"}])
def test_a_run_that_is_prolonged_is_the_run_begun_with_its_rounds(data: Path, method: Any) -> None:
    path = run(config(data, 2, method))
    assert run(config(data, 4, method), resume=True, source_text="# four") == path
    begun_so = run(config(data, 4, method), directory=data.parent / "others")
    assert same(newest(path), newest(begun_so))
    for kind in ("round", "evaluation"):
        one, other = events(path, kind), events(begun_so, kind)
        assert one == other if method in ("local_only", MIRA) else without_questions(one) == without_questions(other)
        assert one[-1] == other[-1]
    assert [event["round"] for event in events(path, "final")] == [2, 4]
    assert (path / "config.yaml").read_text() == "# four"
    assert run(config(data, 4, method), resume=True) == path, "finished again, and found again"
    assert run(config(data, 5, method), resume=True) == path
    assert RunStore.open(path).manifest()["begun_rounds"] == 2


def test_a_run_whose_examples_were_called_otherwise_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLIENTS:
        lines = [json.loads(line) | {"client": name} for line in (data / f"{name}.jsonl").read_text().splitlines()]
        (data / name).mkdir()
        (data / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def of(rounds: int) -> RunConfig:
        section = config(data, rounds).data.model_copy(update={"path": f"{data}/*/train.jsonl"})
        return config(data, rounds).model_copy(update={"data": section})

    with monkeypatch.context() as before:
        # then ids had the file's name alone
        before.setattr(jsonl, "distinct_names", lambda paths: [path.name for path in paths])
        path = run(of(1))
        assert '"train.jsonl:1"' in (path / "splits.json").read_text()
    assert run(of(2), resume=True) == path
    assert '"ben/train.jsonl:1"' in (path / "splits.json").read_text()
    assert same(newest(path), newest(run(of(2), directory=data.parent / "others")))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        (
            {"training": {"local_steps": 2, "batch_size": 2, "cohort_size": 1, "schedule": "cosine"}},
            "schedule = cosine",
        ),
        ({"method": {"name": "fedit_finetuned"}}, "fedit_finetuned trains its last rounds alone"),
    ],
)
def test_a_run_whose_first_rounds_depend_on_how_long_it_is_does_not_go_on(
    data: Path, sections: dict[str, Any], named: str
) -> None:
    method = sections.pop("method", "local_only")
    path = run(config(data, 2, method, **sections))
    before = newest(path)
    with pytest.raises(UsageError, match=named):
        run(config(data, 4, method, **sections), resume=True)
    assert same(newest(path), before)
    assert run(config(data, 2, method, **sections), resume=True) == path


def test_fewer_rounds_and_other_changes_are_refused(data: Path) -> None:
    path = run(config(data, 2))
    with pytest.raises(IntegrityError, match=r"federation\.rounds: 2 -> 1"):
        run(config(data, 1), resume=True)
    with pytest.raises(IntegrityError, match=r"training\.local_steps: 2 -> 3"):
        run(config(data, 3, training={"local_steps": 3, "batch_size": 2, "cohort_size": 1}), resume=True)
    assert run(config(data, 3), resume=True) == path
    with pytest.raises(IntegrityError, match=r"federation\.rounds: 3 -> 2"):
        run(config(data, 2), resume=True)


def test_a_run_stopped_before_its_first_round_was_over_can_be_prolonged(data: Path) -> None:
    """Killed without a checkpoint: it begins again, in its directory."""
    with pytest.raises(Interrupted):
        run(config(data, 1), display=StopsInRound(1))
    [path] = (data.parent / "runs").iterdir()
    shutil.rmtree(path / "checkpoints")
    with RunStore.open(path) as store:
        store.append({"event": "round", "round": 1})
    assert run(config(data, 2), resume=True) == path
    assert [event["round"] for event in events(path, "round")] == [1, 2]
    assert RunStore.open(path).config.federation.rounds == 2


def test_a_run_that_stopped_while_it_was_prolonged_is_not_judged_by_its_old_end(data: Path) -> None:
    path = run(config(data, 1))
    assert read_run(path).records
    with pytest.raises(Interrupted):
        run(config(data, 3), resume=True, display=StopsInRound(3))
    record = read(path)
    assert isinstance(record, RunRecord)
    assert len(record.rounds) == 2
    assert record.final is None
    assert not record.records
    run(config(data, 3), resume=True)
    assert read_run(path).records


@pytest.mark.parametrize(("method", "asks"), [("local_only", False), ({"name": "mira"}, True)])
def test_who_prolongs_a_run_that_asks_clients_in_the_end_is_told(data: Path, method: Any, asks: bool) -> None:
    run(config(data, 1, method))
    path = run(config(data, 2, method), resume=True)
    assert ("not be bit for bit a run begun with 2 rounds" in (path / "run.log").read_text()) == asks


def test_a_run_killed_while_it_is_prolonged_is_as_it_was(data: Path) -> None:
    """The manifest knows of more rounds, the config not yet."""
    path = run(config(data, 1))
    resolved = (path / RESOLVED).read_bytes()
    run(config(data, 2), resume=True)
    (path / RESOLVED).write_bytes(resolved)
    assert RunStore.open(path).config.federation.rounds == 1
    assert run(config(data, 2), resume=True) == path


# -------------------------------------------------------------------------------------------------- clients that join


@pytest.mark.parametrize(
    ("method", "exchange"),
    [("local_only", {}), ({**MIRA, "strength": 0.0}, {"compression": "int8", "download_compression": "int8"})],
)
def test_who_was_there_ends_as_if_nobody_had_joined(data: Path, method: Any, exchange: dict[str, Any]) -> None:
    """Training alone, each in a cohort of its own, and also across a seam that remembers: bit for bit."""
    undisturbed = newest(run(config(data, 4, method, exchange=exchange), directory=data.parent / "others"))
    path = run(config(data, 2, method, exchange=exchange))
    add(data, LATE)
    assert run(config(data, 4, method, exchange=exchange), resume=True) == path
    after = newest(path)
    assert load_trained(path).names == (*CLIENTS, LATE)
    assert after.facts["last_round_K"] == [4, 4, 4, 4]
    assert after.tensors.keys() == undisturbed.tensors.keys()
    for name, tensor in undisturbed.tensors.items():
        assert torch.equal(after.tensors[name][:3], tensor)
    assert [event["participants"] for event in events(path, "round")] == [
        *([list(CLIENTS)] * 2),
        *([[*CLIENTS, LATE]] * 2),
    ]


def test_who_joins_is_written_down_and_nothing_is_lost(data: Path) -> None:
    path = run(config(data, 2))
    before = RunStore.open(path).manifest()
    add(data, LATE)
    run(config(data, 3), resume=True)
    manifest = RunStore.open(path).manifest()
    assert manifest["clients"][:3] == before["clients"]
    assert manifest["clients"][3] | {"name": LATE, "joined_after": 2} == manifest["clients"][3]
    assert manifest["data_before"] == [before["data"]]
    assert [Path(file["path"]).stem for file in manifest["data"]["files"]] == [LATE, *CLIENTS]
    assert events(path, "joined") == [{"event": "joined", "round": 2, "clients": [LATE]}]
    assert f"joined after round 2: {LATE}" in (path / "run.log").read_text()
    assert load_trained(path).names == (*CLIENTS, LATE)
    page = write_report(path).read_text()
    assert f"{LATE} (joined after round 2)" in page
    assert "1 client joined after the first round" in page


def test_with_labels_who_joins_starts_from_its_task_and_the_others_keep_every_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run(config(data, 2, MIRA))
    before = newest(path)
    add(data, LATE)
    starts: list[torch.Tensor] = []
    original = experiment.take_in

    def spy(*arguments: Any) -> Any:
        state = original(*arguments)
        starts.append(state.adapters.values_KP.clone())
        return state

    monkeypatch.setattr(experiment, "take_in", spy)
    run(config(data, 3, MIRA), resume=True)
    [rows_KP] = starts
    assert torch.equal(rows_KP[:3], before.tensors["state.adapters"])
    uploads_KP = before.tensors["state.memory.uploads"].double().numpy()
    graph = labels([TASKS[name] for name in (*CLIENTS, LATE)])
    # all hold as many examples and all came back: confidence 1, and 0 of who joined; ben and dora count as well
    matrix_KK = implicit_matrix(graph, 4.0, (1.0, 1.0, 1.0, 0.0))
    np.testing.assert_allclose(rows_KP[3].double().numpy(), matrix_KK[3, :3] @ uploads_KP, atol=1e-6)
    assert matrix_KK[3].tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0])


def test_clients_can_join_again_and_again(data: Path) -> None:
    for name in (*CLIENTS[1:], LATE):
        (data / f"{name}.jsonl").unlink(missing_ok=True)
    for rounds, name in enumerate(("dora", "anna", "cleo"), start=2):
        path = run(config(data, rounds - 1, "fedit"), resume=True)
        add(data, name)
    path = run(config(data, 4, "fedit"), resume=True)
    clients = RunStore.open(path).manifest()["clients"]
    assert [(c["name"], c.get("joined_after")) for c in clients] == [
        ("ben", None),
        ("dora", 1),
        ("anna", 2),
        ("cleo", 3),
    ]
    assert len(RunStore.open(path).manifest()["data_before"]) == 3
    rows_KP = newest(path).tensors["state.adapters"]
    assert all(torch.equal(row_P, rows_KP[0]) for row_P in rows_KP)


def test_of_sampled_clients_those_drawn_later_are_drawn_among_all(data: Path) -> None:
    federation = {"participation": 0.67}
    path = run(config(data, 3, MIRA, federation={"rounds": 3, **federation}))
    add(data, LATE)
    run(config(data, 12, MIRA, federation={"rounds": 12, **federation}), resume=True)
    drawn = [event["participants"] for event in events(path, "round")]
    assert [len(names) for names in drawn] == [2] * 3 + [3] * 9
    assert any(LATE in names for names in drawn[3:])
    assert any(LATE not in names for names in drawn[3:])


def test_a_text_that_who_joins_shares_stays_in_the_split_it_had(data: Path) -> None:
    """Its file comes first, but those that were there decide."""
    path = run(config(data, 1))
    before = RunStore.open(path).manifest()["clients"]
    (data / f"{LATE}.jsonl").write_text("".join((data / f"{name}.jsonl").read_text() for name in CLIENTS))
    run(config(data, 2), resume=True)
    assert RunStore.open(path).manifest()["clients"][:3] == before


# ------------------------------------------------------------------------------------------------------ refusals


def changed_text(data: Path) -> None:
    text = (data / "cleo.jsonl").read_text()
    (data / "cleo.jsonl").write_text(text.replace("spell cleo 4", "spell cleo four"))


def changed_task(data: Path) -> None:
    text = (data / "cleo.jsonl").read_text()
    (data / "cleo.jsonl").write_text(text.replace('"task": "spell"', '"task": "count"'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: add(data, "cleo", 12), r"cleo: train 6 -> 7, validation 1 -> 2, test 2 -> 3 differ; only new"),
        (changed_text, "cleo: other texts or another task differ; only new clients may be added"),
        (changed_task, "cleo: other texts or another task differ"),
        (lambda data: (data / "cleo.jsonl").unlink(), "it no longer has cleo, whose adapters the run keeps"),
    ],
)
@pytest.mark.parametrize("joining", [False, True])
def test_a_client_of_the_run_that_changed_is_refused_by_name(
    data: Path, change: Callable[[Path], None], message: str, joining: bool
) -> None:
    path = run(config(data, 2))
    before = files(path)
    if joining:
        add(data, LATE)
    change(data)
    with pytest.raises(IntegrityError, match=message) as raised:
        run(config(data, 2 + joining), resume=True, source_text="# three")
    assert "restore the files, or start a new run" in str(raised.value)
    assert files(path) == before


def test_a_finished_run_needs_more_rounds(data: Path) -> None:
    path = run(config(data, 2))
    before = files(path)
    add(data, LATE)
    with pytest.raises(UsageError, match=r"anna joined the data, but all 2 rounds .*raise federation.rounds.* to 3,"):
        run(config(data, 2), resume=True)
    assert files(path) == before
    assert run(config(data, 3), resume=True) == path


def test_files_that_moved_lines_do_not_matter(data: Path) -> None:
    path = run(config(data, 1))
    lines = (data / "ben.jsonl").read_text().splitlines(keepends=True)
    (data / "ben.jsonl").write_text("\n".join(["", *lines]))
    assert run(config(data, 2), resume=True) == path


def test_a_run_that_wrote_down_only_its_files_goes_on_with_these_alone(data: Path) -> None:
    path = run(config(data, 1))
    manifest = RunStore.open(path).manifest()
    for client in manifest["clients"]:
        del client["sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    run(config(data, 2), resume=True)
    add(data, LATE)
    with pytest.raises(IntegrityError, match="the data changed since the run was started"):
        run(config(data, 3), resume=True)


def test_a_given_graph_may_grow_but_not_change(data: Path) -> None:
    file = data.parent / "graph.json"
    method = {"name": "mira", "graph": {"kind": "given", "path": str(file)}, "choice": {"enabled": False}}

    def write(weight: float, *names: str) -> None:
        size = len(names)
        matrix = [[weight * (row != column) for column in range(size)] for row in range(size)]
        file.write_text(json.dumps({"names": names, "adjacency": matrix}))

    write(1.0, *CLIENTS)
    path = run(config(data, 1, method))
    add(data, LATE)
    write(2.0, LATE, *CLIENTS)
    with pytest.raises(IntegrityError, match=r"the graph changed since the run was started \(sha256 differ\)"):
        run(config(data, 2, method), resume=True)
    write(1.0, LATE, *CLIENTS)
    assert run(config(data, 2, method), resume=True) == path
    assert run(config(data, 3, method), resume=True) == path, "the grown graph is the one of the run now"


# ------------------------------------------------------------------------------------------- stopped in the middle


class StopsInRound(SilentDisplay):
    """Sends this process a signal after the second step of a round."""

    def __init__(self, round_: int) -> None:
        self.round_, self.messages = round_, list[str]()

    def step(self, round_: int, done: int, total: int) -> None:
        if round_ == self.round_ and done == 2:
            signal.raise_signal(signal.SIGTERM)

    def message(self, line: str) -> None:
        self.messages.append(line)


@pytest.mark.parametrize("method", ["fedit", MIRA])
def test_a_round_that_was_stopped_ends_with_those_who_began_it(data: Path, method: Any) -> None:
    """And only then does anybody join: as if the file had come after that round."""
    sections = {"exchange": {"compression": "int8"}} if method == "fedit" else {}
    expected = run(config(data, 2, method, **sections), directory=data.parent / "others")
    with pytest.raises(Interrupted):
        run(config(data, 2, method, **sections), display=StopsInRound(2))
    add(data, LATE)
    run(config(data, 4, method, **sections), resume=True, directory=data.parent / "others")
    told = StopsInRound(0)
    path = run(config(data, 4, method, **sections), resume=True, display=told)
    assert f"joined after round 2: {LATE}" in told.messages
    assert same(newest(path), newest(expected))
    assert events(path, "round") == events(expected, "round")


def test_nobody_joins_a_run_whose_last_round_was_stopped(data: Path) -> None:
    with pytest.raises(Interrupted):
        run(config(data, 2), display=StopsInRound(2))
    add(data, LATE)
    with pytest.raises(UsageError, match=r"raise federation\.rounds"):
        run(config(data, 2), resume=True)


@pytest.mark.parametrize("moment", ["take_in", "grown_manifest", "_tell", "_save", "splits", "round"])
def test_a_run_killed_while_clients_join_is_resumed_bit_for_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    expected = run(config(data, 1, MIRA), directory=data.parent / "others")
    path = run(config(data, 1, MIRA))
    add(data, LATE)
    assert run(config(data, 4, MIRA), resume=True, directory=data.parent / "others") == expected

    class Killed(BaseException):
        pass

    def kill(*arguments: Any, **named: Any) -> Any:
        raise Killed

    where: Any = experiment if moment in ("take_in", "grown_manifest") else experiment._Run
    where = Recorder if moment in ("splits", "round") else where
    with monkeypatch.context() as patch:
        patch.setattr(where, moment, kill)
        with pytest.raises(Killed):
            run(config(data, 4, MIRA), resume=True)
    trained = load_trained(path)
    assert len(trained.names) == trained.adapters.num_clients
    run(config(data, 4, MIRA), resume=True)
    assert same(newest(path), newest(expected))
    assert events(path, "joined") == events(expected, "joined")
    assert events(path, "round") == events(expected, "round")
    manifests = [RunStore.open(one).manifest() for one in (path, expected)]
    for key in ("clients", "data", "data_before"):
        assert manifests[0][key] == manifests[1][key]


# ----------------------------------------------------------------------------------------- rounds that are made again

PRIVATE = {"privacy": {"enabled": True, "clip_norm": 0.5, "noise_multiplier": 2.0}}


class Killed(BaseException):
    """Stands for the process dying."""


def killed_in(round_: int, of: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Carry out the run until the uploads of that round are there, but nothing says so yet."""

    def record(self: Any, parts: Any, participants: Any, *others: Any) -> float:
        if participants.round == round_:
            raise Killed
        return original(self, parts, participants, *others)

    original = Recorder.round
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "round", record)
        with pytest.raises(Killed):
            run(of, resume=True)


def test_who_joins_after_a_crash_makes_no_upload_forgotten(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that the crash took were sent: they are made again bit for bit, and only then somebody joins."""
    sent: dict[tuple[Any, ...], set[bytes]] = {}
    original = seam.privatise_

    def watched(layout: Any, groups: Any, values_SP: torch.Tensor, start_SP: Any, streams: Any, *others: Any) -> None:
        original(layout, groups, values_SP, start_SP, streams, *others)
        for stream, value_P in zip(streams, values_SP, strict=True):
            sent.setdefault(stream, set()).add(value_P.numpy().tobytes())

    monkeypatch.setattr(seam, "privatise_", watched)
    settings = {"exchange": PRIVATE, "output": {"directory": str(data.parent / "runs"), "checkpoint_every": 2}}
    killed_in(4, config(data, 4, "fedit", **settings), monkeypatch)
    add(data, LATE)
    path = run(config(data, 6, "fedit", **settings), resume=True)
    assert all(len(values) == 1 for values in sent.values()), "one noise under two values says what they are"
    names = [client["name"] for client in RunStore.open(path).manifest()["clients"]]
    assert RunStore.open(path).manifest()["clients"][-1]["joined_after"] == 4
    made = [sum(name == stream[0] for stream in sent) for name in names]
    assert made == newest(path).facts["exchange"]["uploads"] == [6, 6, 6, 2]


def test_nobody_joins_before_the_first_checkpoint_what_was_sent_already(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = config(data, 2, "fedit", exchange=PRIVATE)
    killed_in(1, of, monkeypatch)
    add(data, LATE)
    with pytest.raises(IntegrityError, match="anna joined"):
        run(of, resume=True)
    (data / f"{LATE}.jsonl").unlink()
    assert newest(run(of, resume=True)).round == 2


def test_who_joined_joins_again_at_the_same_place_where_checkpoints_since_are_lost(data: Path) -> None:
    run(config(data, 2, MIRA))
    add(data, LATE)
    path = run(config(data, 5, MIRA), resume=True)
    undisturbed, recorded = newest(path), (path / "metrics.jsonl").read_text().count("joined")
    for checkpoint in (path / "checkpoints").iterdir():
        if checkpoint.name > "round-00002":
            (checkpoint / "state.safetensors").write_bytes(b"rot")
    run(config(data, 5, MIRA), resume=True)
    assert same(newest(path), undisturbed)
    assert (path / "metrics.jsonl").read_text().count("joined") == recorded == 1
    assert RunStore.open(path).manifest()["clients"][-1]["joined_after"] == 2
