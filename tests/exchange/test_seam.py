"""Claims: the server gets the decoded message and nothing else; what was left out comes later; both sides remember
exactly what a checkpoint keeps."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tests.exchange.builders import GROUPS, LAYOUT, NAMES, job, reports, rows

from fedmira.config.exchange import Compression, ExchangeConfig
from fedmira.exchange import seam as seam_module
from fedmira.exchange.messages import decode, encode
from fedmira.exchange.seam import Kept, Seam, planned_bytes, uncompressed_bytes
from fedmira.federation.ranks import trimmed
from fedmira.types import ClientReport, Job, Pull, SeedPool

FORMS: tuple[Compression, ...] = ("bf16", "int8", "topk")


def seam(**settings: object) -> Seam:
    return Seam(ExchangeConfig.model_validate(settings), LAYOUT, NAMES, seed=0)


def test_without_compression_every_row_is_the_clients_own_and_nothing_is_remembered() -> None:
    one = seam()
    asked, trained = job(rows(0)), rows(1)
    sent = one.send(asked)
    got = one.receive(sent.job, trained.clone(), reports())
    assert sent.job is asked
    assert torch.equal(got.values_SP, trained)
    assert (sent.download_bytes, got.upload_bytes) == (asked.start_SP.nbytes, trained.nbytes)
    assert one.state() == Kept({}, {"uploads": [0, 0, 0, 0]})


def test_of_a_job_with_seeds_pairs_go_up_and_the_sums_of_the_pool_come_down() -> None:
    """8 bytes for each step of each client that returned, 4 for each seed and participant; rows stay bit for bit."""
    asked, trained = job(rows(0), seeds=SeedPool(50, 1e-3)), rows(1)[:3]
    one = seam()
    sent = one.send(asked)
    told = (*reports()[:3], reports()[3]._replace(num_steps=9, failure="gone"))
    got = one.receive(sent.job, trained.clone(), told)
    assert (sent.download_bytes, got.upload_bytes) == (4 * 50 * 4, 8 * 2 * 3)
    assert torch.equal(sent.job.start_SP, asked.start_SP)
    assert torch.equal(got.values_SP, trained)
    assert planned_bytes(ExchangeConfig(), LAYOUT, asked, 6) == (got.upload_bytes, sent.download_bytes)
    assert one.send(asked._replace(download=frozenset())).download_bytes == 0, "nobody has returned yet"


def test_what_changed_in_the_shift_goes_to_each_client_once() -> None:
    ids = (1, 3, 1, 3)
    asked = job(rows(0), ids=ids, shift_bytes=7)
    for one in (seam(), seam(download_compression="int8")):
        assert one.send(asked).download_bytes == rows(0).nbytes + 2 * 7
    assert planned_bytes(ExchangeConfig(), LAYOUT, asked, 0) == (rows(0).nbytes, rows(0).nbytes + 2 * 7)
    assert uncompressed_bytes(LAYOUT, asked, reports(ids)) == 2 * rows(0).nbytes + 2 * 7


@pytest.mark.parametrize("form", FORMS)
def test_the_server_gets_the_start_plus_the_decoded_difference(form: Compression) -> None:
    start, trained = rows(0), rows(1)
    got = seam(compression=form).receive(job(start), trained.clone(), reports())
    expected = start + decode(LAYOUT, GROUPS, encode(LAYOUT, GROUPS, trained - start, form, 0.1), start)
    assert torch.equal(got.values_SP, expected)
    assert not torch.equal(got.values_SP, trained)
    assert got.upload_bytes < trained.nbytes


@pytest.mark.parametrize("form", FORMS)
def test_what_is_left_out_is_sent_later(form: Compression) -> None:
    """With e <- d + e - Q(d + e), all that was sent plus e is all that was meant; without it, what is lost is lost."""
    meant = sent = torch.zeros(4, LAYOUT.num_parameters)
    one = seam(compression=form)
    for round_ in range(1, 6):
        start, trained = torch.zeros_like(meant), rows(round_)
        got = one.receive(job(start, round_), trained.clone(), reports())
        meant, sent = meant + trained, sent + got.values_SP
    assert torch.allclose(meant, sent + one.state().tensors["error.0"], atol=1e-5)
    assert one.state().tensors["error.0"].abs().max() > 0
    forgetful = seam(compression=form, error_feedback=False)
    forgetful.receive(job(torch.zeros_like(meant)), rows(1), reports())
    assert forgetful.state().tensors == {}


def test_a_client_without_a_result_or_with_a_rejected_one_keeps_its_error() -> None:
    one = seam(compression="int8", max_norm_ratio=10)
    start = torch.zeros(4, LAYOUT.num_parameters)
    one.receive(job(start), rows(1), reports())
    before = one.state().tensors["error.0"].clone()
    trained = rows(2)
    trained[0] *= 1e5
    failed = list(reports())
    failed[1] = failed[1]._replace(failure="gone")
    got = one.receive(job(start, 2), trained[[0, 2, 3]], tuple(failed))
    after = one.state().tensors["error.0"].clone()
    assert got.ids == (2, 3)
    assert [bool(report.failure) for report in got.reports] == [True, True, False, False]
    assert got.reports[1].failure == "gone"
    assert "client anna was rejected: its norm" in got.reports[0].failure
    assert torch.equal(after[:2], before[:2])
    assert not torch.isclose(after[2:], before[2:]).all(dim=1).any()
    trained[:, 5] = math.nan
    got = one.receive(job(start, 3), trained, reports())
    assert got.ids == ()
    assert "client dora was rejected: values that are not finite in a.lora_a" in got.reports[3].failure
    assert torch.equal(one.state().tensors["error.0"], after)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_do_not_cross_stay_with_the_client_bit_for_bit(form: Compression) -> None:
    start, trained = rows(0), rows(1)
    asked = job(start, upload=frozenset({"lora_b"}))
    got = seam(compression=form).receive(asked, trained.clone(), reports())
    for spec in LAYOUT.specs:
        columns = slice(spec.offset, spec.offset + spec.size)
        assert torch.equal(got.values_SP[:, columns], trained[:, columns]) == (spec.group == "lora_a")
    alone = seam(compression=form).receive(job(start, upload=frozenset()), trained.clone(), reports())
    assert torch.equal(alone.values_SP, trained)
    assert alone.upload_bytes == 0


def test_two_rows_of_a_client_have_two_memories() -> None:
    ids = (1, 3, 1, 3)
    one = seam(compression="int8")
    start, trained = torch.zeros(4, LAYOUT.num_parameters), rows(1)
    got = one.receive(job(start, ids=ids), trained.clone(), reports(ids))
    memories = one.state().tensors
    assert got.ids == ids
    for block, places in ((0, [0, 1]), (1, [2, 3])):
        expected = trained[places] - got.values_SP[places]
        assert torch.allclose(memories[f"error.{block}"][[1, 3]], expected, atol=1e-6)
        assert (memories[f"error.{block}"][[0, 2]] == 0).all()


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_download_is_the_difference_to_the_last_one(form: Compression) -> None:
    one, trained = seam(download_compression=form), rows(9)
    first = one.send(job(rows(0)))
    assert torch.equal(first.job.start_SP, rows(0)), "whoever holds nothing gets everything"
    assert first.download_bytes == rows(0).nbytes
    one.receive(first.job, trained.clone(), reports())
    wanted = rows(0) + 0.01 * rows(1)
    second = one.send(job(wanted, 2))
    difference = wanted - rows(0)
    expected = rows(0) + decode(LAYOUT, GROUPS, encode(LAYOUT, GROUPS, difference, form), wanted)
    assert torch.equal(second.job.start_SP, expected)
    assert second.download_bytes == planned_bytes(ExchangeConfig(download_compression=form), LAYOUT, job(wanted), 0)[1]
    assert second.download_bytes < wanted.nbytes
    # a round that is stopped before it is done is asked for again, and crosses as before
    assert torch.equal(one.send(job(wanted, 2)).job.start_SP, expected)
    one.receive(second.job, trained.clone(), reports())
    # what was left out is part of the next difference
    third = one.send(job(wanted, 3))
    assert (third.job.start_SP - wanted).abs().max() < (expected - wanted).abs().max()


def test_a_group_that_was_never_sent_crosses_in_full() -> None:
    one = seam(download_compression="int8")
    first = one.send(job(rows(0), download=frozenset({"lora_b"})))
    one.receive(first.job, rows(9), reports())
    second = one.send(job(rows(1), 2))
    for spec in LAYOUT.specs:
        columns = slice(spec.offset, spec.offset + spec.size)
        assert torch.equal(second.job.start_SP[:, columns], rows(1)[:, columns]) == (spec.group == "lora_a")
    newcomers = one.send(job(rows(1, 2), 2, ids=(0, 1), download=frozenset()))
    assert newcomers.download_bytes == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_restored_seam_goes_on_bit_for_bit(form: Compression) -> None:
    settings: dict[str, object] = {"compression": form, "download_compression": "int8"}
    settings["privacy"] = {"enabled": True, "noise_multiplier": 2.0}
    ends = []
    for stopped in (False, True):
        one = seam(**settings)
        for round_ in range(1, 5):
            sent = one.send(job(rows(round_), round_))
            got = one.receive(sent.job, sent.job.start_SP + rows(10 + round_), reports())
            if stopped:
                kept = one.state()
                facts = json.loads(json.dumps(dict(kept.facts)))
                one = seam(**settings)
                one.restore(Kept({name: tensor.clone() for name, tensor in kept.tensors.items()}, facts))
        ends.append((got, one.state()))
    (whole, kept_whole), (parts, kept_parts) = ends
    assert torch.equal(whole.values_SP, parts.values_SP)
    assert kept_whole.facts == kept_parts.facts
    assert kept_whole.tensors.keys() == kept_parts.tensors.keys() == {"error.0", "copy.0", "known.0"}
    assert all(torch.equal(kept_whole.tensors[name], kept_parts.tensors[name]) for name in kept_whole.tensors)


def test_rows_taken_one_at_a_time_come_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for elements in (1 << 24, LAYOUT.num_parameters):
        monkeypatch.setattr(seam_module, "_CHUNK_ELEMENTS", elements)
        one = seam(compression="int8", download_compression="int8")
        for round_ in (1, 2):
            sent = one.send(job(rows(round_), round_))
            got = one.receive(sent.job, sent.job.start_SP + rows(10 + round_), reports())
        ends.append((sent.job.start_SP, got.values_SP, *(one.state().tensors[name] for name in ("error.0", "copy.0"))))
    assert all(torch.equal(*both) for both in zip(*ends, strict=True))


def test_uploads_of_clients_that_have_yet_to_join_again_are_not_forgotten() -> None:
    before = seam(compression="int8", download_compression="int8")
    before.receive(before.send(job(rows(0))).job, rows(1), reports())
    kept = before.state()
    earlier = seam(compression="int8", download_compression="int8")
    earlier.restore(Kept(kept.tensors, {"uploads": [2, 2, 2, 2, 1]}))
    assert earlier.state().facts == {"uploads": [2, 2, 2, 2, 1]}
    assert {name: len(rows_KP) for name, rows_KP in earlier.state().tensors.items()} == {
        "error.0": 4,
        "copy.0": 4,
        "known.0": 4,
    }
    joined = Seam(ExchangeConfig(), LAYOUT, (*NAMES, "eva", "finn"), seed=0)
    joined.restore(earlier.state())
    assert joined.state().facts == {"uploads": [2, 2, 2, 2, 1, 0]}


def test_of_clients_that_joined_nothing_is_remembered_and_of_the_others_everything() -> None:
    settings: dict[str, object] = {"compression": "int8", "download_compression": "int8"}
    settings["privacy"] = {"enabled": True, "noise_multiplier": 2.0}
    before = seam(**settings)
    sent = before.send(job(rows(0)))
    before.receive(sent.job, rows(1), reports())
    kept = before.state()
    after = Seam(ExchangeConfig.model_validate(settings), LAYOUT, (*NAMES, "eva", "finn"), seed=0)
    after.restore(kept)
    now = after.state()
    assert now.facts == {"uploads": [1, 1, 1, 1, 0, 0]}
    assert now.tensors.keys() == kept.tensors.keys() == {"error.0", "copy.0", "known.0"}
    for name, tensor in now.tensors.items():
        assert torch.equal(tensor[:4], kept.tensors[name])
        assert not tensor[4:].any()
    asked = job(rows(2, 2), 2, ids=(0, 4))
    assert torch.equal(after.send(asked).job.start_SP[0], before.send(asked._replace(ids=(0, 1))).job.start_SP[0])
    assert torch.equal(after.send(asked).job.start_SP[1], asked.start_SP[1]), "the first download is in full"


@pytest.mark.parametrize("form", ["none", *FORMS])
def test_sixteen_bit_adapters_cross_too(form: Compression) -> None:
    start, trained = rows(0, dtype=torch.bfloat16), rows(1, dtype=torch.bfloat16)
    config = ExchangeConfig(compression=form)
    got = Seam(config, LAYOUT, NAMES, 0).receive(job(start), trained.clone(), reports())
    assert got.values_SP.dtype == torch.bfloat16
    assert got.upload_bytes == planned_bytes(config, LAYOUT, job(start), 0)[0]


def seen_by_clients(one: Seam, wanted: Job) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Starts and targets of a job as its clients have them, and the bytes, where everybody holds `rows(0)`."""
    one.receive(one.send(job(rows(0))).job, rows(9), reports())
    sent = one.send(wanted)
    assert sent.job.pull is not None
    return sent.job.start_SP, sent.job.pull.target_SP, sent.download_bytes


