"""What a run writes down of itself besides its state: events of metrics.jsonl, graph.json, splits.json, answers.jsonl.

Whatever is judged is judged here, so that what was recorded and what was measured cannot part. Nothing of it is read
when a run goes on. Knows nothing about how clients train or how a method merges.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from fedmira.assembly import Assembly
from fedmira.config.run import RunConfig
from fedmira.data.splits import SPLITS
from fedmira.evaluation.costs import PeakMemory
from fedmira.evaluation.judge import Answer, final_records, validation_losses
from fedmira.exchange.privacy import epsilon
from fedmira.federation.graph import Graph
from fedmira.federation.graph import parts as graph_parts
from fedmira.federation.method import Info
from fedmira.runs.atomic import write_bytes_atomically
from fedmira.runs.lines import recorded_epsilon
from fedmira.runs.store import ANSWERS, SPLITS_FILE, RunStore
from fedmira.stages import stage
from fedmira.types import Arena, Participants, Results


class Recorder:
    """Of one run, whose clients may become more."""

    def __init__(self, store: RunStore, config: RunConfig, device: str) -> None:
        self._store, self._config = store, config
        self._peak = PeakMemory(device)
        self._told_epsilon = recorded_epsilon(store.events()) if config.exchange.privacy.enabled else {}
        """Of each client, as metrics.jsonl has it."""

    def splits(self, parts: Assembly) -> None:
        """Which examples each client trains on, is asked by and is judged by, as their ids."""
        by_client = {
            client.name: {split: [example.id for example in getattr(client.examples, split)] for split in SPLITS}
            for client in parts.tokenized
        }
        # a line for each client
        lines = ",\n".join(f"{_json(name)}: {_json(ids)}" for name, ids in by_client.items())
        self._write(SPLITS_FILE, f"{{\n{lines}\n}}\n")

    def round(
        self,
        parts: Assembly,
        participants: Participants,
        results: Results,
        info: Info,
        merge_seconds: float,
        trial_seconds: float,
    ) -> float:
        """Record what a round took, sent and found; return its training loss, pooled over tokens."""
        names = parts.clients.names
        trained = [report for report in results.reports if not report.failure]
        loss_sum = sum(report.loss_sum for report in trained)
        tokens = sum(report.num_supervised_tokens for report in trained)
        config, extra = self._config.exchange, dict[str, Any]()
        if results.uncompressed_bytes:
            extra["uncompressed_bytes"] = results.uncompressed_bytes
        if config.privacy.enabled:
            extra["privacy"] = {"delta": config.privacy.delta, "epsilon": self._spent(parts, results)}
        self._store.append(
            {
                "event": "round",
                "round": participants.round,
                "participants": [names[id_] for id_ in participants.ids],
                "failures": [{"client": names[r.id], "reason": r.failure} for r in results.reports if r.failure],
                "train_loss_sum": loss_sum,
                "train_tokens": tokens,
                "tokens": sum(report.num_tokens for report in trained),
                "upload_bytes": results.upload_bytes,
                "download_bytes": results.download_bytes,
                **extra,
                "numbers": dict(info.numbers),
                "timing": {
                    "train_seconds": results.train_seconds,
                    "merge_seconds": merge_seconds,
                    "evaluate_seconds": trial_seconds,
                    "peak_memory_bytes": self._peak.lap(),
                },
            }
        )
        if info.graph is not None:
            true = parts.clients.true_adjacency_KK
            self._store.write_graph(
                {
                    "names": list(names),
                    "adjacency": info.graph.adjacency_KK.tolist(),
                    "name": info.graph.name,
                    "round": participants.round,
                    "provenance": dict(info.graph.provenance),
                    "blocks": _shown_blocks(info.graph),
                    "true_adjacency": None if true is None else true.tolist(),
                }
            )
        return loss_sum / max(tokens, 1)

    def evaluation(self, parts: Assembly, round_: int, adapters: Arena) -> str:
        """Record the validation loss of every client; say the unweighted mean over those that hold such examples."""
        started = time.perf_counter()
        with stage("evaluation"):
            losses = validation_losses(parts.base, adapters, parts.tokenized, self._config.evaluation)
        self._store.append(
            {
                "event": "evaluation",
                "round": round_,
                "split": "validation",
                "clients": {
                    name: {"loss_sum": loss_sum, "tokens": tokens}
                    for name, (loss_sum, tokens) in zip(parts.clients.names, losses, strict=True)
                },
                "timing": {"evaluate_seconds": time.perf_counter() - started, "peak_memory_bytes": self._peak.lap()},
            }
        )
        per_client = [loss_sum / tokens for loss_sum, tokens in losses if tokens]
        return f", validation loss {sum(per_client) / len(per_client):.4f}" if per_client else ""

    def final(self, parts: Assembly, round_: int, adapters: Arena) -> float:
        """Record the final numbers of every client on its test split, and what it answered; return the unweighted mean
        loss."""
        started, answers = time.perf_counter(), list[Answer]()
        with stage("evaluation"):
            records = final_records(
                parts.base, adapters, parts.tokenized, self._config.evaluation, on_answer=answers.append
            )
        if answers:
            self._write(ANSWERS, "".join(f"{_json(answer._asdict())}\n" for answer in answers))
        clients = {record.name: {k: v for k, v in asdict(record).items() if k != "name"} for record in records}
        self._store.append(
            {
                "event": "final",
                "round": round_,
                "split": "test",
                "clients": clients,
                "timing": {"evaluate_seconds": time.perf_counter() - started, "peak_memory_bytes": self._peak.lap()},
            }
        )
        return sum(record.loss_sum / record.tokens for record in records) / len(records)

    def _spent(self, parts: Assembly, results: Results) -> dict[str, float]:
        """Epsilon by client: of those who took part, and of whoever gave more away than is recorded, as happens where a
        round is repeated after a crash and draws others."""
        privacy, names = self._config.exchange.privacy, parts.clients.names
        took_part = {report.id for report in results.reports}
        spent = dict[str, float]()
        # clients that have yet to join again have uploads too
        for id_, (name, uploads) in enumerate(zip(names, parts.exchange.state().facts["uploads"], strict=False)):
            value = epsilon(uploads, privacy.noise_multiplier, privacy.delta)
            if id_ in took_part or value > self._told_epsilon.get(name, 0.0):
                spent[name] = value
        self._told_epsilon |= spent
        return spent

    def _write(self, name: str, text: str) -> None:
        with stage("disk"):
            write_bytes_atomically(self._store.path / name, text.encode(errors="backslashreplace"))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shown_blocks(graph: Graph) -> dict[str, Any]:
    """Of a graph by layer, those of the first and the last layers that share one, by the first of these layers."""
    distinct = graph_parts(graph)
    shown = distinct if len(distinct) < 3 else (distinct[0], distinct[-1])
    return {layers[0]: part.adjacency_KK.tolist() for part, layers in shown if layers}
