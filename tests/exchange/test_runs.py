"""Whole runs over the seam: what is recorded, what a kill costs, who is refused. Tiny ones, as in `test_experiment`."""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import escape
from pydantic import ValidationError
from tests.exchange.builders import LAYOUT
from tests.exchange.by_name import ByName, Upload

from fedmira import assembly, experiment, recording
from fedmira.assembly import assemble
from fedmira.config.file import config_hash, parse_config, resolved_yaml
from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError, DivergedError, Interrupted, ParticipationError
from fedmira.evaluation.loss import evaluate_loss
from fedmira.exchange import in_process
from fedmira.exchange.in_process import InProcess, examples_asked, trial_bytes
from fedmira.exchange.privacy import epsilon
from fedmira.experiment import SilentDisplay, run
from fedmira.export.clients import load_trained
from fedmira.federation.questions import bounded, together
from fedmira.federation.ranks import trimmed
from fedmira.forecast.estimate import dry_run
from fedmira.recording import Recorder
from fedmira.report.page import render
from fedmira.report.reading import read
from fedmira.runs.checkpoint import load_latest
from fedmira.runs.store import RunStore
from fedmira.studies.compare import compare
from fedmira.types import Arena, Job, Losses, Participants, Trial

CLIENTS = ("family-0-client-0", "family-0-client-1", "family-1-client-0", "family-1-client-1")
NOISY = {"privacy": {"enabled": True, "clip_norm": 0.1, "noise_multiplier": 2.0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"compression": "int8", "download_compression": "int8"},
    "topk": {"compression": "topk", "top_k": 0.2},
    "noise": {**NOISY, "compression": "bf16"},
}


def tiny(exchange: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "seam",
            "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj", "down_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.01, "cohort_size": 4},
            "federation": {"rounds": 3, "participation": 0.75},
            # noise forbids clients to say which share of the mixture suits them
            "method": {"name": "mira", "graph": {"kind": "gram"}, "choice": {"enabled": "privacy" not in exchange}},
            "evaluation": {"test": False},
            "exchange": exchange,
            **sections,
        }
    )


def events(path: Path, kind: str = "round") -> list[dict[str, Any]]:
    return [event for event in RunStore.open(path).events() if event["event"] == kind]


def outcome(config: RunConfig, path: Path) -> tuple[dict[str, torch.Tensor], Any, list[dict[str, Any]]]:
    checkpoint = load_latest(path, config_hash=config_hash(config))
    assert checkpoint is not None
    told = [{key: value for key, value in event.items() if key != "timing"} for event in events(path)]
    return checkpoint.tensors, checkpoint.facts["exchange"], told


class Told(SilentDisplay):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, line: str) -> None:
        self.messages.append(line)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("how", ["killed before a checkpoint", "stopped inside a round"])