def test_who_is_pulled_to_its_start_is_pulled_to_what_it_got() -> None:
    start = rows(0) + 0.01 * rows(1)
    got, target, _ = seen_by_clients(
        seam(download_compression="int8"), job(start, 2, pull=Pull(start.clone(), (1.0,) * 4))
    )
    assert torch.equal(got, target)
    assert not torch.equal(got, start)


def test_what_a_client_is_pulled_to_crosses_in_place_of_its_own_start() -> None:
    own, mean = rows(5), rows(0) + 0.01 * rows(1)
    wanted = job(own, 2, pull=Pull(mean, (1.0, 1.0, 1.0, 0.0)))
    start, target, sent_bytes = seen_by_clients(one := seam(download_compression="int8"), wanted)
    assert torch.equal(start[:3], own[:3]), "it has its own start"
    assert not torch.equal(start[3], own[3]), "without a pull the start crosses"
    compressed = encode(LAYOUT, GROUPS, torch.cat([mean[:3], own[3:]]) - rows(0), "int8")
    expected = rows(0) + decode(LAYOUT, GROUPS, compressed, mean)
    assert torch.equal(target[:3], expected[:3])
    assert sent_bytes < mean.nbytes
    # the next difference is to what was pulled to
    sent = one.send(wanted)
    one.receive(sent.job, rows(9), reports())
    third = one.send(job(own, 3, pull=Pull(mean, (1.0,) * 4))).job.pull
    assert third is not None
    assert (third.target_SP[:3] - mean[:3]).abs().max() < (target[:3] - mean[:3]).abs().max()


