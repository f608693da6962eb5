"""Run directories: one writer, nothing overwritten, events that survive a torn line and a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.runs.faults import Crash, dying_at, failing_at, trace

from fedmira.config.file import config_hash, parse_config
from fedmira.config.method import FedITConfig
from fedmira.config.run import OutputConfig, RunConfig
from fedmira.config.training import FederationConfig, TrainingConfig
from fedmira.errors import IntegrityError, SetupError, UsageError
from fedmira.runs.checkpoint import save
from fedmira.runs.generations import expect_checkpoints, refuse_lost_checkpoints
from fedmira.runs.lock import LOCK, lock_folder
from fedmira.runs.manifest import MANIFEST, SCHEMA
from fedmira.runs.naming import run_directory
from fedmira.runs.store import GRAPH, LOG, METRICS, PROFILE, RESOLVED, UPLOADS, RunStore
from fedmira.studies.compare import study_directory

CONFIG = RunConfig(name="trial", seed=3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create(CONFIG, "seed: 3  # as given\n", tmp_path) as store:
        yield store


# --------------------------------------------------------------------------------------------------- making and opening


def test_a_run_directory_is_named_after_its_config(store: RunStore, tmp_path: Path) -> None:
    assert store.path == tmp_path / f"trial-mira-seed3-{config_hash(CONFIG)}"
    assert (store.path / "config.yaml").read_text() == "seed: 3  # as given\n"
    assert parse_config((store.path / RESOLVED).read_text()) == CONFIG


def test_the_folder_is_output_directory_unless_given(tmp_path: Path) -> None:
    config = RunConfig(output=OutputConfig(directory=str(tmp_path / "a" / "b")))
    with RunStore.create(config, None) as store:
        assert store.path.parent == tmp_path / "a" / "b"
        assert not (store.path / "config.yaml").exists()


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig(output=OutputConfig(directory="~/mine"))
    assert run_directory(config).parent == study_directory(config).parent == tmp_path / "mine"


def test_opening_gives_the_config_back(store: RunStore) -> None:
    assert RunStore.open(store.path).config == CONFIG
    assert RunStore.open(str(store.path)).path == store.path


def test_a_run_that_got_somewhere_is_not_overwritten(store: RunStore, tmp_path: Path) -> None:
    store.append({"event": "round"})
    store.close()
    with pytest.raises(UsageError, match="add --resume to continue it, or remove it or choose another"):
        RunStore.create(CONFIG, None, tmp_path)
    (store.path / METRICS).unlink()
    RunStore.create(CONFIG, None, tmp_path).close()
    save(store.path, 1, {"x": torch.zeros(1)}, {}, config_hash=config_hash(CONFIG), keep=1)
    with pytest.raises(UsageError, match="--resume"):
        RunStore.create(CONFIG, None, tmp_path)


def test_a_run_that_never_began_is_used_again(store: RunStore, tmp_path: Path) -> None:
    store.log("started")
    store.write_manifest({"seed": 3})
    store.close()
    RunStore.create(CONFIG, None, tmp_path).close()


def test_what_a_profiled_or_killed_process_left_is_ours(store: RunStore, tmp_path: Path) -> None:
    store.close()
    for name in ("profile.json", ".config.yaml.tmp-1f"):
        (store.path / name).write_text("{}")
    RunStore.create(CONFIG, None, tmp_path).close()


@pytest.mark.parametrize("lost", [True, False])
def test_results_are_not_thrown_away_because_the_checkpoints_were(lost: bool, store: RunStore) -> None:
    """One round may be recorded and not saved yet; what is further, or final, was."""
    store.append({"event": "round", "round": 1})
    refuse_lost_checkpoints(store.path, store.events(), store.most_unsaved)
    store.append({"event": "round", "round": 2} if lost else {"event": "final", "round": 1})
    with pytest.raises(IntegrityError, match=r"results of \d rounds? and no checkpoint to go on from: checkpoints was"):
        refuse_lost_checkpoints(store.path, store.events(), store.most_unsaved)


def test_final_results_may_be_ahead_of_the_first_checkpoint(store: RunStore) -> None:
    expect_checkpoints(store.path)
    for event in ("round", "final"):
        store.append({"event": event, "round": 1})
    refuse_lost_checkpoints(store.path, store.events(), store.most_unsaved)


def test_rounds_that_could_be_unsaved_are_no_loss_where_checkpoints_come_oftener_now(tmp_path: Path) -> None:
    often = CONFIG.model_copy(update={"output": OutputConfig(checkpoint_every=1)})
    seldom = CONFIG.model_copy(update={"output": OutputConfig(checkpoint_every=4)})
    with RunStore.create(seldom, None, tmp_path) as store:
        store.append({"event": "round", "round": 3})
    with RunStore.resume(often, None, tmp_path) as store:
        assert store.config.output.checkpoint_every == 1
        refuse_lost_checkpoints(store.path, store.events(), store.most_unsaved)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    path = run_directory(CONFIG, tmp_path)
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    for make in (RunStore.create, RunStore.resume, RunStore.open_or_create):
        with pytest.raises(UsageError, match=r"holds something else \(thesis\.tex\)"):
            make(CONFIG, None, tmp_path)
    assert os.listdir(path) == ["thesis.tex"]


@pytest.mark.parametrize("kind", ["folder", "dangling"])
def test_a_link_is_not_a_run_directory(kind: str, tmp_path: Path) -> None:
    path = run_directory(CONFIG, tmp_path)
    target = tmp_path / "elsewhere"
    if kind == "folder":
        target.mkdir()
    path.symlink_to(target)
    for make in (RunStore.create, RunStore.resume, RunStore.open_or_create):
        with pytest.raises(UsageError, match="symbolic link"):
            make(CONFIG, None, tmp_path)
    with pytest.raises(UsageError, match="symbolic link"):
        RunStore.open(path)
    assert not target.exists() or os.listdir(target) == []


@pytest.mark.parametrize("make", [RunStore.create, RunStore.resume, RunStore.open_or_create])
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_is_a_fault_of_the_place(make: Any, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SetupError, match=f"could not make the folder .*{place}.*choose another folder"):
        make(CONFIG, None, tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_that_can_no_longer_be_written_is_refused_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock and its events may be writable files in a folder that is not."""
    with_an_event(CONFIG, tmp_path)

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SetupError, match=r"could not write to .*Permission denied .*who owns the folder"):
        RunStore.resume(CONFIG, None, tmp_path)