def test_a_run_that_is_killed_or_stopped_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    config = tiny(SETTINGS[name])
    whole = outcome(config, run(config, directory=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        if how == "killed before a checkpoint":
            original = experiment._Run._save

            def save(self: Any, completed_rounds: int, *rest: Any) -> None:
                if completed_rounds == 2:
                    raise Killed
                original(self, completed_rounds, *rest)

            patch.setattr(experiment._Run, "_save", save)
            with pytest.raises(Killed):
                run(config, directory=tmp_path)
        else:

            class Display(SilentDisplay):
                stop: Any = None

                def step(self, round_: int, done: int, total: int) -> None:
                    if round_ == 2 and done < total:
                        self.stop.signal_number = 15

            display = Display()
            start = experiment._Run.__init__

            def begin(self: Any, store: Any, shown: Any, stop: Any, commit: Any) -> None:
                display.stop = stop
                start(self, store, shown, stop, commit)

            patch.setattr(experiment._Run, "__init__", begin)
            with pytest.raises(Interrupted):
                run(config, directory=tmp_path, display=display)
    path = run(config, directory=tmp_path, resume=True)
    tensors, facts, told = outcome(config, path)
    assert (facts, told) == whole[1:]
    assert tensors.keys() == whole[0].keys()
    assert any(name.startswith("exchange.error.") for name in tensors)
    assert all(torch.equal(tensors[name], whole[0][name]) for name in tensors)


@pytest.mark.parametrize(("name", "at_most"), [("int8", 0.36), ("topk", 0.41)])
def test_fewer_bytes_are_recorded_and_predicted(tmp_path: Path, name: str, at_most: float) -> None:
    everyone = {"rounds": 3}
    config = tiny(SETTINGS[name], federation=everyone)
    plain = events(run(tiny({}, federation=everyone), directory=tmp_path))
    small = events(run(config, directory=tmp_path))
    estimate = dry_run(config)
    for full, event in zip(plain, small, strict=True):
        assert event["upload_bytes"] <= at_most * full["upload_bytes"]
        assert event["uncompressed_bytes"] == full["upload_bytes"] + full["download_bytes"]
        assert "uncompressed_bytes" not in full
    # what clients answer in the last round counts as well
    assert sum(event["upload_bytes"] for event in small) // 3 == estimate.upload_bytes_per_round
    downloads = [event["download_bytes"] for event in small]
    assert downloads[-1] == estimate.download_bytes_per_round
    assert (downloads[0] > downloads[1]) == (name == "int8"), "the first download is in full"


def test_what_compression_changes_is_little(tmp_path: Path) -> None:
    arenas = []
    for settings in ({}, {"compression": "int8"}, {"compression": "none", "max_norm_ratio": None}):
        path = run(tiny(settings, method={"name": "fedit"}), directory=tmp_path)
        arenas.append(load_trained(path).adapters.values_KP)
    assert torch.equal(arenas[0], arenas[2])
    assert not torch.equal(arenas[0], arenas[1])
    moved = arenas[0] - assemble(tiny({})).initial_adapters().values_KP
    apart = (arenas[0] - arenas[1]).norm() / moved.norm()
    assert apart < 0.05, float(apart)


def test_local_only_sends_nothing_so_nothing_changes_it(tmp_path: Path) -> None:
    arenas = [
        load_trained(run(tiny(settings, method={"name": "local_only"}), directory=tmp_path)).adapters.values_KP
        for settings in ({}, {**SETTINGS["noise"], "compression": "int8"})
    ]
    assert torch.equal(*arenas)


# ------------------------------------------------------------------------------------------------------------ rejected


def damaged(monkeypatch: pytest.MonkeyPatch, hurt: Callable[[torch.Tensor, tuple[int, ...]], None]) -> None:
    """Rows are hurt after training and before the server sees them, as by a bad network or a hostile client."""
    original = in_process.train

    def train(*arguments: Any, **more: Any) -> Any:
        values_SP, reports = original(*arguments, **more)
        hurt(values_SP, tuple(report.id for report in reports))
        return values_SP, reports

    monkeypatch.setattr(in_process, "train", train)


@pytest.mark.parametrize(("value", "reason"), [(math.nan, "not finite in model.layers"), (1e6, "times the median")])
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_a_damaged_upload_is_left_out_by_name_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, reason: str, compression: str
) -> None:
    def hurt(values_SP: torch.Tensor, ids: tuple[int, ...]) -> None:
        values_SP[ids.index(1), -1] = value

    damaged(monkeypatch, hurt)
    told = Told()
    path = run(tiny({"compression": compression}, federation={"rounds": 2}), directory=tmp_path, display=told)
    for event in events(path):
        [failure] = event["failures"]
        assert failure["client"] == CLIENTS[1]
        assert failure["reason"].startswith(f"the upload of client {CLIENTS[1]} was rejected: ")
        assert reason in failure["reason"]
    assert sum(f"{CLIENTS[1]} was left out" in line for line in told.messages) == 2
    assert torch.isfinite(load_trained(path).adapters.values_KP).all()
    page = render(read(path))
    assert "Left out" in page
    assert reason in page


A_TENSOR, B_TENSOR = "model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"


def without(upload: Upload, name: str) -> Upload:
    return {other: tensor for other, tensor in upload.items() if other != name}


WRONG: dict[str, tuple[Callable[[Upload], Any], str]] = {
    "names": (lambda sent: {**without(sent, A_TENSOR), "lora_A": sent[A_TENSOR]}, f"it lacks {A_TENSOR}"),
    "more names": (lambda sent: {**sent, f"{A_TENSOR}x": sent[A_TENSOR]}, f"did you mean '{A_TENSOR}'"),
    "shapes": (lambda sent: {**sent, A_TENSOR: sent[A_TENSOR].T}, f"{A_TENSOR} has shape (192, 2), expected (2, 192)"),
    "dtype": (
        lambda sent: {**sent, A_TENSOR: sent[A_TENSOR].half()},
        "has dtype torch.float16, expected torch.float32",
    ),
    "rank": (lambda sent: {**sent, B_TENSOR: sent[B_TENSOR].repeat(1, 2)}, "rank 4 instead of 2"),
    "values": (lambda sent: {**sent, B_TENSOR: sent[B_TENSOR] + math.nan}, f"not finite in {B_TENSOR}"),
    "norm": (lambda sent: {**sent, B_TENSOR: sent[B_TENSOR] + 1e4}, "times the median"),
    "nothing": (lambda sent: None, "named tensors were expected, given NoneType"),
}


@pytest.mark.parametrize("method", ["fedit", "mira"])
def test_each_kind_of_wrong_upload_is_rejected_by_name_and_the_round_goes_on_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    wrong = {f"family-0-client-{k}": damage for k, damage in enumerate(WRONG.values())}
    sound = [f"family-1-client-{k}" for k in range(8)]
    monkeypatch.setattr(assembly, "InProcess", ByName)
    monkeypatch.setattr(ByName, "on_the_way", {name: change for name, (change, _) in wrong.items()})
    data = {"source": "planted", "families": 2, "clients_per_family": 8, "examples": 12}
    config = tiny({}, data=data, federation={"rounds": 2}, method={"name": method})
    told = Told()
    path = run(config, directory=tmp_path, display=told)
    page = render(read(path))
    for event in events(path):
        assert event["participants"] == [*wrong, *sound]
        reasons = {failure["client"]: failure["reason"] for failure in event["failures"]}
        assert list(reasons) == list(wrong)
        for name, (_, reason) in wrong.items():
            assert reasons[name].startswith(f"the upload of client {name} was rejected: ")
            assert reason in reasons[name]
            assert f"round {event['round']}: {name} was left out: {reasons[name]}" in told.messages
            assert str(escape(reasons[name])) in page
        assert event["numbers"]["returned"] == len(sound)
    checkpoint = load_latest(path, config_hash=config_hash(config))
    assert checkpoint is not None
    assert checkpoint.facts["last_round_K"] == [0] * len(wrong) + [2] * len(sound)
    assert torch.isfinite(load_trained(path).adapters.values_KP).all()


def test_sound_uploads_by_name_come_to_the_same_bits_as_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny({})
    plain = outcome(config, run(config, directory=tmp_path / "plain"))
    monkeypatch.setattr(assembly, "InProcess", ByName)
    tensors, *told = outcome(config, run(config, directory=tmp_path / "by name"))
    assert told == list(plain[1:])
    assert all(torch.equal(tensors[name], plain[0][name]) for name in plain[0])


def test_who_never_came_to_send_by_name_is_told_as_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hurt(values_SP: torch.Tensor, ids: tuple[int, ...]) -> None:
        values_SP[ids.index(1), -1] = math.nan

    damaged(monkeypatch, hurt)
    config = tiny({}, federation={"rounds": 2})
    plain = run(config, directory=tmp_path / "plain")
    monkeypatch.setattr(assembly, "InProcess", ByName)
    by_name = run(config, directory=tmp_path / "by name")
    failures = [event["failures"] for event in events(by_name)]
    assert failures == [event["failures"] for event in events(plain)]
    assert [failure["client"] for of_round in failures for failure in of_round] == [CLIENTS[1]] * 2
    tensors, expected = outcome(config, by_name)[0], outcome(config, plain)[0]
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_round_in_which_all_are_rejected_stops_the_run_and_names_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(monkeypatch, lambda values_SP, ids: values_SP.fill_(math.inf).sum() and None)
    words = (
        rf"round 1: no client .*: all uploads were rejected\. The first: the upload of client {CLIENTS[0]} was "
        "rejected: values that are not finite in .* All losses were finite until the last step: if .* lower training"
    )
    with pytest.raises(DivergedError, match=words):
        run(tiny({}, federation={"rounds": 2}), directory=tmp_path)


def test_a_round_that_drowns_in_noise_says_so(tmp_path: Path) -> None:
    loud = {"privacy": {"enabled": True, "clip_norm": 1e30, "noise_multiplier": 1e12}}
    words = r"all uploads were rejected.* noise of standard deviation 1e\+42, .*noise_multiplier times clip_norm: lower"
    with pytest.raises(DivergedError, match=words):
        run(tiny(loud, method={"name": "fedit"}, federation={"rounds": 1}), directory=tmp_path)


# ------------------------------------------------------------------------------------------------------------- privacy


def test_epsilon_of_every_client_is_recorded_and_shown(tmp_path: Path) -> None:
    path = run(tiny(NOISY), directory=tmp_path)
    uploads = dict.fromkeys(CLIENTS, 0)
    for event in events(path):
        for name in event["participants"]:
            uploads[name] += 1
        expected = {name: epsilon(uploads[name], 2.0, 1e-5) for name in event["participants"]}
        assert event["privacy"] == {"delta": 1e-5, "epsilon": expected}
    page = render(read(path))
    assert f"{epsilon(max(uploads.values()), 2.0, 1e-5):.3f}" in page
    assert "1e-05" in page


def test_a_spent_budget_ends_the_run_with_everything_saved(tmp_path: Path) -> None:
    limited = {"privacy": {**NOISY["privacy"], "budget": epsilon(2, 2.0, 1e-5) + 1e-6}}
    config = tiny(limited, federation={"rounds": 5}, output={"checkpoint_every": 4})
    told = Told()
    for resume in (False, True):
        with pytest.raises(ParticipationError, match=r"round 3: the privacy budget of 4 of 4 participants") as raised:
            run(config, directory=tmp_path, resume=resume, display=told)
        assert raised.value.exit_code == 6
    [path] = tmp_path.iterdir()
    assert [event["round"] for event in events(path)] == [1, 2]
    assert load_trained(path).rounds == 2
    assert outcome(config, path)[1] == {"uploads": [2, 2, 2, 2]}
    assert sum("quadratic" in line for line in told.messages) == 1


def test_noise_from_the_system_differs_from_run_to_run(tmp_path: Path) -> None:
    private = {"privacy": {**NOISY["privacy"], "noise_seed": "system"}}
    arenas = [
        load_trained(run(tiny(private, federation={"rounds": 1}), directory=tmp_path / str(k))).adapters.values_KP
        for k in range(2)
    ]
    assert not torch.equal(*arenas)


def test_a_method_that_asks_for_losses_is_refused_under_privacy() -> None:
    asking = {"name": "mira", "graph": {"kind": "true"}, "choice": {"enabled": True}}
    assert assemble(tiny({}, method=asking)).method.trial is not None
    for method, instead in (
        (asking, "choice.enabled: false"),
        ({"name": "pcl"}, "fedit"),
        ({"name": "ifca"}, "fedit"),
        *(
            ({"name": "mira", "choice": {"enabled": False}, "graph": {"kind": kind}}, "kind: gram")
            for kind in ("trust", "embeddings")
        ),
    ):
        with pytest.raises(ValidationError, match=rf"exchange\.privacy covers adapters only.*{instead}"):
            tiny(NOISY, method=method)
    # whatever a method asks later, the seam does not let losses out
    asked = Trial((0,), 1, lambda number: torch.zeros(1, 1), sent=0)
    with pytest.raises(ConfigError, match=r"exchange\.privacy covers adapters only"):
        assemble(tiny(NOISY)).exchange.judge(asked)


def test_clients_of_smaller_rank_are_refused_under_privacy() -> None:
    adapter = {"rank": 2, "targets": ["q_proj"], "client_ranks": [1, 2]}
    with pytest.raises(ValidationError, match=r"remove model\.adapter\.client_ranks"):
        tiny(NOISY, model={"adapter": adapter, "dtype": "float32", "device": "cpu"})


def test_a_comparison_refuses_a_method_that_asks_for_losses_under_privacy(tmp_path: Path) -> None:
    config = tiny(NOISY, compare={"methods": ["fedit", "pcl"]})
    with pytest.raises(ConfigError, match=r"compare\.methods names pcl: exchange\.privacy covers adapters only"):
        compare(config, directory=tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- scalars


def test_a_run_of_scalars_counts_its_steps_and_its_seeds(tmp_path: Path) -> None:
    config = tiny({}, method={"name": "fedkseed", "seeds": 100}, training={"local_steps": 2, "learning_rate": 1e-4})
    path = run(config, directory=tmp_path)
    assert [event["upload_bytes"] for event in events(path)] == [8 * 2 * 3] * 3
    assert [event["download_bytes"] for event in events(path)] == [0, 4 * 100 * 3, 4 * 100 * 3]
    estimate = dry_run(config)
    assert (estimate.upload_bytes_per_round, estimate.download_bytes_per_round) == (8 * 2 * 3, 4 * 100 * 3)
    assert estimate.training_seconds > 0
    assert "0.05 KiB" in "\n".join(estimate.lines())
    assert RunStore.open(path).manifest()["memory"]["optimizer_bytes"] == 0


def test_one_global_adapter_stays_one_whatever_compressed_downloads_leave_out(tmp_path: Path) -> None:
    """RoLoRA trains one factor at a time; the resting one goes down to some of the clients, and nowhere else."""
    config = tiny({"download_compression": "int8"}, method={"name": "rolora"})
    tensors, *_ = outcome(config, run(config, directory=tmp_path))
    adapters_KP = tensors["state.adapters"]
    assert adapters_KP.any()
    assert torch.equal(adapters_KP, adapters_KP[:1].expand_as(adapters_KP))


@pytest.mark.parametrize(
    ("method", "exchange", "words"),
    [
        ("centralised", NOISY, "method.name = centralised trains on their examples in one place instead"),
        ("flora", {"compression": "topk"}, r"new random factors, .*; set exchange\.error_feedback: false"),
        ("florist", {"compression": "int8"}, r"set exchange\.error_feedback: false"),
    ],
)
def test_what_a_method_makes_meaningless_is_refused(
    tmp_path: Path, method: str, exchange: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        tiny(exchange, method={"name": method})
    config = tiny(exchange, method={"name": "fedit"}, compare={"methods": ["fedit", method]})
    with pytest.raises(ConfigError, match=f"compare.methods names {method}: .*{words}"):
        compare(config, directory=tmp_path)
    tiny({**exchange, "error_feedback": False, "privacy": {}}, method={"name": method})


def test_pairs_that_do_not_match_have_no_use_for_what_compression_left_out_of_the_last_ones() -> None:
    exchange, method = {"compression": "topk"}, {"name": "flexlora", "align": False}
    with pytest.raises(ValidationError, match=r"align: false.*set exchange\.error_feedback: false"):
        tiny(exchange, method=method)
    tiny({**exchange, "error_feedback": False}, method=method)
    tiny(exchange, method={"name": "flexlora"})


@pytest.mark.parametrize("method", ["rolora", "feddpa"])
def test_moments_of_tensors_that_rest_are_not_kept(tmp_path: Path, method: str) -> None:
    kept = {"keep_moments": True, "local_steps": 2}
    with pytest.raises(ValidationError, match=f"{method}, which trains some in one round and others in the next"):
        tiny({}, method={"name": method}, training=kept)
    config = tiny({}, method={"name": "fedit"}, training=kept, compare={"methods": ["fedit", method]})
    with pytest.raises(ConfigError, match=f"compare.methods names {method}: training.keep_moments = true"):
        compare(config, directory=tmp_path)


def test_noise_that_cannot_be_repeated_needs_every_round_saved() -> None:
    exchange = {"privacy": {**NOISY["privacy"], "noise_seed": "system"}}
    with pytest.raises(ValidationError, match="forgotten uploads would not be counted; set it to 1"):
        tiny(exchange, output={"checkpoint_every": 2})
    tiny(exchange)
    tiny(NOISY, output={"checkpoint_every": 2})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"exchange": {"compression": "int8"}}, "exchange.compression = int8 has no effect .* such as fedit"),
        ({"exchange": {"download_compression": "bf16"}}, "exchange.download_compression = bf16 has no effect"),
        ({"exchange": NOISY}, "a scalar for each step, which nothing would noise; switch exchange.privacy.enabled off"),
        (
            {"model": {"adapter": {"client_ranks": [1, 2]}, "device": "cpu"}},
            "would be filled; remove model.adapter.client_ranks",
        ),
    ],
)
def test_a_method_that_sends_scalars_refuses_what_is_made_for_tensors(
    tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    settings = {"exchange": {}, **sections}
    with pytest.raises(ValidationError, match=words):
        tiny(**settings, method={"name": "fedkseed"})
    config = tiny(**settings, method={"name": "fedit"}, compare={"methods": ["fedit", "fedkseed"]})
    with pytest.raises(ConfigError, match=f"compare.methods names fedkseed: .*{words}"):
        compare(config, directory=tmp_path)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- config


def test_the_section_survives_the_resolved_file() -> None:
    for settings in SETTINGS.values():
        config = tiny(settings)
        assert parse_config(resolved_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exchange: {compression: int4}", "int8"),
        ("exchange: {top_k: 0.3}", "top_k has no effect"),
        ("exchange: {max_norm_ratio: 1}", "exchange.max_norm_ratio"),
        ("exchange: {privacy: {enabled: true, delta: 1}}", "exchange.privacy.delta"),
        ("exchange: {privacy: {enabled: true, noise_multiplier: 0}}", "exchange.privacy.noise_multiplier"),
        ("exchange: {privacy: {enabled: true, noise_multiplier: 1.0e-200}}", r"noise_multiplier.*1e-12"),
        ("exchange: {privacy: {enabled: true, noise_multiplier: 1.0e+200}}", r"noise_multiplier.*1e\+?12"),
        ("exchange: {privacy: {enabled: true, noise_multiplier: .nan}}", "exchange.privacy.noise_multiplier"),
        ("exchange: {privacy: {enable: true}}", "enabled"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(text)


def test_the_checkpoint_is_readable_json_and_tensors(tmp_path: Path) -> None:
    config = tiny(SETTINGS["int8"])
    tensors, facts, _ = outcome(config, run(config, directory=tmp_path))
    assert {name for name in tensors if name.startswith("exchange.")} == {
        "exchange.error.0",
        "exchange.copy.0",
        "exchange.known.0",
    }
    assert json.loads(json.dumps(facts)) == {"uploads": [0, 0, 0, 0]}


def test_of_an_adapter_that_is_judged_only_what_can_differ_crosses() -> None:
    values_SP = torch.ones(2, LAYOUT.num_parameters)
    of_b = sum(spec.size for spec in LAYOUT.specs if spec.group == "lora_b")
    whole = Trial((0, 1), 3, lambda number: values_SP, sent=2)
    assert trial_bytes(whole, LAYOUT, values_SP) == (2 * 3 * 4, 2 * values_SP.nbytes)
    only_b = whole._replace(groups=frozenset({"lora_b"}))
    assert trial_bytes(only_b, LAYOUT, values_SP) == (2 * 3 * 4, 2 * 2 * 4 * of_b)
    assert trial_bytes(whole._replace(sent=0), LAYOUT, values_SP) == (2 * 3 * 4, 0)
    # how sure comparisons with those after it are
    assert trial_bytes(whole._replace(sent=0, versus=(0,)), LAYOUT, values_SP) == (2 * 5 * 4, 0)
    assert trial_bytes(whole._replace(sent=0, versus=(1,)), LAYOUT, values_SP) == (2 * 4 * 4, 0)
    assert trial_bytes(whole._replace(sent=0, versus=(0, 2)), LAYOUT, values_SP) == (2 * 4 * 4, 0)
    # the components that the second client lacks
    smaller_SP = trimmed(LAYOUT, values_SP, (2, 1))
    assert trial_bytes(whole, LAYOUT, smaller_SP)[1] == 2 * (values_SP.nbytes - values_SP[0].nbytes // 2)


def test_each_turn_of_a_question_goes_to_the_next_examples_until_all_were_asked() -> None:
    parts = assemble(tiny({}))
    client = replace(parts.tokenized[0], validation=parts.tokenized[0].train[:5])
    trial = Trial((0,), 1, lambda number: torch.zeros(1, 1), sent=0)
    drawn = Participants(1, (0,))

    def places(trial: Trial) -> list[int]:
        held = [id(example) for example in client.validation]
        return [held.index(id(example)) for example in examples_asked(trial, client)]

    turns = [places(bounded(trial, drawn._replace(round=round_), 2)) for round_ in (1, 2, 3, 4)]
    assert turns == [[0, 1], [2, 3], [0, 4], [1, 2]]
    assert places(bounded(trial, drawn, 5)) == places(bounded(trial, drawn, None)) == list(range(5))
    assert places(bounded(trial, drawn._replace(last=True), 2)) == list(range(5))
    # the smaller of what the question wants and what the run allows
    few = trial._replace(most_examples=2)
    assert places(bounded(few, drawn, 3)) == places(bounded(few, drawn, None)) == [0, 1]
    assert places(bounded(few, drawn, 1)) == [0]
    assert places(bounded(few, drawn._replace(last=True), 3)) == list(range(5))
    of_training = trial._replace(split="train")
    assert bounded(of_training, drawn, 2) == of_training
    # turns count questions, also of two that are asked together in some rounds only
    rarely = trial._replace(every=2)
    for question in (rarely, together(trial, rarely), together(rarely, trial)):
        assert question is not None
        asked = [places(bounded(question, drawn._replace(round=round_), 2)) for round_ in (2, 4, 6, 8)]
        assert asked == turns


@pytest.mark.parametrize(("of_the_run", "of_the_choice", "asked"), [(1, 4, 1), (16, 3, 3), (2, None, 2)])
def test_a_run_judges_as_many_examples_as_it_was_told_and_all_of_them_in_the_end(
    of_the_run: int, of_the_choice: int | None, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = {"name": "mira", "graph": {"kind": "true"}, "choice": {"examples": of_the_choice}}
    limited = {"examples_per_question": of_the_run, "generation": {"enabled": False}}
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 16}
    held = {"by": "field", "validation": 0.25, "test": 0.25}
    everybody = {"rounds": 3}
    config = tiny({}, method=asking, evaluation=limited, federation=everybody, data={**data, "partition": held})
    judged: list[tuple[int, ...]] = []
    original = InProcess.judge

    def spy(self: InProcess, trial: Trial) -> Losses:
        losses = original(self, trial)
        judged.append(losses.examples_S)
        return losses

    monkeypatch.setattr(InProcess, "judge", spy)
    run(config, directory=tmp_path)
    clients = assemble(config).tokenized
    assert {len(client.validation) for client in clients} == {4}
    assert judged == [(asked,) * 4, (asked,) * 4, (4,) * 4]


def test_clients_say_how_their_examples_scatter_around_a_comparison() -> None:
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 16}
    parts = assemble(tiny({}, data={**data, "partition": {"by": "field", "validation": 0.25, "test": 0.25}}))
    start_KP = parts.initial_adapters().values_KP
    moved_KP = start_KP + 0.05 * torch.randn(start_KP.shape, generator=torch.Generator().manual_seed(1))
    candidates = (0.5 * moved_KP, start_KP, moved_KP)
    losses = parts.exchange.judge(Trial((0, 1, 2, 3), 3, lambda number: candidates[number], sent=0, versus=(1,)))
    assert losses.scatter_SQ is not None
    for client in range(4):
        examples = parts.tokenized[client].validation
        moved, start = (
            [
                evaluate_loss(parts.base, Arena(parts.layout, values_KP[client : client + 1]), [[example]], 4096)[0][0]
                for example in examples
            ]
            for values_KP in (moved_KP, start_KP)
        )
        tokens = sum(example.num_supervised for example in examples)
        means = [sum(start) / tokens, sum(moved) / tokens]
        assert losses.mean_SQ[client, 1:].tolist() == pytest.approx(means, rel=1e-5)
        ratio = sum(moved) / sum(start)
        residuals = np.array(moved) - ratio * np.array(start)
        by_hand = residuals.var(ddof=1) / np.mean(moved) ** 2
        # what stands before is not compared
        assert losses.scatter_SQ[client].tolist() == pytest.approx([math.nan, 0.0, by_hand], rel=1e-4, nan_ok=True)
        # what bootstrap samples of the examples say, roughly
        drawn = np.random.default_rng(client).integers(0, len(examples), (4000, len(examples)))
        ratios = np.log(np.array(moved)[drawn].sum(axis=1) / np.array(start)[drawn].sum(axis=1))
        bootstrap = ratios.var() * len(examples) / (len(examples) - 1) * len(examples)
        assert losses.scatter_SQ[client, 2] == pytest.approx(bootstrap, rel=0.25)
    plain = parts.exchange.judge(Trial((0, 1), 3, lambda number: candidates[number][:2], sent=0))
    assert plain.scatter_SQ is None
    torch.testing.assert_close(plain.mean_SQ, losses.mean_SQ[:2], rtol=1e-5, atol=0)


def test_an_adapter_of_which_only_b_is_mixed_is_judged_by_its_b() -> None:
    section = {"name": "mira", "mixing": "shared_a", "graph": {"kind": "labels"}, "strength": "auto"}
    parts = assemble(tiny({}, method=section, federation={"rounds": 3, "participation": 0.5}))
    asked = Participants(1, (0, 1))
    state = parts.method.init(parts.initial_adapters(), parts.clients)
    results = parts.exchange.run(parts.method.plan(state, asked))
    state, _ = parts.method.merge(state, asked, results)
    assert parts.method.trial is not None
    trial = parts.method.trial(state, asked, results)
    assert trial is not None
    assert trial.sent > 0
    assert trial.groups == {"lora_b"}


def test_noise_that_cannot_be_drawn_again_counts_also_where_its_round_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert uploads_of_a_killed_run("system", tmp_path / "system", monkeypatch) == {"uploads": [4, 4, 4, 4]}
    # what follows from the seed is the same noise again
    assert uploads_of_a_killed_run("run", tmp_path / "run", monkeypatch) == {"uploads": [3, 3, 3, 3]}


def uploads_of_a_killed_run(noise_seed: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    private = {"privacy": {**NOISY["privacy"], "noise_seed": noise_seed}}
    config = tiny(private, method={"name": "fedit"}, federation={"rounds": 3})
    original = Recorder.round

    def killed(self: Any, parts: Any, participants: Participants, *others: Any) -> float:
        if participants.round == 2:
            raise KeyboardInterrupt
        return original(self, parts, participants, *others)

    monkeypatch.setattr(Recorder, "round", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, directory=folder)
    monkeypatch.undo()
    return outcome(config, run(config, directory=folder, resume=True))[1]


def test_who_gave_away_more_than_is_recorded_is_recorded_with_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a round is repeated others may take part, as when clients joined in between."""
    private = {"privacy": {**NOISY["privacy"], "noise_seed": "system"}}
    config = tiny(private, method={"name": "fedit"}, federation={"rounds": 3, "participation": 0.5})
    original = Recorder.round

    def killed_in(number: int) -> None:
        def killed(self: Any, parts: Any, participants: Participants, *others: Any) -> float:
            if participants.round == number:
                raise Killed
            return original(self, parts, participants, *others)

        monkeypatch.setattr(Recorder, "round", killed)
        with pytest.raises(Killed):
            run(config, directory=tmp_path, resume=True)
        monkeypatch.undo()

    killed_in(1)
    [path] = tmp_path.iterdir()
    with RunStore.open(path) as store:
        store.write_uploads([4, 4, 4, 4], 1)
    killed_in(2)
    [first] = events(path)
    spent = {name: epsilon(4 + (name in first["participants"]), 2.0, 1e-5) for name in CLIENTS}
    assert first["privacy"]["epsilon"] == spent
    run(config, directory=tmp_path, resume=True)
    told: dict[str, float] = {}
    for event in events(path):
        assert event["round"] == 1 or list(event["privacy"]["epsilon"]) == event["participants"]
        told |= event["privacy"]["epsilon"]
    assert told == {
        name: epsilon(uploads, 2.0, 1e-5) for name, uploads in zip(CLIENTS, RunStore.open(path).uploads(), strict=True)
    }


def test_a_round_that_was_stopped_before_anybody_sent_anything_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = {"privacy": {**NOISY["privacy"], "noise_seed": "system"}}
    config = tiny(private, method={"name": "fedit"}, federation={"rounds": 2})
    asked = iter([False] * 3 + [True] * 100)
    monkeypatch.setattr(experiment.StopFlag, "__call__", lambda self: next(asked))
    with pytest.raises(Interrupted):
        run(config, directory=tmp_path)
    monkeypatch.undo()
    path = run(config, directory=tmp_path, resume=True)
    assert outcome(config, path)[1] == {"uploads": [2, 2, 2, 2]}


def test_uploads_that_failed_or_were_refused_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = {**NOISY["privacy"], "noise_seed": "system"}
    original = in_process.train

    def one_fails(base: Any, layout: Any, job: Job, *others: Any, **named: Any) -> Any:
        values_SP, reports = original(base, layout, job, *others, **named)
        if job.round != 2:
            return values_SP, reports
        return values_SP[1:], (reports[0]._replace(failure="training diverged"), *reports[1:])

    monkeypatch.setattr(in_process, "train", one_fails)
    failing = tiny({"privacy": system}, method={"name": "fedit"}, federation={"rounds": 2})
    path = run(failing, directory=tmp_path)
    monkeypatch.undo()
    assert RunStore.open(path).uploads() == [1, 2, 2, 2]
    # a budget that two uploads spend: however often it is tried, nobody sends a third
    limited = {"privacy": {**system, "budget": epsilon(2, 2.0, 1e-5) + 1e-6}}
    config = tiny(limited, method={"name": "fedit"}, federation={"rounds": 5})
    for resume in (False, True, True):
        with pytest.raises(ParticipationError):
            run(config, directory=tmp_path / "limited", resume=resume)
        [path] = (tmp_path / "limited").iterdir()
        assert RunStore.open(path).uploads() == [2, 2, 2, 2]


def test_a_round_that_was_stopped_counts_the_seconds_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny({}, method={"name": "fedit"}, federation={"rounds": 1})
    clock = itertools.count(0.0, 1.0)

    class Clock:
        perf_counter = staticmethod(lambda: next(clock))

    monkeypatch.setattr(in_process, "time", Clock)
    asked = iter([False] + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(experiment.StopFlag, "__call__", lambda self: next(asked))
        with pytest.raises(Interrupted):
            run(config, directory=tmp_path)
    # one second until it was stopped, one from there on
    path = run(config, directory=tmp_path, resume=True)
    [event] = events(path)
    assert event["timing"]["train_seconds"] == 2.0


@pytest.mark.parametrize("place", ["validation_losses", "final_records"])
def test_the_peak_of_a_run_is_that_of_evaluating_where_it_is_higher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    original, size = getattr(recording, place), 2**29

    def hungry(*arguments: Any, **named: Any) -> Any:
        with mmap.mmap(-1, size) as block:
            block[:: mmap.PAGESIZE] = b"x" * (size // mmap.PAGESIZE)
        return original(*arguments, **named)

    monkeypatch.setattr(recording, place, hungry)
    config = tiny({}, method={"name": "fedit"}, federation={"rounds": 1}, evaluation={})
    path = run(config, directory=tmp_path)
    peak = max(event["timing"]["peak_memory_bytes"] for event in events(path))
    assert read(path).peak_memory_bytes > peak + size // 2