def test_a_row_that_stays_is_pulled_to_what_its_client_got() -> None:
    everybody, own = (rows(0) + 0.01 * rows(1))[:1].expand(2, -1), rows(5, 2)
    both = Job(2, (0, 1, 0, 1), torch.cat([everybody, own]), GROUPS, GROUPS, GROUPS)
    both = both._replace(pull=Pull(torch.cat([everybody, everybody]), (0.0, 0.0, 1.0, 1.0)), local_rows=2)
    start, target, _ = seen_by_clients(seam(download_compression="int8"), both)
    assert torch.equal(start[2:], own)
    assert torch.equal(target[2:], start[:2])
    assert not torch.equal(start[:2], everybody)


def test_of_what_rested_and_did_not_come_back_the_server_keeps_its_own() -> None:
    one = seam(download_compression="int8")
    b_only = frozenset({"lora_b"})
    one.receive(one.send(job(rows(0))).job, rows(9), reports())
    planned = job(rows(0) + 0.01 * rows(1), 2, trainable=b_only, upload=b_only)
    sent = one.send(planned)
    failed = (*reports()[:1], reports()[1]._replace(failure="lost"), *reports()[2:])
    came = [0, 2, 3]
    got = one.receive(sent.job, sent.job.start_SP[came].clone(), failed, planned=planned)
    for spec in LAYOUT.specs:
        columns = slice(spec.offset, spec.offset + spec.size)
        kept = torch.equal(got.values_SP[:, columns], planned.start_SP[came, columns])
        assert kept == (spec.group == "lora_a")