def test_where_there_is_no_run(store: RunStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run directory"):
        RunStore.open(tmp_path / "nothing")
    with pytest.raises(UsageError, match=f"give one of the runs in it: {store.path.name}"):
        RunStore.open(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        RunStore.open(store.path / RESOLVED)


@pytest.mark.parametrize("damage", [b"", b"seed: [", b"seed: -3", b"\xff\xfe", b"seed: 4"], ids=repr)
def test_a_damaged_config_is_noticed(damage: bytes, store: RunStore) -> None:
    store.write_manifest({})
    (store.path / RESOLVED).write_bytes(damage)
    with pytest.raises(IntegrityError, match=RESOLVED) as caught:
        RunStore.open(store.path)
    assert caught.value.exit_code == 5


def test_a_file_that_is_a_link_or_cannot_be_read(store: RunStore, tmp_path: Path) -> None:
    (store.path / RESOLVED).rename(tmp_path / "moved")
    (store.path / RESOLVED).symlink_to(tmp_path / "moved")
    with pytest.raises(IntegrityError, match=r"could not read .*\(ELOOP\)"):
        RunStore.open(store.path)


# ------------------------------------------------------------------------------------------------------------ resuming


def with_an_event(config: RunConfig, directory: Path) -> Path:
    with RunStore.create(config, None, directory) as store:
        store.append({"event": "round"})
        return store.path


def test_resume_continues_or_starts(tmp_path: Path) -> None:
    with RunStore.resume(CONFIG, None, tmp_path) as store:
        store.append({"round": 1})
    with RunStore.resume(CONFIG, None, tmp_path) as store:
        store.append({"round": 2})
        assert [event["round"] for event in store.events()] == [1, 2]


def test_resume_ignores_what_does_not_change_the_computation(tmp_path: Path) -> None:
    path = with_an_event(CONFIG, tmp_path)
    again = CONFIG.model_copy(update={"output": OutputConfig(directory="elsewhere", keep_checkpoints=9)})
    with RunStore.resume(again, None, tmp_path) as store:
        assert store.path == path
        assert store.config.output.keep_checkpoints == 9, "what is kept from now on may change"


def test_resume_under_a_changed_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    with_an_event(CONFIG, tmp_path)
    changed = RunConfig(
        name="trial",
        seed=3,
        training=TrainingConfig(learning_rate=1e-3),
        federation=FederationConfig(rounds=7, participation=0.5),
    )
    with pytest.raises(IntegrityError) as caught:
        RunStore.resume(changed, None, tmp_path)
    assert caught.value.exit_code == 5
    for line in (
        "training.learning_rate: 0.002 -> 0.001",
        "federation.rounds: 8 -> 7",
        "federation.participation: 1.0 -> 0.5",
    ):
        assert f"\n  {line}\n" in str(caught.value)
    assert not run_directory(changed, tmp_path).exists()


def test_resume_does_not_mind_what_else_is_called_alike(tmp_path: Path) -> None:
    (tmp_path / "trial-mira-seed3-0123abcd").symlink_to("/nowhere/archived")
    (tmp_path / "trial-mira-seed3-1123abcd").mkdir()
    nothing_came_of_it = tmp_path / "trial-mira-seed3-2123abcd"
    nothing_came_of_it.mkdir()
    (nothing_came_of_it / RESOLVED).write_text("federation: {a_key_of_another_version: 1}\n")
    RunStore.resume(CONFIG, None, tmp_path).close()


def test_a_run_whose_manifest_is_of_a_later_schema_is_not_opened(tmp_path: Path) -> None:
    path = with_an_event(CONFIG, tmp_path)
    facts = {"config_hash": config_hash(CONFIG)}
    for known in ({}, {"schema": SCHEMA}):
        (path / MANIFEST).write_text(json.dumps(facts | known))
        RunStore.open(path).close()
    (path / MANIFEST).write_text(json.dumps(facts | {"schema": SCHEMA + 1}))
    with pytest.raises(IntegrityError, match=r"manifest\.json has schema 2, this version of fedmira reads 1"):
        RunStore.open(path)


def test_a_run_of_another_version_ends_a_resume_only_where_it_may_be_meant(tmp_path: Path) -> None:
    shorter = with_an_event(with_rounds(2), tmp_path)
    (shorter / MANIFEST).write_text(json.dumps({"config_hash": config_hash(with_rounds(2))}))
    other = tmp_path / "trial-mira-seed3-0123abcd"
    other.mkdir()
    (other / RESOLVED).write_text("federation: {a_key_of_another_version: 1}\n")
    (other / METRICS).write_text('{"event":"round","round":1}\n')
    with RunStore.resume(with_rounds(4), None, tmp_path) as store:
        assert store.path == shorter
    shutil.rmtree(shorter)
    with pytest.raises(IntegrityError, match=r"(?s)0123abcd.*written by another version.*leave out --resume"):
        RunStore.resume(with_rounds(4), None, tmp_path)
    with RunStore.create(with_rounds(4), None, tmp_path) as store:
        store.append({"round": 1})
    RunStore.resume(with_rounds(4), None, tmp_path).close()


def with_rounds(rounds: int) -> RunConfig:
    return CONFIG.model_copy(update={"federation": FederationConfig(rounds=rounds)})


def begun(directory: Path) -> None:
    """A run of 2 rounds."""
    with RunStore.create(with_rounds(2), None, directory) as store:
        store.append({"event": "round", "round": 1})
        store.write_manifest({})


@pytest.fixture
def prolonged(tmp_path: Path) -> Path:
    """A run begun with 2 rounds that got 4 since."""
    begun(tmp_path)
    with RunStore.resume(with_rounds(4), None, tmp_path) as store:
        store.write_rounds()
        return store.path


def test_dying_while_a_run_is_prolonged_leaves_one_that_can_be(tmp_path: Path) -> None:
    seen = []
    for number in range(1, 30):
        begun(tmp_path / str(number))
        with RunStore.resume(with_rounds(4), "", tmp_path / str(number)) as store, suppress(Crash), dying_at(number):
            store.write_rounds()
        seen.append(RunStore.open(store.path).config.federation.rounds)
        with RunStore.resume(with_rounds(4), None, tmp_path / str(number)) as again:
            assert again.path == store.path
    assert seen == sorted(seen)
    assert set(seen) == {2, 4}


def test_a_prolonged_run_says_how_it_goes_on(prolonged: Path, tmp_path: Path) -> None:
    how = "This run was prolonged to 4 rounds: write federation.rounds=4, also in the file, to resume"
    with pytest.raises(
        IntegrityError, match=f"rounds: 4 -> 2\n{how}, or give another name or output.directory to start"
    ):
        RunStore.resume(with_rounds(2), None, tmp_path)
    with pytest.raises(
        UsageError, match=r"prolonged to 4 rounds; write federation\.rounds=4, also in the file, and add"
    ):
        RunStore.create(with_rounds(2), None, tmp_path)
    with pytest.raises(IntegrityError, match=f"rounds: 4 -> 3\n{how}, or leave out --resume to start a new run"):
        RunStore.resume(with_rounds(3), None, tmp_path)
    RunStore.create(with_rounds(3), None, tmp_path).close()


def test_where_more_than_the_rounds_differs_all_of_it_is_to_be_put_back(prolonged: Path, tmp_path: Path) -> None:
    other = with_rounds(2).model_copy(update={"training": TrainingConfig(learning_rate=1e-3)})
    with pytest.raises(IntegrityError, match="Put these values back to resume, or leave out --resume"):
        RunStore.resume(other, None, tmp_path)


def test_more_rounds_are_not_among_what_is_to_be_put_back(prolonged: Path, tmp_path: Path) -> None:
    other = with_rounds(9).model_copy(update={"training": TrainingConfig(learning_rate=1e-3)})
    with pytest.raises(IntegrityError, match=r"training\.learning_rate") as caught:
        RunStore.resume(other, None, tmp_path)
    assert "rounds: " not in str(caught.value)


class Failure(Exception):
    pass


def failing_after(store: RunStore, *steps: Callable[[RunStore], object]) -> None:
    with store:
        for step in steps:
            step(store)
        raise Failure


def test_a_directory_goes_with_the_set_up_that_failed_in_it(tmp_path: Path) -> None:
    store = RunStore.resume(CONFIG, None, tmp_path)
    with pytest.raises(Failure):
        failing_after(store, lambda store: store.write_manifest({}), lambda store: store.log("a line"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "step",
    [
        lambda store: store.append({"event": "round"}),
        lambda store: save(store.path, 0, {"x": torch.zeros(1)}, {}, config_hash=config_hash(CONFIG), keep=1),
        RunStore.keep,
    ],
    ids=["event", "checkpoint", "keep"],
)
def test_a_directory_stays_once_something_came_of_it(step: Callable[[RunStore], object], tmp_path: Path) -> None:
    store = RunStore.create(CONFIG, None, tmp_path)
    with pytest.raises(Failure):
        failing_after(store, step)
    assert os.listdir(tmp_path) == [store.path.name]


def test_a_directory_that_was_there_before_stays(tmp_path: Path) -> None:
    RunStore.create(CONFIG, None, tmp_path).close()
    store = RunStore.create(CONFIG, None, tmp_path)
    with pytest.raises(Failure):
        failing_after(store)
    assert os.listdir(tmp_path) == [store.path.name]


def test_another_seed_method_or_name_is_another_run(tmp_path: Path) -> None:
    with_an_event(CONFIG, tmp_path)
    for config in (
        CONFIG.model_copy(update={"seed": 4}),
        CONFIG.model_copy(update={"name": "trial-2"}),
        CONFIG.model_copy(update={"method": FedITConfig(name="fedit")}),
    ):
        RunStore.resume(config, None, tmp_path).close()
    assert len(os.listdir(tmp_path)) == 4


def test_open_or_create_does_not_mind_other_configs(tmp_path: Path) -> None:
    """A comparison tries several learning rates side by side."""
    with_an_event(CONFIG, tmp_path)
    other = RunConfig(name="trial", seed=3, training=TrainingConfig(learning_rate=1e-3))
    RunStore.open_or_create(other, None, tmp_path).close()
    RunStore.open_or_create(other, None, tmp_path).close()


def test_a_lost_resolved_config_is_written_again(tmp_path: Path) -> None:
    path = with_an_event(CONFIG, tmp_path)
    (path / RESOLVED).unlink()
    with RunStore.resume(CONFIG, None, tmp_path) as store:
        assert store.events() == [{"event": "round"}]
    assert RunStore.open(path).config == CONFIG


# ---------------------------------------------------------------------------------------------------------------- lock


def test_two_writers_are_one_too_many(store: RunStore, tmp_path: Path) -> None:
    reader = RunStore.open(store.path)
    assert reader.events() == []
    for write in (
        lambda: reader.append({}),
        lambda: reader.write_manifest({}),
        lambda: reader.log("x"),
        lambda: reader.truncate_metrics(0),
        lambda: RunStore.create(CONFIG, None, tmp_path),
        lambda: RunStore.resume(CONFIG, None, tmp_path),
    ):
        with pytest.raises(UsageError, match=rf"another process \(number {os.getpid()}\) is writing"):
            write()
    store.close()
    reader.append({"now": "free"})
    reader.close()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from fedmira.config.run import RunConfig
from fedmira.runs.store import RunStore
store = RunStore.create(RunConfig(name="trial", seed=3), None, Path({str(tmp_path)!r}))
store.append({{"round": 1}})
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match=rf"number {process.pid}\) is writing"):
            RunStore.resume(CONFIG, None, tmp_path)
        process.send_signal(signal.SIGKILL)
    with RunStore.resume(CONFIG, None, tmp_path) as store:
        assert store.events() == [{"round": 1}]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_that_could_not_be_made_durable_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fedmira.runs.store.sync_folder", full)
        for make in (RunStore.create, RunStore.resume, RunStore.open_or_create):
            with pytest.raises(SetupError, match=r"could not sync .*the disk is full"):
                make(CONFIG, None, tmp_path)
            assert os.listdir(tmp_path) == [], "what was made for it goes too"
    path = with_an_event(CONFIG, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fedmira.runs.store.sync_folder", full)
        with pytest.raises(SetupError, match="could not sync"):
            RunStore.resume(CONFIG, None, tmp_path)
    (path / RESOLVED).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("fedmira.runs.atomic.os.replace", full)
        with pytest.raises(SetupError, match="could not write"):
            RunStore.open_or_create(CONFIG, None, tmp_path)
    with RunStore.open_or_create(CONFIG, None, tmp_path) as store:
        assert store.events()


def test_closing_twice_is_harmless(store: RunStore) -> None:
    store.close()
    store.close()


# -------------------------------------------------------------------------------------------------------------- events


def test_events_come_back_in_order(store: RunStore) -> None:
    events = [
        {"event": "round", "round": r, "names": ["é", "a\nb", "c\u2028d\u0085"], "x": [1.5, None, True]}
        for r in range(50)
    ]
    for event in events:
        store.append(event)
    assert store.events() == events
    assert RunStore.open(store.path).events() == events
    assert (store.path / METRICS).read_bytes().count(b"\n") == 50


def test_what_is_not_finite_becomes_null_with_a_note(store: RunStore) -> None:
    store.append({"loss": float("nan"), "clients": {"a": [1.0, float("-inf")]}, "ok": 1.0})
    text = (store.path / METRICS).read_text()
    assert "NaN" not in text
    assert json.loads(text) == {
        "loss": None,
        "clients": {"a": [1.0, None]},
        "ok": 1.0,
        "non_finite": {"loss": "nan", "clients.a[1]": "-inf"},
    }


def test_a_matrix_keeps_its_numbers_and_tells_which_of_them_is_not_finite(store: RunStore) -> None:
    store.append({"rows": [[0.5, 1.0], (2.0, float("inf")), [1, 0.5, None], []]})
    assert store.events() == [
        {"rows": [[0.5, 1.0], [2.0, None], [1, 0.5, None], []], "non_finite": {"rows[1][1]": "inf"}},
    ]


def test_numpy_and_torch_numbers_are_stored_as_numbers(store: RunStore) -> None:
    store.append(
        {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.arange(3), "d": np.float64("nan"), "e": Path("x")}
    )
    assert store.events() == [
        {"a": 0.5, "b": 2, "c": [0, 1, 2], "d": None, "e": "x", "non_finite": {"d": "nan"}},
    ]


def test_floats_survive_bit_for_bit(store: RunStore) -> None:
    values = np.random.Generator(np.random.Philox(1)).standard_normal(1000).tolist()
    store.append({"values": values})
    assert store.events()[0]["values"] == values


def test_a_torn_last_line_is_ignored_by_readers_and_cut_by_the_next_writer(store: RunStore) -> None:
    store.append({"round": 1})
    store.append({"round": 2})
    store.close()
    path = store.path / METRICS
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        expected = [{"round": r} for r in (1, 2)][: whole[:length].count(b"\n")]
        with RunStore.open(store.path) as again:
            assert again.events() == expected
            again.append({"round": 9})
            assert again.events() == [*expected, {"round": 9}]


def test_a_torn_line_longer_than_the_look_back_is_cut(store: RunStore) -> None:
    store.append({"round": 1})
    store.close()
    with (store.path / METRICS).open("ab") as file:
        file.write(b"x" * 200_000)
    with RunStore.open(store.path) as again:
        assert again.metrics_position() == len(b'{"round":1}\n')


@pytest.mark.parametrize(
    "line", [b"{\n", b"3\n", b"\xff\n", b"\n", b"[" * 100_000 + b"\n"], ids=lambda line: repr(line[:5])
)
def test_any_other_damaged_line_is_an_error(line: bytes, store: RunStore) -> None:
    store.append({"round": 1})
    with (store.path / METRICS).open("ab") as file:
        file.write(line + b'{"round":2}\n')
    with pytest.raises(IntegrityError, match="line 2, is damaged"):
        store.events()


def test_metrics_are_cut_back_to_a_checkpoint(store: RunStore) -> None:
    store.append({"round": 1})
    position = store.metrics_position()
    store.append({"round": 2})
    store.truncate_metrics(position)
    assert store.events() == [{"round": 1}]
    store.append({"round": 3})
    assert store.events() == [{"round": 1}, {"round": 3}]
    store.truncate_metrics(0)
    assert store.events() == []


def test_events_are_durable_before_a_checkpoint_remembers_them(store: RunStore) -> None:
    store.append({"event": "round"})
    assert [name for name, _ in trace(store.metrics_position)] == ["fsync"]
    assert [name for name, _ in trace(lambda: store.truncate_metrics(0))] == ["ftruncate", "fsync"]


@pytest.mark.parametrize("position", [-1, 5, 11, 13, 10**12])
def test_a_position_that_the_file_never_had_is_refused(position: int, store: RunStore) -> None:
    store.append({"round": 1})
    with pytest.raises(IntegrityError, match="events were lost or changed"):
        store.truncate_metrics(position)
    assert store.events() == [{"round": 1}]


def test_a_full_disk_leaves_no_half_event(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append({"round": 1})
    write = os.write
    calls = []

    def fills_up(descriptor: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:4])

    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(SetupError, match=r"metrics\.jsonl: No space left on device \(ENOSPC\).*--resume"):
        store.append({"round": 2})
    monkeypatch.undo()
    assert (store.path / METRICS).read_bytes() == b'{"round":1}\n'


def test_a_disk_that_refuses_everything_is_reported_all_the_same(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append({"round": 1})
    for name in ("write", "ftruncate"):
        monkeypatch.setattr(os, name, faulty)
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl: Input/output error \(EIO\)"):
        store.append({"round": 2})


def faulty(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_lock_that_cannot_be_read_either_is_a_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pwrite", "pread"):
        monkeypatch.setattr(os, name, faulty)
    with pytest.raises(IntegrityError, match=r"could not lock .*Input/output error \(EIO\)"):
        lock_folder(tmp_path)


def test_what_failed_is_said_although_the_folder_cannot_be_listed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore.create(CONFIG, None, tmp_path)
    monkeypatch.setattr(os, "listdir", faulty)
    store.__exit__(KeyError, KeyError("what failed"), None)


# --------------------------------------------------------------------------------------------------------- small files


def test_manifest_and_graph_come_back(store: RunStore) -> None:
    assert store.manifest() == {}
    store.write_manifest({"versions": {"torch": "2"}, "weight": np.float64(2)})
    store.write_graph({"adjacency": np.eye(2)})
    manifest = RunStore.open(store.path).manifest()
    assert manifest["config_hash"] == config_hash(CONFIG)
    assert (manifest["versions"], manifest["weight"]) == ({"torch": "2"}, 2.0)
    assert json.loads((store.path / GRAPH).read_bytes()) == {"adjacency": [[1.0, 0.0], [0.0, 1.0]]}


def test_half_characters_come_back(store: RunStore) -> None:
    store.write_manifest({"path": "caf\udce9"})
    assert store.manifest()["path"] == "caf\udce9"


@pytest.mark.parametrize("name", [MANIFEST, PROFILE])
def test_a_damaged_small_file_is_an_error(name: str, store: RunStore) -> None:
    read = {MANIFEST: store.manifest, PROFILE: store.profile}[name]
    for damage in (b"", b"[]", b"{"):
        (store.path / name).write_bytes(damage)
        with pytest.raises(IntegrityError, match=f"{name} is damaged"):
            read()


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"uploads": {"anna": 1}}',
        '{"uploads": 3}',
        '{"uploads": [1, null]}',
        '{"uploads": [1, -1]}',
        "[1]",
        '{"uploads": [1], "round": "x"}',
    ],
)
def test_a_damaged_count_of_uploads_is_an_error(text: str, store: RunStore) -> None:
    assert store.uploads() == []
    assert store.announced_round() == 0
    store.write_uploads([2, 0], 2)
    assert (store.uploads(), store.announced_round()) == ([2, 0], 2)
    (store.path / UPLOADS).write_text(text)
    with pytest.raises(IntegrityError, match=r"uploads\.json is damaged: it must hold"):
        store.uploads()


def test_a_disk_that_fails_keeps_the_old_manifest(store: RunStore) -> None:
    store.write_manifest({"a": 1})
    with pytest.raises(SetupError, match=r"could not write .*manifest\.json"), failing_at(2, errno.ENOSPC):
        store.write_manifest({"a": 2})
    assert store.manifest()["a"] == 1
    assert not [name for name in os.listdir(store.path) if ".tmp" in name]


def test_log_lines_are_dated_and_cannot_hide_anything(store: RunStore) -> None:
    store.log("first\nsecond \x1b[31mred\x1b[0m \u2028 end é")
    store.log("third")
    lines = (store.path / LOG).read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(r"first\nsecond \x1b[31mred\x1b[0m \u2028 end é")
    assert lines[0][:4].isdigit()
    assert lines[0].split()[0].endswith("Z")


@pytest.mark.parametrize("name", [METRICS, LOG, LOCK])
def test_files_that_are_links_are_not_written(name: str, store: RunStore, tmp_path: Path) -> None:
    store.close()
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    (store.path / name).unlink(missing_ok=True)
    (store.path / name).symlink_to(outside)
    with pytest.raises(IntegrityError, match="ELOOP"):
        store.append({}) if name != LOG else store.log("x")
    assert outside.read_text() == "mine\n"
    store.close()


def test_nothing_is_written_outside_the_run_directory(tmp_path: Path) -> None:
    with RunStore.create(CONFIG, "x", tmp_path) as store:
        store.append({})
        store.log("x")
        store.write_manifest({})
        store.write_graph({})
        assert os.listdir(tmp_path) == [store.path.name]
    shutil.rmtree(store.path)


def test_reading_a_run_needs_no_torch(store: RunStore) -> None:
    code = "import sys; from fedmira.runs.store import RunStore; RunStore.open(sys.argv[1]).events(); "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(store.path)], check=True)
