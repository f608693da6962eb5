"""Builds from a config everything that a run needs, in the order an example travels.

Knows nothing about rounds: `experiment` turns what is assembled here into a run.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import TypeAdapter

from fedmira import __version__
from fedmira.config.data import DataConfig
from fedmira.config.graph import GraphConfig
from fedmira.config.run import ModelConfig, RunConfig
from fedmira.data.graph_file import read_graph_file
from fedmira.data.partition import build_federation
from fedmira.data.probe import probe_texts
from fedmira.data.tokenization import (
    TokenizationReport,
    TokenizedClient,
    TokenizedExample,
    digest,
    tokenize_federation,
)
from fedmira.errors import SetupError
from fedmira.evaluation.costs import adapter_bytes, model_bytes, optimizer_bytes
from fedmira.evaluation.predictions import prompt_products
from fedmira.exchange import Exchange
from fedmira.exchange.in_process import InProcess
from fedmira.federation.graph import from_matrix
from fedmira.federation.method import Method, State
from fedmira.federation.registry import build_method
from fedmira.model.base import BaseModel, load_base
from fedmira.model.cache import check_growing
from fedmira.model.kinds import adapter_layout, initial_adapters
from fedmira.model.source import refuse_idle_revision
from fedmira.paths import home_expanded
from fedmira.runs.same_base import versions
from fedmira.training.memory import available_bytes, choose_cohort_size
from fedmira.types import Arena, Clients, Federation, Layout


class Assembly(NamedTuple):
    """The parts of a run."""

    config: RunConfig
    federation: Federation
    tokenized: tuple[TokenizedClient, ...]
    tokenization: TokenizationReport
    base: BaseModel
    layout: Layout
    clients: Clients
    method: Method
    cohort_size: int
    exchange: Exchange
    given_graph: np.ndarray | None = None
    """With `method.graph.kind: given`, the matrix (K, K) of the file in client order; with `embeddings`, the inner
    products of the clients' prompt embeddings."""
    texts: tuple[TokenizedExample, ...] = ()
    """With `method.graph.kind: probe`, what the server compares predictions on."""

    def initial_adapters(self) -> Arena:
        """The arena every run of this config starts from."""
        return initial_adapters(self.base, self.layout, len(self.clients.names), self.config.seed)

    def saved_tensors(self, state: State) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of `state`, on the CPU: the adapters, what clients are judged by, and memory."""
        tensors = {"state.adapters": state.adapters.values_KP}
        tensors |= {f"state.memory.{name}": tensor for name, tensor in state.memory.items()}
        personalised = self.method.personalise(state).values_KP
        if personalised.data_ptr() != state.adapters.values_KP.data_ptr():
            tensors["personalised"] = personalised
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def manifest(self) -> dict[str, Any]:
        """The facts of the run that do not change while it runs; JSON-able."""
        dtype, training = self.base.adapter_dtype, self.config.training
        if self.config.method.sends_scalars:
            training = training.plain_sgd
        return {
            "fedmira": __version__,
            "versions": versions(),
            "seed": self.config.seed,
            "data": {**self.federation.provenance, "tokenization": _counts(self.tokenization)},
            "clients": [
                {
                    "name": client.name,
                    "task": client.task,
                    "category": client.category,
                    "train": len(tokens.train),
                    "validation": len(tokens.validation),
                    "test": len(tokens.test),
                    "sha256": digest(tokens),
                }
                for client, tokens in zip(self.federation.clients, self.tokenized, strict=True)
            ],
            "model": self.base.facts(),
            "adapter": {"parameters": self.layout.num_parameters, "bytes": adapter_bytes(self.layout, dtype)},
            "memory": {
                "model_bytes": model_bytes(self.base.num_parameters, self.base.dtype),
                "adapter_bytes": adapter_bytes(self.layout, dtype),
                "optimizer_bytes": optimizer_bytes(self.layout, training, dtype),
            },
            "cohort_size": self.cohort_size,
            "graph": self.graph_facts(),
        }

    def graph_facts(self, first: int | None = None) -> dict[str, Any]:
        """Which graph the method asks for, and the hash of what it is made from, so that a changed file is noticed.

        Args:
            first: look at the part of a given one among so many first clients; None: at all of it.
        """
        section = getattr(self.config.method, "graph", None)
        if section is None:
            return {}
        facts = {"kind": section.kind}
        # embeddings follow from data and base model, whose hashes are in the manifest
        if section.kind == "given" and self.given_graph is not None:
            among = np.ascontiguousarray(self.given_graph[:first, :first])
            facts["sha256"] = hashlib.sha256(among.tobytes()).hexdigest()
        if self.texts:
            tokens = [(text.prompt_length, text.tokens.tolist()) for text in self.texts]
            facts["sha256"] = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
        return facts


def assemble(
    config: RunConfig,
    *,
    cohort_size: int | None = None,
    known: tuple[str, ...] = (),
    first: int | None = None,
    commit: str | None = None,
) -> Assembly:
    """Build every part of the run `config` describes.

    Args:
        config: what to run.
        cohort_size: overrides the config's; for a run that goes on.
        known: its clients, which come first in this order; others of the data follow.
        first: leave out all clients but so many of the first; None: nobody.
        commit: of the base, for a run that goes on, see `load_base`.

    Raises:
        DataError: a file, a client or a graph is unusable.
        SetupError: the model cannot be loaded, or its tokenizer gives tokens that it has no embedding for.
        ConfigError: no layer matches the targets, or a setting does not fit the data.
    """
    everybody = cached_federation(config, known)
    federation = replace(
        everybody,
        clients=everybody.clients[:first],
        true_adjacency_KK=None if (true := everybody.true_adjacency_KK) is None else true[:first, :first],
    )
    if not known:
        refuse_idle_revision(config.model)
    base = cached_base(config.base_model, commit)
    if config.evaluation.generation.enabled and base.body is None:
        check_growing(base)
    layout = adapter_layout(base, config.model.adapter, config.method.num_pairs)
    longest = min(config.data.max_length, base.max_length - layout.num_virtual_tokens)
    tokenized, tokenization = tokenize_federation(
        federation, base.tokenizer, config.data.template, longest, config.data.cut
    )
    for client in tokenized:
        refuse_tokens_without_embedding(base, (*client.train, *client.validation, *client.test))
    clients = Clients(
        names=federation.names,
        num_examples_K=tuple(len(client.train) for client in tokenized),
        tasks=tuple(client.task for client in federation.clients),
        seed=config.seed,
        true_adjacency_KK=federation.true_adjacency_KK,
        ranks_K=config.model.adapter.ranks_of(federation.names),
    )
    graph = getattr(config.method, "graph", None)
    given = None if graph is None else read_graph(graph, everybody.names)
    given = None if given is None else given[:first, :first]
    texts: tuple[TokenizedExample, ...] = ()
    if graph is not None and graph.kind == "embeddings":
        given = prompt_products(base, [client.train for client in tokenized], config.evaluation.batch_tokens)
    elif graph is not None and graph.kind == "probe":
        template, cut = config.data.template, config.data.cut
        texts = probe_texts(graph.probe_path, graph.probe_examples, base.tokenizer, template, longest, cut, config.seed)
        refuse_tokens_without_embedding(base, texts)
    method = build_method(config.settled_method, clients, given, config.federation)
    if cohort_size is None:
        wanted = config.training.cohort_size
        cohort_size = (
            choose_cohort_size(
                base, layout, tokenized, config.training, available_bytes(base.device), config.model.adapter.dropout
            )
            if wanted == "auto"
            else wanted
        )
    exchange = InProcess(
        base,
        layout,
        tokenized,
        config.training,
        dropout=config.model.adapter.dropout,
        total_rounds=config.federation.rounds,
        seed=config.seed,
        cohort_size=cohort_size,
        batch_tokens=config.evaluation.batch_tokens,
        exchange=config.exchange,
        texts=texts,
    )
    return Assembly(
        config, federation, tokenized, tokenization, base, layout, clients, method, cohort_size, exchange, given, texts
    )


def _counts(report: TokenizationReport) -> dict[str, Any]:
    return {
        "template": report.template,
        "max_length": report.max_length,
        "num_examples": sum(client.num_examples for client in report.clients),
        "num_tokens": sum(client.num_tokens for client in report.clients),
        "num_supervised_tokens": sum(client.num_supervised_tokens for client in report.clients),
        "truncated_prompts": report.truncated_prompts,
        "dropped_examples": report.dropped_examples,
    }


def read_graph(config: GraphConfig, names: tuple[str, ...]) -> np.ndarray | None:
    """The matrix (K, K) of a graph of kind `given`, with rows and columns in the order of `names`; None for others.

    Raises:
        DataError: the file is missing, unreadable, of the wrong size, or names other clients.
    """
    if config.path is None:
        return None
    matrix, labels = read_graph_file(home_expanded(config.path))
    return from_matrix(matrix, labels, names)


def refuse_tokens_without_embedding(base: BaseModel, examples: Iterable[TokenizedExample]) -> None:
    """Refuse tokens beyond the rows of the embedding, as of a tokenizer that was added to over a model that was not.

    Entries of the tokenizer that no example uses do no harm, and many published models have some.

    Raises:
        SetupError: names the largest token and the example that it is in.
    """
    num_rows = int(base.model.get_input_embeddings().weight.shape[0])
    largest, id_ = max(((int(example.tokens.max()), example.id) for example in examples), default=(0, ""))
    if largest >= num_rows:
        token = base.tokenizer.convert_ids_to_tokens(largest)
        raise SetupError(
            f"the tokenizer of {base.name} writes token {largest} ({token!r}, in the example {id_ or 'unnamed'!r}), "
            f"but the model has {num_rows} embeddings, for tokens 0 to {num_rows - 1}. Use the tokenizer that the "
            "model was trained with, or give the model rows for the tokens that were added "
            f"(model.resize_token_embeddings({len(base.tokenizer)}) in transformers) and save both"
        )


def cached_base(config: ModelConfig, commit: str | None = None) -> BaseModel:
    """The frozen base model, see `load_base`; the runs of a process share it, of an id of the hub the commit too."""
    # adapters are no part of it
    key = config.model_dump_json(exclude={"adapter"}), _stamp(config.path)
    held = _BASES.get(key)
    if held is None or commit not in (None, held.commit):
        # before the next one is in memory
        _BASES.clear()
        held = None
        held = _BASES[key] = load_base(config, commit)
    return held


def cached_federation(config: RunConfig, known: tuple[str, ...] = ()) -> Federation:
    """The clients of `config`, the `known` ones first; runs that differ only in method or training share them."""
    return _federation(config.data.model_dump_json(), config.seed, _stamp(getattr(config.data, "path", "")), known)


Stamp: TypeAlias = tuple[tuple[str, int, int], ...]
_DATA: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)


_BASES: dict[tuple[str, Stamp], BaseModel] = {}
"""The one that was used last."""


@functools.lru_cache(maxsize=4)
def _federation(data_json: str, seed: int, stamp: Stamp, known: tuple[str, ...]) -> Federation:
    return build_federation(_DATA.validate_json(data_json), seed, known)


def _stamp(path: str) -> Stamp:
    """Another value once a file that `path` names, matches or holds was written: what was cached is stale then."""
    if not path:
        return ()
    place = home_expanded(path)
    # as data is looked for: what is there by that very name is no pattern
    found = [place] if os.path.exists(place) else [Path(match) for match in glob.glob(str(place), recursive=True)]
    stamps: set[tuple[str, int, int]] = set()
    for one in found:
        with suppress(OSError):
            for file in one.iterdir() if one.is_dir() else [one]:
                with suppress(OSError):
                    stamps.add((str(file), file.stat().st_mtime_ns, file.stat().st_size))
    return tuple(sorted(stamps))