def test_who_needs_no_download_goes_on_from_what_it_got_before() -> None:
    # as RoLoRA: A and B are trained in turn, and of those that were there only what moved goes down
    one, columns = seam(download_compression="int8"), {spec.name: spec.columns for spec in LAYOUT.specs}
    a_only, b_only = frozenset({"lora_a"}), frozenset({"lora_b"})
    part = [columns["a.lora_b"], columns["b.lora_b"]]

    def played(start_SP: torch.Tensor, round_: int, **changes: frozenset[str]) -> torch.Tensor:
        planned = job(start_SP, round_, **changes)
        sent = one.send(planned)
        one.receive(sent.job, sent.job.start_SP.clone(), reports(), planned=planned)
        return sent.job.start_SP

    played(rows(0), 1, trainable=b_only, upload=b_only)
    server = rows(0) + 0.01 * rows(1)
    second = played(server, 2, download=b_only, trainable=a_only, upload=a_only)
    third = played(server, 3, download=a_only, trainable=b_only, upload=b_only)
    for of_b in part:
        assert not torch.equal(second[:, of_b], server[:, of_b]), "what went down was rounded"
        assert torch.equal(third[:, of_b], second[:, of_b])
    # once trained, the client has what it trained, which the server knows
    fourth = played(server, 4, download=frozenset(), trainable=a_only, upload=a_only)
    for of_b in part:
        assert torch.equal(fourth[:, of_b], server[:, of_b])


def test_of_what_rested_the_server_keeps_its_own_though_nothing_went_down() -> None:
    one, both = seam(download_compression="int8"), frozenset({"lora_a", "lora_b"})
    none: frozenset[str] = frozenset()
    server = rows(0)
    for round_, download in ((1, both), (2, both), (3, none)):
        server = server + 0.01 * rows(round_)
        planned = job(server, round_, download=download, trainable=none, upload=none)
        sent = one.send(planned)
        got = one.receive(sent.job, sent.job.start_SP.clone(), reports(), planned=planned)
        assert torch.equal(sent.job.start_SP, server) == (round_ == 1)
        assert torch.equal(got.values_SP, server)


def test_a_row_that_stays_does_not_cost_its_client_the_one_that_crosses() -> None:
    start = torch.zeros(6, LAYOUT.num_parameters)
    two = Job(1, (0, 1, 2, 0, 1, 2), start, GROUPS, GROUPS, GROUPS, local_rows=3)
    trained = 0.1 * torch.cat([rows(1)[:3], rows(2)[:3]])
    trained[5] *= 1e6
    told = tuple(ClientReport(id_, 1, 1, 0.0, 1, 1) for id_ in two.ids)
    assert seam(max_norm_ratio=10).receive(two, trained.clone(), told).ids == two.ids
    assert seam(max_norm_ratio=10).receive(two._replace(local_rows=0), trained.clone(), told).ids == (0, 1, 2, 0, 1)


@pytest.mark.parametrize("form", FORMS)
def test_clients_of_smaller_rank_send_and_get_what_they_have(form: Compression) -> None:
    """Three of four clients have half of the numbers: both ways, planned and counted, as without compression."""
    ranks = (2, 1, 1, 1)
    down: Compression = "int8" if form == "topk" else form
    config = ExchangeConfig(compression=form, download_compression=down)
    one, start = Seam(config, LAYOUT, NAMES, 0), trimmed(LAYOUT, rows(0), ranks)
    for round_ in (1, 2):
        sent = one.send(job(start, round_))
        trained = sent.job.start_SP + 0.1 * trimmed(LAYOUT, rows(10 + round_), ranks)
        got = one.receive(sent.job, trained, reports())
        start = start + 0.01 * trimmed(LAYOUT, rows(20 + round_), ranks)
    numbers, scales = 36 + 3 * 18, 8 + 3 * 4
    expected = {"bf16": 2 * numbers, "int8": numbers + 4 * scales, "topk": 8 * (4 + 3 * 2)}
    assert got.upload_bytes == expected[form]
    assert sent.download_bytes == expected[down]
    assert planned_bytes(config, LAYOUT, job(start), 0) == (got.upload_bytes, sent.download_bytes)
    assert uncompressed_bytes(LAYOUT, job(start), reports()) == 2 * 4 * numbers
    assert torch.equal(got.values_SP, trimmed(LAYOUT, got.values_SP, ranks))


def test_what_would_cross_uncompressed_is_of_those_who_came_back() -> None:
    def lost(*places: int, ids: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[ClientReport, ...]:
        told = reports(ids)
        return tuple(r._replace(failure="gone") if row in places else r for row, r in enumerate(told))

    def up(asked: Job, told: tuple[ClientReport, ...]) -> int:
        return uncompressed_bytes(LAYOUT, asked._replace(download=frozenset()), told)

    ranked = job(trimmed(LAYOUT, rows(0), (2, 1, 1, 1)))
    assert up(ranked, lost(0)) == 3 * 18 * 4
    assert up(ranked, lost(3)) == (36 + 2 * 18) * 4
    ids = (0, 1, 2, 3) * 2
    two = job(torch.cat([rows(0), rows(1)]), ids=ids, local_rows=4)
    assert up(two, lost(1, ids=ids)) == 3 * 36 * 4
    assert up(two, lost(6, ids=ids)) == 4 * 36 * 4, "what stays does not count"


def test_a_client_that_lost_the_row_that_stays_sends_again_what_it_sent_for_nothing() -> None:
    """A method with two rows of each client leaves out whoever lost one, so the accepted row brought nothing."""
    one, start = seam(compression="int8"), torch.zeros(6, LAYOUT.num_parameters)
    two = Job(1, (0, 1, 2, 0, 1, 2), start, GROUPS, GROUPS, GROUPS, local_rows=3)
    told = reports(two.ids)
    one.receive(two, torch.cat([rows(1)[:3], rows(2)[:3]]), told)
    before = one.state().tensors["error.0"].clone()
    trained = torch.cat([rows(3)[:3], rows(4)[:3]])
    trained[4, 0] = math.nan
    got = one.receive(two._replace(round=2), trained.clone(), told)
    assert got.ids == (0, 1, 2, 0, 2)
    after = one.state().tensors["error.0"].clone()
    assert [torch.equal(after[k], before[k]) for k in range(3)] == [False, True, False]
    # and whoever lost it in training
    failed = (*told[:3], told[3]._replace(failure="diverged"), *told[4:])
    one.receive(two._replace(round=3), torch.cat([rows(5)[:3], rows(6)[:2]]), failed)
    assert [torch.equal(one.state().tensors["error.0"][k], after[k]) for k in range(3)] == [True, False, False]
